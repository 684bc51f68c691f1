"""Memory, FLOPs and communication of training steps, compiled ahead of time for TPUs (no TPU: pip install '.[tpu]').

    python -m benchmarks.aot              # the plan; rows that results/aot.json holds already are not compiled again
    python -m benchmarks.aot --quick      # a small model cut to two layers, a few rows, results not kept
    python -m benchmarks.aot --only 'Llama-3.1-8B.*HiRA'
    python -m benchmarks.aot --table      # the rows that there are, as Markdown; and the methods against LoRA

Figures are per chip and step and do not vary from run to run. Memory is XLA's `memory_analysis`. `flops` are those of
matrix products with loops counted (`benchmarks.hlo`), `flops_xla` and `bytes_accessed` XLA's own, which count the body
of a loop once. `rings` are pieces of kernels or of their gradients that go round in permutes, which the compiler makes
of a gather or a reduction beside a product. `hbm_bytes` is what XLA's compiler has on that chip; a step `fits` if
the compiler says so. Where it does not, `error` has its words. Nothing is run: no time is claimed.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "aot.json"
HBM = {"v5e": int(15.75 * 2**30), "v5p": int(95.73 * 2**30)}  # what the compiler names when a program exceeds it
ENVIRONMENT = {  # read when jax and libtpu are loaded
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # of the machine that is not there; the topology asked for decides
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}

# Every transfer a collective with a name: left to itself, the compiler turns some gathers and reductions into rings of
# permutes beside a product, of which nobody can say what they are.
OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


def plan() -> list[Any]:
    """The cases of the table, the most telling first."""
    from benchmarks.training_step import Case

    methods = ("LoRA", "HiRA", "BoHA", "ABBA", "Hadamard Adapter", "full")
    slices = [  # each model on a slice that it is trained on
        ("Llama-3.2-1B", "v5e:1x1", (1, 1, 1)),
        ("Llama-3.1-8B", "v5e:2x4", (1, 8, 1)),
        ("Llama-3.1-70B", "v5p:2x2x4", (1, 16, 1)),
        ("Llama-3.2-3B", "v5e:2x2", (1, 4, 1)),
        ("Mistral-7B", "v5e:2x4", (1, 8, 1)),
        ("Gemma-2-9B", "v5e:4x4", (1, 16, 1)),
    ]
    cases = []
    for model, topology, mesh in slices:  # 4096 tokens a chip
        rows = mesh[0] * mesh[1]
        cases += [Case(model, method, topology, mesh, 4 * rows, 1024) for method in methods]
    for at, (model, topology, mesh) in enumerate(slices):
        rows = mesh[0] * mesh[1]
        cases += [Case(model, method, topology, mesh, rows, 4096) for method in methods[: 4 if at < 2 else 2]]
    # every merged method, and tensor parallelism
    merged = ("ABBA merged", "LoHa merged")
    cases += [Case("Llama-3.1-8B", method, "v5e:2x4", (1, 8, 1), 32, 1024) for method in merged]
    cases += [Case("Llama-3.1-8B", method, "v5e:2x4", (1, 4, 2), 16, 1024) for method in (*methods[:4], *merged)]
    cases += [Case("Llama-3.1-70B", method, "v5p:2x2x2", (1, 4, 2), 4, 4096) for method in ("LoRA", "HiRA")]
    # one model from one chip to 256, one row of 4096 tokens per group of chips that holds rows
    scaling = [
        ("v5e:1x1", (1, 1, 1)),
        ("v5e:8x8", (4, 16, 1)),
        ("v5e:16x16", (16, 16, 1)),
        ("v5e:16x16", (8, 16, 2)),
        ("v5p:1x1x1", (1, 1, 1)),
        ("v5p:4x8x8", (4, 64, 1)),
    ]
    for topology, mesh in scaling:
        cases += [Case("Llama-3.1-8B", method, topology, mesh, mesh[0] * mesh[1], 4096) for method in ("LoRA", "HiRA")]
    # qwix's LoRA on the same model, factors in both dtypes; ours in float32 is above
    for topology, mesh, batch in (("v5e:1x1", (1, 1, 1), 4), ("v5e:2x4", (1, 8, 1), 32)):
        peer = [("LoRA", "float32"), ("LoRA", "bfloat16"), ("qwix LoRA", "float32"), ("qwix LoRA", "bfloat16")]
        cases += [
            Case("Llama-3.2-1B", method, topology, mesh, batch, 1024, factor_dtype=dtype) for method, dtype in peer
        ]
    # the vocabulary doubled
    for topology, mesh, batch in (("v5e:1x1", (1, 1, 1), 4), ("v5e:2x4", (1, 8, 1), 32)):
        cases += [Case("Llama-3.2-1B", "LoRA", topology, mesh, batch, 1024, vocab_size=2 * 128256)]
    # quantised bases: on one chip that does not hold the model in bfloat16, and on four
    for dtype, topology, fsdp, kinds in (("nf4", "v5e:1x1", 1, methods[:5]), ("int8", "v5e:2x2", 4, methods[:2])):
        mesh = (1, fsdp, 1)
        cases += [Case("Llama-3.1-8B", kind, topology, mesh, fsdp, 4096, base_dtype=dtype) for kind in kinds]
    return list(dict.fromkeys(cases))


def quick() -> list[Any]:
    """A model cut to two layers on one and on eight chips."""
    from benchmarks.training_step import Case

    methods = ("LoRA", "HiRA", "BoHA", "ABBA", "ABBA merged", "LoHa merged")
    meshes = (("v5e:2x4", (1, 8, 1)), ("v5e:2x4", (1, 4, 2)))
    return [Case("Llama-3.2-1B", m, topology, mesh, 16, 1024, layers=2) for topology, mesh in meshes for m in methods]


def key(row: dict[str, Any]) -> str:
    """What tells rows apart; `--only` searches it."""
    extra = [row[name] for name in ("base_dtype", "factor_dtype") if row[name] != DEFAULTS[name]]
    extra += [f"{name}={row[name]}" for name in ("vocab_size", "layers", "rank") if row[name] != DEFAULTS[name]]
    mesh = "x".join(str(n) for n in row["mesh"])
    parts = [row["model"], row["method"], *extra, row["topology"], mesh, f"{row['batch']}x{row['seq']}", row["remat"]]
    return " ".join(map(str, parts))


def source() -> str:
    """A hash of the code of the step, so that rows of other code are noticed."""
    here, folder = Path(__file__).parent, Path(__file__).parent.parent / "hadamax"
    files = [path for path in sorted(folder.rglob("*.py")) if not OUTSIDE & {*path.relative_to(folder).parts}]
    files += [here / name for name in ("collectives.py", "hlo.py", "qwix_lora.py", "shapes.py", "training_step.py")]
    files += [here.parent / "train" / name for name in ("guard.py", "step.py")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


# files and folders that no training step runs through
OUTSIDE = {"hf", "checkpoint.py", "convert.py", "fingerprint.py", "files.py", "generate.py", "native.py", "rules.py"}
OUTSIDE |= {"__init__.py", "tensor_files.py", "version.py"}
DEFAULTS = {"base_dtype": "bfloat16", "factor_dtype": "float32", "vocab_size": None, "layers": None, "rank": 32}


def measure(case: Any) -> dict[str, Any]:
    """Compile a case in this process: its row."""
    import importlib.metadata

    import jax
    from jax.experimental import topologies

    from benchmarks.collectives import REDUCTIONS, collectives, of_kernels, totals
    from benchmarks.hlo import matmul_flops, parse
    from benchmarks.training_step import lowered

    whole = {"v5e:1x1": "v5e:2x2", "v5p:1x1x1": "v5p:2x2x1"}.get(case.topology, case.topology)  # hosts have four chips
    devices = topologies.get_topology_desc(whole, platform="tpu").devices[: case.chips]
    hbm = HBM[case.topology.split(":")[0]]
    row = dataclasses.asdict(case) | {"chips": case.chips, "hbm_bytes": hbm}
    row |= {"jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu"), "source": source()}
    program = lowered(case, devices)
    start = time.monotonic()
    try:
        compiled = program.compile(compiler_options=OPTIONS)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        measures = ("argument_bytes", "temp_bytes", "flops", "bytes_accessed", "collectives")
        return row | dict.fromkeys(measures) | {"fits": False, "error": str(error).splitlines()[0]}
    row["compile_seconds"] = round(time.monotonic() - start)
    memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    parts = ("argument", "temp", "output", "alias", "generated_code")
    row |= {f"{part}_bytes": int(getattr(memory, f"{part}_size_in_bytes")) for part in parts}
    row["needed_bytes"] = sum(row[f"{part}_bytes"] for part in parts) - 2 * row["alias_bytes"]
    row["fits"] = row["needed_bytes"] <= hbm
    parsed = parse(text)
    row |= {
        "flops": matmul_flops(parsed),
        "flops_xla": int(cost["flops"]),
        "bytes_accessed": int(cost["bytes accessed"]),
    }
    found = collectives(parsed)
    mesh = dict(zip(("data", "fsdp", "tensor"), case.mesh, strict=True))
    across_rows = [one for one in found if one.axes(mesh) & {"data", "fsdp"}]
    kernels = of_kernels(across_rows, kernel_sizes(case), case.config.num_hidden_layers, sorted(set(case.mesh)))
    reductions = [one for one in across_rows if one.kind in REDUCTIONS]
    return row | {
        "collectives": totals(found),
        "reductions_across_rows": totals(reductions),  # gradients, and sums of the loss
        "base_gathers": totals(kernels.gathers),
        "dense_gradients": totals(kernels.reductions),
        "rings": totals(kernels.rings),
        "stacked": totals(kernels.stacked),
        "unknown_loops": len(parsed.unknown),
    }


def kernel_sizes(case: Any) -> set[tuple[int, int]]:
    """`(in, out)` of a layer's projections."""
    c = case.config
    width, inner, queries = c.hidden_size, c.intermediate_size, c.num_attention_heads * c.head_dim
    return {
        (width, queries),
        (width, c.num_key_value_heads * c.head_dim),
        (queries, width),
        (width, inner),
        (inner, width),
    }


def compiled_apart(case: Any, dump: str | None = None) -> dict[str, Any]:
    """`measure` in a process of its own: the compiler ends the process on some errors, and keeps memory."""
    flags = {"XLA_FLAGS": f"--xla_dump_to={dump}"} if dump else {}
    command = [sys.executable, "-m", "benchmarks.aot", "--case", json.dumps(dataclasses.asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | ENVIRONMENT | flags)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def save(rows: list[dict[str, Any]], path: Path = RESULTS) -> None:
    """Write the rows under a temporary name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    partial.replace(path)


def mib(n: int | None) -> str:
    return "-" if n is None else f"{n / 2**20:,.0f}"


def amount(row: dict[str, Any], name: str) -> int:
    return sum(kind["bytes"] for kind in (row.get(name) or {}).values())


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Markdown: memory in MiB, FLOPs in T, per chip and step."""
    lines = [
        "| model, method | slice | mesh | batch x seq | arguments | temporaries | fits | TFLOP | gathers | reduced |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        kinds = row["collectives"] or {}
        gathers = mib(kinds.get("all-gather", {"bytes": 0})["bytes"])
        reductions = mib(sum(kinds.get(kind, {"bytes": 0})["bytes"] for kind in ("all-reduce", "reduce-scatter")))
        flops = "-" if row["flops"] is None else f"{row['flops'] / 1e12:.2f}"
        names = [f"{name} {row[name]}" for name in DEFAULTS if row[name] != DEFAULTS[name]]
        lines.append(
            f"| {', '.join([row['model'], row['method'], *names])} | {row['topology']}"
            f" | {' x '.join(map(str, row['mesh']))} | {row['batch']} x {row['seq']} | {mib(row['argument_bytes'])}"
            f" | {mib(row['temp_bytes'])} | {'yes' if row['fits'] else 'no'} | {flops} | {gathers} | {reductions} |"
        )
    return "\n".join(lines)


def against_lora(rows: Iterable[dict[str, Any]]) -> str:
    """Markdown: each method's step divided by LoRA's of the same model, slice, batch and dtypes."""
    rows = [row for row in rows if row["flops"] is not None]
    lines = [
        "| | temporaries | FLOPs | reduced across rows | base gathers | bytes | dense gradients | rings | stacked |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    loras = {key(row): row for row in rows if row["method"] == "LoRA"}
    for row in rows:
        lora = loras.get(key(row | {"method": "LoRA"}))
        if lora is None or row is lora:
            continue

        def ratio(mine: int, theirs: int) -> str:
            return f"{mine / theirs:.2f}" if theirs else "-" if not mine else f"{mine} to 0"

        counts = [sum(kind["count"] for kind in one["base_gathers"].values()) for one in (row, lora)]
        cells = [
            ratio(row["temp_bytes"], lora["temp_bytes"]),
            ratio(row["flops"], lora["flops"]),
            ratio(amount(row, "reductions_across_rows"), amount(lora, "reductions_across_rows")),
            ratio(*counts),
            ratio(amount(row, "base_gathers"), amount(lora, "base_gathers")),
            mib(amount(row, "dense_gradients")),
            mib(amount(row, "rings")),
            mib(amount(row, "stacked")),
        ]
        lines.append(f"| {key(row)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def vocabulary(rows: Iterable[dict[str, Any]]) -> str:
    """What the peak grows by when the vocabulary doubles, beyond what its matrices take."""
    from benchmarks.shapes import SHAPES

    lines = []
    rows = [row for row in rows if row["flops"] is not None]
    doubled = {key(row): row for row in rows if row["vocab_size"]}
    for row in rows:
        double = doubled.get(key(row | {"vocab_size": 2 * (row["vocab_size"] or SHAPES[row["model"]].vocab_size)}))
        if double:
            matrices = double["argument_bytes"] - row["argument_bytes"]
            beyond = double["needed_bytes"] - double["generated_code_bytes"] - matrices
            before = row["needed_bytes"] - row["generated_code_bytes"]
            lines.append(
                f"{key(row)}: the vocabulary doubled, the peak {mib(before)} MiB grows by {mib(beyond - before)} MiB"
                f" ({(beyond - before) / before:+.1%}) beyond the {mib(matrices)} MiB of its matrices"
            )
    return "\n".join(lines)


def show(rows: list[dict[str, Any]]) -> None:
    other = sum(row.get("source") != source() for row in rows)
    warning = f"{other} of {len(rows)} rows were compiled from other code than this: --fresh does them again"
    parts = [
        warning if other else "",
        table(rows),
        "Divided by LoRA's; the last three are MiB:",
        against_lora(rows),
        vocabulary(rows),
    ]
    print("\n\n".join(part for part in parts if part))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression searched in the rows' names")
    parser.add_argument("--quick", action="store_true", help="a few small rows, not kept")
    parser.add_argument("--fresh", action="store_true", help="compile again what the results hold")
    parser.add_argument("--list", action="store_true", help="the names of the rows")
    parser.add_argument("--table", action="store_true", help="show what the results hold, compile nothing")
    parser.add_argument("--dump", help="a folder for XLA's files; *memory-usage-report.txt lists the largest buffers")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        from benchmarks.training_step import Case

        fields = json.loads(args.case)
        print(json.dumps(measure(Case(**fields | {"mesh": tuple(fields["mesh"])}))))
        return
    kept = [] if args.quick or not RESULTS.exists() else json.loads(RESULTS.read_text())
    rows = {key(row): row for row in kept}
    if not args.table:
        cases = {key(dataclasses.asdict(case)): case for case in (quick() if args.quick else plan())}
        wanted = [name for name in cases if re.search(args.only, name)]
        for at, name in enumerate(wanted, 1):
            if args.list or (name in rows and not args.fresh):
                print(name, "(there)" * (name in rows))
                continue
            start = time.monotonic()
            rows[name] = compiled_apart(cases[name], args.dump)
            print(f"{at}/{len(wanted)} {name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
            if not args.quick:
                order = {name: at for at, name in enumerate(cases)}
                save([rows[name] for name in sorted(rows, key=lambda name: order.get(name, len(order)))])
        if args.list:
            return
    show([row for name, row in rows.items() if re.search(args.only, name)])


if __name__ == "__main__":
    main()
