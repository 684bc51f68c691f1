"""The protocol: an adapter is a few pure functions over one weight, as an optax optimiser is over a gradient."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

Factors = Any  # a pytree of arrays: what trains
Config = Mapping[str, Any]  # JSON values


class Linear(NamedTuple):
    """One dense layer `x @ kernel + bias` in Flax's orientation.

    Attributes:
        kernel: `[in, out]`.
        bias: `[out]`, or None where the layer has none.
    """

    kernel: jax.Array
    bias: jax.Array | None = None


class Adapter(NamedTuple):
    """A method of adapting one frozen matrix. Batch axes (layers, experts) come from `vmap`, never from a method.

    Attributes:
        init: `(key, Linear) -> Factors`. The update is exactly zero at these factors. Factors are float32 (float64 for
            float64 kernels) whatever the kernel's dtype.
        merge: `(Factors, Linear) -> Linear`, the effective layer in the dtype it came in, computed in at least float32
            and rounded once.
        dot: `(Factors, Linear, x [..., in]) -> y [..., out]` in `x.dtype`, the cheapest exact way to
            `x @ merged.kernel + (merged.bias - linear.bias)`, an absent bias counting as 0: what the model, which goes
            on to add the layer's own bias, needs in place of `x @ kernel`.
        config: name and hyper-parameters as JSON values: `{"method": "hira", "rank": 8, ...}`.
        rows: `(Factors, select) -> Factors`, the factors of a selection of the kernel's input rows, where `select`
            maps `[in, ...]` to `[rows, ...]`; None for methods whose rows do not decouple. Embeddings use it.
        merges: whether a gradient larger than the factors' own stands between the activations' and theirs in `dot`: the
            dense one of a merged kernel, or that of Khatri-Rao products. On a mesh it must be contracted before it is
            summed over devices.

    Example:
        >>> import jax, jax.numpy as jnp, hadamax as hx
        >>> layer = hx.Linear(jnp.ones((6, 4)))
        >>> adapter = hx.hira(rank=2)
        >>> factors = adapter.init(jax.random.key(0), layer)
        >>> bool((adapter.merge(factors, layer).kernel == layer.kernel).all())
        True
    """

    init: Callable[[jax.Array, Linear], Factors]
    merge: Callable[[Factors, Linear], Linear]
    dot: Callable[[Factors, Linear, jax.Array], jax.Array]
    config: Config
    rows: Callable[[Factors, Callable[[jax.Array], jax.Array]], Factors] | None = None
    merges: bool = False

    def __hash__(self) -> int:
        return hash((self.init, self.merge, self.dot))
