"""Base leaves that PEFT trained along with an adapter: `modules_to_save`, biases, embeddings that it copies."""

from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any

import jax.numpy as jnp
import numpy as np

from hadamax import paths
from hadamax.errors import CheckpointError, ConfigError, nearest
from hadamax.hf import families
from hadamax.hf.adapters import peft_config
from hadamax.hf.adapters.peft_methods import TYPES
from hadamax.hf.adapters.sites import Entry, is_tied, refuse_tied
from hadamax.hf.names import Tensor

PREFIX = "base_model.model."
HEAD = "lm_head.weight"


def read(tensors: Mapping[str, tuple[str, np.ndarray]], model: families.Model, params: Any, where: object) -> Any:
    """The base leaves that the file holds, the others None. Layers that it does not hold are those of `params`."""
    leaves, tensors = paths.leaves(params), dict(tensors)
    known = {t.name: (path, t) for path, ts in families.tensors(model, leaves).items() for t in ts}
    for name in [name for name in tensors if name in known and is_tied(model, known[name][0])]:
        # lookup and head, each saved by PEFT as a module of its own, are one matrix only if they are equal
        if HEAD not in tensors or not np.array_equal(tensors.pop(HEAD)[1], tensors[name][1]):
            refuse_tied(model, known[name][0], where)
    for name in [name for name in tensors if name not in known]:
        # transformers names the bias of a masked-LM head a second time
        twin = tensors.get(name.replace(".decoder.bias", ".bias"))
        if twin is not None and twin is not tensors[name] and np.array_equal(twin[1], tensors[name][1]):
            del tensors[name]
    if unknown := [name for name in tensors if name not in known]:
        raise CheckpointError(
            f"{where} holds {len(unknown)} tensors that are neither factors nor the model's, first"
            f" {tensors[unknown[0]][0]!r}{nearest(unknown[0], known, n=1)}"
        )
    found: dict[str, list[tuple[Tensor, np.ndarray]]] = {}
    for name, (key, value) in tensors.items():
        path, tensor = known[name]
        if value.shape != (expected := tensor.shape(leaves[path].shape)):
            raise CheckpointError(f"{where}: tensor {key!r}: expected shape {expected}, found {value.shape}")
        value = value.T if tensor.transposed else value
        if ".base_layer." in key and np.array_equal(value, np.asarray(leaves[path]).astype(value.dtype)):
            continue  # PEFT copies embeddings that it adapts
        found.setdefault(path, []).append((tensor, value))
    trained = {}
    for path, pieces in found.items():
        if pieces[0][0].layer is None:
            trained[path] = jnp.asarray(pieces[0][1])
            continue
        whole = len(pieces) == leaves[path].shape[0]
        dtype = np.result_type(*(value.dtype for _, value in pieces), *([] if whole else [leaves[path].dtype]))
        stacked = np.array(leaves[path]).astype(dtype)
        for tensor, value in pieces:
            stacked[tensor.layer] = value
        trained[path] = jnp.asarray(stacked)
    return paths.map_leaves(lambda path, _: trained.get(path), params)


def write(
    base: Any, model: families.Model, leaves: Mapping[str, Any], entries: Mapping[str, Entry]
) -> tuple[list[str], str, dict[str, np.ndarray]]:
    """`modules_to_save`, the `bias` option, and the tensors of the trained base leaves."""
    tensors: dict[str, np.ndarray] = {}
    plan = families.tensors(model, leaves)
    for path, leaf in paths.leaves({} if base is None else base).items():
        if path not in plan:
            raise ConfigError(f"base leaf {path!r} is no parameter of the model{nearest(path, plan, n=1)}")
        if tuple(np.shape(leaf)) != tuple(leaves[path].shape):
            raise ConfigError(f"base leaf {path!r}: expected shape {leaves[path].shape}, found {np.shape(leaf)}")
        array = np.asarray(leaf)
        for tensor in plan[path]:
            value = array if tensor.layer is None else array[tensor.layer]
            tensors[tensor.name] = np.ascontiguousarray(value.T if tensor.transposed else value)
        if is_tied(model, path):
            if model.task != "causal_lm":
                refuse_tied(model, path, "save_adapter")
            tensors[HEAD] = array  # PEFT unties what it saves
    everything = _by_module([*(tensor.name for ts in plan.values() for tensor in ts), *tensors])
    held = _by_module(tensors)
    saved, biases = [], []
    for module, parts in held.items():
        head = module.partition(".")[0]
        whole = head if head in peft_config.HEADS else module
        lacking = [
            f"{name}.{part}"
            for name in everything
            if f"{name}.".startswith(f"{whole}.")
            for part in sorted(everything[name] - held.get(name, set()))
        ]
        tied_head = model.task == "masked_lm" and head in ("cls", "lm_head")  # PEFT would ask for the shared table
        if module not in entries and not lacking and not tied_head:
            saved.append(whole)
        elif parts == {"bias"}:
            biases.append(module)
        elif module in entries:
            raise ConfigError(
                f"PEFT cannot train the weight of {module!r}, which is adapted; merge, or use hx.save_adapters"
            )
        else:
            raise ConfigError(
                f"PEFT saves whole modules, and base lacks {[*lacking, 'the tied table'][0]!r} beside {module!r}; train"
                " both, or use hx.save_adapters"
            )
    kind = TYPES[next(iter(entries.values())).config["method"]]
    if biases and kind not in ("LORA", "GRALORA"):
        raise ConfigError(f"PEFT has no trained biases beside {kind}, found {biases[0]!r}; use hx.save_adapters")
    own = [name for name in entries if "bias" in everything[name]]
    bias = "none" if not biases else "only" if sorted(biases) == sorted(own) else "all"
    prefixes = {prefix for name in everything for prefix in accumulate(name.split("."), "{}.{}".format)}
    names = peft_config.shortest(saved, [name for name in prefixes if name not in saved], "")
    keys = {
        name: name[: -len("bias")] + "base_layer.bias" if name.removesuffix(".bias") in entries else name
        for name in tensors
    }
    return names, bias, {PREFIX + keys[name]: value for name, value in tensors.items()}


def _by_module(names: Iterable[str]) -> dict[str, set[str]]:
    """`{module: {"weight", "bias"}}`."""
    found: dict[str, set[str]] = {}
    for name in names:
        module, _, part = name.rpartition(".")
        found.setdefault(module, set()).add(part)
    return found
