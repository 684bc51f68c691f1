"""Methods that are a function of the weight: merge in one rounding, and `x @ merged` without keeping it."""

from collections.abc import Callable

import jax

from hadamax.adapter import Factors, Linear
from hadamax.methods.products import on_last, wide

Merge = Callable[[Factors, Linear], Linear]


def widened(linear: Linear) -> Linear:
    """The layer in at least float32."""
    return jax.tree.map(lambda leaf: leaf.astype(wide(leaf.dtype)), linear)


def rounded_once(new_kernel: Callable[[Factors, jax.Array], jax.Array]) -> Merge:
    """A `merge` from `(factors, kernel) -> new kernel`: in at least float32, rounded once, the bias untouched."""

    def merge(factors: Factors, linear: Linear) -> Linear:
        kernel = linear.kernel
        return linear._replace(kernel=new_kernel(factors, kernel.astype(wide(kernel.dtype))).astype(kernel.dtype))

    return merge


def merged_dot(merge: Merge) -> Callable[[Factors, Linear, jax.Array], jax.Array]:
    """A `dot` that merges, multiplies, and forgets the merged weight.

    One `jax.checkpoint` covers merge and matmul together: around the merge alone XLA would reuse the forward value, so
    that the merged weight of every layer would live until the backward pass. Costs 3 matmul units (forward, dx, and the
    dense dW that contracts to the factors) where a factored method costs 2.
    """

    @jax.checkpoint
    def dot(factors: Factors, linear: Linear, x: jax.Array) -> jax.Array:
        # widened here, so that the merged kernel is rounded once, to the activations' dtype
        linear = widened(linear)
        merged = merge(factors, linear)
        y = x @ merged.kernel.astype(x.dtype)
        if merged.bias is linear.bias or merged.bias is None:
            return y
        shift = merged.bias if linear.bias is None else merged.bias - linear.bias
        return y + on_last(shift, y).astype(x.dtype)

    return dot
