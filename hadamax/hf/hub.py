"""Where a checkpoint is: a directory here, or a repository of the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path

from hadamax.errors import CheckpointError

WEIGHTS = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")


def directory_of(source: str | Path, patterns: Sequence[str] = WEIGHTS) -> Path:
    """The directory itself, or the hub's files that match the patterns, fetched where no such directory exists.

    Raises:
        CheckpointError: no directory and no repository of that name, or one that cannot be fetched.
    """
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{source} is a file; give the directory that holds config.json and the weights")
    if path.is_absolute() or str(source).startswith((".", "~")) or str(source).count("/") > 1:  # no hub id looks so
        raise CheckpointError(f"no directory at {source}")
    from huggingface_hub import errors, snapshot_download  # slow to import, and only needed here

    try:
        return Path(snapshot_download(str(source), allow_patterns=list(patterns)))
    except Exception as error:  # the client raises dozens of kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if isinstance(error, errors.GatedRepoError):
            reason = "it is gated; accept its terms on its page and log in with `hf auth login`"
        elif isinstance(error, errors.RepositoryNotFoundError):
            reason = (
                "it does not exist, or it is private: check the spelling (owner/name) or log in with `hf auth login`"
            )
        raise CheckpointError(
            f"{str(source)!r} is not a directory here and could not be fetched from the hub: {reason}"
        ) from error
