"""Conversions keep the update: exactly where they say so, and as near as Eckart and Young allow where not."""

import json
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hadamax as hx
from hadamax import convert
from tests import dense

LAYOUTS = {
    "plain": ((16, 24), None, None),
    "stacked": ((3, 16, 24), "bio", None),
    "some-layers": ((4, 16, 24), "bio", [3, 1]),
    "einsum": ((12, 16, 3, 2), "oibb", [2, 0]),
    "out-first": ((12, 16), "oi", None),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())

EXACT_LORA = {
    "rslora": (hx.lora(3, alpha=5, rslora=True), 3),
    "abba": (hx.abba(r1=1, r2=2, alpha=2), 2),
    "abba-scale": (hx.abba(4, scale=1.5), 4),
    "abba-capped": (hx.abba(12, alpha=1), None),
    "loha": (hx.loha(2, alpha=3), 4),
    "gralora": (hx.gralora(4, 2, alpha=3), 8),
    "sum": (hx.add(hx.lora(1, alpha=2), hx.scaled(hx.abba(2, alpha=2), -0.5)), 2),
    "chain": (hx.chain(hx.lora(1), hx.loha(1, alpha=2), hx.lora(2, alpha=3)), 4),
}
APPROXIMATE = {
    "hira": hx.hira(3),
    "boha": hx.boha(4, 2, scale=2.0),
    "dora": hx.dora(2),
    "ia3": hx.ia3(position="input"),
    "hadamard": hx.hadamard_adapter(bias=False),
    "hilora": hx.add(hx.hira(2), hx.lora(1)),
    "chain": hx.chain(hx.lora(2), hx.hira(2)),
    "scaled": hx.scaled(hx.hira(2), 0.5),
}


def setting(adapter, layout=LAYOUTS["plain"], dtype=jnp.float64):
    """One kernel in a layout, with factors as training might leave them."""
    shape, view, layers = layout
    params = {"proj": {"kernel": jax.random.normal(jax.random.key(0), shape, dtype) / 4}}
    injection = hx.inject({"proj": hx.at(adapter, view=view, layers=layers)})
    return injection, trained(injection, params), params


def trained(injection, params):
    """Random factors, made without compiling anything."""
    rng = np.random.default_rng(1)
    like = jax.eval_shape(injection.init, jax.random.key(0), params)
    return jax.tree.map(lambda f: jnp.asarray(0.5 * rng.normal(size=f.shape) + 0.1, f.dtype), like)


def outputs(injection, adapters, params):
    """What a model computes through `apply`, and through `merge`."""
    kernel = params["proj"]["kernel"]
    inputs = {"bio": "nbi,bio->nbo", "oibb": "nib,oibc->nobc", "oi": "ni,oi->no"}
    rule = injection.rules[0][1]
    equation = inputs.get(rule.view, "ni,io->no")
    letters = dict(zip(equation.split(",")[1].split("->")[0], kernel.shape, strict=True)) | {"n": 5}
    x = jax.random.normal(jax.random.key(2), [letters[c] for c in equation.split(",")[0]], kernel.dtype)
    fn = lambda p, x: jnp.einsum(equation, x, p["proj"]["kernel"])  # noqa: E731
    return injection.apply(fn)(params, adapters, x), injection.merge(params, adapters)


def assert_same(before, converted, params, tolerance):
    """Equal through `apply` and `merge`, and after the configuration's way through JSON."""
    rebuilt = hx.from_config(json.loads(json.dumps(converted.injection.to_config())))
    after = outputs(rebuilt, converted.adapters, params)
    chex.assert_trees_all_close(after, outputs(*before, params), rtol=tolerance, atol=tolerance)


def matrices(kernel, view):
    """`[batch..., in, out]` of the layouts above, by numpy alone."""
    return np.einsum({"oibb": "oibc->bcio", "oi": "oi->io"}.get(view, "...->..."), np.asarray(kernel))


def updates(injection, adapters, params):
    rule = injection.rules[0][1]
    new = matrices(injection.merge(params, adapters)["proj"]["kernel"], rule.view)
    update = new - matrices(params["proj"]["kernel"], rule.view)
    return update if rule.layers is None else update[list(rule.layers)]


@pytest.mark.parametrize(
    ("name", "layout"), [(name, "some-layers") for name in EXACT_LORA] + [("abba", name) for name in LAYOUTS]
)
def test_low_rank_methods_are_lora_exactly(name, layout, x64):
    (adapter, rank), layout = EXACT_LORA[name], LAYOUTS[layout]
    injection, adapters, params = setting(adapter, layout)
    converted = convert.to_lora(injection, adapters, params)
    config = converted.injection.rules[0][1].adapter.config
    smallest = min(np.shape(updates(injection, adapters, params))[-2:])
    assert (config["method"], config["rank"]) == ("lora", smallest if rank is None else rank)
    assert not converted.kept and not converted.errors["proj/kernel"].any()
    assert converted.errors["proj/kernel"].shape == updates(injection, adapters, params).shape[:-2]
    assert_same((injection, adapters), converted, params, 1e-12)


@pytest.mark.parametrize("adapter", [hx.abba(4, alpha=2), hx.gralora(4, 2)], ids=["abba", "gralora"])
def test_in_float32_and_from_a_bfloat16_base(adapter):
    injection, adapters, params = setting(adapter, LAYOUTS["some-layers"], jnp.float32)
    converted = convert.to_lora(injection, adapters, params)
    assert_same((injection, adapters), converted, params, 1e-5)
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    chex.assert_trees_all_equal(convert.to_lora(injection, adapters, low).adapters, converted.adapters)


def test_khatri_rao_against_the_dense_formula(x64):
    injection, adapters, params = setting(hx.abba(r1=2, r2=3, alpha=3))
    f, kernel = jax.tree.map(np.asarray, (adapters["proj/kernel"], params["proj"]["kernel"]))
    expected, _ = dense.pair(f, kernel.T, None, scale=9 / 6**0.5)
    new = jax.tree.map(np.asarray, convert.to_lora(injection, adapters, params).adapters["proj/kernel"])
    np.testing.assert_allclose(dense.lora(new, kernel.T, None, scale=1.0)[0], expected, rtol=1e-12, atol=1e-13)


@settings(max_examples=6)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(2, 9), st.integers(2, 9), st.floats(-3, 3))
def test_products_of_any_ranks_and_shapes(r1, r2, n_in, n_out, scale):
    r1, r2 = min(r1, n_in, n_out), min(r2, n_in, n_out)
    with jax.enable_x64(True):
        injection, adapters, params = setting(hx.abba(r1=r1, r2=r2, scale=scale), ((n_in, n_out), None, None))
        converted = convert.to_lora(injection, adapters, params)
        before, after = updates(injection, adapters, params), updates(converted.injection, converted.adapters, params)
        np.testing.assert_allclose(after, before, rtol=1e-12, atol=1e-12)


@every_layout
def test_abba_is_loha(layout, x64):
    injection, adapters, params = setting(hx.abba(4, alpha=3, forward="merged"), layout)
    converted = convert.to_loha(injection, adapters, params)
    assert converted.injection.rules[0][1].adapter.config == {
        "method": "loha", "rank": 2, "alpha": 9.0, "forward": "merged",
    }  # fmt: skip
    chex.assert_trees_all_equal(converted.adapters, adapters)
    assert_same((injection, adapters), converted, params, 1e-12)


@pytest.mark.parametrize(
    ("blocks", "rank", "layout"),
    [(1, 3, "plain"), (4, None, "einsum"), (2, 8, "plain"), (2, 8, "stacked"), (2, 8, "some-layers"), (2, 8, "einsum")],
)
def test_boha_is_hira_of_the_ranks_of_its_blocks(blocks, rank, layout, x64):
    layout = LAYOUTS[layout]
    injection, adapters, params = setting(hx.boha(rank // blocks if rank else 8, blocks, scale=0.5), layout)
    converted = convert.to_hira(injection, adapters, params)
    smallest = min(np.shape(updates(injection, adapters, params))[-2:])
    assert converted.injection.rules[0][1].adapter.config == {"method": "hira", "rank": rank or smallest, "scale": 0.5}
    assert_same((injection, adapters), converted, params, 1e-12)


@every_layout
def test_hira_is_boha_of_one_block_and_comes_back_to_the_bit(layout, x64):
    injection, adapters, params = setting(hx.hira(3, scale=2.0), layout)
    converted = convert.to_boha(injection, adapters, params)
    assert_same((injection, adapters), converted, params, 1e-12)
    back = convert.to_hira(converted.injection, converted.adapters, params)
    assert back.injection.to_config() == injection.to_config()
    chex.assert_trees_all_equal(back.adapters, adapters)


@pytest.mark.parametrize(
    ("name", "layout"), [(name, "plain") for name in APPROXIMATE] + [("hira", "some-layers"), ("hira", "einsum")]
)
def test_a_rank_gives_the_best_approximation_and_its_error(name, layout, x64):
    injection, adapters, params = setting(APPROXIMATE[name], LAYOUTS[layout])
    update, converted = updates(injection, adapters, params), convert.to_lora(injection, adapters, params, rank=4)
    s = np.linalg.svd(update, compute_uv=False)
    best = np.sqrt((s[..., 4:] ** 2).sum(-1) / (s**2).sum(-1))
    np.testing.assert_allclose(converted.errors["proj/kernel"], best, rtol=1e-8, atol=1e-12)
    rest = update - updates(converted.injection, converted.adapters, params)
    actual = np.linalg.norm(rest, axis=(-2, -1)) / np.linalg.norm(update, axis=(-2, -1))
    np.testing.assert_allclose(converted.errors["proj/kernel"], actual, rtol=1e-8, atol=1e-12)


def test_a_rank_below_the_exact_one_truncates_and_one_above_is_exact(x64):
    injection, adapters, params = setting(hx.abba(6, alpha=2), LAYOUTS["stacked"])
    s = np.linalg.svd(updates(injection, adapters, params), compute_uv=False)
    converted = convert.to_lora(injection, adapters, params, rank=5)
    best = np.sqrt((s[..., 5:] ** 2).sum(-1) / (s**2).sum(-1))
    np.testing.assert_allclose(converted.errors["proj/kernel"], best, rtol=1e-9)
    above = convert.to_lora(injection, adapters, params, rank=12)
    assert above.injection.rules[0][1].adapter.config["rank"] == 9
    assert_same((injection, adapters), above, params, 1e-12)


def test_energy_takes_the_smallest_rank_for_each_matrix_and_pads_the_stack(x64):
    injection, adapters, params = setting(hx.hira(3), LAYOUTS["stacked"])
    adapters = jax.tree.map(lambda f: f, adapters)
    f = adapters["proj/kernel"]
    f["a"], f["b"] = f["a"].at[1].set(0).at[2, :, 1:].set(0), f["b"].at[2, :, 1:].set(0)  # zero; one column modulated
    update = updates(injection, adapters, params)
    energy = np.cumsum(np.linalg.svd(update, compute_uv=False) ** 2, -1)
    needed = [int(np.sum(row < 0.8 * row[-1])) + 1 for row in energy]
    assert needed[0] > needed[2] == 1 and not update[1].any()
    converted = convert.to_lora(injection, adapters, params, energy=0.8)
    new = converted.adapters["proj/kernel"]
    assert new["a"].shape == (3, 16, needed[0])
    assert not new["a"][1].any() and not new["a"][2, :, 1:].any() and not new["b"][2, 1:].any()
    errors = converted.errors["proj/kernel"]
    np.testing.assert_allclose(errors[0], np.sqrt(1 - energy[0, needed[0] - 1] / energy[0, -1]), rtol=1e-9)
    assert errors[1] == 0 and errors[2] < 1e-7


def test_all_energy_finds_the_true_rank(x64):
    injection, adapters, params = setting(hx.hira(3))
    adapters["proj/kernel"]["b"] = adapters["proj/kernel"]["b"].at[:, 5:].set(0)
    converted = convert.to_lora(injection, adapters, params, energy=1)
    assert converted.injection.rules[0][1].adapter.config["rank"] == 5
    assert_same((injection, adapters), converted, params, 1e-12)


def test_large_matrices_come_near_the_optimum(monkeypatch, x64):
    monkeypatch.setattr(convert, "_LARGE", 30)
    injection, adapters, params = setting(hx.hira(2), ((40, 60), None, None))
    s = np.linalg.svd(updates(injection, adapters, params), compute_uv=False)
    best = np.sqrt((s[6:] ** 2).sum() / (s**2).sum())
    error = float(convert.to_lora(injection, adapters, params, rank=6).errors["proj/kernel"])
    assert best < error < 1.001 * best


def mixed():
    key = iter(jax.random.split(jax.random.key(0), 9))
    layer = lambda: {  # noqa: E731
        "q": {"kernel": jax.random.normal(next(key), (8, 8)), "bias": jnp.ones(8)},
        "up": {"kernel": jax.random.normal(next(key), (8, 8))},
        "down": {"kernel": jax.random.normal(next(key), (8, 8))},
    }
    params = {"layers_0": layer(), "layers_1": layer(), "head": {"kernel": jax.random.normal(next(key), (8, 8))}}
    shared = hx.hira(2)
    rules = {
        "q": hx.hadamard_adapter(),
        "up": hx.at(shared, layers=[0, 1]),
        re.compile(".*/down/kernel"): shared,
        "head": hx.abba(4),
    }
    injection = hx.inject(rules)
    return injection, trained(injection, params), params


def test_every_rule_that_can_is_converted_and_the_others_say_why_not():
    injection, adapters, params = mixed()
    converted = convert.to_lora(injection, adapters, params)
    assert list(converted.errors) == ["head/kernel"]
    assert converted.kept["layers_1/q/kernel"] == "hadamard_adapter has no exact LoRA form; give rank= or energy="
    assert [rule.adapter.config["method"] for _, rule in converted.injection.rules] == [
        "hadamard_adapter", "hira", "hira", "lora",
    ]  # fmt: skip
    chex.assert_trees_all_close(
        converted.injection.merge(params, converted.adapters), injection.merge(params, adapters), rtol=1e-5, atol=1e-6
    )
    whole = convert.to_lora(injection, adapters, params, rank=8)  # of 8 x 8 matrices
    assert set(whole.kept) == {"layers_0/q/kernel", "layers_1/q/kernel"}
    reason = (
        "hadamard_adapter also changes the layer's bias, which LoRA cannot: merge it, or keep it with hx.save_adapters"
    )
    assert whole.kept["layers_0/q/kernel"] == reason
    chex.assert_trees_all_close(
        whole.injection.merge(params, whole.adapters), injection.merge(params, adapters), rtol=1e-5, atol=1e-5
    )


def test_kernels_of_one_rule_that_need_other_ranks_get_rules_of_their_own(x64):
    injection, adapters, params = mixed()
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
    f = adapters["layers_1/up/kernel"]
    f["a"], f["b"] = f["a"].at[:, 1:].set(0), f["b"].at[:, 1:].set(0)  # one column: rank 1
    converted = convert.to_lora(injection, adapters, params, energy=1 - 1e-9)
    config = json.loads(json.dumps(converted.injection.to_config()))
    ranks = {r.get("pattern", r.get("regex")): r["adapter"].get("rank") for r in config["rules"]}
    assert ranks["layers_0/up/kernel"] > ranks["layers_1/up/kernel"] == 1
    assert {rule.get("pattern"): rule["layers"] for rule in config["rules"]}["layers_1/up/kernel"] is None
    rebuilt = hx.from_config(config)
    assert rebuilt.targets(params).keys() == injection.targets(params).keys()
    chex.assert_trees_all_close(
        rebuilt.merge(params, converted.adapters), injection.merge(params, adapters), rtol=1e-4, atol=1e-4
    )


def test_a_kernel_at_the_root_and_a_path_with_glob_letters_are_rules_of_their_own_too():
    params = {"w": jnp.ones((6, 4)), "x": {"w": jnp.eye(6, 4), "*": {"kernel": jnp.ones((6, 4))}}}
    injection = hx.inject({"w": hx.hira(2), "*": hx.hira(1)})
    adapters = trained(injection, params)
    converted = convert.to_lora(injection, adapters, params, energy=0.99)
    rebuilt = hx.from_config(converted.injection.to_config())
    assert {path: t.adapter.config["rank"] for path, t in rebuilt.targets(params).items()} == {
        path: f["a"].shape[1] for path, f in converted.adapters.items()
    }
    assert len({f["a"].shape[1] for f in converted.adapters.values()}) > 1


def test_a_scale_alone_is_folded_or_left_when_the_bias_is_not_its_concern():
    """(IA)^3 on the input leaves the bias; on the output of a layer with a bias it scales it."""
    params = {"proj": {"kernel": jax.random.normal(jax.random.key(0), (6, 4)), "bias": jnp.ones(4)}}
    injection = hx.inject({"proj": hx.ia3(position="input")})
    adapters = trained(injection, params)
    converted = convert.to_lora(injection, adapters, params, rank=4)
    chex.assert_trees_all_close(
        converted.injection.merge(params, converted.adapters), injection.merge(params, adapters), rtol=1e-5, atol=1e-6
    )
    injection = hx.inject({"proj": hx.ia3()})
    adapters = trained(injection, params)
    with pytest.raises(hx.ConversionError, match="proj/kernel: ia3 also changes the layer's bias, which LoRA cannot"):
        convert.to_lora(injection, adapters, params, rank=4)


def test_embeddings_are_looked_up_as_before():
    params = {"embed": {"embedding": jax.random.normal(jax.random.key(0), (10, 6))}}
    injection = hx.inject({"embed": hx.abba(2)})
    adapters = trained(injection, params)
    converted = convert.to_lora(injection, adapters, params)
    lookup = lambda p, ids: jnp.take(p["embed"]["embedding"], ids, axis=0)  # noqa: E731
    args = params, converted.adapters, jnp.array([3, 1])
    before = injection.apply(lookup)(params, adapters, jnp.array([3, 1]))
    chex.assert_trees_all_close(converted.injection.apply(lookup)(*args), before, rtol=1e-5, atol=1e-6)


def test_plain_lora_is_left_as_it_is_and_rslora_keeps_its_factors():
    injection, adapters, params = setting(hx.lora(4, alpha=8), dtype=jnp.float32)
    converted = convert.to_lora(injection, adapters, params, rank=4)
    assert converted.injection.to_config() == injection.to_config()
    chex.assert_trees_all_equal(converted.adapters, adapters)
    injection, adapters, params = setting(hx.lora(4, alpha=8, rslora=True), dtype=jnp.float32)
    converted = convert.to_lora(injection, adapters, params)
    assert converted.injection.rules[0][1].adapter.config["alpha"] == 16
    chex.assert_trees_all_equal(converted.adapters, adapters)


REFUSED = {
    "loha-uneven": (hx.abba(r1=1, r2=2), convert.to_loha, {}, "LoHa's pairs have one rank, and here r1 = 1, r2 = 2"),
    "loha-lora": (hx.lora(2), convert.to_loha, {}, "lora has no LoHa form; only ABBA has"),
    "hira-lora": (hx.lora(2), convert.to_hira, {}, "lora has no HiRA form; only BoHA has"),
    "boha-abba": (hx.abba(2), convert.to_boha, {}, "abba has no BoHA form; only HiRA has"),
    "lora-dora": (hx.dora(2), convert.to_lora, {}, "dora has no exact LoRA form; give rank= or energy="),
    "lora-shift": (hx.hadamard_adapter(), convert.to_lora, {"rank": 2}, "also changes the layer's bias"),
    "lora-cubic": (hx.hadamard_adapter(order=3, bias=False), convert.to_lora, {"rank": 2}, "not affine"),
}


@pytest.mark.parametrize(("adapter", "function", "options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_has_no_form_is_refused_with_the_reason(adapter, function, options, message):
    injection, adapters, params = setting(adapter, dtype=jnp.float32)
    with pytest.raises(hx.ConversionError, match=f"^proj/kernel: .*{re.escape(message)}"):
        function(injection, adapters, params, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2, "energy": 0.5}, "either rank or energy"),
        ({"rank": 0}, "rank must be a positive integer, found 0"),
        ({"energy": 0}, "above 0 and at most 1, found 0"),
        ({"energy": 1.5}, "found 1.5"),
        ({"energy": float("nan")}, "found nan"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(hx.ConfigError, match=message):
        convert.to_lora(*setting(hx.hira(2), dtype=jnp.float32), **options)


def test_factors_that_are_not_finite_are_not_converted():
    injection, adapters, params = setting(hx.abba(4), dtype=jnp.float32)
    adapters["proj/kernel"]["a1"] = adapters["proj/kernel"]["a1"].at[0, 0].set(jnp.inf)
    with pytest.raises(hx.ConversionError, match="proj/kernel: the factors hold NaN or infinity; nothing was"):
        convert.to_lora(injection, adapters, params)
