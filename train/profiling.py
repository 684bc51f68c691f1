"""A trace of some steps by `jax.profiler`, for TensorBoard's profile plugin, XProf or Perfetto."""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax


class Profile:
    """Traces the steps of a window; a context manager that ends a trace which an error or a signal cut short.

    Args:
        folder: where the trace is written. Each process gives its own: it traces itself.
        window: first and last step, both included; None traces nothing.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, Profile(Path(folder), (2, 3)) as profile:
        ...     results = [profile.step(i, jax.jit(lambda x: x + 1), i) for i in range(1, 5)]
        ...     print(*results, len(list(Path(folder).glob("plugins/profile/*/*.xplane.pb"))))
        2 3 4 5 1
    """

    def __init__(self, folder: Path, window: tuple[int, int] | None):
        self.folder, self.window, self.tracing = folder, window, False

    def step(self, number: int, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`, under the trace where the step is in the window."""
        if self.window is None or not self.window[0] <= number <= self.window[1]:
            return function(*args)
        if not self.tracing:
            jax.block_until_ready(args)  # so that the trace holds the window's steps only
            jax.profiler.start_trace(self.folder)
            self.tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            result = function(*args)
        if number == self.window[1]:
            jax.block_until_ready(result)
            self._stop()
        return result

    def overlaps(self, first: int, last: int) -> bool:
        """Whether a step from `first` to `last` is traced, which takes time of its own.

        Example:
            >>> [Profile(Path(), (3, 5)).overlaps(*steps) for steps in ((1, 2), (2, 3), (5, 9), (6, 9))]
            [False, True, True, False]
        """
        return self.window is not None and first <= self.window[1] and self.window[0] <= last

    def _stop(self) -> None:
        self.tracing = False
        jax.profiler.stop_trace()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.tracing:
            self._stop()
