"""What is compiled: a step of training and one of evaluation, and where their arguments lie on the mesh."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import hadamax as hx
from train import guard


class State(NamedTuple):
    """What a step changes: `{"adapters": ..., "base": ...}`, and the state of the guarded optimiser."""

    trainable: Any
    optimizer: Any


class Shardings(NamedTuple):
    """Where the arguments of a step lie."""

    state: State
    frozen: Any
    batch: NamedSharding


def placement(optimizer: optax.GradientTransformation, trainable: Any, frozen: Any, mesh: Mesh) -> Shardings:
    """The optimiser's state lies where the leaves lie that it is for; its counters are whole on every device."""
    leaves, base = jax.tree.map(lambda leaf: leaf.sharding, (trainable, frozen))
    moments = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, trainable),
        leaves,
        transform_non_params=lambda _: NamedSharding(mesh, PartitionSpec()),
    )
    return Shardings(State(leaves, moments), base, hx.batch_sharding(mesh))


def make_steps(
    apply: Callable[..., Any],
    optimizer: optax.GradientTransformationExtraArgs,
    grad_accum: int,
    shardings: Shardings,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The compiled training and evaluation steps.

    Gradients are taken with respect to the trainable tree alone. The frozen base is an argument: as a constant it would
    be copied into the program.

    Args:
        optimizer: one of `guard.guard`.
        grad_accum: micro-batches; each has rows of every device.
        shardings: of the arguments; a new state lies where the old one lay.

    Returns:
        `train(state, frozen, batch) -> (state, {loss, grad_norm, param_norm, **guard.counts})` (the state is donated)
        and `evaluate(trainable, frozen, batch) -> [2]`, the sum of the losses and of the weights.
    """

    state_at, frozen_at, rows = shardings
    whole = NamedSharding(rows.mesh, PartitionSpec())

    def loss(trainable, frozen, batch):
        params = hx.join(trainable["base"], frozen)
        return apply(params, trainable["adapters"], **batch, method="loss")

    def train(state, frozen, batch):
        def strided(x):  # rows i, i + grad_accum, ...: consecutive rows would be those of a few devices
            x = x.reshape(-1, grad_accum, *x.shape[1:]).swapaxes(0, 1)
            return jax.lax.with_sharding_constraint(x, NamedSharding(rows.mesh, PartitionSpec(None, *rows.spec)))

        micro_batches = jax.tree.map(strided, batch)

        def accumulate(total, micro):
            (nll, _), grads = jax.value_and_grad(loss, has_aux=True)(state.trainable, frozen, micro)
            return jax.tree.map(jnp.add, total, (nll, grads)), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.trainable))
        total, _ = jax.lax.scan(accumulate, zero, micro_batches)
        # Divided once by the tokens of all micro-batches: the mean over tokens, however they are spread.
        tokens = batch["weights"].sum()
        tokens = jnp.where(tokens > 0, tokens, 1)
        nll, grads = jax.tree.map(lambda x: x / tokens.astype(x.dtype), total)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.trainable, value=nll)
        trainable = optax.apply_updates(state.trainable, updates)
        norms = {"grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(trainable)}
        return State(trainable, optimizer_state), {"loss": nll, **norms, **guard.counts(optimizer_state)}

    def evaluate(trainable, frozen, batch):
        return jnp.stack(loss(trainable, frozen, batch))

    return (
        jax.jit(train, donate_argnums=0, in_shardings=(state_at, frozen_at, rows), out_shardings=(state_at, whole)),
        jax.jit(evaluate, in_shardings=(state_at.trainable, frozen_at, rows), out_shardings=whole),
    )
