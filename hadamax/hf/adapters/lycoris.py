"""LyCORIS files: LoHa (and plain LoRA) by flattened module names, with a scalar `alpha` for each module.

    lycoris_model_layers_0_self_attn_q_proj.hada_w1_a [out, r], .hada_w1_b [r, in], .hada_w2_a, .hada_w2_b, .alpha

The scale is that of LyCORIS's forward, `alpha / r` (its merge applies the scale twice). Source: lycoris-lora 4.1,
`modules/loha.py`, `modules/locon.py`.
"""

from pathlib import Path
from typing import Any

import numpy as np

from hadamax import paths
from hadamax.adapter import Factors
from hadamax.errors import CheckpointError, ConfigError
from hadamax.hf import families
from hadamax.hf.adapters.peft_methods import entry
from hadamax.hf.adapters.sites import Entry, Site, assemble, sites
from hadamax.hf.adapters.tensors import read_safetensors
from hadamax.inject import Injection

KINDS = {
    "LOHA": {"hada_w1_b": "a1", "hada_w1_a": "b1", "hada_w2_b": "a2", "hada_w2_a": "b2"},
    "LORA": {"lora_down.weight": "a", "lora_up.weight": "b"},
}


def load(path: Path, model: families.Model, params: Any) -> tuple[Injection, dict[str, Factors]]:
    """An injection and its adapters from a file.

    Raises:
        CheckpointError: another algorithm's file, modules that the model lacks or that are not the only one of a name.
    """
    modules: dict[str, dict[str, np.ndarray]] = {}
    for key, value in read_safetensors(path).items():
        name, _, part = key.partition(".")
        modules.setdefault(name, {})[part] = value
    known = sites(model, paths.leaves(params))
    entries = {}
    for name, module in _resolved(list(modules), known, path).items():
        entries[module] = _entry(modules[name], module, known[module], path)
    return assemble(model, params, entries, path)


def _entry(parts: dict[str, np.ndarray], module: str, site: Site, path: Path) -> Entry:
    parts = dict(parts)
    alpha = parts.pop("alpha", None)
    kind = next((kind for kind, names in KINDS.items() if names.keys() & parts.keys()), None)
    if kind is None or (other := sorted(parts.keys() - KINDS[kind].keys())):
        found = sorted(parts) if kind is None else other
        raise CheckpointError(
            f"{path}: {module} holds {', '.join(found) or 'no factors'}; implemented: LyCORIS's LoHa and LoRA of linear"
            " layers"
        )
    names = KINDS[kind]
    first = parts.get("hada_w1_b" if kind == "LOHA" else "lora_down.weight")
    if alpha is not None and alpha.size != 1:
        raise CheckpointError(f"{path}: {module}.alpha should be one number, found shape {alpha.shape}")
    # LyCORIS takes an alpha that is absent or 0 for the rank
    scale = 0.0 if alpha is None else float(alpha.reshape(())[()])
    if not np.isfinite(scale):
        raise ConfigError(f"{path}: {module}.alpha is {scale}")
    rank = first.shape[0] if first is not None and first.ndim else 1
    config = {"peft_type": kind, "alpha": scale or rank}
    return entry(
        config, module, site, {names[part]: (f"{module}.{part}", value) for part, value in parts.items()}, path
    )


def _resolved(names: list[str], known: dict[str, Site], path: Path) -> dict[str, str]:
    """The module of each name: its path with `_` for `.`, after a prefix that all names share."""
    flat: dict[str, list[str]] = {}
    for module in known:
        flat.setdefault(module.replace(".", "_"), []).append(module)
    prefixes = [names[0][: -len(end)] for end in flat if names and names[0].endswith(end)]
    prefixes = [p for p in prefixes if all(name.startswith(p) and name[len(p) :] in flat for name in names)]
    if not prefixes:
        raise CheckpointError(
            f"{path}: {names[0] if names else 'no tensor'!r} is no LyCORIS name of a module of this model, such as"
            f" {'lycoris_' + next(iter(flat))!r}"
        )
    prefix = min(prefixes, key=len)
    for name in names:
        if len(modules := flat[name[len(prefix) :]]) > 1:
            raise CheckpointError(f"{path}: {name!r} may be any of {', '.join(modules)}")
    return {name: flat[name[len(prefix) :]][0] for name in names}
