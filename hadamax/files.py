"""Directories that appear whole or not at all, and JSON from files that nobody vouches for."""

import collections
import contextlib
import json
import math
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hadamax.errors import CheckpointError

_LONGEST_JSON = 100_000_000  # bytes


@contextlib.contextmanager
def new_directory(target: str | Path) -> Iterator[Path]:
    """A temporary directory beside `target`, which takes its name where the block ends without an error.

    Raises:
        CheckpointError: the target exists and is not an empty directory, or the disk refuses.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with new_directory(Path(folder) / "new") as temporary:
        ...         _ = (temporary / "a.txt").write_text("a")
        ...     [file.name for file in (Path(folder) / "new").iterdir()]
        ['a.txt']
    """
    target, temporary = Path(target), None
    try:
        check_new(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f".{target.name}-{secrets.token_hex(4)}"
        temporary.mkdir()
        yield temporary
        for path in [*temporary.iterdir(), temporary]:  # on the disk before the name is: a power cut is an interruption
            sync(path)
        os.replace(temporary, target)
        with contextlib.suppress(OSError):  # it is in its place; some file systems refuse this
            sync(target.parent)
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)  # gone already where the rename succeeded


def check_new(target: str | Path) -> None:
    """Raises `CheckpointError` where `new_directory` would refuse the target."""
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists and is not empty; choose another directory or remove it first")
    if above := next((parent for parent in target.parents if parent.is_file()), None):
        raise CheckpointError(f"cannot write {target}: {above} is a file")


def sync(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: what `check_file` and `parse_json` refuse.
    """
    check_file(path, _LONGEST_JSON)
    try:
        return parse_json(path.read_bytes(), path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def check_file(path: Path, longest: int | None = None) -> int:
    """The size of a regular file; opening a pipe or a device instead could wait for ever.

    Raises:
        CheckpointError: another kind of file, an absent one, one longer than `longest` bytes.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is no regular file")
    if longest is not None and status.st_size > longest:
        raise CheckpointError(f"{path} has {status.st_size} bytes; at most {longest} are read as JSON")
    return status.st_size


def parse_json(data: bytes, path: Path) -> dict[str, Any]:
    """The object in JSON text that came from `path`.

    Raises:
        CheckpointError: text that is not UTF-8 or not JSON (with its line), a value that is no object, a key that
            stands twice, a number that is not finite.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice, _ = collections.Counter(name for name, _ in pairs).most_common(1)[0]
            raise ValueError(f"key {twice!r} stands twice")
        return found

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise ValueError(f"number {number[:20]} is not finite")
        return value

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not valid JSON: line {error.lineno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text: byte {error.start}") from error
    except RecursionError:
        raise CheckpointError(f"{path} is nested too deeply to be read") from None
    except ValueError as error:  # the two above, and integers of thousands of digits
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(value).__name__}")
    return value
