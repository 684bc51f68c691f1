"""The layers of a decoder (linen)."""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from hadamax.models.config import ACTIVATIONS, DecoderConfig
from hadamax.sharding import constrain


def project(x: Array, kernel: Array, bias: Array | None, dtype: Any, *, transposed: bool = False) -> Array:
    """`x @ kernel (+ bias)` in `dtype`, accumulated as the hardware does (no wider result than the activations).

    A table of rows is `transposed`: to write its transpose would have XLA keep a copy of it through a loop.
    """
    y = jnp.tensordot(x, kernel.astype(dtype), (-1, 1 if transposed else 0))
    return y if bias is None else y + jnp.broadcast_to(bias.astype(dtype), y.shape)


class Dense(nn.Module):
    """A linear layer with kernel `[in, out]`.

    A `bias` leaf in the given parameters is used even where the config has none: merging an adapter may have added it.
    """

    features: int
    use_bias: bool
    config: DecoderConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def weights(self, width: int) -> tuple[Array, Array | None]:
        init = nn.initializers.normal(self.config.initializer_range)
        kernel = self.param("kernel", init, (width, self.features), self.param_dtype)
        if not (self.use_bias or self.has_variable("params", "bias")):
            return kernel, None
        return kernel, self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)

    def __call__(self, x: Array) -> Array:
        return project(x, *self.weights(x.shape[-1]), self.dtype)


class Embedding(nn.Module):
    """A token table `[V, D]`, scaled where configured. Ids outside it give NaN, which training notices."""

    config: DecoderConfig
    dtype: Any
    param_dtype: Any
    mesh: Mesh | None = None

    def setup(self):
        init = nn.initializers.normal(self.config.initializer_range)
        shape = (self.config.vocab_size, self.config.hidden_size)
        self.embedding = self.param("embedding", init, shape, self.param_dtype)

    def __call__(self, ids: Array) -> Array:
        x = self.embedding.at[ids].get(mode="fill", wrap_negative_indices=False)
        if self.config.scale_embeddings:
            x = x * jnp.asarray(math.sqrt(self.config.hidden_size), x.dtype)
        return constrain(x.astype(self.dtype), self.mesh, "batch", None, None)


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    config: DecoderConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        offset = self.config.norm_unit_offset
        init = nn.initializers.zeros if offset else nn.initializers.ones
        scale = self.param("scale", init, (x.shape[-1],), self.param_dtype)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.config.rms_norm_eps)
        if offset:  # in this form the product is rounded, in the other its factors
            return (x * jnp.broadcast_to(1 + scale.astype(jnp.float32), x.shape)).astype(self.dtype)
        return jnp.broadcast_to(scale.astype(self.dtype), x.shape) * x.astype(self.dtype)


def rope_frequencies(config: DecoderConfig) -> np.ndarray:
    """Angular frequency of each pair of channels, `[head_dim / 2]` float32, with Llama-3 scaling where configured."""
    inverse = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    rope = config.rope_scaling
    if rope is not None:
        turns = rope.original_max_position_embeddings * inverse / (2 * np.pi)
        smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        smooth = np.clip(smooth, 0.0, 1.0)  # 0: stretched, 1: kept
        inverse = (1 - smooth) * inverse / rope.factor + smooth * inverse
    return inverse.astype(np.float32)


def rotate(x: Array, rope: tuple[Array, Array]) -> Array:
    """Rotary embedding of `x [B, S, heads, hd]`, half-split: channel i is paired with i + hd / 2; float32 inside."""
    cos, sin = (jnp.broadcast_to(part[:, :, None, :], (*x.shape[:-1], x.shape[-1] // 2)) for part in rope)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def soft_cap(x: Array, cap: float | None) -> Array:
    """`cap tanh(x / cap)` in float32, in the dtype of x; x itself without a cap."""
    return x if cap is None else (cap * jnp.tanh(x.astype(jnp.float32) / cap)).astype(x.dtype)


def capped_attention(query: Array, key: Array, value: Array, mask: Array, scale: float, cap: float) -> Array:
    """`jax.nn.dot_product_attention` with soft-capped logits, which it cannot express; logits and softmax in float32.

    Args:
        query: `[B, T, N, H]`; N is a multiple of K.
        key: `[B, S, K, H]`, and so is `value`.
        mask: boolean, broadcastable to `[B, 1, T, S]`.
    """
    batch, length, heads, width = query.shape
    query = query.reshape(batch, length, key.shape[2], -1, width)
    logits = jnp.einsum("btkgh,bskh->bkgts", query, key, preferred_element_type=jnp.float32)
    mask = jnp.broadcast_to(mask[:, :, None], logits.shape)
    logits = jnp.where(mask, soft_cap(logits * scale, cap), -0.7 * jnp.finfo(jnp.float32).max)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, value).reshape(batch, length, heads, width)


class Context(NamedTuple):
    """What all layers share in one pass."""

    rope: tuple[Array, Array]  # cosines and sines, [B, T, hd / 2]
    mask: Array | None  # [B, 1, T or 1, S] bool; causality comes on top of it where there is no cache
    places: tuple[Array, Array]  # of the queries [B or 1, T] and of the keys [B or 1, S], for causality and windows
    used: Array | None  # filled slots of the cache


def _both(mask: Array | None, other: Array) -> Array:
    return other if mask is None else mask & other


class Attention(nn.Module):
    config: DecoderConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x, context, sliding, cache):
        c = self.config
        batch, length, width = x.shape

        def dense(name, features, use_bias=c.attention_bias):
            return Dense(features, use_bias, c, self.dtype, self.param_dtype, name=name)

        def heads(name, count):
            y = dense(f"{name}_proj", count * c.head_dim, c.attention_bias or c.qkv_bias)(x)
            y = y.reshape(batch, length, count, c.head_dim)
            if c.query_key_norm and name != "v":
                y = RMSNorm(c, self.dtype, self.param_dtype, name=f"{name}_norm")(y)
            return y

        query = rotate(heads("q", c.num_attention_heads), context.rope)
        key = rotate(heads("k", c.num_key_value_heads), context.rope)
        value = heads("v", c.num_key_value_heads)
        new = (key, value)
        if cache is not None:
            key, value = (
                jax.lax.dynamic_update_slice_in_dim(old, n, context.used, 1) for old, n in zip(cache, new, strict=True)
            )
        y = self._attend(query, key, value, context, sliding, is_causal=cache is None)
        y = dense("o_proj", width)(y.reshape(batch, length, -1))
        return y, None if cache is None else new

    def _attend(self, query, key, value, context, sliding, is_causal):
        """Masks stay implicit (`is_causal`, a window of all layers) where `dot_product_attention` has a word for it."""
        c = self.config
        mask, local, window, cap = context.mask, None, c.sliding_window, c.attn_logit_softcapping

        def distance():
            queries, keys = context.places
            return queries[:, None, :, None] - keys[:, None, None, :]

        if window is not None and window < key.shape[1]:
            if is_causal and sliding is None and cap is None:
                local = (window - 1, 0)
            else:
                near = distance() < window
                mask = _both(mask, near if sliding is None else near | ~sliding)
        scale = None if c.query_pre_attn_scalar is None else c.query_pre_attn_scalar**-0.5
        if cap is None:
            return jax.nn.dot_product_attention(
                query, key, value, mask=mask, scale=scale, is_causal=is_causal, local_window_size=local
            )
        mask = _both(mask, distance() >= 0)
        return capped_attention(query, key, value, mask, c.head_dim**-0.5 if scale is None else scale, cap)


class MLP(nn.Module):
    """A gated linear unit (Shazeer 2020, arXiv:2002.05202)."""

    config: DecoderConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x):
        c = self.config

        def dense(name, features):
            return Dense(features, c.mlp_bias, c, self.dtype, self.param_dtype, name=name)

        gate = ACTIVATIONS[c.hidden_act](dense("gate_proj", c.intermediate_size)(x))
        return dense("down_proj", c.hidden_size)(gate * dense("up_proj", c.intermediate_size)(x))


class Block(nn.Module):
    """Attention and MLP.

    Called with what all layers share and what is the layer's own: `sliding`, a boolean where only some layers have the
    window, and `cache`, keys and values.
    """

    config: DecoderConfig
    dtype: Any
    param_dtype: Any
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, x, context, sliding, cache):
        c, kinds = self.config, (self.dtype, self.param_dtype)

        def norm(name):
            return RMSNorm(c, *kinds, name=name)

        h, new = Attention(c, *kinds, name="self_attn")(norm("input_layernorm")(x), context, sliding, cache)
        if c.post_norms:  # "post_attention_layernorm" names another norm in each form
            x = x + norm("post_attention_layernorm")(h)
            h = MLP(c, *kinds, name="mlp")(norm("pre_feedforward_layernorm")(x))
            x = x + norm("post_feedforward_layernorm")(h)
        else:
            x = x + h
            x = x + MLP(c, *kinds, name="mlp")(norm("post_attention_layernorm")(x))
        return constrain(x, self.mesh, "batch", None, None), new
