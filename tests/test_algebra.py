"""Sanity that follows from the papers' algebra (each test names its source)."""

import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hadamax as hx
from hadamax.methods.abba import top_singular
from hadamax.methods.pairs import prefers_khatri_rao
from hadamax.methods.products import khatri_rao
from tests.test_methods import layer, perturbed

abba_module = sys.modules["hadamax.methods.abba"]  # the name in the package is the factory


def test_one_block_of_boha_is_hira(x64):
    linear = layer(0)
    f = perturbed(hx.hira(4).init(jax.random.key(1), linear))
    one = {"a": f["a"][None, None], "b": f["b"][None, None]}
    chex.assert_trees_all_close(hx.boha(4, 1).merge(one, linear).kernel, hx.hira(4).merge(f, linear).kernel, rtol=1e-13)
    init = hx.boha(4, 1).init(jax.random.key(1), linear)
    chex.assert_trees_all_equal(init["a"][0, 0], hx.hira(4).init(jax.random.key(1), linear)["a"])


def test_on_a_weight_of_ones_hira_is_lora_and_boha_is_gralora(x64):
    ones = hx.Linear(jnp.ones((16, 24)))
    f = perturbed(hx.lora(4).init(jax.random.key(1), ones))
    chex.assert_trees_all_close(hx.hira(4).merge(f, ones).kernel, hx.lora(4).merge(f, ones).kernel, rtol=1e-13)
    f = perturbed(hx.boha(4, 2).init(jax.random.key(1), ones))
    chex.assert_trees_all_close(hx.boha(4, 2).merge(f, ones).kernel, hx.gralora(4, 2).merge(f, ones).kernel, rtol=1e-13)


def test_hiras_toy_of_the_paper_is_exact_at_rank_one_where_lora_is_off_by_one(x64):
    w, e = jnp.array([[4.0, 2.0], [1.0, 2.0]]), jnp.array([[2.0, 1.0], [1.0, 2.0]])
    ratio = e / w
    assert np.linalg.matrix_rank(ratio) == 1
    f = {"a": ratio[:, :1], "b": ratio[:1] / ratio[0, 0]}
    chex.assert_trees_all_close(hx.hira(1).merge(f, hx.Linear(w)).kernel, w + e, rtol=1e-13)
    u, s, vt = np.linalg.svd(e)
    assert np.linalg.norm(e - s[0] * np.outer(u[:, 0], vt[0]), 2) == pytest.approx(1.0)


def test_abba_with_both_second_factors_zero_has_no_gradient_at_all(x64):
    linear, adapter = layer(0), hx.abba(4, init="kaiming")
    factors = adapter.init(jax.random.key(1), linear)
    x = jax.random.normal(jax.random.key(2), (5, 16), jnp.float64)
    gradient = jax.grad(lambda f: jnp.sin(adapter.dot(f, linear, x)).sum())(factors)
    assert all((g == 0).all() for g in jax.tree.leaves(gradient))


def test_abbas_scale_is_alpha_squared_over_the_root_of_the_ranks(x64):
    """The table of papers' and code's scales (s = alpha^2 / sqrt(r1 r2))."""
    for rank, alpha, s in [(16, 16, 32), (16, 24, 72), (32, 16, 16), (32, 32, 64), (64, 24, 18)]:
        linear = layer(0, n_in=32, n_out=32)
        f = perturbed(hx.abba(rank, alpha=alpha).init(jax.random.key(1), linear))
        by_alpha, by_scale = (a.merge(f, linear) for a in (hx.abba(rank, alpha=alpha), hx.abba(rank, scale=s)))
        chex.assert_trees_all_close(by_alpha, by_scale, rtol=1e-13)


def test_abbas_first_pair_is_the_best_approximation_of_the_kernel(x64):
    linear = layer(0, n_in=20, n_out=12)
    f = hx.abba(8).init(jax.random.key(1), linear)
    u, s, vt = np.linalg.svd(linear.kernel, full_matrices=False)
    chex.assert_trees_all_close(f["a1"] @ f["b1"], (u[:, :4] * s[:4]) @ vt[:4], rtol=1e-9, atol=1e-12)
    chex.assert_trees_all_close((f["a1"] ** 2).sum(0), s[:4], rtol=1e-10)
    chex.assert_trees_all_close((f["b1"] ** 2).sum(1), s[:4], rtol=1e-10)
    bound = (6 / 20) ** 0.5
    assert bound * 0.8 < jnp.abs(f["a2"]).max() <= bound and (f["b2"] == 0).all()


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (64, 500)])
def test_the_randomized_svd_agrees_with_the_exact_one_and_is_deterministic_under_its_key(shape, x64):
    kernel = jax.random.normal(jax.random.key(0), shape, jnp.float64)
    exact, again = top_singular(kernel, 8), top_singular(kernel, 8, key=jax.random.key(1))
    chex.assert_trees_all_equal(again, top_singular(kernel, 8, key=jax.random.key(1)))
    for values in (exact, again):
        assert (jnp.take_along_axis(values[0], jnp.abs(values[0]).argmax(0, keepdims=True), 0) > 0).all()
    chex.assert_trees_all_close(again[1], exact[1], rtol=0.02)

    def error(u, s, vt):
        return jnp.linalg.norm(kernel - (u * s[None]) @ vt)

    assert error(*again) < 1.002 * error(*exact)


def test_the_randomized_svd_is_exact_on_a_spectrum_that_decays(x64):
    u, _ = np.linalg.qr(np.asarray(jax.random.normal(jax.random.key(0), (200, 60), jnp.float64)))
    v, _ = np.linalg.qr(np.asarray(jax.random.normal(jax.random.key(1), (150, 60), jnp.float64)))
    kernel = jnp.asarray((u * 0.7 ** np.arange(60)) @ v.T)
    exact, random = top_singular(kernel, 10), top_singular(kernel, 10, key=jax.random.key(2))
    chex.assert_trees_all_close(random, exact, rtol=1e-7, atol=1e-9)


@settings(max_examples=30)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9))
def test_khatri_rao_is_the_hadamard_product_of_the_products(r1, r2, n_in, n_out):
    keys = jax.random.split(jax.random.key(0), 4)
    with jax.enable_x64(True):
        shapes = [(n_in, r1), (r1, n_out), (n_in, r2), (r2, n_out)]
        a1, b1, a2, b2 = (jax.random.normal(k, s, jnp.float64) for k, s in zip(keys, shapes, strict=True))
        product = khatri_rao(a1.T, a2.T).T @ khatri_rao(b1, b2)
        chex.assert_trees_all_close(product, (a1 @ b1) * (a2 @ b2), rtol=1e-12, atol=1e-12)


def test_the_digests_wrong_forward_is_not_what_abba_computes(x64):
    """`s (B1 (A1 x)) .* (B2 (A2 x))`, found in a digest of the paper, is another function."""
    linear, adapter = layer(0), hx.abba(4, scale=1.0)
    f = perturbed(adapter.init(jax.random.key(1), linear))
    x = jax.random.normal(jax.random.key(2), (5, 16), jnp.float64)
    wrong = x @ linear.kernel + (x @ f["a1"] @ f["b1"]) * (x @ f["a2"] @ f["b2"])
    assert jnp.abs(adapter.dot(f, linear, x) - wrong).max() > 0.1


def test_auto_takes_the_randomized_svd_for_large_kernels_and_the_exact_one_for_small(monkeypatch):
    monkeypatch.setattr(abba_module, "_LARGE", 16)
    for size, expected in ((16, "exact"), (17, "randomized")):
        linear = layer(0, n_in=size, n_out=20, dtype=jnp.float32)
        auto, named = (hx.abba(4, init=init).init(jax.random.key(0), linear) for init in ("auto", expected))
        chex.assert_trees_all_equal(auto, named)
    exact, randomized = (hx.abba(4, init=init).init(jax.random.key(0), linear) for init in ("exact", "randomized"))
    assert (exact["a1"] != randomized["a1"]).any()


@pytest.mark.parametrize(("rank", "n_in", "n_out"), [(16, 128, 128), (16, 1024, 1024), (32, 512, 2048)])
def test_the_cost_model_takes_the_forward_with_fewer_flops(rank, n_in, n_out):
    """Against XLA's own count of a training step's FLOPs, tokens enough for building the weights not to matter."""
    x = jax.ShapeDtypeStruct((4096, n_in), jnp.float32)
    linear = hx.Linear(jax.ShapeDtypeStruct((n_in, n_out), jnp.float32))

    def flops(forward):
        adapter = hx.abba(rank, forward=forward)
        factors = jax.eval_shape(hx.lora(1).init, jax.random.key(0), linear)
        r = rank // 2
        shapes = {"a1": (n_in, r), "b1": (r, n_out), "a2": (n_in, r), "b2": (r, n_out)}
        factors = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
        step = jax.grad(lambda f, x, linear: (adapter.dot(f, linear, x) ** 2).sum(), argnums=(0, 1))
        return jax.jit(step).lower(factors, x, linear).compile().cost_analysis()["flops"]

    r1 = r2 = rank // 2
    assert (flops("khatri_rao") < flops("merged")) == prefers_khatri_rao(r1, r2, n_in, n_out)
    assert flops("auto") == min(flops("khatri_rao"), flops("merged"))


def test_boha_reconstructs_with_rank_one_blocks_what_hira_needs_rank_b_squared_for(x64):
    """A b x b grid of independent rank-1 modulators (our reconstruction of BoHA's synthetic experiment, 12 x 12)."""
    b, size = 3, 12
    kernel = jax.random.uniform(jax.random.key(0), (size, size), jnp.float64, 0.5, 1.5)
    a, c = (jax.random.normal(jax.random.key(k), (b, b, size // b), jnp.float64) for k in (1, 2))
    blocks = {"a": a[..., None], "b": c[:, :, None, :]}
    target = hx.boha(b, b).merge(blocks, hx.Linear(kernel)).kernel
    modulator = target / kernel - 1
    assert np.linalg.matrix_rank(modulator) == b**2
    s = np.linalg.svd(modulator, compute_uv=False)
    assert s[b**2 - 1] / s[0] > 1e-2, "HiRA below rank b^2 misses a direction of this size"

    def fitted(adapter):
        """Alternating least squares would be exact; plain Adam shows that the optimum is found by training."""
        f = adapter.init(jax.random.key(3), hx.Linear(kernel))
        tx = optax.adam(optax.cosine_decay_schedule(0.05, 4000))

        def loss(f):
            return ((adapter.merge(f, hx.Linear(kernel)).kernel - target) ** 2).mean()

        def step(carry, _):
            f, state = carry
            updates, state = tx.update(jax.grad(loss)(f), state)
            return (optax.apply_updates(f, updates), state), None

        (f, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=4000))((f, tx.init(f)))
        return float(loss(f) / ((target - kernel) ** 2).mean())

    assert fitted(hx.boha(b, b)) < 1e-8
    assert fitted(hx.hira(b)) > 1e-2, "at the same budget HiRA cannot"
    assert fitted(hx.hira(b**2)) < 1e-4


def test_zeros_of_the_weight_stay_zero_under_hira_and_boha():
    kernel = jnp.ones((8, 8)).at[2].set(0)
    for adapter in (hx.hira(2), hx.boha(4, 2)):
        f = perturbed(adapter.init(jax.random.key(0), hx.Linear(kernel)))
        merged = adapter.merge(f, hx.Linear(kernel)).kernel
        assert (merged[2] == 0).all() and (merged[3] != 1).any()


def test_before_and_after_the_output_projection_fold_as_the_paper_leaves_open(x64):
    """`W_O (w .* a + b) + c` and `(W_O a + c) .* w + b`, with an attention output a."""
    linear = layer(0)
    x = jax.random.normal(jax.random.key(2), (5, 16), jnp.float64)
    for position, by_hand in [
        ("input", lambda f: (x * f["weight"][None] + f["bias"][None]) @ linear.kernel + linear.bias[None]),
        ("output", lambda f: (x @ linear.kernel + linear.bias[None]) * f["weight"][None] + f["bias"][None]),
    ]:
        adapter = hx.hadamard_adapter(position=position)
        f = perturbed(adapter.init(jax.random.key(1), linear))
        merged = adapter.merge(f, linear)
        chex.assert_trees_all_close(x @ merged.kernel + merged.bias[None], by_hand(f), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", [2, 3])
def test_the_higher_orders_of_the_fitting_study_are_the_polynomial_and_do_not_merge(order, x64):
    linear, adapter = layer(0), hx.hadamard_adapter(order=order)
    x = jax.random.normal(jax.random.key(2), (5, 16), jnp.float64)
    init = adapter.init(jax.random.key(1), linear)
    chex.assert_trees_all_close(adapter.dot(init, linear, x), x @ linear.kernel, rtol=1e-13)
    f = perturbed(init)
    a = x @ linear.kernel + linear.bias[None]
    y = f["weight"][None] * a + f["quadratic"][None] * a**2 + f["bias"][None]
    y = y + f["cubic"][None] * a**3 if order == 3 else y
    chex.assert_trees_all_close(adapter.dot(f, linear, x) + linear.bias[None], y, rtol=1e-11, atol=1e-12)
    with pytest.raises(hx.MergeError, match=f"order {order} is not affine"):
        adapter.merge(f, linear)
