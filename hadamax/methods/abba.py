"""ABBA (Singhal et al., ICLR 2026, arXiv 2505.14238): two low-rank pairs, the first from the SVD of W0.

    W = W0 + s (B1 A1) .* (B2 A2)                 s = alpha^2 / sqrt(r1 r2)   (eq. 7)
    kernel = W0 + s * (a1 @ b1) * (a2 @ b2)

Init (section 3.2): with U S V^T the best rank-r1 approximation of the kernel, a1 = U S^1/2, b1 = S^1/2 V^T; a2 is
Kaiming uniform with slope 0, as the authors' code has it; b2 is zero, so only b2 has a gradient at first. W0 itself is
not changed. The rank is the total, r1 + r2, so ABBA r costs what LoRA r costs. The authors' code has s = alpha, here
`scale=alpha`. Cost and the two forward forms are in `pairs`.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp

from hadamax.adapter import Adapter, Linear
from hadamax.errors import ConfigError
from hadamax.methods.pairs import Forward, check_choice, pair_dot, pair_merge, pair_rows
from hadamax.methods.products import check_number, check_positive, check_rank, kaiming_uniform, on_last, wide

Init = Literal["auto", "exact", "randomized", "kaiming"]
_LARGE = 1024  # an exact SVD of a larger matrix takes seconds to minutes
_OVERSAMPLING, _POWER_ITERATIONS = 8, 10


def top_singular(
    kernel: jax.Array, rank: int, *, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The `rank` largest singular triples `u [in, r], s [r], vt [r, out]`.

    Exact without a key. With one, the randomised range finder with power iterations and oversampling (Halko,
    Martinsson, Tropp 2011, algorithm 4.4). The sign of each triple makes the largest entry of u positive.
    """
    if key is None:
        u, s, vt = jnp.linalg.svd(kernel, full_matrices=False)
    else:
        width = min(rank + _OVERSAMPLING, *kernel.shape)
        sample = jax.random.normal(key, (kernel.shape[1], width), kernel.dtype)
        q = jnp.linalg.qr(kernel @ sample)[0]

        def power(_, q):  # orthonormalised at each half step, or rounding would leave the first direction alone
            return jnp.linalg.qr(kernel @ jnp.linalg.qr(kernel.T @ q)[0])[0]

        q = jax.lax.fori_loop(0, _POWER_ITERATIONS, power, q)
        u, s, vt = jnp.linalg.svd(q.T @ kernel, full_matrices=False)
        u = q @ u
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    sign = jnp.where(jnp.take_along_axis(u, jnp.abs(u).argmax(0, keepdims=True), 0)[0] < 0, -1, 1).astype(u.dtype)
    return u * on_last(sign, u), s, vt * sign[:, None]


def abba(
    rank: int | None = None,
    *,
    r1: int | None = None,
    r2: int | None = None,
    alpha: float = 24.0,
    scale: float | None = None,
    forward: Forward = "auto",
    init: Init = "auto",
) -> Adapter:
    """Product of two low-rank matrices, the first initialised from the weight.

    Args:
        rank: the total, even; r1 = r2 = rank / 2.
        r1: rank of the pair from the SVD, given together with `r2` in place of `rank`.
        r2: rank of the other pair.
        alpha: s = alpha^2 / sqrt(r1 r2). The paper's best are 16 to 32.
        scale: s itself, in place of the formula.
        forward: "khatri_rao", "merged", or "auto" for the cheaper.
        init: of the first pair: "exact" or "randomized" SVD, "auto" (randomized where both sides exceed 1024), or
            "kaiming" (as LoRA's: b1 zero, and so every gradient zero: the paper's negative control).

    Raises:
        ConfigError: an odd rank, ranks given twice or not at all, an unknown choice; at `init`, a rank above the
            matrix.

    Example:
        >>> import jax, hadamax as hx
        >>> layer = hx.Linear(jax.random.normal(jax.random.key(0), (8, 6)))
        >>> factors = hx.abba(4).init(jax.random.key(1), layer)
        >>> {name: factor.shape for name, factor in factors.items()}
        {'a1': (8, 2), 'b1': (2, 6), 'a2': (8, 2), 'b2': (2, 6)}
    """
    if rank is not None and r1 is None and r2 is None:
        check_positive("abba", rank=rank)
        if rank % 2:
            raise ConfigError(
                f"abba: rank {rank} is odd and cannot be halved into r1 = r2; give an even rank, or r1= and r2="
            )
        r1 = r2 = rank // 2
    elif rank is not None or r1 is None or r2 is None:
        raise ConfigError(f"abba: give either rank (the total) or both r1 and r2, found rank={rank}, r1={r1}, r2={r2}")
    check_positive("abba", r1=r1, r2=r2)
    check_number("abba", alpha=alpha, scale=scale)
    check_choice("abba", "forward", forward, Forward)
    check_choice("abba", "init", init, Init)
    s = float(alpha**2 / math.sqrt(r1 * r2) if scale is None else scale)

    def make(key: jax.Array, linear: Linear) -> dict:
        check_rank("abba", max(r1, r2), linear.kernel)
        dtype = wide(linear.kernel.dtype)
        kernel = linear.kernel.astype(dtype)
        n_in, n_out = kernel.shape
        key1, key2 = jax.random.split(key)
        if init == "kaiming":
            a1, b1 = kaiming_uniform(key1, (n_in, r1), n_in, dtype), jnp.zeros((r1, n_out), dtype)
        else:
            randomized = init == "randomized" or (init == "auto" and min(n_in, n_out) > _LARGE)
            u, sigma, vt = top_singular(kernel, r1, key=key1 if randomized else None)
            a1, b1 = u * on_last(jnp.sqrt(sigma), u), jnp.sqrt(sigma)[:, None] * vt
        a2 = kaiming_uniform(key2, (n_in, r2), n_in, dtype, slope=0)
        return {"a1": a1, "b1": b1, "a2": a2, "b2": jnp.zeros((r2, n_out), dtype)}

    config = {"method": "abba", "r1": r1, "r2": r2, "alpha": alpha, "scale": scale, "forward": forward, "init": init}
    return Adapter(make, pair_merge(s), pair_dot(s, forward), config, pair_rows, merges=True)
