"""Sequential adaptation: an adapter learns words about order, then words about length; what is left of the first?

    python -m train.experiments.sequential

On the demo's decoder, which knows none of the words. The second stage either continues the adapter or merges it and
trains a fresh one on the merged weights (for methods tied to the weights the two differ). Methods that learn the second
family further forget more of the first, so they are compared at equal accuracy in the second: where each curve first
reaches it. The starts, each with its own order of the records, and the learning rates train at once, by `vmap`.
"""

import functools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hadamax as hx
from train import cli, data, demo, pretrain, tasks
from train.config import LINEAR, DataConfig, ModelConfig
from train.experiments import descent, experiment, retention
from train.experiments.experiment import Row
from train.run import load_base

# What each word stands for. Every record of a family takes one of its words.
FAMILIES: dict[str, dict[str, Callable[[str], str]]] = {
    "order": {
        "Encrypt.": lambda s: tasks.apply(("reverse", "advance"), s),
        "Announce.": lambda s: tasks.apply(("rotate", "capitalize"), s),
    },
    "length": {
        "Measure.": lambda s: str(len(s)),
        "Label.": lambda s: f"{s}{len(s)}",
    },
}
LENGTH = 32
STAGES = ("order", "length")


def adapters(rank: int, blocks: int) -> dict[str, hx.Adapter]:
    """Every method at LoRA's budget."""
    return {
        "LoRA": hx.lora(rank),
        "GraLoRA": hx.gralora(rank, blocks),
        "ABBA": hx.abba(rank),
        "HiRA": hx.hira(rank),
        "BoHA": hx.boha(rank, blocks),
    }


def records(family: str, seed: int, count: int) -> list[tasks.Record]:
    """Records of a family's words, each about another string.

    Example:
        >>> records("length", 0, 1)
        [{'instruction': 'Label.', 'input': 'kyfz', 'output': 'kyfz4'}]
    """
    rng, words = random.Random(f"{family} {seed}"), FAMILIES[family]
    strings: dict[str, None] = {}
    while len(strings) < count:
        strings[tasks.letters(rng, 4, 6)] = None
    return [
        {"instruction": (word := rng.choice(list(words))), "input": text, "output": words[word](text)}
        for text in strings
    ]


def rows_of(tokenizer: Any, chosen: Sequence[tasks.Record]) -> dict[str, jax.Array]:
    """Token rows `[records, 32]`: `input_ids`, `targets` and `weights`, 1 at what is answered."""
    config = DataConfig(train="", max_length=LENGTH)
    encoded = data.encode(pretrain.numbered(chosen), tokenizer, config)
    assert not encoded.truncated
    made = [data.build_row([example], LENGTH) for example in encoded.examples]
    return {key: jnp.asarray(np.stack([row[key] for row in made])) for key in ("input_ids", "targets", "weights")}


def exact_match(logits: jax.Array, rows: dict[str, jax.Array]) -> jax.Array:
    """The share of rows of which greedy decoding gives the answer: it does where each token of the answer is the most
    likely one after those before it.

    Example:
        >>> logits = jnp.array([[[0.0, 1.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]])
        >>> exact_match(logits, {"targets": jnp.array([[1, 1], [1, 1]]), "weights": jnp.array([[0.0, 1.0]] * 2)})
        Array(0.5, dtype=float32)
    """
    return jnp.all((logits.argmax(-1) == rows["targets"]) | (rows["weights"] == 0), -1).mean()


def train(apply: Any, params: Any, factors: Any, rate: Any, order: jax.Array, rows: Any, tests: Any) -> Any:
    """Adam with clipping on rows in an order, at a constant rate after a short warm-up.

    Args:
        apply: `(params, factors, ...)`.
        order: `[points, steps between, batch]`, indices of the rows.
        tests: rows of each family.

    Returns:
        The factors, the loss of each step, and `[points + 1, families]`, the accuracies before and at each point.
    """
    warm = optax.linear_schedule(0.2, 1.0, 4)
    scale = optax.chain(optax.scale_by_schedule(warm), optax.scale(-rate))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), scale)

    def loss(factors: Any, batch: Any) -> jax.Array:
        total, tokens = apply(params, factors, **batch, method="loss")
        return total / tokens

    def step(carry: Any, index: jax.Array) -> Any:
        factors, state = carry
        value, gradient = jax.value_and_grad(loss)(factors, jax.tree.map(lambda x: x[index], rows))
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(factors, updates), state), value

    def accuracies(factors: Any) -> jax.Array:
        found = [exact_match(apply(params, factors, tests[family]["input_ids"]), tests[family]) for family in STAGES]
        return jnp.stack(found)

    def point(carry: Any, order: jax.Array) -> Any:
        carry, losses = jax.lax.scan(step, carry, order)
        return carry, (losses, accuracies(carry[0]))

    before = accuracies(factors)
    (factors, _), (losses, after) = jax.lax.scan(point, (factors, optimizer.init(factors)), order)
    return factors, losses.reshape(-1), jnp.concatenate([before[None], after])


def sequence(
    method: str,
    rank: int,
    blocks: int,
    rates: list[list[float]],
    seeds: int,
    points: list[int],
    every: int,
    batch: int,
    tests: int,
    levels: list[float],
) -> list[Row]:
    """Both stages of one method: a row for stage 1, and for each way into stage 2 at each rate.

    Args:
        rates, points: of each stage; learning rates, and evaluations, one `every` so many steps.
        levels: accuracies in the second family at which what is left of the first is read.
    """
    base = load_base(ModelConfig(str(demo.BASE)))
    injection = hx.inject(dict.fromkeys(LINEAR, adapters(rank, blocks)[method]), view=base.model.view)
    count = max(points) * every * batch  # no record is seen twice in a stage
    made = {family: records(family, 0, tests + count) for family in STAGES}
    held_out = {family: rows_of(base.tokenizer, made[family][:tests]) for family in STAGES}
    rows = {family: rows_of(base.tokenizer, made[family][tests:]) for family in STAGES}
    one = functools.partial(train, injection.apply(base.model.apply), tests=held_out)

    def run(stage: int, params: Any, factors: Any, own_base: bool) -> Any:
        """`[rates, seeds]` of everything; factors, and the base where it is each seed's own, lead with the seeds."""
        rng = np.random.default_rng([stage, seeds])
        size = points[stage], every, batch
        order = np.stack([rng.permutation(count)[: math.prod(size)].reshape(size) for _ in range(seeds)])
        over_seeds = jax.vmap(one, (0 if own_base else None, 0, None, 0, None))
        over_rates = descent.jit(jax.vmap(over_seeds, (None, None, 0, None, None)))
        return over_rates(params, factors, jnp.asarray(rates[stage]), jnp.asarray(order), rows[STAGES[stage]])

    def read(stage: int, way: str, losses: jax.Array, curves: jax.Array, levels: Sequence[float] = ()) -> Any:
        """The rate is that of the lowest loss over the last quarter of the steps, on records not seen before."""
        means = np.asarray(losses)[:, :, -(losses.shape[-1] // 4) :].mean((1, 2))
        return retention.rows_of(method, way, size, rates[stage], means, np.asarray(curves, np.float64), levels)

    keys = jax.random.split(jax.random.key(0), 2 * seeds)
    init = descent.jit(jax.vmap(injection.init, (0, None)))
    factors, losses, curves = run(0, base.params, init(keys[:seeds], base.params), False)
    size = sum(leaf.size for leaf in jax.tree.leaves(factors)) // (len(rates[0]) * seeds)
    chosen, found = read(0, "stage 1", losses, curves)
    result = [found[chosen]]
    factors = jax.tree.map(lambda leaf: leaf[chosen], factors)
    merged = descent.jit(jax.vmap(injection.merge, (None, 0)))(base.params, factors)
    fresh = descent.jit(jax.vmap(injection.init))(keys[seeds:], merged)
    for way, params, start in (("continued", base.params, factors), ("merged, fresh", merged, fresh)):
        _, losses, curves = run(1, params, start, way != "continued")
        result += read(1, way, losses, curves, levels)[1]
    return result


SETTINGS = {
    "rank": 8,
    "blocks": 4,
    "seeds": 5,
    "points": [10, 20],
    "every": 6,
    "batch": 16,
    "tests": 48,
    "levels": [0.5, 0.8, 0.9],
}
ADDITIVE, COUPLED = [1e-3, 3e-3, 1e-2], [1e-2, 3e-2, 1e-1]
RATES = {  # of each stage
    "LoRA": [ADDITIVE, [3e-4, *ADDITIVE]],
    "GraLoRA": [ADDITIVE, [3e-4, *ADDITIVE]],
    "ABBA": [[3e-4, 1e-3, 3e-3], [1e-4, 3e-4, 1e-3, 3e-3]],
    "HiRA": [COUPLED, [3e-3, *COUPLED]],
    "BoHA": [COUPLED, [3e-3, *COUPLED]],
}
PARTS = {name: (sequence, {"method": name, "rates": rates} | SETTINGS) for name, rates in RATES.items()}


def report(results: Row) -> str:
    settings = next(iter(results.values()))["settings"]
    seeds, level = settings["seeds"], settings["levels"][-1]
    return f"""# Sequential adaptation: words about order, then words about length

The demo's decoder (0.8 M parameters) learns two new words for changes of a string's order ("Encrypt.", reverse and
advance; "Announce.", rotate and capitalise), then two for its length ("Measure.", "Label."). Every method has LoRA's
budget on all seven projections and {seeds} starts, each with an order of records of its own. Exact match on
{settings["tests"]} unseen strings of each family, mean ± standard deviation over the starts. The rate of stage 1 is
that of its lowest loss; stage 2 begins from those starts. Its rate decides what is forgotten at equal accuracy too: the
tables have that of its lowest loss and, of the four, the one that keeps most where every start gets
there (chosen by what it keeps, so a bound).
Matched: the accuracy in the first family where that in the second first is {level:.0%}, straight between evaluations,
one every {settings["every"]} steps; a dash where not every start gets there. LoRA and GraLoRA are the controls without
W0. The second family and the rates of stage 2 were set after looking at runs of single starts: a first choice (digits)
was not learnt in so many steps, and stage 1's rates left nothing of the first family. A toy: two families of one small
decoder and a protocol of ours (the paper's is not public), so nothing here is the paper's result.

{retention.sections(results, "order", "length")}"""


def main(argv: Sequence[str] | None = None) -> None:
    first, second = (f"words about {family}, exact match" for family in STAGES)
    draw = functools.partial(retention.draw, first=first, second=second)
    experiment.main("sequential", PARTS, report, draw, argv, __doc__)


if __name__ == "__main__":
    cli.main(main)
