"""The decoder's parts against transformers' own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from hadamax.hf.decoders import write_llama
from hadamax.models import DecoderConfig, Llama3Rope
from hadamax.models.layers import Dense, RMSNorm, rope_frequencies, rotate

ROPE = Llama3Rope(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
# the rope of Llama-3.2-1B
CONFIG = DecoderConfig(
    61, 24, 40, 2, 4, 2, head_dim=64, rope_theta=5e5, rope_scaling=ROPE, max_position_embeddings=131072
)


def test_llama3_frequencies_equal_those_of_transformers_in_all_three_bands():
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](transformers.LlamaConfig(**write_llama(CONFIG)), "cpu")
    ours = rope_frequencies(CONFIG)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)
    plain = CONFIG.rope_theta ** -(np.arange(0, 64, 2) / 64)
    share = ours / plain  # 1: kept, 1 / 32: stretched, between: mixed
    assert share[0] == pytest.approx(1) and share[-1] == pytest.approx(1 / 32)
    assert np.any((share > 0.04) & (share < 0.9))


def test_rotation_pairs_the_halves_as_transformers_does():
    x = np.random.default_rng(0).standard_normal((2, 9, 4, 64)).astype(np.float32)
    positions = np.arange(9)[None] + np.array([[0], [50]])
    cos, sin = LlamaRotaryEmbedding(transformers.LlamaConfig(**write_llama(CONFIG)))(
        torch.tensor(x), torch.tensor(positions)
    )
    theirs, _ = apply_rotary_pos_emb(*2 * (torch.tensor(x).transpose(1, 2),), cos, sin)
    angles = positions[..., None] * rope_frequencies(CONFIG)[None, None, :]
    ours = rotate(jnp.asarray(x), (jnp.cos(angles), jnp.sin(angles)))
    np.testing.assert_allclose(ours, theirs.transpose(1, 2).numpy(), atol=1e-4)


def test_rms_norm_is_computed_in_float32_and_rounded_as_in_transformers():
    x = (300 * np.random.default_rng(0).standard_normal((3, 16))).astype(np.float16)  # squares overflow float16
    scale = np.linspace(0.5, 2, 16, dtype=np.float16)
    reference = LlamaRMSNorm(16, eps=1e-5).half()
    reference.weight.data = torch.tensor(scale)
    with torch.no_grad():
        expected = reference(torch.tensor(x)).numpy()
    found = RMSNorm(1e-5, jnp.float16, jnp.float16).apply({"params": {"scale": scale}}, jnp.asarray(x))
    assert found.dtype == jnp.float16
    np.testing.assert_allclose(found.astype(np.float32), expected.astype(np.float32), rtol=2e-3)


def test_a_bias_leaf_is_used_though_the_config_has_none_and_never_made_unasked():
    dense = Dense(3, False, CONFIG, jnp.float32, jnp.float32)
    x = jnp.ones((2, 4))
    params = dense.init(jax.random.key(0), x)["params"]
    assert set(params) == {"kernel"}
    plain = dense.apply({"params": params}, x)
    shifted = dense.apply({"params": {**params, "bias": jnp.array([1.0, 2.0, 3.0])}}, x)
    np.testing.assert_allclose(shifted - plain, np.tile([1.0, 2.0, 3.0], (2, 1)), rtol=1e-6)
