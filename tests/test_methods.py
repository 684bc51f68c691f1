"""The contract: one suite over every method, in float64 where exactness is claimed."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import hadamax as hx
from tests.cases import CASES, Case

IN, OUT = 16, 24
every_method = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_bias = pytest.mark.parametrize("with_bias", [False, True], ids=["no-bias", "bias"])


def layer(key, *, with_bias=True, n_in=IN, n_out=OUT, dtype=jnp.float64) -> hx.Linear:
    k1, k2 = jax.random.split(jax.random.key(key))
    bias = jax.random.normal(k2, (n_out,), dtype) if with_bias else None
    return hx.Linear(jax.random.normal(k1, (n_in, n_out), dtype) / n_in**0.5, bias)


def perturbed(factors, key=7, size=0.3):
    """Factors as training might leave them: none at its initial value."""
    leaves, tree = jax.tree.flatten(factors)
    keys = jax.random.split(jax.random.key(key), len(leaves))
    noisy = [f + size * jax.random.normal(k, f.shape, f.dtype) for f, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, noisy)


def output(adapter, factors, linear, x):
    """The adapted layer as a model computes it: dot, then the layer's own bias."""
    y = adapter.dot(factors, linear, x)
    return y if linear.bias is None else y + linear.bias[None]


def merged_output(linear: hx.Linear, x):
    y = x @ linear.kernel
    return y if linear.bias is None else y + linear.bias[None]


@every_bias
@every_method
def test_is_the_base_layer_at_init(case: Case, with_bias, x64):
    linear, x = layer(0, with_bias=with_bias), jax.random.normal(jax.random.key(1), (5, IN), jnp.float64)
    factors = case.adapter.init(jax.random.key(2), linear)
    merged = case.adapter.merge(factors, linear)
    chex.assert_trees_all_close(merged.kernel, linear.kernel, rtol=1e-15)
    chex.assert_trees_all_close(0 if merged.bias is None else merged.bias, 0 if linear.bias is None else linear.bias)
    chex.assert_trees_all_close(case.adapter.dot(factors, linear, x), x @ linear.kernel, rtol=1e-13)


@every_method
def test_init_leaves_a_weight_exactly_as_it_is(case: Case):
    """In float32 and to the bit, except where a norm divides (DoRA)."""
    linear = layer(0, dtype=jnp.float32)
    merged = case.adapter.merge(case.adapter.init(jax.random.key(2), linear), linear)
    if case.adapter.config["method"] == "dora":
        chex.assert_trees_all_close(merged.kernel, linear.kernel, rtol=3e-7)
    else:
        assert (merged.kernel == linear.kernel).all() and (merged.bias == linear.bias).all()


@every_bias
@every_method
def test_dot_equals_merged_equals_the_dense_formula(case: Case, with_bias, x64):
    linear, x = layer(0, with_bias=with_bias), jax.random.normal(jax.random.key(1), (5, IN), jnp.float64)
    factors = perturbed(case.adapter.init(jax.random.key(2), linear))
    merged = case.adapter.merge(factors, linear)
    w, c = case.formula(
        jax.tree.map(np.asarray, factors), np.asarray(linear.kernel).T, None if not with_bias else linear.bias
    )
    chex.assert_trees_all_close(merged.kernel, w.T, rtol=1e-12, atol=1e-13)
    assert (merged.bias is None) == (c is None)
    if c is not None:
        chex.assert_trees_all_close(merged.bias, c, rtol=1e-12, atol=1e-13)
    assert float(jnp.abs(merged.kernel - linear.kernel).max()) > 1e-3 or case.adapter.config.get("weight") is False
    chex.assert_trees_all_close(
        output(case.adapter, factors, linear, x), merged_output(merged, x), rtol=1e-12, atol=1e-12
    )


@every_method
def test_parameter_count_is_the_formula(case: Case):
    factors = jax.eval_shape(case.adapter.init, jax.random.key(0), layer(0, dtype=jnp.float32))
    assert sum(leaf.size for leaf in jax.tree.leaves(factors)) == case.count(IN, OUT)


@every_method
def test_gradients_of_dot_and_of_merged_agree(case: Case, x64):
    linear, x = layer(0), jax.random.normal(jax.random.key(1), (5, IN), jnp.float64)
    factors = perturbed(case.adapter.init(jax.random.key(2), linear))

    def loss(forward):
        return lambda f: jnp.sin(forward(f)).sum()

    by_dot = jax.grad(loss(lambda f: output(case.adapter, f, linear, x)))(factors)
    by_merge = jax.grad(loss(lambda f: merged_output(case.adapter.merge(f, linear), x)))(factors)
    chex.assert_trees_all_close(by_dot, by_merge, rtol=1e-10, atol=1e-11)
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(by_dot)), "a factor without a gradient"


@every_method
def test_gradients_at_init_vanish_exactly_where_the_mathematics_says(case: Case, x64):
    linear, x = layer(0), jax.random.normal(jax.random.key(1), (5, IN), jnp.float64)
    factors = case.adapter.init(jax.random.key(2), linear)
    gradient = jax.grad(lambda f: jnp.sin(output(case.adapter, f, linear, x)).sum())(factors)
    for keys, g in jax.tree_util.tree_flatten_with_path(gradient)[0]:
        assert bool((g == 0).all()) == (keys[-1].key in case.still), keys


@every_method
def test_a_few_steps_of_optax_lower_a_loss(case: Case):
    linear = layer(0, dtype=jnp.float32)
    x = jax.random.normal(jax.random.key(1), (32, IN))
    target = perturbed(linear, size=0.05)
    y = merged_output(target, x)
    factors, tx = case.adapter.init(jax.random.key(2), linear), optax.adam(3e-3)

    def loss(f):
        return jnp.mean((output(case.adapter, f, linear, x) - y) ** 2)

    @jax.jit
    def step(f, state):
        updates, state = tx.update(jax.grad(loss)(f), state)
        return optax.apply_updates(f, updates), state

    state, before = tx.init(factors), loss(factors)
    for _ in range(30):
        factors, state = step(factors, state)
    assert loss(factors) < before


@every_method
def test_jit_and_vmap_over_a_batch_of_layers_agree_with_one_at_a_time(case: Case, x64):
    linears = [layer(key) for key in range(3)]
    factors = [perturbed(case.adapter.init(jax.random.key(9), linear)) for linear in linears]
    xs = jax.random.normal(jax.random.key(1), (3, 5, IN), jnp.float64)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *zip(factors, linears, strict=True))
    batched = jax.jit(jax.vmap(case.adapter.dot))(*stacked, xs)
    single = jnp.stack([case.adapter.dot(f, linear, x) for f, linear, x in zip(factors, linears, xs, strict=True)])
    chex.assert_trees_all_close(batched, single, rtol=1e-12, atol=1e-12)


@every_method
def test_scan_over_stacked_layers_agrees_with_a_loop(case: Case, x64):
    square = [layer(key, n_in=IN, n_out=IN) for key in range(3)]
    factors = [perturbed(case.adapter.init(jax.random.key(9), linear)) for linear in square]
    x = jax.random.normal(jax.random.key(1), (5, IN), jnp.float64)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *zip(factors, square, strict=True))

    def run(stacked):
        return jax.lax.scan(lambda h, args: (jnp.tanh(case.adapter.dot(*args, h)), None), x, stacked)[0].sum()

    def loop(stacked):
        h = x
        for at in range(3):
            h = jnp.tanh(case.adapter.dot(*jax.tree.map(lambda leaf, at=at: leaf[at], stacked), h))
        return h.sum()

    for a, b in zip(
        jax.value_and_grad(lambda f: run((f, stacked[1])))(stacked[0]),
        jax.value_and_grad(lambda f: loop((f, stacked[1])))(stacked[0]),
        strict=True,
    ):
        chex.assert_trees_all_close(a, b, rtol=1e-9, atol=1e-11)


@every_method
def test_sharded_over_a_mesh_agrees_with_one_device(case: Case):
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def place(value, *spec):
        return jax.device_put(value, NamedSharding(mesh, PartitionSpec(*spec)))

    linear, x = layer(0, dtype=jnp.float32), jax.random.normal(jax.random.key(1), (8, IN))
    factors = perturbed(case.adapter.init(jax.random.key(2), linear))
    sharded = hx.Linear(place(linear.kernel, None, "tensor"), place(linear.bias, "tensor"))
    y = jax.jit(case.adapter.dot)(
        jax.device_put(factors, NamedSharding(mesh, PartitionSpec())), sharded, place(x, "data")
    )
    chex.assert_trees_all_close(y, case.adapter.dot(factors, linear, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
@every_method
def test_half_precision_layers_keep_wide_factors_and_round_once(case: Case, dtype):
    linear, x = layer(0, dtype=dtype), jax.random.normal(jax.random.key(1), (5, IN), dtype)
    factors = perturbed(case.adapter.init(jax.random.key(2), linear))
    assert {leaf.dtype for leaf in jax.tree.leaves(factors)} == {jnp.dtype("float32")}
    merged = case.adapter.merge(factors, linear)
    y = case.adapter.dot(factors, linear, x)
    assert merged.kernel.dtype == merged.bias.dtype == y.dtype == dtype
    wide = case.adapter.merge(factors, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), linear))
    chex.assert_trees_all_equal(merged, jax.tree.map(lambda leaf: leaf.astype(dtype), wide))
    exact = x.astype(jnp.float32) @ wide.kernel + (wide.bias - linear.bias)[None]
    chex.assert_trees_all_close(y.astype(jnp.float32), exact, rtol=0.05, atol=0.05)


@every_method
def test_factors_survive_serialisation_and_the_config_rebuilds_the_adapter(case: Case, x64):
    linear = layer(0)
    factors = perturbed(case.adapter.init(jax.random.key(2), linear))
    rebuilt = hx.adapter_from_config(json.loads(json.dumps(case.adapter.config)))
    assert rebuilt.config == case.adapter.config
    blank = rebuilt.init(jax.random.key(3), linear)
    restored = serialization.from_bytes(blank, serialization.to_bytes(factors))
    chex.assert_trees_all_equal(restored, factors)
    merged = case.adapter.merge(factors, linear)
    chex.assert_trees_all_close(rebuilt.merge(restored, linear), merged, rtol=1e-14)


@every_method
def test_merging_restores_to_the_bit_by_keeping_the_old_parameters(case: Case):
    linear = layer(0, dtype=jnp.float32)
    before = jax.tree.map(np.array, linear)
    case.adapter.merge(perturbed(case.adapter.init(jax.random.key(2), linear)), linear)
    chex.assert_trees_all_equal(linear, before)


@pytest.mark.parametrize("name", CASES)
def test_rows_of_an_embedding_equal_rows_of_the_merged_table(name, x64):
    case = CASES[name]
    if case.adapter.rows is None:
        assert name in {
            "boha",
            "boha-scale",
            "gralora",
            "dora",
            "ia3-input",
            "hadamard-input",
            "hadamard-input-bias",
            "add-shifts",
        }
        return
    linear, ids = layer(0, with_bias=False), jnp.array([3, 0, 3, 15])
    factors = perturbed(case.adapter.init(jax.random.key(2), linear))
    taken = case.adapter.rows(factors, lambda leaf: leaf[ids])
    rows = case.adapter.merge(taken, hx.Linear(linear.kernel[ids])).kernel
    chex.assert_trees_all_close(rows, case.adapter.merge(factors, linear).kernel[ids], rtol=1e-13)


@settings(max_examples=12)
@given(
    n_in=st.integers(1, 12),
    n_out=st.integers(1, 12),
    data=st.data(),
    dtype=st.sampled_from([jnp.float32, jnp.float64]),
)
def test_any_shape_and_rank_agrees_with_the_dense_formula(n_in, n_out, data, dtype, x64):
    from tests import dense

    rank = data.draw(st.integers(1, min(n_in, n_out)), label="rank")
    blocks = data.draw(st.sampled_from([b for b in range(1, 13) if n_in % b == n_out % b == 0]), label="blocks")
    block_rank = data.draw(st.integers(1, min(n_in, n_out) // blocks), label="rank of a block")
    other = data.draw(st.integers(1, min(n_in, n_out)), label="r2")
    linear = layer(0, n_in=n_in, n_out=n_out, dtype=dtype)
    x = jax.random.normal(jax.random.key(1), (3, n_in), dtype)
    adapters = {
        hx.lora(rank, alpha=3): (dense.lora, 3 / rank),
        hx.hira(rank): (dense.hira, 1.0),
        hx.boha(block_rank * blocks, blocks): (dense.boha, 1.0),
        hx.gralora(block_rank * blocks, blocks): (dense.gralora, 1.0),
        hx.abba(r1=rank, r2=other, scale=2.0, forward="khatri_rao"): (dense.pair, 2.0),
        hx.loha(rank, alpha=rank / 2): (dense.pair, 0.5),
        hx.dora(rank): (dense.dora, 1.0),
    }
    close = {"rtol": 1e-10, "atol": 1e-11} if dtype == jnp.float64 else {"rtol": 1e-3, "atol": 1e-4}
    for adapter, (formula, scale) in adapters.items():
        factors = perturbed(adapter.init(jax.random.key(2), linear))
        w, _ = formula(jax.tree.map(np.asarray, factors), np.asarray(linear.kernel).T, None, scale=scale)
        chex.assert_trees_all_close(adapter.merge(factors, linear).kernel, w.T.astype(dtype), **close)
        chex.assert_trees_all_close(adapter.dot(factors, linear, x), x @ w.T.astype(dtype), **close)


BAD = [
    (lambda: hx.lora(0), "lora: rank must be a positive integer, found 0"),
    (lambda: hx.lora(2.0), "found 2.0"),
    (lambda: hx.hira(True), "found True"),
    (lambda: hx.abba(5), "rank 5 is odd"),
    (lambda: hx.abba(), "either rank .* or both r1 and r2"),
    (lambda: hx.abba(4, r1=2), "either rank .* or both r1 and r2"),
    (lambda: hx.abba(r1=2, r2=0), "r2 must be a positive integer"),
    (lambda: hx.abba(4, forward="kr"), "forward must be one of auto, khatri_rao, merged"),
    (lambda: hx.abba(4, init="svd"), "init must be one of"),
    (lambda: hx.boha(6, 4), "rank 6 is not divisible by blocks 4 .*use rank 4 or 8"),
    (lambda: hx.gralora(4, 0), "blocks must be a positive integer"),
    (lambda: hx.hadamard_adapter(weight=False, bias=False), "nothing to train"),
    (lambda: hx.hadamard_adapter(position="outptu"), "nearest: 'output'"),
    (lambda: hx.hadamard_adapter(order=4), "order must be 1, 2 or 3"),
    (lambda: hx.add(), "add: needs adapters"),
    (lambda: hx.add([hx.lora(1)]), "add: needs adapters, one argument each"),
    (lambda: hx.scaled("lora", 2), "scaled: needs an adapter, found 'lora'"),
    (lambda: hx.scaled(hx.lora(1), "2"), "scaled: scale must be a finite number, found '2'"),
    (lambda: hx.lora(4, alpha="16"), "lora: alpha must be a finite number, found '16'"),
    (lambda: hx.lora(4, alpha=0), "alpha 0 would make the update zero"),
    (lambda: hx.lora(4, rslora="no"), "rslora must be true or false, found 'no'"),
    (lambda: hx.dora(4, alpha=float("nan")), "dora: alpha must be a finite number, found nan"),
    (lambda: hx.loha(4, alpha=[1]), "loha: alpha must be a finite number"),
    (lambda: hx.gralora(4, 2, alpha=True), "gralora: alpha must be a finite number, found True"),
    (lambda: hx.hira(4, scale="1e-3"), "hira: scale must be a finite number, found '1e-3'"),
    (lambda: hx.boha(4, 2, scale=float("inf")), "boha: scale must be a finite number, found inf"),
    (lambda: hx.abba(4, scale="x"), "abba: scale must be a finite number"),
    (lambda: hx.hadamard_adapter(weight="false"), "weight must be true or false, found 'false'"),
    (lambda: hx.hadamard_adapter(order=2.0), "order must be 1, 2 or 3, found 2.0"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_bad_hyper_parameters_are_refused_in_one_line(make, message):
    with pytest.raises(hx.ConfigError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_numpy_number_as_alpha_does_not_widen_half_precision():
    linear = layer(0, dtype=jnp.bfloat16)
    for adapter in (hx.lora(4, alpha=np.float64(8)), hx.dora(4, alpha=np.float64(8)), hx.hira(4, scale=np.float64(2))):
        factors = adapter.init(jax.random.key(1), linear)
        assert adapter.dot(factors, linear, jnp.ones((2, IN), jnp.bfloat16)).dtype == jnp.bfloat16


BOUNDS = [  # torch's kaiming_uniform_(a=sqrt(5)) is 1 / sqrt(fan_in); ABBA's a2 has a=0
    (hx.lora(4), "a", IN),
    (hx.hira(4), "a", IN),
    (hx.dora(4), "a", IN),
    (hx.boha(8, 4), "a", IN // 4),
    (hx.gralora(8, 4), "a", IN // 4),
    (hx.loha(4), "a1", IN),
    (hx.loha(4), "b1", 4),
    (hx.loha(4), "b2", 4),
    (hx.abba(4), "a2", IN / 6),
]


@pytest.mark.parametrize(("adapter", "name", "fan_in"), BOUNDS, ids=[f"{a.config['method']}-{n}" for a, n, _ in BOUNDS])
def test_random_factors_are_uniform_within_torchs_bound(adapter, name, fan_in):
    linear = layer(0, dtype=jnp.float32)
    draws = jax.vmap(lambda key: adapter.init(key, linear)[name])(jax.random.split(jax.random.key(0), 50))
    bound = fan_in**-0.5
    assert 0.97 * bound < jnp.abs(draws).max() <= bound
    np.testing.assert_allclose(draws.std(), bound / 3**0.5, rtol=0.03)


def test_dora_leaves_a_zero_column_at_zero():
    linear = hx.Linear(jnp.ones((4, 3)).at[:, 1].set(0))
    factors = hx.dora(2).init(jax.random.key(0), linear)
    factors["b"] += 1e-6
    np.testing.assert_allclose(jnp.linalg.norm(hx.dora(2).merge(factors, linear).kernel, axis=0), [2, 0, 2], rtol=1e-5)


TOO_LARGE = [
    (hx.lora(17), r"rank 17 exceeds min\(in, out\) = 16"),
    (hx.hira(17), "rank 17 exceeds"),
    (hx.dora(17), "rank 17 exceeds"),
    (hx.loha(17), "rank 17 exceeds"),
    (hx.abba(r1=2, r2=17), "rank 17 exceeds"),
    (hx.boha(10, 5), r"blocks 5 does not divide in = 16"),
    (hx.gralora(40, 8), r"rank 40 / blocks 8 = 5 exceeds a block of \(2, 3\)"),
]


@pytest.mark.parametrize(("adapter", "message"), TOO_LARGE, ids=[a.config["method"] for a, _ in TOO_LARGE])
def test_hyper_parameters_that_do_not_fit_the_matrix_are_refused_with_the_numbers(adapter, message):
    with pytest.raises(hx.ConfigError, match=message):
        adapter.init(jax.random.key(0), layer(0, dtype=jnp.float32))
