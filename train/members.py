"""Several adapters trained at once over one base, `run.seeds` with each rate of `optim.lr`: trees lead with their axis.

A member is what a run by itself is with `run.seed` its seed, `data.seed` the first seed and `optim.lr` its rate: all
take the same rows in the same order.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

import hadamax as hx
from train.config import Config
from train.step import Shardings


class Member(NamedTuple):
    """The seed of an adapter's init and its peak learning rate; None is its method's default."""

    seed: int
    lr: float | None

    def __str__(self) -> str:
        return f"seed {self.seed}" + ("" if self.lr is None else f", lr {self.lr:g}")


def members_of(config: Config) -> tuple[Member, ...]:
    """Every seed with every learning rate; one member is a plain run, without the axis."""
    rates = config.optim.lr if isinstance(config.optim.lr, list) else [config.optim.lr]
    return tuple(Member(config.run.seed + i, lr) for lr in rates for i in range(config.run.seeds))


def keys(members: Sequence[Member]) -> jax.Array:
    """`[members]`, the key of each one's seed."""
    return jnp.stack([jax.random.key(member.seed) for member in members])


def check_seeds(trainable: Any, seeds: int) -> None:
    """Refuses seeds that make no difference: members of one rate and the same rows would be one and the same.

    Raises:
        ConfigError: the first two seeds start equal.
    """

    def differ(tree: Any) -> jax.Array:
        return jnp.array([jnp.any(leaf[0] != leaf[1]) for leaf in jax.tree.leaves(tree)]).any()

    if seeds > 1 and not bool(jax.jit(differ)(trainable)):
        raise hx.ConfigError(
            f"run.seeds {seeds}: these adapters start from constants, so that all seeds would train alike; leave"
            " run.seeds at 1, or let data.seed differ between runs"
        )


def stacked(shardings: Any) -> Any:
    """The same places with the members' axis before them, whole on every device."""
    return jax.tree.map(lambda at: NamedSharding(at.mesh, PartitionSpec(None, *at.spec)), shardings)


def steps(train: Any, evaluate: Any, shardings: Shardings) -> tuple[Any, Any, Shardings]:
    """The steps of all members and where their arguments lie, from those of one: base and batch are the same for all.

    Args:
        train, evaluate: of `train.step.make_steps`, with an optimiser whose state holds the learning rates
            (`optim.build`).
        shardings: of one member's arguments.
    """
    state, frozen, batch = stacked(shardings.state), shardings.frozen, shardings.batch
    whole, of_each = NamedSharding(batch.mesh, PartitionSpec()), (0, None, None)
    return (
        jax.jit(
            jax.vmap(train, of_each),
            donate_argnums=0,
            in_shardings=(state, frozen, batch),
            out_shardings=(state, whole),
        ),
        jax.jit(jax.vmap(evaluate, of_each), in_shardings=(state.trainable, frozen, batch), out_shardings=whole),
        shardings._replace(state=state),
    )


def together(trees: Sequence[Any]) -> Any:
    """One tree whose leaves lead with the members' axis, from a tree of numbers of each.

    Example:
        >>> together([{"a": 1.0}, {"a": 0.5}])
        {'a': Array([1. , 0.5], dtype=float32)}
    """
    return jax.tree.map(lambda *leaves: jnp.asarray(leaves, jnp.float32), *trees)


def select(tree: Any, member: int) -> Any:
    """One member's tree."""
    return jax.tree.map(lambda leaf: leaf[member], tree)
