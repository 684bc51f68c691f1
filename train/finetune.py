"""Fine-tunes a pretrained decoder with adapters.

    python -m train.finetune --model.base DIR --data.train FILE.jsonl --adapter.method hira --adapter.rank 16
    python -m train.finetune --config train/configs/gsm8k.yaml --optim.lr 1e-3

Reads from top to bottom: `finetune` prepares the base, the data, the adapters and the optimiser, then runs the loop.
`make_steps` holds what is compiled. The run's folder gets config.json, manifest.json, metrics.jsonl, TensorBoard
events, loss.png, summary.json and checkpoints, from the newest of which the same command continues.
"""

import dataclasses
import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import hadamax as hx
from hadamax import paths
from hadamax.checkpoint import Checkpoints
from train import cli, compiling, data, flops, guard, manifest, metrics, optim
from train.config import Config, parse
from train.profiling import Profile
from train.progress import Progress, show
from train.run import Base, apply_of, initial_trainable, injection_of, load_base
from train.stopping import Best


class State(NamedTuple):
    """What a step changes: `{"adapters": ..., "base": ...}`, and the state of the guarded optimiser."""

    trainable: Any
    optimizer: Any


class Result(NamedTuple):
    """A finished run. `params` holds the base with its trained leaves in place; `adapters` are not merged."""

    summary: dict[str, Any]
    base: Base
    params: Any
    injection: hx.Injection | None
    adapters: dict[str, Any]


def make_steps(
    apply: Callable[..., Any], optimizer: optax.GradientTransformationExtraArgs, grad_accum: int
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The compiled training and evaluation steps.

    Gradients are taken with respect to the trainable tree alone. The frozen base is an argument: as a constant it would
    be copied into the program. The optimiser is one of `guard.guard`.

    Returns:
        `train(state, frozen, batch) -> (state, {loss, grad_norm, param_norm, **guard.counts})` (the state is donated)
        and `evaluate(trainable, frozen, batch) -> [2]`, the sum of the losses and of the weights.
    """

    def loss(trainable, frozen, batch):
        params = hx.join(trainable["base"], frozen)
        return apply(params, trainable["adapters"], **batch, method="loss")

    def train(state, frozen, batch):
        micro_batches = jax.tree.map(lambda x: x.reshape(grad_accum, -1, *x.shape[1:]), batch)

        def accumulate(total, micro):
            (nll, _), grads = jax.value_and_grad(loss, has_aux=True)(state.trainable, frozen, micro)
            return jax.tree.map(jnp.add, total, (nll, grads)), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.trainable))
        total, _ = jax.lax.scan(accumulate, zero, micro_batches)
        # Divided once by the tokens of all micro-batches: the mean over tokens, however they are spread.
        tokens = jnp.maximum(batch["weights"].sum(), 1)
        nll, grads = jax.tree.map(lambda x: x / tokens.astype(x.dtype), total)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.trainable, value=nll)
        trainable = optax.apply_updates(state.trainable, updates)
        norms = {"grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(trainable)}
        return State(trainable, optimizer_state), {"loss": nll, **norms, **guard.counts(optimizer_state)}

    def evaluate(trainable, frozen, batch):
        return jnp.stack(loss(trainable, frozen, batch))

    return jax.jit(train, donate_argnums=0), jax.jit(evaluate)


def finetune(config: Config, base: Base | None = None) -> Result:
    """Runs to `run.steps`, from the newest checkpoint in `run.out` if there is one.

    Args:
        config: the settings.
        base: the model where it is loaded already; `config.model` then only names it.

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
    if out.exists() and not out.is_dir():
        raise hx.ConfigError(f"run.out: {out} is a file; give a directory")
    if run.compilation_cache is not None:
        compiling.cache(run.compilation_cache)
    injection_of(config.adapter, None)  # before the model is loaded: an unknown method or option
    train_records, eval_records = data.load(config.data, run.seed)  # first: cheap, and often wrong
    base = load_base(config.model) if base is None else base

    # Data: rows of one shape, so that each step compiles once.
    encoded = data.encode(train_records, base.tokenizer, config.data)
    train_rows = data.rows(encoded.examples, config.data)
    held_out = data.encode(eval_records, base.tokenizer, config.data) if eval_records else None
    eval_rows = data.rows(held_out.examples, config.data) if held_out else None
    batches = data.train_batches(train_rows, run.batch_size, run.seed)
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
    injection = injection_of(config.adapter, base.model.view)
    trainable = initial_trainable(jax.random.key(run.seed), base.params, injection, config.adapter.train_base)
    _, frozen = hx.split(base.params, config.adapter.train_base)
    adapters = {path: t.adapter.config for path, t in injection.targets(base.params).items()} if injection else {}
    if injection is not None:
        print(injection.summary(base.params))
    if trained := paths.leaves(trainable["base"]):
        count = sum(leaf.size for leaf in trained.values())
        print(f"base parameters that train: {', '.join(trained)} ({count:,})")
    optimizer = optim.build(config.optim, optim.learning_rates(trainable, adapters, config.optim), steps)
    optimizer = guard.guard(optimizer, config.optim.spike)
    train_step, eval_step = make_steps(apply_of(base.model, injection), optimizer, run.grad_accum)
    one_batch = next(data.eval_batches(train_rows, run.batch_size, limit=1))  # for its shapes
    meter = flops.meter(tokens_per_step, eval_step, trainable, frozen, one_batch)
    train_step = compiling.once("the training step", train_step)
    eval_step = compiling.once("the evaluation step", eval_step)
    state = State(trainable, optimizer.init(trainable))

    def evaluate() -> float:
        """Mean loss over the held-out tokens."""
        sums = jnp.zeros(2)
        for batch in data.eval_batches(eval_rows, run.batch_size, run.eval_rows) if eval_rows else ():
            sums += eval_step(state.trainable, frozen, batch)
        total, tokens = map(float, sums)
        return total / tokens

    out.mkdir(parents=True, exist_ok=True)
    meta = {"config": config.to_dict(), "injection": None if injection is None else injection.to_config()}
    best = Best()
    with Checkpoints(out / "checkpoints", run.keep) as checkpoints, signals() as received:
        start = checkpoints.latest() or 0
        if start:
            state = resume(checkpoints, start, state, batches, meta, run.resume)
            best = Best(*checkpoints.json(start, "meta")["best"])
        finished = start >= steps or best.exhausted(run.patience)
        if start:
            print(f"{out} is finished" if finished else f"continuing from step {start} of {steps} in {out}")
        if not finished:  # a finished run stays as it is
            metrics.write_text(out / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")
            manifest.append(out / "manifest.json", manifest.describe(config, start))
        step, saved, pending, seconds, trained = start, start, [], 0.0, 0
        with (
            metrics.Metrics(out, start) as log,
            Progress(start, steps) as progress,
            Profile(out / "profile" / f"process_{jax.process_index()}", run.profile) as profile,
        ):

            def evaluate_and_log(best: Best) -> Best:
                log.log(step, eval_loss=(eval_loss := evaluate()))
                progress.update(step, eval_loss=eval_loss)
                return best.after(step, eval_loss)

            missed = best.last < start and due(start, run.eval_every, steps)  # a signal came
            if eval_rows is not None and not finished and (missed or not start):
                best = evaluate_and_log(best)
            clock = time.perf_counter()
            while not finished:
                step += 1
                state, values = profile.step(step, train_step, state, frozen, next(batches))
                pending.append(values)
                stop = bool(received)
                eval_now = eval_rows is not None and not stop and due(step, run.eval_every, steps)
                save_now = stop or due(step, run.save_every, steps)
                if not (step == start + 1 or due(step, run.log_every, steps) or eval_now or save_now):
                    continue
                # The only transfers from the device: every `log_every` steps, and before an evaluation or a save.
                fetched = jax.device_get(pending)
                guard.check(fetched, step, config.optim.max_skips, saved, out)
                elapsed = time.perf_counter() - clock
                if step > start + 1:  # the first step compiles
                    seconds, trained = seconds + elapsed, trained + len(fetched)
                figures = guard.means(fetched) | meter.rates(len(fetched), elapsed)
                log.log(step, **figures)
                progress.update(step, **figures)
                pending = []
                if eval_now:
                    best = evaluate_and_log(best)
                finished = step == steps or best.exhausted(run.patience)
                if save_now or finished:
                    meta["best"] = best
                    checkpoints.save(step, state.trainable, state.optimizer, data=batches.get_state(), meta=meta)
                    saved = step
                if stop:
                    break
                clock = time.perf_counter()
        checkpoints.wait()
    lines = metrics.read(out / "metrics.jsonl")
    metrics.plot(lines, out / "loss.png", f"{config.adapter.method or 'base parameters'}, {out.name}")
    if received and not finished:
        name = signal.Signals(received[0]).name
        message = f"stopped by {name} after step {saved}; the checkpoint is in {out}, the same command continues"
        raise cli.Interrupted(message, received[0])
    if step < steps:
        print(f"stopped after step {step} of {steps}: no lower held-out loss since step {best.step} (run.patience)")

    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    count = sum(leaf.size for leaf in jax.tree.leaves(state.trainable))
    total = sum(leaf.size for leaf in jax.tree.leaves(base.params))
    methods = sorted({adapter["method"] for adapter in adapters.values()}) or ["none"]
    summary = {
        "method": "+".join(methods),
        "trainable_parameters": count,
        "base_parameters": total,
        "trainable_share": count / total,
        "steps": step,
        "skipped_steps": int(state.optimizer.skipped),
        **(meter.rates(trained, seconds) if trained else {"tokens_per_second": None}),
        "train_loss": next((line["loss"] for line in reversed(lines) if "loss" in line), None),
        "eval_loss_first": losses[0] if losses else None,
        "eval_loss_last": losses[-1] if losses else None,
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
    metrics.write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    params = hx.join(state.trainable["base"], frozen)
    return Result(summary, base, params, injection, state.trainable["adapters"])


def resume(
    checkpoints: Checkpoints, step: int, state: State, batches: Any, meta: dict[str, Any], wanted: bool
) -> State:
    """The state of a checkpoint, with the data iterator at its position.

    Raises:
        ConfigError: the run has another model or other adapters, or a new run was wanted.
        CheckpointError: a damaged or mismatched checkpoint.
    """
    if not wanted:
        raise hx.ConfigError(f"{checkpoints.directory} holds step {step}; give another run.out, or run.resume true")
    old, meta = checkpoints.json(step, "meta"), json.loads(json.dumps(meta))  # tuples are lists in JSON
    for name, there, here in (
        ("model", old["config"]["model"]["base"], meta["config"]["model"]["base"]),
        ("adapters", old["injection"], meta["injection"]),
        ("train_base", old["config"]["adapter"]["train_base"], meta["config"]["adapter"]["train_base"]),
    ):
        if here != there:
            found = f"was made with other {name}: {difference(there, here)}"
            raise hx.ConfigError(f"{checkpoints.directory} {found}; give another run.out")
    free = {"out", "eval_every", "eval_rows", "save_every", "keep", "log_every", "resume"}  # change no parameter
    free |= {"patience", "profile", "compilation_cache", "max_skips"}
    for section in ("model", "data", "optim", "run"):
        for name, value in meta["config"][section].items():
            if name not in free and old["config"][section].get(name) != value:
                changed = f"{section}.{name} was {old['config'][section].get(name)!r}, now {value!r}"
                print(f"note: {changed}; the resumed run is not the uninterrupted one")
    batches.set_state(checkpoints.json(step, "data"))
    trainable = checkpoints.arrays(step, "trainable", state.trainable)
    return State(trainable, checkpoints.arrays(step, "state", state.optimizer))


def difference(there: Any, here: Any, where: str = "") -> str:
    """The first difference of two JSON values.

    Example:
        >>> difference({"rules": [{"rank": 8}]}, {"rules": [{"rank": 16}]})
        'rules.0.rank was 8, now 16'
    """
    if type(there) is type(here) and isinstance(there, dict | list) and len(there) == len(here):
        pairs = there.items() if isinstance(there, dict) else enumerate(there)
        for key, value in pairs:
            if isinstance(here, dict) and key not in here:
                break
            if value != here[key]:
                return difference(value, here[key], f"{where}.{key}".lstrip("."))
    return f"{where} was {json.dumps(there)}, now {json.dumps(here)}".lstrip()


def due(step: int, every: int, steps: int) -> bool:
    """Whether something done every so many steps (0: never), and after the last, is to be done.

    Example:
        >>> [due(step, 4, 10) for step in (3, 4, 8, 10)], due(5, 0, 10)
        ([False, True, True, True], False)
    """
    return step == steps or bool(every and step % every == 0)


@contextmanager
def signals() -> Iterator[list[int]]:
    """Collects the first SIGINT or SIGTERM in place of its effect; the second one has it."""
    received: list[int] = []
    old = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore(*_: Any) -> None:
        for number, handler in old.items():
            signal.signal(number, handler)

    def receive(number: int, _: Any) -> None:
        received.append(number)
        restore()

    try:
        for number in old:
            signal.signal(number, receive)
        yield received
    finally:
        restore()


def main(argv: Sequence[str] | None = None) -> None:
    """The program: `python -m train.finetune --help`."""
    show(finetune(parse(Config, argv, "train.finetune")).summary, "fine-tuning finished")


if __name__ == "__main__":
    cli.main(main)
