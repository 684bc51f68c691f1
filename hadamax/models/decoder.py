"""A decoder-only transformer (linen) for the families that descend from Llama, with Hugging Face's parameter names.

`params["params"]` holds `embed_tokens/embedding [V, D]`, `layers/...` (every leaf with a leading layer axis; or
`layers_0/...` with `scan_layers=False`), `norm/scale [D]` and, unless tied, `lm_head/kernel [D, V]`. Kernels are
`[in, out]`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from hadamax.errors import ConfigError
from hadamax.models.config import DecoderConfig
from hadamax.models.layers import Block, Context, Dense, Embedding, RMSNorm, project, rope_frequencies, soft_cap
from hadamax.models.loss import chunked_cross_entropy, positions_at_a_time
from hadamax.sharding import constrain

REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far. Slots are shared by the rows; `mask` tells which hold a token."""

    key: Array  # [L, B, length, KV, hd]
    value: Array  # [L, B, length, KV, hd]
    mask: Array  # [B, length] bool
    used: Array  # int32 scalar: slots filled, the same for every row


class Decoder(nn.Module):
    """Causal language model: Llama, Mistral, Qwen2, Qwen3, Gemma-2, as configured.

    Args:
        config: the architecture.
        dtype: of the activations and logits.
        param_dtype: of freshly initialised parameters; given parameters may have any dtype and are cast at their use.
        scan_layers: one stacked tree `layers/...` run by `nn.scan`; otherwise `layers_0/...`, `layers_1/...`.
        remat: "none", "full" (recompute each block in the backward pass) or "dots" (keep matrix products only).
        mesh: keeps the rows of the activations spread over `data` and `fsdp`; None for one device.

    Example:
        >>> config = DecoderConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        ...                        num_attention_heads=4, num_key_value_heads=2, head_dim=4)
        >>> model, ids = Decoder(config), jnp.zeros((1, 5), int)
        >>> params = model.init(jax.random.key(0), ids)
        >>> params["params"]["layers"]["self_attn"]["q_proj"]["kernel"].shape
        (2, 16, 16)
        >>> model.apply(params, ids).shape
        (1, 5, 64)
        >>> total, count = model.apply(params, ids, ids, jnp.ones((1, 5)), method="loss")
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    scan_layers: bool = True
    remat: str = "none"
    mesh: Mesh | None = None

    @property
    def task(self) -> str:
        """What the head is for, as in `hf.load_pretrained(task=)`."""
        return "causal_lm"

    @property
    def view(self) -> str | None:
        """Roles of the stacked kernels' axes, for `hx.inject(view=...)`."""
        return "bio" if self.scan_layers else None

    def setup(self):
        c, kinds = self.config, (self.dtype, self.param_dtype)
        if self.remat not in REMAT_POLICIES:
            raise ConfigError(f"remat {self.remat!r} is unknown; known: {', '.join(REMAT_POLICIES)}")
        self.embed_tokens = Embedding(c, *kinds, self.mesh)
        block: Any = Block
        if self.remat != "none":
            block = nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=not self.scan_layers)
        if self.scan_layers:
            axes: Any = (nn.broadcast, 0, 0)  # the context; by layer, whether it has the window, and the cache
            block = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=axes,
                length=c.num_hidden_layers,
            )
            self.layers: Any = block(c, *kinds, self.mesh)
        else:
            self.layers = [block(c, *kinds, self.mesh) for _ in range(c.num_hidden_layers)]
        self.norm = RMSNorm(c, *kinds)
        if not c.tie_word_embeddings:
            self.lm_head = Dense(c.vocab_size, False, c, *kinds)

    def _head(self) -> Callable[[Array], Array]:
        """Logits of hidden states, `[B, ..., D] -> [B, ..., V]`."""
        c = self.config
        # constrained here, so that it is gathered once and not for each piece of the loss
        if c.tie_word_embeddings:
            table, bias = constrain(self.embed_tokens.embedding, self.mesh, "tensor", None), None
        else:
            kernel, bias = self.lm_head.weights(c.hidden_size)
            table = constrain(kernel, self.mesh, None, "tensor")

        def logits(hidden: Array) -> Array:
            y = project(hidden, table, bias, self.dtype, transposed=c.tie_word_embeddings)
            y = constrain(y, self.mesh, "batch", *[None] * (y.ndim - 2), "tensor")
            return soft_cap(y, c.final_logit_softcapping)

        return logits

    def _hidden(self, input_ids, positions, mask, places, cache=None, used=None) -> tuple[Array, Any]:
        """Final hidden states `[B, S, D]`; with a cache also the new keys and values `[L, B, S, KV, hd]`."""
        angles = positions.astype(jnp.float32)[..., None] * jnp.asarray(rope_frequencies(self.config))[None, None, :]
        context = Context((jnp.cos(angles), jnp.sin(angles)), mask, places, used)
        sliding = None if self.config.sliding_layers is None else jnp.array(self.config.sliding_layers)
        x = self.embed_tokens(input_ids)
        if self.scan_layers:
            x, new = self.layers(x, context, sliding, cache)
        else:
            new = []
            for i, layer in enumerate(self.layers):
                x, kv = layer(x, context, *jax.tree.map(lambda leaf, i=i: leaf[i], (sliding, cache)))
                new.append(kv)
            new = jax.tree.map(lambda *leaves: jnp.stack(leaves), *new)
        return self.norm(x), new

    def _train_hidden(self, input_ids, attention_mask, positions, segment_ids):
        mask = None
        if attention_mask is not None:
            mask = attention_mask.astype(bool)[:, None, None, :]
        if segment_ids is not None:
            same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
            mask = same if mask is None else same & mask
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1])[None, :], input_ids.shape)
            if attention_mask is not None:
                positions = jnp.maximum(jnp.cumsum(attention_mask.astype(bool), axis=1) - 1, 0)
        slots = jnp.arange(input_ids.shape[1])[None, :]
        return self._hidden(input_ids, positions, mask, (slots, slots))[0]

    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        positions: Array | None = None,
        segment_ids: Array | None = None,
    ) -> Array:
        """Next-token logits `[B, S, V]` in `dtype`.

        A sliding window is counted along the row, so a row's tokens must stand together, padding left or right of them.

        Args:
            input_ids: `[B, S]` integers.
            attention_mask: `[B, S]`, nonzero where there is a token; padding may stand left or right.
            positions: `[B, S]`; counted from the mask's first token where absent. Only differences matter.
            segment_ids: `[B, S]` for packed rows: a token attends only to its own segment.
        """
        return self._head()(self._train_hidden(input_ids, attention_mask, positions, segment_ids))

    def loss(
        self,
        input_ids: Array,
        targets: Array,
        weights: Array,
        attention_mask: Array | None = None,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        chunk: int | None = None,
    ) -> tuple[Array, Array]:
        """Sum of the weighted cross-entropies and sum of the weights, without the logits of the whole batch.

        Args:
            targets: `[B, S]`, the token that each position is to predict (the caller shifts).
            weights: `[B, S]` float; 0 = ignored.
            chunk: positions whose logits exist at a time, `[B, chunk, V]` float32; None takes as many as
                `hadamax.models.loss.positions_at_a_time` allows.
        """
        hidden = self._train_hidden(input_ids, attention_mask, positions, segment_ids)
        chunk = positions_at_a_time(input_ids.shape[0], self.config.vocab_size, self.mesh) if chunk is None else chunk
        return chunked_cross_entropy(self._head(), hidden, targets, weights, chunk)

    @nn.nowrap
    def init_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for `length` tokens, prompt and generated ones together."""
        c = self.config
        zeros = jnp.zeros((c.num_hidden_layers, batch, length, c.num_key_value_heads, c.head_dim), self.dtype)
        return Cache(zeros, zeros, jnp.zeros((batch, length), bool), jnp.zeros((), jnp.int32))

    def decode(self, input_ids: Array, attention_mask: Array, cache: Cache) -> tuple[Array, Cache]:
        """Appends `input_ids [B, T]` to the cache; a sliding window counts tokens, not the padding between them.

        Args:
            attention_mask: `[B, T]`, nonzero where there is a token; padding may stand left or right.

        Returns:
            Logits `[B, V]` after each row's last token of `input_ids` (generation needs no others), and the cache.
        """
        batch, length = input_ids.shape
        valid = attention_mask.astype(bool)
        filled = jax.lax.dynamic_update_slice_in_dim(cache.mask, valid, cache.used, 1)
        places = jnp.maximum(jnp.cumsum(filled, axis=1) - 1, 0)  # of each slot's token in its row, padding left out
        positions = jax.lax.dynamic_slice_in_dim(places, cache.used, length, 1)
        slots = jnp.arange(filled.shape[1])
        causal = slots[None, :] <= cache.used + jnp.arange(length)[:, None]
        mask = filled[:, None, None, :] & causal[None, None, :, :]
        hidden, new = self._hidden(
            input_ids, positions, mask, (positions, places), cache=(cache.key, cache.value), used=cache.used
        )
        key, value = (
            jax.lax.dynamic_update_slice_in_dim(old, n, cache.used, 2) for old, n in zip(cache[:2], new, strict=True)
        )
        last = jnp.max(jnp.where(valid, jnp.arange(length)[None, :], 0), axis=1)
        hidden = hidden[jnp.arange(batch), last]
        return self._head()(hidden), Cache(key, value, filled, cache.used + length)
