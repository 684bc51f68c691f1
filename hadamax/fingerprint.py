"""A number for each weight that says whether it is the one that adapters were trained on.

Each entry is rounded to bfloat16, mixed with its position in wrapping 32-bit integers, and the results are summed. The
sum knows no order, so neither the device nor the sharding matters; and a bfloat16 file loaded as float32 has the
fingerprint of a float32 file loaded as bfloat16. A file loaded as float16 is rounded otherwise: its fingerprint differs
unless every entry is a float16 number. It guards against mistakes, not against forgery.

A quantised kernel is known by its codes and scales: adapters belong to the base that they were trained on, and that is
another than the one it was quantised from.
"""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hadamax import paths
from hadamax.errors import ConfigError
from hadamax.quantized import is_quantized

_BLOCK = 2**21  # entries at a time: XLA's CPU backend keeps the mixed entries in memory, and these stay in the cache


def weights(params: Any) -> dict[str, Any]:
    """The floating-point leaves by path: counters and random keys, which change as a model runs, are no weights."""
    leaves = {path: leaf for path, leaf in paths.leaves(params).items() if hasattr(leaf, "dtype")}
    return {path: leaf for path, leaf in leaves.items() if jnp.issubdtype(leaf.dtype, jnp.floating)}


def fingerprint(leaves: dict[str, Any]) -> dict[str, str]:
    """Eight hexadecimal digits for each leaf, in about the time of one read, on the leaf's own devices.

    Raises:
        ConfigError: a leaf without values (`jax.ShapeDtypeStruct`).

    Example:
        >>> import jax.numpy as jnp
        >>> kernel = jnp.linspace(-1, 1, 12).reshape(3, 4)
        >>> fingerprint({"w": kernel}) == fingerprint({"w": kernel.astype(jnp.bfloat16)})
        True
        >>> fingerprint({"w": kernel}) == fingerprint({"w": kernel.at[0, 1].add(0.1)})
        False
    """
    parts = {path: jax.tree.leaves(leaf.array) if is_quantized(leaf) else [leaf] for path, leaf in leaves.items()}
    for path, arrays in parts.items():
        for array in arrays:
            if not isinstance(array, jax.Array | np.ndarray):
                raise ConfigError(f"{path}: only an array has a fingerprint, found {type(array).__name__}")
    sums = {path: [s for array in arrays for s in _blocks(jnp.asarray(array))] for path, arrays in parts.items()}
    return {path: f"{sum(map(int, parts)) % 2**32:08x}" for path, parts in jax.device_get(sums).items()}


def _blocks(leaf: jax.Array) -> list[jax.Array]:
    """The sums of one leaf: each shard's own, so that nothing moves between devices."""
    strides = tuple(math.prod(leaf.shape[at + 1 :]) for at in range(leaf.ndim))
    if not leaf.is_fully_addressable:  # the shards of other processes cannot be asked: one program for all
        return [_alone(_sum(leaf, np.zeros(leaf.ndim, np.int32), np.uint32(0), leaf.shape, strides))]
    sums = []
    for shard in leaf.addressable_shards:
        if shard.replica_id:
            continue
        origin = [part.start or 0 for part in shard.index]
        shape = shard.data.shape
        sizes = _block_shape(shape)
        for start in itertools.product(*map(range, itertools.repeat(0), shape, sizes)):
            first = sum((o + s) * stride for o, s, stride in zip(origin, start, strides, strict=True))
            size = tuple(min(k, n - s) for k, n, s in zip(sizes, shape, start, strict=True))
            sums.append(_sum(shard.data, np.array(start, np.int32), np.uint32(first % 2**32), size, strides))
    return sums


def _block_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of at most `_BLOCK` entries that lie together."""
    sizes, left = [], _BLOCK
    for n in reversed(shape):
        sizes.append(max(1, min(n, left)))
        left = left // n if 0 < n <= left else 1
    return tuple(reversed(sizes))


@functools.partial(jax.jit, static_argnums=(3, 4))
def _sum(leaf: jax.Array, start: jax.Array, first: jax.Array, size: tuple[int, ...], strides: tuple[int, ...]):
    """The sum over a block, whose first entry is at the position `first` of the whole leaf."""
    if leaf.dtype == jnp.bfloat16:
        leaf = jax.lax.bitcast_convert_type(leaf, jnp.uint16)
    block = jax.lax.dynamic_slice(leaf, start, size)
    if block.dtype == jnp.uint16:
        bits = block.astype(jnp.uint32)
    else:  # to bfloat16, to nearest even, in integers: backends differ in what they do with the smallest floats
        bits = jax.lax.bitcast_convert_type(block.astype(jnp.float32), jnp.uint32)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    bits = jnp.where((bits & 0x7F80) == 0, jnp.uint32(0), bits)  # both zeros, and what is too small to be normal
    position = jnp.full(size, first)
    for axis, stride in enumerate(strides):
        position += jax.lax.broadcasted_iota(jnp.uint32, size, axis) * jnp.uint32(stride % 2**32)
    return _mix(position, bits).sum(dtype=jnp.uint32)


def checksums(leaves: dict[str, Any]) -> dict[str, str]:
    """Eight hexadecimal digits for each array, which change with any bit of it, whatever its dtype and sharding.

    One number changed never goes unnoticed, several changed ones once in 2^32 times. Each process of a run calls it.

    Example:
        >>> import jax.numpy as jnp
        >>> ones = jnp.ones(3)
        >>> checksums({"w": ones}) == checksums({"w": ones.at[1].add(1e-7)})
        False
    """
    sums = jax.device_get({path: _alone(_checksum(leaf)) for path, leaf in leaves.items()})
    return {path: f"{int(part):08x}" for path, part in sums.items()}


def _alone(result: jax.Array) -> jax.Array:
    """Waits for a program of several devices: on CPU, two of them under way at once can wait for each other."""
    return result if len(result.sharding.device_set) == 1 else jax.block_until_ready(result)


@jax.jit
def _checksum(leaf: jax.Array) -> jax.Array:
    leaf = leaf.astype(jnp.uint8) if leaf.dtype == jnp.bool_ else leaf
    # Eight bytes become a last axis of two numbers.
    bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * min(leaf.dtype.itemsize, 4)}").astype(jnp.uint32)
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        position = position * jnp.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return _mix(position, bits).sum(dtype=jnp.uint32)


def _mix(position: jax.Array, bits: jax.Array) -> jax.Array:
    """A number for a value at a place: the finaliser of MurmurHash3, one to one in `bits`."""
    mixed = (position * jnp.uint32(0x9E3779B1)) ^ (bits * jnp.uint32(0x85EBCA77))
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    return mixed ^ (mixed >> 16)
