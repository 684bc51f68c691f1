"""Parameters as they are to be written: one matrix at a time, lazy weights merged on the way."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hadamax import weight
from hadamax.adapter import Linear
from hadamax.errors import HadamaxError, MergeError
from hadamax.hf.load import flat
from hadamax.quantized import is_quantized
from hadamax.weight import LazyWeight

PART = 2**24  # bytes that are written at a time


class Parameter(NamedTuple):
    """A parameter whose matrices are computed when their turn comes.

    Attributes:
        shape: with the layer axis where it is a stack.
        dtype: that it has, or that its merged matrices are to be rounded to.
        matrix: `(layer, transposed, dtype) -> array`: one layer of the first axis, or the whole where `layer` is None,
            computed in at least float32 where anything is to be merged, and rounded once to `dtype`.
        parts: the same in pieces of its rows, where it need not be computed as a whole.
    """

    shape: tuple[int, ...]
    dtype: Any
    matrix: Callable[[int | None, bool, Any], jax.Array]
    parts: Callable[[int | None, bool, Any], Iterator[jax.Array]]


def parameters(params: Mapping[str, Any]) -> dict[str, Parameter]:
    """The parameters by path; lazy weights merged, with the biases that merging changes or adds.

    Args:
        params: `{"params": ...}` or what it holds, of arrays and of the weights that `Injection.bind` makes.

    Raises:
        MergeError: factors that are not finite, a method that does not fold, an added bias without a place.

    Example:
        >>> import hadamax as hx
        >>> params = {"dense": {"kernel": jnp.ones((3, 2))}}
        >>> injection = hx.inject({"dense": hx.hadamard_adapter()})
        >>> bound = injection.bind(params, injection.init(jax.random.key(0), params))
        >>> {path: parameter.shape for path, parameter in parameters(bound).items()}
        {'dense/kernel': (3, 2), 'dense/bias': (2,)}
        >>> parameters(bound)["dense/kernel"].matrix(None, True, jnp.float16).shape
        (2, 3)
    """
    found: dict[str, Parameter] = {}
    biases: dict[str, Parameter] = {}
    leaves = {
        path: weight.unadapted(leaf) if is_quantized(leaf) else leaf
        for path, leaf in flat(params.get("params", params)).items()
    }
    for path, leaf in leaves.items():
        if not isinstance(leaf, LazyWeight):
            found[path] = of_array(leaf)
            continue
        if not all(bool(jnp.isfinite(factor).all()) for factor in jax.tree.leaves(leaf.factors)):
            raise MergeError(f"{path}: the factors hold NaN or infinity; nothing was merged")
        lazy = leaf.replace(path="")  # one program for all weights of a kind
        try:
            bias = jax.eval_shape(functools.partial(_merge, layer=None), lazy).bias
        except HadamaxError as error:
            raise type(error)(f"{path}: {error}") from None
        found[path] = _whole(leaf.shape, leaf.dtype, functools.partial(_merged, lazy, "kernel"))
        if bias is not None:
            if not path.endswith("kernel"):
                raise MergeError(f"{path}: merging needs a bias, and a parameter of that name has no place for one")
            where = path.removesuffix("kernel") + "bias"
            matrix = functools.partial(_merged, lazy, "bias")
            biases[where] = _whole(bias.shape, leaves.get(where, leaf).dtype, matrix)
    return found | biases


def _whole(shape: tuple[int, ...], dtype: Any, matrix: Callable[..., jax.Array]) -> Parameter:
    def parts(*args: Any) -> Iterator[jax.Array]:
        yield matrix(*args)

    return Parameter(shape, dtype, matrix, parts)


def of_array(array: Any) -> Parameter:
    """A parameter that is there already."""

    def matrix(layer: int | None, transposed: bool, dtype: Any) -> jax.Array:
        if isinstance(array, np.ndarray) and layer is not None:  # else the whole stack would go to the device
            return _part(array[layer], None, transposed=transposed, dtype=dtype)
        if layer is None and not transposed and array.dtype == dtype:
            return jnp.asarray(array)
        return _part(array, layer, transposed=transposed, dtype=dtype)

    def parts(layer: int | None, transposed: bool, dtype: Any) -> Iterator[jax.Array]:
        shape = array.shape if layer is None else array.shape[1:]
        size = math.prod(shape) * np.dtype(dtype).itemsize
        axis = len(shape) - 1 if transposed else 0  # of the array, for the rows of what is written
        count = math.ceil(shape[axis] / math.ceil(size / PART)) if size > PART and len(shape) > 1 else 0
        if not count:
            yield matrix(layer, transposed, dtype)
            return
        for row in range(0, shape[axis], count):
            rows = min(count, shape[axis] - row)
            source, at = (array[layer], None) if isinstance(array, np.ndarray) and layer is not None else (array, layer)
            yield _part(source, at, row, rows=rows, transposed=transposed, dtype=dtype)

    return Parameter(tuple(array.shape), array.dtype, matrix, parts)


@functools.partial(jax.jit, static_argnames=("rows", "transposed", "dtype"))
def _part(
    array: jax.Array, layer: int | None, row: int = 0, *, rows: int | None = None, transposed: bool, dtype: Any
) -> jax.Array:
    """A layer, or some rows of it, as they are written: columns of the array where it is transposed."""
    if layer is not None:
        array = jax.lax.dynamic_index_in_dim(array, layer, keepdims=False, allow_negative_indices=False)
    if rows is not None:
        axis = array.ndim - 1 if transposed else 0
        array = jax.lax.dynamic_slice_in_dim(array, row, rows, axis, allow_negative_indices=False)
    return jax.lax.convert_element_type(array.T if transposed else array, dtype)


def _merged(lazy: LazyWeight, field: str, layer: int | None, transposed: bool, dtype: Any) -> jax.Array:
    return _merged_part(lazy, layer, field=field, transposed=transposed, dtype=dtype)


@functools.partial(jax.jit, static_argnames=("field", "transposed", "dtype"))
def _merged_part(lazy: LazyWeight, layer: int | None, *, field: str, transposed: bool, dtype: Any) -> jax.Array:
    value = getattr(_merge(lazy, layer), field)
    return (value.T if transposed else value).astype(dtype)


def _merge(lazy: LazyWeight, layer: Any) -> Linear:
    """One layer, or all."""
    return (lazy if layer is None else _layer_of(lazy, layer)).merged()


def _layer_of(lazy: LazyWeight, layer: Any) -> LazyWeight:
    one = weight.cut(lazy, (0,), lambda leaf, axis, _: jax.lax.dynamic_slice_in_dim(leaf, layer, 1, axis))
    one = None if one is None else weight.squeeze(one, (0,))
    if one is None:
        raise MergeError("the view of a stack of layers must begin with b")
    return one
