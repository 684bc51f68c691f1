"""The function class that ABBA and LoHa share: the element-wise product of two low-rank matrices.

    W = W0 + s (B1 A1) .* (B2 A2)
    kernel = W0 + s * (a1 @ b1) * (a2 @ b2)       a1 [in, r1], b1 [r1, out], a2 [in, r2], b2 [r2, out]

The update is LoRA of rank R = r1 r2 with Khatri-Rao factors (ABBA, Theorem 1), so there are two exact ways to apply it:

    khatri_rao   2 + 3 R (in + out) / (in out) matmul units (1 = a base matmul), no dense gradient
    merged       3 matmul units whatever the rank

"auto" takes the cheaper: Khatri-Rao while 3 R (in + out) < in out, about R < d / 6 for a square kernel.
"""

import functools
from typing import Literal, get_args

import jax

from hadamax.adapter import Factors, Linear
from hadamax.errors import ConfigError, nearest
from hadamax.methods.merging import merged_dot, rounded_once
from hadamax.methods.products import khatri_rao

Forward = Literal["auto", "khatri_rao", "merged"]


def check_choice(method: str, name: str, value: str, choices) -> None:
    """Raise ConfigError unless the value is one of a Literal's choices."""
    if value not in (allowed := get_args(choices)):
        raise ConfigError(
            f"{method}: {name} must be one of {', '.join(allowed)}, found {value!r}{nearest(str(value), allowed)}"
        )


def prefers_khatri_rao(r1: int, r2: int, n_in: int, n_out: int) -> bool:
    """Whether Khatri-Rao takes fewer FLOPs in a training step than merging.

    Example:
        >>> prefers_khatri_rao(16, 16, 4096, 4096), prefers_khatri_rao(16, 16, 512, 2048)
        (True, False)
    """
    return 3 * r1 * r2 * (n_in + n_out) < n_in * n_out


def pair_merge(scale: float):
    """`merge` of the class."""
    return rounded_once(lambda f, kernel: kernel + scale * (f["a1"] @ f["b1"]) * (f["a2"] @ f["b2"]))


def pair_dot(scale: float, forward: Forward):
    """`dot` of the class by the cost model, or as `forward` says."""
    merged = merged_dot(pair_merge(scale))

    # only matmul results are kept for the backward pass: the r1 r2 (in + out) products are recomputed
    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    def update(f: Factors, x: jax.Array) -> jax.Array:
        a = khatri_rao(f["a1"].T, f["a2"].T).T.astype(x.dtype)
        b = khatri_rao(f["b1"], f["b2"]).astype(x.dtype)
        return scale * ((x @ a) @ b)

    def dot(f: Factors, linear: Linear, x: jax.Array) -> jax.Array:
        r1, r2 = f["a1"].shape[1], f["a2"].shape[1]
        if forward == "merged" or (forward == "auto" and not prefers_khatri_rao(r1, r2, *linear.kernel.shape)):
            return merged(f, linear, x)
        return x @ linear.kernel.astype(x.dtype) + update(f, x)

    return dot


def pair_rows(factors: Factors, select) -> Factors:
    """The factors of a selection of input rows."""
    return {**factors, "a1": select(factors["a1"]), "a2": select(factors["a2"])}
