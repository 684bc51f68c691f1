"""The layers and heads of BERT and RoBERTa (linen), each module under its name in Hugging Face's checkpoints."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from hadamax.models.decoder import REMAT_POLICIES
from hadamax.models.encoder_config import EncoderConfig
from hadamax.sharding import constrain

_tanh_gelu = functools.partial(jax.nn.gelu, approximate=True)
ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


class Part(nn.Module):
    """What the parts of an encoder share."""

    config: EncoderConfig
    dtype: Any
    param_dtype: Any

    def _dense(self, features: int, name: str | None = None) -> nn.Dense:
        init = nn.initializers.normal(self.config.initializer_range)
        return nn.Dense(features, dtype=self.dtype, param_dtype=self.param_dtype, kernel_init=init, name=name)

    def _norm(self, name: str | None = None) -> nn.LayerNorm:
        """In float32; the two-pass variance, because eps is 1e-12."""
        return nn.LayerNorm(
            self.config.layer_norm_eps, self.dtype, self.param_dtype, use_fast_variance=False, name=name
        )


class Table(nn.Module):
    """An embedding table `[rows, D]`. Ids outside it give NaN, which training notices."""

    rows: int
    config: EncoderConfig
    dtype: Any
    param_dtype: Any

    def setup(self):
        init = nn.initializers.normal(self.config.initializer_range)
        self.embedding = self.param("embedding", init, (self.rows, self.config.hidden_size), self.param_dtype)

    def __call__(self, ids: Array) -> Array:
        return self.embedding.at[ids].get(mode="fill", wrap_negative_indices=False).astype(self.dtype)


class Embeddings(Part):
    def setup(self):
        c, kinds = self.config, (self.config, self.dtype, self.param_dtype)
        self.word_embeddings = Table(c.vocab_size, *kinds)
        self.position_embeddings = Table(c.max_position_embeddings, *kinds)
        self.token_type_embeddings = Table(c.type_vocab_size, *kinds)
        self.LayerNorm = self._norm()

    def __call__(self, input_ids: Array, token_type_ids: Array | None) -> Array:
        if self.config.model_type == "roberta":  # from the ids and never from the mask, as transformers
            pad: Any = self.config.pad_token_id
            token = (input_ids != pad).astype(jnp.int32)
            positions = jnp.cumsum(token, axis=1) * token + pad
        else:
            positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1])[None, :], input_ids.shape)
        types = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        embedded = self.word_embeddings(input_ids) + self.token_type_embeddings(types)
        return self.LayerNorm(embedded + self.position_embeddings(positions))


class SelfAttention(Part):
    @nn.compact
    def __call__(self, x: Array, mask: Array | None) -> Array:
        shape = (*x.shape[:2], self.config.num_attention_heads, self.config.head_dim)
        query, key, value = (self._dense(x.shape[-1], name)(x).reshape(shape) for name in ("query", "key", "value"))
        return jax.nn.dot_product_attention(query, key, value, mask=mask).reshape(x.shape)


class Output(Part):
    """`dense`, then the residual and its norm."""

    @nn.compact
    def __call__(self, x: Array, residual: Array) -> Array:
        return self._norm("LayerNorm")(self._dense(self.config.hidden_size, "dense")(x) + residual)


class Attention(Part):
    @nn.compact
    def __call__(self, x: Array, mask: Array | None) -> Array:
        kinds = (self.config, self.dtype, self.param_dtype)
        return Output(*kinds, name="output")(SelfAttention(*kinds, name="self")(x, mask), x)


class Intermediate(Part):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        return ACTIVATIONS[self.config.hidden_act](self._dense(self.config.intermediate_size, "dense")(x))


class Layer(Part):
    mesh: Mesh | None

    @nn.compact
    def __call__(self, x: Array, mask: Array | None) -> tuple[Array, None]:
        kinds = (self.config, self.dtype, self.param_dtype)
        x = Attention(*kinds, name="attention")(x, mask)
        x = Output(*kinds, name="output")(Intermediate(*kinds, name="intermediate")(x), x)
        return constrain(x, self.mesh, "batch", None, None), None


class Layers(Part):
    scan_layers: bool
    remat: str
    mesh: Mesh | None

    def setup(self):
        count, kinds = self.config.num_hidden_layers, (self.config, self.dtype, self.param_dtype, self.mesh)
        layer: Any = Layer
        if self.remat != "none":
            layer = nn.remat(Layer, policy=REMAT_POLICIES[self.remat], prevent_cse=not self.scan_layers)
        if self.scan_layers:
            axes: Any = (nn.broadcast,)  # the mask
            split: Any = {"params": True}
            layer = nn.scan(layer, variable_axes={"params": 0}, split_rngs=split, in_axes=axes, length=count)
            self.layer: Any = layer(*kinds)
        else:
            self.layer = [layer(*kinds) for _ in range(count)]

    def __call__(self, x: Array, mask: Array | None) -> Array:
        x = constrain(x, self.mesh, "batch", None, None)
        for layer in [self.layer] if self.scan_layers else self.layer:
            x, _ = layer(x, mask)
        return x


class Pooler(Part):
    """The first token's state through a layer with tanh."""

    @nn.compact
    def __call__(self, hidden: Array) -> Array:
        return jnp.tanh(self._dense(self.config.hidden_size, "dense")(hidden[:, 0]))


class SentenceHead(Part):
    """RoBERTa's head for sequences: a pooler of its own, and the projection."""

    @nn.compact
    def __call__(self, hidden: Array) -> Array:
        pooled = jnp.tanh(self._dense(self.config.hidden_size, "dense")(hidden[:, 0]))
        return self._dense(self.config.num_labels, "out_proj")(pooled)


class Transform(Part):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = self._dense(self.config.hidden_size, "dense")(x)
        return self._norm("LayerNorm")(ACTIVATIONS[self.config.hidden_act](x))


class Predictions(Part):
    """BERT's masked-LM head: what the tied table is multiplied with, and the bias of the logits."""

    @nn.compact
    def __call__(self, hidden: Array) -> tuple[Array, Array]:
        hidden = Transform(self.config, self.dtype, self.param_dtype, name="transform")(hidden)
        return hidden, self.param("bias", nn.initializers.zeros, (self.config.vocab_size,), self.param_dtype)


class PretrainingHeads(Part):
    @nn.compact
    def __call__(self, hidden: Array) -> tuple[Array, Array]:
        return Predictions(self.config, self.dtype, self.param_dtype, name="predictions")(hidden)


class RobertaLMHead(Part):
    """RoBERTa's masked-LM head; the GELU is exact whatever `hidden_act` is, as in transformers."""

    @nn.compact
    def __call__(self, hidden: Array) -> tuple[Array, Array]:
        hidden = ACTIVATIONS["gelu"](self._dense(self.config.hidden_size, "dense")(hidden))
        hidden = self._norm("layer_norm")(hidden)
        return hidden, self.param("bias", nn.initializers.zeros, (self.config.vocab_size,), self.param_dtype)
