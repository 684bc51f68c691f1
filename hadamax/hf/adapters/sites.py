"""Adapters by the module names of Hugging Face, one matrix each, and as an injection into our (stacked) parameters."""

import functools
import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from hadamax import paths
from hadamax.adapter import Factors, Linear
from hadamax.config import adapter_from_config
from hadamax.convert import scale_of
from hadamax.errors import CheckpointError, ConfigError, nearest
from hadamax.hf import families
from hadamax.inject import Injection, at, inject
from hadamax.methods.products import wide

MATRICES = ("kernel", "embedding")
FOLDED = {"lora": "b", "dora": "b", "hira": "b", "gralora": "b", "loha": "a2"}  # the factor that starts at zero


class Site(NamedTuple):
    """Where a module's weight stands in our parameters."""

    path: str
    layer: int | None  # index on the leaf's first axis, None where the leaf is the matrix
    shape: tuple[int, int]  # [in, out]


class Entry(NamedTuple):
    """The adapter of one matrix: its configuration (`hadamax.config`) and factors in our orientation."""

    config: Mapping[str, Any]
    factors: Mapping[str, np.ndarray]


def sites(model: families.Model, leaves: Mapping[str, Any]) -> dict[str, Site]:
    """The modules of a model that hold a matrix, by the name that transformers gives them.

    Example:
        >>> from hadamax.models import Decoder, DecoderConfig
        >>> model = Decoder(DecoderConfig(64, 16, 32, 2, 4, 2, 4))
        >>> sites(model, families.expected_leaves(model))["model.layers.1.mlp.up_proj"]
        Site(path='layers/mlp/up_proj/kernel', layer=1, shape=(16, 32))
    """
    matrices = [path for path in leaves if path.rpartition("/")[2] in MATRICES]
    return {
        tensor.name.removesuffix(".weight"): Site(path, tensor.layer, tuple(leaves[path].shape[-2:]))
        for path, tensors in families.tensors(model, matrices).items()
        for tensor in tensors
    }


def is_tied(model: families.Model, path: str) -> bool:
    """Whether an embedding is also the model's head."""
    tied = model.task == "masked_lm" or (model.task == "causal_lm" and model.config.tie_word_embeddings)
    return tied and path.rpartition("/")[0].endswith(("embed_tokens", "word_embeddings"))


def refuse_scaled(model: families.Model, path: str, where: object) -> None:
    """PEFT 0.21's HiRA leaves the scale of a scaled embedding out of its forward, though not out of its merge."""
    if getattr(model.config, "scale_embeddings", False) and path.endswith("embed_tokens/embedding"):
        raise CheckpointError(f"{where}: {path}: PEFT's HiRA of a scaled embedding is another one unmerged than merged")


def refuse_tied(model: families.Model, path: str, where: object) -> None:
    """PEFT changes the lookup or the head of a tied pair, which is one matrix here."""
    if is_tied(model, path):
        raise CheckpointError(
            f"{where}: {path} is also the model's head (tie_word_embeddings), of which PEFT changes the lookup alone:"
            " use a base with a head of its own"
        )


@functools.cache
def factor_shapes(config: tuple[tuple[str, Any], ...], shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """The shapes that a method's factors have for a matrix; ConfigError where they cannot fit."""
    adapter = adapter_from_config(dict(config))
    factors = jax.eval_shape(lambda key: adapter.init(key, Linear(jnp.zeros(shape))), jax.random.key(0))
    return {name: tuple(leaf.shape) for name, leaf in factors.items()}


def located(model: families.Model, params: Any, modules: Collection[str], where: object) -> list[Site]:
    """The sites of modules that a file adapts.

    Raises:
        CheckpointError: none, modules that the model lacks, or a tied embedding.
    """
    known = sites(model, paths.leaves(params))
    if unknown := [name for name in modules if name not in known]:
        raise CheckpointError(
            f"{where} adapts {len(unknown)} modules that the model lacks, first {', '.join(map(repr, unknown[:3]))}"
            + ("; the head is tied to the embedding" if unknown[0] == "lm_head" else nearest(unknown[0], known, n=1))
        )
    if not modules:
        raise CheckpointError(f"{where} adapts no module")
    for name in modules:
        refuse_tied(model, known[name].path, where)
    return [known[name] for name in modules]


def assemble(
    model: families.Model, params: Any, entries: Mapping[str, Entry], where: object
) -> tuple[Injection, dict[str, Factors]]:
    """An injection, and its adapters, that compute what the entries say.

    Layers stacked in one kernel share a rank and a scale there: smaller factors are padded with zeros, which stay zero
    in training, and a differing scale is multiplied into the factor that starts at zero.

    Args:
        entries: by module name.
        where: the file, for messages.

    Raises:
        CheckpointError: what `located` refuses; layers of one kernel that differ in more than rank and scale.
    """
    leaves = paths.leaves(params)
    stacks: dict[str, dict[int, Entry]] = {}
    for entry, site in zip(entries.values(), located(model, params, entries, where), strict=True):
        stacks.setdefault(site.path, {})[site.layer or 0] = entry
    groups: dict[tuple[Any, ...], list[str]] = {}
    adapters: dict[str, Factors] = {}
    for path in [path for path in leaves if path in stacks]:
        layers = sorted(stacks[path])
        stacked = leaves[path].ndim == 3
        config, factors = _common([stacks[path][layer] for layer in layers], path, where)
        dtype = wide(leaves[path].dtype)
        adapters[path] = {
            name: jnp.asarray(np.stack([f[name] for f in factors]) if stacked else factors[0][name], dtype)
            for name in factors[0]
        }
        some = tuple(layers) if stacked and len(layers) < leaves[path].shape[0] else None
        groups.setdefault((tuple(config.items()), some), []).append(path)
    rules: dict[paths.Pattern, Any] = {
        pattern: at(adapter_from_config(dict(config)), layers=layers)
        for (config, layers), group in groups.items()
        for pattern in patterns(group, leaves)
    }
    injection = inject(rules, view=model.view)
    if injection.targets(params).keys() != adapters.keys():  # would be a defect of `patterns`
        raise AssertionError("the rules select other kernels than the file adapts")
    return injection, adapters


def _common(entries: list[Entry], path: str, where: object) -> tuple[dict[str, Any], list[dict[str, np.ndarray]]]:
    """One configuration for the layers of a kernel, and their factors under it."""
    free = {"rank", "alpha", "scale"}
    rest = [{name: value for name, value in entry.config.items() if name not in free} for entry in entries]
    if any(other != rest[0] for other in rest):
        raise CheckpointError(
            f"{where}: the layers of {path} differ in more than rank and scale, which one stacked kernel cannot hold;"
            " load the model with scan_layers=False"
        )
    return unified(entries)


def unified(entries: list[Entry]) -> tuple[dict[str, Any], list[dict[str, np.ndarray]]]:
    """One configuration for adapters of one method that differ in rank and scale, and their factors under it.

    The rank is the largest: further columns and rows are zero, and stay so, as each has the other for its gradient.
    The scale is the most common one; the factor that starts at zero takes the rest.

    Example:
        >>> ones = lambda rank: {"a": np.ones((3, rank)), "b": np.ones((rank, 2))}
        >>> entries = [Entry({"method": "lora", "rank": r, "alpha": 4, "rslora": False}, ones(r)) for r in (2, 1)]
        >>> config, factors = unified(entries)
        >>> config["alpha"], factors[1]["b"].tolist()
        (4, [[2.0, 2.0], [0.0, 0.0]])
    """
    configs = [dict(entry.config) for entry in entries]
    if all(config == configs[0] for config in configs):
        return configs[0], [dict(entry.factors) for entry in entries]
    if configs[0]["method"] not in FOLDED:
        raise AssertionError(f"{configs[0]['method']} has no rank")
    scales = [scale_of(config) for config in configs]
    rank, scale = max(config["rank"] for config in configs), Counter(scales).most_common(1)[0][0]
    more = [(rank - config["rank"]) // config.get("blocks", 1) for config in configs]
    factors = [
        folded(config["method"], {name: _padded(name, f, n) for name, f in entry.factors.items()}, own / scale)
        for config, entry, own, n in zip(configs, entries, scales, more, strict=True)
    ]
    return rescaled({**configs[0], "rank": rank}, scale), factors


def _padded(name: str, factor: np.ndarray, more: int) -> np.ndarray:
    """A factor `a [..., in, r]` or `b [..., r, out]` of `more` ranks; other factors have none."""
    if not more or factor.ndim < 2:
        return factor
    widths = [(0, 0)] * factor.ndim
    widths[-1 if name[0] == "a" else -2] = (0, more)
    return np.pad(factor, widths)


def rescaled(config: dict[str, Any], scale: float) -> dict[str, Any]:
    """The configuration with this scale."""
    if config["method"] == "hira":
        return {**config, "scale": scale}
    return {**config, "alpha": neat(scale * (config["rank"] ** 0.5 if config.get("rslora") else config["rank"]))}


def folded(method: str, factors: Mapping[str, np.ndarray], scale: float) -> dict[str, np.ndarray]:
    """The factors with a scale multiplied in."""
    name = FOLDED[method]
    return {**factors, name: factors[name] * np.asarray(scale, factors[name].dtype) if scale != 1 else factors[name]}


def neat(value: float) -> int | float:
    """A whole number as an integer, as it is written by hand."""
    return int(value) if float(value).is_integer() else float(value)


def patterns(group: list[str], leaves: Mapping[str, Any]) -> list[str]:
    """A few globs that select exactly these paths.

    Example:
        >>> kernels = [f"layers_{i}/mlp/{name}/kernel" for i in range(2) for name in ("up", "down")]
        >>> patterns(kernels, dict.fromkeys(kernels))
        ['layers_*/mlp/{up,down}/kernel']
        >>> patterns(kernels[:2] + kernels[3:], dict.fromkeys(kernels))
        ['layers_0/mlp/{up,down}/kernel', 'layers_1/mlp/down/kernel']
    """
    parts: list[tuple[tuple[str, ...], ...]] = [tuple((part,) for part in path.split("/")) for path in group]
    for axis in range(max(map(len, parts)) - 1, -1, -1):
        merged: dict[Any, tuple[tuple[str, ...], ...]] = {}
        for names in parts:
            if axis >= len(names):
                merged[names, None] = names
                continue
            key = (names[:axis], names[axis + 1 :])
            before = merged[key][axis] if key in merged else ()
            merged[key] = (*names[:axis], before + names[axis], *names[axis + 1 :])
        parts = list(merged.values())
    found = []
    for names in parts:
        exact = "/".join(_glob(alternatives) for alternatives in names)
        short = re.sub(r"\{(\w+_)\d+(,\1\d+)+\}", r"\1*", exact)
        found.append(short if _selects(short, leaves) == _selects(exact, leaves) else exact)
    return found


def _glob(alternatives: tuple[str, ...]) -> str:
    return alternatives[0] if len(alternatives) == 1 else "{" + ",".join(alternatives) + "}"


def _selects(pattern: str, leaves: Mapping[str, Any]) -> set[str]:
    regex = paths.compile_pattern(pattern if "/" in pattern else f"/{pattern}")
    return {path for path in leaves if regex.fullmatch(path)}


def entries_of(model: families.Model, injection: Injection, adapters: Mapping[str, Factors]) -> dict[str, Entry]:
    """The inverse of `assemble`: the adapter of each module, in the model's order.

    Raises:
        ConfigError: adapters that other rules made, a kernel of another view than the model's.
    """
    leaves = families.expected_leaves(model)
    shapes = {"params": unflatten_dict(leaves, sep="/")}
    targets = injection.targets(shapes)
    expected = jax.eval_shape(injection.init, jax.random.key(0), shapes)
    if not isinstance(adapters, Mapping) or expected.keys() != adapters.keys():
        raise ConfigError("the adapters were made by other rules, or for another model, than this injection's")
    entries = {}
    for name, site in sites(model, leaves).items():
        if site.path not in targets:
            continue
        target, factors = targets[site.path], adapters[site.path]
        view = "".join(label[0] for label in target.axes)
        if view not in ("io", "bio"):
            raise ConfigError(f"{site.path}: a rule of view {view!r} has no form in these files; the model's is 'bio'")
        wanted = jax.tree.map(lambda leaf: leaf.shape, expected[site.path])
        found = jax.tree.map(lambda leaf: tuple(np.shape(leaf)), factors)
        if wanted != found:
            raise ConfigError(f"{site.path}: the factors should have shapes {wanted}, found {found}")
        if target.layers is not None and site.layer is not None and site.layer not in target.layers:
            continue
        index: Any = ()
        if site.layer is not None:
            index = site.layer if target.layers is None else target.layers.index(site.layer)
        # the tuples of combinators have no names; the caller refuses their method
        flat = {key: np.asarray(leaf[index]) for key, leaf in factors.items()} if isinstance(factors, Mapping) else {}
        entries[name] = Entry(dict(target.adapter.config), flat)
    return entries
