"""A run's adapters folded into its base, one matrix at a time, and what rounding the result loses."""

from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

import hadamax as hx
from hadamax import paths, quant
from hadamax.hf.parameters import parameters
from hadamax.quantized import dequantized, is_quantized
from hadamax.weight import LazyWeight, unadapted
from train.run import Run


def bound(run: Run, dtype: Any = None) -> Any:
    """The run's parameters as they are to be written: adapted kernels lazy, so that they are merged one at a time.

    Args:
        run: a run as `train.run.load_run` gives it.
        dtype: of every leaf; None keeps each base leaf's. Trained base leaves are float32 until they are written.
    """
    base = run.base.params
    kinds = {path: dtype or leaf.dtype for path, leaf in paths.leaves(base).items()}
    params = hx.join(run.trainable["base"], base)
    if run.injection is not None:
        params = run.injection.bind(params, run.trainable["adapters"])

    def in_its_dtype(keys: Any, leaf: Any) -> Any:
        kind = kinds[paths.path_of(keys)]
        leaf = unadapted(leaf) if is_quantized(leaf) else leaf
        return leaf.replace(dtype=kind) if isinstance(leaf, LazyWeight) else leaf.astype(kind)

    return jax.tree_util.tree_map_with_path(
        in_its_dtype, params, is_leaf=lambda leaf: is_quantized(leaf) or isinstance(leaf, LazyWeight)
    )


def merge(run: Run, dtype: Any = None) -> Any:
    """The merged parameters in memory, each rounded once from float32; `dtype` as for `bound`."""
    merged = parameters(bound(run, dtype))
    return {"params": unflatten_dict({path: p.matrix(None, False, p.dtype) for path, p in merged.items()}, sep="/")}


def merge_loss(run: Run, dtype: Any = None) -> tuple[dict[str, float], float]:
    """What rounding to the written dtype loses of the updates, one matrix at a time.

    W0 of a quantised base is what it is dequantised to.

    Args:
        dtype: of the result; None keeps each base leaf's.

    Returns:
        The loss `||round(W) - W|| / ||W - W0||` of each changed leaf (Frobenius norms, W merged in float32), and the
        same ratio over all of them together. An update that is zero loses nothing.

    Raises:
        MergeError: factors that are not finite, a method that does not fold.
    """
    base = parameters(run.base.params)
    merged = parameters(bound(run, jnp.float32))
    changed = {*run.trainable["adapters"], *paths.leaves(run.trainable["base"])}
    squares = {}
    for path in (path for path in base if path in changed):
        w0, w = base[path], merged[path]
        sums = [
            # the rounded matrix is computed by itself: within one program XLA would leave the rounding out
            _squares(
                w0.matrix(i, False, jnp.float32), w.matrix(i, False, jnp.float32), w.matrix(i, False, dtype or w0.dtype)
            )
            for i in (range(w0.shape[0]) if len(w0.shape) == 3 else [None])
        ]
        squares[path] = [float(sum(column)) for column in zip(*sums, strict=True)]
    each = {path: _ratio(*pair) for path, pair in squares.items()}
    return each, _ratio(*(sum(column) for column in zip(*squares.values(), strict=True)))


def requantizing_loss(run: Run) -> float:
    """What quantising the merged kernels as the base is would lose of their updates: `||Q(W) - W|| / ||W - W0||`."""
    kinds, base = quant.qtypes(run.base.params), parameters(run.base.params)
    leaves, merged = paths.leaves(run.base.params), parameters(bound(run, jnp.float32))
    lost = update = 0.0
    for path in (path for path in run.trainable["adapters"] if path in kinds):
        axes, w0, w = leaves[path].axes, base[path], merged[path]
        for i in range(w0.shape[0]) if axes[0] == "b0" else [None]:
            matrix = w.matrix(i, False, jnp.float32)
            again = quant.quantize_kernel(matrix, axes if i is None else axes[1:], kinds[path])
            sums = _squares(w0.matrix(i, False, jnp.float32), matrix, dequantized(again))
            lost, update = lost + float(sums[0]), update + float(sums[1])
    return _ratio(lost, update)


@jax.jit
def _squares(before: jax.Array, after: jax.Array, rounded: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Squared norms of what rounding changes, and of the update."""
    return jnp.sum(jnp.square(rounded.astype(after.dtype) - after)), jnp.sum(jnp.square(after - before))


def _ratio(lost: float, update: float) -> float:
    return (lost / update) ** 0.5 if update else 0.0
