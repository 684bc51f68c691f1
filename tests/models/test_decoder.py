"""The decoder's own promises: layout, masks, packing, cache, precision. Parity with transformers is in tests/hf."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hadamax as hx
from hadamax.errors import ConfigError
from hadamax.models import Decoder, DecoderConfig

from .conftest import equations

CONFIG = DecoderConfig(61, 24, 40, 3, 4, 2, 8, initializer_range=0.2)
WINDOW = dataclasses.replace(CONFIG, sliding_window=4)
FEATURES = dataclasses.replace(  # of all families at once
    CONFIG, hidden_act="gelu_pytorch_tanh", qkv_bias=True, query_key_norm=True, post_norms=True, norm_unit_offset=True,
    scale_embeddings=True, query_pre_attn_scalar=5, attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
    sliding_window=3, sliding_layers=(False, True, True),
)  # fmt: skip
CONFIGS = {"plain": CONFIG, "window": WINDOW, "features": FEATURES}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 10)))


@functools.cache
def params_of(config):
    return jax.jit(Decoder(config).init)(jax.random.key(0), IDS)


@pytest.fixture
def params():
    return params_of(CONFIG)


@functools.partial(jax.jit, static_argnums=0, static_argnames="method")
def run(model, params, *args, method=None):
    return model.apply(params, *args, method=method)


def close(found, expected, atol=1e-5):
    np.testing.assert_allclose(found, expected, atol=atol)


def unstack(params, layers=3):
    rest = dict(params["params"])
    stacked = rest.pop("layers")
    return {"params": rest | {f"layers_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(layers)}}


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_have_the_documented_paths_and_shapes(tied):
    model = Decoder(
        DecoderConfig(61, 24, 40, 3, 4, 2, 8, tie_word_embeddings=tied, mlp_bias=True), param_dtype="bfloat16"
    )
    abstract = jax.eval_shape(model.init, jax.random.key(0), IDS)["params"]
    found = {"/".join(k.key for k in keys): leaf.shape for keys, leaf in jax.tree.leaves_with_path(abstract)}
    expected = {
        "embed_tokens/embedding": (61, 24),
        "layers/input_layernorm/scale": (3, 24),
        "layers/post_attention_layernorm/scale": (3, 24),
        "layers/self_attn/q_proj/kernel": (3, 24, 32),
        "layers/self_attn/k_proj/kernel": (3, 24, 16),
        "layers/self_attn/v_proj/kernel": (3, 24, 16),
        "layers/self_attn/o_proj/kernel": (3, 32, 24),
        "layers/mlp/gate_proj/kernel": (3, 24, 40),
        "layers/mlp/gate_proj/bias": (3, 40),
        "layers/mlp/up_proj/kernel": (3, 24, 40),
        "layers/mlp/up_proj/bias": (3, 40),
        "layers/mlp/down_proj/kernel": (3, 40, 24),
        "layers/mlp/down_proj/bias": (3, 24),
        "norm/scale": (24,),
    }
    assert found == expected | ({} if tied else {"lm_head/kernel": (24, 61)})
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract)} == {jnp.dtype("bfloat16")}


def test_features_add_the_documented_leaves():
    abstract = jax.eval_shape(Decoder(FEATURES).init, jax.random.key(0), IDS)["params"]["layers"]
    found = {"/".join(k.key for k in keys): leaf.shape for keys, leaf in jax.tree.leaves_with_path(abstract)}
    assert {name: shape for name, shape in found.items() if not name.endswith("kernel")} == {
        "input_layernorm/scale": (3, 24),
        "post_attention_layernorm/scale": (3, 24),
        "pre_feedforward_layernorm/scale": (3, 24),
        "post_feedforward_layernorm/scale": (3, 24),
        "self_attn/q_norm/scale": (3, 8),
        "self_attn/k_norm/scale": (3, 8),
        "self_attn/q_proj/bias": (3, 32),
        "self_attn/k_proj/bias": (3, 16),
        "self_attn/v_proj/bias": (3, 16),
    }


def test_layers_are_initialised_differently(params):
    kernel = params["params"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert not np.array_equal(kernel[0], kernel[1])


@pytest.mark.parametrize(
    ("config", "remat"), [(CONFIG, "none"), (CONFIG, "full"), (CONFIG, "dots"), (FEATURES, "full")]
)
def test_stacking_and_rematerialisation_change_neither_logits_nor_gradients(config, remat):
    params = params_of(config)

    def values(model, params):
        def loss(params):
            total, count = model.apply(params, IDS, IDS, jnp.ones(IDS.shape), method="loss")
            return total / count

        return run(model, params, IDS), jax.jit(jax.grad(loss))(params)

    expected, gradients = values(Decoder(config), params)
    logits, found = values(Decoder(config, remat=remat), params)
    close(logits, expected)
    jax.tree.map(close, found, gradients)
    logits, found = values(Decoder(config, scan_layers=False, remat=remat), unstack(params))
    close(logits, expected)
    jax.tree.map(close, found, unstack(gradients))


def test_the_view_says_how_kernels_are_stacked():
    assert (Decoder(CONFIG).view, Decoder(CONFIG, scan_layers=False).view) == ("bio", None)


def test_an_unknown_remat_policy_is_refused():
    with pytest.raises(ConfigError, match="remat 'some' is unknown; known: none, full, dots"):
        Decoder(CONFIG, remat="some").init(jax.random.key(0), IDS)


def seen_from(config, at):
    """Positions whose logits change with the token at one position."""
    changed = IDS.at[:, at].set((IDS[:, at] + 1) % 61)
    before, after = (run(Decoder(config), params_of(config), ids) for ids in (IDS, changed))
    return [int(i) for i in np.flatnonzero(np.abs(before - after).max((0, 2)) > 1e-5)]


def test_no_token_sees_the_future_nor_beyond_its_window():
    assert seen_from(CONFIG, 6) == [6, 7, 8, 9]
    one = dataclasses.replace(WINDOW, num_hidden_layers=1)
    assert seen_from(one, 2) == [2, 3, 4, 5]  # four tokens, itself included
    assert seen_from(dataclasses.replace(one, num_hidden_layers=2), 2) == [2, 3, 4, 5, 6, 7, 8]
    mixed = dataclasses.replace(one, num_hidden_layers=2, sliding_layers=(True, False))
    assert seen_from(mixed, 2) == [2, 3, 4, 5, 6, 7, 8, 9]
    capped = dataclasses.replace(one, attn_logit_softcapping=2.0)
    assert seen_from(capped, 2) == [2, 3, 4, 5]


def test_a_window_that_no_row_fills_costs_nothing(params):
    """And a model without one has no mask but causality."""
    wide = dataclasses.replace(WINDOW, sliding_window=10)
    programs = [str(jax.make_jaxpr(Decoder(config).apply)(params, IDS)) for config in (CONFIG, wide, WINDOW)]
    assert programs[0] == programs[1] != programs[2]


@each_config
@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 3), (2, 1)])
def test_padding_on_either_side_leaves_the_tokens_logits_alone(config, left, right):
    params = params_of(config)
    padded = jnp.pad(IDS, ((0, 0), (left, right)), constant_values=7)
    mask = jnp.pad(jnp.ones_like(IDS), ((0, 0), (left, right)))
    logits = run(Decoder(config), params, padded, mask)
    assert np.all(np.isfinite(logits))
    close(logits[:, left : left + 10], run(Decoder(config), params, IDS))


@each_config
@pytest.mark.parametrize("restart", [False, True])
def test_packed_segments_do_not_see_each_other(config, restart):
    params = params_of(config)
    ids = jnp.concatenate([IDS[:1], IDS[1:, :6]], axis=1)
    segments = jnp.array([[1] * 10 + [2] * 6])
    positions = jnp.array([[*range(10), *range(6)]]) if restart else None
    packed = run(Decoder(config), params, ids, None, positions, segments)
    close(packed[:, :10], run(Decoder(config), params, IDS[:1]))
    close(packed[:, 10:], run(Decoder(config), params, IDS[1:, :6]))


@pytest.mark.parametrize(
    ("config", "scan_layers"), [(CONFIG, True), (CONFIG, False), (WINDOW, True), (FEATURES, True), (FEATURES, False)]
)
def test_decoding_with_a_cache_gives_the_logits_of_the_whole_sequence(config, scan_layers):
    """A left-padded and a right-padded prompt in one batch, then tokens one by one, past the window."""
    model = Decoder(config, scan_layers=scan_layers)
    params = params_of(config) if scan_layers else unstack(params_of(config))
    prompt = IDS[:, :5].at[0, :2].set(7)
    mask = jnp.array([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    cache = model.init_cache(2, 8)
    logits, cache = run(model, params, prompt, mask, cache, method="decode")
    rows = [IDS[:1, 2:5], IDS[1:, :3]]
    for step in range(3):
        expected = jnp.concatenate([run(Decoder(config, scan_layers=scan_layers), params, row)[:, -1] for row in rows])
        close(logits, expected)
        token = IDS[:, 7 + step : 8 + step]
        logits, cache = run(model, params, token, jnp.ones((2, 1)), cache, method="decode")
        rows = [jnp.concatenate([row, token[i : i + 1]], axis=1) for i, row in enumerate(rows)]
    assert int(cache.used) == 8


def test_projections_compute_in_the_activation_dtype(params):
    """No matrix product is wider than the activations, but for attention's own softmax."""
    model = Decoder(CONFIG, dtype=jnp.bfloat16)
    program = jax.make_jaxpr(model.apply)(params, IDS)
    products = [e.outvars[0].aval for e in equations(program.jaxpr) if e.primitive.name == "dot_general"]
    assert sum(aval.dtype == jnp.bfloat16 for aval in products) == 9  # seven projections, the head, the mixed values
    assert [aval.shape.count(10) for aval in products if aval.dtype != jnp.bfloat16] == [2]  # queries by keys
    assert program.out_avals[0].dtype == jnp.bfloat16


def test_an_id_outside_the_vocabulary_gives_nan(params):
    logits = run(Decoder(CONFIG), params, IDS.at[0, 5].set(61))
    assert np.all(np.isnan(logits[0, 5:])) and np.all(np.isfinite(logits[1]))


def test_a_70b_model_is_counted_without_memory():
    config = DecoderConfig(128256, 8192, 28672, 80, 64, 8, 128)
    abstract = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 1), int))
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == 70_553_706_496


INVALID = {
    "window": ({"sliding_window": 0}, "sliding_window must be a positive integer or None, found 0"),
    "no-window": ({"sliding_layers": (True, False, True)}, "sliding_layers needs a sliding_window"),
    "few": ({"sliding_window": 4, "sliding_layers": (True, False)}, "of each of the 3 layers .* found 2 entries, 1 of"),
    "all": (
        {"sliding_window": 4, "sliding_layers": (True,) * 3},
        r"\(None = all have it\), found 3 entries, 3 of them",
    ),
    "list": ({"sliding_window": 4, "sliding_layers": [True]}, r"must be a tuple of booleans, found \[True\]"),
    "biases": ({"attention_bias": True, "qkv_bias": True}, "attention_bias .* and qkv_bias .* exclude each other"),
    "cap": ({"final_logit_softcapping": -1.0}, "final_logit_softcapping must be a positive number or None, found -1.0"),
    "flag": ({"post_norms": 1}, "post_norms must be true or false, found 1"),
}


@pytest.mark.parametrize(("fields", "message"), INVALID.values(), ids=INVALID)
def test_a_config_that_contradicts_itself_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(CONFIG, **fields)


def test_adapters_reach_every_feature_unmerged_as_merged():
    model, params = Decoder(FEATURES, remat="full"), params_of(FEATURES)
    rules = {"{q,k}_proj": hx.hadamard_adapter(), "*_proj": hx.hira(2), "embed_tokens": hx.lora(2)}
    injection = hx.inject(rules, view=model.view)
    adapters = jax.tree.map(lambda leaf: leaf + 0.2, injection.init(jax.random.key(2), params))
    lazy = jax.jit(injection.apply(model.apply))(params, adapters, IDS)
    assert np.abs(lazy - run(model, params, IDS)).max() > 0.1
    close(lazy, run(model, injection.merge(params, adapters), IDS))
