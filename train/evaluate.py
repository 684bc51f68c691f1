"""Loss and exact-match accuracy, by greedy decoding with a key-value cache.

    python -m train.evaluate --run runs/gsm8k --data test.jsonl --answer last_number --max_new_tokens 200
    python -m train.evaluate --model exported/ --data test.jsonl --template plain

A run is evaluated with the prompt template it was trained with.
"""

import functools
import json
import re
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

import hadamax as hx
from hadamax.generate import generate
from train import cli, data, processes
from train.config import DataConfig, EvaluateConfig, ModelConfig
from train.data import Record
from train.metrics import write_text
from train.parsing import parse
from train.processes import check_rows, mesh_of
from train.progress import show
from train.run import Base, apply_of, load_base, load_run


class Answers(NamedTuple):
    """What was generated for each record, and which are right."""

    texts: list[str]
    correct: list[bool]

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return sum(self.correct) / len(self.correct)


def exact(text: str, reference: str) -> bool:
    """Equal but for white space around it."""
    return text.strip() == reference.strip()


def last_number(text: str, reference: str) -> bool:
    """Whether the last numbers agree within 0.001, thousands separators aside (as LLM-Adapters scores arithmetic).

    Example:
        >>> last_number("so 1,200 + 34 = 1,234.", "#### 1234"), last_number("no idea", "#### 3")
        (True, False)
    """
    found = [re.findall(r"-?\d+(?:\.\d+)?", t.replace(",", "")) for t in (text, reference)]
    return all(found) and abs(float(found[0][-1]) - float(found[1][-1])) <= 1e-3


RULES: dict[str, Callable[[str, str], bool]] = {"exact": exact, "last_number": last_number}


@functools.cache
def _decode_with(model: Any, injection: hx.Injection, leaves: tuple[Any, ...], structure: Any) -> Callable[..., Any]:
    """One function for each model, injection and placement, since `generate` compiles anew for a new one."""
    apply = injection.apply(model.apply, jax.tree.unflatten(structure, leaves))
    return lambda pair, *args, **kwargs: apply(*pair, *args, **kwargs)


def accuracy(
    base: Base,
    records: Sequence[Record],
    *,
    injection: hx.Injection | None = None,
    adapters: Any = None,
    template: str = "plain",
    answer: str = "exact",
    max_new_tokens: int = 64,
    batch_size: int = 32,
) -> Answers:
    """Greedy answers to the records' prompts, as `train.data.tokenize` makes them in training too.

    Args:
        base: the model; `base.params` are used as they are.
        batch_size: records of a batch; its rows are shared out over the mesh.
        injection: applies `adapters` inside each layer; None uses the parameters alone.
        answer: a name of `RULES`.

    Raises:
        DataError: a record without the fields.
    """
    tokenizer = base.tokenizer
    tokenized = data.tokenize(records, tokenizer, template)
    prompts = [[token for ids, _ in pieces[:-1] for token in ids] for pieces in tokenized]
    references = [tokenizer.decode(pieces[-1][0], skip_special_tokens=True) for pieces in tokenized]
    length = max(map(len, prompts))
    params, apply, sharding = base.params, None, hx.batch_sharding(base.mesh)
    if injection is not None:
        model: Any = base.model  # hashable, though its dataclass does not say so
        leaves, structure = jax.tree.flatten(hx.param_shardings(base.params, base.mesh))
        params, apply = (base.params, adapters), _decode_with(model, injection, tuple(leaves), structure)
    texts = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        real = len(batch)
        batch += [batch[-1]] * (batch_size - real)  # one shape, one compilation
        ids = np.array([[tokenizer.eos_token_id] * (length - len(p)) + p for p in batch], np.int32)
        mask = np.array([[0] * (length - len(p)) + [1] * len(p) for p in batch], np.int32)
        new = generate(
            base.model,
            params,
            jax.make_array_from_callback(ids.shape, sharding, ids.__getitem__),
            jax.make_array_from_callback(ids.shape, sharding, mask.__getitem__),
            max_new_tokens=max_new_tokens,
            eos_id=tokenizer.eos_token_id,
            pad_id=tokenizer.eos_token_id,
            apply=apply,
        )
        new = multihost_utils.process_allgather(new, tiled=True)
        texts += tokenizer.batch_decode(new[:real], skip_special_tokens=True)
    return Answers(texts, [RULES[answer](text, ref) for text, ref in zip(texts, references, strict=True)])


def mean_loss(
    base: Base, records: Sequence[Record], config: DataConfig, *, injection=None, adapters=None, batch_size: int = 32
) -> float:
    """Mean loss over the records' response tokens (all tokens with `response_only` off)."""
    apply, sharding = apply_of(base, injection), hx.batch_sharding(base.mesh)

    def loss(params, adapters, batch):
        return jnp.stack(apply(params, adapters, **batch, method="loss"))

    step = jax.jit(loss, out_shardings=NamedSharding(base.mesh, PartitionSpec()))
    rows = data.rows(data.encode(records, base.tokenizer, config).examples, config)
    # One after the other, as in finetune.py.
    sums = [
        jax.device_get(step(base.params, adapters, batch)) for batch in data.eval_batches(rows, batch_size, sharding)
    ]
    total, tokens = np.sum(sums, axis=0)
    return float(total / tokens)


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Loss and accuracy of a run's checkpoint or of a plain model.

    Raises:
        HadamaxError: a run, model or data file that cannot be used.
    """
    mesh = mesh_of(config.mesh)
    check_rows(mesh, "batch_size", config.batch_size)
    records = data.read_records(config.data)[: config.limit]
    run = injection = adapters = None
    if config.run is not None:
        run = load_run(config.run, config.base, config.dtype, config.step, config.member, mesh)
        base, settings = run.base, run.config.data
        params = hx.join(run.trainable["base"], base.params)
        injection, adapters = run.injection, run.trainable["adapters"]
        if config.merge and injection is not None:
            params, injection, adapters = injection.merge(params, adapters), None, None
        base = base._replace(params=params)
    else:
        base = load_base(ModelConfig(str(config.model), config.dtype), mesh)
        settings = DataConfig(config.data)
    settings = DataConfig(
        config.data,
        max_length=config.max_length or settings.max_length,
        template=config.template or settings.template,
        response_only=settings.response_only,
    )
    common = {"injection": injection, "adapters": adapters, "batch_size": config.batch_size}
    result: dict[str, Any] = {} if run is None else {"step": run.step}
    result |= {"records": len(records), "loss": mean_loss(base, records, settings, **common)}
    if config.max_new_tokens:
        answers = accuracy(
            base,
            records,
            template=settings.template,
            answer=config.answer,
            max_new_tokens=config.max_new_tokens,
            **common,
        )
        result |= {"correct": sum(answers.correct), "accuracy": answers.accuracy}
        if config.out is not None and processes.is_first():
            lines = [
                json.dumps({**record.fields, "generated": text, "correct": correct}) + "\n"
                for record, text, correct in zip(records, answers.texts, answers.correct, strict=True)
            ]
            write_text(Path(config.out), "".join(lines))
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """The program: `python -m train.evaluate --help`."""
    config = parse(EvaluateConfig, argv, "train.evaluate")
    processes.join(config.mesh)
    if jax.distributed.is_initialized():  # JAX has taken SIGTERM, for programs that have something to save
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    show(evaluate(config), f"{config.run or config.model} on {config.data}")


if __name__ == "__main__":
    cli.main(main)
