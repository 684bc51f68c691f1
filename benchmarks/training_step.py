"""A whole training step at a model's published size, lowered for TPUs that are not there: only shapes exist.

Gradient of the mean loss by what trains, clipping, AdamW, the update; state donated. The base is frozen and bfloat16
(or quantised), factors and their moments are float32, each block is rematerialised. Full fine-tuning trains the
bfloat16 parameters themselves, and optax keeps its moments in their dtype.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import hadamax as hx
from benchmarks.shapes import SHAPES
from hadamax.models import Decoder

PROJECTIONS = "{q,k,v,o,gate,up,down}_proj"
METHODS: dict[str, tuple[str, Callable[[int], hx.Adapter]] | None] = {  # the kernels adapted, and the adapter at a rank
    "LoRA": (PROJECTIONS, hx.lora),
    "HiRA": (PROJECTIONS, hx.hira),
    "BoHA": (PROJECTIONS, lambda rank: hx.boha(rank, 4)),
    "ABBA": (PROJECTIONS, hx.abba),
    "ABBA merged": (PROJECTIONS, lambda rank: hx.abba(rank, forward="merged")),
    "LoHa merged": (PROJECTIONS, lambda rank: hx.loha(rank // 2, forward="merged")),
    "Hadamard Adapter": ("o_proj", lambda rank: hx.hadamard_adapter()),  # as published: on the attention output
    "full": None,
    "qwix LoRA": None,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is compiled. `mesh` is data x fsdp x tensor; `vocab_size` and `layers` replace the model's own."""

    model: str
    method: str
    topology: str
    mesh: tuple[int, int, int]
    batch: int
    seq: int
    base_dtype: str = "bfloat16"
    factor_dtype: str = "float32"
    remat: str = "full"
    rank: int = 32
    vocab_size: int | None = None
    layers: int | None = None

    @property
    def chips(self) -> int:
        return math.prod(self.mesh)

    @property
    def config(self):
        replaced = {"vocab_size": self.vocab_size, "num_hidden_layers": self.layers}
        replaced = {name: value for name, value in replaced.items() if value is not None}
        return dataclasses.replace(SHAPES[self.model], **replaced)


def lowered(case: Case, devices: list[jax.Device]) -> jax.stages.Lowered:
    """The step of a case, traced and ready to compile for these devices."""
    data, fsdp, tensor = case.mesh
    mesh = hx.make_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=devices)
    model = Decoder(case.config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, remat=case.remat, mesh=mesh)
    batch = _batch(case, mesh)
    params = jax.eval_shape(model.init, jax.random.key(0), batch[0])
    if case.method == "full":
        trainable, frozen, loss = params, {}, functools.partial(_full_loss, model)
        trainable = _placed(params, hx.param_shardings(params, mesh))
    elif case.method == "qwix LoRA":
        from benchmarks.qwix_lora import qwix_lora

        trainable, frozen, loss = qwix_lora(case, model, params, mesh)
    else:
        trainable, frozen, loss = _adapter(case, model, params, mesh)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))

    def step(state, frozen, batch):
        trainable, moments = state
        value, gradient = jax.value_and_grad(loss)(trainable, frozen, *batch)
        updates, moments = tx.update(gradient, moments, trainable)
        return (optax.apply_updates(trainable, updates), moments), value

    whole = NamedSharding(mesh, PartitionSpec())
    moments = optax.tree.map_params(
        tx,
        lambda moment, leaf: _array(moment, leaf.sharding),
        jax.eval_shape(tx.init, trainable),
        trainable,
        transform_non_params=lambda leaf: _array(leaf, whole),
    )
    state = (trainable, moments)
    shardings = (jax.tree.map(lambda leaf: leaf.sharding, state), whole)
    return jax.jit(step, donate_argnums=0, out_shardings=shardings).lower(state, frozen, batch)


def _array(leaf: Any, sharding: NamedSharding, dtype: Any = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=sharding)


def _placed(tree: Any, shardings: Any, dtype: Any = None) -> Any:
    return jax.tree.map(lambda leaf, sharding: _array(leaf, sharding, dtype), tree, shardings)


def _batch(case: Case, mesh: Mesh) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Ids, targets, weights."""
    rows = hx.batch_sharding(mesh)
    dtypes = (jnp.int32, jnp.int32, jnp.float32)
    return tuple(jax.ShapeDtypeStruct((case.batch, case.seq), dtype, sharding=rows) for dtype in dtypes)


def _full_loss(model, params, frozen, ids, targets, weights):
    total, count = model.apply(params, ids, targets, weights, method="loss")
    return total / count


def _adapter(case: Case, model: Decoder, params: Any, mesh: Mesh):
    """`(factors, base, loss)`, placed."""
    entry = METHODS[case.method]
    assert entry is not None
    where, adapter = entry
    injection = hx.inject({where: adapter(case.rank)}, view=model.view)
    adapters = jax.eval_shape(injection.init, jax.random.key(0), params)
    params = quantised(params, case.base_dtype, model.view)
    placed = hx.param_shardings(params, mesh)
    adapters = _placed(adapters, injection.shardings(params, placed), jnp.dtype(case.factor_dtype))
    apply = injection.apply(model.apply, placed)

    def loss(adapters, params, ids, targets, weights):
        total, count = apply(params, adapters, ids, targets, weights, method="loss")
        return total / count

    return adapters, _placed(params, placed), loss


def quantised(params: Any, dtype: str, view: str | None) -> Any:
    """The shapes of a base in int8 or nf4; bfloat16 is what they are."""
    if dtype == "bfloat16":
        return params
    return jax.eval_shape(functools.partial(hx.quantize, dtype=dtype, view=view), params)
