"""A kernel in few bits: codes and scales, as one leaf of a parameter tree.

The codes and scales are a `qwix.QArray`, of the kernel's rank: `qvalue` as the kernel, `scale` with one entry for each
block of `in` (and for each `out` and each layer). It may be transposed, sliced by layer and spread over devices part by
part; `dequantized` is called inside the layer that uses it. This file needs no qwix: `hadamax.quant` makes such leaves.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hadamax.views import Axes

# The 16 levels of a 4-bit NormalFloat (Dettmers et al. 2023, arXiv:2305.14314, appendix E).
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class QuantizedWeight:
    """A quantised kernel where a parameter tree has an array. Made by `hx.quantize`.

    Attributes:
        array: a `qwix.QArray`, whose dtype is that of the kernel it was made from.
        axes: the label of each kernel axis (`hadamax.views`).
    """

    array: Any
    axes: Axes = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.qvalue.shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def dtype(self) -> np.dtype:
        """What it counts as, and is dequantised to."""
        return self.array.scale.dtype

    def __repr__(self) -> str:
        return f"QuantizedWeight({self.array.qtype} of {self.dtype}{list(self.shape)})"


def is_quantized(x: Any) -> bool:
    """Whether a tree's node is a quantised kernel, for `jax.tree.map(is_leaf=)`."""
    return isinstance(x, QuantizedWeight)


def is_qarray(x: Any) -> bool:
    """Whether a value is a `qwix.QArray`."""
    return hasattr(x, "qvalue")


def dequantized(x: Any) -> jax.Array:
    """The kernel that a `QuantizedWeight` or its array stands for, in its dtype; anything else as it is.

    Equal to `qwix.dequantize`, bit for bit. The levels of nf4 are not looked up in the flattened codes, as there: that
    would gather a kernel that is spread over devices, and cost three times the memory traffic on a TPU.
    """
    array = x.array if is_quantized(x) else x
    if not is_qarray(array):
        return x
    values = array.qvalue
    if array.qtype == "nf4":
        values = jnp.array(_NF4, jnp.float32)[values.astype(jnp.int32)]
    blocks = [n for whole, n in zip(array.qvalue.shape, array.scale.shape, strict=True) for n in (n, whole // n)]
    values = values.astype(array.dtype).reshape(blocks)
    scale = array.scale.reshape([n for n in array.scale.shape for n in (n, 1)])
    return (values * jnp.broadcast_to(scale, values.shape)).reshape(array.qvalue.shape)
