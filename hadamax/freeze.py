"""Choosing the base leaves that train: two trees with holes, or a boolean tree for optax."""

from collections.abc import Iterable
from typing import Any

import jax

from hadamax import paths
from hadamax.errors import ConfigError
from hadamax.quantized import is_quantized


def _selected(params: Any, patterns: paths.Pattern | Iterable[paths.Pattern]) -> set[str]:
    leaves = paths.leaves(params)
    all_paths = list(leaves)
    selected: set[str] = set()
    for pattern in paths.as_patterns(patterns):
        if not (matched := paths.below(pattern, all_paths)):
            raise paths.no_match(pattern, all_paths)
        selected |= matched
    for path in selected:
        if is_quantized(leaves[path]):
            raise ConfigError(f"{path} is quantised and cannot train: adapt it, or leave it as it is when quantising")
    return selected


def split(params: Any, patterns: paths.Pattern | Iterable[paths.Pattern]) -> tuple[Any, Any]:
    """`(trainable, frozen)`: the same tree twice, each with None where the other has the leaf.

    Args:
        params: any pytree of parameters.
        patterns: leaves, or modules with everything below them, by path (`["**/norm/scale", "bias"]`).

    Raises:
        NoMatchError: a pattern selects nothing.
        ConfigError: a pattern selects a quantised kernel.

    Example:
        >>> split({"dense": {"kernel": 1, "bias": 2}}, ["bias"])
        ({'dense': {'bias': 2, 'kernel': None}}, {'dense': {'bias': None, 'kernel': 1}})
    """
    selected = _selected(params, patterns)
    trainable = paths.map_leaves(lambda path, leaf: leaf if path in selected else None, params)
    frozen = paths.map_leaves(lambda path, leaf: None if path in selected else leaf, params)
    return trainable, frozen


def join(trainable: Any, frozen: Any) -> Any:
    """The inverse of `split`.

    Example:
        >>> join(*split({"dense": {"kernel": 1, "bias": 2}}, ["bias"]))
        {'dense': {'bias': 2, 'kernel': 1}}
    """
    return jax.tree.map(lambda t, f: f if t is None else t, trainable, frozen, is_leaf=lambda leaf: leaf is None)


def trainable_mask(params: Any, patterns: paths.Pattern | Iterable[paths.Pattern]) -> Any:
    """The tree with True at the leaves that train, for optax's own `masked` and `partition`.

    `optax.masked(tx, mask)` passes the updates of the other leaves through unchanged: to freeze them, use
    `optax.selective_transform(tx, freeze_mask=jax.tree.map(operator.not_, mask))`, whose mask says what stays.

    Raises:
        NoMatchError: a pattern selects nothing.
        ConfigError: a pattern selects a quantised kernel.

    Example:
        >>> trainable_mask({"dense": {"kernel": 1, "bias": 2}}, ["bias"])
        {'dense': {'bias': True, 'kernel': False}}
    """
    selected = _selected(params, patterns)
    return paths.map_leaves(lambda path, leaf: path in selected, params)
