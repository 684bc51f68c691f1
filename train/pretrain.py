"""The recipe of the shipped base: `python -m train.pretrain train/assets/base`.

A Llama-architecture decoder over bytes, trained from scratch on train/tasks.py. Everything follows from the constants
below and the seed. Its loss, accuracy in each skill and duration are written to `recipe.json` beside the weights:
16 minutes on two shared CPU cores for 1500 steps. Letters are learnt well, arithmetic and look-up are not.
"""

import argparse
import itertools
import json
import random
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import hadamax as hx
from hadamax.hf import families, save_pretrained
from hadamax.models import Decoder
from train import data, evaluate, tasks
from train.config import DataConfig, ModelConfig
from train.run import load_base

SPECIAL = ["<pad>", "<bos>", "<eos>"]
ARCHITECTURE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 256 + len(SPECIAL),
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
RECORDS = 160_000
BATCH, LENGTH, STEPS = 32, 112, 1500
LEARNING_RATE, WARMUP, WEIGHT_DECAY, CLIP = 3e-3, 0.05, 0.05, 1.0


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte behind three special tokens, so that any text has an encoding.

    Example:
        >>> tokenizer = byte_tokenizer()
        >>> tokenizer("A b").input_ids, tokenizer.decode(tokenizer("\\u20ac 1").input_ids, skip_special_tokens=True)
        ([1, 35, 223, 68], '\\u20ac 1')
    """
    vocabulary = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=ARCHITECTURE["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )


def numbered(records: Iterable[tasks.Record]) -> list[data.Record]:
    """Records with their place, as read from a file."""
    return [data.Record(f"record {i}", dict(record)) for i, record in enumerate(records)]


def batches(tokenizer: Any, seed: int) -> Iterator[data.Batch]:
    """Packed batches. Answers are learnt, and of word problems, which stand for English, the question too."""
    records = numbered(itertools.islice(tasks.mixture(seed), RECORDS))
    examples = []
    for answers_only in (True, False):
        config = DataConfig(train="", max_length=LENGTH, packing=True, response_only=answers_only)
        chosen = [record for record in records if bool(record.fields["input"]) == answers_only]
        examples += data.encode(chosen, tokenizer, config).examples
    here = hx.batch_sharding(hx.make_mesh(devices=jax.devices()[:1]))
    return data.train_batches(data.rows(examples, config), BATCH, seed, here)


def accuracy(directory: str, seed: int, count: int = 200) -> dict[str, float]:
    """Share of fresh records of each skill, and of the held-out task, that the written model answers exactly."""
    base = load_base(ModelConfig(directory))
    rng = random.Random(seed)
    tests = {skill.__name__: [skill(rng) for _ in range(count)] for skill in tasks.SKILLS}
    tests["held_out"] = tasks.held_out(seed, 0, count)[1]
    return {name: evaluate.accuracy(base, numbered(test), max_new_tokens=24).accuracy for name, test in tests.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m train.pretrain", description="Trains the shipped base from scratch."
    )
    parser.add_argument("out", help="directory to write")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if Path(args.out).exists():
        parser.error(f"{args.out} exists; remove it first")
    start = time.perf_counter()

    tokenizer = byte_tokenizer()
    config = families.read_config(ARCHITECTURE)[0]
    # Unrolled layers and bfloat16 activations: about half the time of the defaults on a CPU. Parameters are float32.
    model = Decoder(config, dtype=jnp.bfloat16, scan_layers=False)
    params = model.init(jax.random.key(args.seed), jnp.zeros((1, 8), jnp.int32))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, LEARNING_RATE, int(WARMUP * args.steps), args.steps, 0.02 * LEARNING_RATE
    )
    matrices = jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    optimizer = optax.chain(
        optax.clip_by_global_norm(CLIP), optax.adamw(schedule, b2=0.98, weight_decay=WEIGHT_DECAY, mask=matrices)
    )

    def loss(params: Any, batch: data.Batch) -> jax.Array:
        total, count = model.apply(params, **batch, method="loss")  # pyright: ignore[reportArgumentType]
        return total / count

    @jax.jit
    def step(params: Any, state: Any, batch: data.Batch) -> tuple[Any, Any, jax.Array]:
        value, gradients = jax.value_and_grad(loss)(params, batch)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    losses: list[jax.Array] = []
    for i, batch in enumerate(itertools.islice(batches(tokenizer, args.seed), args.steps), 1):
        params, state, value = step(params, state, batch)
        losses.append(value)
        if i % 100 == 0 or i == args.steps:
            seconds = time.perf_counter() - start
            print(f"step {i:5d}  loss {jnp.mean(jnp.stack(losses[-100:])):.4f}  {seconds:6.0f} s", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        settings = Path(folder, "tokenizer_config.json")  # transformers 4 knows the class by its older name only
        settings.write_text(settings.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
        save_pretrained(args.out, model, params, config, tokenizer_from=folder)
    recipe = {
        "steps": args.steps,
        "tokens_per_step": BATCH * LENGTH,
        "seed": args.seed,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "loss": round(float(jnp.mean(jnp.stack(losses[-100:]))), 4),
        "seconds": round(time.perf_counter() - start),
        "accuracy": accuracy(args.out, args.seed + 1),
    }
    Path(args.out, "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
    print(json.dumps(recipe, indent=2))


if __name__ == "__main__":
    main()
