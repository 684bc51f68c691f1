"""What a compiled program sends between chips: its collectives with shapes, bytes per step, and the mesh axes crossed.

Bytes are those of one chip's larger side: what an all-gather gives, what a reduction takes. A loop's collectives count
once per trip (`benchmarks.hlo`).
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

from benchmarks.hlo import Computation, Instruction, Program, Shape, parse, shapes

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
REDUCTIONS = ("all-reduce", "reduce-scatter")


class Collective(NamedTuple):
    """One collective instruction."""

    kind: str
    shapes: tuple[Shape, ...]  # of the larger side, on one chip
    runs: int  # times per step
    groups: np.ndarray | None  # [groups, members], places in the mesh; None where the text has none that we read
    op_name: str
    name: str

    @property
    def bytes(self) -> int:
        """Of one step on one chip."""
        return self.runs * sum(shape.bytes for shape in self.shapes)

    def axes(self, mesh: Mapping[str, int]) -> set[str]:
        """The mesh axes that it crosses, given `mesh.shape`; all of them where its groups are unknown."""
        if self.groups is None:
            return set(mesh)
        places = np.stack(np.unravel_index(self.groups, tuple(mesh.values())))
        return {axis for axis, at in zip(mesh, places, strict=True) if np.any(at != at[:, :1])}


def collectives(program: str | Program) -> list[Collective]:
    """The collectives of a compiled program, or of its text.

    Example:
        >>> collectives('''ENTRY %main (x: f32[2]) -> f32[8] {
        ...   %x = f32[2]{0} parameter(0)
        ...   ROOT %all-gather = f32[8]{0} all-gather(%x), replica_groups=[1,4]<=[4], dimensions={0}
        ... }''')[0].bytes
        32
    """
    program = parse(program) if isinstance(program, str) else program
    found: dict[str, Collective] = {}
    for computation, instruction, times in program.instructions():
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS:
            # The TPU compiler spreads a gather over the fusions that it overlaps with, also over those of a loop that
            # it began before: a channel is one gather, which runs as often as the least of its parts.
            channel = instruction.attribute("channel_id") if kind == "all-gather" else None
            one, key = _collective(kind, computation, instruction, times), channel or instruction.name
            if key not in found or times < found[key].runs:
                found[key] = one
    return list(found.values())


def totals(found: Iterable[Collective]) -> dict[str, dict[str, int]]:
    """`{kind: {"count": ..., "bytes": ...}}` of one step on one chip."""
    result: dict[str, dict[str, int]] = {}
    for one in found:
        kind = result.setdefault(one.kind, {"count": 0, "bytes": 0})
        kind["count"] += one.runs
        kind["bytes"] += one.bytes
    return dict(sorted(result.items()))


def matching(
    found: Iterable[Collective],
    wanted: Iterable[tuple[int, int]],
    shards: Sequence[int] = (1,),
    stack: int | None = None,
) -> list[Collective]:
    """Those that move a matrix `[in, out]` or its transpose, whole or as one chip's part of it.

    Axes of length 1 are overlooked. Give the model sizes that its activations have not, or these match, too.

    Args:
        wanted: sizes `(in, out)`.
        shards: by what each of the two may be divided: the sizes of the mesh's axes.
        stack: look for that many matrices in one array.
    """
    parts = set()
    for (n_in, n_out), a, b in product(wanted, shards, shards):
        if n_in % a == 0 and n_out % b == 0:
            parts.add(tuple(sorted(n for n in (n_in // a, n_out // b, stack or 1) if n > 1)))

    def has_part(one: Collective) -> bool:
        return any(tuple(sorted(n for n in shape.dims if n > 1)) in parts for shape in one.shapes)

    return [one for one in found if has_part(one)]


class OfKernels(NamedTuple):
    """Collectives of kernels or their gradients: what an adapter's step may gather, and what it must not send."""

    gathers: list[Collective]  # of one layer's weights: the price of fsdp
    reductions: list[Collective]  # of a dense gradient: the trap
    rings: list[Collective]  # permutes: pieces of either, as the TPU compiler overlaps them with their matrix product
    stacked: list[Collective]  # of all layers' at once, whatever the kind


def of_kernels(
    found: Sequence[Collective], kernels: Iterable[tuple[int, int]], layers: int, shards: Sequence[int] = (1,)
) -> OfKernels:
    """Collectives that move a whole `[in, out]` kernel, or one as divided by `shards`, told apart."""
    kernels = list(kernels)
    single = matching(found, kernels, shards)
    return OfKernels(
        [one for one in single if one.kind not in (*REDUCTIONS, "collective-permute")],
        [one for one in single if one.kind in REDUCTIONS],
        [one for one in single if one.kind == "collective-permute"],
        matching(found, kernels, shards, stack=layers),
    )


def _collective(kind: str, computation: Computation, instruction: Instruction, times: int) -> Collective:
    operands = [shape for name in instruction.operands for shape in shapes(computation.instructions[name].type)]
    moved = operands
    if kind == "all-gather":
        result = instruction.type
        moved = shapes(result[1] if instruction.opcode.endswith("-start") else result)
    elif computation.name.startswith("all-reduce-scatter"):
        # the TPU compiler's reduce-scatter: a fusion that pads, reduces, and keeps its own slices
        inputs = [one for one in computation.instructions.values() if one.opcode == "parameter"]
        kind, moved = "reduce-scatter", [shape for one in inputs for shape in shapes(one.type)]
    return Collective(kind, tuple(moved), times, _groups(instruction), instruction.op_name, instruction.name)


def _groups(instruction: Instruction) -> np.ndarray | None:
    text = instruction.attributes
    if found := re.search(r"replica_groups=\{(\{[\d,{}]+\})\}", text):
        return np.array([[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", found[1])])
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, reshape, order = ([int(n) for n in (part or "").split(",") if n] for part in found.groups())
        places = np.arange(math.prod(reshape)).reshape(reshape)
        return places.transpose(order or range(len(reshape))).reshape(shape)
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        axes = re.findall(r"'(\w+)'", found[2])
        if ":" in found[2] or not sizes:  # parts of axes
            return None
        places = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        last = [list(sizes).index(axis) for axis in axes]
        rest = [at for at in range(len(sizes)) if at not in last]
        return places.transpose([*rest, *last]).reshape(-1, math.prod(sizes[axis] for axis in axes))
    return None
