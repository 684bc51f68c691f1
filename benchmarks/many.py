"""K adapters trained at once over one base, against K runs one after the other: the training step that finetune runs.

    python -m benchmarks.many [--members 2,4,8] [--rounds 7]      # time, on the demo's decoder, in turns
    python -m benchmarks.many --tpu [--members 2,4,8]              # memory and FLOPs on a TPU v5e that is not there

Time: one step of K together, then K steps of one, in one process; the median over rounds of the ratio of the two holds
when the machine's speed drifts. Memory: XLA's `memory_analysis` of the step compiled ahead of time (arguments,
temporaries and code; a CPU's figures do not tell an accelerator's; no TPU: pip install '.[tpu]'), all K together
against K programs of one at the same time, each with its own base.
"""

import argparse
import functools
import os
import statistics
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import hadamax as hx
from benchmarks.aot import ENVIRONMENT
from benchmarks.hlo import matmul_flops, parse
from benchmarks.shapes import SHAPES
from benchmarks.training_step import METHODS
from hadamax.models import Decoder
from train import demo, members, optim
from train.config import ModelConfig, OptimConfig
from train.guard import guard
from train.run import initial_trainable, load_base
from train.step import State, make_steps, placement

NAMES = ("LoRA", "HiRA", "BoHA", "ABBA")


class Program(NamedTuple):
    """A training step, and what makes its first state of the base's parameters."""

    step: Any
    begin: Any
    frozen: Any
    batch: Any
    shardings: Any


def program(model: Any, params: Any, mesh: Any, method: str, rank: int, count: int, batch: int, length: int) -> Program:
    """The step of `count` adapters, as `train.finetune` makes it; one is without their axis.

    Args:
        params: arrays, or `jax.ShapeDtypeStruct`s with their shardings.
    """
    entry = METHODS[method]
    assert entry is not None
    where, adapter = entry
    injection = hx.inject({where: adapter(rank)}, view=model.view)
    placed, key = hx.param_shardings(params, mesh), jax.random.key(0)
    init = functools.partial(initial_trainable, injection=injection, train_base=[])
    lie = {"adapters": injection.shardings(params, placed), "base": hx.split(placed, [])[0]}
    shapes = jax.tree.map(lambda leaf, at: leaf.update(sharding=at), jax.eval_shape(init, key, params), lie)
    adapters = {path: target.adapter.config for path, target in injection.targets(params).items()}
    config = OptimConfig()
    rates = optim.learning_rates(shapes, adapters, config)

    def optimizer_of(rates):
        return guard(optim.build(config, rates, 1000, count > 1))

    def begin(key, rates, params):
        trainable = init(key, params)
        return State(trainable, optimizer_of(rates).init(trainable))

    optimizer = optimizer_of(rates)
    frozen = hx.split(params, [])[1]
    shardings = placement(optimizer, shapes, frozen, mesh)
    step, evaluate = make_steps(injection.apply(model.apply, placed), optimizer, 1, shardings)
    first = functools.partial(begin, key, rates)
    if count > 1:
        step, _, shardings = members.steps(step, evaluate, shardings)
        keys, each = jax.random.split(key, count), members.together([rates] * count)
        first = functools.partial(jax.vmap(begin, (0, 0, None)), keys, each)
    dtypes = {"input_ids": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    row = functools.partial(jax.ShapeDtypeStruct, (batch, length), sharding=shardings.batch)
    rows = {name: row(dtype=kind) for name, kind in dtypes.items()}
    return Program(step, jax.jit(first, out_shardings=shardings.state), frozen, rows, shardings)


def needed(compiled: Any) -> tuple[int, int]:
    """Bytes while a step runs, and those of its temporaries."""
    memory = compiled.memory_analysis()
    whole = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return whole + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes, memory.temp_size_in_bytes


def seconds(step: Any, times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        step()
    return time.perf_counter() - start


def times(methods: list[str], counts: list[int], rounds: int, batch: int, length: int) -> None:
    """Prints the table of times on the demo's decoder."""
    base = load_base(ModelConfig(str(demo.BASE)))
    rng = np.random.default_rng(0)
    print(f"demo's decoder, {batch} x {length} tokens, rank 8, float32, {jax.default_backend()}, {rounds} rounds")
    print(f"{'method':8} {'K':>3} {'at once ms':>11} {'K x one ms':>11} {'ratio':>6} {'(min to max)':>15}")

    def stepper(made: Program):
        ids = rng.integers(3, 259, (batch, length), np.int32)
        values = {"input_ids": ids, "targets": np.roll(ids, -1, 1), "weights": np.ones((batch, length), np.float32)}
        rows = jax.device_put(values, jax.tree.map(lambda row: row.sharding, made.batch))
        state = made.begin(base.params)

        def step():
            nonlocal state
            state, values = made.step(state, made.frozen, rows)
            jax.block_until_ready(values)

        return step

    for name in methods:
        make = functools.partial(program, base.model, base.params, base.mesh, name, 8, batch=batch, length=length)
        one = stepper(make(count=1))
        for count in counts:
            together = stepper(make(count=count))
            for step in (one, together):  # compiles
                seconds(step, 2)
            pairs = [(seconds(together, 1), seconds(one, count)) for _ in range(rounds)]
            ratios = [a / b for a, b in pairs]
            ours, theirs = (1e3 * statistics.median(column) for column in zip(*pairs, strict=True))
            spread = f"({min(ratios):.2f} to {max(ratios):.2f})"
            figures = f"{ours:11.0f} {theirs:11.0f} {statistics.median(ratios):6.2f} {spread:>15}"
            print(f"{name:8} {count:3} {figures}", flush=True)


def memory(methods: list[str], counts: list[int], name: str, batch: int, length: int) -> None:
    """Prints the table of memory and FLOPs of steps compiled for one chip."""
    from jax.experimental import topologies

    chip = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices[:1]
    mesh = hx.make_mesh(devices=chip)
    model = Decoder(SHAPES[name], dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, remat="full", mesh=mesh)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    places = hx.param_shardings(params, mesh)
    params = jax.tree.map(lambda leaf, at: leaf.update(sharding=at), params, places)
    print(f"{name}, TPU v5e (1 chip), {batch} x {length} tokens, rank 32, bfloat16 base, remat full")
    head = "".join(f"{name:>13}" for name in ("at once GiB", "K x one GiB", "ratio", "temporaries", "FLOPs ratio"))
    print(f"{'method':8} {'K':>3}{head}")
    for method in methods:
        figures = {}
        for count in (1, *counts):
            made = program(model, params, mesh, method, 32, count, batch, length)
            state = jax.eval_shape(made.begin, params)
            state = jax.tree.map(lambda leaf, at: leaf.update(sharding=at), state, made.shardings.state)
            compiled = made.step.lower(state, made.frozen, made.batch).compile()
            figures[count] = needed(compiled), matmul_flops(parse(compiled.as_text()))
            if count > 1:
                (bytes_, temporaries), flops = figures[count]
                apart = count * figures[1][0][0]
                values = (
                    bytes_ / 2**30,
                    apart / 2**30,
                    bytes_ / apart,
                    temporaries / 2**30,
                    flops / (count * figures[1][1]),
                )
                print(f"{method:8} {count:3}" + "".join(f"{value:13.2f}" for value in values), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", default="2,4,8")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=None, help="rows of a batch (8; 1 with --tpu)")
    parser.add_argument("--methods", default=",".join(NAMES))
    parser.add_argument("--tpu", action="store_true", help="memory on a TPU in place of times here")
    args = parser.parse_args()
    counts = [int(count) for count in args.members.split(",")]
    methods = args.methods.split(",")
    if args.tpu:
        memory(methods, counts, "Llama-3.2-1B", args.batch or 1, 1024)
    else:
        times(methods, counts, args.rounds, args.batch or 8, 32)


if __name__ == "__main__":
    if "--tpu" in sys.argv:  # read when jax and libtpu start
        os.environ |= ENVIRONMENT
    main()
