"""Encoder families: `config.json` as an `EncoderConfig` and back, and the names that their checkpoints have had."""

import dataclasses
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hadamax.errors import ConfigError, MergeError
from hadamax.hf import decoders
from hadamax.models import EncoderConfig

# What transformers takes for a key that is absent, where that is not EncoderConfig's default.
ABSENT: Mapping[str, Mapping[str, Any]] = {
    "bert": {"pad_token_id": 0},
    "roberta": {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
}
# Keys whose other values would compute something else; the value is what `Encoder` computes.
ONLY: Mapping[str, Any] = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "tie_word_embeddings": True,
    "pruned_heads": {},
    "pooler_type": "first_token_transform",
}
# Keys that do not change what is computed, beyond those that a decoder's config may have, too.
WITHOUT_EFFECT = decoders.WITHOUT_EFFECT | frozenset(
    """
    architectures directionality gradient_checkpointing language model_type name output_past pooler_fc_size
    pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head torch_dtype
    """.split()  # noqa: SIM905
)
HEADS = ("cls", "lm_head", "classifier", "qa_outputs")  # of transformers' classes, implemented here or not
MAX_LABELS = 1_000_000  # a file that asks for more is damaged, and names must not be made for it


def read_encoder(config: Mapping[str, Any]) -> EncoderConfig:
    """The config of a BERT or RoBERTa, from the keys that transformers 4 or 5 write, without those that are null.

    The classes' names are those of `id2label`; a `label2id` beside it is not read. Dropout rates are kept for the file,
    `Encoder` drops nothing.

    Raises:
        ConfigError: a missing or unknown key, or a feature that is not implemented (named in the message).
    """
    fields = {f.name: f.default for f in dataclasses.fields(EncoderConfig) if f.name != "labels"}
    for name, value in config.items():
        if name in ONLY:
            if value != ONLY[name]:
                raise ConfigError(f"{name} {reprlib.repr(value)} is not implemented; implemented: {ONLY[name]!r}")
        elif name not in fields and name not in WITHOUT_EFFECT and not name.startswith("_"):
            raise ConfigError(
                f"{config['model_type']}: config key {name!r} ({reprlib.repr(value)}) is not known; remove it from"
                " config.json if the model computes the same without it"
            )
    known = {"pad_token_id": None, **{name: config[name] for name in fields if name in config}}
    required = [name for name, default in fields.items() if default is dataclasses.MISSING and name not in known]
    if required:
        raise ConfigError(f"the model config lacks {', '.join(required)}")
    if isinstance(known.get("eos_token_id"), list):
        known["eos_token_id"] = tuple(known["eos_token_id"])
    known.setdefault("dtype", config.get("torch_dtype"))
    return EncoderConfig(**known, labels=_read_labels(config))


def write_encoder(config: EncoderConfig) -> dict[str, Any]:
    """The keys that transformers 4 and 5 both read."""
    hf = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    dtype, labels = hf.pop("dtype"), hf.pop("labels")
    if isinstance(config.eos_token_id, tuple):
        hf["eos_token_id"] = list(config.eos_token_id)
    if dtype is not None:
        hf["torch_dtype"] = dtype
    hf["id2label"] = {str(index): label for index, label in enumerate(labels)}
    hf["label2id"] = {label: index for index, label in enumerate(labels)}
    return hf


def admit_encoder(config: EncoderConfig, biases: Sequence[str]) -> EncoderConfig:
    """The config itself: every kernel of an encoder has its bias already.

    Raises:
        MergeError: a bias that no encoder has.
    """
    if biases:
        raise MergeError(f"{config.model_type} has no place for {biases[0]!r}; leave its shift out of the merge")
    return config


def renamed(prefix: str) -> Callable[[str], str]:
    """The one name of a tensor: `prefix` before all but the heads, `weight` and `bias` for the first BERTs' norms.

    Example:
        >>> renamed("bert")("embeddings.LayerNorm.gamma")
        'bert.embeddings.LayerNorm.weight'
    """

    def rename(name: str) -> str:
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))
        return f"{prefix}.{name}" if name.split(".")[0] in ("embeddings", "encoder", "pooler") else name

    return rename


def is_ignorable(name: str, config: EncoderConfig) -> bool:
    """Whether a model without a place for the tensor may leave it: a head (its repeated tied table, too), a buffer."""
    first, *rest = name.split(".")
    buffers = (["embeddings", "position_ids"], ["embeddings", "token_type_ids"])
    return first in HEADS or (first == config.model_type and (rest[:1] == ["pooler"] or rest in buffers))


def _read_labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the classes by `id2label`, or LABEL_0, ... for `num_labels` (2 where absent)."""
    count, named = config.get("num_labels", 2), config.get("id2label")
    if named is None:
        if type(count) is not int or not 0 < count <= MAX_LABELS:
            raise ConfigError(f"num_labels must be an integer from 1 to {MAX_LABELS}, found {count!r}")
        return tuple(f"LABEL_{i}" for i in range(count))
    if not isinstance(named, Mapping):
        raise ConfigError(f"id2label must map class ids to names, found {reprlib.repr(named)}")
    by_id = {str(index): str(label) for index, label in named.items()}
    ids = [str(i) for i in range(len(named))]
    if by_id.keys() != set(ids):
        raise ConfigError(f"id2label must name the classes 0 to {len(named) - 1}, found {reprlib.repr(named)}")
    return tuple(by_id[i] for i in ids)
