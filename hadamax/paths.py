"""Parameters by path: `/`-joined names, the globs that select them, and trees rebuilt around some of them.

A pattern is a glob over the path (`*` within a name, `**` any number of names, `{a,b}` alternatives), or a compiled
regular expression that must match the whole path. A pattern without `/` may match at any depth. A pattern selects a
leaf by the leaf's own path or by the path of the module that holds it.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate
from typing import Any

import jax

from hadamax.errors import ConfigError, NoMatchError, nearest
from hadamax.quantized import is_quantized

Pattern = str | re.Pattern[str]


def _name(key: Any) -> str:
    return str(next(getattr(key, field) for field in ("key", "idx", "name") if hasattr(key, field)))


def path_of(keys: Iterable[Any]) -> str:
    """The path of a leaf from its tree keys. linen's `params` and an nnx variable's `value` are no names."""
    keys = list(keys)
    if len(keys) > 1 and isinstance(keys[-1], jax.tree_util.GetAttrKey) and keys[-1].name == "value":
        keys.pop()
    names = [_name(key) for key in keys]
    return "/".join(names[1:] if len(names) > 1 and names[0] == "params" else names)


def leaves(tree: Any) -> dict[str, Any]:
    """`{path: leaf}` in the tree's order. A quantised kernel is one leaf.

    Raises:
        ConfigError: two leaves with one path.

    Example:
        >>> leaves({"params": {"mlp": {"kernel": 1, "bias": 2}}})
        {'mlp/bias': 2, 'mlp/kernel': 1}
    """
    found: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_quantized)[0]:
        if (path := path_of(keys)) in found:
            raise ConfigError(
                f"two parameters have the path {path!r}; rename one, or pass the `params` collection alone"
            )
        found[path] = leaf
    return found


def map_leaves(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """The tree with `function(path, leaf)` at each leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: function(path_of(keys), leaf), tree, is_leaf=is_quantized
    )


def module_of(path: str) -> str:
    """The path of the module that holds a leaf: `mlp` for `mlp/kernel`."""
    return path.rpartition("/")[0]


@functools.cache
def compile_pattern(pattern: Pattern) -> re.Pattern[str]:
    """The regular expression of a glob; a regular expression is itself.

    Raises:
        ConfigError: braces that do not pair.

    Example:
        >>> bool(compile_pattern("**/mlp/{up,down}_proj/kernel").fullmatch("layers/mlp/up_proj/kernel"))
        True
    """
    if not isinstance(pattern, str):
        return pattern
    glob = pattern if "/" in pattern else f"**/{pattern}"
    tokens = {"**/": "(?:[^/]+/)*", "/**": "(?:/[^/]+)*", "**": ".*", "*": "[^/]*", "?": "[^/]", "{": "(?:", "}": ")"}
    parts, depth = [], 0
    for token in re.findall(r"\*\*/|/\*\*$|\*\*|.", glob):
        depth += {"{": 1, "}": -1}.get(token, 0)
        if depth < 0:
            break
        parts.append("|" if token == "," and depth else tokens.get(token) or re.escape(token))
    if depth:
        raise ConfigError(f"pattern {pattern!r} has braces that do not pair")
    return re.compile("".join(parts))


def as_patterns(patterns: Pattern | Iterable[Pattern]) -> tuple[Pattern, ...]:
    """One pattern or several as a tuple."""
    return (patterns,) if isinstance(patterns, str | re.Pattern) else tuple(patterns)


def below(pattern: Pattern, paths: Iterable[str]) -> set[str]:
    """The leaves that a pattern selects, or that lie anywhere below a module that it selects."""
    regex = compile_pattern(pattern)
    return {
        path for path in paths if any(regex.fullmatch(name) for name in accumulate(path.split("/"), "{}/{}".format))
    }


def text(pattern: Pattern) -> str:
    """How to name a pattern to its author."""
    return repr(pattern if isinstance(pattern, str) else f"re:{pattern.pattern}")


def no_match(pattern: Pattern, paths: Iterable[str], what: str = "parameter") -> NoMatchError:
    """The error for a pattern that selects nothing, with the nearest paths or the modules of that name."""
    paths = list(paths)
    regex = compile_pattern(pattern)
    modules = dict.fromkeys("/".join(p.split("/")[:n]) for p in paths for n in range(1, p.count("/") + 1))
    inside = next((m for m in modules if regex.fullmatch(m)), None)
    if inside is not None:
        children = dict.fromkeys(p[len(inside) + 1 :].split("/")[0] for p in paths if p.startswith(inside + "/"))
        return NoMatchError(
            f"pattern {text(pattern)} matches no {what}: {inside!r} is a module of modules"
            f" ({', '.join(list(children)[:8])}); name one of them, or write {inside + '/**'!r}"
        )
    name = pattern if isinstance(pattern, str) else pattern.pattern
    names = dict.fromkeys(
        [*(n for p in paths for n in p.split("/")), *paths] if "/" not in name else [*modules, *paths]
    )
    if not paths:
        return NoMatchError(f"pattern {text(pattern)} matches no {what}; the tree has no parameters")
    hint = nearest(name, names) or f"; the tree has {', '.join(map(repr, paths[:3]))}" + (
        ", ..." if len(paths) > 3 else ""
    )
    return NoMatchError(f"pattern {text(pattern)} matches no {what}{hint}")


def add_leaf(tree: Any, path: str, leaf: Any) -> Any:
    """A copy of a tree of mappings with one more leaf.

    Raises:
        TypeError: the module is no mapping, so that nothing can be added to it.
    """

    def put(node: Any, names: list[str]) -> Any:
        if not isinstance(node, Mapping) or hasattr(node, "flat_state"):
            raise TypeError(type(node).__name__)
        if len(names) == 1:
            if names[0] in node:
                raise TypeError(f"{type(node).__name__} that has a {names[0]!r}")
            return type(node)({**node, names[0]: leaf})  # pyright: ignore[reportCallIssue]
        child = next((key for key in node if str(key) == names[0]), None)
        if child is None:
            raise TypeError(f"{type(node).__name__} without {names[0]!r}")
        return type(node)({**node, child: put(node[child], names[1:])})  # pyright: ignore[reportCallIssue]

    names = path.split("/")
    if isinstance(tree, Mapping) and "params" in tree and names[0] not in tree:
        names = ["params", *names]
    return put(tree, names)
