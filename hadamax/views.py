"""Kernel views: what each axis of a kernel is, and the way between a kernel's own layout and `[batch..., in, out]`.

A view has one role per axis: `b` batch (layers, experts, a fused index), `i` in, `o` out. Axes of one role are
flattened in their order. Orientation is never guessed from shapes.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hadamax.errors import ViewError

Axes = tuple[str, ...]  # one label per axis, role and index within the role: ("b0", "i0", "o0", "o1") for "bioo"


def parse(view: str) -> Axes:
    """Label the axes of a view.

    Raises:
        ViewError: a letter other than b, i, o, or a view without an in or an out axis.

    Example:
        >>> parse("bioo")
        ('b0', 'i0', 'o0', 'o1')
    """
    if not isinstance(view, str) or set(view) - set("bio") or "i" not in view or "o" not in view:
        raise ViewError(
            f"view {view!r} must name each axis b (batch), i (in) or o (out), with at least one i and one o"
        )
    return tuple(f"{role}{view[:at].count(role)}" for at, role in enumerate(view))


def of_role(axes: Axes, role: str) -> list[str]:
    """The labels of one role, in canonical order."""
    return sorted((label for label in axes if label[0] == role), key=lambda label: int(label[1:]))


def canonical_order(axes: Axes) -> list[str]:
    """Batch, in, out: the order of the labels in the canonical layout."""
    return [*of_role(axes, "b"), *of_role(axes, "i"), *of_role(axes, "o")]


def sizes(shape: tuple[int, ...], axes: Axes, labels: list[str]) -> tuple[int, ...]:
    """The sizes of the labelled axes."""
    return tuple(shape[axes.index(label)] for label in labels)


def canonical(array: jax.Array, axes: Axes) -> jax.Array:
    """`[batch..., in, out]` of a kernel in its own layout, `[batch..., out]` of a bias."""
    order = canonical_order(axes)
    array = jnp.transpose(array, [axes.index(label) for label in order])
    roles = [len(of_role(axes, role)) for role in "bio"]
    batch, n_in = array.shape[: roles[0]], array.shape[roles[0] : roles[0] + roles[1]]
    flat = [math.prod(n_in)] * bool(roles[1])
    return array.reshape(*batch, *flat, math.prod(array.shape[roles[0] + roles[1] :]))


def restore(array: jax.Array, axes: Axes, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `canonical`: an array of `shape` in its own layout."""
    order = canonical_order(axes)
    return jnp.transpose(array.reshape(sizes(shape, axes, order)), [order.index(label) for label in axes])


def bias_layouts(axes: Axes) -> list[Axes]:
    """How the bias of a kernel may be laid out: `nn.scan` stacks every parameter on the same axis, others drop the ins.

    Example:
        >>> bias_layouts(parse("ibo"))
        [('o0', 'b0'), ('b0', 'o0')]
    """
    stacked = of_role(axes, "o")
    for at, label in enumerate(axes):
        if label[0] == "b":
            stacked.insert(at, label)
    return [tuple(stacked), tuple(label for label in axes if label[0] != "i")]


def role_spec(axes: Axes, spec: Sequence[Any], role: str) -> Any:
    """The mesh axes over which the flattened axis of a role is split, given those of each axis; None where that is no
    plain split, because an axis other than the first of the role is split.

    Example:
        >>> role_spec(parse("bioo"), (None, "fsdp", "tensor", None), "o")
        'tensor'
    """
    first, *others = (spec[axes.index(label)] for label in of_role(axes, role))
    return None if any(others) else first
