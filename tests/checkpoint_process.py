"""One of several processes that read and write a checkpoint together; `tests/test_checkpoint.py` starts them.

    python -m tests.checkpoint_process FOLDER PORT INDEX FILE

FILE takes what it found, since gloo writes to the standard output.
"""

import functools
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hadamax import sharding
from hadamax.checkpoint import Checkpoints, DamagedError, _together


def trees():
    """Trainable arrays and optimiser state of several dtypes and sizes, as numpy arrays."""
    rng = np.random.default_rng(0)
    factors = {"a": rng.normal(size=(16, 8)).astype(np.float32), "b": rng.normal(size=(3, 8, 32)).astype(jnp.bfloat16)}
    return {"q_proj": factors}, {"count": np.int32(3), "moments": (factors["a"] ** 2, [np.arange(24.0, dtype="f4")])}


def mesh(**sizes: int) -> Mesh:
    """A mesh of all devices, by default none of them on `fsdp`."""
    return sharding.make_mesh(**{"fsdp": 1, **sizes})


def arrays(mesh: Mesh):
    """`trees` on a mesh, each process with its part; the last axis over `fsdp`, the one before it over `tensor`."""

    def put(leaf):
        spec = PartitionSpec(*[None, "tensor", "fsdp"][3 - np.ndim(leaf) :])
        return jax.make_array_from_callback(np.shape(leaf), NamedSharding(mesh, spec), lambda at: np.asarray(leaf)[at])

    return jax.tree.map(put, trees())


def main(folder: str, port: str, index: str, file: str) -> None:
    jax.config.update("jax_num_cpu_devices", 4)
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(index))
    assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 8, 4)

    say = functools.partial(print, file=open(file, "w"), flush=True)  # noqa: SIM115

    def torn() -> None:
        if index == "1":
            raise DamagedError("torn")

    try:
        _together(torn)
    except DamagedError as error:
        say(f"on process 1 alone: {type(error).__name__}: {error}")

    like = arrays(mesh(fsdp=2, tensor=4))
    with Checkpoints(folder) as checkpoints:
        for step in reversed(checkpoints.steps()):
            try:
                found = [checkpoints.arrays(step, "trainable", like[0]), checkpoints.arrays(step, "state", like[1])]
            except DamagedError as error:
                say(f"step {step}: {type(error).__name__}")
                checkpoints.set_aside(step)
                continue
            same = True
            for new, old in zip(jax.tree.leaves(found), jax.tree.leaves(like), strict=True):
                assert new.sharding == old.sharding
                for ours, theirs in zip(new.addressable_shards, old.addressable_shards, strict=True):
                    same &= np.asarray(ours.data).tobytes() == np.asarray(theirs.data).tobytes()
            say(f"step {step}: {'same' if same else 'other'}, {checkpoints.json(step, 'data')}")
        say(f"left: {checkpoints.steps()}")
        for step in (5, 6):
            checkpoints.save(step, *like, data={"next_index": step}, meta={"seed": 0}, loss=float(step))
    with Checkpoints(folder, create=False) as checkpoints:
        say(f"saved: {checkpoints.steps()}, best {checkpoints.best()}")


if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = ""  # the tests' own number of devices
    main(*sys.argv[1:])
