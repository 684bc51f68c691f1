"""The decoder's own promises: layout, masks, packing, cache, precision. Parity with transformers is in tests/hf."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hadamax.errors import ConfigError
from hadamax.models import Decoder, DecoderConfig

from .conftest import equations

CONFIG = DecoderConfig(61, 24, 40, 3, 4, 2, 8, initializer_range=0.2)
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 10)))


@pytest.fixture(scope="module")
def params():
    return jax.jit(Decoder(CONFIG).init)(jax.random.key(0), IDS)


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


def test_layers_are_initialised_differently(params):
    kernel = params["params"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert not np.array_equal(kernel[0], kernel[1])


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_stacking_and_rematerialisation_change_neither_logits_nor_gradients(params, remat):
    def values(model, params):
        def loss(params):
            total, count = model.apply(params, IDS, IDS, jnp.ones(IDS.shape), method="loss")
            return total / count

        return run(model, params, IDS), jax.jit(jax.grad(loss))(params)

    expected, gradients = values(Decoder(CONFIG), params)
    logits, found = values(Decoder(CONFIG, remat=remat), params)
    close(logits, expected)
    jax.tree.map(close, found, gradients)
    logits, found = values(Decoder(CONFIG, scan_layers=False, remat=remat), unstack(params))
    close(logits, expected)
    jax.tree.map(close, found, unstack(gradients))


def test_the_view_says_how_kernels_are_stacked():
    assert (Decoder(CONFIG).view, Decoder(CONFIG, scan_layers=False).view) == ("bio", None)


def test_an_unknown_remat_policy_is_refused():
    with pytest.raises(ConfigError, match="remat 'some' is unknown; known: none, full, dots"):
        Decoder(CONFIG, remat="some").init(jax.random.key(0), IDS)


def test_no_token_sees_the_future(params):
    changed = IDS.at[:, 6].set((IDS[:, 6] + 1) % 61)
    before, after = (run(Decoder(CONFIG), params, ids) for ids in (IDS, changed))
    close(before[:, :6], after[:, :6])
    assert np.all(np.abs(before - after)[:, 6:].max(-1) > 1e-4)


@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 3), (2, 1)])
def test_padding_on_either_side_leaves_the_tokens_logits_alone(params, left, right):
    padded = jnp.pad(IDS, ((0, 0), (left, right)), constant_values=7)
    mask = jnp.pad(jnp.ones_like(IDS), ((0, 0), (left, right)))
    logits = run(Decoder(CONFIG), params, padded, mask)
    assert np.all(np.isfinite(logits))
    close(logits[:, left : left + 10], run(Decoder(CONFIG), params, IDS))


@pytest.mark.parametrize("restart", [False, True])
def test_packed_segments_do_not_see_each_other(params, restart):
    ids = jnp.concatenate([IDS[:1], IDS[1:, :6]], axis=1)
    segments = jnp.array([[1] * 10 + [2] * 6])
    positions = jnp.array([[*range(10), *range(6)]]) if restart else None
    packed = run(Decoder(CONFIG), params, ids, None, positions, segments)
    close(packed[:, :10], run(Decoder(CONFIG), params, IDS[:1]))
    close(packed[:, 10:], run(Decoder(CONFIG), params, IDS[1:, :6]))


@pytest.mark.parametrize("scan_layers", [True, False])
def test_decoding_with_a_cache_gives_the_logits_of_the_whole_sequence(params, scan_layers):
    """A left-padded and a right-padded prompt in one batch, then two tokens one by one."""
    model = Decoder(CONFIG, scan_layers=scan_layers)
    params = params if scan_layers else unstack(params)
    prompt = IDS[:, :5].at[0, :2].set(7)
    mask = jnp.array([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    cache = model.init_cache(2, 8)
    logits, cache = run(model, params, prompt, mask, cache, method="decode")
    rows = [IDS[:1, 2:5], IDS[1:, :3]]
    for step in range(3):
        expected = jnp.concatenate([run(Decoder(CONFIG, scan_layers=scan_layers), params, row)[:, -1] for row in rows])
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
