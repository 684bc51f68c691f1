"""The optimiser of a run: one optax chain, a peak learning rate for each leaf, a schedule from 0 to 1 and back."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import optax

from train.config import OptimConfig

# Peak learning rates under AdamW. Methods that multiply the base weight starve at LoRA's: a step of a factor moves the
# weight by that step times W0. "PEFT suite" is Hugging Face PEFT's MetaMathQA comparison (Llama-3.2-3B, rank 32).
LEARNING_RATES = {
    "lora": 3e-4,  # LLM-Adapters' default; the PEFT suite uses 1e-4
    "dora": 3e-4,  # as LoRA, whose update it shares; the PEFT suite uses 1e-4
    "gralora": 3e-4,  # as LoRA; the PEFT suite uses 2e-4
    "abba": 1e-3,  # the authors' training scripts
    "loha": 1e-3,  # as ABBA, whose function class it shares; 1e-4 is untuned and behind every method in the PEFT suite
    "hira": 4.5e-3,  # the tuned value of the PEFT suite; the paper has 1e-3, and 1e-4 to 2e-4 in a table
    "boha": 4.5e-3,  # as HiRA, which it is with one block; its authors' value is not public
    "ia3": 5e-3,  # the tuned value of the PEFT suite (0.455 accuracy, against 0.311 at 1e-4)
    "hadamard_adapter": 5e-3,  # as (IA)^3, which it is without its bias; the paper gives none
}
BASE_LEARNING_RATE = 1e-3  # norms and biases; at 1e-4 norm tuning learns nothing in the PEFT suite

SECOND_FACTORS = ("b", "b1", "b2")  # [rank, out]


def learning_rates(trainable: Mapping[str, Any], adapters: Mapping[str, Mapping[str, Any]], config: OptimConfig) -> Any:
    """The peak learning rate of every leaf, in the structure of `trainable`.

    Args:
        trainable: `{"adapters": {path: factors}, "base": tree}`.
        adapters: `Adapter.config` for each path; the parts of a combined adapter have each their own default.
        config: `lr` (one), `base_lr` and `lr_ratio` (LoRA+, arXiv 2402.12354: second factors learn faster).

    Example:
        >>> trainable = {"adapters": {"q": {"a": 0.0, "b": 0.0}}, "base": {"norm": 0.0}}
        >>> learning_rates(trainable, {"q": {"method": "lora"}}, OptimConfig(lr_ratio=2))
        {'adapters': {'q': {'a': 0.0003, 'b': 0.0006}}, 'base': {'norm': 0.001}}
    """

    assert not isinstance(config.lr, list), "one member's"
    lr = config.lr

    def of_factors(adapter: Mapping[str, Any], factors: Any) -> Any:
        if "adapters" in adapter:
            return tuple(of_factors(part, f) for part, f in zip(adapter["adapters"], factors, strict=True))
        if "adapter" in adapter:
            return of_factors(adapter["adapter"], factors)
        rate = LEARNING_RATES[adapter["method"]] if lr is None else lr
        return {name: rate * (config.lr_ratio if name in SECOND_FACTORS else 1) for name in factors}

    base = BASE_LEARNING_RATE if config.base_lr is None else config.base_lr
    return {
        "adapters": {path: of_factors(adapters[path], factors) for path, factors in trainable["adapters"].items()},
        "base": jax.tree.map(lambda _: base, trainable["base"]),
    }


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """The share of the peak learning rate at each step: linear warm-up, then constant, or down to `min_lr_ratio`
    linearly, as a cosine, or linearly in the last `decay` of the steps (wsd: Hu et al. 2024, arXiv 2404.06395).

    Example:
        >>> share = schedule(OptimConfig(schedule="linear", warmup=0.2), 10)
        >>> [round(float(share(step)), 3) for step in (0, 1, 2, 6, 10)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    warmup = round(config.warmup * steps)
    rest, fall, end = max(1, steps - warmup), max(1, round(config.decay * steps)), config.min_lr_ratio
    decay = {
        "constant": optax.constant_schedule(1.0),
        "linear": optax.linear_schedule(1.0, end, rest),
        "cosine": optax.cosine_decay_schedule(1.0, rest, alpha=end),
        "wsd": optax.linear_schedule(1.0, end, fall, transition_begin=max(0, rest - fall)),
    }[config.schedule]
    if not warmup:
        return decay
    # From 1 / warmup, not from 0: the first step is not wasted.
    return optax.join_schedules([optax.linear_schedule(1 / warmup, 1 + 1 / warmup, warmup), decay], [warmup])


class Held(NamedTuple):
    """A state that is the learning rates."""

    rates: Any


def held(rates: Any) -> optax.GradientTransformation:
    """Each leaf's learning rate, kept in the state: under `vmap` each member of several has its own."""

    def update(updates: Any, state: Held, params: Any = None) -> Any:
        return _down(updates, state.rates), state

    return optax.GradientTransformation(lambda params: Held(rates), update)  # pyright: ignore[reportArgumentType]


def _down(updates: Any, rates: Any) -> Any:
    return jax.tree.map(lambda u, rate: -rate * u, updates, rates)


def build(config: OptimConfig, rates: Any, steps: int, several: bool = False) -> optax.GradientTransformation:
    """Clipping, the optimiser's direction, weight decay, each leaf's learning rate, the schedule.

    Args:
        rates: of each leaf, as `learning_rates` gives them.
        steps: of the schedule.
        several: for several members at once (`train.members`): the state holds the rates. Else the program has them.
    """
    b1, b2 = config.betas
    direction = {
        "adamw": optax.scale_by_adam(b1, b2),
        "lion": optax.scale_by_lion(b1, b2),
        "sgd": optax.trace(b1),
    }[config.optimizer]
    return optax.chain(
        optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
        direction,
        optax.add_decayed_weights(config.weight_decay, mask={"adapters": False, "base": True}),
        held(rates) if several else optax.stateless(lambda updates, _: _down(updates, rates)),
        optax.scale_by_schedule(schedule(config, steps)),
    )
