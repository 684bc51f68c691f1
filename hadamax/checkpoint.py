"""Checkpoints of what trains, over orbax: written in the background, the last few and the best kept, read with care.

A checkpoint holds two trees of arrays, `trainable` (adapters and trained base leaves, never the frozen base) and
`state` (the optimiser's), and three JSON documents: `data` (the input pipeline's position), `meta` (what rebuilds it)
and `check`, with the held-out loss and a checksum of all the rest: the array files have none of their own, so a flipped
bit would become a weight. Leaves are stored under their "/"-joined path, so that a message can name them.

orbax writes into `<step>.orbax-checkpoint-tmp` and renames: a numbered folder is whole, whenever the process ends.
With several processes, all of them make the same calls, on one directory that all of them see. What one process finds
damaged is damaged on all: each goes the same way, and none waits for another.
"""

import errno
import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from jax.experimental import multihost_utils

from hadamax.errors import CheckpointError
from hadamax.fingerprint import checksums

Item = Literal["trainable", "state"]
Document = Literal["data", "meta"]
T = TypeVar("T")


class DamagedError(CheckpointError):
    """A checkpoint that was written whole and is no longer: a file is missing, cut off or changed."""


class Checkpoints:
    """The checkpoints in one directory; a context manager that finishes what is being written.

    Args:
        directory: one folder for each step.
        keep: how many to keep, the newest ones; the best one is kept as well.
        create: to write: make the directory, and remove what was left half-written. False refuses a directory that is
            not there, and changes nothing.

    Raises:
        CheckpointError: a directory that cannot be made or read.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
        ...     checkpoints.save(7, {"a": jnp.ones((2, 3))}, {"count": jnp.array(7)}, data={}, meta={"seed": 0})
        ...     checkpoints.wait()
        ...     checkpoints.steps(), checkpoints.json(7, "meta")
        ...     checkpoints.arrays(7, "trainable", {"a": jnp.zeros((2, 3))})
        ([7], {'seed': 0})
        {'a': Array([[1., 1., 1.],
               [1., 1., 1.]], dtype=float32)}
    """

    def __init__(self, directory: str | Path, keep: int = 2, create: bool = True):
        self.directory = Path(directory).absolute()
        if not create and not self.directory.is_dir():
            raise CheckpointError(f"no checkpoints in {directory}")
        self._losses: dict[int, float] = {}
        arrays, documents = ocp.StandardCheckpointHandler, ocp.JsonCheckpointHandler
        handlers = {item: arrays() for item in ("trainable", "state")}
        handlers |= {item: documents() for item in ("data", "meta", "check")}
        try:
            policy = _LastAndBest(keep, self._losses)
            options = ocp.CheckpointManagerOptions(
                preservation_policy=policy, create=create, cleanup_tmp_directories=create
            )
            self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)
        except OSError as error:
            raise CheckpointError(f"cannot use {directory} for checkpoints: {error.strerror or error}") from error
        self._losses |= dict(self._read_losses())

    def steps(self) -> list[int]:
        """The steps that were written whole, the oldest first."""
        return json.loads(_gather(json.dumps(sorted(self._manager.all_steps(read=True))))[0])

    def latest(self) -> int | None:
        """The newest step that was written whole, or None."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step with the lowest loss, the newest of equals; None where none was saved with its loss."""
        return _best(self._losses, self.steps())

    def save(self, step: int, trainable: Any, state: Any, *, data: Any, meta: Any, loss: float | None = None) -> None:
        """Starts to write a checkpoint; the arrays are copied before this returns, so they may be donated.

        Args:
            data, meta: JSON values.
            loss: held-out loss at this step, where it was measured: the lowest one makes the best checkpoint.

        Raises:
            CheckpointError: this or an earlier checkpoint could not be written: a full or read-only disk; a tree with
                two leaves of one path, or with random keys.
        """
        trees, documents = {"trainable": _flat(trainable), "state": _flat(state)}, {"data": data, "meta": meta}
        loss = loss if loss is not None and math.isfinite(loss) else None
        check: dict[str, Any] = {"loss": loss, **{name: _crc(value) for name, value in documents.items()}}
        for item, leaves in trees.items():
            sums = checksums(leaves)
            check[item] = {path: [list(leaf.shape), str(leaf.dtype), sums[path]] for path, leaf in leaves.items()}
        documents["check"] = {**check, "check": _crc(check)}
        args: dict[str, Any] = {item: ocp.args.StandardSave(leaves) for item, leaves in trees.items()}
        args |= {item: ocp.args.JsonSave(value) for item, value in documents.items()}
        if loss is not None:
            self._losses[step] = loss
        try:
            self._manager.save(step, args=ocp.args.Composite(**args))
        except Exception as error:  # tensorstore reports a full disk as ValueError
            raise self._cannot_write(error) from error

    def wait(self) -> None:
        """Returns when every checkpoint is on disk.

        Raises:
            CheckpointError: one could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._cannot_write(error) from error

    def arrays(self, step: int, item: Item, like: Any) -> Any:
        """One tree of a checkpoint, in the structure, shapes, dtypes and shardings of `like`.

        Each process reads what its devices hold, whatever mesh and number of processes the checkpoint was written on.

        Args:
            like: arrays or `jax.ShapeDtypeStruct`; those without a sharding are placed on the first device.

        Raises:
            CheckpointError: a tensor that is missing, unexpected or of another shape; float64 without jax_enable_x64.
            DamagedError: an absent, cut off or changed file.
        """
        wanted, where = _flat(like), self.directory / str(step)
        stored = {path: _Stored(*entry) for path, entry in self._check(step)[item].items()}
        _compare(where, wanted, stored)
        arrays = _together(lambda: {path: _read(where, item, path, leaf) for path, leaf in wanted.items()})
        for path, found in checksums(arrays).items():
            if found != stored[path].checksum:
                raise _damaged(where, "its checksum is another", path)
        leaves = [_placed_as(leaf, arrays[path].astype(leaf.dtype)) for path, leaf in wanted.items()]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def json(self, step: int, item: Document) -> Any:
        """One JSON document of a checkpoint.

        Raises:
            DamagedError: an absent, cut off or changed file.
        """
        value, expected = self._document(step, item), self._check(step)[item]
        if _crc(value) != expected:
            raise _damaged(self.directory / str(step), f"the checksum of {item!r} is another")
        return value

    def set_aside(self, step: int) -> None:
        """Renames a damaged checkpoint to `<step>.damaged`, so that the step can be saved again."""
        source = self.directory / str(step)
        target = source.with_name(f"{step}.damaged")

        def rename() -> None:
            if jax.process_index() == 0:
                shutil.rmtree(target, ignore_errors=True)
                source.rename(target)

        try:
            _together(rename)
        except OSError as error:
            raise self._cannot_write(error) from error
        self._losses.pop(step, None)
        self._manager.reload()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._manager.close()
        except Exception as failure:
            if error is None:  # otherwise the first error is the one to show
                raise self._cannot_write(failure) from failure

    def _cannot_write(self, error: Exception) -> CheckpointError:
        if number := re.search(r"os_error_code='(\d+)'", str(error)):  # tensorstore's, after much else
            reason = os.strerror(int(number[1]))
        elif "RESOURCE_EXHAUSTED" in str(error):
            reason = os.strerror(errno.ENOSPC)
        else:
            reason = getattr(error, "strerror", None) or _short(error)
        return CheckpointError(f"cannot write a checkpoint into {self.directory}: {reason}")

    def _check(self, step: int) -> dict[str, Any]:
        check = self._document(step, "check")
        if not isinstance(check, dict) or check.pop("check", None) != _crc(check):
            raise _damaged(self.directory / str(step), "the checksum of 'check' is another")
        return check

    def _document(self, step: int, item: str) -> Any:
        where = self.directory / str(step)

        def read() -> Any:  # not by orbax, which makes the processes wait for one that found no file
            try:
                return json.loads((where / item / "metadata").read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise _damaged(where, error) from error

        return _together(read)

    def _read_losses(self) -> Iterator[tuple[int, float]]:
        for step in self.steps():
            try:
                loss = self._check(step)["loss"]
            except DamagedError:
                continue
            if loss is not None:
                yield step, loss


@dataclass
class _LastAndBest:
    """What orbax keeps. Its own `BestN` needs metrics files, one of which damaged stops the whole manager."""

    last: int
    losses: dict[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*steps[-self.last :], _best(self.losses, steps)}
        return [step in kept for step in steps]


class _Stored(NamedTuple):
    shape: list[int]
    dtype: str
    checksum: str


def _best(losses: dict[int, float], steps: Sequence[int]) -> int | None:
    return min((step for step in steps if step in losses), key=lambda step: (losses[step], -step), default=None)


def _flat(tree: Any) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        if path in flat:
            raise CheckpointError(f"two leaves have the path {path!r}; a checkpoint tells leaves by their path")
        if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise CheckpointError(f"{path!r} is {leaf.dtype}, no numbers; keep jax.random.key_data of it")
        flat[path] = leaf
    return flat


def _crc(value: Any) -> str:
    return f"{zlib.crc32(json.dumps(json.loads(json.dumps(value)), sort_keys=True).encode()):08x}"


def _placed_as(like: Any, array: jax.Array) -> jax.Array:
    """Free to go where the computation is, as `like` was, unless that was placed on its devices on purpose."""
    placed = getattr(like, "sharding", None) is not None and getattr(like, "committed", True)
    return array if placed else jnp.asarray(np.asarray(array))


def _compare(where: Path, wanted: dict[str, Any], stored: dict[str, _Stored]) -> None:
    for path in wanted:
        if path not in stored:
            raise CheckpointError(f"checkpoint {where} lacks tensor {path!r}, expected of shape {wanted[path].shape}")
    for path, tensor in stored.items():
        shape = tuple(tensor.shape)
        if path not in wanted:
            raise CheckpointError(f"checkpoint {where} has tensor {path!r} of shape {shape}, expected none")
        if jax.dtypes.canonicalize_dtype(tensor.dtype) != jnp.dtype(tensor.dtype):
            found = f"tensor {path!r} in checkpoint {where} is {tensor.dtype}"
            raise CheckpointError(f"{found}; set jax_enable_x64 to read it")
        if shape != wanted[path].shape:
            shapes = f"expected shape {wanted[path].shape}, found {shape}"
            raise CheckpointError(f"tensor {path!r} in checkpoint {where}: {shapes}")


def _read(where: Path, item: Item, path: str, like: Any) -> jax.Array:
    """One array, on the devices of `like`. Not read by orbax: it makes the processes wait for one whose read failed,
    and where several reads fail, prints the tracebacks of all but the first.
    """
    sharding = getattr(like, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    parts: dict[str, np.ndarray] = {}

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        if str(index) not in parts:  # devices with the same part share one read
            parts[str(index)] = stored[index or ...].read().result()
        return parts[str(index)]

    try:
        kvstore = {"driver": "ocdbt", "base": f"file://{where / item}/", "path": f"{path}/"}
        stored = tensorstore.open({"driver": "zarr", "kvstore": kvstore}, open=True, read=True).result()
        return jax.make_array_from_callback(like.shape, sharding, part)
    except (ValueError, OSError) as error:
        raise _damaged(where, error, path) from error


def _together(read: Callable[[], T]) -> T:
    """The result of `read`, unless it failed on any process: then it fails on each, with the first one's reason."""
    result = failure = None
    try:
        result = read()
    except (DamagedError, OSError) as error:
        failure = error
    failures = [text for text in _gather("" if failure is None else str(failure) or "failed") if text]
    if failure is not None:
        raise failure
    if failures:
        raise DamagedError(failures[0])
    return result  # pyright: ignore[reportReturnType]


def _gather(text: str) -> list[str]:
    """The texts of all processes."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size))
    padded = np.pad(data, (0, int(sizes.max()) - data.size + 1))
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def _damaged(where: Path, reason: Exception | str, tensor: str = "") -> DamagedError:
    what = f"tensor {tensor!r} in checkpoint {where}" if tensor else f"checkpoint {where}"
    return DamagedError(f"{what} is damaged ({_short(reason)})")


def _short(error: Exception | str) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
