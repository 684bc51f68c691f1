"""Tiny random Llamas, made and saved by transformers itself."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import torch
import transformers

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}


class Reference(NamedTuple):
    model: Any
    directory: Path

    def logits(self, ids, mask) -> np.ndarray:
        return torch_logits(self.model, ids, mask)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params, ids, mask=None):
    return model.apply(params, ids, mask)


def torch_logits(model, ids, mask) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.float().numpy()


def assert_same(found, expected):
    """The same trees, bit for bit and dtype for dtype."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)


@pytest.fixture
def llama(tmp_path):
    """`llama(directory_name="base", max_shard_size=..., dtype=..., **config)` -> Reference."""

    def make(name="base", max_shard_size="5GB", dtype=torch.float32, **overrides):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **overrides})).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # norms and biases too: their defaults would hide a mix-up
                parameter.add_(0.2 * torch.randn_like(parameter))
        model = model.to(dtype)
        model.save_pretrained(tmp_path / name, max_shard_size=max_shard_size)
        return Reference(model, tmp_path / name)

    return make


@pytest.fixture
def batch():
    """Ids and mask of three rows: whole, padded left, padded right."""
    ids = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (3, 36))
    mask = np.ones_like(ids)
    mask[1, :7] = 0
    mask[2, -5:] = 0
    return ids, mask
