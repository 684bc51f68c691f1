"""A run's checkpoint read back: the newest that is whole, and only onto the base and the adapters it was made with."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax

import hadamax as hx
from hadamax.checkpoint import Checkpoints, DamagedError
from hadamax.fingerprint import fingerprint, weights

T = TypeVar("T")
# What changes no parameter. A base that has moved is the same base: its weights are compared.
FREE = {
    "model.base",
    *(f"run.{name}" for name in ("out", "eval_every", "eval_rows", "save_every", "keep", "log_every", "resume")),
    *(f"run.{name}" for name in ("patience", "profile", "compilation_cache")),
    "optim.max_skips",
}


def resume(checkpoints: Checkpoints, state: Any, batches: Any, meta: dict[str, Any], wanted: bool) -> tuple[int, Any]:
    """The newest step and its state, with the data iterator at its position; 0 and `state` in a new run.

    Damaged checkpoints after that step are set aside. Nothing random is drawn in a step: the seed, in the
    configuration, makes the factors and the order of the rows, so a run has no other random state.

    Args:
        state: `(trainable, optimizer)`, a named tuple; the checkpoint's arrays are placed as its arrays are.
        meta: `{"config", "injection", "base", "members"}` of this run, `base` as `identity` gives it.
        wanted: False refuses a directory that has a checkpoint.

    Raises:
        ConfigError: the run has other adapters, or a new run was wanted.
        BaseMismatchError: another base.
        CheckpointError: no checkpoint is whole, or one has other tensors.
    """
    steps = checkpoints.steps()
    if not steps:
        return 0, state
    if not wanted:
        raise hx.ConfigError(
            f"{checkpoints.directory} holds step {steps[-1]}; give another run.out, or run.resume true"
        )
    meta = json.loads(json.dumps(meta))  # tuples are lists in JSON

    def read(step: int) -> tuple[Any, ...]:
        old = checkpoints.json(step, "meta")
        check_same(checkpoints, old, meta)
        position = checkpoints.json(step, "data")
        trainable = checkpoints.arrays(step, "trainable", state.trainable)
        return old, position, trainable, checkpoints.arrays(step, "state", state.optimizer)

    step, (old, position, trainable, optimizer) = newest(checkpoints, read)
    for damaged in steps[steps.index(step) + 1 :]:
        checkpoints.set_aside(damaged)
    for section, values in meta["config"].items():
        # adapters were compared; another mesh changes no more than the order of sums
        for name, value in values.items() if section not in ("adapter", "mesh") else ():
            before = old["config"].get(section, {}).get(name)
            if f"{section}.{name}" not in FREE and before != value:
                changed = f"{section}.{name} was {before!r}, now {value!r}"
                say(f"note: {changed}; the resumed run is not the uninterrupted one")
    batches.set_state(position)
    return step, state._replace(trainable=trainable, optimizer=optimizer)


def newest(checkpoints: Checkpoints, read: Callable[[int], T]) -> tuple[int, T]:
    """The newest step that `read` finds whole, with what it returns; each damaged one is said in a line.

    Raises:
        CheckpointError: none is whole.
    """
    steps, reason = checkpoints.steps(), None
    for step in reversed(steps):
        try:
            return step, read(step)
        except DamagedError as error:
            reason = error
        if step != steps[0]:
            say(f"note: {reason}; using the one before")
    raise hx.CheckpointError(f"no checkpoint in {checkpoints.directory} is whole: {reason}; give another run.out")


def check_same(checkpoints: Checkpoints, old: dict[str, Any], meta: dict[str, Any]) -> None:
    """Raises `ConfigError` where the adapters differ, and `BaseMismatchError` where the base does."""
    for name, there, here in (
        ("adapters", old["injection"], meta["injection"]),
        ("train_base", old["config"]["adapter"]["train_base"], meta["config"]["adapter"]["train_base"]),
        ("seeds and learning rates at once", old.get("members"), meta["members"]),
    ):
        if here != there:
            found = f"was made with other {name}: {difference(there, here)}"
            raise hx.ConfigError(f"{checkpoints.directory} {found}; give another run.out")
    check_base(checkpoints, old["base"], meta["base"])


def identity(frozen: Any) -> dict[str, Any]:
    """What tells a base from another: `{path: {"shape", "dtype", "fingerprint"}}` of the weights that do not train.

    They are read once, on their devices.

    Args:
        frozen: parameters, with None at the leaves that train, as `hx.split` gives them.
    """
    leaves = weights(frozen)
    prints = fingerprint(leaves)
    return {
        path: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "fingerprint": prints[path]}
        for path, leaf in leaves.items()
    }


def check_base(checkpoints: Checkpoints, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Compares two identities. float16 rounds otherwise than the rest: beside it only shapes are compared.

    Raises:
        BaseMismatchError: another base, with the first weight that differs.
    """
    made = f"{checkpoints.directory} was made on another base"
    for path in [*there, *here]:
        if path not in here or path not in there:
            found = f"this one {'lacks' if path in there else 'has'} the weight {path!r}"
            raise hx.BaseMismatchError(f"{made}: {found}; give the run's base")
        old, new = there[path], here[path]
        half = (old["dtype"] == "float16") != (new["dtype"] == "float16")
        for name in ("shape",) if half else ("shape", "fingerprint"):
            if old[name] != new[name]:
                found = f"{path!r} had the {name} {old[name]}, here it has {new[name]}"
                raise hx.BaseMismatchError(f"{made}: {found}; give the run's base")


def difference(there: Any, here: Any, where: str = "") -> str:
    """The first difference of two JSON values.

    Example:
        >>> difference({"rules": [{"rank": 8}]}, {"rules": [{"rank": 16}]})
        'rules.0.rank was 8, now 16'
    """
    if type(there) is type(here) and isinstance(there, dict | list) and len(there) == len(here):
        pairs = there.items() if isinstance(there, dict) else enumerate(there)
        for key, value in pairs:
            if isinstance(here, dict) and key not in here:
                break
            if value != here[key]:
                return difference(value, here[key], f"{where}.{key}".lstrip("."))
    return f"{where} was {json.dumps(there)}, now {json.dumps(here)}".lstrip()


def say(line: str) -> None:
    """Prints a line, in the first process."""
    if jax.process_index() == 0:
        print(line, flush=True)
