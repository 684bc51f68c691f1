"""`hx.inject` on the Flax Llama, GPT-2 and BERT of transformers 4.57, whose code is not changed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers
from flax.core import FrozenDict, freeze
from flax.traverse_util import flatten_dict

import hadamax as hx
from tests.cases import CASES
from tests_flax.models import FAMILIES, IDS, VIEWS, bert, gpt2, llama, perturbed

# Names of tests.cases: the methods of a kernel alone, and those that move the bias, too.
KERNEL = ["rslora", "hira", "boha", "gralora", "dora", "loha", "abba-khatri-rao", "abba-merged"]
KERNEL += ["ia3", "ia3-input", "hilora", "scaled"]
BIAS = ["hadamard-output", "hadamard-input", "hadamard-bias", "add-shifts", "chain", "scaled-shift"]


def logits_of(model, **options):
    """The forward pass as the model's users write it."""
    return lambda params, ids: model(ids, params=params, **options).logits


def assert_close(found, expected, tolerance=1e-5):
    """Equal within `tolerance` of the largest entry."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert abs(found - expected).max() <= tolerance * abs(expected).max()


def graded(logits):
    """`adapters -> (logits, the gradient of a weighted sum of them)`, compiled."""

    def loss(adapters):
        y = logits(adapters)
        return jnp.sum(y * np.random.default_rng(1).standard_normal(y.shape)), y

    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True))

    def run(adapters):
        (_, y), gradient = compiled(adapters)
        return y, gradient

    return run


def compare(logits, params, injection):
    """Lazy weights give the logits and gradients of merged ones, and the base's logits at init.

    Returns:
        Trained factors, the gradient there, and the gradient at init.
    """
    apply = injection.apply(logits)
    lazy = graded(lambda adapters: apply(params, adapters, IDS))
    merged = graded(lambda adapters: logits(injection.merge(params, adapters), IDS))
    fresh = jax.jit(injection.init)(jax.random.key(0), params)
    trained = perturbed(fresh)
    base = jax.jit(logits)(params, IDS)

    y, at_init = lazy(fresh)
    assert_close(y, base)
    y, gradient = lazy(trained)
    expected, expected_gradient = merged(trained)
    assert_close(y, expected)
    jax.tree.map(lambda found, wanted: assert_close(found, wanted, 2e-5), gradient, expected_gradient)
    assert abs(y - base).max() > 0.1 * abs(base).max()
    return trained, gradient, at_init


def assert_merged_is_the_formula(params, adapters, merged, case, path, oi):
    """A merged layer against numpy, in float64 and the papers' orientation."""
    module = path.removesuffix("/kernel")
    old, new = ({name: np.asarray(v, float) for name, v in layer(tree, module).items()} for tree in (params, merged))
    factors = jax.tree.map(lambda leaf: np.asarray(leaf, float), adapters[path])
    kernel, bias = case.formula(factors, old["kernel"] if oi else old["kernel"].T, old.get("bias"))
    assert_close(new["kernel"], kernel if oi else kernel.T, 1e-6)
    assert (bias is None) == ("bias" not in new)
    if bias is not None:
        assert_close(new["bias"], bias, 1e-6)


def layer(params, module):
    for name in module.split("/"):
        params = params[name]
    return params


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", KERNEL),
        ("bert", KERNEL),
        ("gpt2", KERNEL[:6]),
        ("gpt2", KERNEL[6:]),
        ("llama", BIAS),
        ("bert", BIAS),
        ("gpt2", BIAS),
    ],
)
def test_every_method_computes_and_trains_as_merged_and_merges_as_its_formula(family, names):
    """The methods are dealt out in turn over all kernels of the model, or over all that have a bias."""
    (model, params), view = FAMILIES[family](), VIEWS[family]
    kernels = [
        path
        for path, target in hx.inject({"**/kernel": hx.lora(1)}, view=view).targets(params).items()
        if names is not BIAS or (target.bias and "/key/" not in path)  # softmax is blind to a shift of all keys
    ]
    assert len(kernels) >= len(names)
    cases = {path: CASES[names[at % len(names)]] for at, path in enumerate(kernels)}
    injection = hx.inject({path: case.adapter for path, case in cases.items()}, view=view)
    trained, gradient, at_init = compare(logits_of(model), params, injection)
    merged = jax.jit(injection.merge)(params, trained)
    for path, case in cases.items():
        assert_merged_is_the_formula(params, trained, merged, case, path, oi=view == "oi")
        for keys, leaf in jax.tree.leaves_with_path(at_init[path]):
            assert bool((leaf == 0).all()) == (keys[-1].key in case.still), (path, keys)
        for keys, leaf in jax.tree.leaves_with_path(gradient[path]):
            assert abs(leaf).max() > 1e-3, (path, keys)


def refuse(*_):
    raise AssertionError("the weight was merged")


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {}), ("gpt2", {}), ("bert", {"gradient_checkpointing": True}), ("llama", {"dtype": jnp.bfloat16})],
)
def test_no_projection_is_merged_but_by_its_adapter(family, options):
    """Neither FlaxConv1D's transpose, nor a cast, nor gradient checkpointing makes an array of the lazy weight."""
    made = FAMILIES[family]()
    params, logits = made.params, logits_of(made.variant(**options))
    injection = hx.inject({"**/kernel": hx.lora(2)._replace(merge=refuse)}, view=VIEWS[family])
    adapters = jax.eval_shape(injection.init, jax.random.key(0), params)
    apply = injection.apply(logits)
    gradient = jax.eval_shape(jax.grad(lambda a: apply(params, a, IDS).astype(jnp.float32).sum()), adapters)
    assert jax.tree.structure(gradient) == jax.tree.structure(adapters)


@pytest.mark.parametrize(
    ("made", "view", "rules"),
    [
        (llama, None, {"embed_tokens": hx.hira(4), "lm_head": hx.lora(4)}),
        # wte is the output layer, too, as BERT's word embeddings are
        (
            gpt2,
            "oi",
            {
                "wte": hx.at(hx.abba(4, alpha=2), view="io"),
                "wpe": hx.at(hx.boha(4, 2), view="io"),
                "c_attn": hx.lora(4),
            },
        ),
        (lambda: bert("ForMaskedLM"), None, {"word_embeddings": hx.lora(4), "position_embeddings": hx.dora(2)}),
    ],
    ids=FAMILIES,
)
def test_embeddings_and_tied_output_layers(made, view, rules):
    model, params = made()
    compare(logits_of(model), params, hx.inject(rules, view=view))


@pytest.mark.parametrize(
    ("family", "options", "rules"),
    [
        ("gpt2", {}, {"c_attn": hx.hira(4), "c_fc": hx.lora(4)}),
        (
            "bert",
            {"gradient_checkpointing": True},
            {"query": hx.hira(4), "**/{attention,layer/?}/output/dense": hx.lora(4)},
        ),
    ],
)
def test_dropout_falls_as_it_does_on_the_merged_model(family, options, rules):
    made = FAMILIES[family]()
    model, params = made.variant(**options), made.params
    logits = logits_of(model, train=True, dropout_rng=jax.random.key(5))
    compare(logits, params, hx.inject(rules, view=VIEWS[family]))
    assert abs(jax.jit(logits)(params, IDS) - jax.jit(logits_of(model))(params, IDS)).max() > 0.1


@pytest.mark.parametrize(
    ("family", "rules"),
    [
        ("llama", {"{q,v}_proj": hx.abba(4, alpha=4)}),
        ("gpt2", {"c_attn": hx.hira(4), "**/mlp/c_*": hx.lora(4)}),
        ("bert", {"**/attention/output/dense": hx.hadamard_adapter()}),
    ],
)
def test_steps_of_optax_lower_the_loss_and_leave_the_base_alone(family, rules):
    (model, params), injection = FAMILIES[family](), hx.inject(rules, view=VIEWS[family])
    before = jax.tree.map(np.array, params)
    adapters, tx = jax.jit(injection.init)(jax.random.key(0), params), optax.adam(1e-3)
    apply = injection.apply(logits_of(model))

    def loss(adapters, params):
        y = apply(params, adapters, IDS)
        y, labels = (y[:, :-1], IDS[:, 1:]) if y.ndim == 3 else (y, IDS[:, 0] % 16)
        return optax.softmax_cross_entropy_with_integer_labels(y, labels).mean()

    @jax.jit
    def step(adapters, state, params):
        value, gradient = jax.value_and_grad(loss)(adapters, params)
        updates, state = tx.update(gradient, state)
        return optax.apply_updates(adapters, updates), state, value

    state, losses = tx.init(adapters), []
    for _ in range(3):
        adapters, state, value = step(adapters, state, params)
        losses.append(float(value))
    assert losses[0] > losses[1] > losses[2]
    jax.tree.map(np.testing.assert_array_equal, params, before)
    merged = flatten_dict(jax.jit(injection.merge)(params, adapters), sep="/")
    moved = {path for path, leaf in flatten_dict(before, sep="/").items() if (leaf != merged[path]).any()}
    biases = {target.bias for target in injection.targets(params).values()} if family == "bert" else set()
    assert moved == adapters.keys() | biases


@pytest.mark.parametrize(("family", "pattern"), [("llama", "q_proj"), ("gpt2", "c_attn")])
def test_cached_greedy_generation_is_that_of_the_merged_model(family, pattern):
    model, params = FAMILIES[family]()
    injection = hx.inject({pattern: hx.hira(4)}, view=VIEWS[family])
    adapters = perturbed(jax.jit(injection.init)(jax.random.key(0), params), size=1.0)
    mask = np.ones_like(IDS)

    @jax.jit
    def generate(params, ids):
        made = model.generate(ids, params=params, attention_mask=mask, max_length=12, do_sample=False)
        return made.sequences[:, IDS.shape[1] :]

    tokens = jax.jit(injection.apply(generate))(params, adapters, IDS)
    assert (tokens == generate(injection.merge(params, adapters), IDS)).all()
    assert (tokens != generate(params, IDS)).any()


def test_a_shift_where_the_model_has_no_bias_merges_into_the_model_that_has_one():
    """`nn.Dense` passes over a bias that it was not made for, so the merged tree is for `attention_bias=True`."""
    model, params = llama(attention_bias=False)
    injection = hx.inject({"{q,k,v,o}_proj": hx.hadamard_adapter()})
    adapters = perturbed(jax.jit(injection.init)(jax.random.key(0), params))
    merged = injection.merge(params, adapters)
    y = jax.jit(injection.apply(logits_of(model)))(params, adapters, IDS)
    assert_close(jax.jit(logits_of(llama(attention_bias=True).model))(merged, IDS), y)


def test_frozen_dicts_come_back_frozen_and_the_forward_pass_needs_no_jit():
    model = transformers.FlaxGPT2LMHeadModel(gpt2().model.config)
    params, injection = freeze(model.params), hx.inject({"c_attn": hx.lora(4)}, view="oi")
    adapters = perturbed(injection.init(jax.random.key(0), params))
    merged = injection.merge(params, adapters)
    assert isinstance(merged, FrozenDict)
    assert_close(injection.apply(logits_of(model))(params, adapters, IDS), logits_of(model)(merged, IDS))


@pytest.mark.parametrize(
    ("family", "pattern", "expected"),
    [
        ("llama", "q_proj", "model/layers/1/self_attn/q_proj/kernel"),
        ("gpt2", "c_attn", "transformer/h/1/attn/c_attn/kernel"),
        ("bert", "query", "bert/encoder/layer/1/attention/self/query/kernel"),
    ],
)
def test_layers_are_counted_by_the_number_in_the_path(family, pattern, expected):
    injection = hx.inject({pattern: hx.at(hx.lora(4), layers=[1])}, view=VIEWS[family])
    assert list(injection.targets(FAMILIES[family]().params)) == [expected]


def test_half_precision_trains_float32_factors_and_stays_within_bfloat16_rounding():
    half = llama().variant(dtype=jnp.bfloat16)
    params = half.to_bf16(llama().params)
    injection = hx.inject({"{q,v}_proj": hx.lora(4), "{o,down}_proj": hx.hira(4)})
    adapters = perturbed(jax.jit(injection.init)(jax.random.key(0), params))
    exact = jax.jit(logits_of(llama().model))(injection.merge(half.to_fp32(params), adapters), IDS)
    y, gradient = graded(lambda a: injection.apply(logits_of(half))(params, a, IDS))(adapters)
    assert y.dtype == jnp.bfloat16
    assert_close(y.astype(jnp.float32), exact, 4 * 2.0**-8)
    assert {leaf.dtype for leaf in jax.tree.leaves((adapters, gradient))} == {jnp.dtype("float32")}
