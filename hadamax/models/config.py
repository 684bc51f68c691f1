"""What a decoder is made of, read from and written as a Hugging Face `config.json`."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from hadamax.errors import ConfigError, nearest

ARCHITECTURES = {"llama": "LlamaForCausalLM"}
ACTIVATIONS = ("silu",)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
    """Llama-3's frequency scaling: long wavelengths are stretched by `factor`, short ones kept."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if not _is_positive(value):
                raise ConfigError(f"rope scaling: {name} must be a positive number, found {value!r}")
        if self.low_freq_factor >= self.high_freq_factor:
            raise ConfigError(
                f"rope scaling: low_freq_factor ({self.low_freq_factor}) must be below high_freq_factor "
                f"({self.high_freq_factor})"
            )


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Hyper-parameters of a decoder; the names are those of `config.json`.

    Args:
        rope_scaling: None or `Llama3Rope`.
        attention_bias: q, k, v and o projections have a bias.
        mlp_bias: gate, up and down projections have a bias.
        dtype: the weights' dtype as the file names it ("bfloat16"), for information.

    Raises:
        ConfigError: a size that is not positive, query heads that key heads do not divide, an odd head_dim, an unknown
            family or activation.

    Example:
        >>> config = DecoderConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        ...                        num_attention_heads=4, num_key_value_heads=2, head_dim=4)
        >>> DecoderConfig.from_hf(config.to_hf()) == config
        True
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Llama3Rope | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    dtype: str | None = None
    model_type: str = "llama"

    def __post_init__(self):
        if self.model_type not in ARCHITECTURES:
            raise ConfigError(
                f"model_type {self.model_type!r} is not implemented; implemented: {', '.join(ARCHITECTURES)}"
                + nearest(str(self.model_type), ARCHITECTURES)
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ConfigError(
                f"hidden_act {self.hidden_act!r} is not implemented; implemented: {', '.join(ACTIVATIONS)}"
            )
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for name in (*sizes, "num_key_value_heads", "head_dim", "max_position_embeddings"):
            value = getattr(self, name)
            if not isinstance(value, int) or not _is_positive(value):
                raise ConfigError(f"{name} must be a positive integer, found {value!r}")
        for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
            if not _is_positive(getattr(self, name)):
                raise ConfigError(f"{name} must be a positive number, found {getattr(self, name)!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_key_value_heads ({self.num_key_value_heads}) must divide num_attention_heads "
                f"({self.num_attention_heads})"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even for rotary embeddings, found {self.head_dim}")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "DecoderConfig":
        """Reads the keys of `config.json`, in the form of transformers 4 or 5.

        Raises:
            ConfigError: a missing key, or a feature that is not implemented (named in the message).
        """
        config = {name: value for name, value in config.items() if value is not None}
        model_type = config.get("model_type", "llama")
        if model_type not in ARCHITECTURES:  # first: another family's missing keys would mislead
            raise ConfigError(
                f"model_type {model_type!r} is not implemented; implemented: {', '.join(ARCHITECTURES)}"
                + nearest(str(model_type), ARCHITECTURES)
            )
        if "quantization_config" in config:
            raise ConfigError("quantization_config: quantised checkpoints are not implemented; load the plain weights")
        if config.get("attention_dropout", 0):
            raise ConfigError(f"attention_dropout {config['attention_dropout']} is not implemented; set it to 0")
        fields = {field.name for field in dataclasses.fields(cls)} - {"rope_theta", "rope_scaling", "dtype"}
        known = {name: config[name] for name in fields if name in config}
        heads, width = known.get("num_attention_heads"), known.get("hidden_size")
        known.setdefault("num_key_value_heads", heads)
        if isinstance(heads, int) and isinstance(width, int) and heads > 0:
            known.setdefault("head_dim", width // heads)
        known.setdefault("head_dim", 0)  # where the sizes that it follows from are missing or bad, they are refused
        required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in known]
        if required:
            raise ConfigError(f"the model config lacks {', '.join(required)}")
        if isinstance(known.get("eos_token_id"), list):
            known["eos_token_id"] = tuple(known["eos_token_id"])
        theta, scaling = _read_rope(config)
        dtype = config.get("dtype", config.get("torch_dtype"))
        return cls(**known, rope_theta=theta, rope_scaling=scaling, dtype=dtype)

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that transformers 4 and 5 both read (`rope_theta` + `rope_scaling`, `torch_dtype`)."""
        hf = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del hf["dtype"], hf["rope_scaling"]
        if isinstance(self.eos_token_id, tuple):
            hf["eos_token_id"] = list(self.eos_token_id)
        if self.rope_scaling is not None:
            hf["rope_scaling"] = {"rope_type": "llama3", **dataclasses.asdict(self.rope_scaling)}
        if self.dtype is not None:
            hf["torch_dtype"] = self.dtype
        return {"architectures": [ARCHITECTURES[self.model_type]], **hf}


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
