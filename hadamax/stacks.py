"""A target's kernel as a stack of matrices `[n, in, out]`, on which methods are mapped, and back to its own layout."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hadamax import views
from hadamax.adapter import Adapter, Linear
from hadamax.targets import Target


def canonical(leaves: Mapping[str, Any], target: Target) -> Linear:
    """The layer as `[batch..., in, out]` and `[batch..., out]`."""
    kernel = views.canonical(jnp.asarray(leaves[target.path]), target.axes)
    bias = None if target.bias is None else views.canonical(jnp.asarray(leaves[target.bias]), target.bias_axes)
    return Linear(kernel, bias)


def stacked(linear: Linear, target: Target) -> tuple[Linear, tuple[int, ...]]:
    """The target's layers with all batch axes as one, and the shape of the batch axes."""
    batch = linear.kernel.shape[:-2]
    if target.layers is not None:
        linear = jax.tree.map(lambda leaf: leaf[jnp.array(target.layers)], linear)
    flat = Linear(
        linear.kernel.reshape(-1, *linear.kernel.shape[-2:]),
        None if linear.bias is None else linear.bias.reshape(-1, linear.bias.shape[-1]),
    )
    return flat, batch


def unstacked(result: Linear, linear: Linear, target: Target) -> Linear:
    """The inverse of `stacked`: layers that are not the target's keep their weights, and a new bias there is zero."""
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
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree) if hasattr(leaf, "shape"))


def factors_like(leaves: Mapping[str, Any], target: Target) -> Any:
    """The factors of a target as `jax.ShapeDtypeStruct`s, in the dtypes that `init` would give them."""
    needed = {path: leaves[path] for path in (target.path, target.bias) if path is not None}
    linear = jax.eval_shape(lambda leaves: canonical(leaves, target), needed)
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
