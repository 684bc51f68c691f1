"""How well each method's update can be a given matrix, at one budget of parameters (ABBA, figure 2 and its ablations).

    python -m train.experiments.reconstruction

LoRA's best is known (Eckart-Young); the others are fitted by Adam, and LoRA too, which shows what the fit leaves.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hadamax as hx
from train import cli
from train.experiments import descent, digits, experiment, fitting
from train.experiments.experiment import Row, pivot, table
from train.experiments.fitting import effective_rank, fit, parameters, svd_error

SYNTHETIC = ("gaussian", "uniform", "low rank + noise", "blocks", "power law")
TYPES = (*SYNTHETIC, "fine-tuning")


def target(kind: str, size: int, key: jax.Array) -> jax.Array:
    """`[size, size]`, scaled to entries of mean square 1.

    gaussian: independent normal entries. uniform: independent entries between 0 and 1, so that the mean is a large
    rank-one part. low rank + noise: rank 4 and a tenth of it in noise. blocks: 4 x 4 blocks, each of rank one. power
    law: random singular vectors, singular values 1 / i.
    """
    keys = jax.random.split(key, 2)
    if kind == "gaussian":
        matrix = jax.random.normal(key, (size, size))
    elif kind == "uniform":
        matrix = jax.random.uniform(key, (size, size))
    elif kind == "low rank + noise":
        left, right = (jax.random.normal(k, (size, 4)) for k in keys)
        matrix = left @ right.T / 2 + 0.1 * jax.random.normal(key, (size, size))
    elif kind == "blocks":
        left, right = (jax.random.normal(k, (4, 4, size // 4)) for k in keys)
        matrix = jnp.einsum("ijp,ijq->ipjq", left, right).reshape(size, size)
    elif kind == "power law":
        left, right = (jnp.linalg.qr(jax.random.normal(k, (size, size)))[0] for k in keys)
        matrix = left @ jnp.diag(1 / jnp.arange(1, size + 1)) @ right.T
    else:
        raise ValueError(f"no kind of matrix {kind!r}")
    return matrix / jnp.sqrt(jnp.mean(matrix**2))


def problems(kinds: Sequence[str], size: int, seed: int) -> tuple[jax.Array, jax.Array]:
    """Frozen kernels and wanted updates, `[kinds, size, size]` each, both scaled to entries of mean square 1.

    The frozen kernel is a normal matrix that knows nothing of the target; of fine-tuning it is the real one.
    """

    def problem(kind, key):
        if kind == "fine-tuning":
            return [matrix / jnp.sqrt(jnp.mean(matrix**2)) for matrix in digits.difference(seed)]
        keys = jax.random.split(key, 2)
        return jax.random.normal(keys[0], (size, size)), target(kind, size, keys[1])

    keys = jax.random.split(jax.random.key(seed), len(kinds))
    bases, targets = zip(*(problem(kind, key) for kind, key in zip(kinds, keys, strict=True)), strict=True)
    return jnp.stack(bases), jnp.stack(targets)


def methods(rank: int) -> dict[str, hx.Adapter]:
    """Adapters of rank (in + out) parameters, all of scale 1: the sweep of learning rates covers scales."""
    return {
        "LoRA, Adam": hx.lora(rank),
        "HiRA": hx.hira(rank),
        "BoHA b=2": hx.boha(rank, blocks=2),
        "BoHA r_b=1": hx.boha(rank, blocks=rank),
        "ABBA": hx.abba(rank, scale=1.0),
        "LoHa": hx.loha(rank // 2),
    }


def budget(kinds: list[str], size: int, rank: int, rates: list[float], starts: int, steps: int, seed: int) -> list[Row]:
    """Error of each method on each kind of matrix at one budget; LoRA's optimum at the same and at twice the rank."""
    bases, targets = problems(kinds, size, seed)
    rows = []
    for name, times in (("LoRA, optimum", 1), ("LoRA, optimum at 2r", 2)):
        for kind, wanted in zip(kinds, np.asarray(targets, np.float64), strict=True):
            row = {"target": kind, "rank": rank, "method": name, "parameters": times * rank * 2 * size}
            u, s, vt = np.linalg.svd(wanted)
            best = (u[:, : times * rank] * s[: times * rank]) @ vt[: times * rank]
            rows.append(row | {"error": svd_error(wanted, times * rank), "effective_rank": effective_rank(best)})
    for name, adapter in methods(rank).items():
        count = parameters(adapter, bases[0])
        if count != rank * 2 * size:
            raise ValueError(f"{name} of rank {rank} has {count} parameters, not the budget of {rank * 2 * size}")
        fits = fit(adapter, bases, targets, rates=rates, starts=starts, steps=steps, seed=seed)
        for at, kind in enumerate(kinds):
            row = {"target": kind, "rank": rank, "method": name, "parameters": count}
            rows.append(row | fits.row(at))
    return rows


def both_svd(rank: int) -> hx.Adapter:
    """ABBA with both pairs from the SVD of W0: its update is not zero at first."""
    adapter = hx.abba(rank, scale=1.0, init="exact")

    def init(key, linear):
        factors = adapter.init(key, linear)
        return factors | {"a2": factors["a1"], "b2": factors["b1"]}

    return adapter._replace(init=init)


def gradient_norms(adapter: hx.Adapter, base: jax.Array, wanted: jax.Array, key: jax.Array) -> dict[str, float]:
    """Norm of the loss's gradient in every factor at the init."""
    factors = adapter.init(key, hx.Linear(base))
    gradients = jax.grad(lambda f: jnp.mean((fitting.update(adapter, f, base) - wanted) ** 2))(factors)
    return {name: float(jnp.linalg.norm(g)) for name, g in gradients.items()}


def inits(kinds: list[str], size: int, rank: int, rates: list[float], starts: int, steps: int, seed: int) -> list[Row]:
    """ABBA's product from other inits. With both pairs LoRA-style every gradient is zero."""
    bases, targets = problems(kinds, size, seed)
    adapters = {
        "SVD, LoRA-style (paper)": hx.abba(rank, scale=1.0, init="exact"),
        "random, LoRA-style (LoHa)": hx.loha(rank // 2),
        "SVD, SVD": both_svd(rank),
        "LoRA-style, LoRA-style": hx.abba(rank, scale=1.0, init="kaiming"),
    }
    rows = []
    for name, adapter in adapters.items():
        fits = fit(adapter, bases, targets, rates=rates, starts=starts, steps=steps, seed=seed)
        for at, kind in enumerate(kinds):
            norms = gradient_norms(adapter, bases[at], targets[at], jax.random.key(seed))
            rows.append({"target": kind, "init": name, "gradient_norms": norms} | fits.row(at))
    return rows


def splits(kinds: list[str], size: int, rank: int, rates: list[float], starts: int, steps: int, seed: int) -> list[Row]:
    """ABBA's r1 and r2 at one sum."""
    bases, targets = problems(kinds, size, seed)
    rows = []
    for r1 in sorted({1, rank // 4, 3 * rank // 8, rank // 2, 5 * rank // 8, 3 * rank // 4, rank - 1}):
        adapter = hx.abba(r1=r1, r2=rank - r1, scale=1.0)
        fits = fit(adapter, bases, targets, rates=rates, starts=starts, steps=steps, seed=seed)
        rows += [{"target": kind, "r1, r2": f"{r1}, {rank - r1}"} | fits.row(at) for at, kind in enumerate(kinds)]
    return rows


def alphas(
    kind: str,
    size: int,
    rank: int,
    alphas: list[float],
    base_rms: float,
    rates: list[float],
    starts: int,
    steps: int,
    seed: int,
) -> list[Row]:
    """ABBA's alpha, at every learning rate of the sweep, over a kernel with entries of a trained model's size."""
    bases, targets = problems([kind], size, seed)
    rows = []
    for alpha in alphas:
        adapter = hx.abba(rank, alpha=alpha)
        fits = fit(adapter, bases * base_rms, targets * base_rms, rates=rates, starts=starts, steps=steps, seed=seed)
        rows.append({"alpha": alpha} | fits.row(0))
    return rows


SCALINGS = {
    "alpha^2 / sqrt(r1 r2), the paper's": lambda alpha, r: hx.abba(2 * r, alpha=alpha),
    "alpha / r": lambda alpha, r: hx.abba(2 * r, scale=alpha / r),
    "(alpha / r)^2, LoRA's of each pair": lambda alpha, r: hx.abba(2 * r, scale=alpha**2 / r**2),
    "alpha, the authors' code": lambda alpha, r: hx.abba(2 * r, scale=alpha),
}


def stability(
    size: int, ranks: list[int], alpha: float, base_rms: float, rate: float, steps: int, seed: int
) -> list[Row]:
    """Norms of the gradient in ABBA's factors against the rank, under each scaling.

    The loss is a layer's: normal inputs, outputs that a small normal change of the kernel would give. Norms are at the
    init and as the mean over the first steps of gradient descent at one rate, both pairs of rank r.
    """
    keys = jax.random.split(jax.random.key(seed), 4)
    base = base_rms * jax.random.normal(keys[0], (size, size))
    wanted = 0.1 * base_rms * jax.random.normal(keys[1], (size, size))
    x = jax.random.normal(keys[2], (4 * size, size))

    @functools.partial(descent.jit, static_argnums=0)
    def norms(adapter):
        def loss(factors):
            return jnp.mean((adapter.dot(factors, hx.Linear(base), x) - x @ (base + wanted)) ** 2)

        def step(factors, _):
            gradient = jax.grad(loss)(factors)
            norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient)))
            return jax.tree.map(lambda f, g: f - rate * g, factors, gradient), norm

        return jax.lax.scan(step, adapter.init(keys[3], hx.Linear(base)), length=steps)[1]

    rows = []
    for name, scaling in SCALINGS.items():
        for rank in ranks:
            values = np.asarray(norms(scaling(alpha, rank)), np.float64)
            rows.append({"scaling": name, "r": rank, "first": float(values[0]), "mean": float(values.mean())})
    return rows


RATES = [3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0]
FITS = {"rates": RATES, "starts": 5, "steps": 1500, "seed": 0}
SHORT = {"rates": RATES[1:], "starts": 3, "steps": 1000}
PARTS: dict[str, Any] = {
    **{f"rank {r}": (budget, {"kinds": list(TYPES), "size": 64, "rank": r} | FITS | SHORT) for r in (2, 4, 8, 16)},
    "inits": (inits, {"kinds": ["gaussian", "power law", "fine-tuning"], "size": 64, "rank": 8} | FITS | SHORT),
    "splits": (splits, {"kinds": ["gaussian", "power law", "fine-tuning"], "size": 64, "rank": 8} | FITS | SHORT),
    "alphas": (
        alphas,
        {"kind": "gaussian", "size": 64, "rank": 8, "alphas": [0.25, 1, 4, 8, 16, 24, 32, 64], "base_rms": 0.02}
        | FITS
        | SHORT
        | {"rates": [1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]},
    ),
    "stability": (
        stability,
        {
            "size": 128,
            "ranks": [1, 2, 4, 8, 16, 32, 64],
            "alpha": 24.0,
            "base_rms": 0.02,
            "rate": 0.1,
            "steps": 50,
            "seed": 0,
        },
    ),
}


def report(results: Row) -> str:
    budgets = {part["settings"]["rank"]: part for name, part in results.items() if name.startswith("rank ")}
    size = next(iter(budgets.values()))["settings"]["size"]
    parts = [
        f"""# Reconstruction of a matrix at one budget

{size} x {size} targets, entries of mean square 1; relative error (Frobenius) of the best start at each cell's own
learning rate, that of the lowest mean over the starts. A method of rank r has r (in + out) parameters; LoRA's optimum
at 2r has twice as many, which ABBA's paper says that ABBA matches. The frozen W0 is a normal matrix that knows nothing
of the target (but for fine-tuning, below), so HiRA and BoHA, which multiply it, have no reason to do well but on
unstructured targets (for targets tied to W0 see `hira_ablations` and `boha_target`). Sizes, steps and rates are ours;
nothing here is a paper's figure.

gaussian: normal entries. uniform: entries between 0 and 1, whose mean is a large rank-one part. low rank + noise: rank
4, and a tenth of it in noise. blocks: 4 x 4 blocks of rank one. power law: singular values 1 / i. fine-tuning: the
difference that full fine-tuning makes to a perceptron's kernel, over that kernel (`digits`)."""
    ]
    for rank, part in budgets.items():
        count = rank * 2 * size
        title = f"## Rank {rank}: {count} parameters, {count / size**2:.0%} of the matrix"
        parts.append(f"{title}\n\n{pivot(part['rows'], 'method', 'target')}")
    for name, down in (("inits", "init"), ("splits", "r1, r2")):
        rows = results[name]["rows"]
        title = {"inits": "ABBA's init", "splits": "ABBA's split of the rank"}[name]
        parts.append(f"## {title}, rank {results[name]['settings']['rank']}\n\n{pivot(rows, down, 'target')}")
        if name == "inits":
            lines = []
            for init in dict.fromkeys(row["init"] for row in rows):
                norms = next(row["gradient_norms"] for row in rows if row["init"] == init)
                lines.append((init, *norms.values()))
            head = ("init: gradient norm at step 0 in", *rows[0]["gradient_norms"])
            of = f"The gradients are of the {rows[0]['target']} target. An error of 1 is an update that stayed zero."
            parts.append(f"{table(lines, head)}\n\n{of} Power law is another draw here than in the tables above.")
    found = results["alphas"]["settings"]
    lines = [(row["alpha"], *(mean for _, mean in row["sweep"])) for row in results["alphas"]["rows"]]
    parts.append(
        f"## ABBA's alpha, rank {found['rank']}\n\nMean error over the starts, on a {found['kind']} target; W0 and"
        f" target with entries of {found['base_rms']}. A dash diverged.\n\n"
        + table(lines, ("alpha / rate", *(f"{rate:g}" for rate in found["rates"])))
    )
    found = results["stability"]["settings"]
    rows = results["stability"]["rows"]
    lines = []
    for name in dict.fromkeys(row["scaling"] for row in rows):
        for when in ("first", "mean"):
            norms = [row[when] for row in rows if row["scaling"] == name]
            known = [norm for norm in norms if norm is not None]
            lines.append((name, when, *norms, max(known) / min(known)))
    head = ("s", "", *(f"r = {rank}" for rank in found["ranks"]), "largest / smallest")
    parts.append(
        f"## Norm of the gradient against the rank (r1 = r2 = r)\n\nAt the init (first) and as the mean of"
        f" {found['steps']} steps of gradient descent, {found['size']} x {found['size']}.\n\n{table(lines, head)}"
    )
    return "\n\n".join(parts)


STYLES = {
    "LoRA, optimum": "k-",
    "LoRA, optimum at 2r": "k:",
    "LoRA, Adam": "kx",
    "HiRA": "o-",
    "BoHA b=2": "s-",
    "BoHA r_b=1": "^-",
    "ABBA": "D--",
    "LoHa": "v:",
}


def draw(figure: Any, results: Row) -> None:
    budgets = {part["settings"]["rank"]: part for name, part in results.items() if name.startswith("rank ")}
    ranks, rows = list(budgets), [row for part in budgets.values() for row in part["rows"]]
    kinds = list(dict.fromkeys(row["target"] for row in rows))
    figure.set_size_inches(10, 8)
    panels = figure.subplots(3, 3).flatten()
    for axes, kind in zip(panels, kinds, strict=False):
        for name in dict.fromkeys(row["method"] for row in rows):
            errors = [row["error"] for row in rows if (row["target"], row["method"]) == (kind, name)]
            axes.plot(ranks, errors, STYLES[name], label=name)
        axes.set(title=kind, xlabel="rank (budget)", ylabel="relative error", ylim=(0, None))
        axes.set_xscale("log", base=2)
    panels[0].legend()
    for kind in results["splits"]["settings"]["kinds"]:
        rows = [row for row in results["splits"]["rows"] if row["target"] == kind]
        panels[6].plot([row["r1, r2"] for row in rows], [row["error_mean"] for row in rows], "o-", label=kind)
    panels[6].set(title="ABBA: split of the rank", xlabel="r1, r2", ylabel="mean relative error", ylim=(0, None))
    for at, row in enumerate(results["alphas"]["rows"]):
        rates, means = zip(*row["sweep"], strict=True)
        style = {"color": (0.9 - at / 9, 0.5, at / 9 + 0.1), "label": f"alpha {row['alpha']:g}"}
        panels[7].plot(rates, [np.nan if m is None else m for m in means], "o-", **style)
    panels[7].set(title="ABBA: alpha and learning rate", xlabel="learning rate", ylabel="mean relative error")
    panels[7].set(xscale="log", ylim=(0.7, 1.1))
    for name in SCALINGS:
        rows = [row for row in results["stability"]["rows"] if row["scaling"] == name]
        norms = [np.nan if row["mean"] is None else row["mean"] for row in rows]
        panels[8].plot([row["r"] for row in rows], norms, "o-", label=f"s = {name}")
    panels[8].set(title="ABBA: scaling", xlabel="r1 = r2", yscale="log")
    panels[8].set(ylabel="gradient norm, mean of the first steps", ylim=(None, 1e3 * panels[8].get_ylim()[1]))
    panels[8].set_xscale("log", base=2)
    for axes in panels[6:]:
        axes.legend()


def main(argv: Sequence[str] | None = None) -> None:
    experiment.main("reconstruction", PARTS, report, draw, argv, __doc__)


if __name__ == "__main__":
    cli.main(main)
