"""The chunked loss is cross-entropy, and the logits of the whole batch never exist."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import hadamax as hx
from hadamax.models import Decoder, DecoderConfig
from hadamax.models.loss import chunked_cross_entropy

from .conftest import equations

VOCAB = 97  # a prime, so that no other axis has this length


@hypothesis.given(
    batch=st.integers(1, 3), length=st.integers(1, 9), chunk=st.integers(1, 12), seed=st.integers(0, 2**31 - 1)
)
@hypothesis.settings(max_examples=15)
def test_equals_torch_whatever_the_chunk(batch, length, chunk, seed):
    rng = np.random.default_rng(seed)
    logits = (3 * rng.standard_normal((batch, length, 5))).astype(np.float32)
    targets = rng.integers(0, 5, (batch, length))
    weights = (rng.random((batch, length)) * rng.integers(0, 2, (batch, length))).astype(np.float32)
    targets[weights == 0] = -100
    torch_logits = torch.tensor(logits, requires_grad=True)
    nll = torch.nn.functional.cross_entropy(torch_logits.mT, torch.tensor(targets), reduction="none")
    expected = (nll * torch.tensor(weights)).sum()
    expected.backward()

    @jax.jit
    def loss(hidden):
        return chunked_cross_entropy(lambda h: h, hidden, jnp.asarray(targets), jnp.asarray(weights), chunk)

    (total, count), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(logits))
    assert total.dtype == count.dtype == jnp.float32
    np.testing.assert_allclose(total, expected.item(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(count, weights.sum(), rtol=1e-6)
    np.testing.assert_allclose(gradient, torch_logits.grad.numpy(), atol=1e-6)


def decoder(tied, dtype=jnp.float32, cap=None):
    config = DecoderConfig(
        VOCAB, 16, 24, 2, 2, 1, 8, initializer_range=0.3, tie_word_embeddings=tied, final_logit_softcapping=cap
    )
    model = Decoder(config, dtype=dtype)
    ids = jax.random.randint(jax.random.key(1), (2, 32), 0, VOCAB)
    return model, jax.jit(model.init)(jax.random.key(0), ids), ids


@pytest.mark.parametrize(("tied", "cap"), [(False, None), (True, None), (True, 0.7)])
def test_the_method_equals_cross_entropy_of_the_logits_and_so_do_its_gradients(tied, cap):
    model, params, ids = decoder(tied, cap=cap)
    assert cap is None or 0.6 < np.abs(jax.jit(model.apply)(params, ids)).max() < cap
    mask = jnp.ones_like(ids).at[1, 20:].set(0)
    weights = mask[:, 1:].astype(jnp.float32) * 0.5
    inputs, targets = (ids[:, :-1], mask[:, :-1]), ids[:, 1:]

    def chunked(params):
        total, count = model.apply(params, inputs[0], targets, weights, inputs[1], chunk=7, method="loss")
        return total / count

    def dense(params):
        log_probs = jax.nn.log_softmax(model.apply(params, *inputs))
        picked = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
        return -jnp.sum(picked * weights) / jnp.sum(weights)

    found, expected = (jax.jit(jax.value_and_grad(loss))(params) for loss in (chunked, dense))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), found, expected)


def whole_batch_logits(program, params, tokens):
    """Shapes of the program's arrays that have a vocabulary axis and an entry for each token."""
    outputs = [v.aval for equation in equations(jax.make_jaxpr(program)(params).jaxpr) for v in equation.outvars]
    return [aval.shape for aval in outputs if VOCAB in aval.shape and aval.size >= tokens * VOCAB]


@pytest.mark.parametrize(("tied", "cap"), [(False, None), (True, None), (True, 0.7)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_logits_of_the_whole_batch_never_exist_forward_or_backward(tied, cap, dtype):
    model, params, ids = decoder(tied, dtype, cap)

    def chunked(params):
        return model.apply(params, ids, ids, jnp.ones(ids.shape), chunk=4, method="loss")[0]

    def dense(params):
        return jnp.sum(model.apply(params, ids))

    for transform in (lambda f: f, jax.grad):
        assert not whole_batch_logits(transform(chunked), params, ids.size)
        assert whole_batch_logits(transform(dense), params, ids.size)  # the search finds what is there


def test_an_adapter_on_the_head_reaches_the_loss():
    model, params, ids = decoder(tied=False)
    injection = hx.inject({"lm_head": hx.hira(2), "q_proj": hx.lora(2)}, view=model.view)
    adapters = injection.init(jax.random.key(2), params)
    adapters = jax.tree.map(lambda leaf: leaf + 0.3, adapters)  # away from the identity

    def loss(fn):
        return jax.jit(lambda *args: fn(*args, ids, ids, jnp.ones(ids.shape), method="loss")[0])

    lazy = loss(injection.apply(model.apply))(params, adapters)
    assert abs(lazy - loss(model.apply)(params)) > 1.0
    np.testing.assert_allclose(lazy, loss(model.apply)(injection.merge(params, adapters)), rtol=1e-5)
