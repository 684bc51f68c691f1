"""BoHA's exact target, W0 .* M with M of b x b blocks of rank one, and the spectra of what each method learns.

    python -m train.experiments.boha_target

Such an M has rank b^2, so that BoHA needs blocks of rank one, 2 b n parameters, and HiRA rank b^2. Over a W0 of signs,
|W0 .* (M - N)| = |M - N| and HiRA's best at each rank is known: the singular values of M beyond it.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hadamax as hx
from train import cli
from train.experiments import experiment, fitting, reconstruction
from train.experiments.experiment import Row, pivot, table
from train.experiments.fitting import fit, parameters, spectrum, svd_error

ZERO = 1e-10  # "numerical zero", in float64


def base_of(kind: str, size: int, key: jax.Array) -> jax.Array:
    """A frozen kernel: of signs, of signs times 0.5 to 1.5, or normal (entries near zero weigh almost nothing)."""
    keys = jax.random.split(key, 2)
    normal = jax.random.normal(keys[0], (size, size))
    if kind == "normal":
        return normal
    low = {"signs": 1.0, "bounded": 0.5}[kind]
    return jnp.sign(normal) * jax.random.uniform(keys[1], (size, size), minval=low, maxval=2 - low)


def modulator(size: int, blocks: int, key: jax.Array) -> jax.Array:
    """`[size, size]` of `blocks` x `blocks` independent blocks of rank one."""
    left, right = (jax.random.normal(k, (blocks, blocks, size // blocks)) for k in jax.random.split(key))
    return jnp.einsum("ijp,ijq->ipjq", left, right).reshape(size, size)


def exact(
    size: int, blocks: list[int], bases: list[str], rates: list[float], starts: int, steps: int, last: float, seed: int
) -> list[Row]:
    """Errors in float64. `converged` is the share of the starts at the best rate that reach numerical zero."""
    rows = []
    with jax.enable_x64(True):
        for b in blocks:
            keys = jax.random.split(jax.random.key(seed + b), 2)
            m = modulator(size, b, keys[0])
            kernels = jnp.stack([base_of(kind, size, keys[1]) for kind in bases])
            targets = kernels * m[None]
            adapters: dict[str, tuple[int, hx.Adapter | None]] = {"BoHA": (b, hx.boha(b, blocks=b))}
            for rank in sorted({b, (b + b * b) // 2, b * b - 1, b * b}):
                adapters[f"HiRA {rank}"] = rank, hx.hira(rank)
            for rank in (b, b * b):
                adapters[f"ABBA {rank}"] = rank, hx.abba(rank, scale=1.0)
                adapters[f"LoRA {rank}, optimum"] = rank, None
            for name, (rank, adapter) in adapters.items():
                about = {"blocks": b, "method": name, "rank": rank}
                if adapter is None:
                    count = 2 * size * rank
                    found = [{"error": svd_error(np.asarray(wanted), rank)} for wanted in targets]
                else:
                    count = parameters(adapter, kernels[0])
                    fits = fit(adapter, kernels, targets, rates=rates, starts=starts, steps=steps, seed=seed, last=last)
                    found = [fits.row(at) for at in range(len(bases))]
                    for at, row in enumerate(found):
                        row["converged"] = float((fits.errors[at, rates.index(row["rate"])] < ZERO).mean())
                for kind, row in zip(bases, found, strict=True):
                    bound = {}
                    if kind == "signs" and name.startswith("HiRA"):
                        bound = {"bound": svd_error(np.asarray(m), rank)}
                    rows.append(about | {"base": kind, "parameters": count} | bound | row)
    return rows


def spectra(
    kinds: list[str], size: int, ranks: list[int], rates: list[float], starts: int, steps: int, seed: int
) -> list[Row]:
    """Singular values and effective rank of the best update that each method learns of a target at each budget."""
    bases, targets = reconstruction.problems(kinds, size, seed)
    rows = []
    for rank in ranks:
        for name, adapter in reconstruction.methods(rank).items():
            fits = fit(adapter, bases, targets, rates=rates, starts=starts, steps=steps, seed=seed)
            for at, kind in enumerate(kinds):
                values = spectrum(fits.updates[at])
                row = {"target": kind, "rank": rank, "method": name.replace(", Adam", "")} | fits.row(at)
                row["numerical_rank"] = int((values > 1e-4).sum())
                rows.append(row | {"spectrum": [float(f"{value:.4g}") for value in values]})
    for kind, wanted in zip(kinds, targets, strict=True):
        values = spectrum(np.asarray(wanted))
        row = {"target": kind, "rank": None, "method": "the target itself", "error": 0.0}
        row |= {
            "effective_rank": fitting.effective_rank(np.asarray(wanted)),
            "numerical_rank": int((values > 1e-4).sum()),
        }
        rows.append(row | {"spectrum": [float(f"{value:.4g}") for value in values]})
    return rows


PARTS: dict[str, Any] = {
    "exact": (
        exact,
        {
            "size": 32,
            "blocks": [2, 4],
            "bases": ["signs", "bounded", "normal"],
            "rates": [0.01, 0.03, 0.1, 0.3, 1.0],
            "starts": 8,
            "steps": 4000,
            "last": 1e-10,
            "seed": 0,
        },
    ),
    "spectra": (
        spectra,
        {"kinds": ["gaussian", "fine-tuning"], "size": 64, "ranks": [4, 8, 16]} | reconstruction.FITS,
    ),
}


def report(results: Row) -> str:
    settings, rows = results["exact"]["settings"], results["exact"]["rows"]
    size = settings["size"]
    parts = [
        f"""# BoHA's exact target

W0 .* M, {size} x {size}, M of b x b blocks of rank one. Relative error (Frobenius) of the best start, float64. HiRA's
bound over a W0 of signs is exact: no HiRA of that rank can do better. Where HiRA of rank b^2 or a start of BoHA stays
above zero, the fit did not get there: algebra says that both can. Scale and sizes are ours."""
    ]
    for b in settings["blocks"]:
        found = [row for row in rows if row["blocks"] == b]
        lines = []
        for name in dict.fromkeys(row["method"] for row in found):
            of = {row["base"]: row for row in found if row["method"] == name}
            errors = [of[kind]["error"] for kind in settings["bases"]]
            shares = [of[kind].get("converged") for kind in settings["bases"]]
            shown = " ".join("-" if share is None else f"{share:.0%}" for share in shares)
            lines.append((name, of["signs"]["parameters"], *errors, of["signs"].get("bound"), shown))
        head = ("method, rank", "parameters", *settings["bases"], "bound (signs)", f"starts below {ZERO:g}")
        parts.append(f"## b = {b}: M has rank {b * b}\n\n{table(lines, head)}")
    found = results["spectra"]["rows"]
    for kind in results["spectra"]["settings"]["kinds"]:
        rows = [
            row | {"rank": "full" if row["rank"] is None else row["rank"]} for row in found if row["target"] == kind
        ]
        parts.append(
            f"## What is learnt of a {kind} target\n\nEffective rank, exp of the entropy of the singular values, of the"
            " best start's update at the rate of the lowest mean error:\n\n"
            f"{pivot(rows, 'method', 'rank', 'effective_rank')}\n\n"
            f"Singular values above 1e-4 of the largest:\n\n{pivot(rows, 'method', 'rank', 'numerical_rank')}\n\n"
            "Its relative error:\n\n"
            f"{pivot(rows, 'method', 'rank')}\n\n"
            "A high rank is no merit by itself: where the error is higher, the rank is spent elsewhere."
        )
    return "\n\n".join(parts)


def draw(figure: Any, results: Row) -> None:
    settings = results["exact"]["settings"]
    kinds, ranks = results["spectra"]["settings"]["kinds"], results["spectra"]["settings"]["ranks"]
    figure.set_size_inches(10, 2.8)
    panels = figure.subplots(1, len(settings["blocks"]) + len(kinds))
    styles = {"BoHA": "*", "HiRA": "o-", "ABBA": "D--", "LoRA": "kx:"}
    for axes, b in zip(panels, settings["blocks"], strict=False):
        for kind in (settings["bases"][0], settings["bases"][-1]):
            rows = [row for row in results["exact"]["rows"] if row["blocks"] == b and row["base"] == kind]
            for method, style in styles.items():
                if method in ("ABBA", "LoRA") and kind != settings["bases"][-1]:
                    continue  # which are much the same over every W0
                found = [(row["rank"], row["error"]) for row in rows if row["method"].startswith(method)]
                size = {"markersize": 9} if method == "BoHA" else {}
                axes.plot(*zip(*found, strict=True), style, label=f"{method}, W0 {kind}", **size)
        axes.set(xlabel="rank (budget)", ylabel="relative error", yscale="log", title=f"{b} x {b} blocks of rank 1")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(loc="center left")
    for axes, kind in zip(panels[len(settings["blocks"]) :], kinds, strict=True):
        rank = ranks[len(ranks) // 2]
        for row in results["spectra"]["rows"]:
            if row["target"] == kind and row["rank"] in (rank, None):
                style = {"color": "black", "linestyle": ":"} if row["rank"] is None else {}
                axes.plot(np.arange(1, len(row["spectrum"]) + 1), row["spectrum"], label=row["method"], **style)
        axes.set(xlabel="index", ylabel="singular value / largest", yscale="log", ylim=(1e-4, 1.5))
        axes.set(title=f"update, {kind}, rank {rank}")
        axes.legend()


def main(argv: Sequence[str] | None = None) -> None:
    experiment.main("boha_target", PARTS, report, draw, argv, __doc__)


if __name__ == "__main__":
    cli.main(main)
