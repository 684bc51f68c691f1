"""hadamax's own adapter directory, for every method: Hugging Face PEFT has no ABBA, BoHA or Hadamard Adapter.

    hadamax_adapter.safetensors     `adapters:<kernel path>:<factor>` and `base:<path>`, in their own dtypes
    hadamax_adapter.json            {"format", "version", "hadamax": the library's version,
                                     "injection": `Injection.to_config()`, or null where only base leaves train,
                                     "base": {"config": JSON or null,
                                              "weights": {path: {"shape": [...], "fingerprint": "0123abcd"}}}}

`<factor>` is the "/"-joined path in the factors' tree: `a`, `0/b`. The weights of the base are all its floating-point
leaves but those that were trained and are stored themselves; see `hadamax.fingerprint`.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hadamax import paths, stacks
from hadamax.adapter import Factors
from hadamax.errors import BaseMismatchError, CheckpointError, ConfigError, HadamaxError, nearest
from hadamax.files import new_directory, read_json
from hadamax.fingerprint import fingerprint, weights
from hadamax.inject import Injection, from_config
from hadamax.rules import exact
from hadamax.tensor_files import DTYPES, NAMES, Piece, Stored, inside, read_header, write_tensors
from hadamax.version import __version__

WEIGHTS, CONFIG = "hadamax_adapter.safetensors", "hadamax_adapter.json"  # names that PEFT's loader does not look for
_MOST_WILDCARDS = 6  # matching takes at most (characters of the path)^6 / 6! steps: seconds
FORMAT, VERSION = "hadamax adapter", 1


class Loaded(NamedTuple):
    """What `load_adapters` and `hf.load_adapter` return.

    Attributes:
        injection: the rules; without any where only base leaves were trained.
        adapters: `{kernel path: factors}`.
        base: the trained base leaves, as `hx.split` gives them: the tree of `params` with None at all other leaves.
    """

    injection: Injection
    adapters: dict[str, Factors]
    base: Any


def save_adapters(
    directory: str | Path,
    injection: Injection | None,
    adapters: Mapping[str, Factors],
    params: Any,
    *,
    base: Any = None,
    model_config: Mapping[str, Any] | None = None,
) -> None:
    """Writes adapters of any method, with the identity of the base that they were trained on.

    The directory appears whole or not at all. Factors keep their dtypes; values that are not finite are kept, too
    (`merge` refuses them).

    Args:
        injection: the rules; None where only base leaves were trained.
        adapters: `{kernel path: factors}`, on any devices of this process.
        params: the base. Its weights are read once, on their devices, for their fingerprints. Leaves that `base` has
            may hold any values.
        base: trained base leaves, with None at the others, as `hx.split` gives them.
        model_config: JSON values that decide what the base computes from its weights and their shapes, such as
            `rope_theta`; leave the dtype out, or the adapters fit only a base loaded in that dtype.

    Raises:
        ConfigError: adapters made for other kernels, by an adapter that is not hadamax's own, or nothing to save.
        CheckpointError: the target exists and is not empty, or the disk refuses.

    Example:
        >>> import tempfile, jax, jax.numpy as jnp, hadamax as hx
        >>> params = {"up": {"kernel": jnp.ones((4, 8))}}
        >>> injection = hx.inject({"up": hx.boha(4, blocks=2)})
        >>> adapters = injection.init(jax.random.key(0), params)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     hx.save_adapters(folder, injection, adapters, params)
        ...     loaded = hx.load_adapters(folder, params)
        >>> bool((loaded.adapters["up/kernel"]["a"] == adapters["up/kernel"]["a"]).all())
        True
    """
    injection = Injection(()) if injection is None else injection
    injection.checked(params, adapters)
    if not all(map(_quick, _patterns(injection))):
        injection = exact(injection, params)
    trained = {path: leaf for path, leaf in paths.leaves(base).items() if leaf is not None}
    if not adapters and not trained:
        raise ConfigError("no adapters and no trained base leaves: there is nothing to save")
    _check_trained(trained, params)
    tensors = [_piece(name, leaf) for name, leaf in _named(adapters, trained).items()]
    frozen = {path: leaf for path, leaf in weights(params).items() if path not in trained}
    digests = fingerprint(frozen)
    config = {
        "format": FORMAT,
        "version": VERSION,
        "hadamax": __version__,
        "injection": injection.to_config() if injection.rules else None,
        "base": {
            "config": None if model_config is None else dict(model_config),
            "weights": {
                path: {"shape": list(leaf.shape), "fingerprint": digests[path]} for path, leaf in frozen.items()
            },
        },
    }
    try:
        text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the configuration is no JSON: {error}") from None
    _injection(json.loads(text)["injection"])  # what could not be read back is not written
    with new_directory(directory) as temporary:
        write_tensors(temporary / WEIGHTS, tensors)
        (temporary / CONFIG).write_text(text, encoding="utf-8")


def load_adapters(
    directory: str | Path,
    params: Any,
    *,
    model_config: Mapping[str, Any] | None = None,
    check_base: bool = True,
) -> Loaded:
    """Reads what `save_adapters` wrote, and checks that `params` is the base it was trained on.

    The base may be loaded in float32, bfloat16 or float64, and sharded in any way; float16 rounds otherwise and counts
    as another base.

    Args:
        params: the base. The parameters in use are `hx.join(loaded.base, params)`.
        model_config: compared with the saved one, where both are given.
        check_base: False goes on with another base whose kernels fit; its weights are not read then.

    Raises:
        CheckpointError: a file that is missing or damaged or was written by a newer hadamax; a tensor that is missing,
            unexpected, or of another shape or dtype than its kernel asks for.
        BaseMismatchError: another base; what differs is named.
        NoMatchError, NotAMatrixError, ViewError, ConfigError: under `check_base=False`, rules that do not fit `params`.
    """
    directory = Path(directory)
    config, file = _read_config(directory), inside(directory, WEIGHTS)
    headers = read_header(file)
    stored = {name.removeprefix("base:") for name in headers if name.startswith("base:")}
    if check_base:
        _check_structure(directory, config["base"], params, stored, model_config)
    injection, leaves = config["injection"], paths.leaves(params)
    like = {path: stacks.factors_like(leaves, target) for path, target in _targets(injection, params, file).items()}
    if odd := sorted(stored - leaves.keys()):
        raise CheckpointError(f"{file} has a trained base leaf {odd[0]!r} that the parameters lack")
    _check_headers(file, headers, _named(like, {path: leaves[path] for path in leaves if path in stored}))
    if check_base:
        _check_weights(directory, config["base"], params)
    arrays = {name: jnp.asarray(tensor.read()) for name, tensor in headers.items()}

    def factors(path: str) -> Factors:
        return jax.tree_util.tree_map_with_path(lambda keys, _: arrays[_factor_name(path, keys)], like[path])

    base = paths.map_leaves(lambda path, _: arrays.get(f"base:{path}"), params)
    return Loaded(injection, {path: factors(path) for path in like}, base)


def _factor_name(path: str, keys: Any) -> str:
    return f"adapters:{path}:{jax.tree_util.keystr(keys, simple=True, separator='/')}"


def _named(adapters: Mapping[str, Factors], trained: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves by the names of their tensors."""
    flat = {path: jax.tree_util.tree_flatten_with_path(factors)[0] for path, factors in adapters.items()}
    named = {_factor_name(path, keys): leaf for path, factors in flat.items() for keys, leaf in factors}
    return named | {f"base:{path}": leaf for path, leaf in trained.items()}


def _piece(name: str, leaf: Any) -> Piece:
    if (dtype := np.dtype(leaf.dtype)) not in NAMES:
        raise ConfigError(f"{name}: only float64, float32, float16 and bfloat16 are stored, found {leaf.dtype}")
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        raise ConfigError(f"{name} lies on several processes; replicate it before it is saved")
    return Piece(name, tuple(leaf.shape), dtype, lambda: [np.asarray(leaf)])


def _check_trained(trained: Mapping[str, Any], params: Any) -> None:
    leaves = paths.leaves(params)
    for path, leaf in trained.items():
        if path not in leaves:
            raise ConfigError(f"base has {path!r}, which the parameters lack{nearest(path, leaves)}")
        if leaf.shape != leaves[path].shape:
            raise ConfigError(f"base has {path!r} of shape {leaf.shape}, the parameters of {leaves[path].shape}")


def _read_config(directory: Path) -> dict[str, Any]:
    """The configuration with its injection rebuilt; nothing in it is trusted."""
    if directory.is_file():
        raise CheckpointError(f"{directory} is a file; give its directory")
    if not directory.is_dir():
        raise CheckpointError(f"no directory at {directory}")
    path = directory / CONFIG
    if not path.is_file():
        hint = (
            "; this is a PEFT adapter: load it with hx.hf.load_adapter"
            if (directory / "adapter_config.json").is_file()
            else ""
        )
        raise CheckpointError(f"{directory} holds no {CONFIG}{hint}")
    config = read_json(inside(directory, CONFIG))
    version = config.get("version")
    if config.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no hadamax adapter: its format is {config.get('format')!r}")
    if type(version) is int and version > VERSION:
        raise CheckpointError(f"{path} has format version {version}, newer than {VERSION}: update hadamax to read it")
    if type(version) is not int or version != VERSION:
        raise CheckpointError(f"{path} has format version {version!r}, expected {VERSION}")
    _check_keys(path, "the file", config, {"format", "version", "hadamax", "injection", "base"})
    _check_keys(path, "base", config["base"], {"config", "weights"})
    table, model = config["base"]["weights"], config["base"]["config"]
    if not isinstance(table, dict) or not (model is None or isinstance(model, dict)):
        raise CheckpointError(f"{path}: base.weights must be an object, and base.config an object or null")
    for name, entry in table.items():
        _check_keys(path, f"base.weights, {name!r}", entry, {"shape", "fingerprint"})
    try:
        return {**config, "injection": _injection(config["injection"])}
    except HadamaxError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (ValueError, TypeError, ArithmeticError, RecursionError) as error:  # absurd flags, numbers or nesting
        raise CheckpointError(f"{path}: not an injection's configuration: {_line(error)}") from None


def _check_keys(path: Path, where: str, found: Any, known: set[str]) -> None:
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: {where} must be an object, found {found!r}")
    if unknown := sorted(found.keys() - known):
        raise CheckpointError(f"{path}: {where} has an unknown entry {unknown[0]!r}{nearest(unknown[0], known)}")
    if missing := sorted(known - found.keys()):
        raise CheckpointError(f"{path}: {where} has no {missing[0]!r}")


def _injection(config: Any) -> Injection:
    if config is None:
        return Injection(())
    injection = from_config(config)
    for pattern in _patterns(injection):
        if not _quick(pattern):
            raise ConfigError(
                f"pattern {paths.text(pattern)} could take for ever to match; give the kernels' own paths"
            )
    return injection


def _patterns(injection: Injection) -> list[paths.Pattern]:
    return [*(pattern for pattern, _ in injection.rules), *injection.exclude]


def _quick(pattern: paths.Pattern) -> bool:
    """Whether matching takes no long time, whoever wrote the pattern: globs of few wildcards, escaped literal paths."""
    if isinstance(pattern, str):
        groups = [group.split(",") for group in re.findall(r"\{([^{}]*)\}", pattern)]
        plain = all(not set("*?") & set("".join(names)) and len(set(names)) == len(names) for names in groups)
        return plain and len(re.findall(r"\*+|[?{]", pattern)) <= _MOST_WILDCARDS
    return re.escape(re.sub(r"\\(.)", r"\1", pattern.pattern)) == pattern.pattern


def _targets(injection: Injection, params: Any, file: Path) -> dict[str, Any]:
    try:
        return injection.targets(params)
    except (RecursionError, OverflowError) as error:
        raise CheckpointError(f"{file.with_name(CONFIG)}: rules that cannot be used: {_line(error)}") from None


def _check_headers(file: Path, headers: Mapping[str, Stored], expected: Mapping[str, Any]) -> None:
    for name, leaf in expected.items():
        if name not in headers:
            raise CheckpointError(f"{file} lacks tensor {name!r} of shape {tuple(leaf.shape)}")
    for name, tensor in headers.items():
        shape, dtype = tensor.shape, tensor.dtype
        if name not in expected:
            raise CheckpointError(f"{file} has tensor {name!r} of shape {shape}, which no rule of its own asks for")
        if shape != tuple(expected[name].shape):
            raise CheckpointError(f"tensor {name!r} in {file}: expected shape {expected[name].shape}, found {shape}")
        if dtype not in DTYPES:
            raise CheckpointError(f"tensor {name!r} in {file}: dtype {dtype} is none of {', '.join(DTYPES)}")
        if dtype == "F64" and not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
            raise CheckpointError(f"tensor {name!r} in {file} is float64; load it under jax.enable_x64(True)")


_GO_ON = "load the base that they were trained on, or pass check_base=False to go on"


def _check_structure(
    directory: Path, base: Mapping[str, Any], params: Any, stored: set[str], model_config: Mapping[str, Any] | None
) -> None:
    saved = {path: entry["shape"] for path, entry in base["weights"].items()}
    found = {path: list(leaf.shape) for path, leaf in weights(params).items() if path not in stored}
    if odd := sorted(saved.keys() ^ found.keys()):
        lacking, extra = sorted(saved.keys() - found.keys()), sorted(found.keys() - saved.keys())
        what = f"the base lacks {lacking[0]!r}" if lacking else f"the base has {extra[0]!r}, which theirs had not"
        raise BaseMismatchError(
            f"the adapters in {directory} are for another base: {what} ({len(odd)} paths differ; were its layers"
            f" stacked otherwise?); {_GO_ON}"
        )
    for path, shape in found.items():
        if saved[path] != shape:
            raise BaseMismatchError(
                f"the adapters in {directory} are for another base: {path!r} has shape {tuple(shape)}, theirs had"
                f" {saved[path]}; {_GO_ON}"
            )
    if model_config is None or base["config"] is None:
        return
    given = json.loads(json.dumps(dict(model_config)))  # tuples become lists, as in the file
    for name in sorted(given.keys() | base["config"].keys()):
        here, theirs = given.get(name), base["config"].get(name)
        if here != theirs:
            raise BaseMismatchError(
                f"the adapters in {directory} are for another base: its {name!r} is {here!r}, theirs was {theirs!r};"
                f" {_GO_ON}"
            )


def _check_weights(directory: Path, base: Mapping[str, Any], params: Any) -> None:
    saved = {path: entry["fingerprint"] for path, entry in base["weights"].items()}
    found = fingerprint({path: leaf for path, leaf in weights(params).items() if path in saved})
    if differing := [path for path in found if found[path] != saved[path]]:
        raise BaseMismatchError(
            f"the adapters in {directory} are for another base: {len(differing)} of {len(found)} weights differ from"
            f" theirs, {differing[0]!r} first; {_GO_ON}"
        )


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
