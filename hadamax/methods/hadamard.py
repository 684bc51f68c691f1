"""Hadamard Adapter (Chen et al., CIKM 2023, arXiv 2407.11033): an affine map of the activations, one weight and one
bias per feature. It is an adapter of activations, so it is defined by the layer whose input or output it is.

    A' = w .* A + b                               A the self-attention output
    position="output":  y = w * (x @ W + c) + b         folds into the columns of W [in, out] and the bias: w * c + b
    position="input":   y = (w * x + b) @ W + c         folds into the rows of W and the bias: c + b @ W

w starts as ones, b as zeros; 2 d parameters. The paper's text leaves open whether A is the output projection's input or
its output: both are offered. The fitting study's higher orders, w2 .* A^2 + w3 .* A^3, are not affine and do not merge.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from hadamax.adapter import Adapter, Linear
from hadamax.errors import ConfigError, MergeError
from hadamax.methods.pairs import check_choice
from hadamax.methods.products import check_flag, on_last, wide

Position = Literal["input", "output"]


def hadamard_adapter(
    *, position: Position = "output", weight: bool = True, bias: bool = True, order: int = 1
) -> Adapter:
    """Scale and shift of a layer's input or output features.

    Args:
        position: adapt the layer's "output" or its "input".
        weight: train w.
        bias: train b. Where the layer has no bias, merging gives it one.
        order: 1 is the adapter; 2 and 3 add the quadratic and the cubic term of the paper's fitting study.

    Raises:
        ConfigError: nothing to train, an unknown position, an order other than 1, 2, 3.
        MergeError: at `merge`, an order above 1.

    Example:
        >>> import jax, jax.numpy as jnp, hadamax as hx
        >>> adapter = hx.hadamard_adapter()
        >>> factors = adapter.init(jax.random.key(0), hx.Linear(jnp.ones((4, 3))))
        >>> factors
        {'weight': Array([1., 1., 1.], dtype=float32), 'bias': Array([0., 0., 0.], dtype=float32)}
        >>> adapter.merge(factors, hx.Linear(jnp.ones((4, 3)))).bias
        Array([0., 0., 0.], dtype=float32)
    """
    check_choice("hadamard_adapter", "position", position, Position)
    check_flag("hadamard_adapter", weight=weight, bias=bias)
    if not (weight or bias or order > 1):
        raise ConfigError("hadamard_adapter: weight=False and bias=False leave nothing to train")
    if type(order) is not int or order not in (1, 2, 3):
        raise ConfigError(f"hadamard_adapter: order must be 1, 2 or 3, found {order!r}")
    names = ["weight"] * weight + ["bias"] * bias + ["quadratic", "cubic"][: order - 1]

    def init(key: jax.Array, linear: Linear) -> dict:
        size = linear.kernel.shape[0 if position == "input" else 1]
        dtype = wide(linear.kernel.dtype)
        return {name: jnp.full(size, float(name == "weight"), dtype) for name in names}

    def affine(f: dict, a: jax.Array, c: jax.Array | None) -> jax.Array:
        """`A' - c` for `A = a + c`: written so that it is exactly `a` at init."""
        f = {name: on_last(vector, a) for name, vector in f.items()}
        c = None if c is None else on_last(c, a)
        out = f["weight"] * a if weight else a
        out = out + (f["weight"] - 1) * c if weight and c is not None else out
        for power, name in ((2, "quadratic"), (3, "cubic")):
            if name in f:
                out = out + f[name] * (a if c is None else a + c) ** power
        return out + f["bias"] if bias else out

    def merge(f: dict, linear: Linear) -> Linear:
        if order > 1:
            raise MergeError(
                f"hadamard_adapter: order {order} is not affine and cannot be folded into a kernel and a bias"
            )
        kernel, shift = linear.kernel.astype(wide(linear.kernel.dtype)), linear.bias
        if position == "input":
            if bias:
                shift = f["bias"] @ kernel if shift is None else shift + f["bias"] @ kernel
            kernel = f["weight"][:, None] * kernel if weight else kernel
        else:
            if weight and shift is not None:
                shift = f["weight"] * shift
            if bias:
                shift = f["bias"] if shift is None else shift + f["bias"]
            kernel = on_last(f["weight"], kernel) * kernel if weight else kernel
        dtype = linear.kernel.dtype if linear.bias is None else linear.bias.dtype
        return Linear(kernel.astype(linear.kernel.dtype), None if shift is None else shift.astype(dtype))

    def dot(f: dict, linear: Linear, x: jax.Array) -> jax.Array:
        kernel = linear.kernel.astype(x.dtype)
        if position == "input":
            return affine(f, x.astype(wide(x.dtype)), None).astype(x.dtype) @ kernel
        return affine(f, (x @ kernel).astype(wide(x.dtype)), linear.bias).astype(x.dtype)

    config = {"method": "hadamard_adapter", "position": position, "weight": weight, "bias": bias, "order": order}
    return Adapter(init, merge, dot, config, (lambda f, select: f) if position == "output" else None)
