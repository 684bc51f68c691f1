"""A run's figures: metrics.jsonl, TensorBoard events and loss.png."""

import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import RecordWriter


class Metrics:
    """Writes figures as they come. A resumed run continues after `start`; later lines of an earlier attempt go."""

    def __init__(self, folder: Path, start: int):
        self.path = folder / "metrics.jsonl"
        kept = [line for line in read(self.path) if start and line["step"] <= start]  # a run from step 0 logs that too
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = self.path.open("a", encoding="utf-8")
        # Written here and now: SummaryWriter's thread fails with tracebacks on a full disk.
        (folder / "tensorboard").mkdir(exist_ok=True)
        self._events = RecordWriter(str(folder / "tensorboard" / f"events.out.tfevents.{time.time_ns()}"))
        self._add(file_version="brain.Event:2")
        if start:  # TensorBoard drops what an earlier attempt wrote from this step on
            self._add(step=start + 1, session_log=SessionLog(status=SessionLog.START))

    def log(self, step: int, **values: Any) -> None:
        """One line and one TensorBoard point for each value; a list's are `name/0`, `name/1`, ..., but for None."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            parts = {f"{name}/{i}": part for i, part in enumerate(value)} if isinstance(value, list) else {name: value}
            for tag, part in parts.items():
                if part is not None:
                    self._add(step=step, summary=summary.scalar(tag, part))

    def _add(self, **fields: Any) -> None:
        self._events.write(Event(wall_time=time.time(), **fields).SerializeToString())
        self._events.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        self._events.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; none where it is not there. A last line that was cut off is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def plot(lines: list[dict[str, Any]], path: Path, title: str) -> None:
    """Training and evaluation loss over the steps, of each adapter where there are several, as PNG."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)", title=title)
    for name, marker in (("loss", ""), ("eval_loss", "o")):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            steps, values = zip(*points, strict=True)
            drawn = axes.plot(steps, np.array(values, float), marker=marker, markersize=4)
            drawn[0].set_label(name.replace("_", " "))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    partial = path.with_name(f".{path.name}")
    figure.savefig(partial, format="png", dpi=120)
    os.replace(partial, path)


def write_text(path: Path, text: str) -> None:
    """Writes beside the target, then renames."""
    partial = path.with_name(f".{path.name}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
