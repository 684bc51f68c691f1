"""What a decoder is made of. Reading and writing `config.json` is the business of `hadamax.hf`."""

import dataclasses
from typing import Any

import jax

from hadamax.errors import ConfigError

ACTIVATIONS = {"silu": jax.nn.silu, "gelu_pytorch_tanh": jax.nn.gelu}  # jax's gelu is the tanh form by default
MAX_LAYERS = 10_000  # a file that names more is damaged, and lists of layers must not be built for it
MAX_SIZE = 2**31


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e38


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
        qkv_bias: q, k and v projections alone have a bias.
        mlp_bias: gate, up and down projections have a bias.
        query_key_norm: queries and keys are normalised per head, before the rotary embedding.
        post_norms: attention and MLP outputs are normalised, too, before they are added.
        norm_unit_offset: norms multiply by `1 + scale` (in float32) instead of `scale`.
        scale_embeddings: embeddings are multiplied by `sqrt(hidden_size)`, rounded to the table's dtype.
        query_pre_attn_scalar: attention logits are divided by its root; head_dim where None.
        attn_logit_softcapping: c of `c tanh(x / c)` on the attention logits.
        final_logit_softcapping: c of `c tanh(x / c)` on the output logits.
        sliding_window: a token sees that many tokens, itself included.
        sliding_layers: which layers have the window, where not all do.
        dtype: the weights' dtype as the file names it ("bfloat16"), for information.
        model_type: the family that it was read from, and whose `config.json` is written.

    Raises:
        ConfigError: a size that is not positive, query heads that key heads do not divide, an odd head_dim, an unknown
            activation, windows that contradict themselves, a value of another type.

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
    qkv_bias: bool = False
    mlp_bias: bool = False
    query_key_norm: bool = False
    post_norms: bool = False
    norm_unit_offset: bool = False
    scale_embeddings: bool = False
    query_pre_attn_scalar: int | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] | None = None
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    dtype: str | None = None
    model_type: str = "llama"

    def __post_init__(self):
        self._check_types()
        if self.hidden_act not in ACTIVATIONS:
            raise ConfigError(
                f"hidden_act {self.hidden_act!r} is not implemented; implemented: {', '.join(ACTIVATIONS)}"
            )
        if self.num_hidden_layers > MAX_LAYERS:
            raise ConfigError(f"num_hidden_layers must be at most {MAX_LAYERS}, found {self.num_hidden_layers}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_key_value_heads ({self.num_key_value_heads}) must divide num_attention_heads "
                f"({self.num_attention_heads})"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even for rotary embeddings, found {self.head_dim}")
        if self.attention_bias and self.qkv_bias:
            raise ConfigError("attention_bias (q, k, v and o) and qkv_bias (q, k and v alone) exclude each other")
        layers = self.sliding_layers
        if layers is not None:
            if self.sliding_window is None:
                raise ConfigError("sliding_layers needs a sliding_window")
            if len(layers) != self.num_hidden_layers or set(layers) != {True, False}:
                raise ConfigError(
                    f"sliding_layers must say of each of the {self.num_hidden_layers} layers whether it has the "
                    "window, and some must not (None = all have it), "
                    f"found {len(layers)} entries, {sum(layers)} of them true"
                )

    def _check_types(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for name in (*sizes, "num_key_value_heads", "head_dim", "max_position_embeddings"):
            if not _is_size(getattr(self, name)):
                raise ConfigError(f"{name} must be a positive integer, found {getattr(self, name)!r}")
        for name in ("query_pre_attn_scalar", "sliding_window"):
            if getattr(self, name) is not None and not _is_size(getattr(self, name)):
                raise ConfigError(f"{name} must be a positive integer or None, found {getattr(self, name)!r}")
        for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
            if not _is_positive(getattr(self, name)):
                raise ConfigError(f"{name} must be a positive number, found {getattr(self, name)!r}")
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            if getattr(self, name) is not None and not _is_positive(getattr(self, name)):
                raise ConfigError(f"{name} must be a positive number or None, found {getattr(self, name)!r}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is bool and not isinstance(value, bool):
                raise ConfigError(f"{field.name} must be true or false, found {value!r}")
        eos = self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)
        for name, ids in {"bos": (self.bos_token_id,), "eos": eos, "pad": (self.pad_token_id,)}.items():
            if not all(value is None or type(value) is int for value in ids):
                raise ConfigError(f"{name}_token_id must be an integer, found {getattr(self, f'{name}_token_id')!r}")
        layers = self.sliding_layers
        if layers is not None and not (isinstance(layers, tuple) and all(type(value) is bool for value in layers)):
            raise ConfigError(f"sliding_layers must be a tuple of booleans, found {layers!r}")
        for name in ("hidden_act", "dtype", "model_type"):
            if not isinstance(getattr(self, name), str) and not (name == "dtype" and self.dtype is None):
                raise ConfigError(f"{name} must be a text, found {getattr(self, name)!r}")


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < MAX_SIZE
