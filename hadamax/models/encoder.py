"""BERT and RoBERTa (linen) with the heads of fine-tuning, with the parameter names of Hugging Face.

    embeddings: word + token type + position, LayerNorm
    each layer: attention, add, LayerNorm; MLP, add, LayerNorm             (Devlin et al. 2019, arXiv:1810.04805)

`params["params"]` holds `embeddings/...`, `encoder/layer/...` (every leaf with a leading layer axis; or
`encoder/layer_0/...` with `scan_layers=False`) and what the task needs: `pooler`, `classifier`, `cls` (BERT's masked-LM
head) or `lm_head` (RoBERTa's). Kernels are `[in, out]`. There is no dropout, in training neither.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from hadamax.errors import ConfigError
from hadamax.models import encoder_layers as layers
from hadamax.models.decoder import REMAT_POLICIES
from hadamax.models.layers import project
from hadamax.models.loss import chunked_cross_entropy, positions_at_a_time
from hadamax.sharding import constrain

TASKS = ("hidden", "pooled", "sentence_embedding", "masked_lm", "token_classification", "sequence_classification")


class Encoder(layers.Part):
    """BERT or RoBERTa for one task.

    Args:
        config: the architecture.
        task: what `apply` returns, in `dtype`:
            "hidden": the last hidden states `[B, S, D]`;
            "pooled": BERT's pooler over the first token `[B, D]`;
            "sentence_embedding": the mean of the hidden states over the mask's tokens, of length one, `[B, D]`;
            "masked_lm": logits `[B, S, V]`, the word embeddings are the output table;
            "token_classification": logits `[B, S, labels]`;
            "sequence_classification": logits `[B, labels]`, or the values of a regression.
        dtype: of the activations and the output.
        param_dtype: of freshly initialised parameters; given parameters may have any dtype and are cast at their use.
        scan_layers: one stacked tree `encoder/layer/...` run by `nn.scan`; otherwise `encoder/layer_0/...` and so on.
        remat: "none", "full" (recompute each layer in the backward pass) or "dots" (keep matrix products only).
        mesh: keeps the rows of the activations spread over `data` and `fsdp`; None for one device.

    Raises:
        ConfigError: an unknown task or remat policy (when first used).

    Example:
        >>> from hadamax.models import EncoderConfig
        >>> config = EncoderConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        ...                        num_attention_heads=4)
        >>> model, ids = Encoder(config, task="sequence_classification"), jnp.ones((3, 5), int)
        >>> params = model.init(jax.random.key(0), ids)
        >>> params["params"]["encoder"]["layer"]["attention"]["self"]["query"]["kernel"].shape
        (2, 16, 16)
        >>> model.apply(params, ids).shape
        (3, 2)
        >>> total, count = model.apply(params, ids, jnp.array([0, 1, 1]), jnp.ones(3), method="loss")
    """

    task: str = "hidden"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    scan_layers: bool = True
    remat: str = "none"
    mesh: Mesh | None = None

    @property
    def view(self) -> str | None:
        """Roles of the stacked kernels' axes, for `hx.inject(view=...)`."""
        return "bio" if self.scan_layers else None

    def setup(self):
        kinds = (self.config, self.dtype, self.param_dtype)
        for name, choices in (("task", TASKS), ("remat", REMAT_POLICIES)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} {getattr(self, name)!r} is unknown; known: {', '.join(choices)}")
        roberta = self.config.model_type == "roberta"
        self.embeddings = layers.Embeddings(*kinds)
        self.encoder = layers.Layers(*kinds, self.scan_layers, self.remat, self.mesh)
        if self.task == "pooled" or (self.task == "sequence_classification" and not roberta):
            self.pooler = layers.Pooler(*kinds)
        if self.task == "sequence_classification" and roberta:
            self.classifier: Any = layers.SentenceHead(*kinds)
        elif self.task in ("sequence_classification", "token_classification"):
            self.classifier = self._dense(self.config.num_labels)
        if self.task == "masked_lm" and roberta:
            self.lm_head = layers.RobertaLMHead(*kinds)
        elif self.task == "masked_lm":
            self.cls = layers.PretrainingHeads(*kinds)

    def _hidden(self, input_ids, attention_mask, token_type_ids) -> Array:
        mask = None if attention_mask is None else attention_mask.astype(bool)[:, None, None, :]
        return self.encoder(self.embeddings(input_ids, token_type_ids), mask)

    def _masked_lm(self, hidden: Array) -> tuple[Array, Array, Array]:
        """The states that meet the table, the table `[V, D]` and the bias `[V]`."""
        hidden, bias = (self.lm_head if self.config.model_type == "roberta" else self.cls)(hidden)
        return hidden, constrain(self.embeddings.word_embeddings.embedding, self.mesh, "tensor", None), bias

    def __call__(
        self, input_ids: Array, attention_mask: Array | None = None, token_type_ids: Array | None = None
    ) -> Array:
        """The task's output; see the class.

        Args:
            input_ids: `[B, S]` integers.
            attention_mask: `[B, S]`, nonzero where there is a token; padding may stand left or right. "pooled" and
                "sequence_classification" read the first position, so padding stands right there.
            token_type_ids: `[B, S]`, 0 where absent.
        """
        hidden = self._hidden(input_ids, attention_mask, token_type_ids)
        match self.task:
            case "pooled":
                return self.pooler(hidden)
            case "sentence_embedding":
                return _mean_embedding(hidden, attention_mask)
            case "masked_lm":
                hidden, table, bias = self._masked_lm(hidden)
                return project(hidden, table, bias, self.dtype, transposed=True)
            case "token_classification":
                return self.classifier(hidden)
            case "sequence_classification":
                return self.classifier(hidden if self.config.model_type == "roberta" else self.pooler(hidden))
        return hidden

    def loss(
        self,
        input_ids: Array,
        labels: Array,
        weights: Array,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        chunk: int | None = None,
    ) -> tuple[Array, Array]:
        """Sum of the weighted losses and sum of the weights, float32; their ratio is the mean of transformers.

        Args:
            labels: "masked_lm" and "token_classification": `[B, S]` class ids. "sequence_classification" by the
                config's `problem_type`, where that is None by the labels themselves: regression for one class, one
                label for integers, else several. Class ids `[B]`; values `[B, labels]` (or `[B]` for one); 0 or 1
                `[B, labels]`.
            weights: `[B, S]` or `[B]` float; 0 = ignored, any label will do there (-100, say).
            chunk: positions whose masked-LM logits exist at a time, `[B, chunk, V]` float32; None takes as many as
                `hadamax.models.loss.positions_at_a_time` allows.

        Raises:
            ConfigError: a task without a loss, labels of another shape than the task's.
        """
        c = self.config
        if self.task == "masked_lm":
            hidden, table, bias = self._masked_lm(self._hidden(input_ids, attention_mask, token_type_ids))
            chunk = positions_at_a_time(input_ids.shape[0], c.vocab_size, self.mesh) if chunk is None else chunk
            logits = functools.partial(project, kernel=table, bias=bias, dtype=self.dtype, transposed=True)
            return chunked_cross_entropy(logits, hidden, labels, weights, chunk)
        if self.task not in ("token_classification", "sequence_classification"):
            raise ConfigError(f"task {self.task!r} has no loss; it gives features")
        logits = self(input_ids, attention_mask, token_type_ids).astype(jnp.float32)
        weights = weights.astype(jnp.float32)
        kind = "single_label_classification"
        if self.task == "sequence_classification":
            integers = jnp.issubdtype(labels.dtype, jnp.integer)
            chosen = "regression" if c.num_labels == 1 else kind if integers else "multi_label_classification"
            kind = c.problem_type or chosen
            if kind == "regression" and c.num_labels == 1:
                labels = labels.reshape(-1, 1)
        expected = logits.shape[:-1] if kind == "single_label_classification" else logits.shape
        if labels.shape != expected:
            raise ConfigError(f"{self.task} with {kind} needs labels of shape {expected}, found {labels.shape}")
        if kind == "single_label_classification":
            classes = jnp.where(weights == 0, 0, labels)
            picked = jnp.take_along_axis(logits, classes[..., None], axis=-1)[..., 0]
            losses = jax.nn.logsumexp(logits, axis=-1) - picked
        elif kind == "regression":
            losses = jnp.mean(jnp.square(logits - labels), axis=-1)
        else:  # binary cross-entropy of each label
            losses = jnp.mean(jax.nn.softplus(logits) - labels * logits, axis=-1)
        return jnp.sum(jnp.where(weights == 0, 0, weights * losses)), jnp.sum(weights)


def _mean_embedding(hidden: Array, attention_mask: Array | None) -> Array:
    """The mean over the mask's tokens, of length one, in float32 (Reimers and Gurevych 2019, arXiv:1908.10084)."""
    states = hidden.astype(jnp.float32)
    if attention_mask is not None:
        token = jnp.broadcast_to(attention_mask.astype(bool)[..., None], states.shape)
        states = jnp.where(token, states, 0.0)
    total = jnp.sum(states, axis=1)  # its length does not matter, so nor does the number of tokens
    square = jnp.sum(jnp.square(total), axis=-1, keepdims=True)
    return (total * jax.lax.rsqrt(jnp.maximum(square, 1e-24))).astype(hidden.dtype)
