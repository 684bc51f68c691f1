"""A Hugging Face checkpoint directory as a model and its parameters."""

import json
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from hadamax.errors import CheckpointError, ConfigError, nearest
from hadamax.hf import families
from hadamax.hf.names import Tensor, is_ignorable

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}


def load_pretrained(
    source: str | Path, *, dtype: Any = None, task: str | None = None, scan_layers: bool = True
) -> tuple[families.Model, dict[str, Any], families.Config]:
    """Loads a model from a directory, or by hub id where no such directory exists.

    Reads `config.json` and `model.safetensors`, or the shards that `model.safetensors.index.json` names, tensor by
    tensor. Linear weights become kernels `[in, out]`; layers are stacked unless `scan_layers=False`.

    Args:
        dtype: of the parameters and activations; as in the file where None.
        task: which head: `"causal_lm"`; what `architectures` in the file names where None.

    Returns:
        `(model, params, config)` with `model.apply(params, input_ids)` giving logits.

    Raises:
        CheckpointError: a file that is missing or damaged, a tensor that is missing, unexpected or of another shape.
        ConfigError: an architecture, or a feature of one, that is not implemented.
    """
    dtype = None if dtype is None else float_dtype(dtype)
    directory = _directory(source)
    config, task = families.read_config(read_json(directory / "config.json"), task)
    files = _TensorFiles(directory)
    model = families.build(config, task=task, scan_layers=scan_layers)
    leaves, plan = families.expected_leaves(model), families.tensors(model)
    # names and shapes are checked from the headers, before anything is read
    files.check({t.name: t.shape(leaves[path].shape) for path, tensors in plan.items() for t in tensors}, config)
    params = {path: _read_leaf(files, leaves[path].shape, tensors, dtype) for path, tensors in plan.items()}
    dtype = params["embed_tokens/embedding"].dtype if dtype is None else dtype
    model = families.build(config, task=task, dtype=dtype, scan_layers=scan_layers)
    return model, {"params": unflatten_dict(params, sep="/")}, config


def float_dtype(dtype: Any) -> np.dtype:
    """A floating dtype from its name or itself; `ConfigError` for anything else."""
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise ConfigError(f"dtype {dtype!r} is no floating type; use 'float32', 'bfloat16' or 'float16'")
    return found


def flat(params: Mapping[str, Any]) -> dict[str, Any]:
    """A nested dict by "/"-joined paths."""
    return flatten_dict(params, sep="/")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; `CheckpointError` with the line number where it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not valid JSON: line {error.lineno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text: byte {error.start}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(value).__name__}")
    return value


def _directory(source: str | Path) -> Path:
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{source} is a file; give the directory that holds config.json and the weights")
    if path.is_absolute() or str(source).startswith((".", "~")) or str(source).count("/") > 1:  # no hub id looks so
        raise CheckpointError(f"no directory at {source}")
    from huggingface_hub import snapshot_download  # slow to import, and only needed here

    try:
        return Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"]))
    except Exception as error:  # the hub client raises dozens of kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{str(source)!r} is not a directory here and could not be fetched from the hub: {reason}"
        ) from error


class _TensorFiles:
    """The tensors of a checkpoint by name, whichever file holds them."""

    def __init__(self, directory: Path):
        self.directory = directory
        index = directory / "model.safetensors.index.json"
        self.handles = {}
        if (directory / "model.safetensors").is_file():
            handle = self._open("model.safetensors")
            self.files = dict.fromkeys(handle.keys(), "model.safetensors")
        elif index.is_file():
            self.files = _read_index(index)
            for file in sorted(set(self.files.values())):
                held = set(self._open(file).keys())
                absent = sorted(name for name, f in self.files.items() if f == file and name not in held)
                if absent:
                    raise CheckpointError(
                        f"{directory / file} lacks tensor {absent[0]!r}, which {index.name} puts there"
                    )
        else:
            found = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".safetensors", ".gguf"))
            raise CheckpointError(
                f"{directory} holds neither model.safetensors nor model.safetensors.index.json"
                + (f"; found {', '.join(found)}: convert with transformers' save_pretrained" if found else "")
            )

    def _open(self, file: str):
        path = self.directory / file
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, though the index names it")
        try:
            self.handles[file] = safe_open(path, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged or incomplete: {_line(error)}") from error
        return self.handles[file]

    def check(self, expected: Mapping[str, tuple[int, ...]], config: families.Config) -> None:
        """Compares names, shapes and dtypes with the expected ones."""
        missing = [name for name in expected if name not in self.files]
        if missing:
            raise CheckpointError(
                f"{self.directory} lacks {len(missing)} of {len(expected)} tensors, first {missing[0]!r} of shape "
                f"{expected[missing[0]]}{nearest(missing[0], self.files.keys() - expected.keys(), n=1)}"
            )
        for name, file in self.files.items():
            if name not in expected and is_ignorable(name, config.tie_word_embeddings):
                continue
            found, dtype = tuple(self._header(name).get_shape()), self._header(name).get_dtype()
            where = f"tensor {name!r} in {self.directory / file}"
            if name not in expected:
                raise CheckpointError(f"{where}: not in the architecture of config.json, found shape {found}")
            if found != expected[name]:
                raise CheckpointError(f"{where}: expected shape {expected[name]}, found {found}")
            if dtype not in DTYPES:
                raise CheckpointError(f"{where}: dtype {dtype} is not implemented; implemented: {', '.join(DTYPES)}")

    def dtype(self, tensor: Tensor) -> np.dtype:
        return np.dtype(DTYPES[self._header(tensor.name).get_dtype()])

    def read(self, tensor: Tensor) -> np.ndarray:
        """The tensor in our orientation, `[in, out]` for a kernel."""
        try:
            value = self.handles[self.files[tensor.name]].get_tensor(tensor.name)
        except (SafetensorError, OSError) as error:
            path = self.directory / self.files[tensor.name]
            raise CheckpointError(f"cannot read tensor {tensor.name!r} from {path}: {_line(error)}") from error
        return value.T if tensor.transposed else value

    def _header(self, name: str):
        return self.handles[self.files[name]].get_slice(name)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map of tensor names to files")
    for name, file in weight_map.items():
        # the text is judged, not the resolved path: the hub's cache links its files to elsewhere
        if not isinstance(file, str) or not file or PurePath(file).is_absolute() or ".." in PurePath(file).parts:
            raise CheckpointError(f"{path} puts tensor {name!r} into {file!r}, which is no file inside the directory")
    return weight_map


def _read_leaf(files: _TensorFiles, shape: tuple[int, ...], tensors: list[Tensor], dtype: Any) -> jax.Array:
    if dtype is None:
        dtype = jnp.result_type(*(files.dtype(tensor) for tensor in tensors))
    if tensors[0].layer is None:
        return jnp.asarray(files.read(tensors[0]).astype(dtype))
    stacked = np.empty(shape, dtype)
    for tensor in tensors:
        stacked[tensor.layer] = files.read(tensor)
    return jnp.asarray(stacked)
