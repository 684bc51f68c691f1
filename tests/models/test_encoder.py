"""The encoder's own promises: layout, padding, precision, losses, adapters. Parity with transformers is in tests/hf."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hadamax as hx
from hadamax.errors import ConfigError
from hadamax.models import Encoder, EncoderConfig

from .conftest import equations

BERT = EncoderConfig(61, 24, 40, 2, 4, 20, initializer_range=0.2, labels=("a", "b", "c"))
ROBERTA = dataclasses.replace(BERT, model_type="roberta", pad_token_id=1)
IDS = jnp.asarray(np.random.default_rng(0).integers(2, 61, (2, 10)))


@functools.partial(jax.jit, static_argnums=0, static_argnames=("method", "chunk"))
def run(model, params, *args, **kwargs):
    return model.apply(params, *args, **kwargs)


@functools.cache
def made(config, task="hidden"):
    model = Encoder(config, task=task)
    return model, jax.jit(model.init)(jax.random.key(0), IDS)


def close(found, expected, atol=1e-5):
    np.testing.assert_allclose(found, expected, atol=atol)


def shapes(model):
    abstract = jax.eval_shape(model.init, jax.random.key(0), IDS)["params"]
    return {"/".join(k.key for k in keys): leaf.shape for keys, leaf in jax.tree.leaves_with_path(abstract)}


def layer_shapes(*lead):
    dense = {"attention/self/query": (24, 24), "attention/self/key": (24, 24), "attention/self/value": (24, 24)}
    dense |= {"attention/output/dense": (24, 24), "intermediate/dense": (24, 40), "output/dense": (40, 24)}
    found = {f"{name}/kernel": (*lead, *shape) for name, shape in dense.items()}
    found |= {f"{name}/bias": (*lead, shape[1]) for name, shape in dense.items()}
    norms = ("attention/output/LayerNorm", "output/LayerNorm")
    return found | {f"{norm}/{leaf}": (*lead, 24) for norm in norms for leaf in ("scale", "bias")}


BARE = {
    "embeddings/word_embeddings/embedding": (61, 24),
    "embeddings/position_embeddings/embedding": (20, 24),
    "embeddings/token_type_embeddings/embedding": (2, 24),
    "embeddings/LayerNorm/scale": (24,),
    "embeddings/LayerNorm/bias": (24,),
}
DENSE = {"dense/kernel": (24, 24), "dense/bias": (24,)}
POOLER = {f"pooler/{leaf}": shape for leaf, shape in DENSE.items()}
CLASSIFIER = {"classifier/kernel": (24, 3), "classifier/bias": (3,)}
HEADS = {
    ("bert", "hidden"): {},
    ("bert", "sentence_embedding"): {},
    ("bert", "pooled"): POOLER,
    ("bert", "token_classification"): CLASSIFIER,
    ("bert", "sequence_classification"): POOLER | CLASSIFIER,
    ("bert", "masked_lm"): {
        "cls/predictions/bias": (61,),
        "cls/predictions/transform/LayerNorm/scale": (24,),
        "cls/predictions/transform/LayerNorm/bias": (24,),
        **{f"cls/predictions/transform/{leaf}": shape for leaf, shape in DENSE.items()},
    },
    ("roberta", "pooled"): POOLER,
    ("roberta", "token_classification"): CLASSIFIER,
    ("roberta", "sequence_classification"): {
        "classifier/out_proj/kernel": (24, 3),
        "classifier/out_proj/bias": (3,),
        **{f"classifier/{leaf}": shape for leaf, shape in DENSE.items()},
    },
    ("roberta", "masked_lm"): {
        "lm_head/bias": (61,),
        "lm_head/layer_norm/scale": (24,),
        "lm_head/layer_norm/bias": (24,),
        **{f"lm_head/{leaf}": shape for leaf, shape in DENSE.items()},
    },
}


@pytest.mark.parametrize(("family", "task"), HEADS)
def test_parameters_have_the_documented_paths_and_shapes(family, task):
    model = Encoder({"bert": BERT, "roberta": ROBERTA}[family], task=task)
    expected = BARE | HEADS[family, task]
    stacked = {f"encoder/layer/{name}": shape for name, shape in layer_shapes(2).items()}
    single = {f"encoder/layer_{i}/{name}": shape for i in range(2) for name, shape in layer_shapes().items()}
    assert (shapes(model), model.view) == (expected | stacked, "bio")
    assert (shapes(model.clone(scan_layers=False)), model.clone(scan_layers=False).view) == (expected | single, None)


def unstack(params):
    tree = dict(params["params"])
    layer = tree["encoder"]["layer"]
    tree["encoder"] = {f"layer_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], layer) for i in range(2)}
    return {"params": tree}


def loss_and_gradients(model, params):
    def loss(params):
        return model.apply(params, IDS, IDS % 3, jnp.ones(IDS.shape), method="loss")[0]

    return jax.jit(jax.value_and_grad(loss))(params)


@functools.cache
def expected_gradients():
    return loss_and_gradients(*made(BERT, "token_classification"))


@pytest.mark.parametrize(("scan_layers", "remat"), [(True, "full"), (True, "dots"), (False, "none"), (False, "full")])
def test_stacking_and_rematerialisation_change_neither_loss_nor_gradients(scan_layers, remat):
    model, params = made(BERT, "token_classification")
    model, same = model.clone(scan_layers=scan_layers, remat=remat), (lambda tree: tree) if scan_layers else unstack
    found, found_gradients = loss_and_gradients(model, same(params))
    expected, gradients = expected_gradients()
    close(found, expected, atol=1e-4)
    jax.tree.map(functools.partial(close, atol=1e-4), found_gradients, same(gradients))


@pytest.mark.parametrize(("field", "known"), [("task", "hidden, pooled, sentence"), ("remat", "none, full, dots")])
def test_an_unknown_name_is_refused(field, known):
    with pytest.raises(ConfigError, match=rf"^{field} 'some' is unknown; known: {known}"):
        Encoder(BERT, **{field: "some"}).init(jax.random.key(0), IDS)


@pytest.mark.parametrize(("config", "left"), [(BERT, 0), (ROBERTA, 0), (ROBERTA, 3)], ids=["bert", "right", "left"])
def test_padding_leaves_the_tokens_states_alone(config, left):
    """BERT counts positions from the row's first slot, so that only padding on the right is free there."""
    model, params = made(config)
    where = ((0, 0), (left, 3 - left))
    padded = jnp.pad(IDS, where, constant_values=config.pad_token_id)
    states = run(model, params, padded, jnp.pad(jnp.ones_like(IDS), where))
    close(states[:, left : left + 10], run(model, params, IDS))
    assert np.abs(run(model, params, padded)[:, left : left + 10] - run(model, params, IDS)).max() > 1e-3  # no mask


def test_every_token_sees_every_other():
    model, params = made(BERT)
    change = run(model, params, IDS.at[:, 6].add(1)) - run(model, params, IDS)
    assert np.all(np.abs(change).max(-1) > 1e-4)


def test_a_sentence_embedding_has_length_one_and_does_not_see_padding():
    model, params = made(BERT, "sentence_embedding")
    padded = jnp.pad(IDS, ((0, 0), (0, 5)), constant_values=9)
    mask = jnp.pad(jnp.ones_like(IDS), ((0, 0), (0, 5)))
    found = run(model, params, padded, mask)
    close(jnp.linalg.norm(found, axis=-1), jnp.ones(2))
    close(found, run(model, params, IDS))
    states = run(*made(BERT), IDS).mean(axis=1)
    close(found, states / jnp.linalg.norm(states, axis=-1, keepdims=True))


def test_a_sentence_without_tokens_has_a_finite_embedding_and_gradient():
    model, params = made(BERT, "sentence_embedding")
    embed = jax.jit(jax.grad(lambda params: model.apply(params, IDS, jnp.zeros_like(IDS)).sum()))
    for leaf in jax.tree.leaves(embed(params)):
        assert np.all(np.isfinite(leaf))


@pytest.mark.parametrize("config", [BERT, ROBERTA], ids=["bert", "roberta"])
def test_an_id_outside_its_table_gives_nan(config):
    model, params = made(config)
    word = run(model, params, IDS.at[0, 5].set(61))
    kind = run(model, params, IDS, None, jnp.zeros_like(IDS).at[0, 5].set(2))
    below = run(model, params, IDS.at[0, 5].set(-1))
    for states in (word, below, kind):
        assert np.all(np.isnan(states[0])) and np.all(np.isfinite(states[1]))
    room = 20 if config is BERT else 18  # RoBERTa's first token has position pad_token_id + 1 = 2
    assert np.all(np.isfinite(run(model, params, jnp.full((1, room), 5))))
    assert np.all(np.isnan(run(model, params, jnp.full((1, room + 1), 5))))


def test_projections_compute_in_the_activation_dtype():
    """No matrix product is wider than the activations, but for attention's own softmax."""
    model = Encoder(BERT, task="masked_lm")
    params = jax.eval_shape(model.init, jax.random.key(0), IDS)
    program = jax.make_jaxpr(model.clone(dtype=jnp.bfloat16).apply)(params, IDS)
    products = [e.outvars[0].aval for e in equations(program.jaxpr) if e.primitive.name == "dot_general"]
    assert sum(aval.dtype == jnp.bfloat16 for aval in products) == 9  # six projections, transform, table, mixed values
    assert [aval.shape.count(10) for aval in products if aval.dtype != jnp.bfloat16] == [2]  # queries by keys
    assert program.out_avals[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("config", [BERT, ROBERTA], ids=["bert", "roberta"])
def test_the_masked_lm_loss_is_that_of_the_logits_whatever_the_chunk(config):
    model, params = made(config, "masked_lm")
    weights = jnp.zeros(IDS.shape).at[:, ::3].set(0.5)
    labels = jnp.where(weights == 0, -100, IDS)
    log_probs = jax.nn.log_softmax(run(model, params, IDS))
    expected = -jnp.sum(jnp.take_along_axis(log_probs, IDS[..., None], axis=-1)[..., 0] * weights)
    for chunk in (3, 128):
        total, count = run(model, params, IDS, labels, weights, method="loss", chunk=chunk)
        close(total, expected, atol=1e-4)
        assert count == weights.sum()


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_where_the_weight_is_zero_the_label_does_not_matter(family):
    model, params = made({"bert": BERT, "roberta": ROBERTA}[family], "sequence_classification")
    values = [run(model, params, IDS, jnp.array([1, x]), jnp.array([2.0, 0.0]), method="loss") for x in (0, -100)]
    assert values[0] == values[1] and np.isfinite(values[0][0]) and values[0][1] == 2.0


WRONG = {
    "features": ("hidden", IDS, r"task 'hidden' has no loss; it gives features"),
    "tokens": ("token_classification", IDS[:, 0], r"token_classification with single.* shape \(2, 10\), found \(2,\)"),
    "classes": ("sequence_classification", IDS, r"single_label_classification needs .* \(2,\), found \(2, 10\)"),
    "several": ("sequence_classification", jnp.ones(2), r"multi_label_classification needs .* \(2, 3\), found \(2,\)"),
}


@pytest.mark.parametrize(("task", "labels", "message"), WRONG.values(), ids=WRONG)
def test_labels_that_do_not_fit_the_task_are_refused(task, labels, message):
    model = Encoder(BERT, task=task)
    params = jax.eval_shape(model.init, jax.random.key(0), IDS)
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(functools.partial(model.apply, method="loss"), params, IDS, labels, jnp.ones(len(labels)))


def moved(adapters, by=0.3):
    keys = iter(jax.random.split(jax.random.key(5), 100))
    return jax.tree.map(lambda leaf: leaf + by * jax.random.normal(next(keys), leaf.shape), adapters)


@pytest.mark.parametrize(("task", "scan_layers"), [("masked_lm", True), ("sequence_classification", False)])
def test_adapters_compute_the_same_lazily_and_merged(task, scan_layers):
    model, params = made(ROBERTA, task)
    model, params = (model, params) if scan_layers else (model.clone(scan_layers=False), unstack(params))
    injection = hx.inject(
        {
            "query": hx.hira(4),
            "**/attention/output/dense": hx.hadamard_adapter(),
            "**/intermediate/dense": hx.hadamard_adapter(position="input"),
            "word_embeddings": hx.lora(2),
        },
        view=model.view,
    )
    adapters = moved(injection.init(jax.random.key(1), params))
    lazy = jax.jit(injection.apply(model.apply))(params, adapters, IDS)
    merged = injection.merge(params, adapters)
    assert jax.tree.structure(merged) == jax.tree.structure(params)  # every bias has its place already
    assert np.abs(lazy - run(model, params, IDS)).max() > 0.1
    close(lazy, run(model, merged, IDS), atol=1e-4)


@pytest.mark.parametrize("position", ["output", "input"])
def test_the_hadamard_adapter_folds_into_the_attention_outputs_weights_and_bias(position):
    """At the paper's place, against its formula in float64: A' = w .* A + b around dense(A) = A @ K + c."""
    model, params = made(BERT)
    params = moved(params, 0.1)
    injection = hx.inject({"**/attention/output/dense": hx.hadamard_adapter(position=position)}, view=model.view)
    adapters = moved(injection.init(jax.random.key(1), params))
    dense = params["params"]["encoder"]["layer"]["attention"]["output"]["dense"]
    merged = injection.merge(params, adapters)["params"]["encoder"]["layer"]["attention"]["output"]["dense"]
    (factors,) = adapters.values()
    for i in range(2):
        kernel, bias, w, b = (
            np.asarray(x[i], np.float64) for x in (dense["kernel"], dense["bias"], factors["weight"], factors["bias"])
        )
        new = (kernel * w, w * bias + b) if position == "output" else (w[:, None] * kernel, bias + b @ kernel)
        close(merged["kernel"][i], new[0], atol=1e-6)
        close(merged["bias"][i], new[1], atol=1e-6)
