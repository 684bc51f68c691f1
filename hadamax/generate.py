"""Greedy decoding with a key-value cache."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hadamax.errors import ConfigError
from hadamax.lazy import lazily


def generate(
    model: Any,
    params: Any,
    input_ids: Array,
    attention_mask: Array,
    *,
    max_new_tokens: int,
    eos_id: int | Sequence[int] | None,
    pad_id: int,
    apply: Callable[..., Any] | None = None,
) -> Array:
    """The most likely continuation of each prompt, token by token.

    One program is compiled per model, shape and `apply`; it stops when every row has ended.

    Args:
        model: a `Decoder`.
        params: what `apply` takes first: the model's variables, or any tree of arrays that holds them.
        input_ids: `[B, S]` prompts, padded left or right.
        attention_mask: `[B, S]`, nonzero where there is a token; every row has at least one.
        eos_id: token or tokens that end a row; None never ends.
        pad_id: fills a row after its end.
        apply: `(params, *args, method=...)`, `model.apply` by default. Weights that it closes over are compiled in as
            constants and a new function compiles anew: put adapters into `params` and pass one function.

    Returns:
        New tokens `[B, max_new_tokens]` int32, the end token included.

    Raises:
        ConfigError: `max_new_tokens` below 1, or shapes that differ.

    Example: adapters, unmerged
        >>> from hadamax.models import Decoder, DecoderConfig
        >>> config = DecoderConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        ...                        num_attention_heads=4, num_key_value_heads=2, head_dim=4)
        >>> model, ids = Decoder(config), jnp.array([[1, 2, 3]])
        >>> params = model.init(jax.random.key(0), ids)
        >>> def apply(pair, *args, **kwargs):  # stands for injection.apply(model.apply)(*pair, ...)
        ...     return model.apply(pair[0], *args, **kwargs)
        >>> mask = jnp.ones_like(ids)
        >>> generate(model, (params, {}), ids, mask, max_new_tokens=4, eos_id=None, pad_id=0, apply=apply).shape
        (1, 4)
    """
    if input_ids.ndim != 2 or input_ids.shape != attention_mask.shape:
        raise ConfigError(
            "input_ids and attention_mask must both be [batch, length], "
            f"found {input_ids.shape} and {attention_mask.shape}"
        )
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be at least 1, found {max_new_tokens}")
    ends = () if eos_id is None else tuple(int(i) for i in np.atleast_1d(eos_id))
    return _greedy(model, apply, max_new_tokens, ends, params, input_ids, attention_mask, jnp.int32(pad_id))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _greedy(model, apply, max_new_tokens, ends, params, input_ids, attention_mask, pad_id):
    apply = lazily(model.apply) if apply is None else apply
    batch, length = input_ids.shape
    logits, cache = apply(
        params, input_ids, attention_mask, model.init_cache(batch, length + max_new_tokens), method="decode"
    )
    tokens = jnp.full((batch, max_new_tokens), pad_id)

    def choose(logits, done):
        token = jnp.where(done, pad_id, jnp.argmax(logits, axis=-1).astype(jnp.int32))
        ended = jnp.isin(token, jnp.array(ends, jnp.int32)) if ends else jnp.zeros_like(done)
        return token, done | ended

    def unfinished(state):
        step, _, done, *_ = state
        return (step < max_new_tokens) & ~jnp.all(done)

    def step(state):
        step, token, done, tokens, cache = state
        logits, cache = apply(params, token[:, None], jnp.ones((batch, 1), bool), cache, method="decode")
        token, done = choose(logits, done)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], step, 1)
        return step + 1, token, done, tokens, cache

    token, done = choose(logits, jnp.zeros(batch, bool))
    tokens = tokens.at[:, 0].set(token)
    return jax.lax.while_loop(unfinished, step, (1, token, done, tokens, cache))[3]
