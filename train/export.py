"""Writes a run's merged model as a Hugging Face directory, and says what rounding the weights lost.

    python -m train.export --run runs/gsm8k --out exported/ --dtype float32

The directory has the tokenizer's files too: transformers loads it as it is.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import hadamax as hx
from hadamax import hf, paths
from train import cli
from train.config import ExportConfig, parse
from train.run import Run, load_run


def merge(run: Run, dtype: Any = None) -> tuple[Any, dict[str, float], float]:
    """The merged parameters, rounded once from float32, and what the rounding lost of the updates.

    Args:
        run: a run as `train.run.load_run` gives it.
        dtype: of the result; None keeps each base leaf's.

    Returns:
        `params`, the loss `||round(W) - W|| / ||W - W0||` of each changed leaf (Frobenius norms, W merged in float32),
        and the same ratio over all of them together. An update that is zero loses nothing.

    Raises:
        MergeError: factors that are not finite, a method that does not fold.
    """
    base = run.base.params
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), base)
    merged = hx.join(run.trainable["base"], wide)
    if run.injection is not None:
        merged = run.injection.merge(merged, run.trainable["adapters"])
    kinds = {path: leaf.dtype for path, leaf in paths.leaves(base).items()}
    default = paths.leaves(base)["embed_tokens/embedding"].dtype

    def rounded(path: str, leaf: jax.Array) -> jax.Array:
        return leaf.astype(dtype or kinds.get(path, default))

    params = paths.map_leaves(rounded, merged)
    changed = set(run.trainable["adapters"]) | set(paths.leaves(run.trainable["base"]))
    before, after, final = (paths.leaves(tree) for tree in (wide, merged, params))
    lost = {path: _square(final[path].astype(jnp.float32) - after[path]) for path in after if path in changed}
    update = {path: _square(after[path] - before[path]) for path in lost}
    each = {path: _ratio(lost[path], update[path]) for path in lost}
    return params, each, _ratio(sum(lost.values()), sum(update.values()))


def _square(difference: jax.Array) -> float:
    return float(jnp.sum(jnp.square(difference)))


def _ratio(lost: float, update: float) -> float:
    return (lost / update) ** 0.5 if update else 0.0


def export(config: ExportConfig) -> tuple[dict[str, float], float]:
    """Writes the directory and returns the merge loss of each matrix and of all.

    Raises:
        HadamaxError: a run or base that cannot be used, a target that is not empty, a disk that refuses.
    """
    run = load_run(config.run, config.base)
    params, losses, total = merge(run, config.dtype)
    base, source = run.base, config.base or run.config.model.base
    with tempfile.TemporaryDirectory() as folder:
        if not Path(source).is_dir():  # a base on the hub has no folder to copy the tokenizer from
            base.tokenizer.save_pretrained(folder)
            source = folder
        hf.save_pretrained(config.out, base.model, params, base.config, dtype=config.dtype, tokenizer_from=source)
    return losses, total


def report(losses: Mapping[str, float], total: float) -> None:
    """Prints the table."""
    table = Table("matrix", "merge loss", title="share of the update lost by rounding", title_justify="left")
    for path, loss in losses.items():
        table.add_row(path, f"{loss:.3%}")
    table.add_row("all", f"{total:.3%}")
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> None:
    """The program: `python -m train.export --help`."""
    config = parse(ExportConfig, argv, "train.export")
    losses, total = export(config)
    report(losses, total)
    print(f"written: {config.out}")
    if total > 0.05 and config.dtype != "float32":
        print(f"{total:.0%} of the update is lost in this dtype; --dtype float32 keeps it")


if __name__ == "__main__":
    cli.main(main)
