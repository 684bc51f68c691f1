"""Merged matmuls on a mesh: each shard of the batch contracts its own gradient of the merged kernel to the factors."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from hadamax.sharding import batch_axes, fitting


class Placement(NamedTuple):
    """Where a kernel lies.

    Attributes:
        mesh: the devices.
        i: the mesh axes over which its flattened in axis is split, as in a `PartitionSpec`.
        o: those of its flattened out axis.
    """

    mesh: Mesh | AbstractMesh
    i: Any
    o: Any

    @property
    def shards(self) -> int:
        """Into how many parts the rows of a batch are split."""
        return math.prod(self.mesh.shape[axis] for axis in batch_axes(self.mesh))

    def splits(self, rows: Sequence[int]) -> bool:
        """Whether the first of an input's row axes, which is the batch's, is split over the mesh."""
        return self.shards > 1 and bool(rows) and rows[0] % self.shards == 0

    @property
    def gathered(self) -> tuple[Any, Any]:
        """`i` and `o` without the axes over which batches are split."""
        return tuple(_without(axes, batch_axes(self.mesh)) for axes in (self.i, self.o))  # pyright: ignore[reportReturnType]


def _without(axes: Any, gone: Sequence[str]) -> Any:
    """One entry of a `PartitionSpec`, less some mesh axes."""
    kept = tuple(axis for axis in (axes if isinstance(axes, tuple) else (axes,)) if axis not in (None, *gone))
    return kept or None


def platform(placement: Placement | None) -> str:
    """Of the devices that a program is traced for, which ahead of time are not those at hand."""
    mesh = None if placement is None else placement.mesh
    return mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else jax.default_backend()


def gathered(kernel: Any, placement: Placement | None) -> Any:
    """A kernel `[in, out]`, or its codes and scales, whole within each shard of the batch."""
    if placement is None:
        return kernel

    def whole(part: jax.Array) -> jax.Array:
        spec = fitting(placement.mesh, placement.gathered, part.shape)
        return lax.with_sharding_constraint(part, NamedSharding(placement.mesh, spec))

    return jax.tree.map(whole, kernel)


def by_shard(dot: Callable[..., jax.Array], placement: Placement, role: str) -> Callable[..., jax.Array]:
    """A `dot` that merges, computed by each shard of the batch for itself.

    Left alone, the compiler sums the `[in, out]` gradient of the merged kernel over the shards and contracts it to
    the factors afterwards: as much communication as full fine-tuning has. Here each shard has a copy of the factors,
    so that the gradient of each copy is contracted where it arises, and only these are summed. The checkpoint covers
    the gather of the kernel, which the backward pass repeats.
    """
    mesh, split = placement.mesh, batch_axes(placement.mesh)
    taken, given = placement.gathered if role == "i" else placement.gathered[::-1]

    def lay(x: jax.Array, *axes: Any) -> jax.Array:
        return lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))

    def copied(factor: jax.Array, dtype: Any) -> jax.Array:
        copies: Any = _copies(factor, placement.shards, dtype)
        return lay(copies, split, *[PartitionSpec.UNCONSTRAINED] * factor.ndim)

    @jax.checkpoint
    def each(one: dict[str, Any], x: jax.Array) -> jax.Array:
        one = {**one, "kernel": gathered(one["kernel"], placement)}
        factors = jax.tree.map(lambda factor: copied(factor, x.dtype), one["factors"])
        rows, inner = x.shape[:-1], [None] * (x.ndim - 1)
        x = x.reshape(placement.shards, rows[0] // placement.shards, *x.shape[1:])
        x = lay(x, split, *inner, taken)
        y = jax.vmap(lambda factors, x: dot({**one, "factors": factors}, x))(factors, x)
        return lay(y, split, *inner, given).reshape(*rows, -1)

    return each


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _copies(factor: jax.Array, count: int, dtype: Any) -> jax.Array:
    """`count` copies, whose gradients are summed in `dtype`: they cross the mesh as LoRA's do, in the activations'."""
    return jnp.broadcast_to(factor[None], (count, *factor.shape))


@_copies.defjvp
def _copies_jvp(count: int, dtype: Any, primals: tuple[jax.Array], tangents: tuple[jax.Array]):
    (factor,), (tangent,) = primals, tangents
    narrow = jnp.broadcast_to(tangent.astype(dtype)[None], (count, *tangent.shape))  # its transpose sums in `dtype`
    return _copies(factor, count, dtype), narrow.astype(tangent.dtype)
