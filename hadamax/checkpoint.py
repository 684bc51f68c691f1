"""Checkpoints of what trains, over orbax: written in the background, the last few kept, read back with clear errors.

A checkpoint holds two trees of arrays, `trainable` (adapters and trained base leaves, never the frozen base) and
`state` (the optimiser's), and two JSON documents, `data` (the input pipeline's position) and `meta` (what rebuilds it).
Leaves are stored under their "/"-joined path, so that a message can name them.
"""

from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import jax
import orbax.checkpoint as ocp
import tensorstore

from hadamax.errors import CheckpointError

Item = Literal["trainable", "state"]


class Checkpoints:
    """The checkpoints in one directory; a context manager that finishes what is being written.

    Args:
        directory: one folder for each step.
        keep: how many to keep, the newest ones.
        create: make the directory; False refuses one that is not there.

    Raises:
        CheckpointError: a directory that cannot be made or read.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
        ...     checkpoints.save(7, {"a": jnp.ones((2, 3))}, {"count": jnp.array(7)}, data={}, meta={"seed": 0})
        ...     checkpoints.wait()
        ...     checkpoints.latest(), checkpoints.json(7, "meta")
        ...     checkpoints.arrays(7, "trainable", {"a": jnp.zeros((2, 3))})
        (7, {'seed': 0})
        {'a': Array([[1., 1., 1.],
               [1., 1., 1.]], dtype=float32)}
    """

    def __init__(self, directory: str | Path, keep: int = 2, create: bool = True):
        self.directory = Path(directory).absolute()
        if not create and not self.directory.is_dir():
            raise CheckpointError(f"no checkpoints in {directory}")
        arrays, documents = ocp.StandardCheckpointHandler, ocp.JsonCheckpointHandler
        handlers = {"trainable": arrays(), "state": arrays(), "data": documents(), "meta": documents()}
        try:
            options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=create)
            self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)
        except OSError as error:
            raise CheckpointError(f"cannot use {directory} for checkpoints: {error.strerror or error}") from error

    def latest(self) -> int | None:
        """The newest step that was written whole, or None."""
        return self._manager.latest_step()

    def save(self, step: int, trainable: Any, state: Any, *, data: Any, meta: Any) -> None:
        """Starts to write a checkpoint; the arrays are copied before this returns, so they may be donated.

        Raises:
            CheckpointError: this or an earlier checkpoint could not be written: a full or read-only disk.
        """
        args = {"trainable": ocp.args.StandardSave(_flat(trainable)), "state": ocp.args.StandardSave(_flat(state))}
        args |= {"data": ocp.args.JsonSave(data), "meta": ocp.args.JsonSave(meta)}
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
        """One tree of a checkpoint, in the structure, shapes and dtypes of `like` (arrays or `jax.ShapeDtypeStruct`).

        Raises:
            CheckpointError: an absent or damaged file; a tensor that is missing, unexpected or of another shape.
        """
        wanted, where = _flat(like), self.directory / str(step)
        _check_readable(where, item)
        try:
            found = self._manager.item_metadata(step)[item]
        except Exception as error:
            raise _damaged(where, error) from error
        if found is None:
            raise CheckpointError(f"checkpoint {where} has no {item!r}; it is incomplete")
        _check(where, wanted, dict(found))
        abstract = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in wanted.items()}
        try:
            args = ocp.args.Composite(**{item: ocp.args.StandardRestore(abstract)})
            arrays = self._manager.restore(step, args=args)[item]
        except Exception as error:
            raise _damaged(where, error) from error
        return jax.tree.unflatten(jax.tree.structure(like), [arrays[path] for path in wanted])

    def json(self, step: int, item: Literal["data", "meta"]) -> Any:
        """One JSON document of a checkpoint.

        Raises:
            CheckpointError: an absent or damaged file.
        """
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**{item: ocp.args.JsonRestore()}))[item]
        except Exception as error:
            raise _damaged(self.directory / str(step), error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._manager.close()
        except Exception as failure:
            if error is None:  # otherwise the first error is the one to show
                raise self._cannot_write(failure) from failure

    def _cannot_write(self, error: Exception) -> CheckpointError:
        full = "RESOURCE_EXHAUSTED" in str(error) or "No space left" in str(error)
        reason = "No space left on device" if full else getattr(error, "strerror", None) or _short(error)
        return CheckpointError(f"cannot write a checkpoint into {self.directory}: {reason}")


def _flat(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _check(where: Path, wanted: dict[str, Any], found: dict[str, Any]) -> None:
    for path in wanted:
        if path not in found:
            raise CheckpointError(f"checkpoint {where} lacks tensor {path!r}, expected of shape {wanted[path].shape}")
    for path in found:
        if path not in wanted:
            raise CheckpointError(f"checkpoint {where} has tensor {path!r} of shape {found[path].shape}, expected none")
    for path, leaf in wanted.items():
        if found[path].shape != leaf.shape:
            shapes = f"expected shape {leaf.shape}, found {found[path].shape}"
            raise CheckpointError(f"tensor {path!r} in checkpoint {where}: {shapes}")


def _check_readable(where: Path, item: Item) -> None:
    """Reads each value once, one after the other. orbax reads all at once, and when several fail, prints the tracebacks
    of all but the first.
    """
    key = b""
    try:
        store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{where / item}/"}).result()
        for key in store.list().result():
            store.read(key).result()
    except ValueError as error:
        raise _damaged(where, error, key.decode().rpartition("/")[0]) from error


def _damaged(where: Path, error: Exception, tensor: str = "") -> CheckpointError:
    what = f"tensor {tensor!r} in checkpoint {where}" if tensor else f"checkpoint {where}"
    return CheckpointError(f"{what} is damaged; remove that directory to use an older one ({_short(error)})")


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
