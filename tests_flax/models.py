"""Tiny random models of transformers' Flax classes, and their parameters."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import transformers

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
IDS = np.random.default_rng(0).integers(3, SIZES["vocab_size"], (3, 7))


class Made(NamedTuple):
    """A model and its parameters, apart: the form that `from_pretrained(..., _do_init=False)` returns."""

    model: Any
    params: Any

    def variant(self, **options) -> Any:
        """The same architecture with other options, for the same parameters."""
        return type(self.model)(self.model.config, _do_init=False, **options)


@functools.cache
def llama(attention_bias: bool = True) -> Made:
    config = transformers.LlamaConfig(
        **SIZES, num_key_value_heads=2, attention_bias=attention_bias, tie_word_embeddings=False, pad_token_id=0
    )
    return _make(transformers.FlaxLlamaForCausalLM, config)


@functools.cache
def gpt2() -> Made:
    config = transformers.GPT2Config(**SIZES, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return _make(transformers.FlaxGPT2LMHeadModel, config)


@functools.cache
def bert(head: str = "ForSequenceClassification") -> Made:
    return _make(getattr(transformers, f"FlaxBert{head}"), transformers.BertConfig(**SIZES, num_labels=16))


FAMILIES = {"llama": llama, "gpt2": gpt2, "bert": bert}
VIEWS = {"llama": None, "gpt2": "oi", "bert": None}  # FlaxConv1D holds its kernels [out, in]


def _make(cls, config) -> Made:
    model = cls(config, _do_init=False)
    shapes = jax.eval_shape(lambda: model.init_weights(jax.random.key(0), (1, 1)))
    # every leaf is random: zero biases and unit norms would hide a mix-up
    plain = jax.tree.map_with_path(
        lambda keys, leaf: jnp.full(leaf.shape, float(keys[-1].key in ("scale", "weight")), leaf.dtype), shapes
    )
    return Made(model, perturbed(plain, size=0.2))


def perturbed(tree, size=0.3):
    """A tree of arrays as training might leave it: no leaf at its initial value."""
    rng = np.random.default_rng(7)
    return jax.tree.map(lambda leaf: leaf + jnp.asarray(size * rng.standard_normal(leaf.shape), leaf.dtype), tree)
