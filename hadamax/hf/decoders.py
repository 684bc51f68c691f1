"""Decoder families: `config.json` as a `DecoderConfig`, and back.

Every key is read, known to be without effect on the logits, or refused by name.
"""

import dataclasses
import json
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from hadamax.errors import ConfigError, MergeError
from hadamax.models import DecoderConfig, Llama3Rope
from hadamax.models.config import MAX_LAYERS

SLIDING, FULL = "sliding_attention", "full_attention"
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
COMMON = (
    *SIZES,
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "max_position_embeddings",
    "tie_word_embeddings",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
SPECIAL = (
    *("model_type", "architectures", "dtype", "torch_dtype"),
    *("rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor"),
)
# Keys that do not change the logits: bookkeeping, labels of heads that these models lack, pretraining_tp (the same sums
# in another order), and what transformers 4 wrote about generation into the model's config.
WITHOUT_EFFECT = frozenset(
    """
    transformers_version use_cache output_attentions output_hidden_states return_dict chunk_size_feed_forward
    pretraining_tp is_decoder torchscript use_bfloat16 tf_legacy_loss tie_encoder_decoder cross_attention_hidden_size
    finetuning_task id2label label2id num_labels problem_type task_specific_params tokenizer_class prefix sep_token_id
    decoder_start_token_id cache_implementation max_length min_length max_new_tokens do_sample early_stopping num_beams
    num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
    return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens unsloth_fixed unsloth_version
    """.split()  # noqa: SIM905
)
OFF = {"attention_dropout": 0, "add_cross_attention": False, "is_encoder_decoder": False, "pruned_heads": {}}


class Dialect(NamedTuple):
    """How the `config.json` of one family is read.

    Attributes:
        fields: key -> field of `DecoderConfig`, beyond the common ones.
        fixed: fields that all models of the family share and no key sets.
        absent: what transformers takes for a key that is absent; null is not absent.
        only: keys of which one value alone is implemented, or several.
        windows: which layers have the window where `layer_types` does not say; None for families without that key.
    """

    fields: Mapping[str, str]
    fixed: Mapping[str, Any]
    absent: Mapping[str, Any]
    only: Mapping[str, Sequence[Any]] = {}
    windows: Callable[[Mapping[str, Any], int], bool] | None = None


def _qwen_window(config: Mapping[str, Any], layer: int) -> bool:
    return config.get("use_sliding_window", False) and layer >= config.get("max_window_layers", 0)


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


QWEN_ABSENT = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
DIALECTS: Mapping[str, Dialect] = {
    "llama": Dialect(
        fields=_same("hidden_act", "attention_bias", "mlp_bias"),
        fixed={},
        absent={"bos_token_id": 1, "eos_token_id": 2},
    ),
    "mistral": Dialect(
        fields=_same("hidden_act", "sliding_window"),
        fixed={},
        absent={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "qwen2": Dialect(
        fields=_same("hidden_act"),
        fixed={"qkv_bias": True},
        absent=QWEN_ABSENT,
        only={"use_mrope": (False,)},
        windows=_qwen_window,
    ),
    "qwen3": Dialect(
        fields=_same("hidden_act", "attention_bias"),
        fixed={"query_key_norm": True},
        absent={**QWEN_ABSENT, "head_dim": 128},
        windows=_qwen_window,
    ),
    "gemma2": Dialect(
        fields={
            "hidden_activation": "hidden_act",
            **_same("attention_bias", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
        },
        fixed={"post_norms": True, "norm_unit_offset": True, "scale_embeddings": True},
        absent={
            "hidden_activation": "gelu_pytorch_tanh",
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 8192,
            "sliding_window": 4096,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "tie_word_embeddings": True,
            "bos_token_id": 2,
            "eos_token_id": 1,
            "pad_token_id": 0,
        },
        # transformers takes hidden_activation, whatever hidden_act says
        only={"hidden_act": ("gelu_pytorch_tanh", "gelu"), "use_bidirectional_attention": (False,)},
        windows=lambda config, layer: layer % 2 == 0,
    ),
}


def read(config: Mapping[str, Any]) -> DecoderConfig:
    """The config of a decoder, from the keys that transformers 4 or 5 write, without those that are null.

    Raises:
        ConfigError: a missing or unknown key, or a feature that is not implemented (named in the message).
    """
    family = config.get("model_type", "llama")
    dialect = DIALECTS[family]
    _refuse_unknown(config, family, dialect)
    names = {name: name for name in COMMON} | dict(dialect.fields)
    known = {field: config[key] for key, field in names.items() if key in config}
    missing = [name for name in SIZES if name not in known]
    if missing:
        raise ConfigError(f"the model config lacks {', '.join(missing)}")
    heads, width = known["num_attention_heads"], known["hidden_size"]
    known.setdefault("num_key_value_heads", heads)
    derived = width // heads if isinstance(heads, int) and isinstance(width, int) and heads > 0 else 0
    known.setdefault("head_dim", derived)  # where the sizes that it follows from are bad, they are refused
    if isinstance(known.get("eos_token_id"), list):
        known["eos_token_id"] = tuple(known["eos_token_id"])
    if dialect.windows is not None:
        known |= _read_windows(config, dialect.windows)
    theta, scaling = _read_rope(config)
    dtype = config.get("dtype", config.get("torch_dtype"))
    return DecoderConfig(
        **known, **dialect.fixed, rope_theta=theta, rope_scaling=scaling, dtype=dtype, model_type=family
    )


def write(config: DecoderConfig) -> dict[str, Any]:
    """The keys that transformers 4 and 5 both read (`rope_theta` + `rope_scaling`, `torch_dtype`).

    Raises:
        ConfigError: a feature that the family's `config.json` cannot express.
    """
    dialect = DIALECTS[config.model_type]
    names = {name: name for name in COMMON} | dict(dialect.fields)
    hf = {"model_type": config.model_type, **{key: getattr(config, field) for key, field in names.items()}}
    hf["rope_theta"] = config.rope_theta
    if isinstance(config.eos_token_id, tuple):
        hf["eos_token_id"] = list(config.eos_token_id)
    if config.rope_scaling is not None:
        hf["rope_scaling"] = {"rope_type": "llama3", **dataclasses.asdict(config.rope_scaling)}
    if config.dtype is not None:
        hf["torch_dtype"] = config.dtype
    if dialect.windows is not None:
        sliding = config.sliding_layers or (config.sliding_window is not None,) * config.num_hidden_layers
        hf["layer_types"] = [SLIDING if layer else FULL for layer in sliding]
        hf["sliding_window"] = config.sliding_window
        if "use_sliding_window" in dialect.absent:
            first = sliding.index(True) if any(sliding) else len(sliding)
            hf |= {"use_sliding_window": any(sliding), "max_window_layers": first}
        elif config.sliding_window is None:  # transformers builds the mask of such layers though there are none
            hf["sliding_window"] = dialect.absent["sliding_window"]
    again = read({key: value for key, value in hf.items() if value is not None})
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if getattr(again, field.name) != value:
            raise ConfigError(f"config.json of {config.model_type!r} cannot say {field.name}={value!r}")
    return hf


def admit(config: DecoderConfig, biases: Sequence[str]) -> DecoderConfig:
    """The config with the bias flags that give places to the biases at these paths.

    Raises:
        MergeError: a bias where the family has no flag for one.
    """
    fields = DIALECTS[config.model_type].fields
    flags = {}
    for path in biases:
        flag = next((f for part, f in (("/self_attn/", "attention_bias"), ("/mlp/", "mlp_bias")) if part in path), None)
        if flag not in fields:
            reason = "" if flag is None else f" (its config.json has no {flag})"
            raise MergeError(
                f"{config.model_type} has no place for {path!r}{reason}; leave the shift on {path[:-5]} out of the "
                "merge: hadamard_adapter(bias=False)"
            )
        flags[flag] = True
    return dataclasses.replace(config, **flags)


def _refuse_unknown(config: Mapping[str, Any], family: str, dialect: Dialect) -> None:
    read_keys = {*COMMON, *SPECIAL, *dialect.fields, *dialect.absent}
    if dialect.windows is not None:
        read_keys |= {"layer_types", "sliding_window"}
    only = {key: (value,) for key, value in OFF.items()} | dict(dialect.only)
    # flags of other families, which transformers writes and reads only there
    only |= {key: (False,) for key in ("attention_bias", "mlp_bias") if key not in read_keys}
    if family == "gemma2":  # the released 9B and 27B name their window twice
        only["sliding_window_size"] = (config.get("sliding_window"),)
    for key, value in config.items():
        if key in only:
            if value not in only[key]:
                allowed = " or ".join(map(repr, only[key]))
                raise ConfigError(f"{family}: {key} {reprlib.repr(value)} is not implemented; implemented: {allowed}")
        elif key not in read_keys and key not in WITHOUT_EFFECT and not key.startswith("_"):
            raise ConfigError(
                f"{family}: config key {key!r} ({reprlib.repr(value)}) is not known; remove it from config.json if the "
                "model computes the same without it"
            )


def _read_windows(config: Mapping[str, Any], by_default: Callable) -> dict[str, Any]:
    layers, kinds = config["num_hidden_layers"], config.get("layer_types")
    if type(layers) is not int or not 0 < layers <= MAX_LAYERS:
        return {}  # is refused, and no list is to be built for it
    for key, kind, word in (("max_window_layers", int, "an integer"), ("use_sliding_window", bool, "true or false")):
        if key in config and type(config[key]) is not kind:
            raise ConfigError(f"{key} must be {word}, found {reprlib.repr(config[key])}")
    if kinds is None:
        sliding = tuple(by_default(config, layer) for layer in range(layers))
    elif not isinstance(kinds, list) or len(kinds) != layers:
        raise ConfigError(
            f"layer_types must be a list with one entry for each of the {layers} layers, found " + reprlib.repr(kinds)
        )
    else:
        unknown = [kind for kind in kinds if kind not in (SLIDING, FULL)]
        if unknown:
            raise ConfigError(f"layer type {unknown[0]!r} is not implemented; implemented: {SLIDING!r}, {FULL!r}")
        sliding = tuple(kind == SLIDING for kind in kinds)
    if not any(sliding):
        return {}
    if "sliding_window" not in config or not config.get("use_sliding_window", True):
        raise ConfigError(f"layer_types has {SLIDING!r} layers, but sliding_window is null or use_sliding_window false")
    return {"sliding_window": config["sliding_window"], "sliding_layers": None if all(sliding) else sliding}


def _read_rope(config: Mapping[str, Any]) -> tuple[float, Llama3Rope | None]:
    """(theta, scaling) from `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (4)."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"  # as transformers 5
    rope = config.get(key) or {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"{key} must be a mapping, found {rope!r}")
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise ConfigError(f"partial_rotary_factor {partial} is not implemented; implemented: 1.0")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ConfigError(f"rope type {kind!r} is not implemented; implemented: 'default', 'llama3'")
    names = [field.name for field in dataclasses.fields(Llama3Rope)] if kind == "llama3" else []
    missing = [name for name in names if name not in rope]
    if missing:
        raise ConfigError(f"{key} of type 'llama3' lacks {', '.join(missing)}: {json.dumps(dict(rope))}")
    unknown = [
        name for name in rope if name not in (*names, "rope_type", "type", "rope_theta", "partial_rotary_factor")
    ]
    if unknown:
        raise ConfigError(f"{key} of type {kind!r}: {unknown[0]} {rope[unknown[0]]!r} is not implemented")
    return theta, Llama3Rope(**{name: rope[name] for name in names}) if kind == "llama3" else None
