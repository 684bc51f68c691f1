"""Fine-tunes a pretrained decoder with adapters.

    python -m train.finetune --model.base DIR --data.train FILE.jsonl --adapter.method hira --adapter.rank 16
    python -m train.finetune --config train/configs/gsm8k.yaml --optim.lr 1e-3

Reads from top to bottom: `finetune` prepares the base, the data, the adapters and the optimiser, then runs the loop.
What is compiled is in program.py. Where several processes run, each goes this way, and all decide alike; the first one
writes. The run's folder gets config.json, manifest.json, metrics.jsonl, TensorBoard events, loss.png, summary.json and
checkpoints, the last ones and the best; from the newest the same command continues.
"""

import dataclasses
import json
import math
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import hadamax as hx
from hadamax import paths
from hadamax.checkpoint import Checkpoints
from train import cli, compiling, data, flops, manifest, members, metrics, processes
from train.config import Config
from train.group import Group, One
from train.parsing import parse
from train.processes import Silent, check_rows, mesh_of
from train.profiling import Profile
from train.program import assemble
from train.progress import Progress, show, show_rows
from train.resume import identity, resume
from train.run import Base, injection_of, load_base, unplaced_apply_of
from train.stopping import Best


class Result(NamedTuple):
    """A finished run. `params` holds the base with its trained leaves in place; `adapters` are not merged.

    Where several trained at once, what trained leads with their axis (`train.members.select`).
    """

    summary: dict[str, Any]
    base: Base
    params: Any
    injection: hx.Injection | None
    adapters: dict[str, Any]


def finetune(config: Config, base: Base | None = None) -> Result:
    """Runs to `run.steps`, from the newest checkpoint in `run.out` if there is one.

    Args:
        config: the settings.
        base: the model where it is loaded already, on its mesh; `config.model` then only names it.

    Raises:
        HadamaxError: settings, data or a checkpoint that cannot be used; `guard.NotFiniteError` and `.SpikeError` when
            training diverges.
        Interrupted: SIGINT or SIGTERM; the step was finished and a checkpoint written.
    """
    started = time.time()
    if Path(config.model.base).is_dir():  # the run's folder must find it from anywhere
        absolute = dataclasses.replace(config.model, base=str(Path(config.model.base).resolve()))
        config = dataclasses.replace(config, model=absolute)
    run, out = config.run, Path(config.run.out)
    if not (there := next(path for path in (out, *out.absolute().parents) if path.exists())).is_dir():
        raise hx.ConfigError(f"run.out: {there} is a file; give a directory")
    if run.compilation_cache is not None:
        compiling.cache(run.compilation_cache)
    injection_of(config.adapter, None)  # before the model is loaded: an unknown method or option
    mesh = mesh_of(config.mesh) if base is None else base.mesh
    check_rows(mesh, "run.batch_size / run.grad_accum", run.batch_size // run.grad_accum)
    data_seed = run.seed if config.data.seed is None else config.data.seed
    train_records, eval_records = data.load(config.data, data_seed)  # first: cheap, and often wrong
    base = load_base(config.model, mesh) if base is None else base
    if mesh.size > 1:
        sizes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
        print(f"mesh: {sizes}; {mesh.size} devices of {jax.process_count()} processes")

    # Data: rows of one shape, so that each step compiles once.
    encoded = data.encode(train_records, base.tokenizer, config.data)
    train_rows = data.rows(encoded.examples, config.data)
    held_out = data.encode(eval_records, base.tokenizer, config.data) if eval_records else None
    eval_rows = data.rows(held_out.examples, config.data) if held_out else None
    batches = data.train_batches(train_rows, run.batch_size, data_seed, hx.batch_sharding(mesh))
    steps = run.steps or max(1, math.ceil(run.epochs * len(train_rows) / run.batch_size))
    tokens_per_step = run.batch_size * sum(len(e.ids) - 1 for e in encoded.examples) / len(train_rows)
    if run.profile is not None and run.profile[0] > steps:
        raise hx.ConfigError(f"run.profile: begins at step {run.profile[0]}, the run ends at step {steps}")
    for name, part in (("training", encoded), ("held-out", held_out)):
        if part is not None:
            cut = f", {part.truncated} cut to {config.data.max_length} tokens" if part.truncated else ""
            left_out = f", {part.dropped} left out (no response within that length)" if part.dropped else ""
            print(f"{name} records: {len(part.examples):,}{cut}{left_out}")

    # What trains.
    injection, train_base = injection_of(config.adapter, base.model.view), config.adapter.train_base
    each = members.members_of(config)
    group = Group(each) if len(each) > 1 else One()
    if injection is not None:
        print(injection.summary(base.params))
    program = assemble(base, injection, train_base, config.optim, each, steps, run.grad_accum)
    if trained := paths.leaves(program.shapes["base"]):
        size = sum(leaf.size for leaf in trained.values())
        print(f"base parameters that train: {', '.join(trained)} ({size:,})")
    state, frozen, rows_at = program.begin(base.params), program.frozen, program.shardings.batch
    if len(each) > 1:
        members.check_seeds(state.trainable, run.seeds)
        print(f"{len(each)} adapters at once, on the same rows: {'; '.join(map(str, each))}")

    # The steps, each compiled once.
    one_batch = next(data.eval_batches(train_rows, run.batch_size, rows_at, limit=1))  # for its shapes
    unplaced = unplaced_apply_of(base, injection)
    meter = flops.meter(tokens_per_step, unplaced, program.shapes, frozen, one_batch, len(each))
    train_step = compiling.once("the training step", program.train)
    eval_step = compiling.once("the evaluation step", program.evaluate)

    def evaluate() -> Any:
        """Mean loss over the held-out tokens; a list where several train."""
        rows = data.eval_batches(eval_rows, run.batch_size, rows_at, run.eval_rows) if eval_rows else ()
        # One after the other: on CPU, two programs of several devices under way at once can wait for each other.
        sums = [jax.device_get(eval_step(state.trainable, frozen, batch)) for batch in rows]
        total, tokens = np.moveaxis(np.sum(sums, axis=0), -1, 0)
        return (total / tokens).tolist()

    processes.make_shared(out)
    meta = {"config": config.to_dict(), "injection": None if injection is None else injection.to_config()}
    meta |= {"base": identity(frozen), "members": list(each) if len(each) > 1 else None}
    best = Best()
    with Checkpoints(out / "checkpoints", run.keep) as checkpoints, processes.signals() as received:
        asked = optax.tree.get(state.optimizer, "rates")  # None where the program has them
        start, state = resume(checkpoints, state, batches, meta, run.resume)
        if asked is not None:
            state = state._replace(optimizer=optax.tree.set(state.optimizer, rates=asked))
        if start:
            kept = checkpoints.json(start, "meta")
            best = Best(*kept["best"])
            group = Group(each, **kept["group"]) if len(each) > 1 else group
        finished = start >= steps or best.exhausted(run.patience)
        if start:
            print(f"{out} is finished" if finished else f"continuing from step {start} of {steps} in {out}")
        if not finished and processes.is_first():  # a finished run stays as it is
            metrics.write_text(out / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")
            manifest.append(out / "manifest.json", manifest.describe(config, start, mesh.shape))
        step, saved, pending, seconds, trained = start, start, [], 0.0, 0
        recorders = (metrics.Metrics(out, start), Progress(start, steps)) if processes.is_first() else [Silent()] * 2
        tracer = Profile(out / "profile" / f"process_{jax.process_index()}", run.profile)
        with recorders[0] as log, recorders[1] as progress, tracer as profile:

            def evaluate_and_log() -> float:
                losses, lowest = group.evaluated(evaluate())
                log.log(step, eval_loss=losses)
                progress.update(step, eval_loss=losses)
                return lowest

            missed = best.last < start and due(start, run.eval_every, steps)  # a signal came
            if eval_rows is not None and not finished and (missed or not start):
                best = best.after(start, evaluate_and_log())
            clock = time.perf_counter()
            while not finished:
                step += 1
                state, values = profile.step(step, train_step, state, frozen, next(batches))
                pending.append(values)
                stop = processes.stopping(received, step)
                eval_now = eval_rows is not None and not stop and due(step, run.eval_every, steps)
                save_now = stop or due(step, run.save_every, steps)
                if not (step == start + 1 or due(step, run.log_every, steps) or eval_now or save_now):
                    continue
                # The only transfers from the device: every `log_every` steps, and before an evaluation or a save.
                fetched = jax.device_get(pending)
                figures = group.figures(fetched, step, config.optim.max_skips, saved, out)
                elapsed = time.perf_counter() - clock
                if step > start + 1 and not profile.overlaps(step - len(fetched) + 1, step):  # the first step compiles
                    seconds, trained = seconds + elapsed, trained + len(fetched)
                figures |= meter.rates(len(fetched), elapsed)
                log.log(step, **figures)
                progress.update(step, **figures)
                pending, eval_loss = [], None
                if eval_now:
                    best = best.after(step, eval_loss := evaluate_and_log())
                finished = step == steps or best.exhausted(run.patience)
                new_best = eval_now and best.step == step and run.patience is not None  # else it could be lost
                if save_now or finished or new_best:
                    meta |= {"best": best, "group": group.kept()}
                    position = batches.get_state()
                    checkpoints.save(step, state.trainable, state.optimizer, data=position, meta=meta, loss=eval_loss)
                    saved = step
                if stop:
                    break
                clock = time.perf_counter()
        checkpoints.wait()
        processes.wait_for_all("checkpoints and metrics are written")
    lines = metrics.read(out / "metrics.jsonl")
    if processes.is_first():
        metrics.plot(lines, out / "loss.png", f"{config.adapter.method or 'base parameters'}, {out.name}")
    if received and not finished:
        name = signal.Signals(received[0]).name
        message = f"stopped by {name} after step {saved}; the checkpoint is in {out}, the same command continues"
        raise cli.Interrupted(message, received[0])
    if step < steps:
        print(f"stopped after step {step} of {steps}: no lower held-out loss since step {best.step} (run.patience)")

    skipped = np.asarray(jax.device_get(state.optimizer.skipped))
    size = sum(leaf.size for leaf in jax.tree.leaves(program.shapes))
    total = sum(leaf.size for leaf in paths.leaves(base.params).values())
    methods = sorted({adapter["method"] for adapter in program.adapters.values()}) or ["none"]
    summary = {
        "method": "+".join(methods),
        "trainable_parameters": size,
        "base_parameters": total,
        "trainable_share": size / total,
        "steps": step,
        **(meter.rates(trained, seconds) if trained else {"tokens_per_second": None}),
        **group.summary(lines, skipped, best.step),
        "eval_loss_best": best.loss,
        "best_step": best.step,
        "records": len(encoded.examples),
        "records_cut": encoded.truncated,
        "records_left_out": encoded.dropped,
        "seconds": round(time.time() - started, 1),
        "out": str(out),
    }
    if step == start and (out / "summary.json").is_file():  # nothing ran: the figures are those of the run that did
        summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    if processes.is_first():
        metrics.write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    params = hx.join(state.trainable["base"], frozen)
    return Result(summary, base, params, injection, state.trainable["adapters"])


def due(step: int, every: int, steps: int) -> bool:
    """Whether something done every so many steps (0: never), and after the last, is to be done.

    Example:
        >>> [due(step, 4, 10) for step in (3, 4, 8, 10)], due(5, 0, 10)
        ([False, True, True, True], False)
    """
    return step == steps or bool(every and step % every == 0)


def main(argv: Sequence[str] | None = None) -> None:
    """The program: `python -m train.finetune --help`."""
    config = parse(Config, argv, "train.finetune")
    processes.join(config.mesh)
    summary = finetune(config).summary
    show({name: value for name, value in summary.items() if name != "members"}, "fine-tuning finished")
    if "members" in summary:
        names = ("member", "seed", "lr", "train_loss", "eval_loss_last", "eval_loss_best", "best_step")
        short = {name: name.replace("train_loss", "loss").replace("eval_loss_", "eval_") for name in names}
        show_rows([{short[name]: row[name] for name in names} for row in summary["members"]], "each adapter")
        for row in summary["members"]:
            if row["failed"]:
                print(f"adapter {row['member']} was left out: {row['failed']}")


if __name__ == "__main__":
    cli.main(main)
