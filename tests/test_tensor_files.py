"""safetensors files: slices are read alone, headers that lie are refused, what is written the library reads."""

import json
import os

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hadamax import tensor_files
from hadamax.errors import CheckpointError
from hadamax.tensor_files import Piece, read_header, stored_tensors, write_tensors

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]


def safetensors(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@hypothesis.given(
    shape=st.lists(st.integers(0, 6), max_size=3).map(tuple), dtype=st.sampled_from(DTYPES), data=st.data()
)
@hypothesis.settings(max_examples=60)
def test_any_slice_is_the_librarys_and_no_other_byte_is_read(tmp_path_factory, shape, dtype, data):
    path = tmp_path_factory.mktemp("slices") / "a.safetensors"
    tensors = {"a": np.arange(3, dtype=np.float32), "b": np.arange(1, np.prod(shape) + 1).reshape(shape).astype(dtype)}
    save_file(tensors, path)
    bounds = [sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n)))) for n in shape]
    index = tuple(slice(*bound) for bound in bounds[: data.draw(st.integers(0, len(shape)))])
    read = []
    with pytest.MonkeyPatch.context() as patch:
        into = tensor_files._read_into
        patch.setattr(
            tensor_files, "_read_into", lambda file, value, begin: read.append(value.nbytes) or into(file, value, begin)
        )
        found = read_header(path)["b"].read(index)
    expected = tensors["b"][index]
    assert found.dtype == expected.dtype and np.array_equal(found, expected)
    assert sum(read) == expected.nbytes


@pytest.mark.parametrize("dtypes", [DTYPES, DTYPES[::-1]])
def test_the_library_reads_what_is_written_and_every_tensor_is_aligned(tmp_path, dtypes):
    values = {f"t{i}": np.arange(3, dtype=np.float32).astype(dtype) for i, dtype in enumerate(dtypes)}
    pieces = [Piece(name, value.shape, value.dtype, lambda value=value: [value]) for name, value in values.items()]
    write_tensors(tmp_path / "out.safetensors", pieces)
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == values.keys()
    assert all(
        found[name].dtype == value.dtype and np.array_equal(found[name], value) for name, value in values.items()
    )
    stored = read_header(tmp_path / "out.safetensors")
    assert all(tensor.begin % values[name].itemsize == 0 for name, tensor in stored.items())


def test_only_one_tensor_is_held_while_a_file_is_written(tmp_path):
    import weakref

    alive = []

    def read():
        assert not any(ref() is not None for ref in alive)
        value = np.ones((4, 4), np.float32)
        alive.append(weakref.ref(value))
        yield value

    write_tensors(tmp_path / "o", [Piece(str(i), (4, 4), np.dtype(np.float32), read) for i in range(4)])
    assert len(alive) == 4


LYING = {
    "empty": (b"", "a header of 0 bytes in a file of 0"),
    "length-huge": (safetensors({}, length=2**63), "a header of 9223372036854775808 bytes"),
    "length-beyond": (safetensors({"a": entry([1], 0, 4)}, bytes(4), length=10**6), "a header of 1000000 bytes"),
    "not-json": (safetensors(b"{{"), "not valid JSON"),
    "not-utf8": (safetensors(b'{"\xff": 1}'), "not UTF-8"),
    "nested": (safetensors(b'{"a":' + b"[" * 200_000), "nested too deeply"),
    "digits": (safetensors(b'{"a":' + b"1" * 5000 + b"}"), "not valid JSON: Exceeds the limit"),
    "twice": (safetensors(b'{"a": 1, "a": 2}'), "key 'a' stands twice"),
    "nan": (safetensors(b'{"a": NaN}'), "number NaN is not finite"),
    "list": (safetensors(b"[]"), "must hold a JSON object, found list"),
    "entry-number": (safetensors({"a": 3}), "'a' is not given by dtype, shape and data_offsets"),
    "entry-more": (safetensors({"a": entry([1], 0, 4) | {"x": 1}}, bytes(4)), "'a' is not given by"),
    "shape-text": (safetensors({"a": entry("11", 0, 4)}, bytes(4)), "shape or offsets that are none"),
    "shape-negative": (safetensors({"a": entry([-1, -1], 0, 4)}, bytes(4)), "shape or offsets that are none"),
    "shape-bool": (safetensors({"a": entry([True], 0, 4)}, bytes(4)), "shape or offsets that are none"),
    "shape-float": (safetensors({"a": entry([1.0], 0, 4)}, bytes(4)), "shape or offsets that are none"),
    "shape-other": (safetensors({"a": entry([2], 0, 4)}, bytes(4)), r"F32\[2\] cannot have 4 bytes"),
    "shape-overflow": (safetensors({"a": entry([2**62, 4], 0, 0)}), r"cannot have 0 bytes"),
    "rank": (safetensors({"a": entry([1] * 1000, 0, 4)}, bytes(4)), "shape or offsets that are none"),
    "offsets-three": (safetensors({"a": entry([1], 0, 4) | {"data_offsets": [0, 4, 4]}}, bytes(4)), "that are none"),
    "offsets-backwards": (safetensors({"a": entry([1], 8, 4)}, bytes(8)), "cannot have -4 bytes"),
    "backwards-unknown": (safetensors({"a": entry([1], 0, 4), "b": entry([1], 4, 0, "X")}, bytes(4)), "damaged"),
    "overlap": (safetensors({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, bytes(4)), "begins at 0, where 4"),
    "hole": (safetensors({"a": entry([1], 4, 8)}, bytes(8)), "begins at 4, where 0"),
    "beyond": (safetensors({"a": entry([2], 0, 8)}, bytes(4)), "its tensors have 8 bytes, the file 4"),
    "rest": (safetensors({"a": entry([1], 0, 4)}, bytes(9)), "its tensors have 4 bytes, the file 9"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "message"), LYING.values(), ids=LYING)
def test_a_header_that_lies_is_refused_in_one_line(tmp_path, data, message):
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as error:
        read_header(tmp_path / "a.safetensors")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_file_that_is_cut_short_after_its_header_was_read_is_an_error(tmp_path):
    save_file({"a": np.ones((64, 64), np.float32)}, tmp_path / "a")
    stored = read_header(tmp_path / "a")["a"]
    os.truncate(tmp_path / "a", 1000)
    with pytest.raises(CheckpointError, match="has become shorter"):
        stored.read()


def test_a_pipe_and_a_directory_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no regular file"):
        stored_tensors(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="no regular file"):
        stored_tensors(tmp_path)


@pytest.mark.parametrize(
    "file", ["../o.safetensors", "/o.safetensors", "a/../../o", "", ".", "a\0b", "a\nb", "\ud800", 3]
)
def test_an_index_may_only_name_files_inside(tmp_path, file):
    save_file({"a": np.ones(1, np.float32)}, tmp_path / "o.safetensors")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(CheckpointError, match=r"no file inside the directory|no regular file") as error:
        stored_tensors(tmp_path / "d")
    assert "\n" not in str(error.value)


def test_links_lead_out_of_the_directory_only_to_the_hubs_own_blobs(tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "f00", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file({"a": np.ones(1, np.float32)}, blobs / "123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/123")
    assert stored_tensors(snapshot).keys() == {"a"}
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "model.safetensors").symlink_to(blobs / "123")
    with pytest.raises(CheckpointError, match="is a link out of the directory"):
        stored_tensors(plain)
    (plain / "model.safetensors").unlink()
    (plain / "elsewhere").symlink_to(blobs)
    (plain / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "elsewhere/123"}}))
    with pytest.raises(CheckpointError, match="is a link out of the directory"):
        stored_tensors(plain)
    (plain / "circle").symlink_to("circle")
    (plain / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "circle"}}))
    with pytest.raises(CheckpointError, match=r"cannot read .*circle"):
        stored_tensors(plain)
