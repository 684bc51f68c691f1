"""A whole training step at a model's published size, lowered for TPUs that are not there: only shapes exist.

It is the step that `train.finetune` runs (`train.step`), clipping and the guard included. The base is frozen and
bfloat16 (or quantised), factors and their moments are float32, each block is rematerialised. Full fine-tuning trains
the bfloat16 parameters themselves, and optax keeps its moments in their dtype.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

import hadamax as hx
from benchmarks.shapes import SHAPES
from hadamax.models import Decoder
from train.guard import guard
from train.step import State, make_steps, placement

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
    """The step of a case as `train.finetune` makes it, traced and ready to compile for these devices."""
    data, fsdp, tensor = case.mesh
    mesh = hx.make_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=devices)
    model = Decoder(case.config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, remat=case.remat, mesh=mesh)
    batch = _batch(case, mesh)
    params = jax.eval_shape(model.init, jax.random.key(0), batch["input_ids"])
    if case.method == "qwix LoRA":
        from benchmarks.qwix_lora import qwix_lora

        apply, adapters, params = qwix_lora(case, model, params, mesh)
    elif case.method == "full":
        apply, adapters, params = _full(model.apply), {}, _placed(params, hx.param_shardings(params, mesh))
    else:
        apply, adapters, params = _adapted(case, model, params, mesh)
    base, frozen = hx.split(params, ["**"] if case.method == "full" else [])
    trainable = {"adapters": adapters, "base": base}
    optimizer = guard(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4)))
    shardings = placement(optimizer, trainable, frozen, mesh)
    train, _ = make_steps(apply, optimizer, 1, shardings)
    moments = _placed(jax.eval_shape(optimizer.init, trainable), shardings.state.optimizer)
    return train.lower(State(trainable, moments), frozen, batch)


def _array(leaf: Any, sharding: NamedSharding, dtype: Any = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=sharding)


def _placed(tree: Any, shardings: Any, dtype: Any = None) -> Any:
    return jax.tree.map(lambda leaf, sharding: _array(leaf, sharding, dtype), tree, shardings)


def _batch(case: Case, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    rows, shape = hx.batch_sharding(mesh), (case.batch, case.seq)
    dtypes = {"input_ids": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for name, dtype in dtypes.items()}


def _full(apply: Callable[..., Any]) -> Callable[..., Any]:
    return lambda params, adapters, **batch: apply(params, **batch)


def _adapted(case: Case, model: Decoder, params: Any, mesh: Mesh):
    """`(apply, factors, base)`, placed."""
    entry = METHODS[case.method]
    assert entry is not None
    where, adapter = entry
    injection = hx.inject({where: adapter(case.rank)}, view=model.view)
    adapters = jax.eval_shape(injection.init, jax.random.key(0), params)
    params = quantised(params, case.base_dtype, model.view)
    placed = hx.param_shardings(params, mesh)
    adapters = _placed(adapters, injection.shardings(params, placed), jnp.dtype(case.factor_dtype))
    return injection.apply(model.apply, placed), adapters, _placed(params, placed)


def quantised(params: Any, dtype: str, view: str | None) -> Any:
    """The shapes of a base in int8 or nf4; bfloat16 is what they are."""
    if dtype == "bfloat16":
        return params
    return jax.eval_shape(functools.partial(hx.quantize, dtype=dtype, view=view), params)
