"""A small perceptron on scikit-learn's digits: it learns 0 to 7, then adapters teach it 8 and 9 (ABBA's toy task).

    python -m train.experiments.digits

64 pixels, two hidden layers of 64, ten classes. Everything is full-batch Adam. The weights before, and the difference
that full fine-tuning makes, are the real matrices of the other experiments.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hadamax as hx
from train import cli
from train.experiments import descent, experiment
from train.experiments.experiment import Row

WIDTH, CLASSES = 64, 10
LAYERS = ("hidden_1", "hidden_2", "output")


class Split(NamedTuple):
    """Pixels `[examples, 64]` between 0 and 1, and labels."""

    pixels: jax.Array
    labels: jax.Array


class Digits(NamedTuple):
    """The two tasks; of every class every fourth image is for testing."""

    old_train: Split
    old_test: Split
    new_train: Split
    new_test: Split


def load() -> Digits:
    """Digits 0 to 7 and digits 8 and 9."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    test = np.zeros(len(labels), bool)
    for label in range(CLASSES):
        test[np.flatnonzero(labels == label)[::4]] = True

    def split(which):
        return Split(jnp.asarray(pixels[which] / 16, jnp.float32), jnp.asarray(labels[which], jnp.int32))

    old = labels < 8
    return Digits(split(old & ~test), split(old & test), split(~old & ~test), split(~old & test))


def logits(params: Any, pixels: jax.Array) -> jax.Array:
    """`[examples, 10]`."""
    x = pixels
    for layer in LAYERS:
        x = x @ params[layer]["kernel"] + params[layer]["bias"][None]
        x = x if layer == "output" else jax.nn.relu(x)
    return x


def loss(params: Any, data: Split) -> jax.Array:
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits(params, data.pixels), data.labels).mean()


def accuracy(params: Any, data: Split) -> jax.Array:
    return (logits(params, data.pixels).argmax(-1) == data.labels).mean()


def train(objective, trainable: Any, rate: Any, steps: int) -> tuple[Any, jax.Array]:
    """Adam along a cosine; the trained tree and the loss before each step."""
    return descent.minimise(objective, trainable, rate, optax.cosine_decay_schedule(1.0, steps), steps)


def pretrained(digits: Digits, seed: int = 0, rate: float = 3e-3, steps: int = 400) -> Any:
    """Parameters that know 0 to 7."""
    sizes = dict(zip(LAYERS, (WIDTH, WIDTH, CLASSES), strict=True))
    keys = jax.random.split(jax.random.key(seed), len(LAYERS))
    params = {
        layer: {
            "kernel": jax.nn.initializers.he_normal()(key, (WIDTH, sizes[layer]), jnp.float32),
            "bias": jnp.zeros(sizes[layer]),
        }
        for layer, key in zip(LAYERS, keys, strict=True)
    }
    return descent.jit(lambda p: train(lambda q: loss(q, digits.old_train), p, rate, steps)[0])(params)


def finetuned(params: Any, digits: Digits, rate: float = 3e-3, steps: int = 200) -> Any:
    """All parameters trained on 8 and 9."""
    return descent.jit(lambda p: train(lambda q: loss(q, digits.new_train), p, rate, steps)[0])(params)


def difference(seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """The second hidden kernel, `[64, 64]`, and what full fine-tuning on 8 and 9 adds to it."""
    digits = load()
    before = pretrained(digits, seed)
    after = finetuned(before, digits)
    kernel = before["hidden_2"]["kernel"]
    return kernel, after["hidden_2"]["kernel"] - kernel


def adapt(adapted, init, digits: Digits, *, rates: Sequence[float], starts: int, steps: int) -> Row:
    """Trains on 8 and 9 from several starts at several rates, and reports the rate of the lowest mean training loss.

    The mean is over the steps: what learns soon and keeps it. The last loss would choose rates that spike at first.

    Args:
        adapted: `trainable -> params`.
        init: `key -> trainable`.
        digits: the data.
        rates: peak learning rates.
        starts: seeds of `init`.
        steps: of training.
    """

    def one(rate, key):
        trainable, losses = train(lambda f: loss(adapted(f), digits.new_train), init(key), rate, steps)
        params = adapted(trainable)
        figures = loss(params, digits.new_train), accuracy(params, digits.new_test), accuracy(params, digits.old_test)
        return losses, *figures

    keys = jax.random.split(jax.random.key(1), starts)
    run = descent.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))
    losses, last, new, old = (np.asarray(x, np.float64) for x in run(jnp.asarray(rates), keys))
    means = np.nan_to_num(losses.mean((1, 2)), nan=np.inf, posinf=np.inf)
    best = int(means.argmin())
    curve = losses[best].mean(0)
    below = np.flatnonzero(curve < 0.1)
    return {
        "loss": float(last[best].mean()),
        "mean_loss": float(means[best]),
        "new_accuracy": float(new[best].mean()),
        "old_accuracy": float(old[best].mean()),
        "steps_to_0.1": int(below[0]) if below.size else None,
        "rate": rates[best],
        "rate_at_edge": best in (0, len(rates) - 1),
        "sweep": [[rate, float(mean)] for rate, mean in zip(rates, means, strict=True)],
        "curve": [float(value) for value in curve[:: max(1, steps // 50)]],
    }


def methods(rank: int) -> dict[str, hx.Adapter]:
    """Every method at LoRA's budget, scale 1."""
    return {
        "LoRA": hx.lora(rank),
        "HiRA": hx.hira(rank),
        "BoHA": hx.boha(rank, blocks=2),
        "ABBA": hx.abba(rank, scale=1.0),
        "LoHa": hx.loha(rank // 2),
    }


def toy(ranks: list[int], rates: list[float], starts: int, steps: int) -> list[Row]:
    """Each method on all three kernels, and full fine-tuning of everything."""
    digits = load()
    base = pretrained(digits)
    sizes = {"rates": rates, "starts": starts, "steps": steps}
    rows = [
        {"method": "none", "parameters": 0, "rank": None, "loss": float(loss(base, digits.new_train))}
        | {f"{which}_accuracy": float(accuracy(base, getattr(digits, f"{which}_test"))) for which in ("new", "old")},
        {"method": "full", "rank": None, "parameters": sum(leaf.size for leaf in jax.tree.leaves(base))}
        | adapt(lambda params: params, lambda key: base, digits, **sizes),
    ]
    for rank in ranks:
        for name, adapter in methods(rank).items():
            injection = hx.inject({"**/kernel": adapter})
            row = adapt(
                lambda factors, injection=injection: injection.merge(base, factors),
                lambda key, injection=injection: injection.init(key, base),
                digits,
                **sizes,
            )
            count = sum(leaf.size for leaf in jax.tree.leaves(injection.init(jax.random.key(0), base)))
            rows.append({"method": name, "rank": rank, "parameters": count} | row)
    return rows


COLUMNS = {
    "mean_loss": "mean training loss",
    "loss": "last",
    "steps_to_0.1": "steps to loss 0.1",
    "new_accuracy": "8, 9 test",
    "old_accuracy": "0-7 test",
    "rate": "rate",
}
RATES = [3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0]
PARTS = {"toy": (toy, {"ranks": [2, 4, 8], "rates": RATES, "starts": 5, "steps": 100})}


def report(results: Row) -> str:
    rows = [[row.get(key) for key in ("method", "rank", "parameters", *COLUMNS)] for row in results["toy"]["rows"]]
    head = ("method", "rank", "parameters", *COLUMNS.values())
    return f"""# Digits: taught 0 to 7, then 8 and 9

A perceptron (64, 64, 64, 10) on scikit-learn's digits; the adapters are on all three kernels and learn from 8 and 9
alone. Mean over the starts, at each method's rate of the lowest training loss (mean of the steps). The last accuracy is
what is left of the first task: no method sees its digits again. A toy: it says how fast each method learns here.

{experiment.table(rows, head)}"""


def draw(figure: Any, results: Row) -> None:
    part = results["toy"]
    ranks = part["settings"]["ranks"]
    figure.set_size_inches(3 * len(ranks), 2.8)
    every = max(1, part["settings"]["steps"] // 50)
    for axes, rank in zip(figure.subplots(1, len(ranks), sharey=True, squeeze=False)[0], ranks, strict=True):
        for row in part["rows"]:
            if row["method"] == "full" or row["rank"] == rank:
                steps = every * np.arange(len(row["curve"]))
                style = {"color": "black", "linestyle": ":"} if row["method"] == "full" else {}
                axes.plot(steps, row["curve"], label=row["method"], **style)
        axes.set(xlabel="step", title=f"rank {rank}", yscale="log")
    figure.axes[0].set_ylabel("training loss, mean of starts")
    figure.axes[0].legend()


def main(argv: Sequence[str] | None = None) -> None:
    experiment.main("digits", PARTS, report, draw, argv, __doc__)


if __name__ == "__main__":
    cli.main(main)
