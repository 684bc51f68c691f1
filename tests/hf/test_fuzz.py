"""Mutated checkpoints: every outcome is one clear line or a correct load; safetensors' own reader is the oracle."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load

from hadamax.errors import HadamaxError
from hadamax.files import read_json
from hadamax.hf import families, load_pretrained, save_pretrained
from hadamax.hf.load import _check_sizes, flat, match
from hadamax.models import DecoderConfig, EncoderConfig
from hadamax.tensor_files import DTYPES, read_header, stored_tensors

CONFIGS = {
    "llama": ("causal_lm", DecoderConfig(11, 8, 12, 2, 2, 1, 4, attention_bias=True, eos_token_id=(1, 2))),
    "bert": ("sequence_classification", EncoderConfig(11, 8, 12, 2, 2, 16)),
}
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
VALUES = [
    None, True, False, 0, -1, 1, 2, 3, 2**31, 2**63, 10**9, 10**12, 10**30, -(10**30), 0.5, -0.5, 1e308, 5e-324,
    "", "1", "F16", "U8", "\ud800\n", "x" * 1000, [], [1], [0, 1], [-1, 2], [2**62, 2**62], [[]],
    ["a"], {}, {"a": 1}, {"0": "a"},
    {"rope_type": "llama3"}, {"rope_type": "default", "rope_theta": -1},
]  # fmt: skip
RAW = [
    "NaN",
    "Infinity",
    "-1e999",
    "1" * 5000,
    "[" * 100_000,
    '"\\ud800"',
    '{"a":1,"a":2}',
    "nul",
    "\x00",
    "0x10",
    "01",
]
evil = st.sampled_from(VALUES).map(json.dumps) | st.sampled_from(RAW) | st.integers(0, 3000).map(str)


def write(directory, family):
    task, config = CONFIGS[family]
    model = families.build(config, task=task, dtype=jnp.bfloat16 if family == "bert" else jnp.float32)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    save_pretrained(
        directory, model, params, config, max_shard_size=sum(a.nbytes for a in jax.tree.leaves(params)) * 2 // 3
    )


@pytest.fixture(scope="module", params=CONFIGS)
def whole(request, tmp_path_factory):
    """A sound checkpoint of two shards: its files' bytes and its parameters."""
    directory = tmp_path_factory.mktemp("whole") / "model"
    write(directory, request.param)
    contents = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert contents.keys() == {*SHARDS, "config.json", "model.safetensors.index.json"}
    return contents, load_pretrained(directory)[1]


@pytest.fixture
def directory(tmp_path):
    """A function that writes the files and returns the directory, which is the same each time."""

    def place(contents):
        for name, data in contents.items():
            (tmp_path / name).write_bytes(data)
        return tmp_path

    return place


expected_leaves = functools.cache(families.expected_leaves)


def outcome(function, *args):
    """The result, or None where it refused as it should."""
    try:
        return function(*args)
    except HadamaxError as error:
        message = str(error)
        assert message.isprintable() and len(message) < 2000, message  # printable: one line
        return None


def planned(directory):
    """Everything that `load_pretrained` does before it reads a tensor."""
    config, task = families.read_config(read_json(directory / "config.json"))
    stored = stored_tensors(directory)
    _check_sizes(config, stored)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "expected_leaves", expected_leaves)
        return match(families.build(config, task=task), stored, directory)


@st.composite
def damaged_file(draw, data):
    """A safetensors file with bytes flipped, cut, moved or inserted, or with an edited header."""
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    kind = draw(st.sampled_from(["flip", "flip-header", "length", "cut", "insert", "raw", "edit", "edit", "edit"]))
    if kind in ("flip", "flip-header"):
        at, bit = draw(st.integers(0, len(data) - 1 if kind == "flip" else length + 7)), draw(st.integers(0, 7))
        return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
    if kind == "length":
        near = st.integers(-9, 9).map(lambda n: (length + n) % 2**64)
        return draw(near | st.integers(0, 2**64 - 1)).to_bytes(8, "little") + data[8:]
    if kind == "cut":
        begin, end = sorted((draw(st.integers(0, len(data))), draw(st.integers(0, len(data)))))
        return data[:begin] + data[end:] if draw(st.booleans()) else data[:end]
    if kind == "insert":
        at = draw(st.integers(0, len(data)))
        return data[:at] + draw(st.binary(min_size=1, max_size=9)) + data[at:]
    text = json.loads(header)
    names = list(text)
    name = draw(st.sampled_from(names))
    if kind == "edit":
        for _ in range(draw(st.integers(1, 3))):
            change = draw(st.sampled_from(["drop", "rename", "swap", "shape", "offsets", "entry", "add"]))
            other = draw(st.sampled_from(names))
            entry = text.get(name)
            if change == "drop":
                text.pop(name, None)
            elif change == "rename" and name in text:
                text[draw(st.sampled_from([*names, "", "a.b", "\n", name + "x"]))] = text.pop(name)
            elif change == "swap" and name in text and other in text:
                text[name], text[other] = text[other], text[name]
            elif isinstance(entry, dict) and change == "shape" and "shape" in entry:
                entry["shape"] = draw(st.permutations(entry["shape"]) | st.just([1, *entry["shape"]]))
            elif isinstance(entry, dict) and change == "offsets" and "data_offsets" in entry:
                entry["data_offsets"] = [n + draw(st.integers(-8, 8)) for n in entry["data_offsets"]]
            elif change == "add":
                text["extra"] = {
                    "dtype": draw(st.sampled_from(["F32", "F8_E4M3", "X"])),
                    "shape": [0],
                    "data_offsets": [0, 0],
                }
        header = json.dumps(text).encode()
    else:
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets", None]))
        if field is None or field not in text[name]:
            text[name] = "EVIL"
        else:
            text[name][field] = "EVIL"
        header = json.dumps(text).replace('"EVIL"', draw(evil)).encode(errors="surrogatepass")
    return len(header).to_bytes(8, "little") + header + body


@pytest.mark.parametrize("shard", SHARDS)
def test_mutated_tensor_files(whole, directory, shard):
    contents, _ = whole
    accepted = 0

    @hypothesis.given(damaged_file(contents[shard]))
    @hypothesis.settings(max_examples=600)
    def one(data):
        nonlocal accepted
        place = directory({**contents, shard: data})
        found = outcome(read_header, place / shard)
        try:
            expected = load(data) if found is not None else {}
        except (safetensors.SafetensorError, KeyError) as error:  # KeyError: a dtype that numpy has not
            if "invalid" in str(error).lower() and "unknown variant" not in str(error):  # a dtype, refused when used
                raise AssertionError(f"accepted what the library refuses: {error}") from error
            expected = {}
        for name, value in expected.items():
            if found[name].dtype in DTYPES:
                assert found[name].shape == value.shape and found[name].read().tobytes() == value.tobytes()
        plan = outcome(planned, place)
        if plan is not None:
            accepted += 1
            leaves, held = plan
            assert leaves and all(
                tensor.shape == t.shape(leaves[path].shape) for path, ts in held.items() for t, tensor in ts
            )

    one()
    assert accepted > 5  # flips among the numbers


def test_mutated_files_that_load_differ_only_where_they_were_mutated(whole, directory):
    contents, params = whole
    loaded = 0

    @hypothesis.given(damaged_file(contents[SHARDS[0]]))
    @hypothesis.settings(max_examples=60)
    def one(data):
        nonlocal loaded
        found = outcome(load_pretrained, directory({**contents, SHARDS[0]: data}))
        if found is None:
            return
        loaded += 1
        assert jax.tree.map(jnp.shape, found[1]) == jax.tree.map(jnp.shape, params)
        if len(data) == len(contents[SHARDS[0]]):  # bits were flipped, at most one number changes
            same = jax.tree.map(lambda a, b: np.sum(np.asarray(a) != np.asarray(b)), found[1], params)
            assert sum(jax.tree.leaves(same)) <= 1

    one()
    assert loaded


def test_mutated_configs(whole, directory):
    contents, params = whole
    config = json.loads(contents["config.json"])
    keys = [
        *config,
        "torch_dtype",
        "rope_parameters",
        "head_dim",
        "architectures",
        "quantization_config",
        "num_labels",
        "new",
    ]
    shapes = {path: leaf.shape for path, leaf in flat(params["params"]).items()}
    seen = 0

    @hypothesis.given(st.sampled_from(keys), evil)
    @hypothesis.settings(max_examples=400)
    def one(key, value):
        nonlocal seen
        text = json.dumps({**config, key: "EVIL"}).replace('"EVIL"', value)
        plan = outcome(planned, directory({**contents, "config.json": text.encode(errors="surrogatepass")}))
        if plan is not None:
            seen += 1
            assert {path: leaf.shape for path, leaf in plan[0].items()}.items() <= shapes.items()  # or of another task

    one()
    assert seen > 5

    for key in config:  # cut, doubled, or of the wrong kind as a whole
        outcome(planned, directory({**contents, "config.json": json.dumps({**config, key: None}).encode()}))
    text = contents["config.json"]
    for at in range(0, len(text), 7):
        assert outcome(planned, directory({**contents, "config.json": text[:at]})) is None


def test_mutated_indices(whole, directory):
    contents, _ = whole
    index = json.loads(contents["model.safetensors.index.json"])
    names = list(index["weight_map"])
    files = ["../model.safetensors", "/etc/passwd", "/dev/zero", "/proc/self/mem", "config.json", "a" * 5000, "..", "."]

    @hypothesis.given(st.sampled_from(names), st.sampled_from([*SHARDS, *files]).map(json.dumps) | evil)
    @hypothesis.settings(max_examples=300)
    def one(name, file):
        text = json.dumps({**index, "weight_map": {**index["weight_map"], name: "EVIL"}}).replace('"EVIL"', file)
        place = directory({**contents, "model.safetensors.index.json": text.encode(errors="surrogatepass")})
        same = outcome(planned, place)
        assert (same is not None) == (json.dumps(index["weight_map"][name]) == file)

    one()
    for key in (*index, "weight_map"):
        for value in [*map(json.dumps, VALUES), *RAW]:
            text = json.dumps({**index, key: "EVIL"}).replace('"EVIL"', value)
            place = directory({**contents, "model.safetensors.index.json": text.encode(errors="surrogatepass")})
            assert (outcome(planned, place) is not None) <= (key != "weight_map")


LIMITED = """
import json, resource, sys
from pathlib import Path
import jax
from hadamax.errors import HadamaxError
from hadamax.hf import load_pretrained

directory = Path(sys.argv[1])
load_pretrained(directory)  # what XLA takes for itself is taken now
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**29, size + 2**29))
config = json.loads((directory / "config.json").read_text())
config.pop("id2label", None), config.pop("label2id", None)
shard = sorted(directory.glob("*.safetensors"))[0]
data = shard.read_bytes()
sizes = [key for key in config if type(config[key]) is int and config[key] > 0]
for key in [*sizes, "num_labels"]:
    for huge in (10**6, 10**9, 10**12, 2**63, 10**40):
        (directory / "config.json").write_text(json.dumps({**config, key: huge}))
        for scan_layers in (True, False):
            try:
                load_pretrained(directory, scan_layers=scan_layers)
            except HadamaxError:
                continue
            assert key in ("num_labels", "max_position_embeddings") or key.endswith("_token_id"), key
(directory / "config.json").write_text(json.dumps(config))
lies = [n.to_bytes(8, "little") + data[8:] for n in (2**63, 2**40, 10**8, len(data))]
header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
for field, value in (("shape", [2**40]), ("shape", [2**40, 2**40]), ("data_offsets", [0, 2**50])):
    name = next(name for name in header if name != "__metadata__")
    text = json.dumps({**header, name: {**header[name], field: value}}).encode()
    lies.append(len(text).to_bytes(8, "little") + text)
for lie in lies:
    shard.write_bytes(lie)
    try:
        load_pretrained(directory)
    except HadamaxError:
        continue
    raise AssertionError(lie[:200])
print("all refused")
"""


@pytest.mark.parametrize("family", CONFIGS)
def test_lies_about_sizes_take_no_memory(tmp_path, family):
    write(tmp_path / "model", family)
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "model")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert done.stdout == "all refused\n", done.stderr[-2000:]
