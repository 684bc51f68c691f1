"""A model and its parameters as a Hugging Face checkpoint directory, tensor by tensor."""

import dataclasses
import functools
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hadamax.errors import CheckpointError, ConfigError
from hadamax.files import new_directory
from hadamax.hf import families
from hadamax.hf.load import float_dtype, main_dtype
from hadamax.hf.parameters import Parameter, of_array, parameters
from hadamax.tensor_files import INDEX, NAMES, SINGLE, Piece, write_tensors

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
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

    The directory appears whole or not at all: it is written beside its place and renamed. Beside the parameters, the
    host holds one tensor at a time. Biases that merging an adapter adds are kept: the config's flag is set, and
    the projections that have none get zeros.

    Args:
        params: `{"params": ...}` as `model.apply` takes them, or as `Injection.bind` returns them: adapted kernels are
            then merged one matrix at a time, in at least float32, and rounded once to the dtype that is written.
        max_shard_size: bytes, or a string such as "5GB"; larger models are written as shards with an index.
        dtype: of the written tensors; as they are where None.
        tokenizer_from: directory whose tokenizer files (and `generation_config.json`) are copied.

    Returns:
        The config as written.

    Raises:
        CheckpointError: the target exists and is not empty, parameters that do not fit the config, a disk that refuses.
        ConfigError: a shard size that cannot be read, a dtype that cannot be written.
        MergeError: factors that are not finite, a method that does not fold, a bias where the family has no place for
            one.
    """
    limit = _bytes(max_shard_size)
    dtype = None if dtype is None else float_dtype(dtype)
    tokenizer = None if tokenizer_from is None else Path(tokenizer_from)
    if tokenizer is not None and not tokenizer.is_dir():
        raise CheckpointError(f"no tokenizer directory at {tokenizer}")
    with new_directory(directory) as temporary:
        leaves, config = _complete(parameters(params), model, config)
        written = main_dtype(leaves) if dtype is None else dtype
        config = dataclasses.replace(config, dtype=np.dtype(written).name)
        _write_weights(temporary, _pieces(leaves, model, dtype), limit)
        text = json.dumps(families.write_config(config, model.task), indent=2) + "\n"
        (temporary / "config.json").write_text(text, encoding="utf-8")
        if tokenizer is not None:
            for file in (tokenizer / name for name in TOKENIZER_FILES):
                if file.is_file():
                    shutil.copyfile(file, temporary / file.name)
    return config


def _complete(
    leaves: dict[str, Parameter], model: families.Model, config: families.Config
) -> tuple[dict[str, Parameter], families.Config]:
    """Adds the zero biases that the family's flags ask for, and checks every shape against the config."""
    if type(config) is not type(model.config):
        raise ConfigError(f"a {type(config).__name__} does not belong to a {type(model).__name__}")
    expected = families.expected_leaves(model.clone(config=config))
    added = [path for path in leaves if path.endswith("/bias") and path not in expected]
    admitted = families.family_of(config.model_type).admit(config, added)
    if admitted != config:
        config, expected = admitted, families.expected_leaves(model.clone(config=admitted))
    leaves = dict(leaves)
    for path, leaf in expected.items():
        if path.endswith("/bias") and path not in leaves and path[:-4] + "kernel" in leaves:
            zeros = np.zeros(leaf.shape, leaves[path[:-4] + "kernel"].dtype)
            leaves[path] = of_array(zeros)
        if path not in leaves:
            raise CheckpointError(f"the parameters lack {path!r} of shape {leaf.shape}")
        if leaves[path].shape != leaf.shape:
            raise CheckpointError(f"parameter {path!r}: expected shape {leaf.shape}, found {leaves[path].shape}")
    for path in leaves:
        if path not in expected:
            raise CheckpointError(f"parameter {path!r} of shape {leaves[path].shape} has no place in the config")
    return leaves, config


def _pieces(leaves: Mapping[str, Parameter], model: families.Model, dtype: np.dtype | None) -> list[Piece]:
    pieces = []
    for path, tensors in families.tensors(model, leaves).items():
        leaf = leaves[path]
        kind = np.dtype(leaf.dtype if dtype is None else dtype)
        if kind not in NAMES:
            raise ConfigError(
                f"{path}: dtype {kind.name} cannot be written; give dtype=, one of {', '.join(map(str, NAMES))}"
            )
        for t in tensors:
            parts = functools.partial(_parts, t.name, leaf, t.layer, t.transposed, kind)
            pieces.append(Piece(t.name, t.shape(leaf.shape), kind, parts))
    return sorted(pieces, key=lambda piece: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", piece.name)])


def _parts(name: str, leaf: Parameter, layer: int | None, transposed: bool, kind: np.dtype) -> Iterator[np.ndarray]:
    for part in map(np.asarray, leaf.parts(layer, transposed, kind)):
        if kind == np.float16 and leaf.dtype != kind and not np.isfinite(part).all():
            raise ConfigError(f"{name}: numbers beyond 65504 are infinite in float16; write bfloat16 or float32")
        yield part


def _shards(pieces: list[Piece], limit: int) -> Iterator[list[Piece]]:
    shard, size = [], 0
    for piece in pieces:
        if shard and size + piece.nbytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(piece)
        size += piece.nbytes
    yield shard


def _write_weights(directory: Path, pieces: list[Piece], limit: int) -> None:
    shards = list(_shards(pieces, limit))
    if len(shards) == 1:
        names = [SINGLE]
    else:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        index = {
            "metadata": {"total_size": sum(piece.nbytes for piece in pieces)},
            "weight_map": {piece.name: name for name, shard in zip(names, shards, strict=True) for piece in shard},
        }
        text = json.dumps(index, indent=2) + "\n"
        (directory / INDEX).write_text(text, encoding="utf-8")
    for name, shard in zip(names, shards, strict=True):
        write_tensors(directory / name, shard)


def _bytes(size: int | str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B)?\s*", str(size), re.IGNORECASE)
    limit = int(float(match[1]) * UNITS[(match[2] or "B").upper()]) if match else 0
    if limit < 1:
        raise ConfigError(f"max_shard_size {size!r} is no size; write bytes or '5GB'")
    return limit
