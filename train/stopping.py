"""Early stopping: the best held-out loss so far, and how long ago that was. It is kept in the checkpoint's `meta`."""

from typing import NamedTuple


class Best(NamedTuple):
    """The lowest evaluation loss and its step, the evaluations since that were no better, the last one's step."""

    loss: float | None = None
    step: int | None = None
    since: int = 0
    last: int = -1

    def after(self, step: int, loss: float) -> "Best":
        """With one more evaluation; a loss that is NaN is no better.

        Example:
            >>> best = Best()
            >>> for step, loss in ((0, 2.0), (10, 1.0), (20, 1.5), (30, float("nan"))):
            ...     best = best.after(step, loss)
            >>> best
            Best(loss=1.0, step=10, since=2, last=30)
            >>> best.exhausted(2), best.exhausted(3), best.exhausted(None)
            (True, False, False)
        """
        if loss < (float("inf") if self.loss is None else self.loss):
            return Best(loss, step, 0, step)
        return self._replace(since=self.since + 1, last=step)

    def exhausted(self, patience: int | None) -> bool:
        """Whether that many evaluations brought nothing; None is endless."""
        return patience is not None and self.since >= patience
