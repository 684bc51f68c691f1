"""Rules find the right kernels, say so when they do not, and place, merge and count adapters."""

import json
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze
from hypothesis import given, settings
from hypothesis import strategies as st

import hadamax as hx
from tests.test_methods import perturbed

LORA = hx.lora(2)


def tree(**extra):
    """A decoder-like tree with look-alike names: `proj` inside `proj_out`, a norm, biases, an embedding."""
    keys = iter(jax.random.split(jax.random.key(0), 50))

    def dense(i, o, bias=True):
        kernel = jax.random.normal(next(keys), (i, o))
        return {"kernel": kernel, "bias": jnp.ones(o)} if bias else {"kernel": kernel}

    layers = {
        f"layers_{at}": {
            "attn": {"q_proj": dense(4, 6), "q_proj_2": dense(4, 6), "o_proj": dense(6, 4, bias=False)},
            "mlp": {"up_proj": dense(4, 8), "down_proj": dense(8, 4)},
            "norm": {"scale": jnp.ones(4)},
        }
        for at in range(3)
    }
    return {"params": {"embed": {"embedding": jax.random.normal(next(keys), (10, 4))}, **layers, **extra}}


def selected(rules, params=None, **options):
    return list(hx.inject(rules, **options).targets(params or tree()))


def test_a_name_means_every_module_of_that_name_and_not_its_look_alikes():
    assert selected({"q_proj": LORA}) == [f"layers_{at}/attn/q_proj/kernel" for at in range(3)]


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("**/mlp/*_proj/kernel", 6),
        ("**/mlp/*_proj", 6),
        ("*_proj", 12),
        ("layers_0/**/kernel", 5),
        ("layers_{0,2}/attn/{q,o}_proj/kernel", 4),
        ("layers_?/attn/o_proj", 3),
        ("embed", 1),
        ("**/kernel", 15),
        (re.compile(r"layers_[01]/.*/up_proj/kernel"), 2),
    ],
)
def test_globs_and_regular_expressions(pattern, count):
    assert len(selected({pattern: LORA})) == count


def test_the_first_rule_that_matches_wins():
    targets = hx.inject({"layers_0/attn/q_proj": hx.hira(2), "q_proj": LORA}).targets(tree())
    assert [t.adapter.config["method"] for t in targets.values()] == ["hira", "lora", "lora"]


def test_excluded_kernels_are_left_alone():
    assert selected({"**/kernel": LORA}, exclude=["mlp/*", "**/mlp/*", "q_proj_2"][1:]) == [
        f"layers_{at}/attn/{name}/kernel" for at in range(3) for name in ("o_proj", "q_proj")
    ]


@pytest.mark.parametrize(
    ("rules", "options", "error", "message"),
    [
        ({"q_prj": LORA}, {}, hx.NoMatchError, "'q_prj' matches no parameter; nearest: 'q_proj'"),
        ({"layers_0/atn/q_proj/kernel": LORA}, {}, hx.NoMatchError, "nearest: 'layers_0/attn/q_proj/kernel'"),
        ({"attn": LORA}, {}, hx.NoMatchError, "is a module of modules .*q_proj"),
        ({"zzzz": LORA}, {}, hx.NoMatchError, "the tree has 'embed/embedding'"),
        ({re.compile("nothing"): LORA}, {}, hx.NoMatchError, "re:nothing"),
        ({"{q,k}_proj": LORA, "k_proj": LORA}, {}, hx.NoMatchError, "'k_proj' matches no"),
        ({"{q_proj": LORA}, {}, hx.ConfigError, "brace"),
        ({"q_proj": hx.at(LORA, layers=[0, 99])}, {}, hx.NoMatchError, "has no layer 99, only 0, 1, 2"),
        ({"q_proj": LORA, "**/q_proj": LORA}, {}, hx.NoMatchError, "only kernels of earlier rules"),
        ({"norm": LORA}, {}, hx.NotAMatrixError, r"'layers_0/norm/scale' of shape \(4,\)"),
        ({"**/bias": LORA}, {}, hx.NotAMatrixError, "bias"),
        ({"layers_0/**": LORA}, {}, hx.NotAMatrixError, "no matrix"),
        (
            {"q_proj": LORA},
            {"exclude": ["k_proj"]},
            hx.NoMatchError,
            "'k_proj' matches no kernel .*exclusion is unused",
        ),
        ({"q_proj": LORA}, {"exclude": ["q_proj"]}, hx.NoMatchError, "matches only excluded kernels"),
        ({"q_proj": hx.at(LORA, layers=[7])}, {}, hx.NoMatchError, r"layers=\[7\].*has no layer 7, only 0, 1, 2"),
        ({"embed": hx.at(LORA, layers=[0])}, {}, hx.NoMatchError, "neither the path nor view 'io' has layers"),
        ({"q_proj": hx.at(LORA, view="bio")}, {}, hx.ViewError, "view 'bio' has 3 axes, the kernel 2"),
        ({"q_proj": hx.at(LORA, view="oi")}, {}, hx.ViewError, r"bias: expected shape \(4,\).*found \(6,\)"),
        ({"o_proj": hx.lora(5)}, {}, hx.ConfigError, r"layers_0/attn/o_proj/kernel: lora: rank 5 exceeds"),
    ],
)
def test_a_rule_that_cannot_be_meant_is_one_clear_line(rules, options, error, message):
    with pytest.raises(error, match=message) as caught:
        hx.inject(rules, **options).init(jax.random.key(0), tree())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "options", "error"),
    [
        ([{}], {}, hx.ConfigError),
        ([{"q": "lora"}], {}, hx.ConfigError),
        ([[("q", LORA)]], {}, hx.ConfigError),
        ([{"q": LORA}], {"view": "xio"}, hx.ViewError),
        ([{"q": hx.at(LORA, view="bi")}], {}, hx.ViewError),
        ([{5: LORA}], {}, hx.ConfigError),
        ([{"": LORA}], {}, hx.ConfigError),
        ([{"q": LORA}], {"view": 3}, hx.ViewError),
    ],
)
def test_arguments_of_another_kind_are_refused_at_once(arguments, options, error):
    with pytest.raises(error):
        hx.inject(*arguments, **options)


def test_a_kernel_of_more_than_two_axes_needs_a_view_and_the_error_explains_it():
    params = {"q": {"kernel": jnp.ones((3, 4, 5))}}
    with pytest.raises(hx.ViewError, match=r"q/kernel: a kernel of 3 axes \(3, 4, 5\) needs a view.*inject\(view=\)"):
        hx.inject({"q": LORA}).init(jax.random.key(0), params)
    for injection in (hx.inject({"q": LORA}, view="bio"), hx.inject({"q": hx.at(LORA, view="bio")})):
        assert injection.init(jax.random.key(0), params)["q/kernel"]["a"].shape == (3, 4, 2)


@pytest.mark.parametrize("layers", [[], [0, 0], [-1], [0.0], [True], 3, "01"])
def test_layers_are_distinct_integers_from_zero_on(layers):
    with pytest.raises(hx.ConfigError, match="layers must be distinct integers"):
        hx.at(LORA, layers=layers)
    assert hx.at(LORA, layers=np.arange(2)).layers == (0, 1)


def test_a_number_in_an_automatic_name_is_no_layer():
    """`Dense_0` within a stack: the layers are those of the batch axis."""
    params = {"layers": {f"Dense_{at}": {"kernel": jnp.ones((3, 4, 4))} for at in range(2)}}
    injection = hx.inject({"**/kernel": hx.at(LORA, layers=[2])}, view="bio")
    adapters = injection.init(jax.random.key(0), params)
    assert [f["a"].shape for f in adapters.values()] == [(1, 4, 2), (1, 4, 2)]
    fused = {"layer_1": {"kv": jnp.ones((2, 3, 4, 5))}, "layer_2": {"kv": jnp.ones((2, 3, 4, 5))}}
    targets = hx.inject({"kv": hx.at(LORA, view="boio", layers=[2])}).targets(fused)
    assert list(targets) == ["layer_2/kv"] and targets["layer_2/kv"].layers is None


@pytest.mark.parametrize(
    ("kernel", "bias"), [("kernel", "bias"), ("weight", "bias"), ("w", "b"), ("w", "bias"), ("kernel", "b")]
)
def test_merging_a_shift_finds_the_layers_bias_by_its_usual_names(kernel, bias):
    injection = hx.inject({"dense": hx.hadamard_adapter()})
    params = {"dense": {kernel: jnp.eye(3), bias: jnp.arange(3.0)}}
    adapters = injection.init(jax.random.key(0), params)
    chex.assert_trees_all_equal(injection.merge(params, adapters), params)
    adapters["dense/" + kernel]["bias"] += 1.0
    merged = injection.merge(params, adapters)["dense"]
    assert merged.keys() == {kernel, bias} and (merged[bias] == jnp.arange(3.0) + 1).all()
    bare = injection.merge({"dense": {kernel: jnp.eye(3)}}, adapters)["dense"]
    assert bare.keys() == {kernel, "b" if kernel == "w" else "bias"}


def test_kernels_that_share_a_module_have_no_bias_to_fight_over():
    params = {"attn": {"q": jnp.eye(3), "k": jnp.eye(3), "bias": jnp.arange(3.0)}}
    injection = hx.inject({"**/{q,k}": hx.hadamard_adapter()})
    with pytest.raises(hx.MergeError, match="attn/k: merging needs a bias, and a kernel of that name has no place"):
        injection.merge(params, injection.init(jax.random.key(0), params))


def test_a_stack_of_biases_named_b_is_no_matrix_and_a_factor_named_b_is():
    params = {"q": {"w": jnp.ones((3, 4, 5)), "b": jnp.ones((3, 5))}}
    assert list(hx.inject({"q": LORA}, view="bio").targets(params)) == ["q/w"]
    assert list(hx.inject({"m": LORA}).targets({"m": {"a": jnp.ones((4, 5)), "b": jnp.ones((5, 4))}})) == ["m/a", "m/b"]


def test_integer_kernels_are_refused():
    with pytest.raises(hx.NotAMatrixError, match="q: a kernel must be floating point, found int8"):
        hx.inject({"q": LORA}).init(jax.random.key(0), {"q": jnp.ones((4, 4), jnp.int8)})


@pytest.mark.parametrize(
    "other",
    [hx.lora(4), hx.at(LORA, view="bio", layers=[1]), hx.hira(2), hx.dora(2)],
    ids=["rank", "layers", "same", "more"],
)
def test_factors_of_another_shape_are_refused_by_name(other):
    params = {"w": jnp.ones((3, 6, 5))}
    adapters = hx.inject({"w": LORA}, view="bio").init(jax.random.key(0), params)
    injection = hx.inject({"w": other}, view="bio")
    if isinstance(other, hx.Adapter) and other.config["method"] == "hira":
        injection.bind(params, adapters)  # the same factors, so nothing to refuse
        return
    for call in ("bind", "merge"):
        with pytest.raises(hx.ConfigError, match=r"w: factor '\w+' should have shape"):
            getattr(injection, call)(params, adapters)


def test_leaves_that_are_no_arrays_are_left_alone():
    params = {"name": "model", "none": None, "w": np.ones((3, 3), np.float32)}
    injection = hx.inject({"w": LORA})
    adapters = injection.init(jax.random.key(0), {"w": params["w"]})
    assert injection.summary(params).trainable == 12
    assert injection.apply(lambda p, x: x @ p["w"])({"w": params["w"]}, adapters, jnp.ones(3)).shape == (3,)


def test_the_common_view_leaves_kernels_of_two_axes_as_they_are():
    params = {"stack": {"kernel": jnp.ones((3, 4, 5))}, "head": {"kernel": jnp.ones((4, 7))}}
    adapters = hx.inject({"**/kernel": LORA}, view="bio").init(jax.random.key(0), params)
    assert adapters["head/kernel"]["a"].shape == (4, 2) and adapters["stack/kernel"]["b"].shape == (3, 2, 5)


def test_a_stack_of_norms_or_biases_is_not_taken_for_a_matrix():
    params = {
        "layers": {"q": {"kernel": jnp.ones((3, 4, 5)), "bias": jnp.ones((3, 5))}, "norm": {"scale": jnp.ones((3, 4))}}
    }
    assert list(hx.inject({"q": LORA}, view="bio").targets(params)) == ["layers/q/kernel"]
    with pytest.raises(hx.NotAMatrixError):
        hx.inject({"norm": LORA}, view="bio").targets(params)


def test_layers_by_the_number_in_the_path():
    injection = hx.inject({"q_proj": hx.at(LORA, layers=[0, 2])})
    assert list(injection.targets(tree())) == ["layers_0/attn/q_proj/kernel", "layers_2/attn/q_proj/kernel"]


def test_layers_beyond_a_stack_are_an_error():
    with pytest.raises(hx.NoMatchError, match="it has layers 0 to 2"):
        hx.inject({"q": hx.at(LORA, view="bio", layers=[0, 3])}).targets({"q": {"kernel": jnp.ones((3, 4, 5))}})


def test_factors_depend_on_the_key_the_path_and_nothing_else():
    few, many = hx.inject({"q_proj": LORA}), hx.inject({"up_proj": hx.hira(2), "q_proj": LORA})
    one, two = few.init(jax.random.key(0), tree()), many.init(jax.random.key(0), tree())
    for path in one:
        chex.assert_trees_all_equal(one[path], two[path])
    first, second = (one[f"layers_{at}/attn/q_proj/kernel"]["a"] for at in (0, 1))
    assert (first != second).any()
    other = few.init(jax.random.key(1), tree())["layers_0/attn/q_proj/kernel"]["a"]
    assert (first != other).any()


def test_layers_of_a_stack_are_initialised_from_their_own_weights_and_keys(x64):
    kernel = jax.random.normal(jax.random.key(0), (3, 6, 5), jnp.float64)
    adapters = hx.inject({"w": hx.abba(4)}, view="bio").init(jax.random.key(1), {"w": kernel})["w"]
    best = jax.vmap(lambda k: hx.abba(4).init(jax.random.key(0), hx.Linear(k))["a1"])(kernel)
    chex.assert_trees_all_close(adapters["a1"], best, rtol=1e-9)
    assert (adapters["a2"][0] != adapters["a2"][1]).any()


def merged_by_hand(params, adapters, paths_and_adapters):
    """The merged tree, path by path in numpy."""
    out = jax.tree.map(np.array, params)
    for path, adapter in paths_and_adapters.items():
        *modules, name = path.split("/")
        node = out["params"]
        for module in modules:
            node = node[module]
        merged = adapter.merge(adapters[path], hx.Linear(node[name], node.get("bias")))
        node[name] = merged.kernel
        if merged.bias is not None:
            node["bias"] = merged.bias
    return out


def test_merge_changes_the_selected_kernels_and_nothing_else():
    injection = hx.inject({"q_proj": hx.hira(2), "o_proj": hx.hadamard_adapter(), "up_proj": hx.hadamard_adapter()})
    params = tree()
    adapters = perturbed(injection.init(jax.random.key(1), params))
    by_path = {path: target.adapter for path, target in injection.targets(params).items()}
    merged = injection.merge(params, adapters)
    chex.assert_trees_all_close(merged, merged_by_hand(params, adapters, by_path), rtol=1e-6)
    assert "bias" in merged["params"]["layers_0"]["attn"]["o_proj"], "a shift gives the layer a bias"
    chex.assert_trees_all_equal(params, tree())


def test_merge_is_jittable_and_differentiable():
    injection, params = hx.inject({"q_proj": hx.hira(2)}), tree()
    adapters = perturbed(injection.init(jax.random.key(1), params))
    chex.assert_trees_all_close(
        jax.jit(injection.merge)(params, adapters), injection.merge(params, adapters), rtol=1e-6
    )
    gradient = jax.grad(lambda a: sum((leaf**2).sum() for leaf in jax.tree.leaves(injection.merge(params, a))))(
        adapters
    )
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def test_factors_that_are_not_finite_are_not_merged():
    injection, params = hx.inject({"q_proj": hx.hira(2)}), tree()
    adapters = injection.init(jax.random.key(1), params)
    adapters["layers_1/attn/q_proj/kernel"]["b"] = adapters["layers_1/attn/q_proj/kernel"]["b"].at[0, 0].set(jnp.nan)
    with pytest.raises(hx.MergeError, match="layers_1/attn/q_proj/kernel: the factors hold NaN"):
        injection.merge(params, adapters)


def test_adapters_of_other_rules_are_refused():
    params = tree()
    adapters = hx.inject({"q_proj": LORA}).init(jax.random.key(0), params)
    for call in ("merge", "bind"):
        with pytest.raises(hx.ConfigError, match="layers_0/attn/o_proj/kernel has no factors"):
            getattr(hx.inject({"{q,o}_proj": LORA}), call)(params, adapters)
        with pytest.raises(hx.ConfigError, match="no rule selects it"):
            getattr(hx.inject({"layers_0/attn/q_proj": LORA}), call)(params, adapters)


def test_a_bias_cannot_be_added_where_the_module_is_no_mapping():
    params = [jnp.ones((2, 2))]
    injection = hx.inject({"0": hx.hadamard_adapter()})
    adapters = injection.init(jax.random.key(0), params)
    with pytest.raises(hx.MergeError, match="needs a bias"):
        injection.merge(params, adapters)


def test_frozen_dicts_and_nnx_states_keep_their_type():
    params = freeze(tree())
    injection = hx.inject({"o_proj": hx.hadamard_adapter()})
    merged = injection.merge(params, injection.init(jax.random.key(0), params))
    assert type(merged) is type(params) and "bias" in merged["params"]["layers_0"]["attn"]["o_proj"]
    state = nnx.state(nnx.Linear(3, 3, rngs=nnx.Rngs(0)))
    injection = hx.inject({"kernel": LORA})
    assert type(injection.merge(state, injection.init(jax.random.key(0), state))) is type(state)


def test_two_hira_adapters_add_their_modulations_as_pefts_do(x64):
    """`W0 (1 + d1 + d2)`: each anchored on W0, so that batch and one-by-one merging of separate updates agree."""
    w = jax.random.normal(jax.random.key(0), (6, 5), jnp.float64)
    both = hx.inject({"w": hx.add(hx.hira(2), hx.hira(2))})
    adapters = perturbed(both.init(jax.random.key(1), {"w": w}))
    (f1, f2), one = adapters["w"], hx.inject({"w": hx.hira(2)})
    d1, d2 = f1["a"] @ f1["b"], f2["a"] @ f2["b"]
    chex.assert_trees_all_close(both.merge({"w": w}, adapters)["w"], w * (1 + d1 + d2), rtol=1e-12)
    alone = one.merge({"w": w}, {"w": f1})["w"]
    chex.assert_trees_all_close(alone, w * (1 + d1), rtol=1e-12)


def test_everything_works_abstractly_so_that_a_70b_model_is_counted_in_seconds():
    shapes = {"q_proj": (8192, 8192), "gate_proj": (8192, 28672), "down_proj": (28672, 8192)}
    params = {name: {"kernel": jax.ShapeDtypeStruct((80, *shape), jnp.bfloat16)} for name, shape in shapes.items()}
    injection = hx.inject({"q_proj": hx.abba(32), "gate_proj": hx.boha(32, 4), "down_proj": hx.hira(32)}, view="bio")
    adapters = jax.eval_shape(injection.init, jax.random.key(0), params)
    expected = 80 * 32 * sum(i + o for i, o in shapes.values())
    assert sum(leaf.size for leaf in jax.tree.leaves(adapters)) == expected
    assert injection.summary(params).trainable == expected
    assert jax.eval_shape(injection.merge, params, adapters)["q_proj"]["kernel"].shape == (80, 8192, 8192)


LLAMA_1B = {  # Llama-3.2-1B: 16 layers, d 2048, 8 kv heads of 64, ffn 8192
    "q_proj": (2048, 2048), "k_proj": (2048, 512), "v_proj": (2048, 512), "o_proj": (2048, 2048),
    "gate_proj": (2048, 8192), "up_proj": (2048, 8192), "down_proj": (8192, 2048),
}  # fmt: skip


@pytest.mark.parametrize(
    "adapter",
    [hx.lora(32), hx.hira(32), hx.abba(32), hx.boha(32, 4), hx.gralora(32, 4)],
    ids=lambda a: a.config["method"],
)
def test_llama_1b_at_rank_32_has_22544384_parameters(adapter):
    params = {name: {"kernel": jax.ShapeDtypeStruct((16, *shape), jnp.bfloat16)} for name, shape in LLAMA_1B.items()}
    assert hx.inject({"*_proj": adapter}, view="bio").summary(params).trainable == 22_544_384


def bert_base(layers=12):
    dense = {
        "kernel": jax.ShapeDtypeStruct((layers, 768, 768), jnp.float32),
        "bias": jax.ShapeDtypeStruct((layers, 768), jnp.float32),
    }
    norm = {name: jax.ShapeDtypeStruct((layers, 768), jnp.float32) for name in ("scale", "bias")}
    return {"layer": {"attention": {"output": {"dense": dense, "LayerNorm": norm}}}}


def test_the_hadamard_adapter_of_bert_base_has_18432_parameters_and_36864_with_a_norm():
    injection = hx.inject({"dense": hx.hadamard_adapter()}, view="bio")
    adapters = injection.summary(bert_base()).trainable
    norm, _ = hx.split(bert_base(), ["LayerNorm"])
    norms = sum(leaf.size for leaf in jax.tree.leaves(norm))
    assert (adapters, adapters + norms) == (18_432, 36_864)
    eight = hx.inject({"dense": hx.at(hx.hadamard_adapter(), view="bio", layers=range(8))})
    assert eight.summary(bert_base()).trainable == 12_288 and 12_288 + norms * 8 // 12 == 24_576


def test_a_summary_prints_paths_shapes_counts_and_the_share():
    text = str(hx.inject({"q_proj": LORA}).summary(tree()))
    assert "layers_0/attn/q_proj/kernel" in text and "(4, 6)" in text and "lora" in text
    assert "60 trainable of 532 base parameters: 11.2782%" in text


def test_a_config_survives_json():
    injection = hx.inject(
        {
            "layers_0/attn/q_proj": hx.at(hx.add(hx.hira(2), hx.lora(1)), layers=[0]),
            re.compile(r".*/UP_proj/kernel", re.IGNORECASE): hx.scaled(hx.abba(2), 0.5),
            "down_proj": hx.chain(hx.boha(2, 2), hx.ia3()),
        },
        view="bio",
        exclude=["layers_2/mlp/up_proj"],
    )
    rebuilt = hx.from_config(json.loads(json.dumps(injection.to_config())))
    assert rebuilt.to_config() == injection.to_config()
    params = tree()
    adapters = perturbed(injection.init(jax.random.key(0), params))
    chex.assert_trees_all_close(rebuilt.merge(params, adapters), injection.merge(params, adapters), rtol=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "not an injection's configuration"),
        ({"rules": [{"adapter": {"method": "lora", "rank": 2}}]}, "not an injection's configuration"),
        (
            {"rules": [{"pattern": "a", "adapter": {"method": "lroa", "rank": 2}}]},
            "unknown method 'lroa'; nearest: 'lora'",
        ),
        (
            {"rules": [{"pattern": "a", "adapter": {"method": "lora", "rnk": 2}}]},
            "lora has no option 'rnk'; nearest: 'rank'",
        ),
        (
            {"rules": [{"pattern": "a", "adapter": {"method": "boha", "rank": 2}}]},
            "missing a required argument: 'blocks'",
        ),
        ({"rules": [{"pattern": "a", "adapter": {"rank": 2}}]}, "needs a 'method'"),
        ({"rules": [{"pattern": "a", "adapter": {"method": "add"}}]}, "needs 'adapters'"),
        ([], "not an injection's configuration"),
        ({"rules": [], "veiw": "bio"}, "has no 'veiw'; nearest: 'view'"),
        ({"rules": [{"pattern": "a", "layer": [0], "adapter": {}}]}, "has no 'layer'; nearest: 'layers'"),
        ({"rules": [{"regex": "(", "adapter": {"method": "lora", "rank": 2}}]}, "not an injection's configuration"),
        ({"rules": [{"pattern": "a", "adapter": {"method": "ia3"}}] * 2}, "'a' stands in two rules"),
    ],
)
def test_a_configuration_that_is_none_is_refused_in_one_line(config, message):
    with pytest.raises(hx.ConfigError, match=message) as caught:
        hx.from_config(config)
    assert "\n" not in str(caught.value)


@settings(max_examples=30)
@given(
    st.permutations(["layers_0", "layers_1", "layers_2"]),
    st.sets(st.sampled_from(["q", "o", "up", "down"]), min_size=1),
)
def test_any_union_of_names_selects_exactly_them(order, names):
    pattern = "{" + ",".join(sorted(names)) + "}_proj"
    found = selected({f"{layer}/**/{pattern}/kernel": LORA for layer in order})
    assert sorted(found) == sorted(
        p for p in selected({"*_proj": LORA}) if p.split("/")[2].removesuffix("_proj") in names
    )
