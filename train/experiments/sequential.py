"""Sequential adaptation: an adapter learns words about order, then words about length; what is left of the first?

    python -m train.experiments.sequential

On the demo's decoder, which knows none of the words. The second stage either continues the adapter or merges it and
trains a fresh one on the merged weights (for methods tied to the weights the two differ). Methods that learn the second
family further forget more of the first, so they are compared at equal accuracy in the second: where each curve first
reaches it. The starts, each with its own order of the records, and the learning rates train at once, by `vmap`.
"""

import functools
import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hadamax as hx
from train import cli, data, demo, pretrain, tasks
from train.config import LINEAR, DataConfig, ModelConfig
from train.experiments import common
from train.experiments.common import Row
from train.run import load_base

# What each word stands for. Every record of a family takes one of its words.
FAMILIES: dict[str, dict[str, Callable[[str], str]]] = {
    "order": {
        "Encrypt.": lambda s: tasks.apply(("reverse", "advance"), s),
        "Announce.": lambda s: tasks.apply(("rotate", "capitalize"), s),
    },
    "length": {
        "Measure.": lambda s: str(len(s)),
        "Label.": lambda s: f"{s}{len(s)}",
    },
}
LENGTH = 32
STAGES = ("order", "length")
_jit = functools.partial(jax.jit, compiler_options=common.COMPILER)


def adapters(rank: int, blocks: int) -> dict[str, hx.Adapter]:
    """Every method at LoRA's budget."""
    return {
        "LoRA": hx.lora(rank),
        "GraLoRA": hx.gralora(rank, blocks),
        "ABBA": hx.abba(rank),
        "HiRA": hx.hira(rank),
        "BoHA": hx.boha(rank, blocks),
    }


def records(family: str, seed: int, count: int) -> list[tasks.Record]:
    """Records of a family's words, each about another string.

    Example:
        >>> records("length", 0, 1)
        [{'instruction': 'Label.', 'input': 'kyfz', 'output': 'kyfz4'}]
    """
    rng, words = random.Random(f"{family} {seed}"), FAMILIES[family]
    strings: dict[str, None] = {}
    while len(strings) < count:
        strings[tasks.letters(rng, 4, 6)] = None
    return [
        {"instruction": (word := rng.choice(list(words))), "input": text, "output": words[word](text)}
        for text in strings
    ]


def rows_of(tokenizer: Any, chosen: Sequence[tasks.Record]) -> dict[str, jax.Array]:
    """Token rows `[records, 32]`: `input_ids`, `targets` and `weights`, 1 at what is answered."""
    config = DataConfig(train="", max_length=LENGTH)
    encoded = data.encode(pretrain.numbered(chosen), tokenizer, config)
    assert not encoded.truncated
    made = [data.build_row([example], LENGTH) for example in encoded.examples]
    return {key: jnp.asarray(np.stack([row[key] for row in made])) for key in ("input_ids", "targets", "weights")}


def exact_match(logits: jax.Array, rows: dict[str, jax.Array]) -> jax.Array:
    """The share of rows of which greedy decoding gives the answer: it does where each token of the answer is the most
    likely one after those before it.

    Example:
        >>> logits = jnp.array([[[0.0, 1.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]])
        >>> exact_match(logits, {"targets": jnp.array([[1, 1], [1, 1]]), "weights": jnp.array([[0.0, 1.0]] * 2)})
        Array(0.5, dtype=float32)
    """
    return jnp.all((logits.argmax(-1) == rows["targets"]) | (rows["weights"] == 0), -1).mean()


def train(apply: Any, params: Any, factors: Any, rate: Any, order: jax.Array, rows: Any, tests: Any) -> Any:
    """Adam with clipping on rows in an order, at a constant rate after a short warm-up.

    Args:
        apply: `(params, factors, ...)`.
        order: `[points, steps between, batch]`, indices of the rows.
        tests: rows of each family.

    Returns:
        The factors, the loss of each step, and `[points + 1, families]`, the accuracies before and at each point.
    """
    warm = optax.linear_schedule(0.2, 1.0, 4)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.scale_by_schedule(warm))

    def loss(factors: Any, batch: Any) -> jax.Array:
        total, tokens = apply(params, factors, **batch, method="loss")
        return total / tokens

    def step(carry: Any, index: jax.Array) -> Any:
        factors, state = carry
        value, gradient = jax.value_and_grad(loss)(factors, jax.tree.map(lambda x: x[index], rows))
        directions, state = optimizer.update(gradient, state)
        return (jax.tree.map(lambda f, d: f - rate * d, factors, directions), state), value

    def accuracies(factors: Any) -> jax.Array:
        found = [exact_match(apply(params, factors, tests[family]["input_ids"]), tests[family]) for family in STAGES]
        return jnp.stack(found)

    def point(carry: Any, order: jax.Array) -> Any:
        carry, losses = jax.lax.scan(step, carry, order)
        return carry, (losses, accuracies(carry[0]))

    before = accuracies(factors)
    (factors, _), (losses, after) = jax.lax.scan(point, (factors, optimizer.init(factors)), order)
    return factors, losses.reshape(-1), jnp.concatenate([before[None], after])


def crossing(curve: np.ndarray, level: float) -> float | None:
    """The first accuracy is retained, the second learnt: the first one's value where the second first is `level`.

    Between two points both are taken as straight.

    Args:
        curve: `[points, 2]`.

    Example:
        >>> crossing(np.array([[1.0, 0.0], [0.8, 0.5], [0.2, 1.0]]), 0.75), crossing(np.array([[1.0, 0.2]]), 0.5)
        (0.5, None)
    """
    reached = np.flatnonzero(curve[:, 1] >= level)
    if not reached.size:
        return None
    at = int(reached[0])
    if at == 0:
        return float(curve[0, 0])
    share = (level - curve[at - 1, 1]) / (curve[at, 1] - curve[at - 1, 1])
    return float(curve[at - 1, 0] + share * (curve[at, 0] - curve[at - 1, 0]))


def sequence(
    method: str,
    rank: int,
    blocks: int,
    rates: list[list[float]],
    seeds: int,
    points: list[int],
    every: int,
    batch: int,
    tests: int,
    levels: list[float],
) -> list[Row]:
    """Both stages of one method: a row for stage 1, and for each way into stage 2 at each rate.

    Args:
        rates, points: of each stage; learning rates, and evaluations, one `every` so many steps.
        levels: accuracies in the second family at which what is left of the first is read.
    """
    base = load_base(ModelConfig(str(demo.BASE)))
    injection = hx.inject(dict.fromkeys(LINEAR, adapters(rank, blocks)[method]), view=base.model.view)
    count = max(points) * every * batch  # every record is seen once
    made = {family: records(family, 0, tests + count) for family in STAGES}
    held_out = {family: rows_of(base.tokenizer, made[family][:tests]) for family in STAGES}
    rows = {family: rows_of(base.tokenizer, made[family][tests:]) for family in STAGES}
    one = functools.partial(train, injection.apply(base.model.apply), tests=held_out)

    def run(stage: int, params: Any, factors: Any, own_base: bool) -> Any:
        """`[rates, seeds]` of everything; factors, and the base where it is each seed's own, lead with the seeds."""
        rng = np.random.default_rng([stage, seeds])
        size = points[stage], every, batch
        order = np.stack([rng.permutation(count)[: math.prod(size)].reshape(size) for _ in range(seeds)])
        over_seeds = jax.vmap(one, (0 if own_base else None, 0, None, 0, None))
        over_rates = _jit(jax.vmap(over_seeds, (None, None, 0, None, None)))
        return over_rates(params, factors, jnp.asarray(rates[stage]), jnp.asarray(order), rows[STAGES[stage]])

    def best(stage: int, losses: jax.Array) -> tuple[int, list[list[float]]]:
        """The rate of the lowest loss over the last quarter of the steps, on records not seen before."""
        means = np.nan_to_num(np.asarray(losses)[:, :, -(losses.shape[-1] // 4) :].mean((1, 2)), nan=np.inf)
        return int(means.argmin()), [[rate, float(mean)] for rate, mean in zip(rates[stage], means, strict=True)]

    keys = jax.random.split(jax.random.key(0), 2 * seeds)
    init = _jit(jax.vmap(injection.init, (0, None)))
    factors, losses, curves = run(0, base.params, init(keys[:seeds], base.params), False)
    chosen, sweep = best(0, losses)
    size = sum(leaf.size for leaf in jax.tree.leaves(factors)) // (len(rates[0]) * seeds)
    curve = np.asarray(curves, np.float64)[chosen]
    result: list[Row] = [
        {"method": method, "way": "stage 1", "parameters": size, "rate": rates[0][chosen], "sweep": sweep}
        | {"rate_at_edge": chosen in (0, len(rates[0]) - 1), "first": spread(curve[:, -1, 0])}
        | {"second": spread(curve[:, -1, 1]), "curve": curve.mean(0).tolist()}
    ]
    factors = jax.tree.map(lambda leaf: leaf[chosen], factors)
    merged = _jit(jax.vmap(injection.merge, (None, 0)))(base.params, factors)
    fresh = _jit(jax.vmap(injection.init))(keys[seeds:], merged)
    for way, params, start in (("continued", base.params, factors), ("merged, fresh", merged, fresh)):
        _, losses, curves = run(1, params, start, way != "continued")
        chosen, sweep = best(1, losses)
        for at, rate in enumerate(rates[1]):
            curve = np.asarray(curves, np.float64)[at]
            result.append(
                {"method": method, "way": way, "parameters": size, "rate": rate, "chosen": at == chosen}
                | ({"sweep": sweep, "rate_at_edge": at in (0, len(rates[1]) - 1)} if at == chosen else {})
                | {"first": spread(curve[:, -1, 0]), "second": spread(curve[:, -1, 1])}
                | {"matched": {str(level): matched(curve, level) for level in levels}}
                | {"curve": curve.mean(0).tolist()}
            )
    return result


def spread(values: Sequence[float] | np.ndarray) -> Row:
    """Mean, standard deviation and the values."""
    values = np.asarray(values, np.float64)
    return {
        "mean": float(values.mean()),
        "std": float(values.std(ddof=min(1, values.size - 1))),
        "all": values.tolist(),
    }


def matched(curves: np.ndarray, level: float) -> Row:
    """What is left of the first family where the second is at `level`: accuracy, and its ratio to that before.

    Args:
        curves: `[seeds, points, 2]`, from the beginning of stage 2.
    """
    found = [(crossing(curve, level), curve[0, 0]) for curve in curves]
    left = [(value, value / before if before else np.nan) for value, before in found if value is not None]
    if not left:
        return {"reached": 0}
    absolute, relative = zip(*left, strict=True)
    return {"reached": len(left), "absolute": spread(absolute), "relative": spread(relative)}


SETTINGS = {
    "rank": 8,
    "blocks": 4,
    "seeds": 5,
    "points": [10, 20],
    "every": 6,
    "batch": 16,
    "tests": 48,
    "levels": [0.5, 0.8, 0.9],
}
ADDITIVE, COUPLED = [1e-3, 3e-3, 1e-2], [1e-2, 3e-2, 1e-1]
LOWER = [3e-4, 1e-3, 3e-3]
RATES = {  # of each stage
    "LoRA": [ADDITIVE, LOWER],
    "GraLoRA": [ADDITIVE, LOWER],
    "ABBA": [[3e-3, 1e-2, 3e-2], ADDITIVE],
    "HiRA": [COUPLED, [3e-3, 1e-2, 3e-2]],
    "BoHA": [COUPLED, [3e-3, 1e-2, 3e-2]],
}
PARTS = {name: (sequence, {"method": name, "rates": rates} | SETTINGS) for name, rates in RATES.items()}
CONTROLS = ("LoRA", "GraLoRA")
WAYS = ("continued", "merged, fresh")


def chosen_rows(results: Row, way: str) -> list[Row]:
    """Of each method, the row of stage 1 or that of the chosen rate of stage 2."""
    return [row for part in results.values() for row in part["rows"] if row["way"] == way and row.get("chosen", True)]


def keeping_rows(results: Row, way: str, level: float, seeds: int) -> list[Row]:
    """Of each method, the row of the rate that keeps most of the first family where every start reaches the level."""
    rows = []
    for part in results.values():
        found = [row for row in part["rows"] if row["way"] == way and reaches(row, level, seeds)]
        rows += [max(found, key=lambda row: row["matched"][str(level)]["absolute"]["mean"])] if found else []
    return rows


def reaches(row: Row, level: float, seeds: int) -> bool:
    return row["matched"][str(level)]["reached"] == seeds


def percent(value: Row | None) -> str | None:
    """Mean and standard deviation over the starts, in per cent."""
    return None if not value else f"{100 * value['mean']:.1f} ± {100 * value['std']:.1f}"


def at_level(row: Row, level: float, seeds: int) -> list[Any]:
    """Left, absolute and relative, and in how many starts the level was reached; dashes where not in all."""
    found, whole = row["matched"][str(level)], reaches(row, level, seeds)
    return [
        *(percent(found[kind]) if whole else None for kind in ("absolute", "relative")),
        f"{found['reached']}/{seeds}",
    ]


def report(results: Row) -> str:
    settings = next(iter(results.values()))["settings"]
    seeds, levels = settings["seeds"], settings["levels"]
    level = levels[-1]
    parts = []
    rows = [
        (row["method"], row["parameters"], row["rate"], percent(row["first"]), percent(row["second"]))
        for row in chosen_rows(results, "stage 1")
    ]
    head = ("method", "parameters", "rate", "order", "length")
    parts.append(f"## After stage 1, %\n\n{common.table(rows, head)}")
    choices = {
        "the rate of the lowest loss": chosen_rows,
        "the rate that keeps most": functools.partial(keeping_rows, level=level, seeds=seeds),
    }
    for way, (name, choose) in itertools.product(WAYS, choices.items()):
        chosen = choose(results, way)
        rows = [
            [row["method"], row["rate"], *at_level(row, level, seeds), percent(row["second"]), percent(row["first"])]
            for row in chosen
        ]
        head = ("method", "rate", f"order at {level:.0%} of length", "share of stage 1", "starts that reach it")
        table = common.table(rows, (*head, "length at the end", "order at the end"))
        parts.append(f"## Stage 2, {way}, at {name}, %\n\n{table}\n\n{against(chosen, level, seeds)}")
    rows = [
        [row["method"], row["way"], row["rate"], "yes" if row["chosen"] else ""]
        + [at_level(row, one, seeds)[0] for one in levels]
        for way in WAYS
        for part in results.values()
        for row in part["rows"]
        if row["way"] == way
    ]
    head = ("method", "stage 2", "rate", "chosen", *(f"order at {one:.0%}" for one in levels))
    title = "## Every rate of stage 2: what is left where the second family is learnt so far, %"
    parts.append(f"{title}\n\n{common.table(rows, head)}")
    sections = "\n\n".join(parts)
    return f"""# Sequential adaptation: words about order, then words about length

The demo's decoder (0.8 M parameters) learns two new words for changes of a string's order ("Encrypt.", reverse and
advance; "Announce.", rotate and capitalise), then two for its length ("Measure.", "Label."). Every method has LoRA's
budget on all seven projections and {seeds} starts, each with an order of records of its own. Exact match on
{settings["tests"]} unseen strings of each family, mean ± standard deviation over the starts. The rate of stage 1 is
that of its lowest loss; stage 2 begins from those starts. Its rate decides what is forgotten at equal accuracy too: the
tables have that of its lowest loss and, of the three, the one that keeps most (chosen by what it keeps, so a bound).
Matched: the accuracy in the first family where that in the second first is {level:.0%}, straight between evaluations,
one every {settings["every"]} steps; a dash where not every start gets there. LoRA and GraLoRA are the controls without
W0. The second family and the rates of stage 2 were set after looking at runs of single starts: a first choice (digits)
was not learnt in so many steps, and stage 1's rates left nothing of the first family. A toy: two families of one small
decoder and a protocol of ours (the paper's is not public), so nothing here is the paper's result.

{sections}"""


def against(rows: Sequence[Row], level: float, seeds: int) -> str:
    """The other methods less the mean of the controls, in points, with the difference's standard error over starts."""
    left = {row["method"]: row["matched"][str(level)]["absolute"] for row in rows if reaches(row, level, seeds)}
    controls = [left.pop(name) for name in CONTROLS if name in left]
    if len(controls) < len(CONTROLS):
        return "Not every control reaches the level in every start, so there is no mean of the controls."
    mean = sum(found["mean"] for found in controls) / len(controls)
    variance = sum(found["std"] ** 2 for found in controls) / len(controls) ** 2
    gaps = ", ".join(
        f"{name} {100 * (found['mean'] - mean):+.1f} ± {100 * math.sqrt((found['std'] ** 2 + variance) / seeds):.1f}"
        for name, found in left.items()
    )
    return f"Less the mean of the controls ({100 * mean:.1f} %), in points, ± standard error: {gaps}."


def draw(figure: Any, results: Row) -> None:
    figure.set_size_inches(9, 4)
    for axes, way in zip(figure.subplots(1, len(WAYS), sharey=True), WAYS, strict=True):
        for row in chosen_rows(results, way):
            first, second = zip(*row["curve"], strict=True)
            style = "--" if row["method"] in CONTROLS else "-"
            axes.plot(second, first, style, marker=".", label=row["method"])
        axes.set(xlabel="accuracy on length (stage 2)", title=way)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("accuracy on order (stage 1)")
    figure.axes[0].legend()


def main(argv: Sequence[str] | None = None) -> None:
    common.main("sequential", PARTS, report, draw, argv)


if __name__ == "__main__":
    cli.main(main)
