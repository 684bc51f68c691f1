"""Which kernels the rules select: patterns, exclusions, views, biases and layers, with an error for each slip."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from hadamax import paths, views
from hadamax.adapter import Adapter
from hadamax.errors import NoMatchError, NotAMatrixError, ViewError

Shapes = Mapping[str, tuple[int, ...]]

# The names of a kernel's bias, the usual one first. A kernel of another name has none that we would know.
_BIASES = {"kernel": ("bias", "b"), "weight": ("bias", "b"), "w": ("b", "bias")}
_VECTORS = {"bias", "scale", "beta", "gamma"}  # never matrices, even when a stack of layers makes them 2-D


class Rule(NamedTuple):
    """What a pattern means: see `hadamax.at`."""

    adapter: Adapter
    view: str | None = None
    layers: tuple[int, ...] | None = None


class Target(NamedTuple):
    """One kernel that a rule selects.

    Attributes:
        path: of the kernel.
        adapter: its method.
        axes: the labels of its axes (`hadamax.views`).
        bias: path of the layer's bias, or None where it has none.
        new_bias: path of the bias that a merge would add; None where there is one, or no name for it is known.
        bias_axes: the labels of the axes of either.
        layers: indices on the first batch axis that are adapted, or None for all.
    """

    path: str
    adapter: Adapter
    axes: views.Axes
    bias: str | None
    new_bias: str | None
    bias_axes: views.Axes
    layers: tuple[int, ...] | None


def find(
    rules: Iterable[tuple[paths.Pattern, Rule]], view: str | None, exclude: Iterable[paths.Pattern], shapes: Shapes
) -> dict[str, Target]:
    """The targets by path, in the tree's order. See `Injection.targets` for what it raises."""
    rules = list(rules)
    matches = {pattern: _matrices(pattern, shapes) for pattern, _ in rules}
    matched = sorted({path for found in matches.values() for path in found})
    excluded: set[str] = set()
    for pattern in exclude:
        if not (hits := paths.below(pattern, matched)):
            raise paths.no_match(pattern, matched, "kernel that a rule selects, so the exclusion is unused")
        excluded |= hits
    chosen: dict[str, Target] = {}
    for pattern, rule in rules:
        free = [path for path in matches[pattern] if path not in excluded]
        if not free:
            raise NoMatchError(f"pattern {paths.text(pattern)} matches only excluded kernels")
        first = [path for path in free if path not in chosen]
        if not first:
            raise NoMatchError(f"pattern {paths.text(pattern)} matches only kernels of earlier rules; put it first")
        targets = [target for path in first if (target := _target(path, rule, view, shapes))]
        seen = {layer for path in first if (layer := _layer_of(path)) is not None}
        missing = sorted(set(rule.layers or ()) - seen) if seen else []
        if missing:
            raise NoMatchError(
                f"layers={list(rule.layers or ())}: pattern {paths.text(pattern)} has no layer {missing[0]}, only"
                f" {', '.join(map(str, sorted(seen)))}"
            )
        chosen |= {target.path: target for target in targets}
    return {path: chosen[path] for path in shapes if path in chosen}


def _matrices(pattern: paths.Pattern, shapes: Shapes) -> list[str]:
    """The matrices that a pattern selects. One that names a vector itself, or only modules of vectors, is an error."""
    regex = paths.compile_pattern(pattern)
    named = [path for path in shapes if regex.fullmatch(path)]
    held = [path for path in shapes if regex.fullmatch(paths.module_of(path))]
    vectors = [path for path in [*named, *held] if _is_vector(path, shapes)]
    matrices = [path for path in shapes if path in {*named, *held} and path not in vectors]
    wrong = [path for path in vectors if path in named] or ([] if matrices else vectors)
    if wrong:
        raise NotAMatrixError(
            f"pattern {paths.text(pattern)} selects {wrong[0]!r} of shape {shapes[wrong[0]]}, which is no matrix:"
            " train it whole with hx.split, or narrow the pattern"
        )
    if not matrices:
        raise paths.no_match(pattern, shapes)
    return matrices


def _is_vector(path: str, shapes: Shapes) -> bool:
    """Whether a leaf is no matrix, although a stack of layers may make it 2-D."""
    module, _, name = path.rpartition("/")
    if name == "b":
        return len(shapes[path]) < 2 or any(f"{module}/{kernel}".lstrip("/") in shapes for kernel in _BIASES)
    return len(shapes[path]) < 2 or name in _VECTORS


def _target(path: str, rule: Rule, view: str | None, shapes: Shapes) -> Target | None:
    """The target of one path; None where the rule's layers leave it out."""
    shape = shapes[path]
    view = rule.view or (view if view and len(view) == len(shape) else None)
    if view is None and len(shape) == 2:
        view = "io"
    if view is None:
        raise ViewError(
            f"{path}: a kernel of {len(shape)} axes {shape} needs a view, one role per axis (b batch, i in, o out):"
            f" give inject(view=) or hx.at(adapter, view=), for example {'bio' if len(shape) == 3 else 'bioo'!r}"
        )
    axes = views.parse(view)
    if len(axes) != len(shape):
        raise ViewError(f"{path}: view {view!r} has {len(axes)} axes, the kernel {len(shape)}: {shape}")
    target = Target(path, rule.adapter, axes, *_bias(path, axes, shapes), None)
    if rule.layers is None:
        return target
    if (layer := _layer_of(path)) is not None:
        return target if layer in rule.layers else None
    if "b" not in view:
        raise NoMatchError(f"{path}: layers={list(rule.layers)}, but neither the path nor view {view!r} has layers")
    count = shape[axes.index("b0")]
    if not all(0 <= layer < count for layer in rule.layers):
        raise NoMatchError(f"{path}: layers={list(rule.layers)}, but it has layers 0 to {count - 1}")
    return target._replace(layers=rule.layers)


def _layer_of(path: str) -> int | None:
    """The layer's number in a path: 3 in `layers_3/mlp`, `block_3/mlp` and `h/3/mlp`; none in `Dense_3`."""
    number = re.search(r"(?:^|/)(?:(?:layers?|blocks?|h)_?)?(\d+)(?:/|$)", path)
    return int(number[1]) if number else None


def _bias(path: str, axes: views.Axes, shapes: Shapes) -> tuple[str | None, str | None, views.Axes]:
    """The path of the layer's bias, of the one to add where it has none, and the labels of its axes."""
    layouts = views.bias_layouts(axes)
    expected = [views.sizes(shapes[path], axes, list(layout)) for layout in layouts]
    module, _, name = path.rpartition("/")
    candidates = [f"{module}/{bias}".lstrip("/") for bias in _BIASES.get(name, ())]
    for bias in candidates:
        if shapes.get(bias) in expected:
            return bias, None, layouts[expected.index(shapes[bias])]
        if bias in shapes and bias.endswith("bias"):
            raise ViewError(
                f"{bias}: expected shape {expected[0]} for the kernel {shapes[path]} of view"
                f" {''.join(label[0] for label in axes)!r}, found {shapes[bias]}"
            )
    return None, next(iter(candidates), None), layouts[0]
