"""Small tensor files of other projects as numpy arrays; nothing in them is executed."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hadamax.errors import CheckpointError
from hadamax.files import check_file
from hadamax.tensor_files import DTYPES, read_header


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file by name.

    Raises:
        CheckpointError: a file that is damaged, or holds numbers that are not floating point.
    """
    tensors = {}
    for name, stored in read_header(path).items():
        if stored.dtype not in DTYPES:
            raise CheckpointError(f"{path}: tensor {name!r} has dtype {stored.dtype}; floating point is expected")
        tensors[name] = stored.read()
    return tensors


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a PyTorch pickle, read with `weights_only=True`.

    Raises:
        CheckpointError: no PyTorch, or a pickle that holds more than tensors.
    """
    check_file(path)
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f"{path} is a pickle, which only PyTorch reads safely: install torch, or convert it to safetensors"
        ) from None
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds; whatever the file made it raise, the file is at fault
        raise CheckpointError(f"{path} is no file of tensors, and was not executed: {_line(error)}") from None
    if not isinstance(loaded, Mapping) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise CheckpointError(f"{path} must hold named tensors, found {type(loaded).__name__}")
    tensors = {}
    for name, value in loaded.items():
        dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        if value.layout != torch.strided or value.dtype not in dtypes:
            raise CheckpointError(f"{path}: tensor {name!r} has dtype {value.dtype}; floating point is expected")
        value = value.detach().resolve_neg()
        # a view may claim more entries than its storage has, and be expanded by what follows
        if value.device.type != "cpu" or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise CheckpointError(f"{path}: tensor {name!r} of shape {tuple(value.shape)} claims numbers it has not")
        tensors[str(name)] = (value if value.dtype == torch.float64 else value.float()).numpy()
    return tensors


def _line(error: Exception) -> str:
    """The first sentence of a message that may run over many lines."""
    return (" ".join(str(error).split()) or type(error).__name__).split(". ")[0][:200]
