"""The text of a compiled program (`compiled.as_text()`) as data: instructions, how often each runs, matmul FLOPs.

XLA's own cost analysis counts the body of a loop once. Here a computation counts as often as its callers run it: loop
trip counts are read from the text (`known_trip_count`, or a condition that compares a counter with a constant).
"""

import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}  # others end in their number of bits
CALLS = re.compile(
    r"(?:calls|to_apply|body|true_computation|false_computation|branch_computations|called_computations)="
    r"(?:\{([^}]*)\}|%([\w.\-]+))"
)
RUNS_ITS_CALLEES = ("fusion", "call", "conditional", "async-start", "custom-call")  # not reduce, sort: scalar functions


class Shape(NamedTuple):
    """One array."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self) -> int:
        bits = BITS.get(self.dtype) or int(match[1] if (match := re.match(r"[a-z]+(\d+)", self.dtype)) else 0)
        return math.prod(self.dims) * bits // 8


class Instruction(NamedTuple):
    """`%name = type opcode(arguments), attributes`."""

    name: str
    type: Any  # a Shape, or a tuple of types
    opcode: str
    arguments: str
    attributes: str
    root: bool

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.arguments)

    @property
    def op_name(self) -> str:
        """Where in the traced function it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def attribute(self, name: str) -> str | None:
        """The computation, or the value up to the next comma, that an attribute names."""
        found = re.search(rf"\b{name}=%?([^,\s]+)", self.attributes)
        return found[1] if found else None


class Computation(NamedTuple):
    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.root)

    def parameter(self, number: int) -> Instruction:
        return next(
            i for i in self.instructions.values() if i.opcode == "parameter" and i.arguments.strip() == str(number)
        )


class Program(NamedTuple):
    """`runs[computation]` is how often one step runs it; `unknown` names loops whose trips the text does not tell: they
    count as one."""

    computations: dict[str, Computation]
    runs: dict[str, int]
    unknown: list[str]

    def instructions(self) -> Iterator[tuple[Computation, Instruction, int]]:
        """Every instruction that runs, with its computation and how often."""
        for name, times in self.runs.items():
            for instruction in self.computations[name].instructions.values():
                yield self.computations[name], instruction, times


def shapes(type_: Any) -> list[Shape]:
    """The arrays of a type, in order."""
    return [type_] if isinstance(type_, Shape) else [shape for part in type_ for shape in shapes(part)]


def parse(text: str) -> Program:
    """Read a module's text.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> step = lambda x: jax.lax.fori_loop(0, 7, lambda _, x: x @ x, x)
        >>> program = parse(jax.jit(step).lower(jnp.ones((4, 4))).compile().as_text())
        >>> matmul_flops(program) == 7 * 2 * 4**3, program.unknown
        (True, [])
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            current = computations[header[2]] = Computation(header[2], {})
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (instruction := _instruction(line)):
            current.instructions[instruction.name] = instruction
    if not entry:
        raise ValueError("the text has no ENTRY computation: it is not a compiled module's")
    runs: dict[str, int] = {}
    unknown: list[str] = []
    _count(computations, entry, 1, runs, unknown)
    return Program(computations, runs, unknown)


def _closing(text: str, start: int) -> int:
    """The place after the parenthesis that closes the one at `start`."""
    depth = 0
    for at in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if not depth:
            return at + 1
    return len(text)


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if head is None:
        return None
    rest = line[head.end() :]
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    call = re.match(r"\s*([a-z][\w\-]*)\(", rest[end:])
    if call is None:
        return None
    opened = end + call.end() - 1
    closed = _closing(rest, opened)
    type_ = _type(re.sub(r"/\*.*?\*/", "", rest[:end]))
    return Instruction(head[2], type_, call[1], rest[opened + 1 : closed - 1], rest[closed:], head[1] is not None)


def _type(text: str) -> Any:
    text = text.strip()
    if not text.startswith("("):
        found = re.match(r"([a-z]\w*)\[([\d,<=]*)\]", text)
        if found is None:  # token, opaque
            return ()
        return Shape(found[1], tuple(int(d.lstrip("<=")) for d in found[2].split(",") if d))
    parts, depth, start = [], 0, 1
    for at, char in enumerate(text[1:], 1):
        if (char == "," and depth == 0) or (char == ")" and depth == 0):
            parts.append(text[start:at])
            start = at + 1
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(char, 0)
    return tuple(_type(part) for part in parts if part.strip())


def _count(computations: Mapping[str, Computation], name: str, times: int, runs: dict[str, int], unknown: list[str]):
    runs[name] = runs.get(name, 0) + times
    for instruction in computations[name].instructions.values():
        if instruction.opcode == "while":
            trips = _trips(computations, computations[name], instruction)
            if trips is None:
                unknown.append(instruction.name)
            _count(computations, str(instruction.attribute("body")), times * (trips or 1), runs, unknown)
        elif instruction.opcode in RUNS_ITS_CALLEES:
            for many, one in CALLS.findall(instruction.attributes):
                for callee in re.findall(r"[\w.\-]+", many) if many else [one]:
                    if callee in computations:
                        _count(computations, callee, times, runs, unknown)


def _constant(computation: Computation, name: str) -> int | None:
    """The integer that an instruction is, through copies."""
    instruction = computation.instructions[name]
    if instruction.opcode in ("copy", "bitcast", "convert"):
        return _constant(computation, instruction.operands[0])
    number = re.fullmatch(r"-?\d+", instruction.arguments.strip())
    return int(number[0]) if instruction.opcode == "constant" and number else None


def _trips(computations: Mapping[str, Computation], around: Computation, loop: Instruction) -> int | None:
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition, body = (computations[str(loop.attribute(part))] for part in ("condition", "body"))
    test, operands = condition.root, condition.root.operands
    if test.opcode == "fusion":  # a comparison of the fusion's operands, in its order
        inner = computations[str(test.attribute("calls"))]
        test = inner.root
        places = [inner.instructions[name] for name in test.operands]
        if any(place.opcode != "parameter" for place in places):
            return None
        operands = [operands[int(place.arguments)] for place in places]
    if test.opcode != "compare" or test.attribute("direction") != "LT":
        return None
    counter, limit = condition.instructions[operands[0]], _constant(condition, operands[1])
    index = counter.attribute("index")
    if counter.opcode != "get-tuple-element" or limit is None or index is None:
        return None
    first = around.instructions[loop.operands[0]]
    start = _constant(around, first.operands[int(index)]) if first.opcode == "tuple" else None
    step = _step(computations, body, int(index))
    return None if start is None or not step else max(0, math.ceil((limit - start) / step))


def _step(computations: Mapping[str, Computation], body: Computation, index: int) -> int | None:
    """What a loop's body adds to an element of its tuple."""
    if body.root.opcode != "tuple":
        return None
    update, inside, names = body.instructions[body.root.operands[index]], body, None
    while update.opcode in ("copy", "bitcast"):
        update = body.instructions[update.operands[0]]
    if update.opcode == "fusion":
        names, inside = update.operands, computations[str(update.attribute("calls"))]
        update = inside.root
    if update.opcode != "add":
        return None
    for name in update.operands:
        place = inside.instructions[name]
        outer = names[int(place.arguments)] if names is not None and place.opcode == "parameter" else None
        value = _constant(inside, name) if outer is None else _constant(body, outer)
        if value is not None:
            return value
    return None


def matmul_flops(program: Program, *, loops: bool = True) -> int:
    """FLOPs (two per multiply-add) of the matrix products of one step on one chip, element-wise work left out.

    Products are `dot`, or `convolution`, which XLA's TPU compiler makes of them; positions that fall on padding or
    between dilated elements do no work and are not counted.

    Args:
        loops: False counts each loop's body once, as XLA's cost analysis does.
    """
    total = 0
    for computation, instruction, times in program.instructions():
        if instruction.opcode in ("dot", "convolution"):
            operands = [computation.instructions[name].type.dims for name in instruction.operands]
            flops = (_dot if instruction.opcode == "dot" else _convolution)(instruction, *operands)
            total += flops * (times if loops else 1)
    return total


def _dot(instruction: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> int:
    axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    contracted = math.prod(left[int(axis)] for axis in axes[1].split(",") if axis) if axes else 1
    return 2 * math.prod(instruction.type.dims) * contracted


def _convolution(instruction: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> int:
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None, instruction
    inputs, kernel, output = labels.groups()
    result = instruction.type.dims
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    spatial = sorted(label for label in kernel if label.isdigit())

    def field(name: str, at: int, default: str) -> str:
        return fields[name].split("x")[at] if name in fields else default

    work = result[output.index("b")] * result[output.index("f")] * right[kernel.index("i")]
    for at, label in enumerate(spatial):
        low = int(field("pad", at, "0_0").split("_")[0])
        numbers = [int(field(name, at, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate")]
        sizes = (left[inputs.index(label)], right[kernel.index(label)], result[output.index(label)])
        work *= _positions(*sizes, low, *numbers)
    return 2 * work // int(instruction.attribute("batch_group_count") or 1)


@functools.cache
def _positions(size: int, window: int, result: int, low: int, stride: int, dilate: int, window_dilate: int) -> int:
    """Pairs of an output and a window position that meet an element of the input."""
    place = np.arange(result)[:, None] * stride + np.arange(window)[None, :] * window_dilate - low
    return int(np.sum((place >= 0) & (place % dilate == 0) & (place // dilate < size)))
