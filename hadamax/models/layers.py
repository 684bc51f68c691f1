"""The layers of a decoder (linen)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hadamax.models.config import DecoderConfig


def project(x: Array, kernel: Array, bias: Array | None, dtype: Any) -> Array:
    """`x @ kernel (+ bias)` in `dtype`, accumulated as the hardware does (no wider result than the activations)."""
    y = jnp.dot(x, kernel.astype(dtype))
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
    """A token table `[V, D]`. Ids outside it give NaN, which training notices."""

    config: DecoderConfig
    dtype: Any
    param_dtype: Any

    def setup(self):
        init = nn.initializers.normal(self.config.initializer_range)
        shape = (self.config.vocab_size, self.config.hidden_size)
        self.embedding = self.param("embedding", init, shape, self.param_dtype)

    def __call__(self, ids: Array) -> Array:
        return jnp.take(self.embedding, ids, axis=0).astype(self.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    eps: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
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


class Attention(nn.Module):
    config: DecoderConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x, rope, mask, cache, used):
        c = self.config
        batch, length, width = x.shape

        def dense(name, features):
            return Dense(features, c.attention_bias, c, self.dtype, self.param_dtype, name=name)

        def heads(name, count):
            return dense(name, count * c.head_dim)(x).reshape(batch, length, count, c.head_dim)

        query = rotate(heads("q_proj", c.num_attention_heads), rope)
        key = rotate(heads("k_proj", c.num_key_value_heads), rope)
        value = heads("v_proj", c.num_key_value_heads)
        new = (key, value)
        if cache is not None:
            key, value = (
                jax.lax.dynamic_update_slice_in_dim(old, n, used, 1) for old, n in zip(cache, new, strict=True)
            )
        y = jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=cache is None)
        y = dense("o_proj", width)(y.reshape(batch, length, -1))
        return y, None if cache is None else new


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    config: DecoderConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x):
        c = self.config

        def dense(name, features):
            return Dense(features, c.mlp_bias, c, self.dtype, self.param_dtype, name=name)

        gate = jax.nn.silu(dense("gate_proj", c.intermediate_size)(x))
        return dense("down_proj", c.hidden_size)(gate * dense("up_proj", c.intermediate_size)(x))


class Block(nn.Module):
    config: DecoderConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x, rope, mask, used, cache):
        c, kinds = self.config, (self.dtype, self.param_dtype)
        h = RMSNorm(c.rms_norm_eps, *kinds, name="input_layernorm")(x)
        h, new = Attention(c, *kinds, name="self_attn")(h, rope, mask, cache, used)
        x = x + h
        h = RMSNorm(c.rms_norm_eps, *kinds, name="post_attention_layernorm")(x)
        return x + MLP(c, *kinds, name="mlp")(h), new
