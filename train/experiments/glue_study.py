"""One recipe on one task: data and classifiers of stage 1, the sweep of the learning rate, the row of the results."""

import functools
import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from train.experiments import glue_fit
from train.experiments.experiment import Row
from train.experiments.glue_data import TASKS, Examples, encode, read, score
from train.experiments.glue_fit import Program, epoch_of, predict, to_end, walk
from train.experiments.glue_methods import METHODS, VARIANTS


class Prepared(NamedTuple):
    """A task's data and the frozen encoder's first token of each text."""

    base: glue_fit.Base
    train: Examples
    dev: Examples
    train_states: np.ndarray
    dev_states: np.ndarray


@functools.lru_cache(maxsize=3)
def prepare(model: str, task: str, examples: int) -> Prepared:
    """The first `examples` of the training set in one fixed shuffled order, and the whole dev set."""
    base, widths = glue_fit.load(model), TASKS[task].widths
    records, dev = read(task, "train"), read(task, "dev")
    chosen = np.random.default_rng(0).permutation(len(records))[:examples]
    data = [encode(part, base.tokenizer, widths[-1]) for part in ([records[at] for at in chosen], dev)]
    states = [glue_fit.first_tokens(base, part, widths) for part in data]
    return Prepared(base, data[0], data[1], states[0], states[1])


class Head(NamedTuple):
    """Of stage 1: the rate and the number of steps."""

    rate: float
    steps: int


class Sweep(NamedTuple):
    """The part of the training examples that a sweep trains on, for how long, and how many others it is judged by."""

    examples: int
    held_out: int
    epochs: int


def heads(prepared: Prepared, rows: slice, seeds: Sequence[int], head: Head) -> Any:
    """Stage 1 on some of the training examples."""
    labels = prepared.train.labels[rows]
    return glue_fit.fit_heads(prepared.base, prepared.train_states[rows], labels, seeds, *head)


def trained(
    prepared: Prepared,
    task: str,
    rows: slice,
    program: Program,
    classifiers: Any,
    *,
    epochs: int,
    batch: int,
    **of: Any,
) -> tuple[Any, np.ndarray]:
    """Stage 2 on some of the training examples; `of` as for `glue_fit.walk`."""
    data, widths = prepared.train.take(rows), TASKS[task].widths
    steps = epochs * math.ceil(len(data.lengths) / batch)
    feed = (step for epoch in range(epochs) for step in epoch_of(data, widths, batch, of["seeds"], epoch, classifiers))
    return to_end(walk(program, feed, steps, classifiers, **of))


def swept(
    prepared: Prepared,
    task: str,
    program: Program,
    rates: Sequence[float],
    at_once: int,
    batch: int,
    head: Head,
    sweep: Sweep,
    seed: int = 0,
) -> list[float]:
    """The held-out loss of each rate, by some trainings at once; infinite where it diverged.

    Stage 1 learns from all examples but the held-out ones, stage 2 from a part of them.
    """
    held, rest = slice(0, sweep.held_out), slice(sweep.held_out, len(prepared.train.labels))
    part = slice(sweep.held_out, sweep.held_out + sweep.examples)
    data, found = prepared.train.take(held), []
    one = heads(prepared, rest, [seed], head)
    for at in range(0, len(rates), at_once):
        group = [*rates[at : at + at_once]]
        group += [group[-1]] * (at_once - len(group))  # one number of trainings, so one program
        classifiers = jax.tree.map(lambda w: np.repeat(w, at_once, axis=0), one)
        trainable, _ = trained(
            prepared,
            task,
            part,
            program,
            classifiers,
            epochs=sweep.epochs,
            batch=batch,
            seeds=[seed] * at_once,
            rates=group,
        )
        found += cross_entropy(predict(program, data, TASKS[task].widths, trainable, classifiers), data.labels)
    return [loss if math.isfinite(loss) else math.inf for loss in found[: len(rates)]]


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> list[float]:
    """The mean loss of each training, from logits `[K, N, classes]`."""
    logits = logits.astype(np.float64)
    picked = np.take_along_axis(logits, labels[None, :, None], axis=-1)[..., 0]
    return [float(loss) for loss in (np.logaddexp.reduce(logits, axis=-1) - picked).mean(-1)]


def row(
    prepared: Prepared, task: str, method: str, trainable: int, lr: float, scores: list[float], seconds: float
) -> Row:
    """What every row of the results says.

    `seconds` are those of training all seeds at once, at the chosen rate; `commoner` is the commoner class's share of
    the dev set, `cut` the share of training texts that fill the `cut_to` tokens or were cut to them.
    """
    return {
        "task": task,
        "method": method,
        "metric": TASKS[task].metric,
        "mean": float(np.mean(scores)),
        "std": float(np.std(scores, ddof=1)) if len(scores) > 1 else None,
        "seeds": len(scores),
        "lr": lr,
        "trainable": trainable,
        "share": trainable / glue_fit.size(prepared.base.params),
        "train_examples": len(prepared.train.labels),
        "dev_examples": len(prepared.dev.labels),
        "commoner": float(max(np.bincount(prepared.dev.labels)) / len(prepared.dev.labels)),
        "cut_to": TASKS[task].widths[-1],
        "cut": float((prepared.train.lengths == TASKS[task].widths[-1]).mean()),
        "seconds": round(seconds, 1),
        "scores": scores,
    }


def scores_of(task: str, data: Examples, logits: np.ndarray) -> list[float]:
    """The task's metric of each training, from logits `[K, N, classes]`."""
    return [score(TASKS[task].metric, data.labels, one.argmax(-1)) for one in logits]


def compare(
    model: str,
    task: str,
    method: str,
    rates: list[float],
    train_examples: int,
    seeds: list[int],
    epochs: int,
    batch: int,
    head: Row,
    sweep: Row | None,
) -> list[Row]:
    """One method on one task: the sweep of its rates, all seeds at once at the best rate, the dev set."""
    prepared, stage1 = prepare(model, task, train_examples), Head(**head)
    count, at_once = len(prepared.train.labels), len(seeds)
    classifiers = heads(prepared, slice(0, count), seeds, stage1)
    program = glue_fit.program(prepared.base, {**METHODS, **VARIANTS}[method].recipe)
    best, choice = 0, {}
    if sweep:
        part, begin = Sweep(**sweep), time.perf_counter()
        losses = swept(prepared, task, program, rates, at_once, batch, stage1, part)
        taken = time.perf_counter() - begin
        share = epochs * count / (math.ceil(len(rates) / at_once) * part.epochs * part.examples)
        print(f"{task}, {method}: sweep {taken:.0f} s, so training takes about {taken * share:.0f} s", flush=True)
        best = int(np.argmin(losses))
        choice = {"sweep": list(zip(rates, losses, strict=True)), "rate_at_edge": best in (0, len(rates) - 1)}
    begin = time.perf_counter()
    trainable, curve = trained(
        prepared,
        task,
        slice(0, count),
        program,
        classifiers,
        epochs=epochs,
        batch=batch,
        seeds=seeds,
        rates=[rates[best]] * at_once,
    )
    seconds = time.perf_counter() - begin
    logits = predict(program, prepared.dev, TASKS[task].widths, trainable, classifiers)
    scores = scores_of(task, prepared.dev, logits)
    return [
        row(prepared, task, method, program.trainable, rates[best], scores, seconds)
        | {
            "train_loss": [float(loss) for loss in curve[-(len(curve) // epochs) :].mean(0)],
            "dev_loss": cross_entropy(logits, prepared.dev.labels),
        }
        | choice
    ]


def classifier_alone(model: str, task: str, train_examples: int, seeds: list[int], head: Row) -> list[Row]:
    """Stage 1's row."""
    prepared, stage1 = prepare(model, task, train_examples), Head(**head)
    begin = time.perf_counter()
    classifiers = jax.block_until_ready(heads(prepared, slice(0, len(prepared.train.labels)), seeds, stage1))
    seconds = time.perf_counter() - begin
    logits = jax.vmap(lambda one: glue_fit.head_logits(prepared.base, one, prepared.dev_states))(classifiers)
    scores = scores_of(task, prepared.dev, np.asarray(logits))
    trainable = glue_fit.size(classifiers) // len(seeds)
    states = prepared.train_states
    fitted = jax.vmap(lambda one: glue_fit.head_logits(prepared.base, one, states))(classifiers)
    loss = cross_entropy(np.asarray(fitted), prepared.train.labels)
    return [row(prepared, task, "classifier alone", trainable, stage1.rate, scores, seconds) | {"train_loss": loss}]
