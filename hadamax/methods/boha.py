"""BoHA (Yu, Hu, Min 2025, arXiv 2509.21637): block-wise Hadamard adaptation.

    (W)_ij = (W0)_ij .* (1 + s B_ij A_ij)         over a b x b grid of blocks, each factor pair of rank r_b = r / b
    kernel = W0 * (1 + s * blockwise(a, b))       a [b, b, in/b, r_b] Kaiming uniform, b [b, b, r_b, out/b] zero

r (in + out) parameters, as LoRA and HiRA of rank r; the modulator's rank reaches b r where HiRA's is r. One block is
HiRA. Merged inside the layer, 3 matmul units. The paper states neither init nor scale: HiRA's are taken, and a block is
initialised by its own fan-in, as GraLoRA's are.
"""

import jax
import jax.numpy as jnp

from hadamax.adapter import Adapter, Linear
from hadamax.methods.merging import merged_dot, rounded_once
from hadamax.methods.products import blockwise, check_blocks, check_grid, check_number, kaiming_uniform, wide


def block_init(method: str, rank: int, blocks: int):
    """`(key, Linear) -> {"a": [b, b, in/b, r/b] Kaiming uniform, "b": [b, b, r/b, out/b] zero}`."""

    def init(key: jax.Array, linear: Linear) -> dict:
        check_grid(method, rank, blocks, linear.kernel)
        n_in, n_out = (size // blocks for size in linear.kernel.shape)
        dtype, grid = wide(linear.kernel.dtype), (blocks, blocks)
        a = kaiming_uniform(key, (*grid, n_in, rank // blocks), n_in, dtype)
        return {"a": a, "b": jnp.zeros((*grid, rank // blocks, n_out), dtype)}

    return init


def boha(rank: int, blocks: int, *, scale: float = 1.0) -> Adapter:
    """Low-rank modulation of each block of the frozen weight.

    Args:
        rank: r, the LoRA-equivalent total; each block has rank `rank / blocks`.
        blocks: b; the kernel is cut into b x b blocks, so b divides `in`, `out` and `rank`.
        scale: s.

    Raises:
        ConfigError: blocks does not divide the rank; at `init`, it does not divide the kernel.

    Example:
        >>> import jax, jax.numpy as jnp, hadamax as hx
        >>> factors = hx.boha(8, blocks=4).init(jax.random.key(0), hx.Linear(jnp.ones((16, 12))))
        >>> factors["a"].shape, factors["b"].shape
        ((4, 4, 4, 2), (4, 4, 2, 3))
    """
    check_blocks("boha", rank, blocks)
    check_number("boha", scale=scale)
    scale = float(scale)

    def new_kernel(factors, kernel):
        return kernel * (1 + scale * blockwise(factors["a"], factors["b"]))

    merge = rounded_once(new_kernel)
    config = {"method": "boha", "rank": rank, "blocks": blocks, "scale": scale}
    return Adapter(block_init("boha", rank, blocks), merge, merged_dot(merge), config, merges=True)
