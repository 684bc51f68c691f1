"""The model families of Hugging Face that are implemented: how each is read, built, named and written."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from hadamax.errors import ConfigError, nearest
from hadamax.hf import decoders, encoders
from hadamax.hf.names import Tensor, is_ignorable, tensors_of
from hadamax.models import Decoder, Encoder

Config = Any  # DecoderConfig or EncoderConfig: frozen, with model_type, num_hidden_layers and dtype
Model = Any  # Decoder or Encoder: config, task, scan_layers, view


class Family(NamedTuple):
    """One `model_type` of `config.json`.

    Attributes:
        read: keys of `config.json` (none of them None) -> config; refuses by name what is not implemented.
        write: config -> keys of `config.json`, without `architectures`.
        admit: (config, paths of biases that merging added) -> the config that has places for them; MergeError where the
            family has none.
        build: `(config, *, task, dtype, param_dtype, scan_layers) -> model`.
        architectures: the class of transformers for each task; the first is what a file without `architectures` holds.
        prefix: what stands before the names of all tensors but the heads' (`"model"`), where there is a head.
        bare: tasks without a head, whose checkpoints have no prefix.
        heads: first components of the parameter paths that stay outside the prefix.
        rename: a tensor's name in a file, old or new, with or without the prefix -> the one name for all of them. Files
            and models meet there: `rename(name in the file) == rename(name of `tensors`)`.
        ignorable: (renamed name, config) -> whether a model that has no place for the tensor may leave it: a buffer, a
            repeated tied weight, a head of another task.
        fresh: task -> first components of the parameter paths that a file may lack; they are a new head.
        absent: what transformers takes for a key that `config.json` lacks, before `read`; null is not absent.
    """

    read: Callable[[Mapping[str, Any]], Config]
    write: Callable[[Config], dict[str, Any]]
    admit: Callable[[Config, Sequence[str]], Config]
    build: Callable[..., Model]
    architectures: Mapping[str, str]
    prefix: str
    bare: tuple[str, ...] = ()
    heads: tuple[str, ...] = ("lm_head",)
    rename: Callable[[str], str] = lambda name: name
    ignorable: Callable[[str, Config], bool] = lambda name, config: is_ignorable(name, config.tie_word_embeddings)
    fresh: Callable[[str], tuple[str, ...]] = lambda task: ()
    absent: Mapping[str, Any] = {}


def _causal(name: str) -> Family:
    """`name` begins the classes of transformers."""
    return Family(
        decoders.read,
        decoders.write,
        decoders.admit,
        lambda config, *, task, **options: Decoder(config, **options),
        {"causal_lm": f"{name}ForCausalLM"},
        prefix="model",
        absent=decoders.DIALECTS[name.lower()].absent,
    )


def _encoder(name: str, head: str, sentence_head: tuple[str, ...]) -> Family:
    """`name` begins the classes of transformers; `head` and `sentence_head` are modules of the masked-LM and the
    sequence-classification head."""
    bare = ("hidden", "pooled", "sentence_embedding")
    fresh = {
        "pooled": ("pooler",),
        "masked_lm": (head,),
        "token_classification": ("classifier",),
        "sequence_classification": sentence_head,
    }
    return Family(
        encoders.read_encoder,
        encoders.write_encoder,
        encoders.admit_encoder,
        Encoder,
        {
            **dict.fromkeys(bare, f"{name}Model"),
            "masked_lm": f"{name}ForMaskedLM",
            "token_classification": f"{name}ForTokenClassification",
            "sequence_classification": f"{name}ForSequenceClassification",
        },
        prefix=name.lower(),
        bare=bare,
        heads=(head, "classifier"),
        rename=encoders.renamed(name.lower()),
        ignorable=encoders.is_ignorable,
        fresh=lambda task: fresh.get(task, ()),
        absent=encoders.ABSENT[name.lower()],
    )


FAMILIES: Mapping[str, Family] = {
    "llama": _causal("Llama"),
    "mistral": _causal("Mistral"),
    "qwen2": _causal("Qwen2"),
    "qwen3": _causal("Qwen3"),
    "gemma2": _causal("Gemma2"),
    "bert": _encoder("Bert", "cls", ("classifier", "pooler")),
    "roberta": _encoder("Roberta", "lm_head", ("classifier",)),
}


def family_of(model_type: str) -> Family:
    """The family by its `model_type`.

    Raises:
        ConfigError: one that is not implemented, with the nearest names.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(
            f"model_type {model_type!r} is not implemented; implemented: {', '.join(FAMILIES)}"
            + nearest(str(model_type), FAMILIES)
        )
    return FAMILIES[model_type]


def read_config(config: Mapping[str, Any], task: str | None = None) -> tuple[Config, str]:
    """The config and the task of a `config.json`, in the form of transformers 4 or 5.

    Args:
        task: what the model is for; None takes what `architectures` names.

    Raises:
        ConfigError: a missing key, or a family, task or feature that is not implemented (named in the message).

    Example:
        >>> sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2)
        >>> config, task = read_config({"model_type": "llama", "num_attention_heads": 4, **sizes})
        >>> config.head_dim, task
        (4, 'causal_lm')
        >>> read_config(write_config(config, task)) == (config, task)
        True
    """
    given = {name: value for name, value in config.items() if value is not None}
    if "model_type" not in given:
        raise ConfigError("no model_type, so this is no config of a Hugging Face model")
    family = family_of(given["model_type"])  # first: another family's missing keys would mislead
    config = given | {name: value for name, value in family.absent.items() if name not in config}
    if "quantization_config" in config:
        raise ConfigError("quantization_config: quantised checkpoints are not implemented; load the plain weights")
    if task is None:
        named = config.get("architectures") or [next(iter(family.architectures.values()))]
        if not isinstance(named, list):
            raise ConfigError(f"architectures must be a list of names, found {named!r}")
        tasks = [task for task, architecture in family.architectures.items() if architecture in named]
        if not tasks:
            known = "; implemented: " + ", ".join(dict.fromkeys(family.architectures.values()))
            known += f"; or give task=, one of {', '.join(family.architectures)}" if family.bare else ""
            raise ConfigError(f"architecture {named[0]!r} is not implemented{known}")
        task = tasks[0]
    if task not in family.architectures:
        raise ConfigError(
            f"task {task!r} is unknown for {config.get('model_type')}; known: {', '.join(family.architectures)}"
        )
    return family.read(config), task


def write_config(config: Config, task: str) -> dict[str, Any]:
    """The `config.json` that transformers 4 and 5 both read."""
    family = family_of(config.model_type)
    return {"architectures": [family.architectures[task]], **family.write(config)}


def build(
    config: Config, *, task: str, dtype: Any = jnp.float32, scan_layers: bool = True, mesh: Mesh | None = None
) -> Model:
    """The model of a config; activations and parameters in `dtype`."""
    family = family_of(config.model_type)
    return family.build(config, task=task, dtype=dtype, param_dtype=dtype, scan_layers=scan_layers, mesh=mesh)


def expected_leaves(model: Model) -> dict[str, jax.ShapeDtypeStruct]:
    """The parameters that a model asks for, by path; nothing is allocated."""
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    leaves: Any = flatten_dict(params, sep="/")
    return leaves


def tensors(model: Model, paths: Any = None) -> dict[str, list[Tensor]]:
    """The checkpoint tensors of each parameter, by its path (below `params`).

    Args:
        paths: of the parameters; all that the model asks for where None.

    Example:
        >>> from hadamax.models import DecoderConfig
        >>> model = Decoder(DecoderConfig(64, 16, 32, 2, 4, 2, 4))
        >>> [tensor.name for tensor in tensors(model)["layers/self_attn/q_proj/kernel"]]
        ['model.layers.0.self_attn.q_proj.weight', 'model.layers.1.self_attn.q_proj.weight']
    """
    family = family_of(model.config.model_type)
    prefix = "" if model.task in family.bare else family.prefix
    named = expected_leaves(model) if paths is None else paths
    return {path: tensors_of(path, model.config.num_hidden_layers, prefix, family.heads) for path in named}
