"""Lazy weights: W0 and its factors in place of a kernel, in a model whose code is not changed.

`lazily(fn)` traces `fn` once with the kernels' own shapes and evaluates the equations with lazy weights as values. An
equation that touches none is evaluated by JAX as it stands. A matmul with a lazy weight calls the adapter's `dot`;
control flow and checkpointed functions are entered; casts, transposes, reshapes and slices stay lazy; a lookup merges
the rows it takes. Any other use merges the weight on the spot: right, only slower.

This is the one file that reads JAX's equations (`jax.extend.core`); `tests/test_lazy.py` fails where their form moves.
`Injection.merge` does not need it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from jax.extend.core import primitives as p

from hadamax import weight
from hadamax.quantized import dequantized, is_qarray, is_quantized
from hadamax.weight import LazyWeight


def is_lazy(x: Any) -> bool:
    return isinstance(x, LazyWeight)


def _array(x: Any) -> Any:
    return x.materialise() if is_lazy(x) else x


def lazily(fn: Callable) -> Callable:
    """Let `fn` take lazy weights, and quantised ones, where it takes arrays.

    Arguments that are no arrays are passed on as they are.

    Args:
        fn: any JAX function. It is traced at each call: put `jax.jit` around the result.

    Example:
        >>> import jax.numpy as jnp
        >>> lazily(lambda w, x: x @ w)(jnp.ones((2, 2)), jnp.ones(2))
        Array([2., 2.], dtype=float32)
    """

    @functools.wraps(fn)
    def wrapped(*args, **kwargs):
        flat, tree = jax.tree.flatten((args, kwargs), is_leaf=lambda x: is_lazy(x) or is_quantized(x))
        flat = [weight.unadapted(leaf) if is_quantized(leaf) else leaf for leaf in flat]
        if not any(map(is_lazy, flat)):
            return fn(*args, **kwargs)
        traced = [at for at, leaf in enumerate(flat) if is_lazy(leaf) or isinstance(leaf, jax.Array | np.ndarray)]

        def on_arrays(*arrays):
            leaves = list(flat)
            for at, array in zip(traced, arrays, strict=True):
                leaves[at] = array
            args, kwargs = jax.tree.unflatten(tree, leaves)
            return fn(*args, **kwargs)

        values = [flat[at] for at in traced]
        examples = [_example(value) for value in values]
        closed, shapes = jax.make_jaxpr(on_arrays, return_shape=True)(*examples)
        return jax.tree.unflatten(jax.tree.structure(shapes), _arrays(closed.jaxpr, closed.consts, values))

    return wrapped


def _example(value: Any) -> Any:
    if not is_lazy(value):
        return value
    return jax.eval_shape(dequantized, value.kernel) if is_qarray(value.kernel) else value.kernel


def evaluate(jaxpr: core.Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """The outputs of a jaxpr for arguments some of which are lazy weights; an output may be one too."""
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(atom):
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        outs = None
        if any(map(is_lazy, values)) and (rule := _RULES.get(eqn.primitive)):
            with jax.named_scope(str(eqn.source_info.name_stack)):
                outs = rule(eqn.params, *values)
        if outs is None:
            outs = _bind(eqn, [_array(value) for value in values])
        env.update(zip(eqn.outvars, outs if eqn.primitive.multiple_results else [outs], strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _arrays(jaxpr: core.Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """`evaluate` with its outputs merged."""
    return [_array(value) for value in evaluate(jaxpr, consts, args)]


def _bind(eqn: core.JaxprEqn, values: list[Any]) -> Any:
    """One equation on arrays, with its custom derivatives and its name in profiles."""
    with jax.named_scope(str(eqn.source_info.name_stack)), eqn.ctx.manager:
        return eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))


# Rules: (params, *values) -> what the primitive returns, or None to merge the weight and go on.


def _jit(params, *values):
    closed = params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"]
    return evaluate(closed.jaxpr, closed.consts, values)


def _remat(params, *values):
    def body(values):
        return _arrays(params["jaxpr"], (), values)

    return jax.checkpoint(body, prevent_cse=params["prevent_cse"], policy=params["policy"])(values)


def _cond(params, index, *values):
    branches = [functools.partial(lambda b, *v: _arrays(b.jaxpr, b.consts, v), b) for b in params["branches"]]
    return lax.switch(index, branches, *values)


def _while(params, *values):
    if params["cond_jaxpr"].out_avals[0].shape:
        return None  # a batched predicate, which only JAX's own batching may make
    cond, body, split = params["cond_jaxpr"], params["body_jaxpr"], params["cond_nconsts"] + params["body_nconsts"]
    cond_consts, body_consts = values[: params["cond_nconsts"]], values[params["cond_nconsts"] : split]
    return lax.while_loop(
        lambda carry: _arrays(cond.jaxpr, cond.consts, [*cond_consts, *carry])[0],
        lambda carry: _arrays(body.jaxpr, body.consts, [*body_consts, *carry]),
        [_array(value) for value in values[split:]],
    )


def _scan(params, *values):
    if "ft_in" in params:  # JAX 0.11: the grouping is a tree
        consts, carry, xs = (list(group.vals) for group in params["ft_in"].update(values).unpack())
    else:
        to, end = params["num_consts"], params["num_consts"] + params["num_carry"]
        consts, carry, xs = values[:to], values[to:end], values[end:]
    body = params["jaxpr"]
    ready = [weight.batch_first(x) if is_lazy(x) else x for x in xs]
    xs = [_array(x) if new is None else new for x, new in zip(xs, ready, strict=True)]

    def step(carry, xs):
        xs = [x.replace(axes=x.axes[1:]) if is_lazy(x) else x for x in xs]
        outs = _arrays(body.jaxpr, body.consts, [*consts, *carry, *xs])
        return outs[: len(carry)], outs[len(carry) :]

    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    carry, ys = lax.scan(step, [_array(c) for c in carry], xs, **options)
    return [*carry, *ys]


def _dot_general(params, lhs, rhs):
    contract, batch = params["dimension_numbers"]
    dtype, preferred = jnp.promote_types(lhs.dtype, rhs.dtype), params["preferred_element_type"]
    if params["out_sharding"] is not None or (preferred is not None and preferred != dtype):
        return None  # more than an adapter's dot promises
    precision = params["precision"][0] if isinstance(params["precision"], tuple) else params["precision"]
    if is_lazy(rhs):
        return weight.matmul(_array(lhs), rhs, contract, batch, precision)
    y = weight.matmul(rhs, lhs, contract[::-1], batch[::-1], precision)
    if y is None:
        return None
    start, own = len(batch[0]), lhs.ndim - len(contract[0]) - len(batch[0])  # lax orders the free axes lhs first
    return jnp.moveaxis(y, range(y.ndim - own, y.ndim), range(start, start + own))


def _slice(params, w):
    starts, limits = params["start_indices"], params["limit_indices"]
    dims = [at for at in range(w.ndim) if (starts[at], limits[at]) != (0, w.shape[at])]
    if params["strides"] is not None:
        return None
    return weight.cut(w, dims, lambda leaf, axis, dim: lax.slice_in_dim(leaf, starts[dim], limits[dim], axis=axis))


def _dynamic_slice(params, w, *starts):
    sizes = params["slice_sizes"]
    dims = [at for at in range(w.ndim) if sizes[at] != w.shape[at]]
    return weight.cut(
        w, dims, lambda leaf, axis, dim: lax.dynamic_slice_in_dim(leaf, starts[dim], sizes[dim], axis=axis)
    )


def _gather(params, w, indices):
    """Rows of an embedding."""
    numbers, plain = params["dimension_numbers"], not is_lazy(indices) and w.ndim == 2
    plain = plain and tuple(params["slice_sizes"]) == (1, w.shape[1]) and not numbers.operand_batching_dims
    if not plain or (numbers.collapsed_slice_dims, numbers.start_index_map) != ((0,), (0,)):
        return None
    if numbers.offset_dims != (indices.ndim - 1,):
        return None
    ids = indices[..., 0]
    flat = ids.reshape(-1)
    taken = weight.rows(w, lambda table: jnp.take(table, jnp.clip(flat, 0, table.shape[0] - 1), axis=0))
    if taken is None:
        return None
    if params["mode"].name == "FILL_OR_DROP":  # the equation's indices are normalised: negative is out of bounds
        fill = jnp.nan if params["fill_value"] is None else params["fill_value"]
        taken = jnp.where(((flat >= 0) & (flat < w.shape[0]))[:, None], taken, fill)
    return taken.reshape(*ids.shape, -1)


def _constraint(params, w):
    """A constraint is on W0, too: where it is gathered, it is gathered once."""
    return w if is_qarray(w.kernel) else w.replace(kernel=p.sharding_constraint_p.bind(w.kernel, **params))


_RULES: dict[core.Primitive, Callable] = {
    p.jit_p: _jit,
    p.closed_call_p: _jit,
    p.remat_p: _remat,
    p.cond_p: _cond,
    p.while_p: _while,
    p.scan_p: _scan,
    p.dot_general_p: _dot_general,
    p.convert_element_type_p: lambda params, w: weight.cast(w, params["new_dtype"]),
    p.transpose_p: lambda params, w: weight.transpose(w, params["permutation"]),
    p.reshape_p: lambda params, w: None if params["dimensions"] else weight.reshape(w, params["new_sizes"]),
    p.slice_p: _slice,
    p.dynamic_slice_p: _dynamic_slice,
    p.squeeze_p: lambda params, w: weight.squeeze(w, params["dimensions"]),
    p.gather_p: _gather,
    p.sharding_constraint_p: _constraint,
}
