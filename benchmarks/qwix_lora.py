"""qwix's LoRA on our decoder: same model, loss, rank and rematerialisation, and the gradient of its factors."""

from typing import Any

import jax
import jax.numpy as jnp
import qwix
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding

import hadamax as hx
from hadamax.models import Decoder
from hadamax.sharding import fitting


def qwix_lora(case: Any, model: Decoder, params: Any, mesh: Mesh):
    """`(apply, factors, base)`, placed; what qwix does with factors of `case.factor_dtype` is its own."""
    rule = qwix.LoraRule(module_path=".*_proj", rank=case.rank, alpha=case.rank)
    adapted = qwix.apply_lora_to_model(model, qwix.LoraProvider([rule]), methods=("__call__", "loss"))
    ids = jax.ShapeDtypeStruct((case.batch, case.seq), jnp.int32)
    tree = jax.eval_shape(adapted.init, jax.random.key(0), ids)
    leaves = traverse_util.flatten_dict(tree, sep="/")
    factors = {path: leaf for path, leaf in leaves.items() if "_lora_" in path}
    base = traverse_util.flatten_dict(params, sep="/")
    layers = case.config.num_hidden_layers
    if (
        len(factors) != 14
        or any(leaf.shape[0] != layers for leaf in factors.values())
        or leaves.keys() - factors != base.keys()
    ):
        raise RuntimeError(f"qwix found other kernels than the seven projections: {sorted(factors)}")
    placed = traverse_util.flatten_dict(hx.param_shardings(params, mesh), sep="/")

    def sharding(path: str, shape: tuple[int, ...]) -> NamedSharding:
        """As ours: each axis as the kernel's axis that it shares."""
        name, which = path.split("_lora_")
        spec = [*placed[name].spec, *[None] * 3][:3]
        return NamedSharding(
            mesh, fitting(mesh, [None, spec[1], None] if which == "a" else [None, None, spec[2]], shape)
        )

    def array(leaf, sharding, dtype=None):
        return jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=sharding)

    dtype = jnp.dtype(case.factor_dtype)
    trainable = {path: array(leaf, sharding(path, leaf.shape), dtype) for path, leaf in factors.items()}
    frozen = {path: array(leaf, placed[path]) for path, leaf in base.items()}

    def apply(base, factors, **batch):
        return adapted.apply(traverse_util.unflatten_dict(base | factors, sep="/"), **batch)

    return apply, trainable, frozen
