"""What the host knows of the adapters that train: of one, or of several at once.

Losses and figures are numbers of one adapter, and lists of several. `kept` is what a checkpoint keeps of it. Of
several, one that diverges is said and left out; the others go on.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hadamax as hx
from train import guard
from train.members import Member
from train.resume import say


class One:
    """A plain run's adapter."""

    def kept(self) -> None:
        return None

    def figures(self, fetched: Sequence[dict[str, Any]], last: int, allowed: int, saved: int, out: Path) -> Any:
        """`guard.means`, after `guard.check`, whose errors these are."""
        guard.check(fetched, last, allowed, saved, out)
        return guard.means(fetched)

    def evaluated(self, loss: float) -> tuple[float, float]:
        """What of the held-out loss is logged, and by what the best step is told."""
        return loss, loss

    def summary(self, lines: Sequence[dict[str, Any]], skipped: Any, best_step: int | None) -> dict[str, Any]:
        """The figures of metrics.jsonl's first and last lines."""
        losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
        return {
            "train_loss": next((line["loss"] for line in reversed(lines) if "loss" in line), None),
            "eval_loss_first": losses[0] if losses else None,
            "eval_loss_last": losses[-1] if losses else None,
            "skipped_steps": int(skipped),
        }


@dataclasses.dataclass
class Group:
    """The members of a run: their last held-out losses, and why some were left out."""

    members: tuple[Member, ...]
    losses: list[float | None] = dataclasses.field(default_factory=list)
    failed: list[str | None] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.losses = self.losses or [None] * len(self.members)
        self.failed = self.failed or [None] * len(self.members)

    def kept(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "failed": list(self.failed)}

    def figures(self, fetched: Sequence[dict[str, Any]], last: int, allowed: int, saved: int, out: Path) -> Any:
        """As `One`'s, of each member: lists, None for a member that is left out.

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
                    why = str(reason).split("; stopped, ")[0]  # the others go on
                    self.failed[i], self.losses[i], error = why, None, reason
                    say(f"note: adapter {i} ({member}) is left out: {why}")
            found.append(guard.means(own) if self.failed[i] is None else {})
        if error is not None and None not in self.failed:
            raise type(error)(f"all {len(self.members)} adapters; the last: {error}") from error
        return {name: [own.get(name) for own in found] for name in dict.fromkeys(name for own in found for name in own)}

    def evaluated(self, losses: Sequence[float]) -> tuple[list[float | None], float]:
        """The held-out losses that count, and the lowest of them; NaN where there is none."""
        whole = (loss if math.isfinite(loss) else None for loss in losses)
        self.losses = [None if failed else loss for loss, failed in zip(whole, self.failed, strict=True)]
        best = self.best()
        return self.losses, math.nan if best is None else self._loss(best)

    def best(self) -> int | None:
        """The member of the lowest held-out loss, where there is any."""
        return min((i for i, loss in enumerate(self.losses) if loss is not None), key=self._loss, default=None)

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
            "skipped_steps": sum(row["skipped_steps"] for row in rows if row["failed"] is None),
            **own,
            "members": rows,
        }
