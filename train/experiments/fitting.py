"""Fits of an adapter's update to a target matrix: by Adam, from several starts at several rates."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hadamax as hx
from train.experiments.descent import jit, minimise
from train.experiments.experiment import Row


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
        updates: `[targets, in, out]`, of each target the one whose error its row has.
        rates: the learning rates.
    """

    errors: np.ndarray
    updates: np.ndarray
    rates: tuple[float, ...]

    def row(self, target: int) -> Row:
        """The figures of one target: the best start at the rate of the lowest mean over the starts."""
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

        def loss(factors):
            return jnp.sum(((update(adapter, factors, base) - target) / norm) ** 2)

        factors, _ = minimise(loss, adapter.init(key, hx.Linear(base)), rate, decay, steps)
        return update(adapter, factors, base)

    over_starts = jax.vmap(one, (None, None, None, 0))
    over_rates = jax.vmap(over_starts, (None, None, 0, None))
    run = jit(jax.vmap(over_rates, (0, 0, None, None)))
    keys = jax.random.split(jax.random.key(seed), starts)
    updates = np.asarray(run(bases, targets, jnp.asarray(rates, bases.dtype), keys), np.float64)
    wanted = np.asarray(targets, np.float64)
    errors = np.linalg.norm(updates - wanted[:, None, None], axis=(-2, -1))
    errors = np.nan_to_num(errors / np.linalg.norm(wanted, axis=(-2, -1))[:, None, None], nan=np.inf, posinf=np.inf)
    at = np.arange(len(wanted))
    best = errors.mean(-1).argmin(-1)
    return Fits(errors, updates[at, best, errors[at, best].argmin(-1)], tuple(rates))


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
