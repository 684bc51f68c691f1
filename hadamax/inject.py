"""Rules that say which kernels of a parameter tree are adapted, and the functions over (params, adapters) they give."""

import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from hadamax import paths, stacks, targets, views
from hadamax.adapter import Adapter, Factors
from hadamax.config import adapter_from_config
from hadamax.errors import ConfigError, HadamaxError, MergeError, NotAMatrixError, ViewError, nearest
from hadamax.lazy import lazily
from hadamax.quantized import dequantized, is_quantized
from hadamax.sharding import check_axes
from hadamax.shards import Placement
from hadamax.summary import Row, Summary
from hadamax.targets import Rule, Target
from hadamax.weight import LazyWeight


def at(adapter: Adapter, *, view: str | None = None, layers: Sequence[int] | None = None) -> Rule:
    """An adapter with the view of the kernels it is for, or for some layers only.

    Args:
        adapter: the method.
        view: role of each kernel axis (`hadamax.views`), in place of `inject`'s.
        layers: indices of the layers to adapt: of the number in the path (`layers_3`, `h/3`) or, where the path has
            none, on the kernel's first batch axis. Other layers have no factors.

    Raises:
        ConfigError: layers that are no distinct integers from 0 on.

    Example:
        >>> import hadamax as hx
        >>> hx.at(hx.lora(4), view="oi", layers=[0, 1]).layers
        (0, 1)
    """
    if not isinstance(adapter, Adapter):
        raise ConfigError(f"hx.at needs an adapter, found {adapter!r}")
    if layers is None:
        return Rule(adapter, view)
    numbers = [int(n) if isinstance(n, np.integer) else n for n in layers] if isinstance(layers, Iterable) else []
    if not numbers or len(set(numbers)) < len(numbers) or any(type(n) is not int or n < 0 for n in numbers):
        raise ConfigError(f"layers must be distinct integers from 0 on, at least one, found {layers!r}")
    return Rule(adapter, view, tuple(numbers))


class Injection(NamedTuple):
    """Adapters placed in a parameter tree by rules. Made by `inject`; all methods are pure.

    `params` is any pytree of arrays and of quantised kernels: linen dicts, `nnx.State`, plain dicts. `adapters` is
    `{kernel path: factors}`, each factor leading with the kernel's batch axes (restricted to the rule's layers).
    """

    rules: tuple[tuple[paths.Pattern, Rule], ...]
    view: str | None = None
    exclude: tuple[paths.Pattern, ...] = ()

    def targets(self, params: Any) -> dict[str, Target]:
        """The kernels that the rules select, by path.

        Raises:
            NoMatchError: a pattern or an exclusion that selects nothing, or a layer that is not there.
            NotAMatrixError: a pattern that selects a bias, a norm's scale or another vector, or integers.
            ViewError: a kernel of more than two axes without a view, or a view that does not fit, or is not the one
                that the kernel was quantised with.
        """
        leaves = {path: leaf for path, leaf in paths.leaves(params).items() if hasattr(leaf, "shape")}
        shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
        found = targets.find(self.rules, self.view, self.exclude, shapes)
        for path, target in found.items():
            if is_quantized(leaves[path]) and leaves[path].axes != target.axes:
                quantized, adapted = ("".join(label[0] for label in axes) for axes in (leaves[path].axes, target.axes))
                raise ViewError(f"{path} was quantised with view {quantized!r}, but is adapted with view {adapted!r}")
            if not jnp.issubdtype(leaves[path].dtype, jnp.floating):
                raise NotAMatrixError(f"{path}: a kernel must be floating point, found {leaves[path].dtype}")
        return found

    def init(self, key: jax.Array, params: Any) -> dict[str, Factors]:
        """Fresh factors; the update is zero. A kernel's factors depend on `key`, its path and its values alone.

        Raises:
            HadamaxError: what `targets` raises, or a hyper-parameter that does not fit a kernel.
        """
        leaves = paths.leaves(params)
        adapters = {}
        for path, target in self.targets(params).items():
            linear, batch = stacks.stacked(stacks.canonical(leaves, target), target)
            if target.layers is not None:
                batch = (len(target.layers), *batch[1:])
            keys = jax.random.split(jax.random.fold_in(key, zlib.crc32(path.encode())), linear.kernel.shape[0])
            try:
                # one matrix after the other: an SVD of a whole stack at once would take the stack's size several times
                factors = jax.lax.map(
                    lambda args, init=target.adapter.init: init(args[0], stacks.dense(args[1])), (keys, linear)
                )
            except HadamaxError as error:
                raise type(error)(f"{path}: {error}") from None
            adapters[path] = jax.tree.map(lambda leaf, batch=batch: leaf.reshape(*batch, *leaf.shape[1:]), factors)
        return adapters

    def shardings(self, params: Any, placed: Any) -> dict[str, Any]:
        """Where the factors lie: each axis as the kernel's axis that it shares, the others whole on every device.

        Args:
            params: arrays or `jax.ShapeDtypeStruct`s.
            placed: the tree with a `NamedSharding` in place of each array, as `hx.param_shardings` gives it.

        Raises:
            HadamaxError: what `targets` raises.
        """
        leaves, spots = paths.leaves(params), _spots(placed)
        return {
            path: stacks.factor_shardings(leaves, target, _spot(spots, path))
            for path, target in self.targets(params).items()
        }

    def bind(self, params: Any, adapters: Mapping[str, Factors], placed: Any = None) -> Any:
        """The parameters with a `LazyWeight` at each adapted kernel, for a function wrapped by `hx.lazily`.

        Args:
            placed: as for `apply`.

        Raises:
            ConfigError: the adapters were made for other kernels; `placed` lacks a kernel, holds something other than
                `NamedSharding`s, or is of a mesh with other axes than `data`, `fsdp` and `tensor`.
        """
        leaves, selected = paths.leaves(params), self.checked(params, adapters)
        spots = {} if placed is None else _spots(placed)

        def lazy(path: str, leaf: Any) -> Any:
            if path not in selected:
                return leaf
            target, factors, active = selected[path], adapters[path], None
            if target.layers is not None:
                batch = views.sizes(leaf.shape, target.axes, views.of_role(target.axes, "b"))
                index = np.zeros(batch[0], int)
                index[list(target.layers)] = range(len(target.layers))
                factors = jax.tree.map(lambda f: f[index], factors)  # inactive layers hold factors that nothing reads
                on = np.isin(range(batch[0]), target.layers)
                active = jnp.broadcast_to(on.reshape(-1, *[1] * (len(batch) - 1)), batch)
            bias = None if target.bias is None else views.canonical(leaves[target.bias], target.bias_axes)
            kernel = leaf.array if is_quantized(leaf) else jnp.asarray(leaf)
            static: dict[str, Any] = {"adapter": target.adapter, "axes": target.axes, "path": path}
            if placed is not None:
                static["placement"] = _placement(_spot(spots, path), target.axes)
            return LazyWeight(kernel, bias, factors, active, **static)

        return paths.map_leaves(lazy, params)

    def apply(self, fn: Callable, placed: Any = None) -> Callable:
        """`(params, adapters, *args, **kwargs) -> fn(adapted, *args, **kwargs)`, nothing merged outside its layer.

        Args:
            fn: a function of parameters, `model.apply` for linen. Its code is not changed. Put `jax.jit` around the
                result: it is traced at each call.
            placed: where the parameters lie, a `NamedSharding` for each, as `hx.param_shardings` gives it. Under it
                each group of devices that holds rows of the batch contracts its own gradient of a merged kernel to the
                factors, and only these are summed over the mesh. None for one device.
        """
        call = lazily(fn)

        def adapted(params, adapters, *args, **kwargs):
            return call(self.bind(params, adapters, placed), *args, **kwargs)

        return adapted

    def merge(self, params: Any, adapters: Mapping[str, Factors]) -> Any:
        """New parameters with the updates folded in, each rounded once to its kernel's dtype. Keep `params` to unmerge.

        A shift of a layer without a bias (Hadamard Adapter) adds a `bias` leaf. Our own models use it; another model
        must be one that asks for biases, as flax passes over a leaf that no module asks for.

        A quantised base comes out as plain arrays: the update is added to the dequantised kernel in at least float32,
        and kernels that are not adapted are dequantised. `hx.quantization_error` says what quantising again would lose.

        Raises:
            MergeError: factors that are not finite (outside `jit`), a method that does not fold.
            ConfigError: the adapters were made for other kernels.
        """
        leaves, merged, new = paths.leaves(params), {}, {}
        for path, target in self.checked(params, adapters).items():
            factors = adapters[path]
            for leaf in jax.tree.leaves(factors):
                if not isinstance(leaf, jax.core.Tracer) and not bool(jnp.isfinite(leaf).all()):
                    raise MergeError(f"{path}: the factors hold NaN or infinity; nothing was merged")
            linear = stacks.canonical(leaves, target)
            stacked, batch = stacks.stacked(linear, target)
            rows, ndim = stacked.kernel.shape[0], len(batch)
            flat = jax.tree.map(lambda leaf, rows=rows, ndim=ndim: leaf.reshape(rows, *leaf.shape[ndim:]), factors)
            try:
                result = jax.lax.map(
                    lambda args, merge=target.adapter.merge: merge(args[0], stacks.dense(args[1])), (flat, stacked)
                )
            except HadamaxError as error:
                raise type(error)(f"{path}: {error}") from None
            kernel, bias = stacks.unstacked(result, linear, target)
            shape = leaves[path].shape
            merged[path] = views.restore(kernel, target.axes, shape)
            if bias is not None:
                where = target.bias or target.new_bias
                if where is None:
                    raise MergeError(f"{path}: merging needs a bias, and a kernel of that name has no place for one")
                (merged if target.bias else new)[where] = views.restore(
                    bias, target.bias_axes, views.sizes(shape, target.axes, list(target.bias_axes))
                )
        params = paths.map_leaves(lambda path, leaf: merged[path] if path in merged else dequantized(leaf), params)
        for path, bias in new.items():
            try:
                params = paths.add_leaf(params, path, bias)
            except TypeError as error:
                raise MergeError(
                    f"{path}: merging needs a bias that the layer lacks, and none can be added to a {error}"
                ) from None
        return params

    def summary(self, params: Any) -> Summary:
        """What the rules select, with shapes and counts; print it. Takes arrays or `jax.ShapeDtypeStruct`s."""
        params = jax.tree.map(lambda leaf: leaf if hasattr(leaf, "shape") else None, params)
        shapes = jax.eval_shape(self.init, jax.random.key(0), params)
        leaves = paths.leaves(params)
        rows = [
            Row(path, str(target.adapter.config["method"]), leaves[path].shape, stacks.size(shapes[path]))
            for path, target in self.targets(params).items()
        ]
        return Summary(rows, sum(row.trainable for row in rows), stacks.size(leaves))

    def to_config(self) -> dict[str, Any]:
        """JSON that `from_config` takes."""

        def named(pattern: paths.Pattern) -> dict[str, Any]:
            return (
                {"pattern": pattern} if isinstance(pattern, str) else {"regex": pattern.pattern, "flags": pattern.flags}
            )

        rules = [
            {
                **named(pattern),
                "adapter": dict(rule.adapter.config),
                "view": rule.view,
                "layers": None if rule.layers is None else list(rule.layers),
            }
            for pattern, rule in self.rules
        ]
        return {
            "version": 1,
            "rules": rules,
            "view": self.view,
            "exclude": [named(pattern) for pattern in self.exclude],
        }

    def checked(self, params: Any, adapters: Mapping[str, Factors]) -> dict[str, Target]:
        """The targets, if the adapters are theirs."""
        leaves, selected = paths.leaves(params), self.targets(params)
        if not isinstance(adapters, Mapping):
            raise ConfigError(f"adapters must be {{kernel path: factors}}, as init returns them, found {adapters!r}")
        if odd := sorted(selected.keys() ^ adapters.keys()):
            kind = "has no factors among the adapters"
            kind = kind if odd[0] in selected else "is in the adapters, but no rule selects it"
            raise ConfigError(f"{odd[0]} {kind}: the adapters were made by other rules or for another model")
        for path, target in selected.items():
            expected = stacks.factor_shapes(leaves, target)
            found = dict(jax.tree_util.tree_flatten_with_path(adapters[path])[0])
            for keys in expected.keys() | found.keys():
                shape = tuple(found[keys].shape) if keys in found else None
                if shape != expected.get(keys):
                    name = jax.tree_util.keystr(keys, simple=True, separator="/")
                    raise ConfigError(
                        f"{path}: factor {name!r} should have shape {expected.get(keys)} for"
                        f" {target.adapter.config['method']}, found {shape}: the adapters were made by other rules"
                    )
        return selected


def _spots(placed: Any) -> dict[str, NamedSharding]:
    """Where each parameter lies; a quantised one as its codes."""
    spots = {path: s.array.qvalue if is_quantized(s) else s for path, s in paths.leaves(placed).items()}
    for path, spot in spots.items():
        if not isinstance(spot, NamedSharding):
            raise ConfigError(f"{path}: placed must be a tree of NamedShardings, found {type(spot).__name__}")
        check_axes(spot.mesh)
    return spots


def _spot(spots: Mapping[str, NamedSharding], path: str) -> NamedSharding:
    if path not in spots:
        raise ConfigError(f"{path}: placed does not say where it lies{nearest(path, spots)}")
    return spots[path]


def _placement(placed: NamedSharding, axes: views.Axes) -> Placement:
    spec = [*placed.spec, *[None] * len(axes)]
    return Placement(placed.mesh, *(views.role_spec(axes, spec, role) for role in "io"))


def inject(
    rules: Mapping[paths.Pattern, Adapter | Rule],
    *,
    view: str | None = None,
    exclude: paths.Pattern | Iterable[paths.Pattern] = (),
) -> Injection:
    """Place adapters in a parameter tree.

    Args:
        rules: `{pattern: adapter}` or `{pattern: hx.at(adapter, view=, layers=)}`, in order; the first match wins.
            Patterns are globs or compiled regular expressions over kernel or module paths (`hadamax.paths`); a name
            without `/` means every module of that name.
        view: role of each axis for every kernel of that many axes, `"bio"` for stacked layers. Kernels of two axes are
            `"io"` without one.
        exclude: patterns of kernels, or of modules with everything below them, to leave alone.

    Raises:
        ConfigError: no rules, or a value that is no adapter.
        ViewError: a view that is none.

    Example:
        >>> import jax, jax.numpy as jnp, hadamax as hx
        >>> params = {"mlp": {"up": {"kernel": jnp.ones((4, 8))}, "down": {"kernel": jnp.ones((8, 4))}}}
        >>> injection = hx.inject({"up": hx.hira(2)})
        >>> adapters = injection.init(jax.random.key(0), params)
        >>> list(adapters)
        ['mlp/up/kernel']
        >>> forward = injection.apply(lambda p, x: x @ p["mlp"]["up"]["kernel"])
        >>> forward(params, adapters, jnp.ones(4))
        Array([4., 4., 4., 4., 4., 4., 4., 4.], dtype=float32)
    """
    if not isinstance(rules, Mapping) or not rules:
        raise ConfigError(f"inject needs rules, {{pattern: adapter}}, found {rules!r}")
    made = []
    for pattern, value in rules.items():
        rule = Rule(value) if isinstance(value, Adapter) else value
        if not isinstance(pattern, str | re.Pattern) or not pattern:
            raise ConfigError(f"a pattern must be a glob or a compiled regular expression, found {pattern!r}")
        if not isinstance(rule, Rule) or not isinstance(rule.adapter, Adapter):
            raise ConfigError(
                f"the rule for {paths.text(pattern)} must be an adapter or hx.at(adapter, ...), found {value!r}"
            )
        made.append((pattern, rule))
    for used in [view, *(rule.view for _, rule in made)]:
        if used is not None:
            views.parse(used)
    return Injection(tuple(made), view, paths.as_patterns(exclude))


def from_config(config: Mapping[str, Any]) -> Injection:
    """Rebuild an injection from `Injection.to_config()`, also after a round trip through JSON.

    Raises:
        ConfigError: a part that is missing, or an adapter that is unknown.

    Example:
        >>> import hadamax as hx
        >>> injection = hx.inject({"q_proj": hx.at(hx.lora(4), layers=[0])}, view="bio")
        >>> hx.from_config(injection.to_config()).to_config() == injection.to_config()
        True
    """

    def pattern(entry: Mapping[str, Any]) -> paths.Pattern:
        return re.compile(entry["regex"], entry.get("flags", 0)) if "regex" in entry else entry["pattern"]

    known = {"version", "rules", "view", "exclude"}, {"pattern", "regex", "flags", "adapter", "view", "layers"}
    if isinstance(config, Mapping) and config.get("version", 1) != 1:
        raise ConfigError(f"an injection's configuration of version {config['version']!r}; known: 1; update hadamax")
    try:
        for part, names in [(config, known[0]), *((rule, known[1]) for rule in config["rules"])]:
            for name in part:
                if name not in names:
                    raise ConfigError(f"an injection's configuration has no {name!r}{nearest(str(name), names)}")
        rules = {}
        for rule in config["rules"]:
            if (key := pattern(rule)) in rules:
                raise ConfigError(f"pattern {paths.text(key)} stands in two rules")
            rules[key] = at(adapter_from_config(rule["adapter"]), view=rule.get("view"), layers=rule.get("layers"))
        return inject(rules, view=config.get("view"), exclude=[pattern(entry) for entry in config.get("exclude", ())])
    except (KeyError, TypeError, AttributeError, re.error) as error:
        raise ConfigError(f"not an injection's configuration: {type(error).__name__} {error}") from None
