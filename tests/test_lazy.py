"""A model with lazy weights, whatever JAX it is made of, computes what it computes with merged weights."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.extend.core import jaxpr_as_fun
from jax.sharding import PartitionSpec as P

import hadamax as hx
from hadamax import lazy as lazy_module
from tests.cases import CASES
from tests.test_methods import perturbed

D = 8
ADAPTERS = {name: CASES[name].adapter for name in ("lora", "hira", "boha", "abba-khatri-rao", "dora", "hilora")}
every_adapter = pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS.keys())


def normal(key, *shape, dtype=jnp.float64):
    return jax.random.normal(jax.random.key(key), shape, dtype)


@jax.custom_vjp
def clipped(w, x):
    return x @ w


clipped.defvjp(lambda w, x: (x @ w, (w, x)), lambda res, g: (res[1].T @ jnp.clip(g, -0.5, 0.5), g @ res[0].T))


@jax.custom_jvp
def doubled(w):
    return w * 2


doubled.defjvp(lambda primals, tangents: (doubled(*primals), 3 * tangents[0]))

MESH = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
sharded = jax.shard_map(lambda w, x: jnp.tanh(x @ w), mesh=MESH, in_specs=(P(), P("data")), out_specs=P("data"))

# every way in which a model may use a kernel w [D, D] on x [8, D]
USES = {
    "matmul": lambda w, x: x @ w,
    "vector": lambda w, x: x[0] @ w,
    "left": lambda w, x: w @ x.T,
    "transposed": lambda w, x: x @ w.T,
    "both": lambda w, x: (x @ w) @ w,
    "einsum": lambda w, x: jnp.einsum("io,...i->...o", w, x[:, None]),
    "einsum over out": lambda w, x: jnp.einsum("io,...o->...i", w, x[None]),
    "precision": lambda w, x: jnp.matmul(x, w, precision="highest"),
    "wider result": lambda w, x: jnp.matmul(
        x.astype(jnp.float32), w.astype(jnp.float32), preferred_element_type=jnp.float64
    ),
    "jit": lambda w, x: jax.jit(lambda w, x: x @ w)(w, x),
    "checkpoint": lambda w, x: jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(w, x),
    "checkpoint with a policy": lambda w, x: jax.checkpoint(
        lambda w, x: jnp.tanh(x @ w) @ w, policy=jax.checkpoint_policies.dots_saveable
    )(w, x),
    "scan with w outside": lambda w, x: lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, None, length=3)[0],
    "scan with w carried": lambda w, x: lax.scan(
        lambda c, _: ((c[0], jnp.tanh(c[1] @ c[0])), None), (w, x), None, length=2
    )[0][1],
    "scan over rows, reversed": lambda w, x: lax.scan(lambda h, row: (jnp.tanh(h @ w) + row, h), x[0], x, reverse=True)[
        1
    ],
    "loop of its own length for each row": lambda w, x: jax.vmap(
        lambda row, n: lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, jnp.tanh(c[1] @ w)), (0, row))[1]
    )(x, jnp.arange(8)),
    "reshape in Fortran's order": lambda w, x: x @ w.reshape(D, D, order="F"),
    "cast twice": lambda w, x: x @ w.astype(jnp.float32).astype(jnp.float64),
    "lookup beyond the table": lambda w, x: jnp.take(
        w, jnp.array([1, D, -D - 1, -1]), axis=0, mode="fill", fill_value=0
    ),
    "lookup clipped": lambda w, x: jnp.take(w, jnp.array([1, D, -1]), axis=0, mode="clip"),
    "jit that returns the weight": lambda w, x: x @ jax.jit(lambda w: w.T)(w),
    "while": lambda w, x: lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ w), x),
    "cond": lambda w, x: lax.cond(x[0, 0] > 0, lambda w: x @ w, lambda w: x - 1, w),
    "switch": lambda w, x: lax.switch(1, [lambda w: x, lambda w: x @ w], w),
    "custom_vjp on w": clipped,
    "custom_jvp on w": lambda w, x: x @ doubled(w),
    "custom_jvp elsewhere": lambda w, x: jax.nn.relu(x @ w),
    "custom_vjp elsewhere": lambda w, x: clipped(jnp.eye(D, dtype=x.dtype), x @ w),
    "shard_map on w": sharded,
    "shard_map elsewhere": lambda w, x: sharded(jnp.eye(D, dtype=x.dtype), x @ w),
    "shard_map under jit": lambda w, x: jax.jit(sharded)(w, x),
    "vmap over x": lambda w, x: jax.vmap(lambda row: row @ w)(x),
    "vmap over w": lambda w, x: jax.vmap(lambda column: x @ column, in_axes=1)(w),
    "gradient by x inside": lambda w, x: jax.grad(lambda x: jnp.sin(x @ w).sum())(x),
    "reshape": lambda w, x: jnp.einsum("xi,inh->xnh", x, w.reshape(D, 2, D // 2)).reshape(8, D),
    "reshape of in": lambda w, x: jnp.einsum("xab,abo->xo", x.reshape(8, 2, D // 2), w.reshape(2, D // 2, D)),
    "sum": lambda w, x: x * w.sum(),
    "elementwise": lambda w, x: x @ (w * 2 + 1),
    "slice of in": lambda w, x: x[:, :3] @ w[:3],
    "transpose twice": lambda w, x: x @ w.T.T,
    "lookup": lambda w, x: w[jnp.array([1, 1, 0])],
    "named scope": lambda w, x: jax.named_scope("layer")(lambda: x @ w)(),
    "returned": lambda w, x: w,
}


def lazy_weight(adapter, w):
    injection = hx.inject({"w": adapter})
    return injection, perturbed(injection.init(jax.random.key(1), {"w": w}), size=0.2)


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
@pytest.mark.parametrize("name", ["hira", "lora", "boha"])
def test_outputs_and_gradients_equal_those_with_merged_weights(use, name, x64):
    w, x = normal(0, D, D), normal(2, 8, D)
    injection, adapters = lazy_weight(ADAPTERS[name], w)
    lazy = injection.apply(lambda params, x: use(params["w"], x))

    def merged(params, adapters, x):
        return use(injection.merge(params, adapters)["w"], x)

    if use is USES["loop of its own length for each row"]:  # JAX has no reverse mode for it
        chex.assert_trees_all_close(lazy({"w": w}, adapters, x), merged({"w": w}, adapters, x), rtol=1e-9)
        return
    y, pull = jax.vjp(functools.partial(lazy, {"w": w}), adapters, x)
    expected, pull_merged = jax.vjp(functools.partial(merged, {"w": w}), adapters, x)
    close = (
        {"rtol": 1e-9, "atol": 1e-10}
        if use is not USES["wider result"] and use is not USES["cast twice"]
        else {"rtol": 1e-5, "atol": 1e-5}
    )
    chex.assert_trees_all_close(y, expected, **close)
    g = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
    chex.assert_trees_all_close(pull(g), pull_merged(g), **close)
    chex.assert_trees_all_close(jax.jit(lazy)({"w": w}, adapters, x), expected, **close)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.Dense(2 * D, name="up", param_dtype=x.dtype)(nn.LayerNorm(name="norm", param_dtype=x.dtype)(x))
        return x + nn.Dense(D, name="down", param_dtype=x.dtype)(nn.gelu(h)), None


class Plain(nn.Module):
    """A stack of blocks under `nn.scan` alone."""

    @nn.compact
    def __call__(self, x):
        block = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return block(name="layers")(x, None)[0]


class Stack(nn.Module):
    """A stack of blocks under `nn.scan` and `nn.remat`."""

    axis: int = 0

    @nn.compact
    def __call__(self, x):
        block = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=3,
        )
        return block(name="layers")(x, None)[0]


@every_adapter
def test_linen_scan_and_remat(adapter, x64):
    model, x = Stack(), normal(0, 4, D)
    params = model.init(jax.random.key(1), x)
    injection = hx.inject({"**/{up,down}/kernel": adapter}, view="bio")
    adapters = perturbed(injection.init(jax.random.key(2), params), size=0.1)
    assert jax.tree.leaves(adapters["layers/up/kernel"])[0].shape[0] == 3
    agree(model.apply, injection, params, adapters, x)


def test_layers_stacked_on_another_axis_as_maxtext_has_them(x64):
    model, x = Stack(axis=1), normal(0, 4, D)
    params = model.init(jax.random.key(1), x)
    injection = hx.inject({"up": hx.at(hx.hira(2), view="ibo"), "down": hx.at(hx.lora(2), view="ibo")})
    agree(model.apply, injection, params, perturbed(injection.init(jax.random.key(2), params)), x)


def test_only_some_layers_of_a_stack_are_adapted(x64):
    model, x = Stack(), normal(0, 4, D)
    params = model.init(jax.random.key(1), x)
    injection = hx.inject({"up": hx.at(hx.hira(2), view="bio", layers=[2, 0])})
    adapters = perturbed(injection.init(jax.random.key(2), params))
    assert adapters["layers/up/kernel"]["a"].shape[0] == 2
    merged = injection.merge(params, adapters)["params"]["layers"]["up"]["kernel"]
    base = params["params"]["layers"]["up"]["kernel"]
    assert (merged[1] == base[1]).all() and (merged[0] != base[0]).any() and (merged[2] != base[2]).any()
    agree(model.apply, injection, params, adapters, x)


def agree(apply, injection, params, adapters, *args, rtol=1e-8):
    """Outputs and gradients of the lazy and of the merged model are the same."""
    lazy = jax.jit(injection.apply(apply))
    y, pull = jax.vjp(lambda a: lazy(params, a, *args), adapters)
    expected, pull_merged = jax.vjp(lambda a: apply(injection.merge(params, a), *args), adapters)
    chex.assert_trees_all_close(y, expected, rtol=rtol, atol=rtol / 10)
    g = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
    chex.assert_trees_all_close(pull(g), pull_merged(g), rtol=rtol, atol=rtol / 10)


def test_a_shift_is_applied_with_and_without_the_layers_own_bias(x64):
    model, x = Stack(), normal(0, 4, D)
    params = model.init(jax.random.key(1), x)
    injection = hx.inject({"up": hx.hadamard_adapter(), "down": hx.hadamard_adapter(position="input")}, view="bio")
    agree(model.apply, injection, params, perturbed(injection.init(jax.random.key(2), params)), x)

    dense, x = nn.Dense(4, use_bias=False, param_dtype=x.dtype), normal(0, 4, D)
    params = dense.init(jax.random.key(1), x)
    for position in ("input", "output"):
        injection = hx.inject({"kernel": hx.hadamard_adapter(position=position)})
        adapters = perturbed(injection.init(jax.random.key(2), params))
        merged = injection.merge(params, adapters)
        y = injection.apply(dense.apply)(params, adapters, x)
        chex.assert_trees_all_close(y, nn.Dense(4).apply(merged, x), rtol=1e-12)


def test_a_shift_where_the_weight_is_not_used_as_a_layer_is_an_error():
    injection = hx.inject({"w": hx.hadamard_adapter()})
    params = {"w": jnp.ones((4, 4))}
    adapters = injection.init(jax.random.key(0), params)
    with pytest.raises(hx.MergeError, match="w: hadamard_adapter shifts the layer's output"):
        injection.apply(lambda p, x: x @ p["w"].T)(params, adapters, jnp.ones(4))


class Tiny(nnx.Module):
    def __init__(self, rngs):
        kinds = {"param_dtype": jnp.float64, "dtype": jnp.float64, "rngs": rngs}
        self.blocks = nnx.List([nnx.Linear(D, D, **kinds) for _ in range(2)])
        self.attend = nnx.MultiHeadAttention(num_heads=2, in_features=D, decode=False, **kinds)

    def __call__(self, x):
        for block in self.blocks:
            x = nnx.relu(block(x))
        return self.attend(x[None], deterministic=True)[0]


@every_adapter
def test_nnx_state(adapter, x64):
    graph, state = nnx.split(Tiny(nnx.Rngs(0)))
    injection = hx.inject(
        {
            "blocks/*/kernel": adapter,
            "**/{query,key,value}/kernel": hx.at(adapter, view="ioo"),
            "out": hx.at(adapter, view="iio"),
        }
    )
    adapters = perturbed(injection.init(jax.random.key(2), state), size=0.1)
    assert "attend/out/kernel" in adapters and "blocks/1/kernel" in adapters
    x = normal(0, 5, D)
    agree(lambda state, x: nnx.merge(graph, state)(x), injection, state, adapters, x, rtol=1e-5)  # float32 softmax


EINSUMS = {  # as google-deepmind/gemma, tunix, mixtures of experts and GPT-2 lay their kernels out
    "q_einsum NDH": ("btd,ndh->btnh", (4, D, 2), "oio"),
    "kv_einsum 2KDH": ("btd,ckdh->cbtkh", (2, 2, D, 4), "boio"),
    "attn_vec NHD": ("btnh,nhd->btd", (4, 2, D), "iio"),
    "gating 2FD": ("btd,cfd->cbtf", (2, 6, D), "boi"),
    "q DNH": ("btd,dnh->btnh", (D, 4, 2), "ioo"),
    "experts EDF": ("ebd,edf->ebf", (3, D, 6), "bio"),
    "experts, tokens shared": ("bd,edf->bef", (3, D, 6), "bio"),
    "experts last": ("bed,dfe->bef", (D, 6, 3), "iob"),
    "two batch axes": ("gebd,egdf->gebf", (3, 2, D, 6), "bbio"),
    "GPT-2 out in": ("btd,fd->btf", (6, D), "oi"),
    "split in": ("bthd,hfd->btf", (2, 6, 4), "ioi"),
}


@pytest.mark.parametrize(("spec", "shape", "view"), EINSUMS.values(), ids=EINSUMS.keys())
@pytest.mark.parametrize("name", ["lora", "hira", "abba-khatri-rao", "dora"])
def test_einsum_kernels_of_any_layout(spec, shape, view, name, x64):
    sizes = dict(zip(spec.split("->")[0].split(",")[1], shape, strict=True))
    x_shape = [sizes.get(axis, 3) for axis in spec.split(",")[0]]
    w, x = normal(0, *shape), normal(1, *x_shape)
    adapter = {"lora": hx.lora(2), "hira": hx.hira(2), "dora": hx.dora(2)}.get(name, hx.abba(2, forward="khatri_rao"))
    injection = hx.inject({"w": hx.at(adapter, view=view)})
    adapters = perturbed(injection.init(jax.random.key(2), {"w": w}))
    agree(lambda p, x: jnp.einsum(spec, x, p["w"]), injection, {"w": w}, adapters, x)


def test_stacked_einsum_kernels_scanned_and_indexed(x64):
    w, x = normal(0, 3, D, 2, 4), normal(1, 5, D)
    injection = hx.inject({"w": hx.at(hx.boha(4, 2), view="bioo")})
    adapters = perturbed(injection.init(jax.random.key(2), {"w": w}))

    def by_scan(p, x):
        return lax.scan(lambda h, w: (jnp.tanh(jnp.einsum("bd,dnh->bnh", h, w)).reshape(5, D), None), x, p["w"])[0]

    def by_index(p, x):
        for at in range(3):
            x = jnp.tanh(jnp.einsum("bd,dnh->bnh", x, p["w"][at])).reshape(5, D)
        return x

    def by_traced_index(p, x):
        return lax.fori_loop(
            0,
            3,
            lambda at, h: jnp.tanh(
                jnp.einsum("bd,dnh->bnh", h, lax.dynamic_index_in_dim(p["w"], at, keepdims=False))
            ).reshape(5, D),
            x,
        )

    agree(by_scan, injection, {"w": w}, adapters, x)
    agree(by_index, injection, {"w": w}, adapters, x)
    y = injection.apply(by_traced_index)({"w": w}, adapters, x)
    chex.assert_trees_all_close(y, by_index(injection.merge({"w": w}, adapters), x), rtol=1e-10)


@pytest.mark.parametrize("adapter", [hx.lora(2), hx.hira(2), hx.abba(2), hx.loha(2)], ids=lambda a: a.config["method"])
def test_embeddings_by_lookup_and_as_tied_output_layer(adapter, x64):
    model, ids = nn.Embed(12, D, param_dtype=jnp.float64, name="embed"), jnp.array([[1, 5, 1], [11, 0, 3]])
    params = {"params": {"embed": model.init(jax.random.key(0), ids)["params"]}}
    injection = hx.inject({"embed": adapter})
    adapters = perturbed(injection.init(jax.random.key(1), params))
    assert list(adapters) == ["embed/embedding"]

    def tied(p, ids):
        table = {"params": p["params"]["embed"]}
        return model.apply(table, jnp.tanh(model.apply(table, ids)), method="attend")

    agree(tied, injection, params, adapters, ids)
    rows = injection.apply(lambda p, ids: model.apply({"params": p["params"]["embed"]}, ids))
    shapes = intermediate_shapes(jax.make_jaxpr(rows)(params, adapters, ids).jaxpr)
    assert (12, D) not in shapes, "a lookup must merge the rows that it takes, not the table"


def test_vmap_over_adapters_with_one_base(x64):
    model, x = Stack(), normal(0, 4, D)
    params = model.init(jax.random.key(1), x)
    injection = hx.inject({"up": hx.at(hx.hira(2), layers=[0, 2]), "down": hx.abba(2)}, view="bio")
    several = jax.vmap(lambda key: perturbed(injection.init(key, params)))(jax.random.split(jax.random.key(2), 3))
    several = jax.tree.map(lambda leaf: leaf * (1 + jnp.arange(3.0)).reshape(3, *[1] * (leaf.ndim - 1)), several)
    together = jax.vmap(lambda adapters: injection.apply(model.apply)(params, adapters, x))(several)
    for at in range(3):
        one = injection.merge(params, jax.tree.map(lambda leaf, at=at: leaf[at], several))
        chex.assert_trees_all_close(together[at], model.apply(one, x), rtol=1e-9, atol=1e-10)


def test_under_an_outer_shard_map_and_an_outer_grad(x64):
    w, x = normal(0, D, D), normal(1, 8, D)
    injection, adapters = lazy_weight(hx.hira(2), w)

    def loss(adapters):
        body = jax.shard_map(
            lambda w, a, x: injection.apply(lambda p, x: jnp.sin(x @ p["w"]))({"w": w}, a, x),
            mesh=MESH,
            in_specs=(P(), P(), P("data")),
            out_specs=P("data"),
        )
        return body(w, adapters, x).sum()

    expected = jax.grad(lambda a: jnp.sin(x @ injection.merge({"w": w}, a)["w"]).sum())(adapters)
    chex.assert_trees_all_close(jax.grad(loss)(adapters), expected, rtol=1e-9)


def test_a_cast_is_one_rounding_with_the_merge():
    w = normal(0, D, D, dtype=jnp.float32)
    injection, adapters = lazy_weight(hx.hira(2), w)
    x = jnp.eye(D, dtype=jnp.bfloat16)
    y = injection.apply(lambda p, x: x @ p["w"].astype(jnp.bfloat16))({"w": w}, adapters, x)
    chex.assert_trees_all_equal(y, injection.merge({"w": w}, adapters)["w"].astype(jnp.bfloat16))


def test_arguments_that_are_no_arrays_are_passed_on():
    injection, adapters = lazy_weight(hx.lora(1), jnp.ones((2, 2)))

    def fn(params, x, *, name, flag=None, scale=1.0):
        assert isinstance(name, str) and flag is None and isinstance(scale, float)
        return {"y": (x @ params["w"]) * scale}

    assert injection.apply(fn)({"w": jnp.ones((2, 2))}, adapters, jnp.ones(2), name="a", scale=2.0)["y"].shape == (2,)


def test_a_lazy_weight_says_what_it_is_and_counts_as_an_array():
    injection, adapters = lazy_weight(hx.hira(1), jnp.ones((2, 3)))
    w = injection.bind({"w": jnp.ones((2, 3))}, adapters)["w"]
    assert (w.shape, w.ndim, w.size, w.dtype) == ((2, 3), 2, 6, jnp.float32)
    assert repr(w) == "LazyWeight(w: float32[2, 3], hira)"
    chex.assert_trees_all_equal(w.materialise(), injection.merge({"w": jnp.ones((2, 3))}, adapters)["w"])
    leaves, tree = jax.tree.flatten(w)
    assert isinstance(jax.tree.unflatten(tree, leaves), hx.LazyWeight)


# What a training step may hold, read from its jaxpr.


def subjaxprs(eqn):
    for value in jax.tree.leaves(eqn.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
        if hasattr(value, "eqns"):
            yield value
        elif hasattr(value, "jaxpr"):
            yield value.jaxpr


def intermediate_shapes(jaxpr):
    """The shapes of all values that the equations make, in all sub-programs."""
    shapes = set()
    for eqn in jaxpr.eqns:
        shapes |= {var.aval.shape for var in eqn.outvars if hasattr(var.aval, "shape")}
        for sub in subjaxprs(eqn):
            shapes |= intermediate_shapes(sub)
    return shapes


@pytest.mark.parametrize(
    "adapter",
    [hx.hira(2), hx.boha(4, 2), hx.abba(2, forward="merged"), hx.lora(2), hx.abba(2, forward="khatri_rao")],
    ids=["hira", "boha", "abba-merged", "lora", "abba-khatri-rao"],
)
def test_a_training_step_holds_no_merged_stack_and_no_gradient_of_a_frozen_weight(adapter):
    model, x = Stack(), normal(0, 4, D, dtype=jnp.float32)
    params = model.init(jax.random.key(1), x)
    injection = hx.inject({"up": adapter, "down": adapter}, view="bio")
    adapters = injection.init(jax.random.key(2), params)
    apply = injection.apply(model.apply)

    def loss(adapters, params):
        return (apply(params, adapters, x) ** 2).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(adapters, params).jaxpr
    made = intermediate_shapes(jaxpr)
    for stacked in ((3, D, 2 * D), (3, 2 * D, D)):
        assert stacked not in made, "merged weights or their gradients, of all layers at once"
    dense = {(D, 2 * D), (2 * D, D)} & made
    factored = adapter.config["method"] == "lora" or adapter.config.get("forward") == "khatri_rao"
    assert not dense if factored else dense, (
        "a factored method makes no dense matrix at all; a merged one within its layer"
    )
    assert {v.aval.shape for v in jaxpr.outvars} == {leaf.shape for leaf in jax.tree.leaves(adapters)}


@pytest.mark.parametrize(
    "adapter",
    [hx.hira(2), hx.boha(4, 2), hx.abba(2, forward="merged"), hx.add(hx.hira(1), hx.lora(1))],
    ids=["hira", "boha", "abba-merged", "add"],
)
def test_the_merged_weight_is_not_kept_for_the_backward_pass(adapter):
    """Also where the input has a gradient: what is kept of the weight's shape is W0 itself."""
    w = normal(0, D, 3 * D, dtype=jnp.float32)
    injection, adapters = lazy_weight(adapter, w)
    for use, width in ((lambda p, x: jnp.sin(x @ p["w"]), D), (lambda p, x: jnp.sin(x @ p["w"].T), 3 * D)):
        x = normal(1, 4, width, dtype=jnp.float32)
        _, pull = jax.vjp(lambda a, x, use=use: injection.apply(use)({"w": w}, a, x), adapters, x)
        kept = [leaf for leaf in jax.tree.leaves(pull) if getattr(leaf, "shape", None) in (w.shape, w.T.shape)]
        assert kept and all(leaf.shape == w.shape and (leaf == w).all() for leaf in kept)


@pytest.mark.parametrize(
    "adapter", [hx.lora(2), hx.hira(2), hx.dora(2), hx.hadamard_adapter()], ids=lambda a: a.config["method"]
)
def test_adapting_some_layers_of_a_stack_keeps_no_copy_of_the_base(adapter):
    model, x = Plain(), normal(0, 4, D, dtype=jnp.float32)
    params = model.init(jax.random.key(1), x)
    injection = hx.inject({"up": hx.at(adapter, layers=[0]), "down": hx.at(adapter, layers=[2])}, view="bio")
    adapters = injection.init(jax.random.key(2), params)
    apply = injection.apply(model.apply)
    made = intermediate_shapes(jax.make_jaxpr(jax.grad(lambda a: (apply(params, a, x) ** 2).sum()))(adapters).jaxpr)
    assert not {(3, D, 2 * D), (3, 2 * D, D)} & made


def test_a_lookup_out_of_bounds_is_nan_as_in_jax():
    w = normal(0, D, D, dtype=jnp.float32)
    injection, adapters = lazy_weight(hx.hira(2), w)
    rows = injection.apply(lambda p, i: jnp.take(p["w"], i, axis=0))({"w": w}, adapters, jnp.array([D, -D - 1, -1]))
    assert jnp.isnan(rows[:2]).all() and jnp.isfinite(rows[2]).all()


def test_precision_and_checkpoint_policies_reach_the_program():
    w, x = normal(0, D, D, dtype=jnp.float32), normal(1, 4, D, dtype=jnp.float32)
    injection, adapters = lazy_weight(hx.lora(2), w)
    apply = injection.apply(lambda p, x: jnp.matmul(x, p["w"], precision="highest"))
    assert "HIGHEST" in str(jax.make_jaxpr(apply)({"w": w}, adapters, x))
    policy = jax.checkpoint_policies.dots_saveable
    apply = injection.apply(lambda p, x: jax.checkpoint(lambda w: x @ w, policy=policy)(p["w"]))
    eqns = jax.make_jaxpr(apply)({"w": w}, adapters, x).jaxpr.eqns
    assert [eqn.params["policy"] for eqn in eqns if "policy" in eqn.params] == [policy]


def test_classes_modules_and_numpy_scalars_are_static_arguments():
    injection, adapters = lazy_weight(hx.lora(1), jnp.ones((2, 2)))

    def fn(params, x, dtype, model, flag):
        assert dtype is jnp.bfloat16 and isinstance(model, nn.Dense) and bool(flag)
        return x @ params["w"]

    assert injection.apply(fn)(
        {"w": jnp.ones((2, 2))}, adapters, jnp.ones(2), jnp.bfloat16, nn.Dense(2), np.bool_(True)
    ).shape == (2,)


def test_nothing_is_recompiled_from_step_to_step():
    w, x = normal(0, D, D, dtype=jnp.float32), normal(1, 4, D, dtype=jnp.float32)
    injection, adapters = lazy_weight(hx.hira(2), w)
    step = jax.jit(lambda a, w, x: injection.apply(lambda p, x: x @ p["w"])({"w": w}, a, x))
    for at in range(3):
        step(jax.tree.map(lambda leaf, at=at: leaf + at, adapters), w, x)
    assert step._cache_size() == 1


@settings(max_examples=25)
@given(data=st.data())
def test_any_view_and_any_contraction_agree_with_the_merged_weight(data, x64):
    view = data.draw(
        st.sampled_from(["io", "oi", "bio", "ibo", "iob", "ioo", "iio", "oio", "bioo", "boio", "iobo"]), label="view"
    )
    shape = tuple(data.draw(st.integers(1, 3), label=axis) for axis in view)
    contract = data.draw(st.lists(st.sampled_from(range(len(shape))), unique=True, min_size=1), label="contracted axes")
    batched = [at for at in range(len(shape)) if view[at] == "b" and at not in contract]
    batched = data.draw(st.permutations(batched), label="batch axes")[: data.draw(st.integers(0, len(batched)))]
    dims = data.draw(st.permutations([*contract, *batched, -1, -2]), label="axes of x")
    w = normal(0, *shape)
    x = normal(1, *[shape[at] if at >= 0 else 2 for at in dims])
    numbers = (([dims.index(at) for at in contract], contract), ([dims.index(at) for at in batched], batched))
    injection = hx.inject({"w": hx.at(hx.add(hx.lora(1), hx.hira(1)), view=view)})
    adapters = perturbed(injection.init(jax.random.key(2), {"w": w}))
    swap = data.draw(st.booleans(), label="weight on the left")

    def use(p, x):
        if swap:
            return lax.dot_general(p["w"], x, tuple(tuple(reversed(pair)) for pair in numbers))
        return lax.dot_general(x, p["w"], numbers)

    expected = use(injection.merge({"w": w}, adapters), x)
    chex.assert_trees_all_close(injection.apply(use)({"w": w}, adapters, x), expected, rtol=1e-9, atol=1e-10)


def test_jax_still_writes_equations_as_this_module_reads_them():
    """The one place that fails loudly when JAX changes the form of its equations (`jax.extend.core`)."""
    w = jnp.ones((2, 2))

    def params_of(fn, name):
        eqns = jax.make_jaxpr(fn)(w).jaxpr.eqns
        return next(eqn.params for eqn in eqns if eqn.primitive in lazy_module._RULES and eqn.primitive.name == name)

    assert {"jaxpr"} <= params_of(jax.jit(lambda w: w + 1), "jit").keys()
    assert {"jaxpr", "prevent_cse", "policy"} <= params_of(jax.checkpoint(lambda w: w + 1), "remat2").keys()
    assert {"branches"} <= params_of(lambda w: lax.cond(True, lambda w: w, lambda w: w + 1, w), "cond").keys()
    loop = params_of(lambda w: lax.while_loop(lambda w: w[0, 0] < 0, lambda w: w + 1, w), "while")
    assert {"cond_jaxpr", "body_jaxpr", "cond_nconsts", "body_nconsts"} <= loop.keys()
    scan = params_of(lambda w: lax.scan(lambda c, x: (c, x), w, w), "scan")
    assert {"jaxpr", "length", "reverse", "unroll"} <= scan.keys()
    assert {"num_consts", "num_carry"} <= scan.keys() or "ft_in" in scan
    dot = params_of(lambda w: w @ w, "dot_general")
    assert {"dimension_numbers", "precision", "preferred_element_type", "out_sharding"} <= dot.keys()
    closed = jax.make_jaxpr(lambda w: w + 1)(w)
    chex.assert_trees_all_equal(jaxpr_as_fun(closed)(w)[0], w + 1)
