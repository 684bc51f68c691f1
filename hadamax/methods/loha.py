"""LoHa / FedPara (Hyeon-Woo et al. 2022, arXiv 2108.06098), as Hugging Face PEFT has it.

    W = W0 + s (w1a w1b) .* (w2a w2b)             s = alpha / r; both pairs have rank r, so LoHa r costs 2 r (in + out)
    kernel = W0 + s * (a1 @ b1) * (a2 @ b2)       PEFT's w1b^T, w1a^T, w2b^T, w2a^T

PEFT's init: w1a, w1b and w2a Kaiming uniform (fan-in: the last axis in torch's layout), w2b zero. The function class,
its cost and its two forward forms are in `pairs`.
"""

import jax
import jax.numpy as jnp

from hadamax.adapter import Adapter, Linear
from hadamax.methods.pairs import Forward, check_choice, pair_dot, pair_merge, pair_rows
from hadamax.methods.products import check_number, check_positive, check_rank, kaiming_uniform, wide


def loha(rank: int, *, alpha: float | None = None, forward: Forward = "auto") -> Adapter:
    """Product of two low-rank matrices, randomly initialised.

    Args:
        rank: r of each pair.
        alpha: s = alpha / rank. None means `alpha = rank`.
        forward: "khatri_rao", "merged", or "auto" for the cheaper.

    Raises:
        ConfigError: a bad rank or forward; at `init`, the rank exceeds the matrix.

    Example:
        >>> import jax, jax.numpy as jnp, hadamax as hx
        >>> factors = hx.loha(2).init(jax.random.key(0), hx.Linear(jnp.ones((4, 3))))
        >>> {name: factor.shape for name, factor in factors.items()}
        {'a1': (4, 2), 'b1': (2, 3), 'a2': (4, 2), 'b2': (2, 3)}
    """
    check_positive("loha", rank=rank)
    check_number("loha", alpha=alpha)
    check_choice("loha", "forward", forward, Forward)
    alpha = rank if alpha is None else alpha
    scale = float(alpha / rank)

    def init(key: jax.Array, linear: Linear) -> dict:
        check_rank("loha", rank, linear.kernel)
        (n_in, n_out), dtype = linear.kernel.shape, wide(linear.kernel.dtype)
        k1, k2, k3 = jax.random.split(key, 3)
        return {
            "a1": kaiming_uniform(k1, (n_in, rank), n_in, dtype),
            "b1": kaiming_uniform(k2, (rank, n_out), rank, dtype),
            "a2": jnp.zeros((n_in, rank), dtype),
            "b2": kaiming_uniform(k3, (rank, n_out), rank, dtype),
        }

    config = {"method": "loha", "rank": rank, "alpha": alpha, "forward": forward}
    return Adapter(init, pair_merge(scale), pair_dot(scale, forward), config, pair_rows, merges=True)
