"""One training step of each method here and in Hugging Face PEFT (torch): same model, batch and budget, in turns.

    python -m benchmarks.step [--methods lora,hira,loha,dora,gralora] [--rounds 7]

A tiny Llama (8 layers, width 512, ffn 1376, vocabulary 8192, 4 x 256 tokens, float32, seven targets, rank 32; LoHa 16
per pair, which is the same budget) on the CPU with all cores. The two steps of a method alternate within one process:
the ratio (median over rounds of ours / theirs) holds when the machine's speed drifts. Times are this machine's.
"""

import argparse
import statistics
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hadamax as hx
from hadamax.models import Decoder, DecoderConfig

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCH, LENGTH, VOCABULARY, RANK = 4, 256, 8192, 32
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
PAIRS = {  # ours, and PEFT's configuration; PEFT has no ABBA, BoHA or Hadamard Adapter: the nearest is named
    "lora": (hx.lora(RANK), peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS)),
    "hira": (hx.hira(RANK), peft.HiraConfig(r=RANK, target_modules=TARGETS)),
    "boha / HiRA": (hx.boha(RANK, 4), peft.HiraConfig(r=RANK, target_modules=TARGETS)),
    "loha": (hx.loha(RANK // 2), peft.LoHaConfig(r=RANK // 2, target_modules=TARGETS)),
    "abba / LoHa": (hx.abba(RANK), peft.LoHaConfig(r=RANK // 2, target_modules=TARGETS)),
    "dora": (hx.dora(RANK), peft.LoraConfig(r=RANK, lora_alpha=RANK, use_dora=True, target_modules=TARGETS)),
    "gralora": (hx.gralora(RANK, 2), peft.GraloraConfig(r=RANK, gralora_k=2, target_modules=TARGETS)),
}


def our_step(adapter: hx.Adapter, ids: np.ndarray):
    """A function that takes one AdamW step and waits for it."""
    model = Decoder(DecoderConfig(**SIZES))
    tokens = jnp.asarray(ids)
    params = jax.jit(model.init)(jax.random.key(0), tokens)
    injection = hx.inject({name: adapter for name in TARGETS}, view=model.view)
    adapters, tx = injection.init(jax.random.key(1), params), optax.adamw(1e-3)
    apply = injection.apply(model.apply)

    def loss(adapters, params):
        targets = jnp.roll(tokens, -1, axis=1)
        total, count = apply(params, adapters, tokens, targets, jnp.ones((BATCH, LENGTH)), method="loss")
        return total / count

    @jax.jit
    def train(adapters, state, params):
        updates, state = tx.update(jax.grad(loss)(adapters, params), state, adapters)
        return optax.apply_updates(adapters, updates), state

    state = (adapters, tx.init(adapters))

    def step():
        nonlocal state
        state = jax.block_until_ready(train(*state, params))

    return step


def peft_step(config, ids: np.ndarray):
    """The same in torch."""
    torch.manual_seed(0)
    model = peft.get_peft_model(LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=512)), config)
    tokens = torch.from_numpy(ids).long()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step():
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(PAIRS))
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (BATCH, LENGTH))
    print(f"jax {jax.__version__}, torch {torch.__version__}, peft {peft.__version__}, {args.rounds} rounds")
    print(f"{'method':12} {'ours ms':>9} {'PEFT ms':>9} {'ours / PEFT':>12} {'(min to max)':>16}")
    for name in args.methods.split(","):
        ours, theirs = our_step(PAIRS[name][0], ids), peft_step(PAIRS[name][1], ids)
        for step in (ours, theirs, ours, theirs):
            step()
        times = [(seconds(ours), seconds(theirs)) for _ in range(args.rounds)]
        ratios = [a / b for a, b in times]
        mine, peers = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
        spread = f"({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{name:12} {mine:9.0f} {peers:9.0f} {statistics.median(ratios):12.2f} {spread:>16}", flush=True)


if __name__ == "__main__":
    main()
