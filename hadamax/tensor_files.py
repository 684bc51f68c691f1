"""safetensors files, read slice by slice and written tensor by tensor: neither side holds a whole file.

A file is eight bytes of header length, a JSON header, and the tensors end to end
(https://github.com/huggingface/safetensors#format). The header is believed only after its sizes were held against the
file's own, so that one that lies is refused before memory is taken for it. Files are read, not mapped: one that is cut
short meanwhile is an error, not a bus error.
"""

import json
import math
import mmap
from collections.abc import Callable, Iterable, Sequence
from io import FileIO
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from hadamax.errors import CheckpointError
from hadamax.files import check_file, parse_json, read_json

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8, "C64": 8}
_SIZES |= {name: np.dtype(dtype).itemsize for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # the format's own limit


class Stored(NamedTuple):
    """A tensor in a file: where its bytes begin, and what they mean."""

    path: Path
    dtype: str  # as the format names it; those of `DTYPES` can be read
    shape: tuple[int, ...]
    begin: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _SIZES[self.dtype]

    def read(self, index: Sequence[slice] = ()) -> np.ndarray:
        """A part of the tensor in memory of its own; no other bytes of the file are read.

        Args:
            index: slices (without steps) of the leading axes; the whole tensor where empty.

        Raises:
            CheckpointError: a file that has gone or become shorter.
        """
        parts = [range(size)[part] for size, part in zip(self.shape, index, strict=False)]
        parts += [range(size) for size in self.shape[len(parts) :]]
        value = _pages(tuple(map(len, parts)), np.dtype(DTYPES[self.dtype]))
        strides = [math.prod(self.shape[axis + 1 :]) * value.itemsize for axis in range(len(parts))]
        # from the last axis that is cut on, the part lies in the file in one piece
        cut = max((axis for axis, part in enumerate(parts) if len(part) < self.shape[axis]), default=0)
        try:
            with open(self.path, "rb", buffering=0) as file:
                for outer in np.ndindex(value.shape[:cut]):
                    starts = [part[at] for part, at in zip(parts, outer, strict=False)]
                    starts += [part.start for part in parts[cut:]]
                    begin = self.begin + sum(map(math.prod, zip(starts, strides, strict=True)))
                    _read_into(file, value[(*outer, ...)], begin)
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error.strerror or error}") from error
        return value


def _pages(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory that XLA takes over on a CPU without a copy, for it is aligned, and that the system has back at once."""
    count = math.prod(shape)
    pages = mmap.mmap(-1, max(count, 1) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, dtype, count).reshape(shape)


def _read_into(file: FileIO, value: np.ndarray, begin: int) -> None:
    view = value.reshape(-1).view(np.uint8).data
    file.seek(begin)
    while view:
        count = file.readinto(view)
        if not count:
            raise OSError("it has become shorter since it was opened")
        view = view[count:]


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one file by name.

    Raises:
        CheckpointError: a file that is none or cannot be read; a header whose sizes or offsets disagree with each other
            or with the file.
    """

    def damaged(what: str) -> CheckpointError:
        return CheckpointError(f"{path} is damaged or incomplete: {what}")

    size = check_file(path)
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise damaged(f"a header of {length} bytes in a file of {size}")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    header = parse_json(text, path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise damaged("its __metadata__ is no map of texts")
    tensors, ends = {}, {}
    for name, entry in header.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise damaged(f"tensor {name!r} is not given by dtype, shape and data_offsets")
        kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(kind, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
            raise damaged(f"tensor {name!r} has a dtype, shape or offsets that are none")
        begin, end = offsets
        if kind in _SIZES and math.prod(shape) * _SIZES[kind] != end - begin:
            raise damaged(f"tensor {name!r} of {kind}{shape} cannot have {end - begin} bytes")
        tensors[name], ends[name] = Stored(path, kind, tuple(shape), begin), end
    last = 0
    for name in sorted(tensors, key=lambda name: (tensors[name].begin, ends[name])):
        if tensors[name].begin != last or ends[name] < last:
            raise damaged(f"tensor {name!r} begins at {tensors[name].begin}, where {last} was expected")
        last = ends[name]
    if 8 + length + last != size:
        raise damaged(f"its tensors have {last} bytes, the file {size - 8 - length} for them")
    return {name: stored._replace(begin=8 + length + stored.begin) for name, stored in tensors.items()}


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and len(values) <= 16 and all(type(n) is int and 0 <= n < 2**63 for n in values)


def stored_tensors(directory: Path) -> dict[str, Stored]:
    """The tensors of a checkpoint by name: of `model.safetensors`, or of the shards that the index names.

    Raises:
        CheckpointError: neither file, a damaged one, an index that names a file outside the directory or a tensor that
            its file does not hold.
    """
    if (directory / SINGLE).exists():
        return read_header(inside(directory, SINGLE))
    if not (directory / INDEX).exists():
        found = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".safetensors", ".gguf"))
        raise CheckpointError(
            f"{directory} holds neither {SINGLE} nor {INDEX}"
            + (f"; found {', '.join(found)}: convert with transformers' save_pretrained" if found else "")
        )
    weight_map = read_json(inside(directory, INDEX)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{directory / INDEX} has no weight_map of tensor names to files")
    for name, file in weight_map.items():
        plain = isinstance(file, str) and len(file) < 256 and file.isprintable() and PurePath(file).name
        if not plain or PurePath(file).is_absolute() or ".." in PurePath(file).parts:
            raise CheckpointError(
                f"{directory / INDEX} puts tensor {name!r} into {repr(file)[:256]}, which is no file inside the "
                "directory"
            )
    headers = {file: read_header(inside(directory, file)) for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise CheckpointError(f"{directory / file} lacks tensor {name!r}, which {INDEX} puts there")
    unnamed = {name: (file, stored) for file, header in headers.items() for name, stored in header.items()}
    unnamed = {name: found for name, found in unnamed.items() if name not in weight_map}
    if unnamed:  # transformers would read them: to leave them out could change the model
        name, (file, _) = next(iter(unnamed.items()))
        raise CheckpointError(f"{directory / file} holds tensor {name!r}, which {INDEX} does not name; add it there")
    return {name: headers[file][name] for name, file in weight_map.items()}


def inside(directory: Path, name: str) -> Path:
    """The path of a file of the directory. A link may lead on only within it, or to the blobs of the hub's own cache.

    Raises:
        CheckpointError: a file that is absent, or a link to elsewhere.
    """
    path = directory / name
    try:
        root, found = directory.resolve(), path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        raise CheckpointError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    blobs = [root.parents[1] / "blobs"] if root.parent.name == "snapshots" else []
    if not any(found.is_relative_to(allowed) for allowed in (root, *blobs)):
        raise CheckpointError(f"{path} is a link out of the directory, to {found}; put the file itself there")
    return path


class Piece(NamedTuple):
    """A tensor to write, computed when its turn comes, in one or several parts along its first axis."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(path: Path, pieces: Iterable[Piece]) -> None:
    """Writes one file, holding one tensor at a time.

    Raises:
        OSError: the disk refuses.
    """
    pieces = sorted(pieces, key=lambda piece: -piece.dtype.itemsize)  # each is aligned to its own items, as readers ask
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for piece in pieces:
        begin, end = end, end + piece.nbytes
        header[piece.name] = {"dtype": NAMES[piece.dtype], "shape": piece.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb", buffering=0) as file:
        _write(file, len(text).to_bytes(8, "little") + text)
        for piece in pieces:
            written = 0
            for part in piece.read():
                value = np.ascontiguousarray(part)
                if value.dtype != piece.dtype or value.shape[1:] != piece.shape[1:]:
                    raise ValueError(
                        f"{piece.name}: {value.dtype}{value.shape} is no part of {piece.dtype}{piece.shape}"
                    )
                _write(file, value.reshape(-1).view(np.uint8))
                written += value.nbytes
                del part, value  # before the next one is computed
            if written != piece.nbytes:
                raise ValueError(f"{piece.name}: expected {piece.nbytes} bytes, got {written}")


def _write(file: Any, data: Any) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
