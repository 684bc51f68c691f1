"""DoRA (Liu et al. 2024, arXiv 2402.09353): LoRA on the direction, a trained magnitude for each output.

    W = m (W0 + s B A) / ||W0 + s B A||           norm of each output's weights, detached in the backward pass (4.3)
    kernel = m * (W0 + s * a @ b) / norm          m [out] starts as the norm of W0; a [in, r], b [r, out] as LoRA's

The norm comes from the factors, ||w + s A b||^2 = ||w||^2 + 2 s (A^T w) . b + s^2 b . (A^T A) b for a column w of W0
and b of the second factor, so that no dense matrix is formed: 2 matmul units.
"""

import jax
import jax.numpy as jnp

from hadamax.adapter import Adapter
from hadamax.methods.lora import low_rank_init
from hadamax.methods.merging import rounded_once
from hadamax.methods.products import check_number, check_positive, on_last, wide


def dora(rank: int, *, alpha: float | None = None) -> Adapter:
    """Magnitude and direction.

    Args:
        rank: r, at most `min(in, out)`.
        alpha: s = alpha / rank. None means `alpha = rank`.

    Raises:
        ConfigError: the rank is no positive integer; at `init`, it exceeds the matrix.

    Example:
        >>> import jax, jax.numpy as jnp, hadamax as hx
        >>> factors = hx.dora(2).init(jax.random.key(0), hx.Linear(jnp.ones((4, 3))))
        >>> factors["magnitude"]
        Array([2., 2., 2.], dtype=float32)
    """
    check_positive("dora", rank=rank)
    check_number("dora", alpha=alpha)
    alpha = rank if alpha is None else alpha
    scale = float(alpha / rank)
    low_rank = low_rank_init("dora", rank)

    def norm(a, b, kernel):
        a, b, kernel = jax.lax.stop_gradient((a, b, kernel.astype(wide(kernel.dtype))))
        square = (kernel**2).sum(0) + 2 * scale * ((a.T @ kernel) * b).sum(0) + scale**2 * (((a.T @ a) @ b) * b).sum(0)
        return jnp.sqrt(jnp.maximum(square, 0))

    def gain(factors, kernel):
        size = norm(factors["a"], factors["b"], kernel)
        return factors["magnitude"] / jnp.where(size > 0, size, 1)  # a zero column has no direction, and stays zero

    def init(key, linear):
        factors = low_rank(key, linear)
        return {**factors, "magnitude": norm(factors["a"], factors["b"], linear.kernel)}

    def new_kernel(factors, kernel):
        a, b = factors["a"], factors["b"]
        return on_last(gain(factors, kernel), kernel) * (kernel + scale * (a @ b))

    def dot(factors, linear, x):
        a, b = factors["a"], factors["b"]
        direction = x @ linear.kernel.astype(x.dtype) + scale * ((x @ a.astype(x.dtype)) @ b.astype(x.dtype))
        return (on_last(gain(factors, linear.kernel), x) * direction).astype(x.dtype)

    config = {"method": "dora", "rank": rank, "alpha": alpha}
    return Adapter(init, rounded_once(new_kernel), dot, config)
