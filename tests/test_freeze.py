"""Choosing base leaves: what is split can be joined, and optax freezes what the mask says."""

import operator

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import hadamax as hx
from tests.test_inject import tree


def test_split_and_join_are_inverse_and_disjoint():
    params = tree()
    trainable, frozen = hx.split(params, ["norm", "layers_0/**/bias"])
    assert len(jax.tree.leaves(trainable)) == 3 + 4
    assert len(jax.tree.leaves(trainable)) + len(jax.tree.leaves(frozen)) == len(jax.tree.leaves(params))
    chex.assert_trees_all_equal(hx.join(trainable, frozen), params)


def test_an_nnx_state_is_split_and_joined():
    state = nnx.state(nnx.Linear(3, 3, rngs=nnx.Rngs(0)))
    trainable, frozen = hx.split(state, ["bias"])
    assert [leaf.shape for leaf in jax.tree.leaves(trainable)] == [(3,)]
    chex.assert_trees_all_equal(hx.join(trainable, frozen), state)


@pytest.mark.parametrize("function", [hx.split, hx.trainable_mask])
def test_a_pattern_that_selects_nothing_names_the_nearest(function):
    with pytest.raises(hx.NoMatchError, match="'nrom' matches no parameter; nearest: 'norm'"):
        function(tree(), ["nrom"])


def test_gradients_of_the_trainable_tree_have_no_frozen_leaf():
    trainable, frozen = hx.split(tree(), ["bias"])
    gradient = jax.grad(lambda t: sum((leaf**2).sum() for leaf in jax.tree.leaves(hx.join(t, frozen))))(trainable)
    assert jax.tree.structure(gradient) == jax.tree.structure(trainable)
    assert optax.adam(1e-3).init(trainable)[0].mu["params"]["embed"]["embedding"] is None


def test_the_mask_drives_optaxs_own_freezing():
    params = tree()
    mask = hx.trainable_mask(params, ["bias", "norm"])
    tx = optax.selective_transform(optax.sgd(0.1), freeze_mask=jax.tree.map(operator.not_, mask))
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    moved = jax.tree.map(lambda u: bool((u != 0).any()), updates)
    assert moved == mask
    labels = jax.tree.map(lambda train: "train" if train else "freeze", mask)
    tx = optax.partition({"train": optax.sgd(0.1), "freeze": optax.set_to_zero()}, labels)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    assert jax.tree.map(lambda u: bool((u != 0).any()), updates) == mask
