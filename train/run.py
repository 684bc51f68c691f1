"""What a run is made of: the base with its tokenizer, the adapters' injection, and a finished run read back."""

import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import hadamax as hx
from hadamax import hf
from hadamax.checkpoint import Checkpoints, DamagedError
from hadamax.models import Decoder, DecoderConfig
from train.config import AdapterConfig, Config, ModelConfig
from train.group import Group
from train.members import Member, select, stacked
from train.parsing import from_dict
from train.resume import check_base, identity, newest, say


class Base(NamedTuple):
    """A model with its frozen parameters, placed on a mesh, and its tokenizer."""

    model: Decoder
    params: Any
    config: DecoderConfig
    tokenizer: Any
    mesh: Mesh


class Run(NamedTuple):
    """A run read back from its directory."""

    config: Config
    base: Base
    injection: hx.Injection | None
    trainable: dict[str, Any]
    step: int


def load_base(config: ModelConfig, mesh: Mesh | None = None) -> Base:
    """The model, its parameters and its tokenizer.

    Args:
        mesh: for the parameters, of which each process reads what its devices hold; the first device where None.

    Raises:
        CheckpointError: a directory that is not there or damaged, or that has no tokenizer with an end token.
    """
    from transformers import AutoTokenizer  # slow to import

    mesh = hx.make_mesh(devices=jax.local_devices()[:1]) if mesh is None else mesh
    model, params, decoder = hf.load_pretrained(
        config.base, dtype=config.dtype, mesh=mesh, task="causal_lm", quantize=config.quantize
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.base)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise hx.CheckpointError(f"{config.base} has no tokenizer that transformers can load: {reason}") from error
    if tokenizer.eos_token_id is None:
        raise hx.CheckpointError(f"the tokenizer of {config.base} has no eos_token; the model could not learn to stop")
    if len(tokenizer) > decoder.vocab_size:
        raise hx.CheckpointError(f"the tokenizer has {len(tokenizer)} tokens, the model only {decoder.vocab_size}")
    return Base(model.clone(remat=config.remat), params, decoder, tokenizer, mesh)


def injection_of(config: AdapterConfig, view: str | None) -> hx.Injection | None:
    """The injection of the `adapter` section, or None where it adapts nothing.

    Raises:
        ConfigError: an unknown method or option, with the nearest names; nothing to train.
    """
    if config.rules is not None:
        rules: dict[Any, Any] = {pattern: _rule(pattern, dict(rule)) for pattern, rule in config.rules.items()}
        return hx.inject(rules, view=view, exclude=config.exclude)
    if config.method is None:
        if not config.train_base:
            raise hx.ConfigError("adapter.method is null and adapter.train_base empty: nothing would train")
        return None
    options = dict(config.options)
    if config.rank is not None:
        options["rank"] = config.rank
    elif takes_rank(config.method) and not options.keys() & {"rank", "r1", "r2"}:
        options["rank"] = 32
    try:
        adapter = hx.adapter_from_config({"method": config.method, **options})
    except hx.ConfigError as error:
        if found := re.search(r"missing a required argument: '(\w+)'", str(error)):
            raise hx.ConfigError(f"{error}; it goes into adapter.options, as '{{{found[1]}: 4}}'") from None
        raise
    return hx.inject(dict.fromkeys(config.targets, adapter), view=view, exclude=config.exclude)


def takes_rank(method: str) -> bool:
    """Whether a method has a rank; False for unknown names.

    Example:
        >>> takes_rank("hira"), takes_rank("ia3")
        (True, False)
    """
    return method in hx.METHODS and "rank" in inspect.signature(hx.METHODS[method]).parameters


def _rule(pattern: str, rule: dict[str, Any]) -> Any:
    place = {name: rule.pop(name, None) for name in ("view", "layers")}
    try:
        return hx.at(hx.adapter_from_config(rule), **place)
    except hx.ConfigError as error:
        raise hx.ConfigError(f"adapter.rules, pattern {pattern!r}: {error}") from None


def apply_of(base: Base, injection: hx.Injection | None) -> Callable[..., Any]:
    """`(params, adapters, ...) -> model.apply(adapted params, ...)`, for parameters placed as the base's are."""
    return _adapted(base.model.apply, injection, hx.param_shardings(base.params, base.mesh))


def unplaced_apply_of(base: Base, injection: hx.Injection | None) -> Callable[..., Any]:
    """As `apply_of`, of a program that knows no mesh: each merge is in it once, not once for each shard."""
    return _adapted(base.model.clone(mesh=None).apply, injection, None)


def _adapted(apply: Callable[..., Any], injection: hx.Injection | None, placed: Any) -> Callable[..., Any]:
    if injection is not None:
        return injection.apply(apply, placed)
    lazy = hx.lazily(apply)
    return lambda params, adapters, *args, **kwargs: lazy(params, *args, **kwargs)


def initial_trainable(
    key: jax.Array, params: Any, injection: hx.Injection | None, train_base: list[str]
) -> dict[str, Any]:
    """`{"adapters": {path: factors}, "base": tree}`, the trained base leaves as float32 copies and None elsewhere.

    Raises:
        NoMatchError, NotAMatrixError, ConfigError: rules that do not fit the model.
    """
    base, _ = hx.split(params, train_base)
    return {
        "adapters": {} if injection is None else injection.init(key, params),
        "base": jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), base),
    }


def trainable_shardings(base: Base, injection: hx.Injection | None, train_base: list[str]) -> dict[str, Any]:
    """Where `initial_trainable`'s leaves lie: factors as the kernels they belong to, base leaves where they were."""
    placed = hx.param_shardings(base.params, base.mesh)
    adapters = {} if injection is None else injection.shardings(base.params, placed)
    return {"adapters": adapters, "base": hx.split(placed, train_base)[0]}


def load_run(
    directory: str | Path,
    base: str | None = None,
    dtype: Any = None,
    step: Literal["last", "best"] | int = "last",
    member: int | None = None,
    mesh: Mesh | None = None,
) -> Run:
    """A checkpoint of a run, on its base.

    Args:
        directory: `run.out` of the run.
        base: where the base model is now, if it has moved.
        dtype: of the base, in place of the run's.
        step: `"last"`, the newest; where that one is damaged, the one before it, which is said. `"best"`, of those
            saved at an evaluation the one of the lowest held-out loss. Or a step.
        member: which adapter of a run that trained several at once; None takes the one of the lowest held-out loss,
            which is said.
        mesh: as for `load_base`; any, whatever the run had.

    Raises:
        ConfigError: no such member.
        CheckpointError: no run, no such checkpoint, a damaged one.
        BaseMismatchError: another base than the run's.
    """
    if not Path(directory).is_dir():
        raise hx.CheckpointError(f"no run directory {directory}")
    load = functools.cache(load_base)

    def read(step: int) -> tuple[dict[str, Any], Run]:
        meta = checkpoints.json(step, "meta")
        config = from_dict(meta["config"])
        model = config.model
        loaded = load(ModelConfig(base or model.base, dtype or model.dtype, quantize=model.quantize), mesh)
        injection = None if meta["injection"] is None else hx.from_config(meta["injection"])
        key, train_base = jax.random.key(0), config.adapter.train_base
        like = jax.eval_shape(lambda p: initial_trainable(key, p, injection, train_base), loaded.params)
        at = trainable_shardings(loaded, injection, train_base)
        members = [Member(*values) for values in meta.get("members") or ()]
        if not members:
            if member:
                raise hx.ConfigError(f"{directory} has one adapter, no --member {member}")
            like = jax.tree.map(lambda leaf, sharding: leaf.update(sharding=sharding), like, at)
            return meta, Run(config, loaded, injection, checkpoints.arrays(step, "trainable", like), step)
        chosen = Group(tuple(members), **meta["group"]).chosen(member, directory)
        say(
            f"adapter {chosen} of {len(members)} ({members[chosen]})"
            + ", of the lowest held-out loss" * (member is None)
        )
        like = jax.tree.map(
            lambda leaf, sharding: leaf.update(shape=(len(members), *leaf.shape), sharding=sharding), like, stacked(at)
        )
        every = checkpoints.arrays(step, "trainable", like)
        trainable = jax.jit(select, static_argnums=1, out_shardings=at)(every, chosen)
        return meta, Run(config, loaded, injection, trainable, step)

    with Checkpoints(Path(directory) / "checkpoints", create=False) as checkpoints:
        if not (steps := checkpoints.steps()):
            raise hx.CheckpointError(f"{directory} holds no checkpoint yet")
        if step == "last":
            _, (meta, run) = newest(checkpoints, read)
        elif (chosen := checkpoints.best() if step == "best" else step) in steps:
            try:
                meta, run = read(chosen)
            except DamagedError as error:
                others = ", ".join(str(there) for there in steps if there != chosen)
                raise hx.CheckpointError(f"{error}; the other steps, for --step: {others or 'none'}") from error
        else:
            wanted = "none saved at a step that was evaluated" if step == "best" else f"no step {step}"
            raise hx.CheckpointError(f"{directory} holds the steps {', '.join(map(str, steps))}, {wanted}")
        _, frozen = hx.split(run.base.params, run.config.adapter.train_base)
        check_base(checkpoints, meta["base"], identity(frozen))
        return run
