"""The frozen kernels of a model in 8 or 4 bits, through qwix's quantised arrays (`pip install 'hadamax[quant]'`).

    int8    one scale for each output channel, absmax / 127.5; 8 bits a weight
    nf4     one scale for each block of 64 along `in`, absmax (QLoRA, arXiv:2305.14314); 4.25 bits a weight in bfloat16

Codes are chosen in at least float32; a scale has the dtype of the kernel. What is left of a kernel is its codes and
scales: adapters are trained and merged on the dequantised kernel, one layer's at a time.
"""

import functools
import importlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from hadamax import paths, targets, views
from hadamax.errors import ConfigError, NotAMatrixError
from hadamax.methods.products import wide
from hadamax.quantized import QuantizedWeight, dequantized, is_quantized
from hadamax.targets import Rule
from hadamax.weight import PLAIN

BLOCKS = {"int8": None, "nf4": 64}  # along `in`; None: the whole axis
# the projections of the decoders and encoders in `hadamax.models`; embeddings, norms and heads are none
PROJECTIONS = (
    "**/{q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj,query,key,value,intermediate/dense,output/dense}"
)


def quantize(
    params: Any,
    dtype: str,
    *,
    patterns: paths.Pattern | Iterable[paths.Pattern] = PROJECTIONS,
    exclude: paths.Pattern | Iterable[paths.Pattern] = (),
    view: str | None = None,
    block: int | None = None,
) -> Any:
    """The tree with a `QuantizedWeight` in place of each selected kernel, for frozen bases.

    `Injection`'s methods take such a tree as any other; without adapters, `hx.lazily(model.apply)` does.

    Args:
        params: arrays; tracers too, so that `jax.eval_shape` gives the shapes of a quantised tree.
        dtype: "int8" or "nf4".
        patterns: of kernels, as `inject` takes them; the projections of a transformer where left out.
        exclude: patterns of kernels, or of modules with everything below them, to leave as they are.
        view: role of each axis, for kernels of more than two (`model.view`); the adapters' must be the same.
        block: entries along `in` that share a scale. None: 64 for nf4, the whole axis for int8.

    Raises:
        ConfigError: an unknown dtype, a block that does not divide `in`, a kernel that is quantised, no qwix.
        NoMatchError, NotAMatrixError, ViewError: patterns or a view that do not fit, as for `Injection.targets`.

    Example:
        >>> import hadamax as hx
        >>> params = {"mlp": {"up_proj": {"kernel": jnp.linspace(-1, 1, 1024).reshape(128, 8)}}}
        >>> quantized = hx.quantize(params, "nf4")
        >>> quantized["mlp"]["up_proj"]["kernel"]
        QuantizedWeight(nf4 of float32[128, 8])
        >>> hx.lazily(lambda p, x: x @ p["mlp"]["up_proj"]["kernel"])(quantized, jnp.ones(128)).shape
        (8,)
    """
    chosen = selected(params, dtype, patterns=patterns, exclude=exclude, view=view, block=block)

    def quantized(path: str, leaf: Any) -> Any:
        return quantize_kernel(leaf, chosen[path], dtype, block) if path in chosen else leaf

    return paths.map_leaves(quantized, params)


def selected(
    params: Any,
    dtype: str,
    *,
    patterns: paths.Pattern | Iterable[paths.Pattern] = PROJECTIONS,
    exclude: paths.Pattern | Iterable[paths.Pattern] = (),
    view: str | None = None,
    block: int | None = None,
) -> dict[str, views.Axes]:
    """The kernels that `quantize` would select, by path, with the labels of their axes; it raises what that does."""
    if dtype not in BLOCKS:
        raise ConfigError(f"quantize: dtype {dtype!r} is unknown; known: {', '.join(BLOCKS)}")
    if block is not None and (type(block) is not int or block < 1):
        raise ConfigError(f"quantize: block must be a positive integer or None, found {block!r}")
    _qwix()
    if view is not None:
        views.parse(view)
    leaves = {path: leaf for path, leaf in paths.leaves(params).items() if hasattr(leaf, "shape")}
    rules = [(pattern, Rule(PLAIN)) for pattern in paths.as_patterns(patterns)]
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    found = targets.find(rules, view, paths.as_patterns(exclude), shapes)
    size = BLOCKS[dtype] if block is None else block
    for path, target in found.items():
        if is_quantized(leaves[path]):
            raise ConfigError(f"{path} is quantised already: {leaves[path]!r}; quantise the original weights")
        if not jnp.issubdtype(leaves[path].dtype, jnp.floating):
            raise NotAMatrixError(f"{path}: a kernel must be floating point, found {leaves[path].dtype}")
        if 0 in shapes[path]:
            raise NotAMatrixError(f"{path}: a kernel of shape {shapes[path]} has no weights to quantise")
        n = shapes[path][target.axes.index(views.of_role(target.axes, "i")[-1])]
        if size is not None and n % size:
            raise ConfigError(
                f"quantize: block {size} does not divide in = {n} of {path} {shapes[path]}; give a block that does, or"
                " exclude the kernel"
            )
    return {path: target.axes for path, target in found.items()}


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def quantize_kernel(kernel: jax.Array, axes: views.Axes, dtype: str, block: int | None = None) -> QuantizedWeight:
    """One kernel, quantised matrix by matrix where a batch axis comes first."""
    qwix, block = _qwix(), BLOCKS[dtype] if block is None else block
    stacked = axes[0][0] == "b"
    inner = axes[1:] if stacked else axes
    last = views.of_role(inner, "i")[-1]

    def quantized(kernel: jax.Array) -> Any:
        return qwix.quantize(
            kernel.astype(wide(kernel.dtype)),
            dtype,
            channelwise_axes=[at for at, a in enumerate(inner) if a[0] != "i" or (block is not None and a != last)],
            tiled_axes={} if block is None else {inner.index(last): block},
            scale_dtype=kernel.dtype,
        )

    return QuantizedWeight(jax.lax.map(quantized, kernel) if stacked else quantized(kernel), axes)


def dequantize(params: Any) -> Any:
    """The tree with an array in place of each quantised kernel, in the dtype of the kernel that it was made from.

    Example:
        >>> import hadamax as hx
        >>> params = {"up_proj": {"kernel": jnp.eye(64)}}
        >>> hx.dequantize(hx.quantize(params, "nf4"))["up_proj"]["kernel"].shape
        (64, 64)
    """
    return jax.tree.map(dequantized, params, is_leaf=is_quantized)


def quantization_error(params: Any, quantized: Any) -> dict[str, float]:
    """What quantising lost: `||Q - W|| / ||W||` of each quantised kernel, by path (Frobenius norms).

    Args:
        params: the weights as they were: of a base, or merged, to learn what quantising them again would lose.
        quantized: the same tree, with quantised kernels.

    Raises:
        ConfigError: trees of other paths or shapes.

    Example:
        >>> import hadamax as hx
        >>> params = {"up_proj": {"kernel": jnp.eye(64)}}
        >>> hx.quantization_error(params, hx.quantize(params, "nf4"))
        {'up_proj/kernel': 0.0}
    """
    before, errors = paths.leaves(params), {}
    for path, leaf in paths.leaves(quantized).items():
        if is_quantized(leaf):
            if path not in before or tuple(before[path].shape) != leaf.shape:
                raise ConfigError(f"{path} {leaf.shape} is not among the weights to compare with, or of another shape")
            errors[path] = float(_error(before[path], leaf))
    return errors


@jax.jit
def _error(before: Any, after: QuantizedWeight) -> jax.Array:
    def squares(pair: tuple[Any, Any]) -> tuple[jax.Array, jax.Array]:
        w, q = (dequantized(part).astype(wide(part.dtype)) for part in pair)
        return jnp.sum(jnp.square(q - w)), jnp.sum(jnp.square(w))

    pair = (before.array if is_quantized(before) else before, after.array)
    if after.axes[0][0] == "b":  # one matrix after the other
        lost, norm = (part.sum() for part in jax.lax.map(squares, pair))
    else:
        lost, norm = squares(pair)
    return jnp.sqrt(lost / jnp.where(norm > 0, norm, 1))


def qtypes(params: Any) -> Mapping[str, str]:
    """How each quantised kernel is stored: "int8", "nf4"."""
    return {path: leaf.array.qtype for path, leaf in paths.leaves(params).items() if is_quantized(leaf)}


def _qwix() -> Any:
    try:
        return importlib.import_module("qwix")
    except ImportError as error:
        raise ConfigError("quantised weights need qwix: pip install 'hadamax[quant]'") from error
