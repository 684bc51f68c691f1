"""Adam in one compiled scan, and the `jit` of the experiments."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

# XLA's YNN fusions end the process in some vmapped scans (jaxlib 0.10.2 on a CPU); other backends ignore the option.
jit = functools.partial(jax.jit, compiler_options={"xla_cpu_experimental_ynn_fusion_type": ""})


def minimise(
    loss: Callable[[Any], jax.Array], start: Any, rate: Any, decay: optax.Schedule, steps: int
) -> tuple[Any, jax.Array]:
    """Adam in one scan.

    Args:
        loss: of a tree, a scalar.
        start: the tree.
        rate: the peak learning rate; `vmap` may go over it.
        decay: the share of it at each step.

    Returns:
        The tree after the last step, and the loss before each, `[steps]`.
    """
    optimizer = optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(decay), optax.scale(-rate))

    def step(carry, _):
        tree, state = carry
        value, gradient = jax.value_and_grad(loss)(tree)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(tree, updates), state), value

    (tree, _), losses = jax.lax.scan(step, (start, optimizer.init(start)), length=steps)
    return tree, losses
