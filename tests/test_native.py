"""The native directory brings every method back to the bit, knows its base, and trusts nothing that it reads."""

import json
import os
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import hadamax as hx
from hadamax import fingerprint, native
from tests.cases import CASES


def base_params(dtype=jnp.float32):
    rng = np.random.default_rng(0)

    def dense(*shape):
        return {"kernel": jnp.asarray(rng.normal(size=shape), dtype), "bias": jnp.asarray(rng.normal(size=8), dtype)}

    return {
        "params": {
            "layers": {
                "q": {"kernel": jnp.asarray(rng.normal(size=(3, 16, 8)), dtype)},
                "norm": {"scale": jnp.ones(8)},
            },
            "head": dense(16, 8),
        }
    }


def factors(injection, params, dtype=None):
    rng = np.random.default_rng(1)
    like = jax.eval_shape(injection.init, jax.random.key(0), params)
    return jax.tree.map(lambda f: jnp.asarray(rng.normal(size=f.shape), dtype or f.dtype), like)


@pytest.fixture
def saved(tmp_path):
    """A directory with two methods and a trained norm, and what went into it."""
    params = base_params()
    injection = hx.inject({"q": hx.at(hx.abba(4), view="bio", layers=[2, 0]), "head": hx.add(hx.hira(2), hx.lora(1))})
    adapters = factors(injection, params)
    base, _ = hx.split(jax.tree.map(lambda leaf: leaf + 1, params), ["scale"])
    hx.save_adapters(
        tmp_path / "out", injection, adapters, params, base=base, model_config={"theta": 1e4, "sizes": (1,)}
    )
    return tmp_path / "out", injection, adapters, params, base


def edit(directory, change):
    """Changes the configuration in place."""
    path = directory / native.CONFIG
    config = json.loads(path.read_text())
    path.write_text(json.dumps(change(config) or config))


def test_everything_comes_back_to_the_bit(saved):
    directory, injection, adapters, params, base = saved
    loaded = hx.load_adapters(directory, params, model_config={"theta": 1e4, "sizes": [1]})
    assert loaded.injection.to_config() == injection.to_config()
    chex.assert_trees_all_equal(loaded.adapters, adapters)
    chex.assert_trees_all_equal_dtypes(loaded.adapters, adapters)
    chex.assert_trees_all_equal(loaded.base, base)
    joined = hx.join(loaded.base, params)["params"]
    assert (joined["layers"]["norm"]["scale"] == 2).all()
    assert joined["head"]["kernel"] is params["params"]["head"]["kernel"]
    assert sorted(file.name for file in directory.parent.iterdir()) == ["out"], "nothing temporary stays"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_method(case, tmp_path):
    params = {"proj": {"kernel": jnp.linspace(-1, 1, 128).reshape(16, 8)}}
    injection = hx.inject({"proj": case.adapter})
    adapters = factors(injection, params)
    hx.save_adapters(tmp_path, injection, adapters, params)
    loaded = hx.load_adapters(tmp_path, params)
    assert loaded.injection.rules[0][1].adapter.config == case.adapter.config
    chex.assert_trees_all_equal(loaded.adapters, adapters)
    assert jax.tree.structure(loaded.adapters) == jax.tree.structure(adapters)
    assert jax.tree.leaves(loaded.base) == []


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64], ids=lambda d: d.__name__)
def test_factors_keep_their_dtype_and_values_that_are_not_finite(dtype, tmp_path, x64):
    params, injection = base_params(), hx.inject({"head": hx.hira(2)})
    adapters = factors(injection, params, dtype)
    adapters["head/kernel"]["b"] = adapters["head/kernel"]["b"].at[0, 0].set(jnp.nan)
    hx.save_adapters(tmp_path, injection, adapters, params)
    loaded = hx.load_adapters(tmp_path, params).adapters
    assert loaded["head/kernel"]["a"].dtype == dtype
    chex.assert_trees_all_equal(loaded, adapters)
    if dtype == jnp.float64:
        with jax.enable_x64(False), pytest.raises(hx.CheckpointError, match="is float64; load it under"):
            hx.load_adapters(tmp_path, params)


def test_trained_base_leaves_alone(tmp_path):
    params = base_params()
    base, _ = hx.split(params, ["norm"])
    hx.save_adapters(tmp_path, None, {}, params, base=base)
    loaded = hx.load_adapters(tmp_path, params)
    assert loaded.injection.rules == () and loaded.adapters == {}
    chex.assert_trees_all_equal(hx.join(loaded.base, params), params)
    chex.assert_trees_all_equal(loaded.injection.merge(params, loaded.adapters), params)


def test_trees_of_other_kinds_keep_their_type(tmp_path):
    model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.Dropout(0.1, rngs=nnx.Rngs(1)))
    params = jax.tree.map(lambda leaf: leaf, nnx.state(model))  # not the model's own, which its calls change
    injection = hx.inject({"**/kernel": hx.boha(4, 2)})
    adapters = factors(injection, params)
    base, _ = hx.split(params, ["**/bias"])
    hx.save_adapters(tmp_path, injection, adapters, params, base=base)
    model.layers[1](jnp.ones(3))  # a dropout's counter is no weight of the base
    assert not jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), nnx.state(model), params))
    loaded = hx.load_adapters(tmp_path, nnx.state(model))
    chex.assert_trees_all_equal(loaded.adapters, adapters)
    assert isinstance(loaded.base, nnx.State)


def test_factors_on_a_mesh_are_saved_whole(tmp_path):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    params, injection = base_params(), hx.inject({"head": hx.hira(2)})
    adapters = factors(injection, params)
    spread = jax.device_put(adapters, NamedSharding(mesh, PartitionSpec()))
    spread["head/kernel"]["a"] = jax.device_put(spread["head/kernel"]["a"], NamedSharding(mesh, PartitionSpec("model")))
    hx.save_adapters(tmp_path, injection, spread, params)
    chex.assert_trees_all_equal(hx.load_adapters(tmp_path, params).adapters, adapters)


def test_peft_does_not_take_the_directory_for_its_own(saved):
    from peft import PeftConfig

    with pytest.raises(ValueError, match=re.escape("adapter_config.json")):
        PeftConfig.from_pretrained(str(saved[0]))


# The base's identity


@pytest.mark.parametrize("spec", [("data", None), (None, "data"), ("data", "model"), (("data", "model"), None), ()])
def test_the_fingerprint_knows_no_sharding(spec):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    leaf = jnp.asarray(np.random.default_rng(0).normal(size=(16, 24)), jnp.float32)
    spread = jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))
    expected = fingerprint.fingerprint({"w": leaf})
    assert fingerprint.fingerprint({"w": spread}) == expected
    # the way of arrays whose shards other processes hold
    whole = fingerprint._sum(spread, np.zeros(2, np.int32), np.uint32(0), (16, 24), (24, 1))
    assert f"{int(whole):08x}" == expected["w"]


def by_hand(values):
    """The fingerprint in numpy, of float32 values, one entry after the other."""
    total = 0
    for position, value in enumerate(np.asarray(values, jnp.bfloat16).ravel()):
        bits = int(value.view(np.uint16))
        bits = 0 if bits & 0x7F80 == 0 else bits
        x = (position * 0x9E3779B1 % 2**32) ^ (bits * 0x85EBCA77 % 2**32)
        x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
        x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
        total += x ^ (x >> 16)
    return f"{total % 2**32:08x}"


@pytest.mark.parametrize("block", [2**21, 7, 1])
def test_the_fingerprint_is_the_sum_of_mixed_entries_whatever_the_blocks(block, monkeypatch):
    monkeypatch.setattr(fingerprint, "_BLOCK", block)
    values = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    values.flat[:6] = [0.0, -0.0, 1e-40, -1e-39, np.inf, 1.00390625]  # subnormal numbers, a tie
    one = fingerprint.fingerprint({"w": jnp.asarray(values)})["w"]
    assert one == by_hand(values) == fingerprint.fingerprint({"w": values})["w"]


@settings(max_examples=30)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=12, max_size=12))
def test_a_bfloat16_file_loaded_as_float32_agrees_with_a_float32_file_loaded_as_bfloat16(values):
    wide = np.array(values, np.float32)
    with np.errstate(over="ignore"):
        narrow = wide.astype(jnp.bfloat16)
    found = {fingerprint.fingerprint({"w": leaf})["w"] for leaf in (wide, narrow, narrow.astype(np.float32))}
    assert len(found) == 1


def test_exchanged_and_negated_entries_change_the_fingerprint():
    leaf = np.arange(1, 13, dtype=np.float32).reshape(3, 4)
    variants = [leaf, leaf[::-1], leaf[:, ::-1], leaf.reshape(2, 6)[::-1], -leaf, leaf * (1 + 2**-7)]
    assert len({fingerprint.fingerprint({"w": variant})["w"] for variant in variants}) == len(variants)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64], ids=["bfloat16", "float64"])
def test_a_base_in_another_dtype_is_the_same_base(saved, dtype, x64):
    directory, _, adapters, params, _ = saved
    other = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    chex.assert_trees_all_equal(hx.load_adapters(directory, other).adapters, adapters)


def changed(params, path, function):
    return hx.paths.map_leaves(lambda p, leaf: function(leaf) if p == path else leaf, params)


OTHER_BASES = {
    "weight": (
        lambda p: changed(p, "head/kernel", lambda leaf: leaf.at[3, 2].multiply(1.01)),
        "1 of 3 weights differ from theirs, 'head/kernel' first; load the base that they were trained on, or pass",
    ),
    "shape": (
        lambda p: changed(p, "head/bias", lambda leaf: leaf[:4]),
        "'head/bias' has shape (4,), theirs had [8]",
    ),
    "lacking": (
        lambda p: {"params": {"layers": p["params"]["layers"]}},
        "the base lacks 'head/bias' (2 paths differ; were its layers stacked otherwise?)",
    ),
    "more": (
        lambda p: {"params": {**p["params"], "extra": {"kernel": jnp.ones((2, 2))}}},
        "the base has 'extra/kernel', which theirs had not",
    ),
}


@pytest.mark.parametrize(("change", "message"), OTHER_BASES.values(), ids=OTHER_BASES.keys())
def test_another_base_is_refused_and_what_differs_is_named(saved, change, message):
    with pytest.raises(hx.BaseMismatchError, match=re.escape(message)) as error:
        hx.load_adapters(saved[0], change(saved[3]))
    assert "\n" not in str(error.value)


def test_another_base_is_taken_where_that_is_asked_for(saved):
    directory, _, adapters, params, _ = saved
    other = changed(params, "head/kernel", lambda leaf: leaf + 1)
    chex.assert_trees_all_equal(hx.load_adapters(directory, other, check_base=False).adapters, adapters)
    abstract = jax.eval_shape(lambda: params)
    chex.assert_trees_all_equal(hx.load_adapters(directory, abstract, check_base=False).adapters, adapters)
    with pytest.raises(hx.ConfigError, match="only an array has a fingerprint, found ShapeDtypeStruct"):
        hx.load_adapters(directory, abstract)
    with pytest.raises(hx.NoMatchError, match="'head' matches no parameter"):
        hx.load_adapters(directory, {"params": {"layers": params["params"]["layers"]}}, check_base=False)


def test_a_trained_leaf_may_have_any_value_in_the_base(saved):
    directory, _, _, params, base = saved
    other = changed(params, "layers/norm/scale", lambda leaf: leaf * 7)
    chex.assert_trees_all_equal(hx.load_adapters(directory, other).base, base)


def test_a_model_that_computes_otherwise_is_another_base(saved):
    message = "its 'theta' is 500000.0, theirs was 10000.0"
    with pytest.raises(hx.BaseMismatchError, match=re.escape(message)):
        hx.load_adapters(saved[0], saved[3], model_config={"theta": 5e5, "sizes": (1,)})


# What is refused


def test_a_target_that_is_not_empty_is_refused_and_left_alone(tmp_path):
    params, injection = base_params(), hx.inject({"head": hx.hira(2)})
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(hx.CheckpointError, match="exists and is not empty"):
        hx.save_adapters(tmp_path, injection, factors(injection, params), params)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    params, injection = base_params(), hx.inject({"head": hx.hira(2)})

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hadamax.native.write_tensors", full)
    with pytest.raises(hx.CheckpointError, match=r"cannot write .*out: No space left on device"):
        hx.save_adapters(tmp_path / "out", injection, factors(injection, params), params)
    assert list(tmp_path.iterdir()) == []


def test_what_could_not_be_read_back_is_not_written(tmp_path):
    params = base_params()
    own = hx.lora(2)._replace(config={"method": "mine"})
    injection = hx.inject({"head": own})
    with pytest.raises(hx.ConfigError, match="unknown method 'mine'"):
        hx.save_adapters(tmp_path / "out", injection, factors(injection, params), params)
    with pytest.raises(hx.ConfigError, match="nothing to save"):
        hx.save_adapters(tmp_path / "out", None, {}, params)
    injection = hx.inject({"head": hx.lora(2)})
    with pytest.raises(hx.ConfigError, match="has no factors among the adapters"):
        hx.save_adapters(tmp_path / "out", injection, {}, params)
    with pytest.raises(hx.ConfigError, match="base has 'nowhere', which the parameters lack"):
        hx.save_adapters(tmp_path / "out", None, {}, params, base={"nowhere": jnp.ones(2)})
    with pytest.raises(hx.ConfigError, match="only float64, float32, float16 and bfloat16 are stored, found int32"):
        hx.save_adapters(tmp_path / "out", injection, factors(injection, params, jnp.int32), params)
    with pytest.raises(hx.ConfigError, match="the configuration is no JSON"):
        hx.save_adapters(tmp_path / "out", injection, factors(injection, params), params, model_config={"a": {1}})
    assert list(tmp_path.iterdir()) == []


def nested(depth):
    config = {"method": "lora", "rank": 2}
    for _ in range(depth):
        config = {"method": "scaled", "adapter": config, "scale": 1.0}
    return config


def put(value, *keys):
    """A change that sets `config[keys...] = value`."""

    def change(config):
        node = config
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = value

    return change


BAD_CONFIGS = {
    "newer": (put(2, "version"), "has format version 2, newer than 1: update hadamax"),
    "version": (put(True, "version"), "has format version True, expected 1"),
    "format": (put("x", "format"), "is no hadamax adapter: its format is 'x'"),
    "unknown": (put(1, "injectoin"), "unknown entry 'injectoin'; nearest: 'injection'"),
    "unknown-below": (put(1, "base", "rope"), "base has an unknown entry 'rope'"),
    "missing": (lambda c: {k: v for k, v in c.items() if k != "base"}, "the file has no 'base'"),
    "base": (put([], "base"), "base must be an object"),
    "weights": (put([], "base", "weights"), "base.weights must be an object"),
    "entry": (put(3, "base", "weights", "head/bias"), "'head/bias' must be an object, found 3"),
    "rules": (put({}, "injection", "rules"), "the injection's configuration|needs rules|not an injection"),
    "injection": (put("x", "injection"), "not an injection's configuration"),
    "injection-version": (put(9, "injection", "version"), "configuration of version 9; known: 1"),
    "rank": (put(10**9, "injection", "rules", 0, "adapter", "r1"), "exceeds"),
    "alpha": (put(10**400, "injection", "rules", 0, "adapter", "alpha"), "alpha must be at most 1e\\+18 in size"),
    "method": (put("abab", "injection", "rules", 0, "adapter", "method"), "unknown method 'abab'; nearest: 'abba'"),
    "flags": (put({"regex": "q", "flags": 4 | 32, "adapter": nested(0)}, "injection", "rules", 0), "flags|LOCALE"),
    "nested": (put(nested(900), "injection", "rules", 0, "adapter"), "lacks tensor|recursion"),
}


@pytest.mark.parametrize(("change", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS.keys())
def test_a_bad_configuration_is_one_clear_line(saved, change, message):
    edit(saved[0], change)
    with pytest.raises(hx.HadamaxError, match=message) as error:
        hx.load_adapters(saved[0], saved[3])
    assert "\n" not in str(error.value)


def test_a_directory_that_is_none_of_ours(tmp_path, saved):
    with pytest.raises(hx.CheckpointError, match="no directory at"):
        hx.load_adapters(tmp_path / "nowhere", saved[3])
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text("{}")
    with pytest.raises(
        hx.CheckpointError,
        match=r"this is a PEFT adapter: load it with hx\.hf\.load_adapter",
    ):
        hx.load_adapters(tmp_path / "peft", saved[3])
    (saved[0] / native.WEIGHTS).unlink()
    with pytest.raises(hx.CheckpointError, match=r"hadamax_adapter.safetensors"):
        hx.load_adapters(saved[0], saved[3])


BAD_TENSORS = {
    "lacking": (
        lambda t: t.pop("adapters:head/kernel:0/a"),
        "lacks tensor 'adapters:head/kernel:0/a' of shape (16, 2)",
    ),
    "more": (lambda t: t.update(x=np.ones(2, np.float32)), "has tensor 'x' of shape (2,), which no rule of its own"),
    "shape": (
        lambda t: t.update({"adapters:head/kernel:1/b": np.ones((8, 1), np.float32)}),
        "'adapters:head/kernel:1/b' in",
    ),
    "dtype": (lambda t: t.update({"base:layers/norm/scale": np.ones(8, np.int32)}), "dtype I32 is none of F64, F32"),
    "base": (lambda t: t.update({"base:up/scale": np.ones(8, np.float32)}), "trained base leaf 'up/scale'"),
}


@pytest.mark.parametrize(("change", "message"), BAD_TENSORS.values(), ids=BAD_TENSORS.keys())
def test_a_bad_tensor_is_named(saved, change, message):
    file = saved[0] / native.WEIGHTS
    tensors = dict(load_file(file))
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(hx.CheckpointError, match=re.escape(message)):
        hx.load_adapters(saved[0], saved[3], check_base=False)


@settings(max_examples=150)
@given(data=st.data())
def test_a_mutated_file_is_a_clear_error_or_loads(data, tmp_path_factory):
    params = {"w": {"kernel": jnp.ones((4, 6))}}
    injection = hx.inject({"w": hx.scaled(hx.hira(2), 0.5)})
    directory = tmp_path_factory.mktemp("fuzz") / "out"
    hx.save_adapters(directory, injection, factors(injection, params), params)
    file = directory / data.draw(st.sampled_from([native.WEIGHTS, native.CONFIG]))
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, min(len(content) - 1, 1200)))
        kind = data.draw(st.sampled_from(["flip", "cut", "insert", "digit"]))
        if kind == "flip":
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del content[at : at + data.draw(st.integers(1, 40))]
        elif kind == "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=8))
        else:
            digits = [i for i, byte in enumerate(content[:1200]) if chr(byte).isdigit()]
            if digits:
                content[data.draw(st.sampled_from(digits))] = ord(data.draw(st.sampled_from("0123456789-e.")))
        if not content:
            break
    os.chmod(file, 0o600)
    file.write_bytes(bytes(content))
    try:
        loaded = hx.load_adapters(directory, params)
    except hx.HadamaxError as error:
        assert "\n" not in str(error)
    else:
        assert loaded.adapters.keys() == {"w/kernel"}


def test_the_file_is_what_the_module_says(saved):
    with safe_open(saved[0] / native.WEIGHTS, framework="numpy") as tensors:
        assert set(tensors.keys()) == {
            *(f"adapters:layers/q/kernel:{name}" for name in ("a1", "b1", "a2", "b2")),
            *(f"adapters:head/kernel:{at}/{name}" for at in (0, 1) for name in ("a", "b")),
            "base:layers/norm/scale",
        }
        assert tensors.get_slice("adapters:layers/q/kernel:a1").get_shape() == [2, 16, 2]
    config = json.loads((saved[0] / native.CONFIG).read_text())
    assert config["base"]["weights"]["layers/q/kernel"]["shape"] == [3, 16, 8]
    assert "layers/norm/scale" not in config["base"]["weights"]
    assert config["hadamax"] == hx.__version__


EVIL = [{"regex": "(.*)*x", "flags": 32}, {"pattern": "**?" * 9 + "x"}, {"pattern": "{*,*}" * 30 + "x"}]


@pytest.mark.parametrize("pattern", EVIL, ids=["regex", "wildcards", "braces"])
@pytest.mark.parametrize("place", ["rules", "exclude"])
def test_a_pattern_that_could_take_for_ever_is_refused_unmatched(saved, pattern, place):
    directory, _, _, params, _ = saved

    def change(config):
        injection = config["injection"]
        if place == "exclude":
            injection["exclude"] = [pattern]
        else:
            injection["rules"][0] = {"adapter": injection["rules"][0]["adapter"], **pattern}

    edit(directory, change)
    with pytest.raises(hx.CheckpointError, match="could take for ever to match"):
        hx.load_adapters(directory, params)


def test_rules_with_such_a_pattern_are_saved_by_the_kernels_paths(tmp_path):
    params = base_params()
    injection = hx.inject({re.compile("(.*)+kernel"): hx.at(hx.lora(2), layers=[1])}, view="bio", exclude="head")
    adapters = factors(injection, params)
    hx.save_adapters(tmp_path / "out", injection, adapters, params)
    loaded = hx.load_adapters(tmp_path / "out", params)
    chex.assert_trees_all_equal(loaded.adapters, adapters)
    assert [pattern for pattern, _ in loaded.injection.rules] == ["layers/q/kernel"]
    chex.assert_trees_all_equal(loaded.injection.merge(params, adapters), injection.merge(params, adapters))
