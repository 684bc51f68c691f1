"""`make demo`: teaches the shipped base a new task with several adapters of one budget, and exports one of them.

The base (train/pretrain.py) can reverse a word and can advance its letters, but does not know what "Encrypt." asks for,
and was never shown the two steps together (train/tasks.py). Training and test words are disjoint. Every method gets the
same records, steps and targets, and its own default learning rate (train/optim.py).
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from train import cli, data, evaluate, export, merging, metrics, tasks
from train.config import AdapterConfig, Config, DataConfig, ExportConfig, ModelConfig, OptimConfig, RunConfig
from train.finetune import Result, finetune
from train.run import Base, load_base, load_run

BASE = Path(__file__).parent / "assets" / "base"
OUT = Path("runs/demo")
TOLERANCE = 1e-4
STEPS, BATCH, LENGTH = 160, 32, 32
# Rank 8 costs LoRA, HiRA, BoHA and ABBA (4 + 4) the same. The Hadamard Adapter has one scale and shift per feature.
METHODS: dict[str, AdapterConfig] = {
    "abba": AdapterConfig(method="abba", rank=8),
    "hira": AdapterConfig(method="hira", rank=8),
    "boha": AdapterConfig(method="boha", rank=8, options={"blocks": 4}),
    "lora": AdapterConfig(method="lora", rank=8),
    "hadamard_adapter": AdapterConfig(method="hadamard_adapter"),
}


def train_one(name: str, base: Base, train: Path, test: Path) -> Result:
    """One fine-tuning run in OUT / name, as `python -m train.finetune` does it."""
    config = Config(
        ModelConfig(str(BASE)),
        DataConfig(str(train), eval=str(test), max_length=LENGTH),
        METHODS[name],
        OptimConfig(),
        RunConfig(str(OUT / name), steps=STEPS, batch_size=BATCH, eval_every=20, save_every=0, log_every=40),
    )
    return finetune(config, base)


def largest_difference(result: Result, exported: Path, prompts: Sequence[np.ndarray]) -> float:
    """Between the logits of the adapted model here and of the exported directory in transformers' PyTorch."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    assert result.injection is not None
    apply = result.injection.apply(result.base.model.apply)
    differences = []
    for prompt in prompts:
        ids = prompt[None].astype(np.int64)
        with torch.no_grad():
            theirs = model(torch.from_numpy(ids)).logits.numpy()
        ours = np.asarray(apply(result.params, result.adapters, jnp.asarray(ids)))
        differences.append(np.abs(ours - theirs).max())
    return float(max(differences))


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Held-out loss over the steps, and accuracy before and after."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, bars = figure.subplots(1, 2)
    for row in rows:
        lines = [line for line in metrics.read(OUT / row["method"] / "metrics.jsonl") if "eval_loss" in line]
        losses.plot([line["step"] for line in lines], [line["eval_loss"] for line in lines], "o-", label=row["method"])
    losses.set(xlabel="step", ylabel="held-out loss (nats per token)", yscale="log", title="learning a new word")
    losses.legend()
    losses.grid(alpha=0.3)
    for offset, key in ((-0.2, "accuracy_before"), (0.2, "accuracy_after")):
        drawn = bars.bar(np.arange(len(rows)) + offset, [row[key] for row in rows], 0.4, label=key.replace("_", " "))
        bars.bar_label(drawn, fmt="{:.0%}")
    bars.set_xticks(range(len(rows)), [row["method"] for row in rows], rotation=15)
    bars.set(ylim=(0, 1.3), ylabel="exact match, unseen words", title="accuracy")
    bars.legend(loc="upper left", ncols=2)
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    description = (__doc__ or "").partition(": ")[2]
    argparse.ArgumentParser(prog="python -m train.demo", description=description).parse_args(argv)
    start = time.perf_counter()
    shutil.rmtree(OUT, ignore_errors=True)
    train, test = tasks.write(OUT / "data")
    base = load_base(ModelConfig(str(BASE)))
    unseen = data.read_records(test)

    def accuracy(params: Any) -> float:
        return evaluate.accuracy(base._replace(params=params), unseen, max_new_tokens=8, batch_size=100).accuracy

    before = accuracy(base.params)
    rows, results = [], {}
    for name in METHODS:
        began = time.perf_counter()
        print(f"--- {len(rows) + 1} of {len(METHODS)}: {name}", flush=True)
        result = results[name] = train_one(name, base, train, test)
        seconds = time.perf_counter() - began
        run = load_run(OUT / name)  # what was saved, not what is in memory
        rows.append(
            {
                "method": name,
                "parameters": result.summary["trainable_parameters"],
                "share": result.summary["trainable_share"],
                "accuracy_before": before,
                "accuracy_after": accuracy(merging.merge(run, jnp.float32)),
                "seconds": round(seconds, 1),
                "merge_loss_float32": merging.merge_loss(run, jnp.float32)[1],
                "merge_loss_bfloat16": merging.merge_loss(run, jnp.bfloat16)[1],
            }
        )
    metrics.write_text(OUT / "table.json", json.dumps(rows, indent=2) + "\n")
    plot(rows, OUT / "demo.png")

    best = max(rows, key=lambda row: row["accuracy_after"])["method"]
    exported = OUT / "exported"
    export.export_merged(ExportConfig(str(OUT / best), str(exported), dtype="float32"), load_run(OUT / best))
    prompts = [example.ids for example in data.encode(unseen[:8], base.tokenizer, DataConfig(str(test))).examples]
    difference = largest_difference(results[best], exported, prompts)

    table = Table(title=f'"{unseen[0].fields["instruction"]}" on {len(unseen)} unseen words', title_justify="left")
    table.add_column("method", no_wrap=True)
    for column in ("params", "share", "before", "after", "seconds", "bf16 loss"):
        table.add_column(column, justify="right")
    for row in rows:
        before, after = (f"{row[key]:.1%}" for key in ("accuracy_before", "accuracy_after"))
        figures = f"{row['parameters']:,}", f"{row['share']:.1%}", before, after, f"{row['seconds']:.0f}"
        table.add_row(row["method"], *figures, f"{row['merge_loss_bfloat16']:.1%}")
    Console().print(table)
    print("before, after: exact match; bf16 loss: error of rounding the merged weights to bfloat16, of the update")
    print("one seed, and each method at its own default learning rate: the order is no ranking")
    print(f"{exported} ({best}): largest difference of logits from transformers' {difference:.1e}")
    print(f"{OUT / 'demo.png'}, {OUT / 'table.json'}; {time.perf_counter() - start:.0f} s in all")
    if not difference <= TOLERANCE:  # NaN as well
        sys.exit(f"error: {exported} gives other logits in transformers, by {difference:.1e} (at most {TOLERANCE:.0e})")


if __name__ == "__main__":
    cli.main(main)
