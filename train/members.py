"""Several adapters trained at once over one base, `run.seeds` with each rate of `optim.lr`: trees lead with their axis.

A member is what a run by itself is with `run.seed` its seed, `data.seed` the first seed and `optim.lr` its rate: all
take the same rows in the same order. One that diverges is said and left out; the others go on.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

import hadamax as hx
from train import guard
from train.config import Config
from train.resume import say
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


@dataclasses.dataclass
class Group:
    """What the host knows of the members: their last held-out losses, and why some were left out. Kept in `meta`."""

    members: tuple[Member, ...]
    losses: list[float | None] = dataclasses.field(default_factory=list)
    failed: list[str | None] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.losses = self.losses or [None] * len(self.members)
        self.failed = self.failed or [None] * len(self.members)

    def to_json(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "failed": list(self.failed)}

    def figures(self, fetched: Sequence[dict[str, Any]], last: int, allowed: int, saved: int, out: Path) -> Any:
        """`guard.check` and `guard.means` for each member: lists, None for a member that is left out.

        Raises:
            NotFiniteError, SpikeError: none is left.
        """
        found, error = [], None
        for i, member in enumerate(self.members):
            own = [{name: value[i] for name, value in values.items()} for values in fetched]
            if self.failed[i] is None:
                try:
                    guard.check(own, last, allowed, saved, out)
                except (guard.NotFiniteError, guard.SpikeError) as reason:
                    self.failed[i], self.losses[i], error = str(reason), None, reason
                    say(f"note: adapter {i} ({member}): {reason}")
            found.append(guard.means(own) if self.failed[i] is None else {})
        if error is not None and None not in self.failed:
            raise type(error)(f"all {len(self.members)} adapters; the last: {error}") from error
        return {name: [own.get(name) for own in found] for name in dict.fromkeys(name for own in found for name in own)}

    def evaluated(self, losses: Sequence[float]) -> list[float | None]:
        """Takes the held-out losses of all, and gives those that count."""
        whole = (loss if math.isfinite(loss) else None for loss in losses)
        self.losses = [None if failed else loss for loss, failed in zip(whole, self.failed, strict=True)]
        return self.losses

    def best(self) -> int | None:
        """The member of the lowest held-out loss, where there is any."""
        return min((i for i, loss in enumerate(self.losses) if loss is not None), key=self._loss, default=None)

    def lowest(self) -> float:
        """That loss; NaN where there is none."""
        best = self.best()
        return math.nan if best is None else self._loss(best)

    def _loss(self, member: int) -> float:
        loss = self.losses[member]
        assert loss is not None
        return loss

    def chosen(self, member: int | None, where: Any) -> int:
        """The member wanted, or the best.

        Raises:
            ConfigError: there is none of that number, it was left out, or no loss to choose by.
        """
        last = len(self.members) - 1
        if member is None:
            if (best := self.best()) is None:
                raise hx.ConfigError(f"{where} has no held-out losses to choose by; give --member, 0 to {last}")
            return best
        if not 0 <= member <= last:
            raise hx.ConfigError(f"{where} has the adapters 0 to {last}, no --member {member}")
        if (failed := self.failed[member]) is not None:
            raise hx.ConfigError(f"{where}, --member {member}, was left out: {failed}")
        return member

    def summary(self, lines: Sequence[dict[str, Any]], skipped: Any, best_step: int | None) -> dict[str, Any]:
        """A row for each member from the lines of metrics.jsonl, the last figures of the best one, and which member's
        loss was the run's lowest, at `best_step`: the one that `--step best` takes.
        """
        rows = []
        for i, member in enumerate(self.members):
            losses = [(line["eval_loss"][i], line["step"]) for line in lines if "eval_loss" in line]
            known = [pair for pair in losses if pair[0] is not None]
            lowest, step = min(known, default=(None, None))
            trained = [line["loss"][i] for line in lines if "loss" in line and line["loss"][i] is not None]
            rows.append(
                {
                    "member": i,
                    **member._asdict(),
                    "train_loss": trained[-1] if trained else None,
                    "eval_loss_first": losses[0][0] if losses else None,
                    "eval_loss_last": self.losses[i],
                    "eval_loss_best": lowest,
                    "best_step": step,
                    "skipped_steps": int(skipped[i]),
                    "failed": self.failed[i],
                }
            )
        best = self.best()
        names = ("train_loss", "eval_loss_first", "eval_loss_last")
        own = {name: None if best is None else rows[best][name] for name in names}
        at_best = [row for row in rows if row["eval_loss_best"] is not None and row["best_step"] == best_step]
        lowest = min(at_best, key=lambda row: row["eval_loss_best"], default={"member": None})
        return {
            "adapters": len(rows),
            "best_member": best,
            "best_step_member": lowest["member"],
            **own,
            "members": rows,
        }
