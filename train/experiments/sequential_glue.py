"""Sequential adaptation with MiniLM: an adapter learns one GLUE task, then another; what is left of the first?

    python -m train.experiments.sequential_glue

As `sequential`: stage 2 continues the adapter, or merges it and trains a fresh one on the merged weights, and methods
are compared where they have learnt the second task equally far. MiniLM hardly learns CoLA from what can be run here
(`glue`), so how far is read on the examples that it is trained on. Each task has a classifier of its own,
trained on the encoder as the stage begins and frozen in it; the first task is judged with its own. Data: `glue_data`.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import hadamax as hx
from train import cli
from train.experiments import experiment, glue, glue_fit, retention
from train.experiments.experiment import Row
from train.experiments.glue_data import TASKS, Examples
from train.experiments.glue_fit import Program, Recipe, epoch_of, first_tokens, fit_heads, predict, walk
from train.experiments.glue_methods import QUERY_VALUE
from train.experiments.glue_study import Head, prepare, scores_of
from train.experiments.sequential import adapters


class Part(NamedTuple):
    """A task of the sequence: the examples that train, and those by which it is judged."""

    name: str
    train: Examples
    judged: Examples

    def score(self, program: Program, trainable: Any, classifiers: Any) -> list[float]:
        """The task's metric of K trainings."""
        logits = predict(program, self.judged, TASKS[self.name].widths, trainable, classifiers)
        return scores_of(self.name, self.judged, logits)

    def heads(self, base: glue_fit.Base, seeds: Sequence[int], head: Head) -> Any:
        """Classifiers on the encoder, leaves `[seeds, ...]`."""
        states = first_tokens(base, self.train, TASKS[self.name].widths)
        return fit_heads(base, states, self.train.labels, seeds, *head)


def parts_of(model: str, tasks: Sequence[str], train: Sequence[int], dev: int) -> list[Part]:
    """The first task, judged by a part of its dev set, and the second, judged by what it is trained on."""
    first, second = (prepare(model, name, count) for name, count in zip(tasks, train, strict=True))
    rows = np.random.default_rng(0).permutation(len(first.dev.labels))[:dev]
    return [Part(tasks[0], first.train, first.dev.take(rows)), Part(tasks[1], second.train, second.train)]


def climb(
    program: Program,
    part: Part,
    judged: Sequence[Part],
    classifiers: Any,
    start: Any,
    *,
    epochs: int,
    batch: int,
    points: int,
    seeds: Sequence[int],
    rates: Sequence[float],
) -> tuple[Any, np.ndarray]:
    """Trains on a part, K times at once.

    Args:
        part: the last of `judged`.
        judged: what is scored.
        classifiers: of each of these, leaves `[K, ...]`.
        start: what trains, leaves `[K, ...]`.
        points: how often they are scored, beside once before.
        seeds, rates: of each training; its seed gives the order of the examples.

    Returns:
        What was trained, and the scores `[K, points + 1, judged]`.
    """

    def scores(trainable: Any) -> np.ndarray:
        return np.stack(
            [part.score(program, trainable, own) for part, own in zip(judged, classifiers, strict=True)], -1
        )

    own = classifiers[-1]
    steps = epochs * math.ceil(len(part.train.labels) / batch)
    looks = {round(steps * point / points) for point in range(1, points + 1)}
    widths = TASKS[part.name].widths
    feed = (step for epoch in range(epochs) for step in epoch_of(part.train, widths, batch, seeds, epoch, own))
    trainable, curve = start, [scores(start)]
    for count, (now, _) in enumerate(walk(program, feed, steps, own, seeds=seeds, rates=rates, start=start), 1):
        trainable = now
        if count in looks:
            curve.append(scores(trainable))
    return trainable, np.stack(curve, 1)


def sequence(
    model: str,
    tasks: list[str],
    method: str,
    rank: int,
    blocks: int,
    rates: list[list[float]],
    seeds: list[int],
    train_examples: list[int],
    dev_examples: int,
    epochs: list[int],
    points: list[int],
    batch: int,
    head: Row,
    levels: list[float],
) -> list[Row]:
    """Both stages of one method: a row for stage 1, and for each way into stage 2 at each rate.

    Args:
        rates, train_examples, epochs, points: of each stage; one rate of stage 1.
        levels: scores in the second task at which what is left of the first is read.
    """
    parts = parts_of(model, tasks, train_examples, dev_examples)
    base, recipe = glue_fit.load(model), Recipe({QUERY_VALUE: adapters(rank, blocks)[method]})
    program, injection = glue_fit.program(base, recipe), hx.inject(recipe.rules, view=base.model.view)
    stage1 = Head(**head)
    of: list[Any] = [{"epochs": epochs[stage], "points": points[stage], "batch": batch} for stage in (0, 1)]

    def begin(program: Program, seeds: Sequence[int], classifiers: Any) -> Any:
        return program.start(jnp.stack([jax.random.key(seed) for seed in seeds]), classifiers)[0]

    def read(stage: int, way: str, costs: Any, curves: Any, levels: Sequence[float] = ()) -> list[Row]:
        return retention.rows_of(method, way, program.trainable, rates[stage], costs, curves, levels)[1]

    before = parts[0].heads(base, seeds, stage1)
    start, chosen = begin(program, seeds, before), {"seeds": seeds, "rates": rates[0] * len(seeds)}
    trained, curves = climb(program, parts[0], parts[:1], [before], start, **chosen, **of[0])
    result = read(0, "stage 1", np.zeros(1), curves[None])

    ways: dict[str, list[Any]] = {way: [] for way in retention.WAYS}
    count = len(rates[1])
    for at, seed in enumerate(seeds):
        factors, first = jax.tree.map(lambda leaf, own=slice(at, at + 1): leaf[own], (trained, before))
        params = injection.merge(base.params, jax.tree.map(lambda leaf: leaf[0], factors["adapters"]))
        merged, second = program._replace(params=params), parts[1].heads(base._replace(params=params), [seed], stage1)
        classifiers = [repeated(tree, count) for tree in (first, second)]
        fresh = begin(merged, [seed + len(seeds)] * count, classifiers[1])
        for way, own, start in (("continued", program, repeated(factors, count)), ("merged, fresh", merged, fresh)):
            chosen = {"seeds": [seed] * count, "rates": rates[1]}
            ways[way].append(climb(own, parts[1], parts, classifiers, start, **chosen, **of[1])[1])
    for way, runs in ways.items():
        curves = np.stack(runs, 1)  # [rates, seeds, points + 1, parts]
        taken = [[retention.position(curve[:, 1], levels[-1]) for curve in of_rate] for of_rate in curves]
        result += read(1, way, np.mean(taken, 1) * epochs[1] / points[1], curves, levels)
    return result


def repeated(tree: Any, count: int) -> Any:
    """Leaves `[count, ...]` from leaves `[1, ...]`."""
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, count, 0), tree)


SETTINGS: Row = {
    "model": glue.MODEL,
    "tasks": ["SST-2", "CoLA"],
    "rank": 8,
    "blocks": 4,
    "seeds": [0, 1, 2],
    "train_examples": [768, 192],
    "dev_examples": 300,
    "epochs": [2, 6],
    "points": [1, 6],
    "batch": 8,
    "head": glue.HEAD,
    "levels": [0.7, 0.8, 0.9],
}
ADDITIVE, COUPLED = [1e-3, 3e-3, 1e-2], [1e-2, 3e-2, 1e-1]
RATES = {  # of each stage: what `glue` chose on the first task, GraLoRA's being LoRA's; a sweep
    "LoRA": [[glue.RATES["LoRA"]], ADDITIVE],
    "GraLoRA": [[glue.RATES["LoRA"]], ADDITIVE],
    "ABBA": [[glue.RATES["ABBA"]], ADDITIVE],
    "HiRA": [[glue.RATES["HiRA"]], COUPLED],
    "BoHA": [[glue.RATES["BoHA"]], COUPLED],
}
PARTS = {name: (sequence, {"method": name, "rates": rates} | SETTINGS) for name, rates in RATES.items()}


def report(results: Row) -> str:
    settings = next(iter(results.values()))["settings"]
    first, second = settings["tasks"]
    trained = settings["train_examples"]
    return f"""# Sequential adaptation: {first}, then {second}

{settings["model"]} learns {trained[0]} training examples of {first} for {settings["epochs"][0]} epochs, then
{trained[1]} of {second} for {settings["epochs"][1]}. Every method has LoRA's budget (rank {settings["rank"]}) on
queries and values and {len(settings["seeds"])} starts, each with an order of its own. Each task has its own
classifier, trained on the encoder as its stage begins and frozen then. {first}: accuracy on
{settings["dev_examples"]} of its dev set.
{second}: Matthews' correlation **on the examples it is trained on**, since nothing that generalises is learnt from so
few (a first run of LoRA, on 768, stayed below 0.08 on the dev set; sizes and levels were set after it and one more of
LoRA). Mean ± standard deviation over the starts. The rate of stage 1 is the one that `glue` chose on {first} (GraLoRA's
is LoRA's). Of stage 2 three are tried: chosen is the one that reaches the last level in the fewest epochs, and tables
also have the one that keeps most where every start gets there (picked by what it keeps, so a bound). Stage 2 begins
above zero: with what a classifier alone fits of so few examples. Matched: the accuracy in the first task where the
correlation in the second first is {settings["levels"][-1]:.0%}, straight between {settings["points"][1]} evaluations; a
dash where not every start gets there. Methods differ after stage 1: see the share of it. LoRA and GraLoRA are the
controls without W0. A small model, very little data and a protocol of ours: nothing here is the paper's result.

{retention.sections(results, first, second)}"""


def draw(figure: Any, results: Row) -> None:
    first, second = next(iter(results.values()))["settings"]["tasks"]
    retention.draw(figure, results, f"{first}, accuracy", f"{second}, correlation on its training examples")


def main(argv: Sequence[str] | None = None) -> None:
    experiment.main("sequential_glue", PARTS, report, draw, argv, __doc__)


if __name__ == "__main__":
    cli.main(main)
