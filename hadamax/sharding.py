"""Where parameters lie on a mesh with axes among `data`, `fsdp` and `tensor`, by their paths.

Projections that split a layer's inner width (queries, keys, values, the first of an MLP) hold its columns, those that
join it again its rows (Megatron, arXiv:1909.08053), so that a pair needs one reduction over `tensor`; `fsdp` takes the
other axis.
"""

import re
from typing import Any

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hadamax import paths
from hadamax.errors import ConfigError

AXES = ("data", "fsdp", "tensor")
# module path -> mesh axis of the last two axes of its kernel [in, out] or embedding [rows, width]
RULES = (
    (r"([qkv]|gate|up)_proj|query|key|value|intermediate/dense|lm_head", ("fsdp", "tensor")),
    (r"(o|down)_proj|output/dense", ("tensor", "fsdp")),
    (r"embed_tokens|\w+_embeddings", ("tensor", "fsdp")),
)


def param_shardings(params: Any, mesh: Mesh) -> Any:
    """The tree with a `NamedSharding` in place of each array.

    Vectors and unknown matrices are whole on every device, and so is a dimension that its mesh axis does not divide.

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
    if unknown := [name for name in mesh.axis_names if name not in AXES]:
        raise ConfigError(f"mesh axis {unknown[0]!r} is unknown; known: {', '.join(AXES)}")

    def sharding(path: str, leaf: Any) -> NamedSharding:
        module, _, name = path.rpartition("/")
        matched = (axes for pattern, axes in RULES if re.search(rf"(^|/)({pattern})$", module))
        last = next(matched, (None, None)) if name in ("kernel", "embedding") else (None, None)
        axes = [None] * (len(leaf.shape) - 2) + list(last[-len(leaf.shape) :] if leaf.shape else ())
        fits = (
            a if a in mesh.shape and n % mesh.shape[a] == 0 else None for a, n in zip(axes, leaf.shape, strict=True)
        )
        return NamedSharding(mesh, PartitionSpec(*fits))

    return paths.map_leaves(sharding, params)
