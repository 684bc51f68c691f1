"""One program in several processes: how they find each other, which of them writes, and how they stop together."""

import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

import hadamax as hx
from train.config import MeshConfig, UsageError

SHUTDOWN = 60  # seconds that a process waits for the others at its end, also after an error of its own


def join(config: MeshConfig) -> None:
    """Joins the other processes, where the environment tells of any; call it before anything asks for a device.

    From then on only the first process prints to stdout. Where the coordinator is not reached within five minutes, JAX
    ends the process with a message of its own.

    Raises:
        ConfigError: what the environment says is incomplete or wrong.
    """
    arguments = None if config.distributed == "never" else found(os.environ)
    if arguments is None or jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize(**arguments, shutdown_timeout_seconds=SHUTDOWN)
    except (ValueError, RuntimeError) as error:  # JaxRuntimeError is a RuntimeError
        reason = str(error).splitlines()[0]
        advice = "see train/LAUNCHING.md, or set mesh.distributed to never for a process by itself"
        raise hx.ConfigError(f"cannot join the other processes: {reason}; {advice}") from error
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def found(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """The arguments for `jax.distributed.initialize` that it does not find itself; None where a process is alone.

    JAX's own detection takes more for a cluster: any SLURM step, any Kubernetes pod. One process alone should not need
    a coordinator, nor wait for one.

    Example:
        >>> found({"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n1", "SLURM_STEP_NUM_TASKS": "1"}) is None
        True
        >>> found({"JAX_COORDINATOR_ADDRESS": "n1:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"})
        {'num_processes': 2, 'process_id': 0}
    """
    if "JAX_COORDINATOR_ADDRESS" in environ:
        names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
        try:
            return {argument: int(environ[name]) for argument, name in names.items() if name in environ}
        except ValueError as error:
            raise UsageError(f"{' and '.join(names.values())} must be numbers: {error}") from None
    tpu = "TPU_ML_PLATFORM" in environ and environ.get("JAX_PLATFORMS", "tpu").startswith("tpu")  # set by `import jax`
    hosts = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES", ""))
    tasks = environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", 1))
    several = (
        int(environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1,
        "SLURM_STEP_NODELIST" in environ and int(tasks) > 1,
        tpu and ("," in hosts or int(environ.get("MEGASCALE_NUM_SLICES", 1)) > 1),
        tpu and not hosts and "TPU_SKIP_MDS_QUERY" not in environ,  # a Cloud TPU machine: its metadata tells the rest
        "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ,
    )
    return {} if any(several) else None


def is_first() -> bool:
    """Whether this process writes files and prints."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Returns when every process has come to this point."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def make_shared(folder: Path) -> None:
    """Makes a directory, in the first process; refuses, in all alike, one that not every process sees then.

    Raises:
        ConfigError: not on a shared file system.
        OSError: it cannot be made.
    """
    failure = None
    try:
        if is_first():
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        failure = error
    wait_for_all("the directory is made")
    seen = multihost_utils.process_allgather(np.array(folder.is_dir()))
    if failure is not None:
        raise failure
    if not seen.all():
        raise hx.ConfigError(f"not every process sees {folder}; give a directory on a file system that all share")


@contextmanager
def signals() -> Iterator[list[int]]:
    """Collects the first SIGINT or SIGTERM in place of its effect; the second one has it.

    One of several processes leaves SIGTERM to JAX, which tells the others, and takes SIGINT for one.
    """
    received: list[int] = []
    alone = not jax.distributed.is_initialized()
    old = {number: signal.getsignal(number) for number in (signal.SIGINT, *[signal.SIGTERM] * alone)}

    def restore(*_: Any) -> None:
        for number, handler in old.items():
            signal.signal(number, handler)

    def receive(number: int, _: Any) -> None:
        received.append(number)
        restore()
        if not alone:
            signal.raise_signal(signal.SIGTERM)

    try:
        for number in old:
            signal.signal(number, receive)
        yield received
    finally:
        restore()


def stopping(received: list[int], step: int) -> bool:
    """Whether to stop after this step: the answer is the same in every process, and asks no device.

    To be called once for each step. Where several processes run, `received` gets the signal of whichever had one.
    """
    if jax.distributed.is_initialized() and multihost_utils.reached_preemption_sync_point(step):
        received[:] = received or [signal.SIGTERM]
        return True
    return bool(received) and not jax.distributed.is_initialized()


def mesh_of(config: MeshConfig) -> Mesh:
    """The mesh of the devices of all processes.

    Raises:
        ConfigError: sizes that do not make the number of devices, or that a TPU slice's wiring cannot have, or more
            devices than there are.
    """
    devices = jax.devices()
    if config.devices is not None:
        if not 1 <= config.devices <= len(devices):
            raise hx.ConfigError(f"mesh.devices {config.devices}: there are {len(devices)} devices")
        if jax.process_count() > 1 and config.devices != len(devices):
            raise hx.ConfigError("mesh.devices: processes use all their devices; leave it out, or start fewer")
        devices = devices[: config.devices]
    try:
        return hx.make_mesh(data=config.data, fsdp=config.fsdp, tensor=config.tensor, devices=devices)
    except NotImplementedError as error:  # on a TPU slice, whose devices are wired as a torus
        reason = str(error).split(". ")[0]
        raise hx.ConfigError(
            f"mesh: the devices of this slice cannot be laid out so ({reason}); make each of mesh.data, .fsdp and"
            " .tensor a product of some of the slice's sides"
        ) from error


def check_rows(mesh: Mesh, name: str, rows: int) -> None:
    """Refuses a number of rows that the devices cannot share out evenly.

    Raises:
        ConfigError: with the numbers.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % parts:
        shared = f"mesh.data {mesh.shape['data']} x mesh.fsdp {mesh.shape['fsdp']} devices"
        raise hx.ConfigError(
            f"{name} is {rows}, which {shared} cannot share out evenly; give a multiple of {parts}, more devices to"
            " mesh.tensor, or fewer by mesh.devices"
        )


class Silent:
    """In place of `Metrics` and `Progress` in the processes that write nothing."""

    def log(self, step: int, **values: Any) -> None: ...

    def update(self, step: int, **values: Any) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None: ...
