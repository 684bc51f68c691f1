"""The methods under the contract: adapter, dense formula, parameter count, factors without a gradient at init."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import hadamax as hx
from tests import dense


class Case(NamedTuple):
    adapter: hx.Adapter
    formula: Callable
    count: Callable[[int, int], int]
    still: frozenset[str] = frozenset()  # factors whose gradient is exactly zero at init


def low_rank(rank):
    return lambda n_in, n_out: rank * (n_in + n_out)


A = frozenset({"a"})
PAIRS = frozenset({"a1", "b1", "a2"})

CASES: dict[str, Case] = {
    "lora": Case(hx.lora(4), partial(dense.lora, scale=1.0), low_rank(4), A),
    "lora-alpha": Case(hx.lora(4, alpha=10), partial(dense.lora, scale=2.5), low_rank(4), A),
    "rslora": Case(hx.lora(4, alpha=6, rslora=True), partial(dense.lora, scale=3.0), low_rank(4), A),
    "hira": Case(hx.hira(4), dense.hira, low_rank(4), A),
    "hira-scale": Case(hx.hira(4, scale=0.5), partial(dense.hira, scale=0.5), low_rank(4), A),
    "boha": Case(hx.boha(8, 4), dense.boha, low_rank(8), A),
    "boha-scale": Case(hx.boha(4, 2, scale=3.0), partial(dense.boha, scale=3.0), low_rank(4), A),
    "gralora": Case(hx.gralora(8, 4, alpha=4), partial(dense.gralora, scale=0.5), low_rank(8), A),
    "dora": Case(hx.dora(4, alpha=2), partial(dense.dora, scale=0.5), lambda i, o: 4 * (i + o) + o, A),
    "loha": Case(hx.loha(3, alpha=6), partial(dense.pair, scale=2.0), low_rank(6), frozenset({"a1", "b1", "b2"})),
    "abba-khatri-rao": Case(
        hx.abba(4, alpha=3, forward="khatri_rao"), partial(dense.pair, scale=4.5), low_rank(4), PAIRS
    ),
    "abba-merged": Case(hx.abba(4, alpha=3, forward="merged"), partial(dense.pair, scale=4.5), low_rank(4), PAIRS),
    "abba-uneven": Case(hx.abba(r1=1, r2=4, alpha=2), partial(dense.pair, scale=2.0), low_rank(5), PAIRS),
    "abba-official-scale": Case(hx.abba(4, scale=16.0), partial(dense.pair, scale=16.0), low_rank(4), PAIRS),
    "ia3": Case(hx.ia3(), partial(dense.hadamard, position="output"), lambda i, o: o),
    "ia3-input": Case(hx.ia3(position="input"), partial(dense.hadamard, position="input"), lambda i, o: i),
    "hadamard-output": Case(hx.hadamard_adapter(), partial(dense.hadamard, position="output"), lambda i, o: 2 * o),
    "hadamard-input": Case(
        hx.hadamard_adapter(position="input"), partial(dense.hadamard, position="input"), lambda i, o: 2 * i
    ),
    "hadamard-bias": Case(
        hx.hadamard_adapter(weight=False), partial(dense.hadamard, position="output"), lambda i, o: o
    ),
    "hadamard-input-bias": Case(
        hx.hadamard_adapter(position="input", weight=False),
        partial(dense.hadamard, position="input"),
        lambda i, o: i,
    ),
    "hilora": Case(
        hx.add(hx.hira(3), hx.lora(2)),
        partial(dense.add, parts=[dense.hira, partial(dense.lora, scale=1.0)]),
        low_rank(5),
        A,
    ),
    "add-shifts": Case(
        hx.add(hx.hadamard_adapter(), hx.hadamard_adapter(position="input")),
        partial(
            dense.add,
            parts=[partial(dense.hadamard, position="output"), partial(dense.hadamard, position="input")],
        ),
        lambda i, o: 2 * (i + o),
    ),
    "chain": Case(
        hx.chain(hx.lora(2), hx.hira(3), hx.hadamard_adapter()),
        partial(
            dense.chain,
            parts=[partial(dense.lora, scale=1.0), dense.hira, partial(dense.hadamard, position="output")],
        ),
        lambda i, o: 5 * (i + o) + 2 * o,
        A,
    ),
    "scaled": Case(hx.scaled(hx.hira(4), 0.25), partial(dense.scaled, part=dense.hira, scale=0.25), low_rank(4), A),
    "scaled-shift": Case(
        hx.scaled(hx.hadamard_adapter(), 2.0),
        partial(dense.scaled, part=partial(dense.hadamard, position="output"), scale=2.0),
        lambda i, o: 2 * o,
    ),
}
