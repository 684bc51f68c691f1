"""What the programs share: a user's mistake is one line on stderr and an exit code, never a traceback."""

import logging
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import jax

from hadamax.errors import HadamaxError
from train.config import UsageError


class Interrupted(Exception):
    """A run that a signal ended in good order."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum


def main(program: Callable[[Sequence[str] | None], object]) -> NoReturn:
    """The whole of a `__main__`: quietens what orbax says besides the error it raises, runs, exits."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # When several reads or writes fail, those after the first find their event loop closed.
    show = sys.unraisablehook
    sys.unraisablehook = lambda what: None if "Event loop is closed" in str(what.exc_value) else show(what)
    sys.exit(run(program))


def run(program: Callable[[Sequence[str] | None], object], argv: Sequence[str] | None = None) -> int:
    """Runs `program(argv)` and returns the exit code: 0, 1 for an error, 2 for usage, 128 + n for signal n."""
    try:
        program(argv)
        return 0
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except HadamaxError as error:
        return _fail(str(error), 2 if isinstance(error, UsageError) else 1)
    except OSError as error:
        return _fail(": ".join(str(part) for part in (error.filename, error.strerror or error) if part))
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() > 1 and re.search(
            r"Gloo|Connection|heartbeat|DEADLINE_EXCEEDED|UNAVAILABLE", str(error)
        ):
            lost = " ".join(str(error).split())[:160]
            return _fail(f"lost another process; the same command continues from the last checkpoint ({lost})")
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _fail("out of device memory; lower run.batch_size or raise run.grad_accum, or set model.remat to full")


def _fail(message: str, code: int = 1) -> int:
    several = jax.distributed.is_initialized() and jax.process_index()
    who = f"process {jax.process_index()}: " if several else ""
    print(f"{who}error: {' '.join(message.split())}", file=sys.stderr)
    return code
