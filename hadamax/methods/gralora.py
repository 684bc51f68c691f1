"""GraLoRA (Jung et al. 2025, arXiv 2505.20355): LoRA in each block of a grid, the W0-free control of BoHA.

    (W)_ij = (W0)_ij + s B_ij A_ij                over a k x k grid, each pair of rank r / k, s = alpha / r
    kernel = W0 + s * blockwise(a, b)             a [k, k, in/k, r/k] Kaiming uniform, b [k, k, r/k, out/k] zero

r (in + out) parameters and LoRA's FLOPs: 2 matmul units.
"""

import jax.numpy as jnp

from hadamax.adapter import Adapter
from hadamax.methods.boha import block_init
from hadamax.methods.merging import rounded_once
from hadamax.methods.products import blockwise, check_blocks, check_number


def gralora(rank: int, blocks: int, *, alpha: float | None = None) -> Adapter:
    """Low-rank addition in each block.

    Args:
        rank: r, the LoRA-equivalent total; each block has rank `rank / blocks`.
        blocks: k; divides `in`, `out` and `rank`.
        alpha: the scale is `alpha / rank`. None means `alpha = rank`.

    Raises:
        ConfigError: blocks does not divide the rank; at `init`, it does not divide the kernel.

    Example:
        >>> import hadamax as hx
        >>> hx.gralora(8, blocks=2).config["blocks"]
        2
    """
    check_blocks("gralora", rank, blocks)
    check_number("gralora", alpha=alpha)
    alpha = rank if alpha is None else alpha
    scale = float(alpha / rank)

    def new_kernel(factors, kernel):
        return kernel + scale * blockwise(factors["a"], factors["b"])

    def dot(factors, linear, x):
        a, b = factors["a"].astype(x.dtype), factors["b"].astype(x.dtype)
        pieces = x.reshape(*x.shape[:-1], blocks, -1)
        hidden = jnp.einsum("...ip,ijpr->...ijr", pieces, a)
        update = jnp.einsum("...ijr,ijrq->...jq", hidden, b).reshape(*x.shape[:-1], -1)
        return x @ linear.kernel.astype(x.dtype) + scale * update

    config = {"method": "gralora", "rank": rank, "blocks": blocks, "alpha": alpha}
    return Adapter(block_init("gralora", rank, blocks), rounded_once(new_kernel), dot, config)
