"""Fine-tunes a pretrained decoder with adapters.

    python -m train.finetune --model.base DIR --data.train FILE.jsonl --adapter.method hira --adapter.rank 16
    python -m train.finetune --config train/configs/gsm8k.yaml --optim.lr 1e-3

Reads from top to bottom: `finetune` prepares the base, the data, the adapters and the optimiser, then runs the loop.
`make_steps` holds what is compiled. The run's folder gets config.json, metrics.jsonl, TensorBoard events, loss.png,
summary.json and checkpoints, the last ones and the best; from the newest the same command continues.
"""

import dataclasses
import functools
import json
import math
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import hadamax as hx
from hadamax import paths
from hadamax.checkpoint import Checkpoints
from train import cli, data, metrics, optim, processes
from train.config import Config, parse
from train.processes import Silent, check_rows, mesh_of
from train.progress import Progress, show
from train.resume import identity, resume
from train.run import Base, apply_of, initial_trainable, injection_of, load_base, trainable_shardings


class State(NamedTuple):
    """What a step changes: `{"adapters": ..., "base": ...}`, and the optimiser's state."""

    trainable: Any
    optimizer: Any


class Shardings(NamedTuple):
    """Where the arguments of a step lie."""

    state: State
    frozen: Any
    batch: NamedSharding


class Result(NamedTuple):
    """A finished run. `params` holds the base with its trained leaves in place; `adapters` are not merged."""

    summary: dict[str, Any]
    base: Base
    params: Any
    injection: hx.Injection | None
    adapters: dict[str, Any]


class NotFiniteError(hx.HadamaxError):
    """The loss, the gradient or a parameter is NaN or infinite."""


def placement(optimizer: optax.GradientTransformation, trainable: Any, frozen: Any, mesh: Mesh) -> Shardings:
    """The optimiser's state lies where the leaves lie that it is for; its counters are whole on every device."""
    leaves, base = jax.tree.map(lambda leaf: leaf.sharding, (trainable, frozen))
    moments = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, trainable),
        leaves,
        transform_non_params=lambda _: NamedSharding(mesh, PartitionSpec()),
    )
    return Shardings(State(leaves, moments), base, hx.batch_sharding(mesh))


def make_steps(
    apply: Callable[..., Any], optimizer: optax.GradientTransformation, grad_accum: int, shardings: Shardings
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The compiled training and evaluation steps.

    Gradients are taken with respect to the trainable tree alone. The frozen base is an argument: as a constant it would
    be copied into the program.

    Args:
        grad_accum: micro-batches; each has rows of every device.
        shardings: of the arguments; a new state lies where the old one lay.

    Returns:
        `train(state, frozen, batch) -> (state, {loss, grad_norm, param_norm})` (the state is donated) and
        `evaluate(trainable, frozen, batch) -> [2]`, the sum of the losses and of the weights.
    """

    state_at, frozen_at, rows = shardings
    whole = NamedSharding(rows.mesh, PartitionSpec())

    def loss(trainable, frozen, batch):
        params = hx.join(trainable["base"], frozen)
        return apply(params, trainable["adapters"], **batch, method="loss")

    def train(state, frozen, batch):
        def strided(x):  # rows i, i + grad_accum, ...: consecutive rows would be those of a few devices
            x = x.reshape(-1, grad_accum, *x.shape[1:]).swapaxes(0, 1)
            return jax.lax.with_sharding_constraint(x, NamedSharding(rows.mesh, PartitionSpec(None, *rows.spec)))

        micro_batches = jax.tree.map(strided, batch)

        def accumulate(total, micro):
            (nll, _), grads = jax.value_and_grad(loss, has_aux=True)(state.trainable, frozen, micro)
            return jax.tree.map(jnp.add, total, (nll, grads)), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.trainable))
        total, _ = jax.lax.scan(accumulate, zero, micro_batches)
        # Divided once by the tokens of all micro-batches: the mean over tokens, however they are spread.
        tokens = jnp.maximum(batch["weights"].sum(), 1)
        nll, grads = jax.tree.map(lambda x: x / tokens.astype(x.dtype), total)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        norms = {"grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(trainable)}
        return State(trainable, optimizer_state), {"loss": nll, **norms}

    def evaluate(trainable, frozen, batch):
        return jnp.stack(loss(trainable, frozen, batch))

    return (
        jax.jit(train, donate_argnums=0, in_shardings=(state_at, frozen_at, rows), out_shardings=(state_at, whole)),
        jax.jit(evaluate, in_shardings=(state_at.trainable, frozen_at, rows), out_shardings=whole),
    )


def finetune(config: Config, base: Base | None = None) -> Result:
    """Runs to `run.steps`, from the newest checkpoint in `run.out` if there is one.

    Args:
        config: the settings.
        base: the model where it is loaded already, on its mesh; `config.model` then only names it.

    Raises:
        HadamaxError: settings, data or a checkpoint that cannot be used; `NotFiniteError` when training diverges.
        Interrupted: SIGINT or SIGTERM; the step was finished and a checkpoint written.
    """
    started = time.time()
    if Path(config.model.base).is_dir():  # the run's folder must find it from anywhere
        absolute = dataclasses.replace(config.model, base=str(Path(config.model.base).resolve()))
        config = dataclasses.replace(config, model=absolute)
    run, out = config.run, Path(config.run.out)
    if out.exists() and not out.is_dir():
        raise hx.ConfigError(f"run.out: {out} is a file; give a directory")
    injection_of(config.adapter, None)  # before the model is loaded: an unknown method or option
    mesh = mesh_of(config.mesh) if base is None else base.mesh
    check_rows(mesh, "run.batch_size / run.grad_accum", run.batch_size // run.grad_accum)
    train_records, eval_records = data.load(config.data, run.seed)  # first: cheap, and often wrong
    base = load_base(config.model, mesh) if base is None else base
    if mesh.size > 1:
        sizes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
        print(f"mesh: {sizes}; {mesh.size} devices of {jax.process_count()} processes")

    # Data: rows of one shape, so that each step compiles once.
    encoded = data.encode(train_records, base.tokenizer, config.data)
    train_rows = data.rows(encoded.examples, config.data)
    held_out = data.encode(eval_records, base.tokenizer, config.data) if eval_records else None
    eval_rows = data.rows(held_out.examples, config.data) if held_out else None
    batches = data.train_batches(train_rows, run.batch_size, run.seed, hx.batch_sharding(mesh))
    steps = run.steps or max(1, math.ceil(run.epochs * len(train_rows) / run.batch_size))
    tokens_per_step = run.batch_size * sum(len(e.ids) - 1 for e in encoded.examples) / len(train_rows)
    for name, part in (("training", encoded), ("held-out", held_out)):
        if part is not None:
            cut = f", {part.truncated} cut to {config.data.max_length} tokens" if part.truncated else ""
            left_out = f", {part.dropped} left out (no response within that length)" if part.dropped else ""
            print(f"{name} records: {len(part.examples):,}{cut}{left_out}")

    # What trains.
    injection = injection_of(config.adapter, base.model.view)
    train_base = config.adapter.train_base
    init = functools.partial(initial_trainable, injection=injection, train_base=train_base)
    init = jax.jit(init, out_shardings=trainable_shardings(base, injection, train_base))
    trainable = init(jax.random.key(run.seed), base.params)
    _, frozen = hx.split(base.params, train_base)
    adapters = {path: t.adapter.config for path, t in injection.targets(base.params).items()} if injection else {}
    if injection is not None:
        print(injection.summary(base.params))
    if trained := paths.leaves(trainable["base"]):
        count = sum(leaf.size for leaf in trained.values())
        print(f"base parameters that train: {', '.join(trained)} ({count:,})")
    optimizer = optim.build(config.optim, optim.learning_rates(trainable, adapters, config.optim), steps)
    shardings = placement(optimizer, trainable, frozen, mesh)
    train_step, eval_step = make_steps(apply_of(base, injection), optimizer, run.grad_accum, shardings)
    state = State(trainable, jax.jit(optimizer.init, out_shardings=shardings.state.optimizer)(trainable))

    def evaluate() -> float:
        """Mean loss over the held-out tokens."""
        rows = data.eval_batches(eval_rows, run.batch_size, shardings.batch, run.eval_rows) if eval_rows else ()
        sums = [eval_step(state.trainable, frozen, batch) for batch in rows]
        total, tokens = np.sum(jax.device_get(sums), axis=0)
        return float(total / tokens)

    processes.make_shared(out)
    meta = {"config": config.to_dict(), "injection": None if injection is None else injection.to_config()}
    meta["base"] = identity(frozen)
    with Checkpoints(out / "checkpoints", run.keep) as checkpoints, processes.signals() as received:
        start, state = resume(checkpoints, state, batches, meta, run.resume)
        if start:
            print(f"continuing from step {start} of {steps} in {out}" if start < steps else f"{out} is finished")
        if start < steps and processes.is_first():  # a finished run stays as it is
            metrics.write_text(out / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")
        saved, pending, seconds, trained = start, [], 0.0, 0
        recorders = (metrics.Metrics(out, start), Progress(start, steps)) if processes.is_first() else [Silent()] * 2
        with recorders[0] as log, recorders[1] as progress:
            if eval_rows is not None and not start:
                log.log(0, eval_loss=(eval_loss := evaluate()))
                progress.update(0, eval_loss=eval_loss)
            clock = time.perf_counter()
            for step in range(start + 1, steps + 1):
                state, values = train_step(state, frozen, next(batches))
                pending.append(values)
                stop = processes.stopping(received, step)
                eval_now = eval_rows is not None and not stop and due(step, run.eval_every, steps)
                save_now = stop or due(step, run.save_every, steps)
                if not (step == start + 1 or due(step, run.log_every, steps) or eval_now or save_now):
                    continue
                # The only transfers from the device: every `log_every` steps, and before an evaluation or a save.
                fetched = jax.device_get(pending)
                check_finite(fetched, step, saved, out)
                elapsed = time.perf_counter() - clock
                speed = len(fetched) * tokens_per_step / elapsed
                if step > start + 1:  # the first step compiles
                    seconds, trained = seconds + elapsed, trained + len(fetched)
                mean = {name: float(np.mean([values[name] for values in fetched])) for name in fetched[0]}
                log.log(step, **mean, tokens_per_second=speed)
                progress.update(step, loss=mean["loss"], tokens_per_second=speed)
                pending = []
                if eval_now:
                    log.log(step, eval_loss=(eval_loss := evaluate()))
                    progress.update(step, eval_loss=eval_loss)
                if save_now:
                    loss, position = eval_loss if eval_now else None, batches.get_state()
                    checkpoints.save(step, state.trainable, state.optimizer, data=position, meta=meta, loss=loss)
                    saved = step
                if stop:
                    break
                clock = time.perf_counter()
        checkpoints.wait()
        processes.wait_for_all("checkpoints and metrics are written")
    lines = metrics.read(out / "metrics.jsonl")
    if processes.is_first():
        metrics.plot(lines, out / "loss.png", f"{config.adapter.method or 'base parameters'}, {out.name}")
    if received and saved < steps:
        name = signal.Signals(received[0]).name
        message = f"stopped by {name} after step {saved}; the checkpoint is in {out}, the same command continues"
        raise cli.Interrupted(message, received[0])

    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    count = sum(leaf.size for leaf in jax.tree.leaves(state.trainable))
    total = sum(leaf.size for leaf in paths.leaves(base.params).values())
    methods = sorted({adapter["method"] for adapter in adapters.values()}) or ["none"]
    summary = {
        "method": "+".join(methods),
        "trainable_parameters": count,
        "base_parameters": total,
        "trainable_share": count / total,
        "steps": steps,
        "tokens_per_second": trained * tokens_per_step / seconds if seconds else None,
        "train_loss": next((line["loss"] for line in reversed(lines) if "loss" in line), None),
        "eval_loss_first": losses[0] if losses else None,
        "eval_loss_last": losses[-1] if losses else None,
        "eval_loss_best": min(losses, default=None),
        "records": len(encoded.examples),
        "records_cut": encoded.truncated,
        "records_left_out": encoded.dropped,
        "seconds": round(time.time() - started, 1),
        "out": str(out),
    }
    if start >= steps and (out / "summary.json").is_file():  # nothing ran: the figures are those of the run that did
        summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    if processes.is_first():
        metrics.write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    params = hx.join(state.trainable["base"], frozen)
    return Result(summary, base, params, injection, state.trainable["adapters"])


def check_finite(fetched: Sequence[dict[str, Any]], step: int, saved: int, out: Path) -> None:
    """Raises `NotFiniteError` with the first bad step among the last ones, which end at `step`."""
    for i, values in enumerate(fetched):
        bad = [name for name, value in values.items() if not np.isfinite(value)]
        if bad:
            kept = f"the checkpoint of step {saved} is kept in {out}" if saved else "no checkpoint had been written yet"
            found = f"{bad[0]} is {float(values[bad[0]])} at step {step - len(fetched) + 1 + i}"
            raise NotFiniteError(f"{found}; stopped, {kept}; a lower optim.lr often helps")


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
    show(finetune(config).summary, "fine-tuning finished")


if __name__ == "__main__":
    cli.main(main)
