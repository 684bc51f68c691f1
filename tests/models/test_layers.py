"""The decoder's parts against transformers' own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from hadamax.hf.decoders import write
from hadamax.models import DecoderConfig, Llama3Rope
from hadamax.models.config import ACTIVATIONS
from hadamax.models.layers import Dense, Embedding, RMSNorm, capped_attention, rope_frequencies, rotate

ROPE = Llama3Rope(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
# the rope of Llama-3.2-1B
CONFIG = DecoderConfig(
    61, 24, 40, 2, 4, 2, head_dim=64, rope_theta=5e5, rope_scaling=ROPE, max_position_embeddings=131072
)


def test_llama3_frequencies_equal_those_of_transformers_in_all_three_bands():
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](transformers.LlamaConfig(**write(CONFIG)), "cpu")
    ours = rope_frequencies(CONFIG)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)
    plain = CONFIG.rope_theta ** -(np.arange(0, 64, 2) / 64)
    share = ours / plain  # 1: kept, 1 / 32: stretched, between: mixed
    assert share[0] == pytest.approx(1) and share[-1] == pytest.approx(1 / 32)
    assert np.any((share > 0.04) & (share < 0.9))


def test_rotation_pairs_the_halves_as_transformers_does():
    x = np.random.default_rng(0).standard_normal((2, 9, 4, 64)).astype(np.float32)
    positions = np.arange(9)[None] + np.array([[0], [50]])
    cos, sin = LlamaRotaryEmbedding(transformers.LlamaConfig(**write(CONFIG)))(torch.tensor(x), torch.tensor(positions))
    theirs, _ = apply_rotary_pos_emb(*2 * (torch.tensor(x).transpose(1, 2),), cos, sin)
    angles = positions[..., None] * rope_frequencies(CONFIG)[None, None, :]
    ours = rotate(jnp.asarray(x), (jnp.cos(angles), jnp.sin(angles)))
    np.testing.assert_allclose(ours, theirs.transpose(1, 2).numpy(), atol=1e-4)


def test_rms_norm_is_computed_in_float32_and_rounded_as_in_transformers():
    x = (300 * np.random.default_rng(0).standard_normal((3, 16))).astype(np.float16)  # squares overflow float16
    scale = np.linspace(0.5, 2, 16, dtype=np.float16)
    config = dataclasses.replace(CONFIG, rms_norm_eps=1e-5)
    reference = LlamaRMSNorm(16, eps=1e-5).half()
    reference.weight.data = torch.tensor(scale)
    with torch.no_grad():
        expected = reference(torch.tensor(x)).numpy()
    found = RMSNorm(config, jnp.float16, jnp.float16).apply({"params": {"scale": scale}}, jnp.asarray(x))
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


GEMMA = dataclasses.replace(CONFIG, norm_unit_offset=True, scale_embeddings=True)


def test_the_norm_with_unit_offset_rounds_once_bit_for_bit_as_in_transformers():
    x = (3 * np.random.default_rng(0).standard_normal((50, 16))).astype(jnp.bfloat16)
    scale = np.linspace(-0.5, 1, 16).astype(jnp.bfloat16)
    reference = modeling_gemma2.Gemma2RMSNorm(16, eps=CONFIG.rms_norm_eps).bfloat16()
    reference.weight.data = torch.tensor(scale.astype(np.float32)).bfloat16()
    with torch.no_grad():
        expected = reference(torch.tensor(x.astype(np.float32)).bfloat16()).float().numpy()
    found = RMSNorm(GEMMA, jnp.bfloat16, jnp.bfloat16).apply({"params": {"scale": scale}}, jnp.asarray(x))
    found = np.asarray(found, np.float32)
    assert np.mean(found == expected) > 0.99  # the mean of squares may differ in its last bit
    np.testing.assert_allclose(found, expected, rtol=2**-7)
    assert (
        not RMSNorm(GEMMA, jnp.float32, jnp.float32).init(jax.random.key(0), jnp.ones((1, 4)))["params"]["scale"].any()
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_embeddings_are_scaled_in_the_tables_dtype_bit_for_bit_as_in_transformers(dtype):
    table = np.random.default_rng(0).standard_normal((61, 24)).astype(np.float32)
    reference = modeling_gemma2.Gemma2TextScaledWordEmbedding(61, 24, 0, embed_scale=24**0.5)
    reference.weight.data = torch.tensor(table)
    reference = reference.to(getattr(torch, dtype))
    with torch.no_grad():
        expected = reference(torch.arange(61)).float().numpy()
    found = Embedding(GEMMA, dtype, dtype).apply({"params": {"embedding": jnp.asarray(table, dtype)}}, jnp.arange(61))
    assert found.dtype == dtype and np.array_equal(np.asarray(found, np.float32), expected)


def test_soft_capped_attention_equals_that_of_transformers():
    rng = np.random.default_rng(0)
    query, key, value = (
        rng.standard_normal((2, length, heads, 6)).astype(np.float32) for length, heads in ((5, 4), (7, 2), (7, 2))
    )
    mask = rng.random((2, 1, 5, 7)) < 0.6
    mask[..., 0] = True
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    expected, _ = modeling_gemma2.eager_attention_forward(
        module,
        *(torch.tensor(x).transpose(1, 2) for x in (query, key, value)),
        torch.tensor(np.where(mask, 0, -1e38)),
        scaling=0.7,
        softcap=1.5,
    )
    found = capped_attention(*map(jnp.asarray, (query, key, value, mask)), 0.7, 1.5)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_equal_those_of_transformers(name):
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    np.testing.assert_allclose(ACTIVATIONS[name](x), ACT2FN[name](torch.tensor(x)).numpy(), atol=1e-6)
