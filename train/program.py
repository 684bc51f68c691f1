"""A run's program: its first state and its steps, for one adapter or for several at once over one base."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax

import hadamax as hx
from train import guard, members, optim
from train.config import OptimConfig
from train.members import Member
from train.run import Base, apply_of, initial_trainable, trainable_shardings
from train.step import Shardings, State, make_steps, placement


class Program(NamedTuple):
    """What is compiled, and of what.

    Attributes:
        begin: the base's parameters -> the first `State`.
        train, evaluate: as `train.step.make_steps` gives them. Of several adapters, whatever is of one leads with their
            axis.
        shardings: where the arguments lie.
        frozen: the base without its trained leaves.
        shapes: of one adapter's trainable tree, with where the leaves lie.
        adapters: `Adapter.config` of each path.
    """

    begin: Callable[[Any], State]
    train: Any
    evaluate: Any
    shardings: Shardings
    frozen: Any
    shapes: Any
    adapters: dict[str, Any]


def assemble(
    base: Base,
    injection: hx.Injection | None,
    train_base: list[str],
    config: OptimConfig,
    each: Sequence[Member],
    steps: int,
    grad_accum: int = 1,
) -> Program:
    """The program of a run.

    Args:
        base: its parameters may be `jax.ShapeDtypeStruct`s that say where they lie.
        train_base: paths of the base leaves that train.
        config: of the optimiser; each member has its own rate.
        each: the members; one is without the axis.
        steps: of the schedule.
        grad_accum: micro-batches of a step.

    Raises:
        NoMatchError, NotAMatrixError, ConfigError: rules that do not fit the model.
    """
    init = functools.partial(initial_trainable, injection=injection, train_base=train_base)
    lie = trainable_shardings(base, injection, train_base)
    shapes = jax.eval_shape(init, jax.random.key(0), base.params)
    shapes = jax.tree.map(lambda leaf, sharding: leaf.update(sharding=sharding), shapes, lie)
    adapters = {path: t.adapter.config for path, t in injection.targets(base.params).items()} if injection else {}
    rates = [optim.learning_rates(shapes, adapters, dataclasses.replace(config, lr=member.lr)) for member in each]

    def optimizer_of(rates: Any) -> optax.GradientTransformationExtraArgs:
        return guard.guard(optim.build(config, rates, steps, several=len(each) > 1), config.spike)

    def begin(key: jax.Array, rates: Any, params: Any) -> State:
        trainable = init(key, params)
        return State(trainable, optimizer_of(rates).init(trainable))

    optimizer = optimizer_of(rates[0])
    _, frozen = hx.split(base.params, train_base)
    shardings = placement(optimizer, shapes, frozen, base.mesh)
    train, evaluate = make_steps(apply_of(base, injection), optimizer, grad_accum, shardings)
    first = jax.random.key(each[0].seed), rates[0]
    if len(each) > 1:
        train, evaluate, shardings = members.steps(train, evaluate, shardings)
        begin, first = jax.vmap(begin, (0, 0, None)), (members.keys(each), members.together(rates))
    begin = functools.partial(jax.jit(begin, out_shardings=shardings.state), *first)  # one program for all seeds
    return Program(begin, train, evaluate, shardings, frozen, shapes, adapters)
