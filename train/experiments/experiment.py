"""The program of an experiment: parts that run once, a results file, a report in Markdown and a figure."""

import argparse
import fnmatch
import importlib.metadata
import json
import math
import os
import textwrap
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hadamax.errors import nearest
from hadamax.files import read_json
from train.config import UsageError
from train.metrics import write_text

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
STYLE = Path(__file__).with_name("paper.mplstyle")
Row = dict[str, Any]


def finite(value: Any) -> Any:
    """The value with floats of six figures, and None for those that JSON cannot hold.

    Example:
        >>> finite({"a": [1 / 3, math.inf]})
        {'a': [0.333333, None]}
    """
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def run_parts(
    path: Path, parts: Mapping[str, tuple[Callable[..., list[Row]], Row]], fresh: bool = False, only: str = "*"
) -> Row:
    """Runs what the results file does not hold yet with the same settings, and writes after each part.

    Args:
        path: the JSON file: `{part: {settings, versions, seconds, rows}}`.
        parts: for each name a function and its keyword arguments, JSON values: the settings that are recorded.
        fresh: run the parts that are there, too.
        only: a glob; parts of other names stay as they are.

    Returns:
        What the file then holds of the parts as they stand, in their order.

    Raises:
        CheckpointError: a results file that is no JSON object.
        UsageError: no part has such a name.
    """
    if not fnmatch.filter(parts, only):
        raise UsageError(f"--only {only}: no part of that name{nearest(only, parts)}")
    kept = read_json(path) if path.exists() else {}
    results = {name: kept[name] for name in parts if name in kept}
    as_read = {name: json.loads(json.dumps(settings)) for name, (_, settings) in parts.items()}
    for name, (compute, _) in parts.items():
        settings = as_read[name]
        if not fnmatch.fnmatchcase(name, only):
            continue
        if not fresh and name in results and results[name].get("settings") == settings:
            print(f"{name}: there")
            continue
        start = time.perf_counter()
        rows = compute(**settings)
        seconds = round(time.perf_counter() - start, 1)
        versions = {package: importlib.metadata.version(package) for package in ("jax", "optax", "numpy", "hadamax")}
        results[name] = {"settings": settings, "versions": versions, "seconds": seconds, "rows": finite(rows)}
        path.parent.mkdir(parents=True, exist_ok=True)
        ordered = {name: results[name] for name in parts if name in results}
        write_text(path, json.dumps(ordered, indent=1, allow_nan=False) + "\n")
        print(f"{name}: {seconds:.0f} s", flush=True)
    return {name: results[name] for name in parts if results.get(name, {}).get("settings") == as_read[name]}


def table(rows: Iterable[Sequence[Any]], head: Sequence[str]) -> str:
    """Markdown; floats to three figures, None as a dash.

    Example:
        >>> print(table([("a", 0.12345), ("b", None)], ("method", "error")))
        | method | error |
        |---|---|
        | a | 0.123 |
        | b | - |
    """
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        cells = ("-" if c is None else f"{c:.3g}" if isinstance(c, float) else str(c) for c in row)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def pivot(rows: Iterable[Row], down: str, across: str, value: str = "error", corner: str | None = None) -> str:
    """Markdown with a line for each `down` and a column for each `across`, in the order they come."""
    rows = list(rows)
    columns = list(dict.fromkeys(row[across] for row in rows))
    cells = {(row[down], row[across]): row[value] for row in rows}
    lines = [
        (name, *(cells.get((name, column)) for column in columns)) for name in dict.fromkeys(r[down] for r in rows)
    ]
    return table(lines, (corner or f"{down} / {across}", *map(str, columns)))


def footnote(results: Row) -> str:
    """How the figures came about: seconds, versions and every setting."""
    lines = ["## How it was run", ""]
    lines += [
        f"- `{name}` ({part['seconds']:.0f} s; "
        + ", ".join(f"{package} {version}" for package, version in part["versions"].items())
        + "): "
        + ", ".join(f"{key} = {json.dumps(value)}" for key, value in part["settings"].items())
        for name, part in results.items()
    ]
    edges = sum(row.get("rate_at_edge", False) for part in results.values() for row in part["rows"])
    fits = sum("rate_at_edge" in row for part in results.values() for row in part["rows"])
    if fits:
        lines.append(f"- The best learning rate was the first or last of its sweep in {edges} of {fits} cells.")
    return "\n".join(lines)


def main(
    name: str,
    parts: Mapping[str, tuple[Callable[..., list[Row]], Row]],
    report: Callable[[Row], str],
    draw: Callable[[Any, Row], None] | None,
    argv: Sequence[str] | None = None,
    about: str | None = None,
    needed: Collection[str] | None = None,
    package: str = "train.experiments",
) -> None:
    """The program of one experiment: its parts, then the report and the figure from what the JSON holds.

    Args:
        draw: on an empty figure; None for a report without one.
        about: what `--help` says, as the program's docstring has it.
        needed: the parts without which there is no report; None for all.
        package: where the program is.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {package}.{name}",
        description=about,
        epilog=textwrap.fill(f"parts: {'; '.join(parts)}", 100),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (benchmarks/results)")
    parser.add_argument("--fresh", action="store_true", help="run the parts that the results hold already, too")
    parser.add_argument("--only", default="*", metavar="GLOB", help="run the parts of these names only ('RTE*')")
    args = parser.parse_args(argv)
    results = run_parts(args.out / f"{name}.json", parts, args.fresh, args.only)
    if missing := [part for part in (parts if needed is None else needed) if part not in results]:
        print(f"no report yet: {', '.join(missing)} still to run")
        return
    text = f"{report(results).strip()}\n\n{footnote(results)}\n"
    write_text(args.out / f"{name}.md", text)
    if draw is None:
        print(f"{args.out / name}.json, .md")
        return

    import matplotlib
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    picture = args.out / f"{name}.png"
    partial = picture.with_name(f".{picture.name}")
    with matplotlib.rc_context(fname=STYLE):
        figure = Figure()
        draw(figure, results)
        figure.savefig(partial, format="png", dpi=150)
    os.replace(partial, picture)
    print(f"{args.out / name}.json, .md, .png")
