"""Hadamard-product (element-wise, not the transform) adapters for fine-tuning transformers in JAX."""

import importlib
from typing import TYPE_CHECKING, Any

from hadamax import convert
from hadamax.adapter import Adapter, Linear
from hadamax.compose import add, chain, scaled
from hadamax.config import METHODS, adapter_from_config
from hadamax.errors import (
    BaseMismatchError,
    CheckpointError,
    ConfigError,
    ConversionError,
    DataError,
    HadamaxError,
    MergeError,
    NoMatchError,
    NotAMatrixError,
    ViewError,
)
from hadamax.freeze import join, split, trainable_mask
from hadamax.inject import Injection, at, from_config, inject
from hadamax.lazy import lazily
from hadamax.methods import abba, boha, dora, gralora, hadamard_adapter, hira, ia3, loha, lora
from hadamax.native import load_adapters, save_adapters
from hadamax.quant import dequantize, quantization_error, quantize
from hadamax.quantized import QuantizedWeight
from hadamax.sharding import batch_sharding, make_mesh, param_shardings
from hadamax.version import __version__ as __version__
from hadamax.weight import LazyWeight

if TYPE_CHECKING:
    from hadamax import checkpoint as checkpoint
    from hadamax import generate as generate
    from hadamax import hf as hf
    from hadamax import models as models

__all__ = [
    "METHODS",
    "Adapter",
    "BaseMismatchError",
    "CheckpointError",
    "ConfigError",
    "ConversionError",
    "DataError",
    "HadamaxError",
    "Injection",
    "LazyWeight",
    "Linear",
    "MergeError",
    "NoMatchError",
    "NotAMatrixError",
    "QuantizedWeight",
    "ViewError",
    "abba",
    "adapter_from_config",
    "add",
    "at",
    "batch_sharding",
    "boha",
    "chain",
    "convert",
    "dequantize",
    "dora",
    "from_config",
    "gralora",
    "hadamard_adapter",
    "hira",
    "ia3",
    "inject",
    "join",
    "lazily",
    "load_adapters",
    "loha",
    "lora",
    "make_mesh",
    "param_shardings",
    "quantization_error",
    "quantize",
    "save_adapters",
    "scaled",
    "split",
    "trainable_mask",
]


def __getattr__(name: str) -> Any:
    """Load the parts that need flax, orbax or transformers only when they are used."""
    if name in ("checkpoint", "generate", "hf", "models"):
        return importlib.import_module(f"hadamax.{name}")
    raise AttributeError(f"module 'hadamax' has no attribute {name!r}")
