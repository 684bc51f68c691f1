"""What an encoder is made of. Reading and writing `config.json` is the business of `hadamax.hf`."""

import dataclasses
from typing import Any, TypeGuard

from hadamax.errors import ConfigError
from hadamax.models.config import MAX_SIZE

CHOICES = {
    "model_type": ("bert", "roberta"),
    "hidden_act": ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"),
    "problem_type": (None, "regression", "single_label_classification", "multi_label_classification"),
}


def _is_number(value: Any, kind: type | tuple[type, ...] = (int, float)) -> TypeGuard[float]:
    return isinstance(value, kind) and not isinstance(value, bool) and abs(value) < 1e300


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Hyper-parameters of an encoder; the names are those of `config.json` where that has one.

    Args:
        hidden_act: "gelu" (exact), "gelu_new" or "gelu_pytorch_tanh" (both with tanh), "relu", "silu".
        labels: names of the classes of a classification head; a regression has one.
        problem_type: what a sequence classifier is trained for, "regression", "single_label_classification" or
            "multi_label_classification"; None lets `Encoder.loss` choose as transformers does.
        hidden_dropout_prob, attention_probs_dropout_prob, classifier_dropout: kept for the file; `Encoder` drops
            nothing, in training neither.
        dtype: the weights' dtype as the file names it ("bfloat16"), for information.
        model_type: "bert", or "roberta", which counts positions from `pad_token_id + 1` over the tokens that are not
            padding and whose heads are others.

    Raises:
        ConfigError: a size that is not positive, heads that do not divide the width, a name that is not implemented.

    Example:
        >>> config = EncoderConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        ...                        num_attention_heads=4, labels=("no", "yes"))
        >>> config.num_labels
        2
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    problem_type: str | None = None
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    dtype: str | None = None
    model_type: str = "bert"

    def __post_init__(self):
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if not (value is None or isinstance(value, str)) or value not in choices:
                known = ", ".join(choice for choice in choices if choice)
                raise ConfigError(f"{name} {value!r} is not implemented; implemented: {known}")
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for name in (*sizes, "max_position_embeddings", "type_vocab_size"):
            if not _is_number(getattr(self, name), int) or not 0 < getattr(self, name) < MAX_SIZE:
                raise ConfigError(f"{name} must be a positive integer below 2^31, found {getattr(self, name)!r}")
        for name in ("layer_norm_eps", "initializer_range"):
            if not _is_number(getattr(self, name)) or getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be a positive number, found {getattr(self, name)!r}")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            value = getattr(self, name)
            absent = value is None and name == "classifier_dropout"
            if not absent and not (_is_number(value) and 0 <= value <= 1):
                raise ConfigError(f"{name} must be between 0 and 1, found {value!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"num_attention_heads ({self.num_attention_heads}) must divide hidden_size ({self.hidden_size})"
            )
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            ids = value if name == "eos_token_id" and isinstance(value, tuple) else (value,)
            needed = name == "pad_token_id" and self.model_type == "roberta"  # its positions follow from it
            if (needed or value is not None) and not (
                ids and all(_is_number(token, int) and token >= 0 for token in ids)
            ):
                raise ConfigError(f"{name} must be a token id, found {value!r}")
        if not isinstance(self.labels, tuple) or not all(isinstance(label, str) for label in self.labels):
            raise ConfigError(f"labels must be a tuple of names, found {self.labels!r}")
        if not self.labels or (self.problem_type == "single_label_classification" and self.num_labels == 1):
            raise ConfigError(
                f"{self.num_labels} label(s) are too few to classify; a regression has one label and says so by"
                " problem_type 'regression'"
            )
        if not (self.dtype is None or isinstance(self.dtype, str)):
            raise ConfigError(f"dtype must be a name such as 'float32', found {self.dtype!r}")

    @property
    def num_labels(self) -> int:
        return len(self.labels)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads
