"""Learning rates per leaf, schedules and the chain."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hadamax as hx
from train.config import OptimConfig
from train.optim import LEARNING_RATES, build, learning_rates, schedule


def test_every_method_has_a_default():
    assert set(LEARNING_RATES) == set(hx.METHODS)


def test_each_adapter_takes_its_methods_rate_and_second_factors_the_ratio():
    adapters = {
        "q": hx.abba(4).config,
        "k": hx.add(hx.hira(2), hx.lora(2)).config,
        "v": hx.scaled(hx.ia3(), 0.5).config,
    }
    layer = hx.Linear(jnp.ones((8, 6)))
    factors = {p: hx.adapter_from_config(c).init(jax.random.key(0), layer) for p, c in adapters.items()}
    trainable = {"adapters": factors, "base": {"norm": jnp.ones(3), "kernel": None}}
    rates = learning_rates(trainable, adapters, OptimConfig(lr_ratio=2, base_lr=7))
    assert jax.tree.structure(rates) == jax.tree.structure(trainable)
    hira, lora = LEARNING_RATES["hira"], LEARNING_RATES["lora"]
    assert rates["adapters"]["q"] == {"a1": 1e-3, "b1": 2e-3, "a2": 1e-3, "b2": 2e-3}
    assert rates["adapters"]["k"] == ({"a": hira, "b": 2 * hira}, {"a": lora, "b": 2 * lora})
    assert rates["adapters"]["v"] == {"weight": LEARNING_RATES["ia3"]}
    assert rates["base"] == {"norm": 7, "kernel": None}
    given = learning_rates(trainable, adapters, OptimConfig(lr=0.5))
    assert set(jax.tree.leaves(given["adapters"])) == {0.5}


@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "wsd"])
def test_schedules_rise_to_one_and_end_where_they_should(name, floor):
    end = 1.0 if name == "constant" else floor
    share = schedule(OptimConfig(schedule=name, warmup=0.1, min_lr_ratio=floor), 100)
    values = np.array([share(step) for step in range(101)])
    assert np.all(np.diff(values[:10]) > 0)
    np.testing.assert_allclose(values[9:11], 1.0, rtol=1e-6)
    assert values[100] == pytest.approx(end, abs=1e-6)
    assert np.all(np.diff(values[10:]) <= 1e-6)


def test_wsd_is_constant_until_the_last_steps_and_then_falls_linearly():
    share = schedule(OptimConfig(schedule="wsd", warmup=0.1, decay=0.25, min_lr_ratio=0.2), 100)
    values = [float(share(step)) for step in range(101)]
    np.testing.assert_allclose(values[10:76], 1.0, rtol=1e-6)
    np.testing.assert_allclose(np.diff(values[75:]), -0.8 / 25, rtol=1e-4)


def test_the_chain_is_adamw_with_a_rate_per_leaf_and_decay_of_the_base_alone():
    params = {"adapters": {"q": {"a": jnp.ones(3), "b": jnp.full(3, 2.0)}}, "base": {"norm": jnp.ones(3)}}
    grads = jax.tree.map(lambda leaf: jnp.arange(3.0) - 0.5, params)
    config = OptimConfig(lr=1e-2, base_lr=2e-3, lr_ratio=3, weight_decay=0.1, warmup=0.0, clip=0, schedule="constant")
    ours = build(config, learning_rates(params, {"q": {"method": "lora", "rank": 1}}, config), 10)
    got, _ = ours.update(grads, ours.init(params), params)
    factors = got["adapters"]["q"]
    for leaf, update, rate, decay in (
        (jnp.ones(3), factors["a"], 1e-2, 0.0),
        (jnp.full(3, 2.0), factors["b"], 3e-2, 0.0),
        (jnp.ones(3), got["base"]["norm"], 2e-3, 0.1),
    ):
        adamw = optax.adamw(rate, *config.betas, weight_decay=decay)
        expected, _ = adamw.update(jnp.arange(3.0) - 0.5, adamw.init(leaf), leaf)
        np.testing.assert_allclose(update, expected, rtol=1e-6)


def test_clipping_limits_the_global_norm():
    params = {"adapters": {"q": {"a": jnp.zeros(4)}}, "base": None}
    config = OptimConfig(lr=1.0, optimizer="sgd", clip=0.5, warmup=0.0, schedule="constant")
    chain = build(config, learning_rates(params, {"q": {"method": "lora"}}, config), 10)
    grads = {"adapters": {"q": {"a": jnp.full(4, 100.0)}}, "base": None}
    updates, _ = chain.update(grads, chain.init(params), params)
    np.testing.assert_allclose(optax.tree.norm(updates), 0.5, rtol=1e-5)
