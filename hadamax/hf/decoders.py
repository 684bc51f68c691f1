"""Decoder families: `config.json` as a `DecoderConfig`, and back."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from hadamax.errors import ConfigError, MergeError
from hadamax.models import DecoderConfig, Llama3Rope


def read_llama(config: Mapping[str, Any]) -> DecoderConfig:
    """The config of a Llama, from the keys that transformers 4 or 5 write (None counts as absent).

    Raises:
        ConfigError: a missing key, or a feature that is not implemented (named in the message).
    """
    if config.get("attention_dropout", 0):
        raise ConfigError(f"attention_dropout {config['attention_dropout']} is not implemented; set it to 0")
    fields = {field.name for field in dataclasses.fields(DecoderConfig)} - {"rope_theta", "rope_scaling", "dtype"}
    known = {name: config[name] for name in fields if name in config}
    heads, width = known.get("num_attention_heads"), known.get("hidden_size")
    known.setdefault("num_key_value_heads", heads)
    if isinstance(heads, int) and isinstance(width, int) and heads > 0:
        known.setdefault("head_dim", width // heads)
    known.setdefault("head_dim", 0)  # where the sizes that it follows from are missing or bad, they are refused
    required = [
        f.name for f in dataclasses.fields(DecoderConfig) if f.default is dataclasses.MISSING and f.name not in known
    ]
    if required:
        raise ConfigError(f"the model config lacks {', '.join(required)}")
    if isinstance(known.get("eos_token_id"), list):
        known["eos_token_id"] = tuple(known["eos_token_id"])
    theta, scaling = _read_rope(config)
    dtype = config.get("dtype", config.get("torch_dtype"))
    return DecoderConfig(**known, rope_theta=theta, rope_scaling=scaling, dtype=dtype)


def write_llama(config: DecoderConfig) -> dict[str, Any]:
    """The keys that transformers 4 and 5 both read (`rope_theta` + `rope_scaling`, `torch_dtype`)."""
    hf = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    del hf["dtype"], hf["rope_scaling"]
    if isinstance(config.eos_token_id, tuple):
        hf["eos_token_id"] = list(config.eos_token_id)
    if config.rope_scaling is not None:
        hf["rope_scaling"] = {"rope_type": "llama3", **dataclasses.asdict(config.rope_scaling)}
    if config.dtype is not None:
        hf["torch_dtype"] = config.dtype
    return hf


def admit_llama(config: DecoderConfig, biases: Sequence[str]) -> DecoderConfig:
    """The config with the bias flags that give places to the biases at these paths.

    Raises:
        MergeError: a bias elsewhere.
    """
    for path in biases:
        if "/self_attn/" not in path and "/mlp/" not in path:
            raise MergeError(f"llama has no place for {path!r}; leave the shift on {path[:-5]} out of the merge")
    return dataclasses.replace(
        config,
        attention_bias=config.attention_bias or any("/self_attn/" in path for path in biases),
        mlp_bias=config.mlp_bias or any("/mlp/" in path for path in biases),
    )


def _read_rope(config: Mapping[str, Any]) -> tuple[float, Llama3Rope | None]:
    """(theta, scaling) from `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (4)."""
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = config.get(key) or {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"{key} must be a mapping, found {rope!r}")
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise ConfigError(f"partial_rotary_factor {partial} is not implemented; implemented: 1.0")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ConfigError(f"rope type {kind!r} is not implemented; implemented: 'default', 'llama3'")
    names = [field.name for field in dataclasses.fields(Llama3Rope)]
    missing = [name for name in names if name not in rope]
    if missing:
        raise ConfigError(f"{key} of type 'llama3' lacks {', '.join(missing)}: {json.dumps(dict(rope))}")
    return theta, Llama3Rope(**{name: rope[name] for name in names})
