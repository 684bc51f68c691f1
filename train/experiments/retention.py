"""What is left of a first task while a second is learnt: read off accuracy curves, in tables and a figure.

The rows are of one method each, `way` "stage 1" or one of `WAYS`: `rate`, `first` and `second` (`spread` of the
accuracies at the end), `curve` and `curve_std` over the starts, and for stage 2 `chosen` (of the sweep of
its rate) and `matched` by level.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from train.experiments import experiment
from train.experiments.experiment import Row

CONTROLS = ("LoRA", "GraLoRA")
WAYS = ("continued", "merged, fresh")


def position(values: np.ndarray, level: float) -> float:
    """Where values first reach a level, between two of them as on a straight line; infinite where they never do.

    Example:
        >>> position(np.array([0.0, 0.5, 1.0]), 0.75), position(np.array([0.2]), 0.5)
        (1.5, inf)
    """
    reached = np.flatnonzero(values >= level)
    if not reached.size:
        return math.inf
    at = int(reached[0])
    return at if at == 0 else float(at - 1 + (level - values[at - 1]) / (values[at] - values[at - 1]))


def crossing(curve: np.ndarray, level: float) -> float | None:
    """The first accuracy is retained, the second learnt: the first one's value where the second first is `level`.

    Between two points both are taken as straight.

    Args:
        curve: `[points, 2]`.

    Example:
        >>> crossing(np.array([[1.0, 0.0], [0.8, 0.5], [0.2, 1.0]]), 0.75), crossing(np.array([[1.0, 0.2]]), 0.5)
        (0.5, None)
    """
    at = position(curve[:, 1], level)
    return None if at == math.inf else float(np.interp(at, np.arange(len(curve)), curve[:, 0]))


def spread(values: Sequence[float] | np.ndarray) -> Row:
    """Mean, standard deviation and the values."""
    values = np.asarray(values, np.float64)
    return {
        "mean": float(values.mean()),
        "std": float(values.std(ddof=min(1, values.size - 1))),
        "all": values.tolist(),
    }


def matched(curves: np.ndarray, level: float) -> Row:
    """What is left of the first task where the second is at `level`: accuracy, and its ratio to that before.

    Args:
        curves: `[seeds, points, 2]`, from the beginning of stage 2.
    """
    found = [(crossing(curve, level), curve[0, 0]) for curve in curves]
    left = [(value, value / before if before else np.nan) for value, before in found if value is not None]
    if not left:
        return {"reached": 0}
    absolute, relative = zip(*left, strict=True)
    return {"reached": len(left), "absolute": spread(absolute), "relative": spread(relative)}


def rows_of(
    method: str,
    way: str,
    parameters: int,
    rates: Sequence[float],
    costs: np.ndarray,
    curves: np.ndarray,
    levels: Sequence[float] = (),
) -> tuple[int, list[Row]]:
    """Which rate is the best, and a row for each rate.

    Args:
        costs: `[rates]`, what a rate is chosen by, the lowest: a loss, or the time until a level.
        curves: `[rates, seeds, points, 2]`, scores in the first and the second task; of stage 2 from its beginning.
            Of stage 1 the second may be missing.
        levels: accuracies in the second task at which what is left of the first is read; none for stage 1.
    """
    costs = np.nan_to_num(costs, nan=np.inf, posinf=np.inf)
    chosen = int(costs.argmin())
    rows = []
    for at, (rate, curve) in enumerate(zip(rates, curves, strict=True)):
        row = {"method": method, "way": way, "parameters": parameters, "rate": rate, "chosen": at == chosen}
        if at == chosen and len(rates) > 1:
            row["sweep"] = [[one, float(cost)] for one, cost in zip(rates, costs, strict=True)]
            row["rate_at_edge"] = at in (0, len(rates) - 1)
        row |= {"first": spread(curve[:, -1, 0]), "second": spread(curve[:, -1, 1]) if curve.shape[-1] > 1 else None}
        row["curve"] = curve.mean(0).tolist()
        row["curve_std"] = curve.std(0, ddof=min(1, len(curve) - 1)).tolist()
        if levels:
            row["matched"] = {str(level): matched(curve, level) for level in levels}
        rows.append(row)
    return chosen, rows


def chosen_rows(results: Row, way: str) -> list[Row]:
    """Of each method, the row of stage 1 or that of the chosen rate of stage 2."""
    return [row for part in results.values() for row in part["rows"] if row["way"] == way and row.get("chosen", True)]


def keeping_rows(results: Row, way: str, level: float) -> list[Row]:
    """Of each method, the row of the rate that keeps most, of the rates at which every start reaches the level."""
    rows = []
    for part in results.values():
        found = [row for row in part["rows"] if row["way"] == way and reaches(row, level)]
        rows += [max(found, key=lambda row: row["matched"][str(level)]["absolute"]["mean"])] if found else []
    return rows


def reaches(row: Row, level: float) -> bool:
    """Whether every start reaches the level in the second task."""
    return row["matched"][str(level)]["reached"] == len(row["first"]["all"])


def percent(value: Row | None) -> str | None:
    """Mean and standard deviation over the starts, in per cent."""
    return None if not value else f"{100 * value['mean']:.1f} ± {100 * value['std']:.1f}"


def before(row: Row) -> str:
    """The second task's score as its stage begins, in per cent."""
    return f"{100 * row['curve'][0][1]:.1f}"


def at_level(row: Row, level: float) -> list[Any]:
    """Left, absolute and relative, and in how many starts the level was reached; dashes where not in all."""
    found, whole = row["matched"][str(level)], reaches(row, level)
    return [
        *(percent(found[kind]) if whole else None for kind in ("absolute", "relative")),
        f"{found['reached']}/{len(row['first']['all'])}",
    ]


def sections(results: Row, first: str, second: str) -> str:
    """The tables in Markdown: after stage 1, both ways of stage 2, and every rate of it.

    Args:
        results: of each part its settings (`levels`) and rows.
        first, second: what the tasks are called.
    """
    levels = next(iter(results.values()))["settings"]["levels"]
    level, parts = levels[-1], []
    rows = [
        (row["method"], row["parameters"], row["rate"], percent(row["first"]), percent(row["second"]))
        for row in chosen_rows(results, "stage 1")
    ]
    head = ("method", "parameters", "rate", first, second)
    parts.append(f"## After stage 1, %\n\n{experiment.table(rows, head)}")
    choices = {
        "the chosen rate": chosen_rows,
        "the rate that keeps most": functools.partial(keeping_rows, level=level),
    }
    for way, (name, choose) in itertools.product(WAYS, choices.items()):
        chosen = choose(results, way)
        rows = [
            (
                row["method"],
                row["rate"],
                before(row),
                *at_level(row, level),
                percent(row["second"]),
                percent(row["first"]),
            )
            for row in chosen
        ]
        head = (
            "method",
            "rate",
            f"{second} before",
            f"{first} at {level:.0%} of {second}",
            "share of stage 1",
            "starts that reach it",
        )
        table = experiment.table(rows, (*head, f"{second} at the end", f"{first} at the end"))
        parts.append(f"## Stage 2, {way}, at {name}, %\n\n{table}\n\n{against(chosen, level)}")
    rows = [
        [row["method"], row["way"], row["rate"], "yes" if row["chosen"] else ""]
        + [at_level(row, one)[0] for one in levels]
        for way in WAYS
        for part in results.values()
        for row in part["rows"]
        if row["way"] == way
    ]
    head = ("method", "stage 2", "rate", "chosen", *(f"{first} at {one:.0%}" for one in levels))
    title = "## Every rate of stage 2: what is left where the second is learnt so far, %"
    parts.append(f"{title}\n\n{experiment.table(rows, head)}")
    return "\n\n".join(parts)


def against(rows: Sequence[Row], level: float) -> str:
    """The other methods less the mean of the controls, in points, with the standard error of the difference.

    Start for start: all methods have the same starts and the same order of records.
    """
    left = {
        row["method"]: np.array(row["matched"][str(level)]["absolute"]["all"]) for row in rows if reaches(row, level)
    }
    controls = [left.pop(name) for name in CONTROLS if name in left]
    if len(controls) < len(CONTROLS):
        return "Not every control reaches the level in every start, so there is no mean of the controls."
    mean = np.mean(controls, 0)
    gaps = {name: spread(found - mean) for name, found in left.items()}
    shown = ", ".join(
        f"{name} {100 * gap['mean']:+.1f} ± {100 * gap['std'] / math.sqrt(mean.size):.1f}" for name, gap in gaps.items()
    )
    whole = f"Less the mean of the controls ({100 * mean.mean():.1f} %)"
    return f"{whole}, in points, ± standard error, start for start: {shown}."


def draw(figure: Any, results: Row, first: str, second: str) -> None:
    """A panel for each way: what is left of the first task over what is learnt of the second, ± a standard deviation.

    Args:
        first, second: the axes: what is left, and what is learnt.
    """
    figure.set_size_inches(7, 3.2)
    for axes, way in zip(figure.subplots(1, len(WAYS), sharey=True), WAYS, strict=True):
        for row in chosen_rows(results, way):
            kept, learnt = np.array(row["curve"]).T
            std, style = np.array(row["curve_std"])[:, 0], "--" if row["method"] in CONTROLS else "-"
            (line,) = axes.plot(learnt, kept, style, marker=".", label=row["method"])
            axes.fill_between(learnt, kept - std, kept + std, color=line.get_color(), alpha=0.12, linewidth=0)
        axes.set(xlabel=second, title=f"stage 2, {way}")
    figure.axes[0].set_ylabel(first)
    figure.axes[0].legend()
