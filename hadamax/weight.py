"""A weight that is W0 and factors, and the array operations that it can take without being merged.

Operations return None where they do not apply: the caller merges the weight and goes on. Nothing here knows how the
operations were found; `hadamax.lazy` finds them.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hadamax import views
from hadamax.adapter import Adapter, Factors, Linear
from hadamax.errors import MergeError
from hadamax.methods.merging import widened
from hadamax.sharding import batch_axes
from hadamax.views import Axes


class Placement(NamedTuple):
    """Where a kernel lies.

    Attributes:
        mesh: the devices.
        i: the mesh axes over which its flattened in axis is split, as in a `PartitionSpec`.
        o: those of its flattened out axis.
    """

    mesh: Mesh
    i: Any
    o: Any

    @property
    def shards(self) -> int:
        """Into how many parts the rows of a batch are split."""
        return math.prod(self.mesh.shape[axis] for axis in batch_axes(self.mesh))


@jax.tree_util.register_pytree_node_class
class LazyWeight:
    """An adapted kernel that is not merged yet.

    Attributes:
        kernel: W0 in its own layout.
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
            base = widened(Linear(kernel, bias))
            merged = self.adapter.merge(factors, base)
            if merged.bias is base.bias or merged.bias is None:
                merged, base = merged._replace(bias=None), base._replace(bias=None)
            elif base.bias is None:
                base = base._replace(bias=jnp.zeros_like(merged.bias))
            return merged if active is None else jax.tree.map(lambda m, b: jnp.where(active, m, b), merged, base)

        for _ in views.of_role(self.axes, "b"):
            merge = jax.vmap(merge)
        merged = merge(views.canonical(self.kernel, self.axes), self.bias, self.factors, self.active)
        return merged._replace(kernel=views.restore(merged.kernel, self.axes, self.shape))


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

    # x [batched..., rows, contracted], kernel [batched..., loose..., in, out]; with one row axis the gradients contract
    # over one axis, which XLA's CPU backend does twice as fast as over two
    order = views.of_role(w.axes, role)
    own = views.of_role(w.axes, "b")
    loose = [label for label in own if label not in batched]
    ends = [contract[0][contracted.index(label)] for label in order]
    free = [at for at in range(x.ndim) if at not in (*batch[0], *ends)]
    rows = [x.shape[at] for at in free]
    x = jnp.transpose(x, [*batch[0], *free, *ends]).astype(dtype)
    x = x.reshape(*x.shape[: len(batched)], math.prod(rows), math.prod(views.sizes(w.shape, w.axes, order)))
    permutation = [own.index(label) for label in (*batched, *loose)]

    def reorder(leaf: jax.Array) -> jax.Array:
        return jnp.transpose(leaf, [*permutation, *range(len(own), leaf.ndim)])

    one = w.map_batch(reorder)
    one["kernel"] = reorder(views.canonical(w.kernel, w.axes))

    def dot(one: dict[str, Any], x: jax.Array) -> jax.Array:
        if role == "o":
            return _transposed_dot(w, one, x)
        if one["active"] is None:
            return w.adapter.dot(one["factors"], Linear(one["kernel"], one["bias"]), x)
        return _where_active(w.adapter, one, x)

    if w.placement is not None and rows and rows[0] % (shards := w.placement.shards) == 0 and shards > 1:
        n_in, n_out = (math.prod(views.sizes(w.shape, w.axes, views.of_role(w.axes, r))) for r in "io")
        if role == "o" or (w.adapter.merges is not None and w.adapter.merges(n_in, n_out)):
            dot = _by_shard(dot, w.placement, role)

    for _ in loose:
        dot = jax.vmap(dot, in_axes=(0, None))
    for _ in batched:
        dot = jax.vmap(dot)
    with jax.default_matmul_precision(precision.name.lower()) if precision else contextlib.nullcontext():
        y = dot(one, x)

    # y [batched..., loose..., rows, produced] -> batched, free, then w's free axes in their own order
    produced = views.of_role(w.axes, "o" if role == "i" else "i")
    y = y.reshape(*y.shape[: y.ndim - 2], *rows, *views.sizes(w.shape, w.axes, produced))
    xs = [f"x{at}" for at in range(len(rows))]
    labels = [*batched, *loose, *xs, *produced]
    kept = [label for label in w.axes if label not in (*batched, *contracted)]
    return jnp.transpose(y, [labels.index(label) for label in (*batched, *xs, *kept)])


def _where_active(adapter: Adapter, one: dict[str, Any], x: jax.Array) -> jax.Array:
    """The adapter's `dot` in active layers, the base matmul in the others."""

    @jax.checkpoint  # a branch's residuals would be arrays of their own: a copy of W0 for each layer
    def dot(one, x):
        return lax.cond(
            one["active"],
            lambda: adapter.dot(one["factors"], Linear(one["kernel"], one["bias"]), x),
            lambda: x @ one["kernel"].astype(x.dtype),
        )

    return dot(one, x)


def _by_shard(dot: Callable[..., jax.Array], placement: Placement, role: str) -> Callable[..., jax.Array]:
    """A `dot` that merges, computed by each shard of the batch for itself.

    Left alone, the compiler sums the `[in, out]` gradient of the merged kernel over the shards and contracts it to
    the factors afterwards: as much communication as full fine-tuning has. Here each shard has a copy of the factors,
    so that the gradient of each copy is contracted where it arises, and only these are summed. The checkpoint covers
    the gather of the kernel, which the backward pass repeats.
    """
    mesh, split = placement.mesh, batch_axes(placement.mesh)
    i, o = (_without(axes, split) for axes in (placement.i, placement.o))
    taken, given = (i, o) if role == "i" else (o, i)

    def constrain(x: jax.Array, *axes: Any) -> jax.Array:
        return lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))

    def copied(factor: jax.Array, dtype: Any) -> jax.Array:
        copies: Any = _copies(factor, placement.shards, dtype)
        return constrain(copies, split, *[PartitionSpec.UNCONSTRAINED] * factor.ndim)

    @jax.checkpoint
    def by_shard(one: dict[str, Any], x: jax.Array) -> jax.Array:
        one = {**one, "kernel": constrain(one["kernel"], i, o)}
        factors = jax.tree.map(lambda factor: copied(factor, x.dtype), one["factors"])
        x = constrain(x.reshape(placement.shards, -1, x.shape[-1]), split, None, taken)
        y = jax.vmap(lambda factors, x: dot({**one, "factors": factors}, x))(factors, x)
        y = constrain(y, split, None, given)
        return y.reshape(-1, y.shape[-1])

    return by_shard


def _without(axes: Any, gone: Sequence[str]) -> Any:
    """One entry of a `PartitionSpec`, less some mesh axes."""
    kept = tuple(axis for axis in (axes if isinstance(axes, tuple) else (axes,)) if axis not in (None, *gone))
    return kept or None


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _copies(factor: jax.Array, count: int, dtype: Any) -> jax.Array:
    """`count` copies, whose gradients are summed in `dtype`: they cross the mesh as LoRA's do, in the activations'."""
    return jnp.broadcast_to(factor[None], (count, *factor.shape))


def _copies_forward(factor: jax.Array, count: int, dtype: Any) -> tuple[jax.Array, None]:
    return _copies(factor, count, dtype), None


def _copies_backward(count: int, dtype: Any, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    narrow = gradient.astype(dtype)
    summed = lax.reduce(narrow, jnp.zeros((), narrow.dtype), lax.add, (0,))
    return (summed.astype(gradient.dtype),)


_copies.defvjp(_copies_forward, _copies_backward)


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
    return w.replace(kernel=jnp.transpose(w.kernel, order), axes=tuple(w.axes[at] for at in order))


def reshape(w: LazyWeight, shape: Sequence[int]) -> LazyWeight | None:
    """`reshape` that splits or joins axes within a role, of a kernel whose roles lie one after the other."""
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
        w = w.replace(kernel=function(w.kernel, dim, dim), **fields)
    return w


def squeeze(w: LazyWeight, dims: Sequence[int]) -> LazyWeight | None:
    """`jnp.squeeze` of batch axes."""
    if any(w.axes[dim][0] != "b" for dim in dims):
        return None
    gone = [views.of_role(w.axes, "b").index(w.axes[dim]) for dim in dims]
    fields = w.map_batch(lambda leaf: jnp.squeeze(leaf, gone))
    axes = tuple(label for at, label in enumerate(w.axes) if at not in dims)
    return w.replace(kernel=jnp.squeeze(w.kernel, dims), axes=axes, **fields)


def batch_first(w: LazyWeight) -> LazyWeight | None:
    """The weight with the batch axis that its kernel leads with first in its factors too, ready to be scanned over."""
    if not w.axes or w.axes[0][0] != "b":
        return None
    at = views.of_role(w.axes, "b").index(w.axes[0])
    return w.replace(**w.map_batch(lambda leaf: jnp.moveaxis(leaf, at, 0)))


def rows(w: LazyWeight, select: Callable[[jax.Array], jax.Array]) -> jax.Array | None:
    """`select(merged table)` for a selection of rows, merging only them."""
    if w.axes != ("i0", "o0") or w.adapter.rows is None or w.active is not None:
        return None
    return w.replace(kernel=select(w.kernel), factors=w.adapter.rows(w.factors, select)).materialise()
