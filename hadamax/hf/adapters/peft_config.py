"""`adapter_config.json` of Hugging Face PEFT: what may stand there, which modules it names, how ours is written."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from hadamax.errors import ConfigError
from hadamax.hf.adapters.peft_methods import TYPES, pattern_value
from hadamax.hf.adapters.sites import Entry

# Keys that are read, or that do not change the function of a trained adapter. Any other key must be off (None, False,
# 0 or empty, as every default of peft 0.21 that is not listed is), or it is refused by name.
_COMMON = (
    "peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode r target_modules"
    " exclude_modules modules_to_save layers_to_transform layers_pattern rank_pattern fan_in_fan_out"
)
_KNOWN = {
    "LORA": "lora_alpha alpha_pattern use_rslora use_dora bias lora_dropout init_lora_weights eva_config runtime_config"
    " megatron_core qalora_group_size ensure_weight_tying",
    "LOHA": "alpha alpha_pattern rank_dropout module_dropout use_effective_conv2d init_weights",
    "HIRA": "hira_dropout init_weights",
    "IA3": "feedforward_modules init_ia3_weights",
    "GRALORA": "alpha gralora_k gralora_dropout bias init_weights",
}
_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")  # the others change the base weights
_TASKS = {
    "causal_lm": "CAUSAL_LM",
    "sequence_classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    **dict.fromkeys(("hidden", "pooled", "sentence_embedding"), "FEATURE_EXTRACTION"),
}
HEADS = ("classifier", "score")  # PEFT saves these for the classification tasks, asked or not


def check(config: Mapping[str, Any], where: object) -> None:
    """Refuses by name what would change the function and is not implemented.

    Raises:
        ConfigError: another method, an option that is not implemented, or an unknown key that is set.
    """
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in _KNOWN:
        raise ConfigError(f"{where}: peft_type {kind!r} is not implemented; implemented: {', '.join(_KNOWN)}")
    known = {*_COMMON.split(), *_KNOWN[kind].split()}
    for name, value in config.items():
        if value and name not in known:
            raise ConfigError(f"{where}: {name} = {value!r} of a {kind} adapter is not implemented")
    for name in ("use_rslora", "use_dora"):
        if not isinstance(config.get(name, False), bool):
            raise ConfigError(f"{where}: {name} must be true or false, found {config[name]!r}")
    init = config.get("init_lora_weights")
    if not isinstance(init, bool | str | None) or init not in _INITS:
        raise ConfigError(
            f"{where}: init_lora_weights {init!r} means that the base weights were changed, too; save the adapter with"
            " PEFT's path_initial_model_for_weight_conversion"
        )


def layer_of(module: str) -> int | None:
    """The layer's number as PEFT finds it without a `layers_pattern`."""
    found = re.match(r".*?\.[^.]*\.(\d+)\.", module)
    return int(found[1]) if found else None


def names(value: Any) -> list[str] | None:
    """A list of plain strings; None for anything else."""
    if value is None:
        return []
    return value if isinstance(value, list) and all(isinstance(name, str) for name in value) else None


def selected(config: Mapping[str, Any], modules: Iterable[str]) -> set[str] | None:
    """The modules that a configuration names by lists, as PEFT's `check_target_module_exists` decides.

    None where it names them by regular expressions, which a file that is not trusted should not get to run.
    """
    targets, excluded, saved, layers = (
        names(config.get(name)) for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern")
    )
    wanted = config.get("layers_to_transform")
    wanted = [wanted] if isinstance(wanted, int) else wanted or []
    if not targets or excluded is None or saved is None or layers or layers is None or not isinstance(wanted, list):
        return None

    def ends(module: str, endings: Iterable[str]) -> bool:
        return any(f".{module}".endswith(f".{name}") for name in endings)

    return {
        module
        for module in modules
        if ends(module, targets)
        and not ends(module, excluded)
        and not any(f".{name}." in f".{module}." for name in saved)
        and (not wanted or layer_of(module) in wanted)
    }


def shortest(wanted: Iterable[str], others: Collection[str], separator: str = ".") -> list[str]:
    """Endings of the wanted names that no other name has.

    Example:
        >>> shortest(["a.0.up", "a.1.up"], ["a.0.down"]), shortest(["a.0.up"], ["a.1.up"])
        (['up'], ['0.up'])
    """
    found: dict[str, None] = {}
    for name in wanted:
        parts = name.split(".")
        endings = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        if not any(ending in found for ending in endings):
            free = (e for e in endings if not any(f"{separator}{o}".endswith(f"{separator}{e}") for o in others))
            found[next(free, name)] = None
    return list(found)


def written(
    entries: Mapping[str, Entry], modules: Collection[str], saved: list[str], bias: str, task: str, base_model: str
) -> dict[str, Any]:
    """The configuration under which PEFT adapts exactly the entries' modules, with their ranks and scales.

    Args:
        entries: by module, all of one PEFT type.
        modules: all modules of the model that hold a matrix.
        saved: `modules_to_save`.
        bias: "none", "all" or "only".
        task: of the model.

    Raises:
        ConfigError: modules that PEFT's rules cannot tell apart.
    """
    first = next(iter(entries.values())).config
    kind = TYPES[first["method"]]
    task_type = _TASKS.get(task)
    if task_type in ("SEQ_CLS", "TOKEN_CLS") and not any(name in saved for name in HEADS):
        task_type = None  # with it, PEFT insists on the head's own tensors
    config: dict[str, Any] = {
        "peft_type": kind,
        "task_type": task_type,
        "base_model_name_or_path": base_model or None,
        "inference_mode": True,
        "modules_to_save": saved or None,
        **_targets(list(entries), modules, kind != "IA3"),
    }
    if kind != "IA3":
        config |= _pattern("r", "rank_pattern", {name: entry.config["rank"] for name, entry in entries.items()})
    if kind in ("LORA", "LOHA"):
        key = "lora_alpha" if kind == "LORA" else "alpha"
        config |= _pattern(key, "alpha_pattern", {name: entry.config["alpha"] for name, entry in entries.items()})
    if kind == "LORA":
        config |= {"use_rslora": first.get("rslora", False), "use_dora": first["method"] == "dora"}
    if kind in ("LORA", "GRALORA"):
        config["bias"] = f"{kind.lower()}_only" if bias == "only" else bias
    if kind in ("LORA", "HIRA", "GRALORA"):
        config["fan_in_fan_out"] = False
    if kind == "GRALORA":
        config |= {"alpha": first["alpha"], "gralora_k": first["blocks"]}
        del config["rank_pattern"]
    if kind == "IA3":
        inputs = [name for name, entry in entries.items() if entry.config["position"] == "input"]
        outputs = [name for name in entries if name not in inputs]
        rest = [name for name in modules if name not in entries]
        config["feedforward_modules"] = shortest(inputs, [*rest, *outputs], "")
        names = [*config["feedforward_modules"], *shortest(outputs, [*rest, *inputs])]
        config["target_modules"] = list(dict.fromkeys(names))
    if selected(config, modules) != set(entries):
        raise ConfigError("PEFT cannot name these modules apart from the others: leave out what trains otherwise")
    return config


def _targets(wanted: list[str], modules: Collection[str], by_layer: bool) -> dict[str, Any]:
    """`target_modules`, and `layers_to_transform` where that says it shorter."""
    chosen = set(wanted)
    plain = shortest(wanted, [name for name in modules if name not in chosen])
    layers = {layer_of(name) for name in wanted}
    if by_layer and None not in layers:
        inside = [name for name in modules if name not in chosen and layer_of(name) in layers]
        if len("".join(short := shortest(wanted, inside))) < len("".join(plain)):
            return {"target_modules": short, "layers_to_transform": sorted(n for n in layers if n is not None)}
    return {"target_modules": plain}


def _pattern(key: str, pattern_key: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The most common value, and patterns for the others."""
    default = Counter(values.values()).most_common(1)[0][0]
    patterns: dict[str, Any] = {}
    for value in dict.fromkeys(values.values()):
        if value != default:
            modules = [name for name in values if values[name] == value]
            patterns |= dict.fromkeys(shortest(modules, [name for name in values if values[name] != value]), value)
    if any(pattern_value(patterns, name, default) != value for name, value in values.items()):
        patterns = {f"^{re.escape(name)}": value for name, value in values.items() if value != default}
    return {key: default, pattern_key: patterns}
