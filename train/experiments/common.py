"""What the experiments share: fits of an adapter's update to a target, results files, tables and figures."""

import argparse
import fnmatch
import importlib.metadata
import json
import math
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hadamax as hx
from hadamax.errors import nearest
from hadamax.files import read_json
from train.config import UsageError
from train.metrics import write_text

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
Row = dict[str, Any]
# XLA's YNN fusions end the process in some vmapped scans (jaxlib 0.10.2 on a CPU); other backends ignore the option.
COMPILER: dict[str, Any] = {"xla_cpu_experimental_ynn_fusion_type": ""}


def update(adapter: hx.Adapter, factors: Any, base: jax.Array) -> jax.Array:
    """What the adapter adds to a kernel, `[in, out]`."""
    return adapter.merge(factors, hx.Linear(base)).kernel - base


def parameters(adapter: hx.Adapter, base: jax.Array) -> int:
    """How many numbers the adapter trains for one kernel.

    Example:
        >>> parameters(hx.lora(2), jnp.ones((6, 4)))
        20
    """
    factors = jax.eval_shape(lambda: adapter.init(jax.random.key(0), hx.Linear(base)))
    return sum(leaf.size for leaf in jax.tree.leaves(factors))


class Fits(NamedTuple):
    """Fits of an adapter's update, over targets, learning rates and starts.

    Attributes:
        errors: `[targets, rates, starts]`, `|update - target| / |target|` (Frobenius) after the last step; infinite
            where the fit diverged.
        updates: `[targets, in, out]`, each target's best.
        rates: the learning rates.
    """

    errors: np.ndarray
    updates: np.ndarray
    rates: tuple[float, ...]

    def row(self, target: int) -> Row:
        """The figures of one target. The rate is the one of the lowest mean over the starts."""
        means = self.errors[target].mean(-1)
        best = int(means.argmin())
        return {
            "error": float(self.errors[target, best].min()),
            "error_mean": float(means[best]),
            "error_max": float(self.errors[target, best].max()),
            "rate": self.rates[best],
            "rate_at_edge": len(self.rates) > 1 and best in (0, len(self.rates) - 1),
            "sweep": [[rate, float(mean)] for rate, mean in zip(self.rates, means, strict=True)],
            "effective_rank": effective_rank(self.updates[target]),
        }


def fit(
    adapter: hx.Adapter,
    bases: jax.Array,
    targets: jax.Array,
    *,
    rates: Sequence[float],
    starts: int,
    steps: int,
    seed: int = 0,
    last: float = 0.0,
) -> Fits:
    """Fits updates to targets by Adam on the squared error, all targets, learning rates and starts in one program.

    Args:
        adapter: the method.
        bases: `[targets, in, out]`, the frozen kernels.
        targets: `[targets, in, out]`, the updates wanted.
        rates: peak learning rates.
        starts: seeds of the adapter's init.
        steps: of Adam.
        seed: of all starts.
        last: the share of its peak that the rate decays to: 0 along a cosine, else exponentially. Errors far below
            float32's need the latter, and float64.
    """
    decay = optax.exponential_decay(1.0, steps, last) if last else optax.cosine_decay_schedule(1.0, steps)

    def one(base, target, rate, key):
        norm = jnp.linalg.norm(target)
        optimizer = optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(decay))

        def loss(factors):
            return jnp.sum(((update(adapter, factors, base) - target) / norm) ** 2)

        def step(carry, _):
            factors, state = carry
            directions, state = optimizer.update(jax.grad(loss)(factors), state)
            return (jax.tree.map(lambda f, d: f - rate * d, factors, directions), state), None

        factors = adapter.init(key, hx.Linear(base))
        (factors, _), _ = jax.lax.scan(step, (factors, optimizer.init(factors)), length=steps)
        return update(adapter, factors, base)

    over_starts = jax.vmap(one, (None, None, None, 0))
    over_rates = jax.vmap(over_starts, (None, None, 0, None))
    run = jax.jit(jax.vmap(over_rates, (0, 0, None, None)), compiler_options=COMPILER)
    keys = jax.random.split(jax.random.key(seed), starts)
    updates = np.asarray(run(bases, targets, jnp.asarray(rates, bases.dtype), keys), np.float64)
    wanted = np.asarray(targets, np.float64)
    errors = np.linalg.norm(updates - wanted[:, None, None], axis=(-2, -1))
    errors = np.nan_to_num(errors / np.linalg.norm(wanted, axis=(-2, -1))[:, None, None], nan=np.inf)
    best = errors.reshape(len(wanted), -1).argmin(-1)
    flat = updates.reshape(len(wanted), -1, *wanted.shape[1:])
    return Fits(errors, flat[np.arange(len(wanted)), best], tuple(rates))


def svd_error(target: np.ndarray, rank: int) -> float:
    """The relative error of the best matrix of that rank (Eckart-Young): what no LoRA can go below.

    Example:
        >>> svd_error(np.diag([4.0, 3.0, 0.0]), 1)
        0.6
    """
    squares = np.linalg.svd(np.asarray(target, np.float64), compute_uv=False) ** 2
    return float(math.sqrt(squares[rank:].sum() / squares.sum()))


def spectrum(matrix: np.ndarray) -> np.ndarray:
    """Singular values divided by the largest."""
    values = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
    return values / values[0] if values[0] > 0 else values


def effective_rank(matrix: np.ndarray) -> float:
    """`exp(-sum p log p)` with p the singular values divided by their sum (HiRA, section 5); 0 for a zero matrix.

    Example:
        >>> round(effective_rank(np.eye(3)), 6), effective_rank(np.zeros((2, 2)))
        (3.0, 0.0)
    """
    if not np.isfinite(matrix).all():
        return math.nan
    values = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
    if not values.sum() > 0:
        return 0.0
    shares = values / values.sum()
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


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
    draw: Callable[[Any, Row], None],
    argv: Sequence[str] | None = None,
    needed: Collection[str] | None = None,
) -> None:
    """The program of one experiment: its parts, then the report and the figure from what the JSON holds.

    Args:
        needed: the parts without which there is no report; None for all.
    """
    parser = argparse.ArgumentParser(prog=f"python -m train.experiments.{name}")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (benchmarks/results)")
    parser.add_argument("--fresh", action="store_true", help="run the parts that the results hold already, too")
    parser.add_argument("--only", default="*", metavar="GLOB", help="run the parts of these names only")
    args = parser.parse_args(argv)
    results = run_parts(args.out / f"{name}.json", parts, args.fresh, args.only)
    if missing := [part for part in (parts if needed is None else needed) if part not in results]:
        print(f"no report yet: {', '.join(missing)} still to run")
        return
    text = f"{report(results).strip()}\n\n{footnote(results)}\n"
    write_text(args.out / f"{name}.md", text)

    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(layout="constrained")
    draw(figure, results)
    picture = args.out / f"{name}.png"
    partial = picture.with_name(f".{picture.name}")
    figure.savefig(partial, format="png", dpi=100)
    os.replace(partial, picture)
    print(f"{args.out / name}.json, .md, .png")
