"""The guard of the optimiser: what a bad step leaves alone, what counts as a spike, and what ends a run."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train.guard import FIRST, NotFiniteError, SpikeError, check, guard

PARAMS = {"a": jnp.array([1.0, -0.0, 3e-30]), "b": jnp.array([[-0.0, 0.5]], jnp.bfloat16), "none": None}


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.fixture(params=[optax.adamw(0.1), optax.lion(0.1), optax.sgd(0.1, momentum=0.9)], ids=["adamw", "lion", "sgd"])
def optimizer(request):
    return guard(request.param)


def step_of(optimizer):
    @jax.jit
    def step(params, state, grads, value):
        updates, state = optimizer.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    return step


@pytest.mark.parametrize(
    "value, gradient", [(jnp.nan, 1.0), (jnp.inf, 1.0), (1.0, jnp.nan), (1.0, -jnp.inf), (1.0, 1e38)]
)
def test_a_bad_step_leaves_every_bit_of_parameters_and_optimiser_state(optimizer, value, gradient):
    step, grads = step_of(optimizer), jax.tree.map(jnp.ones_like, PARAMS)
    params, state = step(PARAMS, optimizer.init(PARAMS), grads, 1.0)
    params = jax.tree.map(lambda leaf, old: jnp.where(old == 0, old, leaf), params, PARAMS)  # has -0 again
    bad = grads | {"a": grads["a"].at[1].set(gradient)}
    after, state_after = step(params, state, bad, value)
    assert bits(after) == bits(params)
    assert bits(state_after.inner) == bits(state.inner)
    assert (state_after.means == state.means).all()
    assert (int(state_after.skipped), int(state_after.in_a_row), int(state_after.good)) == (1, 1, 1)
    params, state = step(after, state_after, grads, 1.0)
    assert bits(params) != bits(after)
    assert (int(state.skipped), int(state.in_a_row), int(state.good)) == (1, 0, 2)


def test_optax_tells_the_leaves_of_its_state_that_belong_to_parameters_from_counters(optimizer):
    marked = optax.tree.map_params(
        optimizer, lambda _: "param", optimizer.init(PARAMS), transform_non_params=lambda _: "other"
    )
    assert "param" in jax.tree.leaves(marked.inner)
    assert set(jax.tree.leaves(marked._replace(inner=None))) == {"other"}


def test_good_steps_are_those_of_the_optimiser_alone():
    inner = optax.adam(0.1)
    step, params, alone = step_of(guard(inner, spike=3.0)), PARAMS, PARAMS
    state, alone_state = guard(inner).init(params), inner.init(params)
    for i in range(3):
        grads = jax.tree.map(lambda leaf, i=i: jnp.full_like(leaf, i - 0.5), params)
        params, state = step(params, state, grads, 1.0)
        updates, alone_state = jax.jit(inner.update)(grads, alone_state, alone)
        alone = optax.apply_updates(alone, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(*np.float32([a, b]), rtol=1e-6), params, alone)


@pytest.mark.parametrize("loss, norm, bad", [(2.9, 2.9, 0), (3.1, 1.0, 1), (1.0, 3.1, 1)])
def test_a_spike_is_a_loss_or_a_gradient_above_its_factor_of_the_running_mean(loss, norm, bad):
    optimizer = guard(optax.sgd(0.0), spike=3.0)
    step, params = step_of(optimizer), jnp.zeros(1)
    state = optimizer.init(params)
    for i in range(FIRST):  # all values are 1 but for one that comes too early to be told
        _, state = step(params, state, jnp.ones(1), 9.0 if i == 0 else 1.0)
        assert int(state.skipped) == 0
    for _ in range(150):
        _, state = step(params, state, jnp.ones(1), 1.0)
    np.testing.assert_allclose(state.means, 1.0, atol=0.05)  # the early one is forgotten
    _, state = step(params, state, jnp.full(1, norm), loss)
    assert int(state.skipped) == bad


def values(loss=1.0, grad_norm=1.0, param_norm=1.0, bad=0):
    return {"loss": loss, "grad_norm": grad_norm, "param_norm": param_norm, "bad_in_a_row": bad}


@pytest.mark.parametrize(
    "steps, allowed, error, message",
    [
        ([values(), values(np.nan, bad=1), values()], 0, NotFiniteError, r"^loss is nan at step 9; stopped, no checkp"),
        ([values(np.nan, bad=1), values(bad=2)], 1, SpikeError, r"at step 10: loss 1, .* bad step 2 in a row \(optim"),
        ([values(), values(7.5, 2.0, bad=1)], 0, SpikeError, r"^a spike at step 10: loss 7.5, gradient norm 2; stop"),
        (
            [values(np.nan, param_norm=np.nan, bad=1)],
            9,
            NotFiniteError,
            r"^loss is nan at step 10, bad step 1 in a row",
        ),
        ([values(param_norm=np.inf)], 9, NotFiniteError, r"^param_norm is inf at step 10"),
    ],
)
def test_a_run_ends_at_more_bad_steps_in_a_row_than_allowed_or_a_parameter_out_of_range(steps, allowed, error, message):
    with pytest.raises(error, match=message) as caught:
        check(steps, 10, allowed, 0, Path("runs"))
    assert "\n" not in str(caught.value)


def test_bad_steps_within_what_is_allowed_go_on():
    check([values(np.nan, np.inf, bad=1), values(bad=2), values()], 10, 2, 0, Path("runs"))
