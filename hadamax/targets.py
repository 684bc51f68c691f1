"""Which kernels the rules select: patterns, exclusions, views, biases and layers, with an error for each slip."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from hadamax import paths, views
from hadamax.adapter import Adapter
from hadamax.errors import NoMatchError, NotAMatrixError, ViewError

Shapes = Mapping[str, tuple[int, ...]]

_VECTORS = {"bias", "scale", "beta", "gamma"}  # never matrices, even when a stack of layers makes them 2-D
_BIASES = {"kernel": "bias", "w": "b"}


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
        bias: path of the layer's bias, or None.
        bias_axes: the labels of the bias's axes; of the one that a merge would add, where there is none.
        layers: indices on the first batch axis that are adapted, or None for all.
    """

    path: str
    adapter: Adapter
    axes: views.Axes
    bias: str | None
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
        regex = paths.compile_pattern(pattern)
        hits = {path for path in matched if regex.fullmatch(path) or regex.fullmatch(paths.module_of(path))}
        if not hits:
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
        if not targets:
            raise NoMatchError(f"layers={list(rule.layers or ())} selects no kernel of pattern {paths.text(pattern)}")
        chosen |= {target.path: target for target in targets}
    return {path: chosen[path] for path in shapes if path in chosen}


def _matrices(pattern: paths.Pattern, shapes: Shapes) -> list[str]:
    """The matrices that a pattern selects. One that names a vector itself, or only modules of vectors, is an error."""
    regex = paths.compile_pattern(pattern)
    named = [path for path in shapes if regex.fullmatch(path)]
    held = [path for path in shapes if regex.fullmatch(paths.module_of(path))]
    vectors = [path for path in [*named, *held] if len(shapes[path]) < 2 or path.rpartition("/")[2] in _VECTORS]
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
    bias, bias_axes = _bias(path, axes, shapes)
    target = Target(path, rule.adapter, axes, bias, bias_axes, None)
    if rule.layers is None:
        return target
    number = re.search(r"(?:^|/|_)(\d+)(?:/|$)", path)
    if number:
        return target if int(number[1]) in rule.layers else None
    if "b" not in view:
        raise NoMatchError(f"{path}: layers={list(rule.layers)}, but neither the path nor view {view!r} has layers")
    count = shape[axes.index("b0")]
    if not all(0 <= layer < count for layer in rule.layers):
        raise NoMatchError(f"{path}: layers={list(rule.layers)}, but it has layers 0 to {count - 1}")
    return target._replace(layers=rule.layers)


def _bias(path: str, axes: views.Axes, shapes: Shapes) -> tuple[str | None, views.Axes]:
    """The path of the layer's bias, None where it has none, and the labels of its axes."""
    layouts = views.bias_layouts(axes)
    module, _, name = path.rpartition("/")
    bias = f"{module}/{_BIASES.get(name)}".lstrip("/")
    if bias not in shapes:
        return None, layouts[0]
    expected = [views.sizes(shapes[path], axes, list(layout)) for layout in layouts]
    if shapes[bias] not in expected:
        raise ViewError(
            f"{bias}: expected shape {expected[0]} for the kernel {shapes[path]} of view"
            f" {''.join(label[0] for label in axes)!r}, found {shapes[bias]}"
        )
    return bias, layouts[expected.index(shapes[bias])]
