"""HiRA (Huang et al., ICLR 2025): Hadamard high-rank adaptation.

    W = W0 .* (1 + s A B)                         (eq. 4; the paper has s = 1)
    kernel = W0 * (1 + s * a @ b)                 a [in, r] Kaiming uniform, b [r, out] zero

The update is element-wise in W0, so its rank reaches rank(W0) r with LoRA's r (in + out) parameters, and entries of W0
that are zero stay zero. There is no cheap factored form (it would take r base matmuls): the kernel is merged inside the
layer, 3 matmul units. The factor W0, about 0.02 in size, makes the step in weight space small: use a learning rate
10 to 50 times LoRA's.
"""

from hadamax.adapter import Adapter
from hadamax.methods.lora import low_rank_init, low_rank_rows
from hadamax.methods.merging import merged_dot, rounded_once
from hadamax.methods.products import check_number, check_positive


def hira(rank: int, *, scale: float = 1.0) -> Adapter:
    """Low-rank modulation of the frozen weight.

    Args:
        rank: r, at most `min(in, out)`.
        scale: s; the paper has none.

    Raises:
        ConfigError: the rank is no positive integer; at `init`, it exceeds the matrix.

    Example:
        >>> import hadamax as hx
        >>> hx.hira(8).config
        {'method': 'hira', 'rank': 8, 'scale': 1.0}
    """
    check_positive("hira", rank=rank)
    check_number("hira", scale=scale)
    scale = float(scale)

    def new_kernel(factors, kernel):
        return kernel * (1 + scale * (factors["a"] @ factors["b"]))

    merge = rounded_once(new_kernel)
    config = {"method": "hira", "rank": rank, "scale": scale}
    return Adapter(low_rank_init("hira", rank), merge, merged_dot(merge), config, low_rank_rows, merges=True)
