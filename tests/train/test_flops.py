"""The count of model FLOPs, against sums made by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hadamax as hx
from hadamax.models import Decoder, DecoderConfig
from train.flops import PEAKS, peak, training_flops
from train.run import Base, apply_of, unplaced_apply_of

IN, OUT, TOKENS, RANK = 32, 48, 16, 4
X = jax.ShapeDtypeStruct((TOKENS, IN), jnp.float32)
N = IN * OUT


def of_layer(adapter):
    """FLOPs of a step of one adapted layer behind a trained scale, so that its input needs a gradient."""
    kernel = jax.ShapeDtypeStruct((IN, OUT), jnp.float32)
    injection = hx.inject({"layer": adapter})
    params = {"layer": {"kernel": kernel}}
    adapters = jax.eval_shape(injection.init, jax.random.key(0), params)
    apply = injection.apply(lambda params, x: x @ params["layer"]["kernel"])
    scale = jax.ShapeDtypeStruct((1, IN), jnp.float32)
    return training_flops(lambda t, params, x: apply(params, t[0], x * t[1]), (adapters, scale), params, X)


def test_a_frozen_kernel_takes_4_and_a_trained_one_6_for_each_weight_and_token():
    def loss(scale, x, kernel):
        return (x * scale) @ kernel

    scale, kernel = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, IN), (IN, OUT)))
    assert training_flops(loss, scale, X, kernel) == 4 * N * TOKENS
    assert training_flops(lambda t, x: loss(t[0], x, t[1]), (scale, kernel), X) == 6 * N * TOKENS
    assert training_flops(lambda k, x: x @ k, kernel, X) == 4 * N * TOKENS  # no gradient of the data


def test_adapters_take_what_their_form_does():
    assert of_layer(hx.lora(RANK)) == TOKENS * (4 * N + 6 * RANK * (IN + OUT))
    assert of_layer(hx.hira(RANK)) == TOKENS * 6 * N + 6 * RANK * N  # the dense gradient, and the merge once a step
    assert of_layer(hx.ia3()) == TOKENS * 4 * N
    assert of_layer(hx.abba(4, forward="merged")) == TOKENS * 6 * N + 2 * 6 * 2 * N


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
@pytest.mark.parametrize("scan_layers", [True, False])
def test_a_decoder_takes_4_for_each_frozen_weight_and_12_for_attention_and_recomputation_takes_nothing(
    remat, scan_layers
):
    config = DecoderConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    rows, length = 2, 16
    model = Decoder(config, remat=remat, scan_layers=scan_layers)
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    weights = jax.ShapeDtypeStruct((rows, length), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)
    injection = hx.inject({"*_proj": hx.lora(RANK)}, view=model.view)
    adapters = jax.eval_shape(injection.init, jax.random.key(0), params)

    def loss(adapters, params, ids, weights):
        return injection.apply(model.apply)(params, adapters, ids, ids, weights, method="loss")

    layer = {
        "q": (32, 32),
        "k": (32, 16),
        "v": (32, 16),
        "o": (32, 32),
        "gate": (32, 48),
        "up": (32, 48),
        "down": (48, 32),
    }
    kernels = 4 * sum(n * m for n, m in layer.values()) + 6 * RANK * sum(n + m for n, m in layer.values())
    # In an unrolled first layer no gradient flows to the embedded tokens, through q, k, v (whose inputs' it would be).
    first = sum(2 * n * m + 2 * RANK * n for n, m in (layer["q"], layer["k"], layer["v"]))
    per_token = 3 * (kernels + 12 * 32 * length) + 4 * 32 * 64 - (0 if scan_layers else first)
    assert training_flops(loss, adapters, params, ids, weights) == rows * length * per_token


def test_the_count_of_a_merge_does_not_grow_with_the_mesh():
    config = DecoderConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    batch = {name: jax.ShapeDtypeStruct((8, 16), jnp.int32) for name in ("input_ids", "targets")}
    batch["weights"] = jax.ShapeDtypeStruct((8, 16), jnp.float32)

    def count(devices, apply_of):
        mesh = hx.make_mesh(fsdp=devices, devices=jax.devices()[:devices])
        model = Decoder(config, mesh=mesh)
        params = jax.eval_shape(model.init, jax.random.key(0), batch["input_ids"])
        injection = hx.inject({"*_proj": hx.hira(RANK)}, view=model.view)
        adapters = jax.eval_shape(injection.init, jax.random.key(0), params)
        apply = apply_of(Base(model, params, config, None, mesh), injection)
        return training_flops(lambda t, p, b: apply(p, t, **b, method="loss"), adapters, params, batch)

    assert count(1, unplaced_apply_of) == count(8, unplaced_apply_of) == count(1, apply_of) < count(8, apply_of)


def test_shapes_of_one_device_count_for_all_and_detached_values_for_the_forward_pass_only():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = jax.P("fsdp"), jax.P()
    sharded = jax.shard_map(lambda x, k: x @ k, mesh=mesh, in_specs=(rows, whole), out_specs=rows)
    kernel = jax.ShapeDtypeStruct((IN, OUT), jnp.float32)
    assert training_flops(lambda k, x: sharded(x, k), kernel, X) == 4 * N * TOKENS
    assert training_flops(lambda k, x: x @ jax.lax.stop_gradient(k), kernel, X) == 2 * N * TOKENS


def test_functions_with_derivatives_of_their_own_count_as_others():
    product = jax.custom_vjp(lambda x, k: x @ k)
    product.defvjp(lambda x, k: (x @ k, (x, k)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))
    tangent = jax.custom_jvp(lambda x, k: x @ k)
    tangent.defjvp(lambda primals, tangents: (tangent(*primals), tangents[0] @ primals[1] + primals[0] @ tangents[1]))
    kernel = jax.ShapeDtypeStruct((IN, OUT), jnp.float32)
    for function in (product, tangent, jax.checkpoint(product), jax.jit(tangent)):
        assert training_flops(lambda k, x, f=function: f(x, k), kernel, X) == 4 * N * TOKENS


def test_branches_count_as_the_dearest_and_whole_numbers_carry_no_gradient():
    def loss(kernel, x):
        chosen = (kernel > 0).sum()
        picked = jax.lax.cond(chosen > 2, lambda x: x @ kernel, lambda x: 0 * x[:, :1] @ kernel[:1], x)
        return picked, jax.nn.one_hot(chosen, OUT) @ jnp.zeros((OUT, 2))

    kernel = jax.ShapeDtypeStruct((IN, OUT), jnp.float32)
    assert training_flops(loss, kernel, X) == 4 * N * TOKENS + 2 * OUT * 2


def test_longer_names_of_devices_are_told_from_shorter_ones():
    found = {kind: peak(kind) for kind in ("TPU v5", "TPU v5p", "TPU v5 lite", "TPU v6 lite", "TPU7x", "NVIDIA L40S")}
    assert [None if f is None else f / 1e12 for f in found.values()] == [459, 459, 197, 918, 1153.5, None]
    starts = list(PEAKS)
    for i, start in enumerate(starts):  # none is hidden behind an earlier, shorter one
        assert not any(start.startswith(earlier) for earlier in starts[:i])
    assert np.all([f is None or f > 1e14 for f in PEAKS.values()])
