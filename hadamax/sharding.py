"""Where arrays lie on a mesh with axes among `data`, `fsdp` and `tensor`: parameters by their paths, batches by rows.

Projections that split a layer's inner width (queries, keys, values, the first of an MLP) hold its columns, those that
join it again its rows (Megatron, arXiv:1909.08053), so that a pair needs one reduction over `tensor`; `fsdp` takes the
other axis.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from hadamax import paths
from hadamax.errors import ConfigError
from hadamax.quantized import is_quantized

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the axes over which the rows of a batch are spread
# module path -> mesh axis of the last two axes of its kernel [in, out] or embedding [rows, width]
RULES = (
    (r"([qkv]|gate|up)_proj|query|key|value|intermediate/dense|lm_head", ("fsdp", "tensor")),
    (r"(o|down)_proj|output/dense", ("tensor", "fsdp")),
    (r"embed_tokens|\w+_embeddings", ("tensor", "fsdp")),
)


def make_mesh(*, data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all devices (of all processes) whose axes the compiler spreads computations over by itself.

    Args:
        data: groups of devices that hold whole copies of what `fsdp` and `tensor` split.
        fsdp: devices that split parameters and rows of the batch; a layer's weights are gathered when it runs.
        tensor: devices that split the widths of layers; they exchange activations, so keep them near each other.
        devices: `jax.devices()` where None. One of the three sizes may be -1: as many as there are devices for.

    Raises:
        ConfigError: sizes that are no positive integers, or that do not make the number of devices.

    Example:
        >>> dict(make_mesh(devices=jax.devices()[:1]).shape)
        {'data': 1, 'fsdp': 1, 'tensor': 1}
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    asked = "mesh " + ", ".join(f"{name} {size}" for name, size in sizes.items())
    if any(type(size) is not int or (size < 1 and size != -1) for size in sizes.values()):
        raise ConfigError(f"{asked}: sizes must be positive integers, or -1 for the rest of the devices")
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ConfigError(f"{asked}: only one size may be -1")
    taken = math.prod(size for size in sizes.values() if size != -1)
    if free and len(devices) % taken == 0:
        sizes[free[0]] = len(devices) // taken
    if math.prod(sizes.values()) != len(devices):
        raise ConfigError(f"{asked}: does not make {len(devices)}, the number of devices")
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over `data` and `fsdp`, every other axis whole.

    Example:
        >>> batch_sharding(make_mesh(devices=jax.devices()[:1])).spec
        P(('data', 'fsdp'),)
    """
    return NamedSharding(mesh, PartitionSpec(batch_axes(mesh)))


def batch_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The mesh axes over which the rows of a batch are spread."""
    return tuple(axis for axis in BATCH if axis in mesh.shape)


def constrain(x: jax.Array, mesh: Mesh | None, *axes: Any) -> jax.Array:
    """Tells the compiler over which mesh axes the dimensions of a value are split: `"batch"` stands for `batch_axes`,
    None for no split. A dimension that does not divide stays whole; without a mesh nothing is said.

    Example:
        >>> import jax.numpy as jnp
        >>> constrain(jnp.ones((8, 4)), make_mesh(devices=jax.devices()[:1]), "batch", "tensor").shape
        (8, 4)
    """
    if mesh is None:
        return x
    named = [batch_axes(mesh) if axis == "batch" else axis for axis in axes]
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, fitting(mesh, named, x.shape)))


def fitting(mesh: Mesh | AbstractMesh, axes: Sequence[Any], shape: Sequence[int]) -> PartitionSpec:
    """The spec with None in place of mesh axes that are absent or do not divide the dimension."""

    def fits(axis: Any, n: int) -> bool:
        names = axis if isinstance(axis, tuple) else (axis,)
        return all(name in mesh.shape for name in names) and n % math.prod(mesh.shape[name] for name in names) == 0

    return PartitionSpec(*(axis if fits(axis, n) else None for axis, n in zip(axes, shape, strict=True)))


def check_axes(mesh: Mesh | AbstractMesh) -> None:
    """Raise ConfigError where a mesh has an axis that is none of ours, or one that the compiler may not use."""
    if unknown := [name for name in mesh.axis_names if name not in AXES]:
        raise ConfigError(f"mesh axis {unknown[0]!r} is unknown; known: {', '.join(AXES)}")
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ConfigError(f"mesh axes must be of AxisType.Auto, found {mesh.axis_types}; take hx.make_mesh")


def param_shardings(params: Any, mesh: Mesh) -> Any:
    """The tree with a `NamedSharding` in place of each array.

    Vectors and unknown matrices are whole on every device, and so is a dimension that its mesh axis does not divide.
    The codes and scales of a quantised kernel lie as the kernel would, each with what divides its own axes.

    Args:
        params: arrays or `jax.ShapeDtypeStruct`s, as a model takes them or by path.

    Raises:
        ConfigError: a mesh axis of another name.

    Example:
        >>> import jax
        >>> mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        >>> kernel = jax.ShapeDtypeStruct((2, 16, 64), jax.numpy.float32)
        >>> param_shardings({"layers/mlp/up_proj/kernel": kernel}, mesh)["layers/mlp/up_proj/kernel"].spec
        P(None, 'fsdp', 'tensor')
    """
    check_axes(mesh)

    def sharding(path: str, leaf: Any) -> Any:
        if is_quantized(leaf):
            return jax.tree.map(lambda part: sharding(path, part), leaf)
        module, _, name = path.rpartition("/")
        matched = (axes for pattern, axes in RULES if re.search(rf"(^|/)({pattern})$", module))
        last = next(matched, (None, None)) if name in ("kernel", "embedding") else (None, None)
        axes = [None] * (len(leaf.shape) - 2) + list(last[-len(leaf.shape) :] if leaf.shape else ())
        return NamedSharding(mesh, fitting(mesh, axes, leaf.shape))

    return paths.map_leaves(sharding, params)
