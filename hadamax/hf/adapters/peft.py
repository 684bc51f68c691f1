"""Adapters as directories of Hugging Face PEFT, out and in; LyCORIS files and ABBA's own checkpoints, in."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hadamax import native, paths
from hadamax.adapter import Factors
from hadamax.errors import CheckpointError, ConfigError
from hadamax.files import new_directory, read_json
from hadamax.hf import families, hub
from hadamax.hf.adapters import abba_official, lycoris, peft_base, peft_config
from hadamax.hf.adapters.peft_methods import SUFFIXES, TYPES, encode, entry, suffix_of
from hadamax.hf.adapters.sites import (
    Entry,
    assemble,
    entries_of,
    folded,
    located,
    refuse_scaled,
    refuse_tied,
    rescaled,
    sites,
    unified,
)
from hadamax.hf.adapters.tensors import read_safetensors, read_torch
from hadamax.inject import Injection
from hadamax.native import Loaded
from hadamax.tensor_files import Piece, inside, write_tensors

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


def load_adapter(source: str | Path, model: families.Model, params: Any) -> Loaded:
    """Loads an adapter that others trained, for one of our models.

    Takes a PEFT directory (or a hub id) of LoRA, rsLoRA, DoRA, LoHa, HiRA, (IA)^3 or GraLoRA, a LyCORIS LoHa or LoRA
    file, and a directory of ABBA's official code; their content tells them apart. What is adapted, and with which
    ranks, is taken from the tensors; scales and flags from the configuration.

    Args:
        source: a directory, a hub id, or a LyCORIS `.safetensors` file.
        model: from `load_pretrained`.
        params: its parameters.

    Returns:
        `(injection, adapters, base)`; `base` holds the base leaves that were trained along (`modules_to_save`,
        `bias="all"`), with None for all others: `params = hx.join(base, params)` puts them in place.

    Raises:
        CheckpointError: a file that is missing, damaged, or made for another model.
        ConfigError: a method, or an option that changes the function, that is not implemented.

    Example:
        >>> import tempfile, jax, jax.numpy as jnp, hadamax as hx
        >>> from hadamax.models import Decoder, DecoderConfig
        >>> model = Decoder(DecoderConfig(64, 16, 32, 2, 4, 2, 4))
        >>> params = model.init(jax.random.key(0), jnp.zeros((1, 3), int))
        >>> injection = hx.inject({"{q,v}_proj": hx.lora(4, alpha=8)}, view=model.view)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_adapter(f"{folder}/lora", model, injection, injection.init(jax.random.key(1), params))
        ...     injection, adapters, base = load_adapter(f"{folder}/lora", model, params)
        >>> [(pattern, rule.adapter.config["alpha"]) for pattern, rule in injection.rules]
        [('layers/self_attn/{q_proj,v_proj}/kernel', 8)]
        >>> params = hx.join(base, params)
    """
    path = Path(source)
    if path.is_file():
        if (path.parent / CONFIG).exists():
            raise CheckpointError(f"{path} is one file of an adapter; give its directory")
        return Loaded(*lycoris.load(path, model, params), _nothing(params))
    top = hub.directory_of(source, (*hub.WEIGHTS, f"*{PICKLE}"))
    directory = _adapter_directory(top)
    if not (directory / CONFIG).exists():
        if (directory / native.CONFIG).is_file():
            raise CheckpointError(f"{directory} has hadamax's own format: load it with hx.load_adapters")
        if (directory / "config.json").is_file():
            raise CheckpointError(f"{directory} holds a model, no adapter: load it with hx.hf.load_pretrained")
        if (directory / WEIGHTS).is_file():
            raise CheckpointError(f"{directory} holds {WEIGHTS}, but not the {CONFIG} that belongs to it")
        files = sorted(file.name for file in directory.glob("*.safetensors"))
        if len(files) == 1:
            return Loaded(*lycoris.load(inside(directory, files[0]), model, params), _nothing(params))
        raise CheckpointError(f"{directory} holds no {CONFIG}; found {', '.join(files) or 'no safetensors file'}")

    def file(name: str) -> Path:
        return inside(top, str((directory / name).relative_to(top)))

    config = read_json(file(CONFIG))
    pickled = (directory / PICKLE).exists() and not (directory / WEIGHTS).exists()
    tensors = read_torch(file(PICKLE)) if pickled else read_safetensors(file(WEIGHTS))
    if {"r1", "r2"} <= config.keys() and str(config.get("peft_type")) not in SUFFIXES:
        return Loaded(*abba_official.load(config, tensors, model, params, directory), _nothing(params))
    peft_config.check(config, directory / CONFIG)
    factors, rest = _sorted(tensors, SUFFIXES[config["peft_type"]], directory)
    known = sites(model, paths.leaves(params))
    entries = {
        module: entry(config, module, site, found, directory)
        for (module, found), site in zip(factors.items(), located(model, params, factors, directory), strict=True)
    }
    for module in entries if config["peft_type"] == "HIRA" else ():
        refuse_scaled(model, known[module].path, directory)
    injection, adapters = assemble(model, params, entries, directory)
    if absent := sorted((peft_config.selected(config, known) or set()) - factors.keys()):
        raise CheckpointError(
            f"{directory} lacks the factors of {len(absent)} modules that target_modules names, first {absent[0]!r}"
        )
    for name in peft_config.names(config.get("modules_to_save")) or []:
        if any(f".{module}.".find(f".{name}.") >= 0 for module in known) and not any(
            f".{key}.".find(f".{name}.") >= 0 for key in rest
        ):
            raise CheckpointError(f"{directory} lacks the tensors of {name!r}, which modules_to_save names")
    return Loaded(injection, adapters, peft_base.read(rest, model, params, directory))


def _adapter_directory(directory: Path) -> Path:
    """The directory itself, or the one sub-directory of an adapter that PEFT saved by name."""
    inside = sorted(file.parent.name for file in directory.glob(f"*/{CONFIG}"))
    if (directory / CONFIG).is_file() or not inside:
        return directory
    if len(inside) > 1:
        raise CheckpointError(
            f"{directory} holds {len(inside)} adapters, {', '.join(inside)}: give the directory of one"
        )
    return directory / inside[0]


def _sorted(
    tensors: Mapping[str, np.ndarray], suffixes: Mapping[str, str], where: object
) -> tuple[dict[str, dict[str, tuple[str, np.ndarray]]], dict[str, tuple[str, np.ndarray]]]:
    """The factors by module, and the other tensors by the name that the model has for them."""
    factors: dict[str, dict[str, tuple[str, np.ndarray]]] = {}
    rest: dict[str, tuple[str, np.ndarray]] = {}
    for key, value in tensors.items():
        name = key.removeprefix(peft_base.PREFIX)
        if ".original_module." in name or ".modules_to_save." in name:
            continue  # bias="all" takes these along; what counts stands under the module's own name
        suffix = next((suffix for suffix in suffixes if name.endswith(suffix)), None)
        place, part = (
            (rest, name.replace(".base_layer.", "."))
            if suffix is None
            else (factors.setdefault(name.removesuffix(suffix), {}), suffixes[suffix])
        )
        if part in place:
            raise CheckpointError(f"{where}: {place[part][0]!r} and {key!r} are the same tensor")
        place[part] = (key, value)
    return factors, rest


def _nothing(params: Any) -> Any:
    """No base leaf was trained."""
    return paths.map_leaves(lambda path, leaf: None, params)


def save_adapter(
    directory: str | Path,
    model: families.Model,
    injection: Injection,
    adapters: Mapping[str, Factors],
    *,
    base: Any = None,
    base_model_name_or_path: str = "",
) -> None:
    """Writes a directory that `peft.PeftModel.from_pretrained` loads, whole or not at all; factors in float32.

    LoRA, rsLoRA, DoRA, LoHa, HiRA, (IA)^3 and GraLoRA; one of them, under any number of rules. Scales that PEFT cannot
    express are multiplied into a factor.

    Args:
        directory: new, or empty.
        model: the base's, which names the modules.
        injection: the rules.
        adapters: `{kernel path: factors}`.
        base: trained base leaves, as `hx.split` gives them or by path; PEFT saves whole modules, and biases.
        base_model_name_or_path: of the base, for information.

    Raises:
        ConfigError: a method or a mixture that PEFT has no form for.
        CheckpointError: a target that is not empty, a disk that refuses.

    Example: see `load_adapter`.
    """
    entries = entries_of(model, injection, adapters)
    if not entries:
        raise ConfigError("no adapters, which PEFT has no form for: save the base leaves with hx.save_adapters")
    entries = _expressible(entries, injection)
    leaves = families.expected_leaves(model)
    known = sites(model, leaves)
    tensors: dict[str, np.ndarray] = {}
    for module, (config, factors) in entries.items():
        refuse_tied(model, known[module].path, "save_adapter")
        if config["method"] == "hira":
            refuse_scaled(model, known[module].path, "save_adapter")
        for name, value in factors.items():
            key = peft_base.PREFIX + module + suffix_of(config, name, known[module].path)
            tensors[key] = np.ascontiguousarray(encode(config, name, value).astype(np.float32))
    saved, bias, held = peft_base.write(base, model, leaves, entries)
    config = peft_config.written(entries, known, saved, bias, model.task, base_model_name_or_path)
    with new_directory(directory) as temporary:
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        written = (tensors | held).items()
        pieces = [Piece(name, value.shape, value.dtype, lambda value=value: [value]) for name, value in written]
        write_tensors(temporary / WEIGHTS, pieces)


_CONVERT = "convert it with hx.convert (train.export: --as), "
_ADVICE = {"hadamard_adapter": ""}  # shifts the output, which no method of PEFT does


def _expressible(entries: Mapping[str, Entry], injection: Injection) -> dict[str, Entry]:
    """The entries as one PEFT configuration can say them."""
    for entry_ in entries.values():
        if (method := entry_.config["method"]) not in TYPES:
            raise ConfigError(
                f"PEFT has no {method}: {_ADVICE.get(method, _CONVERT)}merge it, or keep it with hx.save_adapters"
                " (train.export: --adapter native)"
            )
    kinds = {(e.config["method"], e.config.get("rslora", False), e.config.get("blocks")) for e in entries.values()}
    if len(kinds) > 1:
        rules = ", ".join(
            f"{paths.text(pattern)}: {rule.adapter.config['method']}"
            + " (rslora)" * rule.adapter.config.get("rslora", 0)
            for pattern, rule in injection.rules
        )
        raise ConfigError(f"one PEFT directory holds one method, found {rules}: save each rule on its own")
    method = next(iter(kinds))[0]
    if method in ("hira", "gralora"):  # one rank for all modules (peft 0.21's HiRA ignores its rank_pattern), one scale
        config, factors = unified(list(entries.values()))
        if method == "hira":
            factors = [folded(method, f, config["scale"]) for f in factors]
            config = rescaled(config, 1.0)
        entries = {name: Entry(config, f) for name, f in zip(entries, factors, strict=True)}
    return dict(entries)
