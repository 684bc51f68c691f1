"""Writes a run's merged model, or its adapters alone, as a directory that others load.

    python -m train.export --run runs/gsm8k --out exported/ --dtype float32 --verify
    python -m train.export --run runs/gsm8k --out adapter/ --adapter peft --as lora --rank 64
    python -m train.export --run runs/gsm8k --out adapter/ --adapter native

The merged directory has the tokenizer's files too: transformers loads it as it is. What rounding the merged weights
loses is reported for each matrix, and so is what a conversion to LoRA loses.
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import hadamax as hx
from hadamax import hf
from hadamax.files import check_new
from hadamax.hf import families
from train import cli, processes
from train.config import ExportConfig, UsageError
from train.merging import bound, merge_loss, requantizing_loss
from train.parsing import parse
from train.processes import mesh_of
from train.run import Run, load_run

CONVERSIONS = {"loha": hx.convert.to_loha, "hira": hx.convert.to_hira, "boha": hx.convert.to_boha}


def export_merged(config: ExportConfig, run: Run) -> tuple[dict[str, float], float]:
    """Writes the merged model and returns the merge loss of each matrix and of all.

    Raises:
        HadamaxError: a method that does not fold, a target that is not empty, a disk that refuses.
    """
    losses, total = merge_loss(run, config.dtype)
    source = config.base or run.config.model.base
    with tempfile.TemporaryDirectory() as folder:
        if not Path(source).is_dir():  # a base on the hub has no folder to copy the tokenizer from
            run.base.tokenizer.save_pretrained(folder)
            source = folder
        params = bound(run, config.dtype)
        hf.save_pretrained(config.out, run.base.model, params, run.base.config, tokenizer_from=source)
    return losses, total


def identity(run: Run) -> dict[str, Any]:
    """What decides, beside the weights, what the base computes: its config.json without the dtype."""
    return {k: v for k, v in families.write_config(run.base.config, run.base.model.task).items() if k != "torch_dtype"}


def export_adapter(config: ExportConfig, run: Run) -> dict[str, float]:
    """Writes the adapters and returns the largest relative error that converting made in each kernel.

    Raises:
        HadamaxError: no adapters, a method that the format or `as_` has no form for, a target that is not empty.
    """
    injection, adapters, base = run.injection, run.trainable["adapters"], run.trainable["base"]
    if injection is None and (config.adapter == "peft" or config.as_ is not None):
        raise hx.ConfigError(
            f"{config.run} has no adapters, only trained base parameters; export it --merged or --adapter native"
        )
    errors: dict[str, float] = {}
    if config.as_ is not None and injection is not None:
        if config.as_ == "lora":
            options = {"rank": config.rank, "energy": config.energy}
            converted = hx.convert.to_lora(injection, adapters, run.base.params, **options)
        else:
            converted = CONVERSIONS[config.as_](injection, adapters, run.base.params)
        injection, adapters = converted.injection, converted.adapters
        errors = {path: float(np.max(error)) for path, error in converted.errors.items()}
        for path, reason in converted.kept.items():
            print(f"note: {path} keeps its method: {reason}")
    name = config.base or run.config.model.base
    if config.adapter == "peft" and injection is not None:
        hf.save_adapter(config.out, run.base.model, injection, adapters, base=base, base_model_name_or_path=name)
    else:
        hx.save_adapters(config.out, injection, adapters, run.base.params, base=base, model_config=identity(run))
    return errors


def largest_difference(config: ExportConfig, run: Run) -> tuple[float, float]:
    """Between the logits of the run and of what was written and is read back; and the largest logit.

    Both compute in float32, so that the difference is what merging, rounding and converting made.
    """
    model = run.base.model.clone(dtype=jnp.float32)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, run.base.config.vocab_size, (2, 32)))

    def logits(model: Any, injection: hx.Injection | None, adapters: Any, base: Any, params: Any) -> jax.Array:
        params = hx.join(base, params)
        if injection is None or not injection.rules:
            return jax.jit(model.apply)(params, ids)
        return jax.jit(injection.apply(model.apply))(params, adapters, ids)

    params, trained = run.base.params, run.trainable
    ours = logits(model, run.injection, trained["adapters"], trained["base"], params)
    if config.adapter is None:
        written, merged, _ = hf.load_pretrained(config.out)
        nothing = jax.tree.map(lambda _: None, merged)
        theirs = logits(written.clone(dtype=jnp.float32), None, None, nothing, merged)
    elif config.adapter == "peft":
        theirs = logits(model, *hf.load_adapter(config.out, model, params), params)
    else:
        theirs = logits(model, *hx.load_adapters(config.out, params, model_config=identity(run)), params)
    return float(jnp.max(jnp.abs(ours - theirs))), float(jnp.max(jnp.abs(ours)))


def report(title: str, column: str, values: Mapping[str, float]) -> None:
    """Prints a table of shares."""
    table = Table("matrix", column, title=title, title_justify="left")
    for path, value in values.items():
        table.add_row(path, f"{value:.3%}")
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> None:
    """The program: `python -m train.export --help`."""
    config = parse(ExportConfig, argv, "train.export")
    if processes.found(os.environ) is not None and config.mesh.distributed == "auto":
        raise UsageError(
            "export runs in one process; start it on one machine with --mesh.distributed never (on one host of a TPU"
            " slice with JAX_PLATFORMS=cpu, too)"
        )
    check_new(config.out)  # before the work
    run = load_run(config.run, config.base, step=config.step, member=config.member, mesh=mesh_of(config.mesh))
    if config.adapter is None:
        losses, total = export_merged(config, run)
        report("error of rounding, relative to the update", "merge loss", {**losses, "all": total})
        if quantize := run.config.model.quantize:
            print(
                f"note: the base was quantised to {quantize}: what is written is its dequantised weights, not the"
                f" original ones, with the update added; quantising them again would lose {requantizing_loss(run):.0%}"
                " of the update"
            )
        if total > 0.05 and config.dtype != "float32":
            print(f"rounding to this dtype is off by {total:.0%} of the update; --dtype float32 keeps it")
    elif errors := export_adapter(config, run):
        report(f"error of --as {config.as_}, relative to the update", "largest error", errors)
    print(f"written: {config.out}, from step {run.step} of {config.run}")
    if config.verify:
        difference, largest = largest_difference(config, run)
        print(f"verified: logits differ from the run's by at most {difference:.1e} (the largest is {largest:.1f})")


if __name__ == "__main__":
    cli.main(main)
