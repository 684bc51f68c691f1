"""manifest.json in a run's folder: what each start of the run ran on. No environment, no host name."""

import hashlib
import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import hadamax as hx
from train.config import Config
from train.metrics import write_text

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "grain", "numpy", "qwix")


def describe(config: Config, step: int, mesh: Mapping[str, int] | None = None) -> dict[str, Any]:
    """A start of a run, at a step (0: from the beginning), as JSON.

    Raises:
        OSError: a data file that cannot be read.
    """
    data = (config.data.train, config.data.eval)
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "command": sys.argv,
        "versions": versions(),
        "git": git(Path(__file__).parent),
        "platform": jax.default_backend(),
        "device_kind": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "mesh": None if mesh is None else dict(mesh),
        "data_sha256": {path: sha256(Path(path)) for path in data if path is not None},
        "config": config.to_dict(),
    }


def append(path: Path, start: Mapping[str, Any]) -> None:
    """Adds a start to the file's list.

    Raises:
        ConfigError: the file there is no manifest.
    """
    starts = []
    if path.exists():
        try:
            starts = [*json.loads(path.read_text(encoding="utf-8"))["starts"]]
        except (ValueError, LookupError, TypeError) as error:
            raise hx.ConfigError(f"{path} is not a run's manifest; move it away, and a new one is begun") from error
    write_text(path, json.dumps({"starts": [*starts, start]}, indent=2) + "\n")


def versions() -> dict[str, str | None]:
    """Of Python, hadamax and what computes; None where a package is not installed."""

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    own = {"python": platform.python_version(), "hadamax": hx.__version__}
    return own | {package: version(package) for package in PACKAGES}


def git(folder: Path) -> dict[str, Any] | None:
    """The commit that a folder is at, and whether tracked files were changed since; None where git does not say."""

    def run(*args: str) -> str:
        command = ["git", "-C", str(folder), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        return {"commit": run("rev-parse", "HEAD"), "dirty": bool(run("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
