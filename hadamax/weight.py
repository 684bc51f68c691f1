"""A weight that is W0 and factors, and the array operations that it can take without being merged.

Operations return None where they do not apply: the caller merges the weight and goes on. Nothing here knows how the
operations were found; `hadamax.lazy` finds them.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hadamax import views
from hadamax.adapter import Adapter, Factors, Linear
from hadamax.errors import MergeError
from hadamax.methods.merging import widened
from hadamax.quantized import QuantizedWeight, dequantized, is_qarray
from hadamax.shards import Placement, by_shard, gathered, platform
from hadamax.views import Axes


@jax.tree_util.register_pytree_node_class
class LazyWeight:
    """An adapted kernel that is not merged yet.

    Attributes:
        kernel: W0 in its own layout; quantised, a `qwix.QArray`.
        bias: the layer's bias `[batch..., out]`, or None.
        factors: leaves `[batch..., ...]`.
        active: `[batch...]` booleans, which of the batch (layers) are adapted; None for all.
        axes: the label of each kernel axis (`hadamax.views`).
        placement: where the kernel lies on a mesh; None for one device.
        dtype: what the weight counts as; casts are done with the merge, in one rounding.
    """

    def __init__(
        self,
        kernel,
        bias,
        factors: Factors,
        active,
        *,
        adapter: Adapter,
        axes: Axes,
        path: str,
        placement: Placement | None = None,
        dtype=None,
    ):
        self.kernel, self.bias, self.factors, self.active = kernel, bias, factors, active
        self.adapter, self.axes, self.path, self.placement = adapter, axes, path, placement
        self.dtype = kernel.dtype if dtype is None else jnp.dtype(dtype)

    def tree_flatten(self):
        static = (self.adapter, self.axes, self.path, self.placement, self.dtype)
        return (self.kernel, self.bias, self.factors, self.active), static

    @classmethod
    def tree_unflatten(cls, static, children):
        new = object.__new__(cls)  # children may be placeholders without a dtype
        new.kernel, new.bias, new.factors, new.active = children
        new.adapter, new.axes, new.path, new.placement, new.dtype = static
        return new

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kernel.shape

    @property
    def ndim(self) -> int:
        return self.kernel.ndim

    @property
    def size(self) -> int:
        return math.prod(self.kernel.shape)

    def __repr__(self) -> str:
        return f"LazyWeight({self.path}: {self.dtype}{list(self.shape)}, {self.adapter.config.get('method')})"

    def replace(self, **fields) -> "LazyWeight":
        """A copy with some attributes changed."""
        names = ("kernel", "bias", "factors", "active", "adapter", "axes", "path", "placement", "dtype")
        return LazyWeight(**{**{name: getattr(self, name) for name in names}, **fields})

    def map_batch(self, function: Callable[[jax.Array], jax.Array]) -> dict[str, Any]:
        """The fields that lead with the canonical batch axes, each through `function`."""
        return {name: jax.tree.map(function, getattr(self, name)) for name in ("bias", "factors", "active")}

    def materialise(self) -> jax.Array:
        """The merged kernel in the weight's own layout.

        Raises:
            MergeError: the adapter shifts the output, which a kernel alone cannot hold.
        """

        merged = self.merged()
        if merged.bias is not None:
            raise MergeError(
                f"{self.path}: {self.adapter.config.get('method')} shifts the layer's output, but the model uses"
                " the weight other than in `x @ kernel`; adapt another layer, or train without the shift"
            )
        return merged.kernel.astype(self.dtype)

    def merged(self) -> Linear:
        """The merged layer, its kernel in the weight's own layout, not yet rounded to `dtype`: in at least float32. The
        bias is `[batch..., out]`, or None where the adapter leaves it as it is."""

        def merge(kernel, bias, factors, active):
            base = widened(Linear(dequantized(kernel), bias))
            merged = self.adapter.merge(factors, base)
            if merged.bias is base.bias or merged.bias is None:
                merged, base = merged._replace(bias=None), base._replace(bias=None)
            elif base.bias is None:
                base = base._replace(bias=jnp.zeros_like(merged.bias))
            return merged if active is None else jax.tree.map(lambda m, b: jnp.where(active, m, b), merged, base)

        for _ in views.of_role(self.axes, "b"):
            merge = jax.vmap(merge)
        merged = merge(canonical(self.kernel, self.axes), self.bias, self.factors, self.active)
        return merged._replace(kernel=views.restore(merged.kernel, self.axes, self.shape))


# The adapter of a kernel that is not adapted, but lazy because it is quantised.
PLAIN = Adapter(
    init=lambda key, linear: (),
    merge=lambda factors, linear: linear,
    dot=lambda factors, linear, x: x @ linear.kernel.astype(x.dtype),
    config={"method": "none"},
)


def unadapted(weight: QuantizedWeight) -> LazyWeight:
    """A quantised kernel as a lazy weight, so that it is dequantised inside the layer that uses it."""
    return LazyWeight(weight.array, None, (), None, adapter=PLAIN, axes=weight.axes, path="")


def canonical(kernel: Any, axes: Axes) -> Any:
    """`views.canonical` of an array, or of each part of a quantised one."""
    return jax.tree.map(lambda part: views.canonical(part, axes), kernel)


def matmul(
    x: jax.Array, w: LazyWeight, contract: tuple[Sequence[int], ...], batch: tuple[Sequence[int], ...], precision=None
) -> jax.Array | None:
    """`lax.dot_general(x, w, (contract, batch))` by the adapter's `dot`, in the operands' dtype.

    Applies where all in axes are contracted, and none but batch axes are batched. Where all out axes are contracted
    (a tied output layer), the merged kernel's transpose is used, under a checkpoint.
    """
    contracted, batched = [w.axes[at] for at in contract[1]], [w.axes[at] for at in batch[1]]
    role = next((role for role in "io" if sorted(contracted) == sorted(views.of_role(w.axes, role))), None)
    if role is None or any(label[0] != "b" for label in batched):
        return None
    if not (precision is None or isinstance(precision, lax.Precision)):
        return None
    dtype = jnp.promote_types(x.dtype, w.dtype)

    # x [batched..., rows..., contracted], kernel [batched..., loose..., in, out]. With one row axis the gradients
    # contract over one axis, which XLA's CPU backend does twice as fast as over two; on TPUs it would take memory.
    order = views.of_role(w.axes, role)
    own = views.of_role(w.axes, "b")
    loose = [label for label in own if label not in batched]
    ends = [contract[0][contracted.index(label)] for label in order]
    free = [at for at in range(x.ndim) if at not in (*batch[0], *ends)]
    rows = [x.shape[at] for at in free]
    x = jnp.transpose(x, [*batch[0], *free, *ends]).astype(dtype)
    flat = [math.prod(rows)] if len(rows) < 2 or platform(w.placement) == "cpu" else rows
    x = x.reshape(*x.shape[: len(batched)], *flat, math.prod(views.sizes(w.shape, w.axes, order)))
    permutation = [own.index(label) for label in (*batched, *loose)]

    def reorder(leaf: jax.Array) -> jax.Array:
        return jnp.transpose(leaf, [*permutation, *range(len(own), leaf.ndim)])

    one = w.map_batch(reorder)
    one["kernel"] = jax.tree.map(reorder, canonical(w.kernel, w.axes))

    def dot(one: dict[str, Any], x: jax.Array) -> jax.Array:
        if role == "o":
            return _transposed_dot(w, one, x)
        if one["active"] is not None:
            return _where_active(w.adapter, one, x)
        if is_qarray(one["kernel"]):
            return _dequantized_dot(w, one, x)
        return _dot(w.adapter, one, x)

    if w.placement is not None and w.placement.splits(rows) and (role == "o" or w.adapter.merges):
        dot = by_shard(dot, w.placement, role)

    for _ in loose:
        dot = jax.vmap(dot, in_axes=(0, None))
    for _ in batched:
        dot = jax.vmap(dot)
    with jax.default_matmul_precision(precision.name.lower()) if precision else contextlib.nullcontext():
        y = dot(one, x)

    # y [batched..., loose..., rows, produced] -> batched, free, then w's free axes in their own order
    produced = views.of_role(w.axes, "o" if role == "i" else "i")
    y = y.reshape(*y.shape[: y.ndim - 1 - len(flat)], *rows, *views.sizes(w.shape, w.axes, produced))
    xs = [f"x{at}" for at in range(len(rows))]
    labels = [*batched, *loose, *xs, *produced]
    kept = [label for label in w.axes if label not in (*batched, *contracted)]
    return jnp.transpose(y, [labels.index(label) for label in (*batched, *xs, *kept)])


def _dot(adapter: Adapter, one: dict[str, Any], x: jax.Array) -> jax.Array:
    return adapter.dot(one["factors"], Linear(dequantized(one["kernel"]), one["bias"]), x)


def _dequantized_dot(w: LazyWeight, one: dict[str, Any], x: jax.Array) -> jax.Array:
    @jax.checkpoint  # nothing dequantised is kept, and on a mesh it is codes and scales that are gathered
    def dot(one, x):
        return _dot(w.adapter, {**one, "kernel": gathered(one["kernel"], w.placement)}, x)

    return dot(one, x)


def _where_active(adapter: Adapter, one: dict[str, Any], x: jax.Array) -> jax.Array:
    """The adapter's `dot` in active layers, the base matmul in the others."""

    @jax.checkpoint  # a branch's residuals would be arrays of their own: a copy of W0 for each layer
    def dot(one, x):
        return lax.cond(
            one["active"],
            lambda: _dot(adapter, one, x),
            lambda: x @ dequantized(one["kernel"]).astype(x.dtype),
        )

    return dot(one, x)


def _transposed_dot(w: LazyWeight, one: dict[str, Any], x: jax.Array) -> jax.Array:
    @jax.checkpoint
    def dot(one, x):
        return x @ w.replace(**one, axes=("i0", "o0"), dtype=x.dtype).materialise().T

    return dot(one, x)


def cast(w: LazyWeight, dtype) -> LazyWeight | None:
    """`astype` to another floating dtype, unless a cast before it has rounded already, or 8 bits would be meant."""
    plain = jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize > 1
    return w.replace(dtype=dtype) if plain and w.dtype == w.kernel.dtype else None


def transpose(w: LazyWeight, order: Sequence[int]) -> LazyWeight:
    """`jnp.transpose`."""
    kernel = jax.tree.map(lambda part: jnp.transpose(part, order), w.kernel)
    return w.replace(kernel=kernel, axes=tuple(w.axes[at] for at in order))


def reshape(w: LazyWeight, shape: Sequence[int]) -> LazyWeight | None:
    """`reshape` that splits or joins axes within a role, of a kernel whose roles lie one after the other."""
    if is_qarray(w.kernel):
        return None  # blocks would have to be split or joined too
    batch = len(views.of_role(w.axes, "b"))
    first = w.axes[batch][0] if batch < w.ndim else "b"
    second = {"i": "o", "o": "i"}.get(first, "b")
    plain = [*w.axes[:batch], *views.of_role(w.axes, first), *views.of_role(w.axes, second)]
    if first == "b" or list(w.axes) != plain or tuple(shape[:batch]) != w.shape[:batch]:
        return None
    size = math.prod(views.sizes(w.shape, w.axes, views.of_role(w.axes, first)))
    cut = next((at for at in range(batch + 1, len(shape)) if math.prod(shape[batch:at]) == size), None)
    if cut is None:
        return None
    new = [*(f"{first}{at}" for at in range(cut - batch)), *(f"{second}{at}" for at in range(len(shape) - cut))]
    return w.replace(kernel=w.kernel.reshape(shape), axes=(*w.axes[:batch], *new))


def cut(w: LazyWeight, dims: Sequence[int], function: Callable[[jax.Array, int, int], jax.Array]) -> LazyWeight | None:
    """Slices of batch axes: `function(array, axis, dim)` cuts the kernel's `dim`, which is `axis` of the array."""
    if any(w.axes[dim][0] != "b" for dim in dims):
        return None
    own = views.of_role(w.axes, "b")
    for dim in dims:
        axis = own.index(w.axes[dim])
        fields = w.map_batch(lambda leaf, axis=axis, dim=dim: function(leaf, axis, dim))
        kernel = jax.tree.map(lambda part, dim=dim: function(part, dim, dim), w.kernel)
        w = w.replace(kernel=kernel, **fields)
    return w


def squeeze(w: LazyWeight, dims: Sequence[int]) -> LazyWeight | None:
    """`jnp.squeeze` of batch axes."""
    if any(w.axes[dim][0] != "b" for dim in dims):
        return None
    gone = [views.of_role(w.axes, "b").index(w.axes[dim]) for dim in dims]
    fields = w.map_batch(lambda leaf: jnp.squeeze(leaf, gone))
    axes = tuple(label for at, label in enumerate(w.axes) if at not in dims)
    kernel = jax.tree.map(lambda part: jnp.squeeze(part, dims), w.kernel)
    return w.replace(kernel=kernel, axes=axes, **fields)


def batch_first(w: LazyWeight) -> LazyWeight | None:
    """The weight with the batch axis that its kernel leads with first in its factors too, ready to be scanned over."""
    if not w.axes or w.axes[0][0] != "b":
        return None
    at = views.of_role(w.axes, "b").index(w.axes[0])
    return w.replace(**w.map_batch(lambda leaf: jnp.moveaxis(leaf, at, 0)))


def rows(w: LazyWeight, select: Callable[[jax.Array], jax.Array]) -> jax.Array | None:
    """`select(merged table)` for a selection of rows, merging only them."""
    if w.axes != ("i0", "o0") or w.adapter.rows is None or w.active is not None or is_qarray(w.kernel):
        return None
    return w.replace(kernel=select(w.kernel), factors=w.adapter.rows(w.factors, select)).materialise()
