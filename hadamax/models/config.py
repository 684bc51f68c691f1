"""What a decoder is made of. Reading and writing `config.json` is the business of `hadamax.hf`."""

import dataclasses
from typing import Any

from hadamax.errors import ConfigError

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
    """Hyper-parameters of a decoder; the names are those of `config.json` where that has one.

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
        >>> config.rope_theta
        10000.0
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
