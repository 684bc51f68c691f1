"""A target's kernel as a stack of matrices `[n, in, out]`, on which methods are mapped, and back to its own layout."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from hadamax import views, weight
from hadamax.adapter import Adapter, Linear
from hadamax.quantized import dequantized, is_quantized
from hadamax.sharding import fitting
from hadamax.targets import Target


def canonical(leaves: Mapping[str, Any], target: Target) -> Linear:
    """The layer as `[batch..., in, out]` and `[batch..., out]`; a quantised kernel as an array of codes and scales."""
    leaf = leaves[target.path]
    kernel = weight.canonical(leaf.array if is_quantized(leaf) else jnp.asarray(leaf), target.axes)
    bias = None if target.bias is None else views.canonical(jnp.asarray(leaves[target.bias]), target.bias_axes)
    return Linear(kernel, bias)


def dense(linear: Linear) -> Linear:
    """The layer with its kernel dequantised."""
    return linear._replace(kernel=dequantized(linear.kernel))


def stacked(linear: Linear, target: Target) -> tuple[Linear, tuple[int, ...]]:
    """The target's layers with all batch axes as one, and the shape of the batch axes."""
    batch = linear.kernel.shape[:-2]
    if target.layers is not None:
        linear = jax.tree.map(lambda leaf: leaf[jnp.array(target.layers)], linear)
    ndim = len(batch)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[ndim:]), linear), batch


def unstacked(result: Linear, linear: Linear, target: Target) -> Linear:
    """The inverse of `stacked`: layers that are not the target's keep their weights, and a new bias there is zero."""
    linear = dense(linear)
    if target.layers is None:
        batch = linear.kernel.shape[:-2]
        return jax.tree.map(lambda leaf: leaf.reshape(*batch, *leaf.shape[1:]), result)
    where, batch = jnp.array(target.layers), (len(target.layers), *linear.kernel.shape[1:-2])
    result = jax.tree.map(lambda leaf: leaf.reshape(*batch, *leaf.shape[1:]), result)
    bias = linear.bias
    if result.bias is not None:
        base = (
            jnp.zeros((*linear.kernel.shape[:-2], linear.kernel.shape[-1]), result.bias.dtype) if bias is None else bias
        )
        bias = base.at[where].set(result.bias)
    return Linear(linear.kernel.at[where].set(result.kernel), bias)


def size(tree: Any) -> int:
    leaves = jax.tree.leaves(tree, is_leaf=is_quantized)
    return sum(int(np.prod(leaf.shape)) for leaf in leaves if hasattr(leaf, "shape"))


def factors_like(leaves: Mapping[str, Any], target: Target) -> Any:
    """The factors of a target as `jax.ShapeDtypeStruct`s, in the dtypes that `init` would give them."""
    needed = {path: leaves[path] for path in (target.path, target.bias) if path is not None}
    linear = jax.eval_shape(lambda leaves: dense(canonical(leaves, target)), needed)
    axes = linear.kernel.ndim - 2
    batch = linear.kernel.shape[:axes]
    if target.layers is not None:
        batch = (len(target.layers), *batch[1:])
    one = jax.tree.map(lambda leaf: leaf.update(shape=leaf.shape[axes:]), linear)
    return jax.tree.map(lambda leaf: leaf.update(shape=(*batch, *leaf.shape)), _like_one(target.adapter, one))


def factor_shapes(leaves: Mapping[str, Any], target: Target) -> dict[Any, tuple[int, ...]]:
    """The shape of each factor of a target, by its tree keys."""
    return {keys: leaf.shape for keys, leaf in jax.tree_util.tree_flatten_with_path(factors_like(leaves, target))[0]}


@functools.cache
def _like_one(adapter: Adapter, linear: Linear) -> Any:
    return jax.eval_shape(adapter.init, jax.random.key(0), linear)


@functools.cache
def factor_roles(adapter: Adapter, n_in: int, n_out: int, with_bias: bool) -> Any:
    """The factors of one matrix, and in place of each the role of its axes: `("i", None)` where the first is as long as
    the kernel's in axis, or a part of it, and the second does not depend on the kernel.

    Example:
        >>> import hadamax as hx
        >>> factor_roles(hx.lora(2), 8, 6, False)
        {'a': ('i', None), 'b': (None, 'o')}
    """

    def like(n_in: int, n_out: int) -> Any:
        bias: Any = jax.ShapeDtypeStruct((n_out,), jnp.float32) if with_bias else None
        kernel: Any = jax.ShapeDtypeStruct((n_in, n_out), jnp.float32)
        return _like_one(adapter, Linear(kernel, bias))

    def roles(leaf: Any, taller: Any, wider: Any) -> tuple[str | None, ...]:
        grows = zip(leaf.shape, taller.shape, wider.shape, strict=True)
        return tuple("i" if n < tall else "o" if n < wide else None for n, tall, wide in grows)

    return jax.tree.map(roles, like(n_in, n_out), like(2 * n_in, n_out), like(n_in, 2 * n_out))


def factor_shardings(leaves: Mapping[str, Any], target: Target, placed: NamedSharding) -> Any:
    """The factors of a target, and in place of each where it lies: its axes as those of the kernel that it shares."""
    mesh, spec = placed.mesh, [*placed.spec, *[None] * len(target.axes)][: len(target.axes)]
    factors, shape = factors_like(leaves, target), leaves[target.path].shape
    n_in, n_out = (math.prod(views.sizes(shape, target.axes, views.of_role(target.axes, role))) for role in "io")
    lead = len(views.of_role(target.axes, "b"))
    batch = [spec[target.axes.index(label)] for label in views.of_role(target.axes, "b")]
    ends: dict[str | None, Any] = {None: None} | {role: views.role_spec(target.axes, spec, role) for role in "io"}

    def sharding(leaf: Any, roles: tuple[str | None, ...]) -> NamedSharding:
        wanted = [*(batch if target.layers is None else [None] * lead), *(ends[role] for role in roles)]
        return NamedSharding(mesh, fitting(mesh, wanted, leaf.shape))

    return jax.tree.map(sharding, factors, factor_roles(target.adapter, n_in, n_out, target.bias is not None))
