"""Adapters on a mesh: every method gives what it gives on one device; only factors' gradients are summed over it."""

import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import hadamax as hx
from benchmarks.collectives import REDUCTIONS, collectives, of_kernels
from hadamax.models import Decoder, DecoderConfig
from tests.cases import CASES

LAYERS, WIDE, NARROW, ROWS, LENGTH = 2, 32, 16, 8, 3
MESHES = {
    "fsdp 8": {"fsdp": 8},
    "fsdp 4, tensor 2": {"fsdp": 4, "tensor": 2},
    "data 2, fsdp 2, tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
}
every_mesh = pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES.keys())


def model(params, x):
    """Two matmuls in each of a scan's layers, checkpointed, as a transformer's MLP."""

    @jax.checkpoint
    def layer(x, weights):
        hidden = jnp.tanh(x @ weights["up_proj"]["kernel"] + weights["up_proj"]["bias"][None, None])
        return x + hidden @ weights["down_proj"]["kernel"], None

    return jax.lax.scan(layer, x, params["layers"])[0]


def arrays(dtype, narrow=NARROW, wide=WIDE, rows=ROWS):
    keys = jax.random.split(jax.random.key(0), 4)
    up = {
        "kernel": jax.random.normal(keys[0], (LAYERS, narrow, wide), dtype) / narrow**0.5,
        "bias": jax.random.normal(keys[1], (LAYERS, wide), dtype),
    }
    down = {"kernel": jax.random.normal(keys[2], (LAYERS, wide, narrow), dtype) / wide**0.5}
    return {"layers": {"up_proj": up, "down_proj": down}}, jax.random.normal(keys[3], (rows, LENGTH, narrow), dtype)


def perturbed(tree):
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    noisy = [f + 0.3 * jax.random.normal(k, f.shape, f.dtype) for f, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, noisy)


def gradient_program(injection, params, adapters, x, mesh, told=True):
    """The jitted loss and gradient with everything in its place, and its arguments."""
    placed = hx.param_shardings(params, mesh)
    lie = injection.shardings(params, placed)
    apply = injection.apply(model, placed if told else None)

    def loss(adapters, params, x):
        return jnp.sin(apply(params, adapters, x)).astype(jnp.float32 if x.dtype == jnp.bfloat16 else x.dtype).sum()

    whole = NamedSharding(mesh, PartitionSpec())
    program = jax.jit(jax.value_and_grad(loss), out_shardings=(whole, lie))
    return program, (
        jax.device_put(adapters, lie),
        jax.device_put(params, placed),
        jax.device_put(x, hx.batch_sharding(mesh)),
    )


@every_mesh
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_losses_and_gradients_are_those_of_one_device(case, axes, x64):
    params, x = arrays(jnp.float64)
    injection = hx.inject({"*_proj": case.adapter}, view="bio")
    adapters = perturbed(injection.init(jax.random.key(1), params))
    apply = injection.apply(model)
    expected = jax.jit(jax.value_and_grad(lambda adapters: jnp.sin(apply(params, adapters, x)).sum()))(adapters)
    program, args = gradient_program(injection, params, adapters, x, hx.make_mesh(**axes))
    chex.assert_trees_all_close(program(*args), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_factors_lie_as_the_axes_of_their_kernel(name):
    params, _ = arrays(jnp.float32)
    injection = hx.inject({"*_proj": CASES[name].adapter}, view="bio")
    mesh = hx.make_mesh(fsdp=4, tensor=2)
    lie = injection.shardings(params, hx.param_shardings(params, mesh))
    adapters = injection.init(jax.random.key(1), params)
    path = "layers/up_proj/kernel"
    for sharding, factor in zip(*map(jax.tree.leaves, (lie[path], adapters[path])), strict=True):
        spec = [*sharding.spec, *[None] * factor.ndim][: factor.ndim]
        split = [(axis, n) for axis, n in zip(spec, factor.shape, strict=True) if axis]
        for axis, n in split:  # in lies on fsdp, out on tensor, whole or a block's part of it
            assert (NARROW if axis == "fsdp" else WIDE) % n == 0 and n % mesh.shape[axis] == 0
        assert len(split) >= len([n for n in factor.shape[1:] if n in (NARROW, WIDE)])


MERGED = {  # of LoRA's budget at rank 8
    "hira": hx.hira(8),
    "boha": hx.boha(8, 2),
    "abba": hx.abba(8, forward="merged"),
    "loha": hx.loha(4, forward="merged"),
    "hilora": hx.add(hx.hira(4), hx.lora(4)),
}
KHATRI_RAO = {"abba-khatri-rao": hx.abba(8, forward="khatri_rao")}
# sizes that no activation has, not even flattened or split
BIG = {"narrow": 320, "wide": 448, "rows": 8}


def sent(adapter, axes, told=True, dtype=jnp.bfloat16):
    """What a gradient of the factors sends over the mesh: (of kernels, bytes of factors' gradients)."""
    params, x = arrays(dtype, **BIG)
    injection = hx.inject({"*_proj": adapter}, view="bio")
    mesh = hx.make_mesh(**axes)
    program, args = gradient_program(injection, params, injection.init(jax.random.key(1), params), x, mesh, told)
    found = collectives(program.lower(*args).compile().as_text())
    kernels = of_kernels(found, [(BIG["narrow"], BIG["wide"])], LAYERS, tuple(mesh.shape.values()))
    activations = {math.prod(x.shape) // n for n in (1, 2, 4, 8)}
    reduced = [one for one in found if one.kind in REDUCTIONS and "tensor" not in one.axes(mesh.shape)]
    size = sum(one.bytes for one in reduced if not all(math.prod(s.dims) in activations for s in one.shapes))
    return kernels, size


@pytest.mark.parametrize("axes", [MESHES["fsdp 8"], MESHES["fsdp 4, tensor 2"]], ids=str)
@pytest.mark.parametrize("name", MERGED | KHATRI_RAO)
def test_no_dense_gradient_crosses_the_mesh_and_kernels_are_gathered_no_oftener_than_by_lora(name, axes):
    kernels, size = sent((MERGED | KHATRI_RAO)[name], axes)
    plain, least = sent(hx.lora(8), axes)
    assert not kernels.reductions and not kernels.stacked
    assert size <= 1.5 * least
    gathered = [sum(one.bytes for one in each.gathers) for each in (kernels, plain)]
    assert gathered[0] <= gathered[1]


@pytest.mark.parametrize("name", MERGED)
def test_the_search_finds_the_dense_gradient_where_the_injection_is_not_told(name):
    kernels, _ = sent(MERGED[name], MESHES["fsdp 8"], told=False)
    assert kernels.reductions


def test_so_it_does_with_the_gradients_of_khatri_rao_products():
    _, told = sent(KHATRI_RAO["abba-khatri-rao"], MESHES["fsdp 8"])
    _, untold = sent(KHATRI_RAO["abba-khatri-rao"], MESHES["fsdp 8"], told=False)
    assert untold > 1.5 * told


def test_rows_that_do_not_divide_are_computed_all_the_same(x64):
    params, x = arrays(jnp.float64, rows=3)
    injection = hx.inject({"*_proj": hx.hira(4)}, view="bio")
    adapters = perturbed(injection.init(jax.random.key(1), params))
    mesh = hx.make_mesh(fsdp=4, tensor=2)
    placed = hx.param_shardings(params, mesh)
    y = jax.jit(injection.apply(model, placed))(jax.device_put(params, placed), adapters, x)
    chex.assert_trees_all_close(y, injection.apply(model)(params, adapters, x), rtol=1e-12)


def test_forward_mode_on_a_mesh_is_that_of_one_device(x64):
    params, x = arrays(jnp.float64)
    injection = hx.inject({"*_proj": hx.hira(4)}, view="bio")
    adapters = perturbed(injection.init(jax.random.key(1), params))
    placed = hx.param_shardings(params, hx.make_mesh(fsdp=4, tensor=2))

    def curvature(params, placed):  # forward over reverse: a Hessian times a vector
        apply = injection.apply(model, placed)
        gradient = jax.grad(lambda adapters: jnp.sin(apply(params, adapters, x)).sum())
        return jax.jit(lambda adapters: jax.jvp(gradient, (adapters,), (adapters,)))(adapters)

    found = curvature(jax.device_put(params, placed), placed)
    chex.assert_trees_all_close(found, curvature(params, None), rtol=1e-9, atol=1e-10)


def test_many_adapters_over_one_base_on_a_mesh(x64):
    params, x = arrays(jnp.float64)
    injection = hx.inject({"up_proj": hx.hira(4), "down_proj": hx.abba(4, forward="merged")}, view="bio")
    several = jax.vmap(lambda key: perturbed(injection.init(key, params)))(jax.random.split(jax.random.key(1), 3))
    mesh = hx.make_mesh(fsdp=8)
    placed = hx.param_shardings(params, mesh)

    def gradient(params, adapters, apply):
        return jax.grad(lambda adapters: jnp.sin(apply(params, adapters, x)).sum())(adapters)

    def each(params, several, apply):
        return jax.jit(jax.vmap(partial(gradient, apply=apply), in_axes=(None, 0)))(params, several)

    found = each(jax.device_put(params, placed), several, injection.apply(model, placed))
    chex.assert_trees_all_close(found, each(params, several, injection.apply(model)), rtol=1e-9, atol=1e-10)


@every_mesh
@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied head"])
def test_the_decoder_on_a_mesh_has_the_losses_and_gradients_of_one_device(axes, tied):
    config = DecoderConfig(48, 16, 32, 2, 4, 2, 4, tie_word_embeddings=tied)
    ids = jax.random.randint(jax.random.key(1), (8, 12), 0, 48)
    weights = jnp.ones(ids.shape)
    plain, mesh = Decoder(config, remat="full"), hx.make_mesh(**axes)
    params = jax.jit(plain.init)(jax.random.key(0), ids)
    rules = {"*_proj": hx.hira(4), "embed_tokens": hx.lora(2)}
    injection = hx.inject(rules if tied else {**rules, "lm_head": hx.hira(2)}, view="bio")
    adapters = perturbed(injection.init(jax.random.key(1), params))

    def value_and_grad(model, placed, adapters, params):
        apply = injection.apply(model.apply, placed)
        loss = lambda adapters: apply(params, adapters, ids, ids, weights, method="loss")[0]  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(adapters)

    placed = hx.param_shardings(params, mesh)
    found = value_and_grad(
        plain.clone(mesh=mesh),
        placed,
        jax.device_put(adapters, injection.shardings(params, placed)),
        jax.device_put(params, placed),
    )
    chex.assert_trees_all_close(found, value_and_grad(plain, None, adapters, params), rtol=2e-4, atol=2e-5)


def test_sizes_of_a_mesh_that_do_not_make_the_devices_are_refused_with_the_numbers():
    with pytest.raises(hx.ConfigError, match="mesh data 1, fsdp 3, tensor 1: does not make 8, the number of devices"):
        hx.make_mesh(fsdp=3)
    with pytest.raises(hx.ConfigError, match="only one size may be -1"):
        hx.make_mesh(data=-1)
    with pytest.raises(hx.ConfigError, match="positive integers, or -1"):
        hx.make_mesh(fsdp=0)
    assert dict(hx.make_mesh(tensor=2).shape) == {"data": 1, "fsdp": 4, "tensor": 2}
    assert np.array_equal(hx.make_mesh(fsdp=4, devices=jax.devices()[:4]).devices.ravel(), jax.devices()[:4])


def test_a_tree_of_places_that_does_not_fit_is_refused_in_one_line():
    params, _ = arrays(jnp.float32)
    injection = hx.inject({"*_proj": hx.hira(4)}, view="bio")
    adapters = injection.init(jax.random.key(1), params)
    placed = hx.param_shardings(params, hx.make_mesh(fsdp=8))
    with pytest.raises(hx.ConfigError, match="layers/up_proj/kernel: placed does not say where it lies"):
        injection.bind(params, adapters, {"layers": {"down_proj": placed["layers"]["down_proj"]}})
    with pytest.raises(hx.ConfigError, match="placed must be a tree of NamedShardings, found ArrayImpl"):
        injection.bind(params, adapters, params)
    explicit = {"w": {"kernel": NamedSharding(jax.make_mesh((8,), ("fsdp",)), PartitionSpec("fsdp"))}}
    with pytest.raises(hx.ConfigError, match="must be of AxisType"):
        hx.inject({"w": hx.hira(1)}).shardings({"w": {"kernel": jnp.ones((8, 8))}}, explicit)
    foreign = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(hx.ConfigError, match="mesh axis 'model' is unknown"):
        injection.shardings(params, jax.tree.map(lambda _: NamedSharding(foreign, PartitionSpec()), params))
