"""The methods of Hugging Face PEFT: the tensors of one module as our factors, and back.

| method | tensors (torch's orientation) | scale |
|---|---|---|
| LoRA | `lora_A [r, in]`, `lora_B [out, r]` | `lora_alpha / r`, or `/ sqrt(r)` with `use_rslora` |
| DoRA | and `lora_magnitude_vector [out]` | as LoRA |
| LoHa | `hada_w1_a [out, r]`, `hada_w1_b [r, in]`, `hada_w2_a`, `hada_w2_b` | `alpha / r` |
| HiRA | `hira_A [r, in]`, `hira_B [out, r]` | none |
| (IA)^3 | `ia3_l [out, 1]`, or `[1, in]` of a feed-forward module | none |
| GraLoRA | `gralora_A [k, in/k, r]`, `gralora_B [k, r, out/k]` | `alpha / r` |

Source: peft 0.21, `tuners/*/layer.py`.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from hadamax.convert import scale_of
from hadamax.errors import CheckpointError, ConfigError, HadamaxError
from hadamax.hf.adapters.sites import Entry, Site, factor_shapes, rescaled

SUFFIXES: Mapping[str, Mapping[str, str]] = {
    "LORA": {
        ".lora_A.weight": "a",
        ".lora_B.weight": "b",
        ".lora_embedding_A": "a",
        ".lora_embedding_B": "b",
        ".lora_magnitude_vector": "magnitude",
    },
    "LOHA": {".hada_w1_b": "a1", ".hada_w1_a": "b1", ".hada_w2_b": "a2", ".hada_w2_a": "b2"},
    "HIRA": {".hira_A": "a", ".hira_B": "b", ".hira_embedding_A": "a", ".hira_embedding_B": "b"},
    "IA3": {".ia3_l": "weight"},
    "GRALORA": {".gralora_A": "a", ".gralora_B": "b"},
}
TYPES = {"lora": "LORA", "dora": "LORA", "loha": "LOHA", "hira": "HIRA", "ia3": "IA3", "gralora": "GRALORA"}


def entry(
    config: Mapping[str, Any], module: str, site: Site, tensors: Mapping[str, tuple[str, np.ndarray]], where: object
) -> Entry:
    """The adapter of one module.

    Args:
        config: of the directory.
        tensors: `{our factor: (name in the file, value)}`.

    Raises:
        CheckpointError: a tensor that is missing, or of another shape.
        ConfigError: a hyper-parameter out of range.
    """
    kind = config["peft_type"]
    names = dict.fromkeys(SUFFIXES[kind].values())
    if kind == "LORA" and not config.get("use_dora", False):
        names.pop("magnitude")
        if "magnitude" in tensors:
            raise CheckpointError(f"{where}: {module} has a lora_magnitude_vector, but use_dora is not set")
    if missing := [name for name in names if name not in tensors]:
        suffix = next(suffix for suffix, name in SUFFIXES[kind].items() if name == missing[0])
        raise CheckpointError(
            f"{where} lacks tensor '{module}{suffix}', though it has {next(iter(tensors.values()))[0]!r}"
        )
    found = {name: tensors[name][1] for name in names}
    try:
        ours, found = _capped(_adapter_config(config, module, found), found, site.shape)
        expected = factor_shapes(tuple(ours.items()), site.shape)
    except HadamaxError as error:
        raise type(error)(f"{where}: {module}: {error}") from None
    except (TypeError, OverflowError) as error:  # JSON of another type, an integer beyond all floats
        raise ConfigError(f"{where}: {module}: a hyper-parameter is no number: {error}") from None
    factors = {}
    for name, value in found.items():
        stored = encode(ours, name, np.broadcast_to(np.float32(0), expected[name])).shape
        if value.shape != stored:
            raise CheckpointError(f"{where}: tensor {tensors[name][0]!r}: expected shape {stored}, found {value.shape}")
        factors[name] = decode(ours, name, value)
    return Entry(ours, factors)


def _capped(
    config: dict[str, Any], found: Mapping[str, np.ndarray], shape: tuple[int, int]
) -> tuple[dict[str, Any], Mapping[str, np.ndarray]]:
    """A rank above `min(in, out)`, which PEFT has, as that rank: the product itself and the identity."""
    limit, rank = min(shape), config.get("rank", 0)
    shapes = {name: found[name].shape for name in ("a", "b") if name in found}
    if config["method"] not in ("lora", "dora", "hira") or rank <= limit:
        return config, found
    if shapes != {"a": (rank, shape[0]), "b": (shape[1], rank)}:
        return config, found  # is refused for its shapes
    product = (found["b"].astype(np.float64) @ found["a"]).astype(found["a"].dtype)
    eye = np.eye(limit, dtype=product.dtype)
    a, b = (eye, product) if shape[0] == limit else (product, eye)
    return rescaled({**config, "rank": limit}, scale_of(config)), {**found, "a": a, "b": b}


def _adapter_config(config: Mapping[str, Any], module: str, found: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Our configuration of the module's adapter: its rank from the tensors, the rest from PEFT's."""
    kind = config["peft_type"]
    if kind == "IA3":
        feed_forward = found["weight"].shape[:1] == (1,)
        return {"method": "ia3", "position": "input" if feed_forward else "output"}
    if kind == "GRALORA":
        if config.get("alpha", 64) is None:
            raise ConfigError("alpha must be a number, found None")
        return {
            "method": "gralora",
            "rank": config.get("r", 32),
            "blocks": config.get("gralora_k", 2),
            "alpha": config.get("alpha", 64),
        }
    first = found["a1" if kind == "LOHA" else "a"]
    rank = first.shape[0] if first.ndim == 2 else 0
    if kind == "HIRA":
        return {"method": "hira", "rank": rank, "scale": 1.0}
    alpha = pattern_value(config.get("alpha_pattern") or {}, module, config.get("alpha", config.get("lora_alpha", 8)))
    if alpha is None:
        raise ConfigError("alpha must be a number, found None")
    if kind == "LOHA":
        return {"method": "loha", "rank": rank, "alpha": alpha, "forward": "auto"}
    rslora = config.get("use_rslora", False)
    if "magnitude" not in found:
        return {"method": "lora", "rank": rank, "alpha": alpha, "rslora": rslora}
    return {"method": "dora", "rank": rank, "alpha": alpha * rank**0.5 if rslora else alpha}


def decode(config: Mapping[str, Any], name: str, value: np.ndarray) -> np.ndarray:
    """A tensor of PEFT in our orientation."""
    if config["method"] == "gralora":
        k, r = config["blocks"], config["rank"]
        if name == "a":  # [i, in/k, (j s)]
            return value.reshape(k, -1, k, r // k).transpose(0, 2, 1, 3)
        return value.reshape(k, k, r // k, -1).transpose(1, 0, 2, 3)  # [j, (i s), out/k]
    return value.reshape(-1) if config["method"] == "ia3" else value.T


def encode(config: Mapping[str, Any], name: str, value: np.ndarray) -> np.ndarray:
    """The inverse of `decode`."""
    if config["method"] == "gralora":
        k, r = config["blocks"], config["rank"]
        if name == "a":
            return value.transpose(0, 2, 1, 3).reshape(k, -1, r)
        return value.transpose(1, 0, 2, 3).reshape(k, r, -1)
    if config["method"] == "ia3":
        return value.reshape((1, -1) if config["position"] == "input" else (-1, 1))
    return value.T


def suffix_of(config: Mapping[str, Any], name: str, path: str) -> str:
    """What stands after the module's name in the file."""
    kind = TYPES[config["method"]]
    suffixes = [suffix for suffix, factor in SUFFIXES[kind].items() if factor == name]
    embedding = [suffix for suffix in suffixes if "embedding" in suffix]
    return embedding[0] if embedding and path.endswith("/embedding") else suffixes[0]


def pattern_value(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name (PEFT's `get_pattern_key`).

    Raises:
        ConfigError: a pattern that is no regular expression, or one that could take exponential time.

    Example:
        >>> pattern_value({"layers.0.*_proj": 16}, "model.layers.0.self_attn.q_proj", 8)
        16
    """
    if not isinstance(patterns, Mapping):
        raise ConfigError(f"a pattern mapping is expected, found {patterns!r}")
    for pattern, value in patterns.items():
        # the file is not trusted: repeated groups and many repetitions can run for ever
        plain = re.sub(r"\\.", "", pattern)
        if re.search(r"\)[*+?{]", plain) or len(re.findall(r"[*+?{(]", plain)) > 4 or plain.count("|") > 64:
            raise ConfigError(
                f"pattern {pattern[:60]!r} repeats groups or has more than 4 repetitions; write it simpler"
            )
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise ConfigError(f"pattern {pattern!r} is no regular expression: {error}") from None
    return default
