"""A Hugging Face checkpoint directory as a model and its parameters."""

import functools
import itertools
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hadamax import quant
from hadamax.errors import CheckpointError, ConfigError, nearest
from hadamax.files import read_json
from hadamax.hf import families, hub
from hadamax.hf.names import Tensor, is_ignorable
from hadamax.quantized import QuantizedWeight
from hadamax.sharding import param_shardings
from hadamax.tensor_files import DTYPES, Stored, inside, stored_tensors
from hadamax.views import Axes

_LOG = logging.getLogger("hadamax")
_PART = 2**24  # bytes of a tensor that are read at a time; JAX keeps the last ones until its next call
ADAPTERS = {"adapter_config.json": "hx.hf.load_adapter", "hadamax_adapter.json": "hx.load_adapters"}
_LISTED = 6  # names of tensors in one line
# the config's sizes that become a dimension of a parameter
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
_SIZES += ("type_vocab_size", "num_labels")


def load_pretrained(
    source: str | Path,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    task: str | None = None,
    scan_layers: bool = True,
    quantize: str | None = None,
) -> tuple[families.Model, dict[str, Any], families.Config]:
    """Loads a model from a directory, or by hub id where no such directory exists.

    Reads `config.json` and `model.safetensors`, or the shards that `model.safetensors.index.json` names, tensor by
    tensor: beside the parameters, the host holds at most one tensor at a time. Linear weights become kernels
    `[in, out]`; layers are stacked unless `scan_layers=False`.

    Args:
        dtype: of the parameters and activations; as in the file where None.
        mesh: puts each parameter where `hx.param_shardings` says; each process reads only the parts that its devices
            hold. The model keeps its activations spread over the mesh. On the default device where None.
        task: which head: `"causal_lm"` for decoders, for encoders one of `hadamax.models.Encoder`'s; None takes what
            `architectures` in the file names. A head that the file lacks is initialised from a fixed key, and a warning
            of the logger `hadamax` says so; its classes are those of the config's `id2label`, or `num_labels`, or 2.
            Another warning names the tensors of heads that the task does not use.
        quantize: "int8" or "nf4" quantises the projections as `hx.quantize` does, each tensor as soon as it is read:
            beside the result, one matrix at a time is held unquantised. Call `hx.lazily(model.apply)` then.

    Returns:
        `(model, params, config)` with `model.apply(params, input_ids)` giving the task's output, logits for
        `"causal_lm"`.

    Raises:
        CheckpointError: a file that is missing or damaged, a tensor that is missing, unexpected or of another shape.
        ConfigError: an architecture, or a feature of one, that is not implemented; an unknown mesh axis; what
            `hx.quantize` raises.
    """
    dtype = None if dtype is None else float_dtype(dtype)
    directory = hub.directory_of(source)
    adapter = next((name for name in ADAPTERS if (directory / name).is_file()), None)
    if adapter is not None and not (directory / "config.json").exists():
        raise CheckpointError(f"{directory} holds an adapter: load its base, and then it with {ADAPTERS[adapter]}")
    try:
        config, task = families.read_config(read_json(inside(directory, "config.json")), task)
    except ConfigError as error:
        raise ConfigError(f"{directory / 'config.json'}: {error}") from None
    stored = stored_tensors(directory)
    _check_sizes(config, stored)
    model = families.build(config, task=task, scan_layers=scan_layers)
    leaves, found = match(model, stored, directory)
    if task in ("causal_lm", "masked_lm"):  # no other reads the head
        _check_tied(config, stored, directory)
    shardings = dict.fromkeys(leaves) if mesh is None else param_shardings(leaves, mesh)
    few_bits = {} if quantize is None else quant.selected(leaves, quantize, view=model.view)

    def read(path: str, tensors: Sequence[tuple[Tensor, Stored]]) -> Any:
        shape, sharding = leaves[path].shape, shardings[path]
        if quantize is None or path not in few_bits:
            return _read_leaf(shape, tensors, dtype, sharding)
        leaf = _read_quantized(shape, tensors, dtype, sharding, few_bits[path], quantize)
        return leaf if mesh is None else jax.device_put(leaf, param_shardings({path: leaf}, mesh)[path])

    params = {path: read(path, tensors) for path, tensors in found.items()}
    dtype = main_dtype(params) if dtype is None else dtype
    model = families.build(config, task=task, dtype=dtype, scan_layers=scan_layers, mesh=mesh)
    if fresh := [path for path in leaves if path not in params]:
        named = ", ".join(f"{path} {list(leaves[path].shape)}" for path in fresh)
        _LOG.warning("%s has no %s: newly initialised, to be trained", directory, named)
        params |= _fresh(model, {path: shardings[path] for path in fresh})
    return model, {"params": unflatten_dict({path: params[path] for path in leaves}, sep="/")}, config


def float_dtype(dtype: Any) -> np.dtype:
    """A floating dtype from its name or itself; `ConfigError` for anything else."""
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise ConfigError(f"dtype {dtype!r} is no floating type; use 'float32', 'bfloat16' or 'float16'")
    if found.itemsize > jax.dtypes.canonicalize_dtype(found).itemsize:
        raise ConfigError(f"dtype {dtype!r} has 64 bits, which JAX has only under jax.enable_x64(True); use 'float32'")
    return found


def flat(params: Mapping[str, Any]) -> dict[str, Any]:
    """A nested dict by "/"-joined paths."""
    return flatten_dict(params, sep="/")


def main_dtype(leaves: Mapping[str, Any]) -> np.dtype:
    """The dtype that most parameters have."""
    sizes = Counter[np.dtype]()
    for leaf in leaves.values():
        sizes[np.dtype(leaf.dtype)] += math.prod(leaf.shape)
    return sizes.most_common(1)[0][0]


def match(
    model: families.Model, stored: Mapping[str, Stored], directory: Path
) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, list[tuple[Tensor, Stored]]]]:
    """The parameters that a model asks for, and where the files have them, from the headers alone.

    Returns:
        All parameters by path; the tensors of each but a new head's.

    Raises:
        CheckpointError: two tensors for one place; one that is missing, has no place, or has another shape or dtype.
        ConfigError: numbers that no model can be built from.
    """
    config, family = model.config, families.family_of(model.config.model_type)
    try:
        with np.errstate(over="raise"):
            leaves = families.expected_leaves(model)
    except (OverflowError, FloatingPointError) as error:
        raise ConfigError(f"config.json of {directory} holds a number that is out of float32's range") from error
    plan = families.tensors(model, leaves)
    names: dict[str, str] = {}
    for name in stored:
        if (known := family.rename(name)) in names:
            raise CheckpointError(f"{directory} has {names[known]!r} and {name!r}, which are one tensor; remove one")
        names[known] = name
    held: dict[str, list[tuple[Tensor, Stored]]] = {}
    missing = []
    present = {path.split("/")[0] for path, ts in plan.items() if any(family.rename(t.name) in names for t in ts)}
    new = {*family.fresh(model.task)} - present
    for path, tensors in plan.items():
        absent = [tensor for tensor in tensors if family.rename(tensor.name) not in names]
        if path.split("/")[0] not in new:
            missing += [(tensor.name, tensor.shape(leaves[path].shape)) for tensor in absent]
            held[path] = [(t, stored[names[family.rename(t.name)]]) for t in tensors if t not in absent]
    if missing:
        total = sum(map(len, plan.values()))
        listed = ", ".join(f"{name!r} of shape {shape}" for name, shape in missing[:_LISTED])
        more = ", ..." * (len(missing) > _LISTED)
        near = nearest(missing[0][0], stored.keys() - {t.name for tensors in plan.values() for t in tensors}, n=1)
        raise CheckpointError(f"{directory} lacks {len(missing)} of {total} tensors: {listed}{more}{near}")
    expected = {
        names[family.rename(t.name)]: t.shape(leaves[path].shape) for path, tensors in held.items() for t, _ in tensors
    }
    unused, homeless = [], []
    for name, tensor in stored.items():
        where = f"tensor {name!r} in {tensor.path}"
        if name not in expected:
            (unused if family.ignorable(family.rename(name), config) else homeless).append(name)
        elif tensor.shape != expected[name]:
            raise CheckpointError(f"{where}: expected shape {expected[name]}, found {tensor.shape}")
        elif tensor.dtype not in DTYPES:
            raise CheckpointError(
                f"{where}: dtype {tensor.dtype!r} is not implemented; implemented: {', '.join(DTYPES)}"
            )
    if homeless:
        listed = ", ".join(f"{name!r} of shape {stored[name].shape}" for name in homeless[:_LISTED])
        more = ", ..." * (len(homeless) > _LISTED)
        raise CheckpointError(
            f"{directory} has {len(homeless)} tensors that are not in the architecture of config.json: {listed}{more}"
        )
    if unused := [name for name in unused if not is_ignorable(name, tied=True)]:
        first = ", ".join(map(repr, unused[:_LISTED])) + ", ..." * (len(unused) > _LISTED)
        _LOG.warning("%s: %d tensors are not used for %s: %s", directory, len(unused), model.task, first)
    size = sum(math.prod(tensor.shape) for tensor in stored.values())
    for path in leaves.keys() - held.keys():
        if math.prod(leaves[path].shape) > size:
            raise ConfigError(
                f"{path}: config.json asks for a new head of shape {leaves[path].shape}, larger than the file"
            )
    return leaves, held


def _check_sizes(config: families.Config, stored: Mapping[str, Stored]) -> None:
    """Refuses sizes that the files cannot have, before a model is built from them, with work that grows with them."""
    largest = max((math.prod(tensor.shape) for tensor in stored.values()), default=0)
    limits = {"num_hidden_layers": len(stored)} | dict.fromkeys(_SIZES, largest)
    for name, limit in limits.items():
        if (size := getattr(config, name, 0)) > limit:
            what = "tensors" if name == "num_hidden_layers" else "numbers in the largest tensor"
            raise CheckpointError(f"config.json says {name} {size}, but the files have only {limit} {what}")


def _check_tied(config: families.Config, stored: Mapping[str, Stored], directory: Path) -> None:
    """Refuses a head that config.json ties to the embedding though it holds other numbers: transformers 5 unties it."""
    if not getattr(config, "tie_word_embeddings", True):
        return
    known = {families.family_of(config.model_type).rename(name): name for name in stored}
    heads = ("lm_head.weight", "cls.predictions.decoder.weight", "lm_head.decoder.weight")
    tables = (name for name in known if name.endswith(("embed_tokens.weight", "word_embeddings.weight")))
    for table, head in itertools.product(tables, heads):
        if head not in known:
            continue
        one, other = stored[known[table]], stored[known[head]]
        if not {one.dtype, other.dtype} <= DTYPES.keys() or not one.shape:
            continue  # `match` refuses it
        rows = max(1, _PART // max(1, one.nbytes // max(1, one.shape[0])))
        same = one.shape == other.shape and all(
            np.array_equal(one.read((slice(at, at + rows),)), other.read((slice(at, at + rows),)))
            for at in range(0, one.shape[0], rows)
        )
        if not same:
            way = "set tie_word_embeddings to false there, or " * hasattr(config, "tie_word_embeddings")
            raise CheckpointError(
                f"{directory}: {known[head]!r} differs from {known[table]!r}, to which config.json ties it; {way}remove"
                " the tensor"
            )


def _read_leaf(
    shape: tuple[int, ...],
    tensors: Sequence[tuple[Tensor, Stored]],
    dtype: np.dtype | None,
    sharding: NamedSharding | None,
) -> jax.Array:
    """One parameter, its tensors turned, cast and put in their places on the device, one after the other."""
    if dtype is None:
        dtype = jnp.result_type(*(DTYPES[stored.dtype] for _, stored in tensors))
    first, stored = tensors[0]
    part = None if sharding is None else _sharding_in_file(sharding, first, len(stored.shape))
    if first.layer is None and not first.transposed and DTYPES[stored.dtype] == dtype:
        return _put(stored, part)
    leaf = jnp.zeros(shape, dtype, device=sharding)
    for tensor, stored in tensors:
        spread = part is not None and part.num_devices > 1
        parts = 1 if spread else math.ceil(stored.nbytes / _PART) or 1
        rows = math.ceil(stored.shape[0] / parts)
        for row in range(0, stored.shape[0], rows):
            # no name for the piece, and a wait: it is done with before the next is read
            leaf = _filled(
                leaf, _put(stored, part, slice(row, row + rows)), tensor.layer, row, transposed=tensor.transposed
            ).block_until_ready()
    return leaf


def _read_quantized(
    shape: tuple[int, ...],
    tensors: Sequence[tuple[Tensor, Stored]],
    dtype: np.dtype | None,
    sharding: NamedSharding | None,
    axes: Axes,
    kind: str,
) -> QuantizedWeight:
    """One parameter, each of its tensors quantised before the next is read."""
    if dtype is None:
        dtype = jnp.result_type(*(DTYPES[stored.dtype] for _, stored in tensors))
    if axes[0][0] != "b":
        return quant.quantize_kernel(_read_leaf(shape, tensors, dtype, sharding), axes, kind)
    if sharding is not None:
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    layers = []
    for tensor, stored in sorted(tensors, key=lambda pair: pair[0].layer or 0):
        matrix = _read_leaf(shape[1:], [(tensor._replace(layer=None), stored)], dtype, sharding)
        layers.append(jax.block_until_ready(quant.quantize_kernel(matrix, axes[1:], kind).array))
    return QuantizedWeight(jax.tree.map(lambda *parts: jnp.stack(parts), *layers), axes)


def _put(stored: Stored, sharding: NamedSharding | None, rows: slice = slice(None)) -> jax.Array:
    """The tensor on its devices, or some rows of it on one device."""

    def read(index: Any) -> np.ndarray:
        value = stored.read(index)
        return value.astype(jax.dtypes.canonicalize_dtype(value.dtype), copy=False)  # float64 may be disabled

    if sharding is None or sharding.num_devices == 1:
        return jax.device_put(read((rows,)), sharding)
    parts: dict[Any, np.ndarray] = {}  # devices that hold the same part share one read

    def once(index: Any) -> np.ndarray:
        bounds = tuple((part.start, part.stop) for part in index)
        return parts[bounds] if bounds in parts else parts.setdefault(bounds, read(index))

    return jax.make_array_from_callback(stored.shape, sharding, once)


def _sharding_in_file(sharding: NamedSharding, tensor: Tensor, ndim: int) -> NamedSharding:
    axes = [*sharding.spec, *[None] * (ndim + 1)]
    axes = axes[:ndim] if tensor.layer is None else axes[1 : ndim + 1]
    return NamedSharding(sharding.mesh, PartitionSpec(*(axes[::-1] if tensor.transposed else axes)))


@functools.partial(jax.jit, static_argnames="transposed", donate_argnums=0)
def _filled(leaf: jax.Array, piece: jax.Array, layer: int | None, row: int, *, transposed: bool) -> jax.Array:
    """The leaf, in its own memory, with some rows of a tensor put in; they are columns where it is transposed."""
    value = jax.lax.convert_element_type(piece.T if transposed else piece, leaf.dtype)
    starts = [0, row] if transposed else [row, *[0] * (value.ndim - 1)]
    if layer is not None:
        value, starts = jax.lax.expand_dims(value, (0,)), [layer, *starts]
    return jax.lax.dynamic_update_slice(leaf, value, starts, allow_negative_indices=False)


def _fresh(model: families.Model, shardings: Mapping[str, NamedSharding | None]) -> dict[str, jax.Array]:
    """The parameters at these paths as the model itself initialises them; XLA drops the others."""

    def init(key: jax.Array) -> dict[str, jax.Array]:
        params = flat(model.init(key, jnp.zeros((1, 1), jnp.int32))["params"])
        return {path: params[path] for path in shardings}

    return jax.jit(init, out_shardings=dict(shardings))(jax.random.key(0))
