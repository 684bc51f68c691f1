"""Hadamard-product (element-wise, not the transform) adapters for fine-tuning transformers in JAX."""

import importlib
from typing import TYPE_CHECKING, Any

from hadamax.adapter import Adapter, Linear
from hadamax.compose import add, chain, scaled
from hadamax.config import METHODS, adapter_from_config
from hadamax.errors import (
    CheckpointError,
    ConfigError,
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
from hadamax.weight import LazyWeight

if TYPE_CHECKING:
    from hadamax import checkpoint as checkpoint
    from hadamax import generate as generate
    from hadamax import hf as hf
    from hadamax import models as models

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "Adapter",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "HadamaxError",
    "Injection",
    "LazyWeight",
    "Linear",
    "MergeError",
    "NoMatchError",
    "NotAMatrixError",
    "ViewError",
    "abba",
    "adapter_from_config",
    "add",
    "at",
    "boha",
    "chain",
    "dora",
    "from_config",
    "gralora",
    "hadamard_adapter",
    "hira",
    "ia3",
    "inject",
    "join",
    "lazily",
    "loha",
    "lora",
    "scaled",
    "split",
    "trainable_mask",
]


def __getattr__(name: str) -> Any:
    """Load the parts that need flax, orbax or transformers only when they are used."""
    if name in ("checkpoint", "generate", "hf", "models"):
        return importlib.import_module(f"hadamax.{name}")
    raise AttributeError(f"module 'hadamax' has no attribute {name!r}")
