"""Products of factors that several methods share, and the initialisers that PyTorch's names stand for."""

import math

import jax
import jax.numpy as jnp

from hadamax.errors import ConfigError


def wide(dtype) -> jnp.dtype:
    """The dtype to compute weights and keep factors in: at least float32."""
    return jnp.dtype(jnp.float32) if jnp.dtype(dtype).itemsize < 2 else jnp.promote_types(jnp.float32, dtype)


def on_last(vector: jax.Array, like: jax.Array) -> jax.Array:
    """The vector with leading axes of size 1, to act on the last axis of `like` (implicit rank promotion may raise)."""
    return vector.reshape(*[1] * (like.ndim - 1), -1)


def kaiming_uniform(key: jax.Array, shape: tuple[int, ...], fan_in: int, dtype, slope: float = 5**0.5) -> jax.Array:
    """torch's `kaiming_uniform_(a=slope)`: uniform within `sqrt(6 / ((1 + slope^2) fan_in))`."""
    bound = (6 / ((1 + slope**2) * fan_in)) ** 0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def khatri_rao(b1: jax.Array, b2: jax.Array) -> jax.Array:
    """Column-wise Khatri-Rao product of `[r1, n]` and `[r2, n]`: `[r1 r2, n]`, row `k = i r2 + j` is `b1[i] .* b2[j]`.

    `(a1 @ b1) .* (a2 @ b2) == khatri_rao(a1.T, a2.T).T @ khatri_rao(b1, b2)` (ABBA, Theorem 1).
    """
    return (b1[:, None, :] * b2[None, :, :]).reshape(-1, b1.shape[1])


def blockwise(a: jax.Array, b: jax.Array) -> jax.Array:
    """The matrix `[in, out]` whose block `(i, j)` is `a[i, j] @ b[i, j]`.

    One product for each row of blocks, its `b`s zero outside of their blocks: the result needs no transpose.

    Args:
        a: `[blocks, blocks, in / blocks, r]`.
        b: `[blocks, blocks, r, out / blocks]`.
    """
    blocks, _, n_in, rank = a.shape
    left = jnp.transpose(a, (0, 2, 1, 3)).reshape(blocks, n_in, -1)  # [i, in / blocks, j r]
    apart = jnp.eye(blocks, dtype=a.dtype).reshape(1, blocks, 1, blocks, 1)
    right = (b[:, :, :, None, :] * apart).reshape(blocks, blocks * rank, -1)  # [i, j r, out]
    return (left @ right).reshape(blocks * n_in, -1)


def check_positive(method: str, **values: int | None) -> None:
    """Raise ConfigError unless every value is a positive integer."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{method}: {name} must be a positive integer, found {value!r}")


_LARGEST = 1e18  # its square is a float32, too


def check_number(method: str, **values: float | None) -> None:
    """Raise ConfigError unless every value is a finite real number; an `alpha` also not 0. None passes."""
    for name, value in values.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value or abs(value) == math.inf:
            raise ConfigError(f"{method}: {name} must be a finite number, found {value!r}")
        if abs(value) > _LARGEST:
            raise ConfigError(f"{method}: {name} must be at most {_LARGEST:g} in size, found a larger one")
        if name == "alpha" and value == 0:
            raise ConfigError(f"{method}: alpha 0 would make the update zero for ever; give another value")


def check_flag(method: str, **values: bool) -> None:
    """Raise ConfigError unless every value is True or False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ConfigError(f"{method}: {name} must be true or false, found {value!r}")


def check_rank(method: str, rank: int, kernel: jax.Array) -> None:
    """Raise ConfigError where a factor pair of this rank would be larger than the matrix can use."""
    if rank > min(kernel.shape):
        raise ConfigError(
            f"{method}: rank {rank} exceeds min(in, out) = {min(kernel.shape)} of a {kernel.shape} kernel"
        )


def check_blocks(method: str, rank: int, blocks: int) -> None:
    """Raise ConfigError unless the rank divides into the block grid (`r_b = rank / blocks`)."""
    check_positive(method, rank=rank, blocks=blocks)
    if rank % blocks:
        raise ConfigError(
            f"{method}: rank {rank} is not divisible by blocks {blocks} (each block has rank rank / blocks);"
            f" use rank {rank - rank % blocks or blocks} or {rank - rank % blocks + blocks}"
        )


def check_grid(method: str, rank: int, blocks: int, kernel: jax.Array) -> None:
    """Raise ConfigError unless the kernel splits into the grid and each block can hold rank `rank / blocks`."""
    for axis, size in zip(("in", "out"), kernel.shape, strict=True):
        if size % blocks:
            raise ConfigError(f"{method}: blocks {blocks} does not divide {axis} = {size} of a {kernel.shape} kernel")
    block = (kernel.shape[0] // blocks, kernel.shape[1] // blocks)
    if rank // blocks > min(block):
        raise ConfigError(f"{method}: rank {rank} / blocks {blocks} = {rank // blocks} exceeds a block of {block}")
