"""Every method's effective weight, written from papers in numpy, in the papers' orientation `W [out, in]`, `y = W x`.

Deliberately naive and without any code of the library: block by block, column by column.
"""

import numpy as np


def lora(f, w, c, *, scale):
    return w + scale * f["b"].T @ f["a"].T, c


def hira(f, w, c, *, scale=1.0):
    return w * (1 + scale * (f["b"].T @ f["a"].T)), c


def pair(f, w, c, *, scale):
    return w + scale * (f["b1"].T @ f["a1"].T) * (f["b2"].T @ f["a2"].T), c


def grid(f, shape):
    """The block matrix in Flax's orientation, one block at a time."""
    blocks = f["a"].shape[0]
    n_in, n_out = shape[0] // blocks, shape[1] // blocks
    full = np.zeros(shape)
    for i in range(blocks):
        for j in range(blocks):
            full[i * n_in : (i + 1) * n_in, j * n_out : (j + 1) * n_out] = f["a"][i, j] @ f["b"][i, j]
    return full


def boha(f, w, c, *, scale=1.0):
    return w * (1 + scale * grid(f, w.T.shape).T), c


def gralora(f, w, c, *, scale):
    return w + scale * grid(f, w.T.shape).T, c


def dora(f, w, c, *, scale):
    direction = w + scale * f["b"].T @ f["a"].T
    rows = [m * row / np.sqrt((row**2).sum()) for m, row in zip(f["magnitude"], direction, strict=True)]
    return np.stack(rows), c


def hadamard(f, w, c, *, position):
    size = w.shape[1 if position == "input" else 0]
    scale, shift = f.get("weight", np.ones(size)), f.get("bias")
    if position == "input":
        return w @ np.diag(scale), c if shift is None else w @ shift + (0 if c is None else c)
    new = None if c is None and shift is None else scale * (0 if c is None else c) + (0 if shift is None else shift)
    return np.diag(scale) @ w, new


def add(f, w, c, *, parts):
    merged = [part(g, w, c) for part, g in zip(parts, f, strict=True)]
    bias = None
    if any(b is not None for _, b in merged):
        base = 0 if c is None else c
        bias = base + sum((0 if b is None else b) - base for _, b in merged)
    return w + sum(m - w for m, _ in merged), bias


def chain(f, w, c, *, parts):
    for part, g in zip(parts, f, strict=True):
        w, c = part(g, w, c)
    return w, c


def scaled(f, w, c, *, part, scale):
    new, bias = part(f, w, c)
    if bias is not None:
        base = 0 if c is None else c
        bias = base + scale * (bias - base)
    return w + scale * (new - w), bias
