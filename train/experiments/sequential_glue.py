"""Sequential adaptation with MiniLM: an adapter learns one GLUE task, then another; what is left of the first?

    python -m train.experiments.sequential_glue

As `sequential`: stage 2 continues the adapter, or merges it and trains a fresh one on the merged weights, and methods
are compared where they have learnt the second task equally far. Each task has a classifier of its own, trained on the
encoder as the stage begins and frozen in it; the first task is judged with its own. Data: `glue_data`.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import hadamax as hx
from train import cli
from train.experiments import common, glue, glue_fit, retention
from train.experiments.common import Row
from train.experiments.glue_data import TASKS, Examples
from train.experiments.glue_fit import Program, Recipe, epoch_of, first_tokens, fit_heads, predict, walk
from train.experiments.glue_methods import QUERY_VALUE
from train.experiments.glue_study import Head, Prepared, cross_entropy, prepare, scores_of
from train.experiments.sequential import adapters


class Part(NamedTuple):
    """A task of the sequence: what trains, what chooses the rate, what is reported.

    Attributes:
        name: of `TASKS`.
        prepared: the task; its training examples are those that train and, after them, the held-out ones.
        count: how many train.
        dev: a random part of the dev set.
    """

    name: str
    prepared: Prepared
    count: int
    dev: Examples

    def predict(self, program: Program, data: Examples, trainable: Any, classifiers: Any) -> np.ndarray:
        """Logits `[K, N, 2]`."""
        return predict(program, data, TASKS[self.name].widths, trainable, classifiers)

    def score(self, program: Program, trainable: Any, classifiers: Any) -> list[float]:
        """The task's metric of K trainings on its part of the dev set."""
        return scores_of(self.name, self.dev, self.predict(program, self.dev, trainable, classifiers))

    def heads(self, params: Any, seed: int, head: Head) -> Any:
        """A classifier on the encoder of these parameters."""
        base = self.prepared.base._replace(params=params)
        data = self.prepared.train.take(slice(0, self.count))
        states = first_tokens(base, data, TASKS[self.name].widths)
        return jax.tree.map(lambda leaf: leaf[0], fit_heads(base, states, data.labels, [seed], *head))


def part_of(model: str, name: str, count: int, held_out: int, dev: int) -> Part:
    prepared = prepare(model, name, count + held_out)
    rows = np.random.default_rng(0).permutation(len(prepared.dev.labels))[:dev]
    return Part(name, prepared, count, prepared.dev.take(rows))


def climb(
    program: Program,
    at: int,
    parts: Sequence[Part],
    classifiers: Any,
    start: Any,
    *,
    epochs: int,
    batch: int,
    points: int,
    seed: int,
    rates: Sequence[float],
) -> tuple[Any, list[float], np.ndarray]:
    """Trains on the part `at` at several rates at once, all in one order.

    Args:
        classifiers: of each part, leaves `[rates, ...]`.
        points: how often both parts are scored, beside once before.

    Returns:
        What was trained, the held-out loss of each rate, the scores `[rates, points + 1, parts]`.
    """

    def scores(trainable: Any) -> np.ndarray:
        return np.stack([part.score(program, trainable, own) for part, own in zip(parts, classifiers, strict=True)], -1)

    part, own, seeds = parts[at], classifiers[at], [seed] * len(rates)
    data, widths = part.prepared.train.take(slice(0, part.count)), TASKS[part.name].widths
    steps = epochs * math.ceil(part.count / batch)
    looks = {round(steps * point / points) for point in range(1, points + 1)}
    feed = (step for epoch in range(epochs) for step in epoch_of(data, widths, batch, seeds, epoch, own))
    trainable, curve = start, [scores(start)]
    for count, (now, _) in enumerate(walk(program, feed, steps, own, seeds=seeds, rates=rates, start=start), 1):
        trainable = now
        if count in looks:
            curve.append(scores(trainable))
    held_out = part.prepared.train.take(slice(part.count, None))
    losses = cross_entropy(part.predict(program, held_out, trainable, own), held_out.labels)
    return trainable, losses, np.stack(curve, 1)


def sequence(
    model: str,
    tasks: list[str],
    method: str,
    rank: int,
    blocks: int,
    rates: list[list[float]],
    seeds: list[int],
    train_examples: int,
    held_out: int,
    dev_examples: int,
    epochs: list[int],
    points: list[int],
    batch: int,
    head: Row,
    levels: list[float],
) -> list[Row]:
    """Both stages of one method: a row for stage 1, and for each way into stage 2 at each rate.

    Args:
        rates, epochs, points: of each stage.
        levels: scores in the second task at which what is left of the first is read.
    """
    parts = [part_of(model, name, train_examples, held_out, dev_examples) for name in tasks]
    base, recipe = parts[0].prepared.base, Recipe({QUERY_VALUE: adapters(rank, blocks)[method]})
    program, injection = glue_fit.program(base, recipe), hx.inject(recipe.rules, view=base.model.view)

    def run(stage: int, program: Program, heads: Sequence[Any], seed: int, factors: Any = None) -> Any:
        """One start at all rates of the stage: `climb`'s, from these factors or from the adapter's init."""
        classifiers = [repeated(tree, len(rates[stage])) for tree in heads]
        if factors is None:
            start, _ = program.start(jnp.stack([jax.random.key(seed)] * len(rates[stage])), classifiers[stage])
        else:
            start = repeated(factors, len(rates[stage]))
        of = {"epochs": epochs[stage], "points": points[stage], "batch": batch, "rates": rates[stage]}
        return climb(program, stage, parts, classifiers, start, seed=seed, **of)

    def read(stage: int, way: str, runs: Sequence[Any], levels: Sequence[float] = ()) -> tuple[int, list[Row]]:
        losses = np.mean([losses for _, losses, _ in runs], 0)
        curves = np.stack([curves for _, _, curves in runs], 1)
        return retention.rows_of(method, way, program.trainable, rates[stage], losses, curves, levels)

    before = [[part.heads(base.params, seed, Head(**head)) for part in parts] for seed in seeds]
    runs = [run(0, program, own, seed) for own, seed in zip(before, seeds, strict=True)]
    chosen, rows = read(0, "stage 1", runs)
    result = [rows[chosen]]
    ways: dict[str, list[Any]] = {way: [] for way in retention.WAYS}
    for (trained, _, _), (first, _), seed in zip(runs, before, seeds, strict=True):
        factors = jax.tree.map(lambda leaf: leaf[chosen], trained)
        merged = injection.merge(base.params, factors["adapters"])
        heads = [first, parts[1].heads(merged, seed, Head(**head))]
        ways["continued"].append(run(1, program, heads, seed, factors))
        ways["merged, fresh"].append(run(1, program._replace(params=merged), heads, seed + len(seeds)))
    for way, runs in ways.items():
        result += read(1, way, runs, levels)[1]
    return result


def repeated(tree: Any, count: int) -> Any:
    """Leaves `[count, ...]`, all the same."""
    return jax.tree.map(lambda leaf: jnp.repeat(leaf[None], count, 0), tree)


SETTINGS: Row = {
    "model": glue.MODEL,
    "tasks": ["SST-2", "CoLA"],
    "rank": 8,
    "blocks": 4,
    "seeds": [0, 1, 2],
    "train_examples": 768,
    "held_out": 256,
    "dev_examples": 400,
    "epochs": [2, 3],
    "points": [1, 6],
    "batch": 8,
    "head": glue.HEAD,
    "levels": [0.05, 0.1, 0.15],
}
ADDITIVE, COUPLED = [1e-3, 3e-3, 1e-2], [1e-2, 3e-2, 1e-1]
RATES = {  # of each stage
    "LoRA": [ADDITIVE, ADDITIVE],
    "GraLoRA": [ADDITIVE, ADDITIVE],
    "ABBA": [ADDITIVE, ADDITIVE],
    "HiRA": [COUPLED, COUPLED],
    "BoHA": [COUPLED, COUPLED],
}
PARTS = {name: (sequence, {"method": name, "rates": rates} | SETTINGS) for name, rates in RATES.items()}


def report(results: Row) -> str:
    settings = next(iter(results.values()))["settings"]
    first, second = settings["tasks"]
    return f"""# Sequential adaptation: {first}, then {second}

{settings["model"]} learns {settings["train_examples"]} training examples of {first} for {settings["epochs"][0]} epochs,
then as many of {second} for {settings["epochs"][1]}. Every method has LoRA's budget (rank {settings["rank"]}) on
queries and values and {len(settings["seeds"])} starts, each with an order of its own. Each task has its own classifier,
trained on the encoder as its stage begins and frozen then. Scores on {settings["dev_examples"]} of each dev set
(accuracy of SST-2, Matthews' correlation of CoLA), mean ± standard deviation over the starts. Rates, three for
each stage, are chosen by the loss of {settings["held_out"]} held-out training examples at the end; the tables have that
one and the one that keeps most (chosen by what it keeps, so a bound). Matched: the score in the first task where that
in the second first is {settings["levels"][-1]:.0%}, straight between {settings["points"][1]} evaluations; a dash where
not every start gets there. LoRA and GraLoRA are the controls without W0. A small model, little data and a protocol of
ours: nothing here is the paper's result.

{retention.sections(results, first, second)}"""


def draw(figure: Any, results: Row) -> None:
    first, second = next(iter(results.values()))["settings"]["tasks"]
    retention.draw(figure, results, first, second)


def main(argv: Sequence[str] | None = None) -> None:
    common.main("sequential_glue", PARTS, report, draw, argv)


if __name__ == "__main__":
    cli.main(main)
