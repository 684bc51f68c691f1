"""A model and its parameters as a Hugging Face checkpoint directory."""

import dataclasses
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from hadamax.errors import CheckpointError, ConfigError
from hadamax.hf import families
from hadamax.hf.load import flat, float_dtype

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def save_pretrained(
    directory: str | Path,
    model: families.Model,
    params: Mapping[str, Any],
    config: families.Config,
    *,
    max_shard_size: int | str = "5GB",
    dtype: Any = None,
    tokenizer_from: str | Path | None = None,
) -> families.Config:
    """Writes a directory that `transformers` (4 and 5) loads.

    The directory appears whole or not at all: it is written beside its place and renamed. Biases that merging an
    adapter added are kept: `attention_bias` or `mlp_bias` is set, and the projections that have none get zeros.

    Args:
        params: `{"params": ...}` as `model.apply` takes them; merged, not lazy.
        max_shard_size: bytes, or a string such as "5GB"; larger models are written as shards with an index.
        dtype: of the written tensors; as they are where None.
        tokenizer_from: directory whose tokenizer files (and `generation_config.json`) are copied.

    Returns:
        The config as written.

    Raises:
        CheckpointError: the target exists and is not empty, parameters that do not fit the config, a disk that refuses.
        ConfigError: a shard size that cannot be read.
        MergeError: a bias where the family has no place for one.
    """
    target = Path(directory)
    limit = _bytes(max_shard_size)
    dtype = None if dtype is None else float_dtype(dtype)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists and is not empty; choose another directory or remove it first")
    tokenizer = None if tokenizer_from is None else Path(tokenizer_from)
    if tokenizer is not None and not tokenizer.is_dir():
        raise CheckpointError(f"no tokenizer directory at {tokenizer}")
    leaves, config = _complete(flat(params.get("params", params)), model, config)
    written = leaves["embed_tokens/embedding"].dtype if dtype is None else dtype
    config = dataclasses.replace(config, dtype=np.dtype(written).name)
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f".{target.name}-{secrets.token_hex(4)}"
        temporary.mkdir()
        _write_weights(temporary, _pieces(leaves, model, dtype), limit)
        (temporary / "config.json").write_text(
            json.dumps(families.write_config(config, model.task), indent=2) + "\n", encoding="utf-8"
        )
        if tokenizer is not None:
            for file in (tokenizer / name for name in TOKENIZER_FILES):
                if file.is_file():
                    shutil.copyfile(file, temporary / file.name)
        for file in temporary.iterdir():  # safetensors writes files that only their owner may read
            shutil.copymode(temporary / "config.json", file)
        os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {target}: {' '.join(str(error).split())}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)  # gone already where the rename succeeded
    return config


class _Piece(NamedTuple):
    """A tensor still to be written: its name, its place in a leaf, its size on disk."""

    name: str
    leaf: Any
    layer: int | None
    transposed: bool
    dtype: np.dtype
    nbytes: int

    def read(self) -> np.ndarray:
        leaf = self.leaf
        if self.layer is not None:  # on the device, with a traced index: one small program per shape
            leaf = jax.lax.dynamic_index_in_dim(leaf, self.layer, keepdims=False)
        value = np.asarray(leaf)
        return np.ascontiguousarray((value.T if self.transposed else value).astype(self.dtype, copy=False))


def _complete(
    leaves: dict[str, Any], model: families.Model, config: families.Config
) -> tuple[dict[str, Any], families.Config]:
    """Adds the zero biases that the family's flags ask for, and checks every shape against the config."""
    expected = families.expected_leaves(model.clone(config=config))
    added = [path for path in leaves if path.endswith("/bias") and path not in expected]
    config = families.family_of(config.model_type).admit(config, added)
    leaves, expected = dict(leaves), families.expected_leaves(model.clone(config=config))
    for path, leaf in expected.items():
        if path.endswith("/bias") and path not in leaves and path[:-4] + "kernel" in leaves:
            leaves[path] = np.zeros(leaf.shape, leaves[path[:-4] + "kernel"].dtype)
        if path not in leaves:
            raise CheckpointError(f"the parameters lack {path!r} of shape {leaf.shape}")
        if leaves[path].shape != leaf.shape:
            raise CheckpointError(f"parameter {path!r}: expected shape {leaf.shape}, found {leaves[path].shape}")
    for path in leaves:
        if path not in expected:
            raise CheckpointError(f"parameter {path!r} of shape {leaves[path].shape} has no place in the config")
    return leaves, config


def _pieces(leaves: Mapping[str, Any], model: families.Model, dtype: np.dtype | None) -> list[_Piece]:
    pieces = []
    for path, tensors in families.tensors(model, leaves).items():
        leaf = leaves[path]
        kind = np.dtype(leaf.dtype if dtype is None else dtype)
        size = leaf.size // len(tensors) * kind.itemsize
        pieces += [_Piece(t.name, leaf, t.layer, t.transposed, kind, size) for t in tensors]
    return sorted(pieces, key=lambda piece: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", piece.name)])


def _shards(pieces: list[_Piece], limit: int) -> Iterator[list[_Piece]]:
    shard, size = [], 0
    for piece in pieces:
        if shard and size + piece.nbytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(piece)
        size += piece.nbytes
    yield shard


def _write_weights(directory: Path, pieces: list[_Piece], limit: int) -> None:
    shards = list(_shards(pieces, limit))
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        index = {
            "metadata": {"total_size": sum(piece.nbytes for piece in pieces)},
            "weight_map": {piece.name: name for name, shard in zip(names, shards, strict=True) for piece in shard},
        }
        text = json.dumps(index, indent=2) + "\n"
        (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    for name, shard in zip(names, shards, strict=True):
        save_file({piece.name: piece.read() for piece in shard}, directory / name, metadata={"format": "pt"})


def _bytes(size: int | str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B)?\s*", str(size), re.IGNORECASE)
    limit = int(float(match[1]) * UNITS[(match[2] or "B").upper()]) if match else 0
    if limit < 1:
        raise ConfigError(f"max_shard_size {size!r} is no size; write bytes or '5GB'")
    return limit
