"""Progress on the terminal: a bar where there is one, a line now and then where output goes to a file."""

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table


class Progress:
    """Loss, tokens/s and time left of a run."""

    def __init__(self, start: int, steps: int):
        self.console, self.steps = Console(), steps
        self.values: dict[str, Any] = {}
        self.began: tuple[int, float] | None = None  # the first step with a loss, which compiled, and when it ended
        columns = (MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        self._bar = Bar(*columns, TextColumn("left"), TimeRemainingColumn(), console=self.console)
        self._task = self._bar.add_task("compiling", total=steps, completed=start)

    def update(self, step: int, **values: Any) -> None:
        """Shows new figures; the bar keeps the last known of the others."""
        if self.began is None and "loss" in values:
            self.began = step, time.perf_counter()
        self.values |= values
        self._bar.update(self._task, completed=step, description=_text(self.values))
        if not self.console.is_terminal:
            left = ""
            if self.began and self.began[0] < step:
                pace = (time.perf_counter() - self.began[1]) / (step - self.began[0])
                left = f"  {pace * (self.steps - step):.0f} s left"
            print(f"step {step}/{self.steps}  {_text(values)}{left}", flush=True)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()


def _text(values: Mapping[str, Any]) -> str:
    forms = {"loss": ("loss {}", ".4f"), "eval_loss": ("eval {}", ".4f"), "tokens_per_second": ("{} tokens/s", ",.0f")}
    forms |= {"mfu": ("MFU {}", ".1%")}
    forms |= {"skipped_steps": ("{} skipped", "d")} if any(_known(values.get("skipped_steps"))) else {}
    known = {name: _known(values.get(name)) for name in forms}
    return "  ".join(
        form.format(" to ".join(format(value, spec) for value in known[name]))
        for name, (form, spec) in forms.items()
        if known[name]
    )


def _known(value: Any) -> list[Any]:
    """A figure that there is; of several adapters' the lowest and the highest."""
    values = [one for one in (value if isinstance(value, list) else [value]) if one is not None]
    return sorted({min(values), max(values)}) if values else []


def show(values: Mapping[str, Any], title: str) -> None:
    """A table of figures."""
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in values.items():
        table.add_row(name.replace("_", " "), shown(name, value))
    Console().print(table)


def show_rows(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """A table with a line for each of some rows of the same names."""
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name.replace("_", " "), no_wrap=True, justify="right")
    for row in rows:
        table.add_row(*(shown(name, value) for name, value in row.items()))
    Console().print(table)


def shown(name: str, value: Any) -> str:
    """A figure as text.

    Example:
        >>> shown("trainable_share", 0.01234), shown("seconds", 12.0), shown("loss", None), shown("steps", 12000)
        ('1.234%', '12', '-', '12,000')
    """
    if value is None:
        return "-"
    if name.endswith(("share", "accuracy", "mfu")):
        return f"{100 * value:.4g}%"
    if isinstance(value, float):
        return f"{value:,.0f}" if 100 <= abs(value) < 1e9 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
