"""save_pretrained: transformers loads the directory with the same logits; nothing half-written is left behind."""

import json
import os
import signal
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import transformers
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import safe_open
from safetensors.numpy import load_file

import hadamax as hx
import hadamax.hf.export
from hadamax import tensor_files
from hadamax.errors import CheckpointError, ConfigError, MergeError
from hadamax.hf import load_pretrained, save_pretrained
from hadamax.hf.families import expected_leaves
from hadamax.hf.parameters import parameters
from hadamax.models import Decoder, DecoderConfig, Llama3Rope

from .conftest import SIZES, assert_same, logits_of, torch_logits

ROPE = Llama3Rope(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=24)
BASE = DecoderConfig(**SIZES, head_dim=6)
CONFIGS = {
    "untied": BASE,
    "llama3-rope-tied": DecoderConfig(**SIZES, head_dim=6, rope_scaling=ROPE, tie_word_embeddings=True),
    "biases-own-head-dim": DecoderConfig(**SIZES, head_dim=10, attention_bias=True, mlp_bias=True),
}


def random_params(config, scan_layers=True, dtype=np.float32):
    rng = np.random.default_rng(0)
    leaves = expected_leaves(Decoder(config, scan_layers=scan_layers))
    values = {path: (0.3 * rng.standard_normal(leaf.shape)).astype(dtype) for path, leaf in leaves.items()}
    return {"params": unflatten_dict(jax.tree.map(jnp.asarray, values), sep="/")}


def with_leaf(params, path, value):
    """A copy with the leaf at `path` set, or removed where `value` is None."""
    flat = {"/".join(str(k.key) for k in keys): leaf for keys, leaf in jax.tree.leaves_with_path(params["params"])}
    flat[path] = value
    return {"params": unflatten_dict({k: v for k, v in flat.items() if v is not None}, sep="/")}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("scan_layers", [True, False])
def test_transformers_loads_the_directory_with_the_same_logits(tmp_path, batch, config, scan_layers):
    ids, mask = batch
    model, params = Decoder(config, scan_layers=scan_layers), random_params(config, scan_layers)
    save_pretrained(tmp_path / "out", model, params, config, max_shard_size="5GB" if scan_layers else "9KB")
    reference, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    logits = np.asarray(logits_of(model, params, ids, mask))
    assert not any(info.values())  # no key missing, unexpected or of another shape
    assert np.abs(logits).max() > 1.0
    assert np.abs(logits - torch_logits(reference, ids, mask))[mask == 1].max() < 1e-4


@hypothesis.given(
    heads=st.sampled_from([(1, 1), (4, 2), (3, 3)]),
    half=st.integers(1, 4),
    layers=st.sampled_from([1, 2, 11]),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    dtype=st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]),
    scan_layers=st.booleans(),
    shard=st.sampled_from(["5GB", 1, "2.5KiB"]),
)
@hypothesis.settings(max_examples=10)
def test_what_is_saved_is_what_is_loaded(tmp_path_factory, heads, half, layers, flags, dtype, scan_layers, shard):
    tie, attention_bias, mlp_bias = flags
    config = DecoderConfig(
        7, 4, 5, layers, *heads, 2 * half,
        tie_word_embeddings=tie, attention_bias=attention_bias, mlp_bias=mlp_bias, eos_token_id=(1, 2),
    )  # fmt: skip
    model, params = Decoder(config, scan_layers=scan_layers), random_params(config, scan_layers, dtype)
    target = tmp_path_factory.mktemp("round") / "out"
    written = save_pretrained(target, model, params, config, max_shard_size=shard)
    loaded, found, read = load_pretrained(target, scan_layers=scan_layers)
    assert (read, loaded.dtype) == (written, dtype)
    assert_same(found, params)


def test_one_file_says_that_it_is_for_torch(tmp_path):
    save_pretrained(tmp_path / "out", Decoder(BASE), random_params(BASE), BASE)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["config.json", "model.safetensors", "out"]


def test_shards_keep_below_the_limit_and_the_index_names_every_tensor(tmp_path):
    params = random_params(BASE)
    save_pretrained(tmp_path / "out", Decoder(BASE), params, BASE, max_shard_size=10_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = {name: load_file(tmp_path / "out" / name) for name in set(index["weight_map"].values())}
    assert {tensor: name for name, held in shards.items() for tensor in held} == index["weight_map"]
    assert all(sum(t.nbytes for t in held.values()) <= 10_000 for held in shards.values())
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("path", "width", "flag"),
    [("layers/self_attn/o_proj/bias", 24, "attention_bias"), ("layers/mlp/gate_proj/bias", 40, "mlp_bias")],
)
def test_a_bias_that_merging_added_is_exported_with_zeros_beside_it(tmp_path, batch, path, width, flag):
    ids, mask = batch
    bias = jnp.asarray(np.random.default_rng(1).standard_normal((2, width)), jnp.float32)
    model, plain = Decoder(BASE), random_params(BASE)
    params = with_leaf(plain, path, bias)
    written = save_pretrained(tmp_path / "out", model, params, BASE)
    logits = np.asarray(logits_of(model, params, ids, mask))
    reference = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert getattr(written, flag) and written.attention_bias != written.mlp_bias
    assert np.abs(logits - logits_of(model, plain, ids, mask)).max() > 0.1  # the model uses the bias
    assert np.abs(logits - torch_logits(reference, ids, mask))[mask == 1].max() < 1e-4


def test_dtype_rounds_once_to_nearest_and_the_config_says_so(tmp_path):
    params = random_params(BASE)
    written = save_pretrained(tmp_path / "out", Decoder(BASE), params, BASE, dtype="bfloat16")
    found = load_file(tmp_path / "out" / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    kernel = np.asarray(params["params"]["layers"]["mlp"]["down_proj"]["kernel"])[1]
    assert np.array_equal(found, kernel.T.astype(ml_dtypes.bfloat16))
    assert written.dtype == json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_tokenizer_files_come_along_and_nothing_else(tmp_path):
    source = tmp_path / "base"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "notes.txt", "config.json"):
        (source / name).write_text(f'"{name}"')
    save_pretrained(tmp_path / "out", Decoder(BASE), random_params(BASE), BASE, tokenizer_from=source)
    copied = {p.name for p in (tmp_path / "out").iterdir()} - {"config.json", "model.safetensors"}
    assert copied == {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '"tokenizer.json"'


def test_a_target_that_holds_something_is_refused_and_an_empty_one_taken(tmp_path):
    params = random_params(BASE)
    (tmp_path / "empty").mkdir()
    save_pretrained(tmp_path / "empty", Decoder(BASE), params, BASE)
    before = (tmp_path / "empty" / "config.json").read_text()
    for target in (tmp_path / "empty", tmp_path / "empty" / "config.json"):
        with pytest.raises(CheckpointError, match=r"is not empty; choose another directory or remove it first"):
            save_pretrained(target, Decoder(BASE), params, BASE)
    assert (tmp_path / "empty" / "config.json").read_text() == before


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (OSError(28, "No space left on device"), CheckpointError, "cannot write .*No space left on device"),
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
    ],
)
def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch, raised, expected, message):
    def fail(path, pieces):
        path.write_bytes(b"half")
        raise raised

    monkeypatch.setattr(hadamax.hf.export, "write_tensors", fail)
    with pytest.raises(expected, match=message):
        save_pretrained(tmp_path / "deep" / "out", Decoder(BASE), random_params(BASE), BASE)
    assert list((tmp_path / "deep").iterdir()) == []


UNFIT = {
    "lacks": ("norm/scale", None, CheckpointError, r"the parameters lack 'norm/scale' of shape \(24,\)"),
    "shape": ("norm/scale", (23,), CheckpointError, r"'norm/scale': expected shape \(24,\), found \(23,\)"),
    "extra": ("norm/shift", (24,), CheckpointError, r"'norm/shift' of shape \(24,\) has no place in the config"),
    "lm-head-bias": ("lm_head/bias", (61,), MergeError, r"llama has no place for 'lm_head/bias'"),
}


@pytest.mark.parametrize(("path", "shape", "kind", "message"), UNFIT.values(), ids=UNFIT)
def test_parameters_that_do_not_fit_the_config_are_refused(tmp_path, path, shape, kind, message):
    params = with_leaf(random_params(BASE), path, None if shape is None else jnp.ones(shape))
    with pytest.raises(kind, match=message):
        save_pretrained(tmp_path / "out", Decoder(BASE), params, BASE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["5 parsecs", 0, "-1GB", ""])
def test_a_shard_size_that_is_none_is_refused(tmp_path, size):
    with pytest.raises(ConfigError, match="max_shard_size"):
        save_pretrained(tmp_path / "out", Decoder(BASE), random_params(BASE), BASE, max_shard_size=size)


def test_a_tokenizer_directory_that_is_absent_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no tokenizer directory at"):
        save_pretrained(tmp_path / "out", Decoder(BASE), random_params(BASE), BASE, tokenizer_from=tmp_path / "none")


def test_an_error_at_any_write_leaves_nothing_behind(tmp_path, monkeypatch):
    params, write, count = random_params(BASE), tensor_files._write, 0

    def write_some(file, data):
        nonlocal count
        count -= 1
        if count < 0:
            write(file, memoryview(data)[: len(data) // 2])
            raise OSError(28, "No space left on device")
        write(file, data)

    monkeypatch.setattr(tensor_files, "_write", write_some)
    for point in range(1000):
        count = point
        try:
            save_pretrained(tmp_path / "out", Decoder(BASE), params, BASE, max_shard_size="9KB")
        except CheckpointError as error:
            assert str(error) == f"cannot write {tmp_path / 'out'}: No space left on device"
            assert list(tmp_path.iterdir()) == []
        else:
            break
    assert point > 21  # one write for each tensor, and for each header


KILLED = """
import os, signal, sys
import jax, jax.numpy as jnp
from hadamax import tensor_files
from hadamax.hf import export
from hadamax.models import Decoder, DecoderConfig

config = DecoderConfig(7, 4, 5, 1, 1, 1, 4)
params = Decoder(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
module, name, point = {"write": (tensor_files, "_write", 5), "rename": (os, "replace", 0)}[sys.argv[2]]
function, calls = getattr(module, name), 0

def kill(*args):
    global calls
    if calls == point:
        os.kill(os.getpid(), signal.SIGKILL)
    calls += 1
    return function(*args)

setattr(module, name, kill)
export.save_pretrained(sys.argv[1], Decoder(config), params, config)
"""


@pytest.mark.parametrize("at", ["write", "rename"])
def test_a_process_that_is_killed_leaves_no_directory_that_loads(tmp_path, at):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out"), at], cwd=os.getcwd(), timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert any(tmp_path.iterdir())  # it had begun
    params = random_params(BASE)
    save_pretrained(tmp_path / "out", Decoder(BASE), params, BASE)  # and what is left is in nobody's way
    assert_same(load_pretrained(tmp_path / "out")[1], params)


RULES = {
    "hira": {"q_proj": hx.hira(2), "**/mlp/*": hx.lora(2)},
    "shift": {"o_proj": hx.hadamard_adapter(), "down_proj": hx.hadamard_adapter(position="input")},
    "layers": {"q_proj": hx.at(hx.hadamard_adapter(), layers=[1]), "lm_head": hx.lora(2), "embed_tokens": hx.abba(2)},
}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize(("biased", "scan_layers"), [(True, False), (False, True)])
def test_lazy_weights_are_merged_in_float32_while_they_are_written(tmp_path, rules, biased, scan_layers):
    config = DecoderConfig(**SIZES, head_dim=6, attention_bias=biased, mlp_bias=biased)
    half, model = random_params(config, scan_layers, jnp.bfloat16), Decoder(config, scan_layers=scan_layers)
    injection = hx.inject(rules, view=model.view)
    adapters = injection.init(jax.random.key(0), half)
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(lambda f: f + jnp.asarray(0.3 * rng.standard_normal(f.shape), f.dtype), adapters)
    written = save_pretrained(tmp_path / "lazy", model, injection.bind(half, adapters), config)
    exact = injection.merge(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half), adapters)
    merged = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), exact)
    assert save_pretrained(tmp_path / "merged", model, merged, config) == written
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("lazy", "merged"))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype == ml_dtypes.bfloat16
        # the same but where float32 sums of another order fall on the other side of a rounding
        step = np.spacing(np.abs(value.astype(np.float32)).astype(ml_dtypes.bfloat16)).astype(np.float32)
        difference = np.abs(found[name].astype(np.float32) - value.astype(np.float32))
        assert np.all(difference <= step) and np.mean(difference > 0) < 0.01
    base = flatten_dict(half["params"], sep="/")
    assert any(
        not np.array_equal(leaf, base.get(path)) for path, leaf in flatten_dict(merged["params"], sep="/").items()
    )


@pytest.mark.parametrize(
    ("rules", "spoil", "message"),
    [
        ({"q_proj": hx.lora(2)}, True, r"^layers/self_attn/q_proj/kernel: the factors hold NaN or infinity"),
        ({"embed_tokens": hx.hadamard_adapter()}, False, r"^embed_tokens/embedding: merging needs a bias"),
        ({"lm_head": hx.hadamard_adapter()}, False, r"llama has no place for 'lm_head/bias'"),
        ({"q_proj": hx.hadamard_adapter(order=2)}, False, r"^layers/self_attn/q_proj/kernel: .*order 2 is not affine"),
    ],
)  # fmt: skip
def test_adapters_that_do_not_merge_are_refused_before_anything_is_written(tmp_path, rules, spoil, message):
    model, params = Decoder(BASE), random_params(BASE)
    injection = hx.inject(rules, view=model.view)
    adapters = injection.init(jax.random.key(0), params)
    if spoil:
        adapters = jax.tree.map(lambda f: f.at[(0,) * f.ndim].set(jnp.nan), adapters)
    with pytest.raises(MergeError, match=message) as error:
        save_pretrained(tmp_path / "out", model, injection.bind(params, adapters), BASE)
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


def test_numpy_parameters_and_dtypes_that_files_have_no_name_for(tmp_path):
    params = random_params(BASE)
    save_pretrained(tmp_path / "a", Decoder(BASE), params, BASE)
    save_pretrained(tmp_path / "b", Decoder(BASE), jax.tree.map(np.asarray, params), BASE)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="dtype float8_e4m3fn cannot be written"):
        save_pretrained(tmp_path / "c", Decoder(BASE), params, BASE, dtype="float8_e4m3fn")


def test_numbers_that_float16_cannot_hold_are_refused(tmp_path):
    params = jax.tree.map(lambda leaf: leaf * 1e6, random_params(BASE))
    with pytest.raises(ConfigError, match="infinite in float16; write bfloat16 or float32"):
        save_pretrained(tmp_path / "out", Decoder(BASE), params, BASE, dtype="float16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("base", "written"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_a_bias_that_is_merged_has_the_dtype_of_the_leaf_that_it_replaces(base, written):
    params = {"dense": {"kernel": jnp.ones((3, 2), base), "bias": jnp.ones(2, base)}}
    injection = hx.inject({"dense": hx.hadamard_adapter()})
    bound = injection.bind(params, injection.init(jax.random.key(0), params))["dense"]
    bound = {"kernel": bound["kernel"].replace(dtype=jnp.dtype(written)), "bias": bound["bias"].astype(written)}
    assert {p.dtype.name for p in parameters({"dense": bound}).values()} == {written}


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_tensors_that_are_written_in_parts_are_the_same(tmp_path, monkeypatch, scan_layers, kind):
    model, params = Decoder(BASE, scan_layers=scan_layers), jax.tree.map(kind, random_params(BASE, scan_layers))
    save_pretrained(tmp_path / "whole", model, params, BASE)
    monkeypatch.setattr("hadamax.hf.parameters.PART", 200)
    save_pretrained(tmp_path / "parts", model, params, BASE)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]
