"""HiRA's ablations: which matrix the low-rank product multiplies, and HiLoRA's split of the rank.

    python -m train.experiments.hira_ablations

Update R .* (A B) with R = W0, random, W0 cut to some rank, or ones (which is LoRA), for matrices and for the digits of
`digits`; HiLoRA is `hx.add(hx.hira(k), hx.lora(r - k))`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

import hadamax as hx
from hadamax.methods.abba import top_singular
from train import cli
from train.experiments import digits, experiment, reconstruction
from train.experiments.experiment import Row, pivot, table
from train.experiments.fitting import fit

COUPLED, MIXED = "W0 x low rank", "W0 x low rank + low rank"
KINDS = [COUPLED, MIXED, "fine-tuning", "gaussian"]


def problems(kinds: Sequence[str], size: int, seed: int) -> tuple[jax.Array, jax.Array]:
    """As `reconstruction.problems`, and targets that are tied to W0: W0 .* M with M of rank 4, and that plus rank 4."""
    bases, targets = [], []
    for at, kind in enumerate(kinds):
        if kind not in (COUPLED, MIXED):
            base, wanted = (x[0] for x in reconstruction.problems([kind], size, seed))
        else:
            keys = jax.random.split(jax.random.key(seed + at), 5)
            base = jax.random.normal(keys[0], (size, size))
            m, low = (
                jax.random.normal(a, (size, 4)) @ jax.random.normal(b, (4, size)) for a, b in (keys[1:3], keys[3:])
            )
            wanted = base * m if kind == COUPLED else base * m + low
            wanted = wanted / jnp.sqrt(jnp.mean(wanted**2))
        bases.append(base)
        targets.append(wanted)
    return jnp.stack(bases), jnp.stack(targets)


def anchor(kind: str, base: jax.Array, key: jax.Array) -> jax.Array:
    """R in place of a kernel: `W0`, `random` (uniform between 0 and 1, the paper's), `normal`, `ones`, `SVD k`."""
    if kind == "W0":
        return base
    if kind == "random":
        return jax.random.uniform(key, base.shape, base.dtype)
    if kind == "normal":
        return jax.random.normal(key, base.shape, base.dtype)
    if kind == "ones":
        return jnp.ones_like(base)
    u, s, vt = top_singular(base, int(kind.removeprefix("SVD ")))
    return (u * s[None]) @ vt


def anchors(
    kinds: list[str], of: list[str], size: int, ranks: list[int], rates: list[float], starts: int, steps: int, seed: int
) -> list[Row]:
    """Error of R .* (A B) for each R, on each kind of target, at each rank."""
    bases, targets = problems(kinds, size, seed)
    keys = jax.random.split(jax.random.key(seed + 1), len(kinds))
    rows = []
    for rank in ranks:
        for name in of:
            r = jnp.stack([anchor(name, base, key) for base, key in zip(bases, keys, strict=True)])
            fits = fit(hx.hira(rank), r, targets, rates=rates, starts=starts, steps=steps, seed=seed)
            rows += [{"target": kind, "rank": rank, "R": name} | fits.row(at) for at, kind in enumerate(kinds)]
    return rows


def hilora(k: int, rank: int) -> hx.Adapter:
    """HiRA of rank k and LoRA of the rest."""
    parts = [make(r) for make, r in ((hx.hira, k), (hx.lora, rank - k)) if r]
    return hx.add(*parts)


def splits(
    kinds: list[str], size: int, rank: int, of: list[int], rates: list[float], starts: int, steps: int, seed: int
) -> list[Row]:
    """HiLoRA's ranks at one sum."""
    bases, targets = problems(kinds, size, seed)
    rows = []
    for k in of:
        fits = fit(hilora(k, rank), bases, targets, rates=rates, starts=starts, steps=steps, seed=seed)
        rows += [{"target": kind, "HiRA + LoRA": f"{k} + {rank - k}"} | fits.row(at) for at, kind in enumerate(kinds)]
    return rows


def toy(rank: int, of: list[str], splits: list[int], rates: list[float], starts: int, steps: int) -> list[Row]:
    """Both ablations on the digits: adapters on the three kernels learn 8 and 9."""
    data = digits.load()
    base = digits.pretrained(data)
    sizes = {"rates": rates, "starts": starts, "steps": steps}
    rows = []
    injection = hx.inject({"**/kernel": hx.hira(rank)})
    for name in of:
        keys = dict(zip(base, jax.random.split(jax.random.key(2), len(base)), strict=True))
        r = {layer: p | {"kernel": anchor(name, p["kernel"], keys[layer])} for layer, p in base.items()}

        def adapted(factors, r=r):
            return jax.tree.map(lambda w, new, old: w + (new - old), base, injection.merge(r, factors), r)

        rows.append(
            {"what": f"R = {name}"} | digits.adapt(adapted, lambda key: injection.init(key, base), data, **sizes)
        )
    for k in splits:
        mixed = hx.inject({"**/kernel": hilora(k, rank)})
        row = digits.adapt(
            lambda factors, mixed=mixed: mixed.merge(base, factors),
            lambda key, mixed=mixed: mixed.init(key, base),
            data,
            **sizes,
        )
        rows.append({"what": f"HiRA {k} + LoRA {rank - k}"} | row)
    return rows


FITS = reconstruction.FITS
ANCHORS = ["W0", "random", "normal", "SVD 4", "SVD 16", "SVD 32", "ones"]
PARTS: dict[str, Any] = {
    "anchors": (anchors, {"kinds": KINDS, "of": ANCHORS, "size": 64, "ranks": [4, 8, 16]} | FITS),
    "splits": (splits, {"kinds": KINDS, "size": 64, "rank": 16, "of": [16, 14, 12, 8, 4, 2, 0]} | FITS),
    "toy": (
        toy,
        {
            "rank": 4,
            "of": ["W0", "random", "normal", "SVD 4", "ones"],
            "splits": [3, 2, 1, 0],
            "rates": digits.RATES,
            "starts": 5,
            "steps": 100,
        },
    ),
}


def report(results: Row) -> str:
    size = results["anchors"]["settings"]["size"]
    parts = [
        f"""# HiRA's ablations

{size} x {size} targets, entries of mean square 1; relative error (Frobenius) of the best start at each cell's own
learning rate, that of the lowest mean over the starts. `W0 x low rank` is W0 .* M with M of rank 4: what HiRA assumes
of a task. `fine-tuning` is the difference that full fine-tuning makes to a perceptron's kernel, over that kernel
(`digits`). In place of R = W0: entries uniform between 0 and 1 (random, the paper's), normal entries, the largest
singular values of W0 (SVD 4, 16, 32), and ones, which is LoRA. The paper's ablation is of an 8 B model; this one is
not."""
    ]
    for rank in results["anchors"]["settings"]["ranks"]:
        rows = [row for row in results["anchors"]["rows"] if row["rank"] == rank]
        parts.append(f"## R, rank {rank}\n\n{pivot(rows, 'R', 'target')}")
    rank = results["splits"]["settings"]["rank"]
    parts.append(f"## HiLoRA, {rank} in all\n\n{pivot(results['splits']['rows'], 'HiRA + LoRA', 'target')}")
    rows = [[row[key] for key in ("what", *digits.COLUMNS)] for row in results["toy"]["rows"]]
    head = ("", *digits.COLUMNS.values())
    parts.append(f"## Digits, rank {results['toy']['settings']['rank']}\n\n{table(rows, head)}")
    return "\n\n".join(parts)


def draw(figure: Any, results: Row) -> None:
    figure.set_size_inches(10, 3)
    panels = figure.subplots(1, 3)
    kinds, ranks = (results["anchors"]["settings"][name] for name in ("kinds", "ranks"))
    rank = ranks[len(ranks) // 2]
    names = results["anchors"]["settings"]["of"]
    width = 0.8 / len(names)
    for at, name in enumerate(names):
        errors = [
            next(
                r["error"] for r in results["anchors"]["rows"] if (r["R"], r["target"], r["rank"]) == (name, kind, rank)
            )
            for kind in kinds
        ]
        panels[0].bar(
            [x + (at - len(names) / 2) * width for x in range(len(kinds))], errors, width, label=f"R = {name}"
        )
    names = [kind.replace(" x ", "\nx ").replace(" + ", "\n+ ").replace("-", "-\n") for kind in kinds]
    panels[0].set_xticks(range(len(kinds)), names)
    panels[0].set(xlabel="target", ylabel="relative error", title=f"R .* (A B), rank {rank}", ylim=(0, 1.35))
    panels[0].tick_params("x", labelsize=6.5)
    panels[0].legend(ncols=2)
    for kind in kinds:
        rows = [row for row in results["splits"]["rows"] if row["target"] == kind]
        panels[1].plot([row["HiRA + LoRA"] for row in rows], [row["error"] for row in rows], "o-", label=kind)
    panels[1].set(xlabel="HiRA + LoRA", ylabel="relative error", title="HiLoRA: split of one rank", ylim=(0, None))
    every = max(1, results["toy"]["settings"]["steps"] // 50)
    for row in results["toy"]["rows"]:
        style = "-" if row["what"].startswith("R") else "--"
        panels[2].plot([every * at for at in range(len(row["curve"]))], row["curve"], style, label=row["what"])
    panels[2].set(xlabel="step", ylabel="training loss on 8 and 9", yscale="log", title="digits")
    panels[1].tick_params("x", rotation=45)
    panels[1].legend()
    panels[2].legend(loc="center left", bbox_to_anchor=(1, 0.5))


def main(argv: Sequence[str] | None = None) -> None:
    experiment.main("hira_ablations", PARTS, report, draw, argv, __doc__)


if __name__ == "__main__":
    cli.main(main)
