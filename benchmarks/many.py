"""K adapters trained at once over one base, against K runs one after the other: the training step that finetune runs.

    python -m benchmarks.many [--only 'time*']

Time: one step of K together, then K steps of one, in turns in one process, on the demo's decoder; the median over
rounds of the ratio of the two holds when the machine's speed drifts. Memory: XLA's `memory_analysis` of the step
compiled ahead of time for a TPU v5e that is not there (arguments, temporaries and code; a CPU's figures do not tell an
accelerator's; pip install '.[tpu]'), all K together against K programs of one at the same time, each with its own base.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hadamax as hx
from benchmarks.aot import ENVIRONMENT
from benchmarks.hlo import matmul_flops, parse
from benchmarks.shapes import SHAPES
from benchmarks.training_step import METHODS
from hadamax.models import Decoder
from train import cli, demo
from train.config import ModelConfig, OptimConfig
from train.experiments import experiment
from train.experiments.experiment import Row, table
from train.members import Member
from train.program import Program, assemble
from train.run import Base, load_base


def program(base: Base, method: str, rank: int, count: int) -> Program:
    """That of `count` adapters with their default learning rates."""
    entry = METHODS[method]
    assert entry is not None
    where, adapter = entry
    injection = hx.inject({where: adapter(rank)}, view=base.model.view)
    return assemble(base, injection, [], OptimConfig(), [Member(seed, None) for seed in range(count)], steps=1000)


def rows_of(batch: int, length: int, made: Program) -> Row:
    """Shapes of a batch, with where it lies."""
    row = jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=made.shardings.batch)
    return {"input_ids": row, "targets": row, "weights": row.update(dtype=jnp.float32)}


def stepper(base: Base, made: Program, batch: int, length: int) -> Callable[[], None]:
    """One training step, to its end; the first two compile."""
    ids = np.random.default_rng(0).integers(3, 259, (batch, length), np.int32)
    values = {"input_ids": ids, "targets": np.roll(ids, -1, 1), "weights": np.ones((batch, length), np.float32)}
    rows = jax.device_put(values, made.shardings.batch)
    state = made.begin(base.params)

    def step() -> None:
        nonlocal state
        state, figures = made.train(state, made.frozen, rows)
        jax.block_until_ready(figures)

    return step


def seconds(step: Callable[[], None], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        step()
    return time.perf_counter() - start


def times(methods: list[str], members: list[int], rank: int, batch: int, length: int, rounds: int) -> list[Row]:
    """Milliseconds of a step of K and of K steps, and the ratio's median, smallest and largest."""
    base, rows = load_base(ModelConfig(str(demo.BASE))), []
    for method in methods:
        one = stepper(base, program(base, method, rank, 1), batch, length)
        for count in members:
            together = stepper(base, program(base, method, rank, count), batch, length)
            for step in (one, together):
                seconds(step, 2)
            pairs = [(seconds(together, 1), seconds(one, count)) for _ in range(rounds)]
            ratios = [a / b for a, b in pairs]
            ours, theirs = (1e3 * statistics.median(column) for column in zip(*pairs, strict=True))
            spread = {"ratio": statistics.median(ratios), "smallest": min(ratios), "largest": max(ratios)}
            where = {"device": jax.devices()[0].device_kind, "cores": os.cpu_count()}
            rows.append({"method": method, "K": count, "at_once_ms": ours, "one_by_one_ms": theirs} | spread | where)
    return rows


def needed(compiled: Any) -> tuple[int, int]:
    """Bytes while a step runs, and those of its temporaries."""
    memory = compiled.memory_analysis()
    whole = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return whole + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes, memory.temp_size_in_bytes


def memory(model: str, methods: list[str], members: list[int], rank: int, batch: int, length: int) -> list[Row]:
    """Bytes of a step compiled for one chip (bfloat16 base, blocks rematerialised); its FLOPs over K times one's."""
    from jax.experimental import topologies

    os.environ |= ENVIRONMENT  # read when libtpu is loaded
    chip = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices[:1]
    mesh, config, rows = hx.make_mesh(devices=chip), SHAPES[model], []
    decoder = Decoder(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, remat="full", mesh=mesh)
    params = jax.eval_shape(decoder.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    params = jax.tree.map(lambda leaf, at: leaf.update(sharding=at), params, hx.param_shardings(params, mesh))
    base = Base(decoder, params, config, None, mesh)
    for method in methods:
        figures = {}
        for count in (1, *members):
            made = program(base, method, rank, count)
            state = jax.eval_shape(made.begin, params)
            state = jax.tree.map(lambda leaf, at: leaf.update(sharding=at), state, made.shardings.state)
            compiled = made.train.lower(state, made.frozen, rows_of(batch, length, made)).compile()
            figures[count] = *needed(compiled), matmul_flops(parse(compiled.as_text()))
        one = figures[1]
        rows += [
            {"method": method, "K": count, "at_once": whole, "temporaries": temporaries, "one": one[0]}
            | {"flops_ratio": flops / (count * one[2])}
            for count, (whole, temporaries, flops) in figures.items()
            if count > 1
        ]
    return rows


SHORT: Row = {"methods": ["LoRA", "HiRA", "BoHA", "ABBA"], "members": [2, 5, 8], "rank": 8, "length": 32, "rounds": 9}
PARTS: dict[str, Any] = {
    "time, 1 row": (times, SHORT | {"batch": 1}),
    "time, 8 rows": (times, SHORT | {"batch": 8}),
    "memory": (
        memory,
        {
            "model": "Llama-3.2-1B",
            "methods": SHORT["methods"],
            "members": [2, 4, 8],
            "rank": 32,
            "batch": 1,
            "length": 1024,
        },
    ),
}


def report(results: Row) -> str:
    parts = ["# K adapters at once\n\nA training step of K adapters over one frozen base, against K steps of one."]
    for name, part in results.items():
        show = of_memory if name == "memory" else of_time
        parts.append(f"## {name[0].upper()}{name[1:]}\n\n{show(part['settings'], part['rows'])}")
    return "\n\n".join(parts)


def of_time(settings: Row, rows: list[Row]) -> str:
    keys = ("method", "K", "at_once_ms", "one_by_one_ms", "ratio", "smallest", "largest")
    head = ("method", "K", "at once ms", "K x one ms", "ratio", "smallest", "largest")
    return f"""The demo's decoder, float32, rank {settings["rank"]} on the seven projections, {settings["batch"]} x
{settings["length"]} tokens, in turns on {rows[0]["cores"]} cores ({rows[0]["device"]}); medians of {settings["rounds"]}
rounds, of the ratio too, which is so not the quotient of its row. Of another machine only the ratios may hold.

{table(([row[key] for key in keys] for row in rows), head)}"""


def of_memory(settings: Row, rows: list[Row]) -> str:
    head = (
        "method",
        "K",
        "at once",
        "of it temporaries",
        "one",
        "K programs",
        "at once / K programs",
        "FLOPs / K x one",
    )
    lines = []
    for row in rows:
        sizes = (row["at_once"], row["temporaries"], row["one"], row["K"] * row["one"])
        ratio = row["at_once"] / (row["K"] * row["one"])
        lines.append((row["method"], row["K"], *(f"{size / 2**30:.2f}" for size in sizes), ratio, row["flops_ratio"]))
    return f"""{settings["model"]}, bfloat16, rank {settings["rank"]} on the seven projections, {settings["batch"]} x
{settings["length"]} tokens, every block rematerialised; compiled for one TPU v5e, not run. GiB: of the program that
trains K at once, of one that trains one (all that K runs need, one after the other), and of K such programs.

{table(lines, head)}"""


def main(argv: Sequence[str] | None = None) -> None:
    experiment.main("many", PARTS, report, None, argv, __doc__, needed=(), package="benchmarks")


if __name__ == "__main__":
    cli.main(main)
