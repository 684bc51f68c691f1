"""Starts a program in several processes of this machine, to try out what several machines would do.

    python -m train.launch --processes 2 --devices 4 -- python -m train.finetune --model.base DIR ...

The processes find each other through the environment (train/processes.py) and compute on virtual CPU devices. Their
lines come out with their numbers in front. The first failure ends the others and is the exit code.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO

GRACE = 10  # seconds that the other processes have to end by themselves after one has failed


def environment(number: int, processes: int, devices: int, port: int) -> dict[str, str]:
    """What process `number` is told.

    Example:
        >>> environment(1, 2, 4, 1234)["JAX_COORDINATOR_ADDRESS"]
        '127.0.0.1:1234'
    """
    kept = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in flag]
    return os.environ | {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(number),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join([*kept, f"--xla_force_host_platform_device_count={devices}"]),
        "PYTHONUNBUFFERED": "1",
    }


def launch(command: Sequence[str], processes: int, devices: int) -> int:
    """Runs the command to its end in every process; the exit code is 0 or that of the first that failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children: list[subprocess.Popen[str]] = []
    threads = []

    def pass_on(number: int, _: object) -> None:
        for child in children:
            child.send_signal(number)

    old = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in range(processes):
            child = subprocess.Popen(
                command,
                env=environment(number, processes, devices, port),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,  # a terminal's Ctrl-C comes once, from here
            )
            children.append(child)
            for source, target in ((child.stdout, sys.stdout), (child.stderr, sys.stderr)):
                threads.append(threading.Thread(target=_copy, args=(number, source, target)))
                threads[-1].start()
        return _wait(children)
    finally:
        for child in children:
            child.kill()  # nothing, where it has ended
        for thread in threads:
            thread.join()
        for number, handler in old.items():
            signal.signal(number, handler)


def _copy(number: int, source: IO[str] | None, target: IO[str]) -> None:
    for line in source or ():
        if "connected peer ranks" not in line:  # Gloo counts them for each group of devices
            target.write(f"[{number}] {line}")
            target.flush()


def _wait(children: Sequence[subprocess.Popen[str]]) -> int:
    first, deadline = 0, float("inf")
    while True:
        codes = [child.poll() for child in children]
        if not first and any(codes):
            first, deadline = next(code for code in codes if code), time.monotonic() + GRACE
        if None not in codes:
            return 128 - first if first < 0 else first
        if time.monotonic() > deadline:
            for child in children:
                child.kill()
        time.sleep(0.05)


def main(argv: Sequence[str] | None = None) -> int:
    """The program: `python -m train.launch --help`."""
    parser = argparse.ArgumentParser(prog="python -m train.launch", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=1, help="virtual CPU devices of each process")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and the program with its arguments")
    args = parser.parse_args(argv)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command or args.processes < 1 or args.devices < 1:
        parser.error("give a command after --, and at least one process and one device")
    try:
        return launch(command, args.processes, args.devices)
    except OSError as error:
        print(f"error: {command[0]}: {error.strerror}", file=sys.stderr)
        return 127


if __name__ == "__main__":
    sys.exit(main())
