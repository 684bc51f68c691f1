"""What a Hadamard Adapter learns on GLUE: which layers matter, and how alike its vectors are across tasks."""

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from train.experiments import glue_fit
from train.experiments.experiment import Row
from train.experiments.glue_data import TASKS
from train.experiments.glue_fit import Step, epoch_of, predict, to_end, walk
from train.experiments.glue_methods import HADAMARD, METHODS
from train.experiments.glue_study import Head, cross_entropy, heads, prepare, row, scores_of, trained


def of_layers(trainable: Any, kept: np.ndarray) -> Any:
    """1 at the layers that are kept and 0 at the others, `[K, layers, 1]` at every leaf `[K, layers, D]`."""

    def one(leaf):
        return np.broadcast_to(kept.astype(np.float32)[None, :, None], (*leaf.shape[:2], 1))

    return jax.tree.map(one, trainable)


def layers(
    model: str,
    task: str,
    rate: float,
    train_examples: int,
    seeds: list[int],
    epochs: int,
    batch: int,
    head: Row,
    judged_by: int,
) -> list[Row]:
    """Fewer and fewer layers with an adapter and a trained norm.

    The rule: train all layers; a layer matters as much as the training loss (of `judged_by` examples, mean over the
    seeds) rises when its vectors are put back to where they started; leave out the least of them, train the others
    anew from stage 1, and so on down the same order.
    """
    prepared, stage1 = prepare(model, task, train_examples), Head(**head)
    everything, widths = slice(0, len(prepared.train.labels)), TASKS[task].widths
    classifiers = heads(prepared, everything, seeds, stage1)
    program = glue_fit.program(prepared.base, METHODS[HADAMARD].recipe)
    start, _ = program.start(jax.numpy.stack([jax.random.key(seed) for seed in seeds]), classifiers)
    count = jax.tree.leaves(start)[0].shape[1]
    some = prepared.train.take(slice(0, judged_by))

    def loss(trainable):
        return float(np.mean(cross_entropy(predict(program, some, widths, trainable, classifiers), some.labels)))

    rows, kept, rises = [], np.ones(count, bool), []
    for left_out in range(count):
        begin = time.perf_counter()
        trainable, _ = trained(
            prepared,
            task,
            everything,
            program,
            classifiers,
            epochs=epochs,
            batch=batch,
            seeds=seeds,
            rates=[rate] * len(seeds),
            scale=of_layers(start, kept),
        )
        seconds = time.perf_counter() - begin
        if not left_out:
            whole = loss(trainable)
            for layer in range(count):
                others = of_layers(start, np.arange(count) != layer)
                rises.append(loss(jax.tree.map(lambda w, s, m: s + m * (w - s), trainable, start, others)) - whole)
        scores = scores_of(task, prepared.dev, predict(program, prepared.dev, widths, trainable, classifiers))
        size = program.trainable * int(kept.sum()) // count
        found = row(prepared, task, f"{kept.sum()} of {count} layers", size, rate, scores, seconds)
        rows.append(found | {"layers": [int(at) for at in np.flatnonzero(kept)], "rises": rises})
        kept[int(np.argsort(rises)[left_out])] = False
    return rows


def vectors(trainable: Any, start: Any) -> dict[str, np.ndarray]:
    """How far each of w, b, the norm's gain and shift has moved, `[K, layers, D]`."""
    moved = jax.tree.map(lambda w, s: np.asarray(w - s, np.float64), trainable, start)
    (adapter,) = moved["adapters"].values()
    shift, gain = jax.tree.leaves(moved["base"])  # "bias", "scale"
    return {"w": adapter["weight"], "b": adapter["bias"], "norm gain": gain, "norm shift": shift}


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of two arrays as vectors.

    Example:
        >>> cosine(np.array([1.0, 0.0]), np.array([1.0, 1.0])).__round__(3)
        0.707
    """
    return float((a * b).sum() / math.sqrt((a**2).sum() * (b**2).sum()))


def mixed(feeds: Sequence[Iterator[Step]], counts: Sequence[int], seed: int) -> Iterator[Step]:
    """The steps of several tasks in one shuffled order."""
    order = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(feeds)), counts))
    return (next(feeds[at]) for at in order)


def similarity(
    model: str, tasks: list[str], rate: float, train_examples: int, seeds: list[int], epochs: int, batch: int, head: Row
) -> list[Row]:
    """Each task's own adapter, and one shared by all tasks, each with its task's own classifier of stage 1.

    Rows of scores ("own", "shared"), and rows of cosines of what the vectors have moved, between two tasks and, as
    what to expect of one, between two runs of one task: mean over all pairs of different seeds. A shared adapter's
    number of steps is the sum of the tasks'.
    """
    stage1, recipe = Head(**head), METHODS[HADAMARD].recipe
    data = {task: prepare(model, task, train_examples) for task in tasks}
    program = glue_fit.program(data[tasks[0]].base, recipe)
    classifiers = {task: heads(data[task], slice(0, train_examples), seeds, stage1) for task in tasks}
    start, _ = program.start(jax.numpy.stack([jax.random.key(seed) for seed in seeds]), classifiers[tasks[0]])
    chosen: dict[str, Any] = {"seeds": seeds, "rates": [rate] * len(seeds)}
    found, seconds = {}, {}
    for task in tasks:
        begin, rows = time.perf_counter(), slice(0, train_examples)
        of = {"epochs": epochs, "batch": batch} | chosen
        found[task], _ = trained(data[task], task, rows, program, classifiers[task], **of)
        seconds[task] = time.perf_counter() - begin

    def epoch(number: int) -> Iterator[Step]:
        feeds = [epoch_of(data[t].train, TASKS[t].widths, batch, seeds, number, classifiers[t]) for t in tasks]
        return mixed(feeds, [math.ceil(len(data[t].train.labels) / batch) for t in tasks], number)

    steps = epochs * sum(math.ceil(len(data[task].train.labels) / batch) for task in tasks)
    feed = itertools.chain.from_iterable(epoch(number) for number in range(epochs))
    begin = time.perf_counter()
    found["shared"], _ = to_end(walk(program, feed, steps, classifiers[tasks[0]], **chosen))
    seconds["shared"] = time.perf_counter() - begin

    rows = []
    for task, name in itertools.product(tasks, ("own", "shared")):
        which, dev = task if name == "own" else name, data[task].dev
        scores = scores_of(task, dev, predict(program, dev, TASKS[task].widths, found[which], classifiers[task]))
        rows.append(row(data[task], task, f"{name} adapter", program.trainable, rate, scores, seconds[which]))
    moved = {name: vectors(tree, start) for name, tree in found.items()}
    for a, b in itertools.combinations_with_replacement(moved, 2):
        pairs = list(itertools.permutations(range(len(seeds)), 2))  # a seed is also the classifier's
        for part in moved[a]:
            x, y = moved[a][part], moved[b][part]
            by_layer = [float(np.mean([cosine(x[i, at], y[j, at]) for i, j in pairs])) for at in range(x.shape[1])]
            whole = float(np.mean([cosine(x[i], y[j]) for i, j in pairs]))
            rows.append({"of": part, "between": [a, b], "cosine": whole, "by_layer": by_layer})
    for task, part in itertools.product(moved, ("w", "b", "norm gain", "norm shift")):
        size = np.sqrt((moved[task][part] ** 2).mean((0, 2)))
        rows.append({"of": part, "task": task, "size_by_layer": [float(value) for value in size]})
    return rows
