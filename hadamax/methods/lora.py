"""LoRA (Hu et al. 2021, arXiv 2106.09685) and rsLoRA (Kalajdzievski 2023, arXiv 2312.03732).

    W = W0 + s B A        s = alpha / r, or alpha / sqrt(r) for rsLoRA
    kernel = W0 + s * a @ b          a [in, r] Kaiming uniform, b [r, out] zero

Costs r (in + out) parameters and 2 matmul units (forward, dx): no gradient of the dense weight is formed.
"""

import jax
import jax.numpy as jnp

from hadamax.adapter import Adapter, Linear
from hadamax.methods.merging import rounded_once
from hadamax.methods.products import check_flag, check_number, check_positive, check_rank, kaiming_uniform, wide


def low_rank_init(method: str, rank: int):
    """`(key, Linear) -> {"a": [in, r] Kaiming uniform, "b": [r, out] zero}`: LoRA's factors, which HiRA shares."""

    def init(key: jax.Array, linear: Linear) -> dict:
        check_rank(method, rank, linear.kernel)
        (n_in, n_out), dtype = linear.kernel.shape, wide(linear.kernel.dtype)
        return {"a": kaiming_uniform(key, (n_in, rank), n_in, dtype), "b": jnp.zeros((rank, n_out), dtype)}

    return init


def low_rank_rows(factors, select):
    """The factors of a selection of input rows."""
    return {**factors, "a": select(factors["a"])}


def lora(rank: int, *, alpha: float | None = None, rslora: bool = False) -> Adapter:
    """Low-rank addition.

    Args:
        rank: r, at most `min(in, out)`.
        alpha: the scale is `alpha / rank` (`alpha / sqrt(rank)` for rsLoRA). None means `alpha = rank`.
        rslora: scale by the square root of the rank.

    Raises:
        ConfigError: the rank is no positive integer; at `init`, it exceeds the matrix.

    Example:
        >>> import hadamax as hx
        >>> hx.lora(8, alpha=16).config["alpha"]
        16
    """
    check_positive("lora", rank=rank)
    check_number("lora", alpha=alpha)
    check_flag("lora", rslora=rslora)
    alpha = rank if alpha is None else alpha
    scale = float(alpha / rank**0.5 if rslora else alpha / rank)

    def new_kernel(factors, kernel):
        return kernel + scale * (factors["a"] @ factors["b"])

    def dot(factors, linear, x):
        a, b = factors["a"].astype(x.dtype), factors["b"].astype(x.dtype)
        return x @ linear.kernel.astype(x.dtype) + scale * ((x @ a) @ b)

    config = {"method": "lora", "rank": rank, "alpha": alpha, "rslora": rslora}
    return Adapter(low_rank_init("lora", rank), rounded_once(new_kernel), dot, config, low_rank_rows)
