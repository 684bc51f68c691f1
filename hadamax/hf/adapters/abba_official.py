"""Checkpoints of ABBA's official code (github.com/CERT-Lab/abba): `adapter_config.json` and `adapter_model.bin`.

    <module>.lora_A1.default [r1, in], .lora_B1.default [out, r1], .lora_A2.default [r2, in], .lora_B2.default [out, r2]

The code multiplies each second factor by `sqrt(alpha_i)`, so that s = sqrt(alpha1 alpha2), with no division by a rank:
not the paper's `alpha^2 / sqrt(r1 r2)`. Its dropout, `bias` and `modules_to_save` have no effect there, nor here.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hadamax import paths
from hadamax.adapter import Factors
from hadamax.errors import CheckpointError, ConfigError, HadamaxError
from hadamax.hf import families
from hadamax.hf.adapters.sites import Entry, Site, assemble, factor_shapes, located, sites
from hadamax.inject import Injection

FACTORS = {"A1": "a1", "B1": "b1", "A2": "a2", "B2": "b2"}
PREFIXES = ("", "model.", "base_model.model.", "base_model.")  # of what the code wraps the model in


def load(
    config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], model: families.Model, params: Any, where: Path
) -> tuple[Injection, dict[str, Factors]]:
    """An injection and its adapters from the two files' content.

    Raises:
        CheckpointError: tensors that are missing, of another shape, or of modules that the model lacks.
        ConfigError: an alpha that is no positive number.
    """
    scale = 1.0
    for name in ("alpha1", "alpha2"):
        alpha = config.get(name)
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1e300:
            raise ConfigError(f"{where}: {name} must be a positive number, found {alpha!r}")
        scale *= math.sqrt(alpha)
    modules: dict[str, dict[str, np.ndarray]] = {}
    for key, value in tensors.items():
        found = re.fullmatch(r"(.+)\.lora_([AB][12])\.[^.]+", key)
        if not found:
            raise CheckpointError(f"{where}: tensor {key!r} is none of ABBA's lora_A1, lora_B1, lora_A2, lora_B2")
        if found[2] in modules.setdefault(found[1], {}):
            raise CheckpointError(f"{where} holds two adapters of {found[1]!r}; keep one")
        modules[found[1]][found[2]] = value
    known = sites(model, paths.leaves(params))
    prefix = next((p for p in PREFIXES if all(m.startswith(p) and m[len(p) :] in known for m in modules)), "")
    modules = {name.removeprefix(prefix): parts for name, parts in modules.items()}
    entries = {
        name: _entry(parts, scale, name, site, where)
        for (name, parts), site in zip(modules.items(), located(model, params, modules, where), strict=True)
    }
    return assemble(model, params, entries, where)


def _entry(parts: Mapping[str, np.ndarray], scale: float, module: str, site: Site, where: Path) -> Entry:
    if missing := [name for name in FACTORS if name not in parts]:
        raise CheckpointError(f"{where} lacks tensor '{module}.lora_{missing[0]}'")
    r1, r2 = (parts[name].shape[0] if parts[name].ndim == 2 else 0 for name in ("A1", "A2"))
    config = {"method": "abba", "r1": r1, "r2": r2, "scale": scale}
    try:
        expected = factor_shapes(tuple(config.items()), site.shape)
    except HadamaxError as error:
        raise type(error)(f"{where}: {module}: {error}") from None
    for name, ours in FACTORS.items():
        if parts[name].shape != expected[ours][::-1]:
            raise CheckpointError(
                f"{where}: tensor '{module}.lora_{name}': expected shape {expected[ours][::-1]},"
                f" found {parts[name].shape}"
            )
    return Entry(config, {ours: parts[name].T for name, ours in FACTORS.items()})
