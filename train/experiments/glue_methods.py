"""The methods that `glue` compares, each with the learning rates of its sweep."""

import math
from typing import NamedTuple

import hadamax as hx
from train.experiments.glue_fit import Recipe

ATTENTION, NORM = "**/attention/output/dense", "**/attention/output/LayerNorm"  # the adapter's place, and what follows
QUERY_VALUE, KEY_VALUE = "**/attention/self/{query,value}", "**/attention/self/{key,value}"
RANK = 8  # on queries and values, all methods at LoRA's budget


def _rates(lowest: float) -> list[float]:
    """Six, half a decade apart, from a power of ten or the root of one on.

    Example:
        >>> _rates(3e-4)
        [0.0003, 0.001, 0.003, 0.01, 0.03, 0.1]
    """
    half_decades = round(2 * math.log10(lowest))
    return [float(f"{10 ** ((half_decades + at) / 2):.0e}") for at in range(6)]


class Method(NamedTuple):
    """A recipe and the learning rates of its sweep."""

    recipe: Recipe
    rates: list[float]


HADAMARD = "Hadamard Adapter + norm"
METHODS = {
    HADAMARD: Method(Recipe({ATTENTION: hx.hadamard_adapter()}, (NORM,)), _rates(3e-4)),
    "full fine-tuning": Method(Recipe({}, ("**",)), _rates(1e-5)),
    "LoRA": Method(Recipe({QUERY_VALUE: hx.lora(RANK)}), _rates(1e-4)),
    "BitFit": Method(Recipe({}, ("{embeddings,encoder,pooler}/**/bias",)), _rates(3e-4)),
    "LN-tuning": Method(Recipe({}, ("**/LayerNorm",)), _rates(3e-4)),
    "(IA)^3": Method(
        Recipe({KEY_VALUE: hx.ia3(), "encoder/layer/output/dense": hx.ia3(position="input")}), _rates(1e-3)
    ),
    "LoHa": Method(Recipe({QUERY_VALUE: hx.loha(RANK // 2)}), _rates(3e-4)),
    "HiRA": Method(Recipe({QUERY_VALUE: hx.hira(RANK)}), _rates(1e-3)),
    "ABBA": Method(Recipe({QUERY_VALUE: hx.abba(RANK)}), _rates(3e-5)),
    "BoHA": Method(Recipe({QUERY_VALUE: hx.boha(RANK, blocks=4)}), _rates(1e-3)),
}
VARIANTS = {
    "weight": Method(Recipe({ATTENTION: hx.hadamard_adapter(bias=False)}), _rates(3e-4)),
    "bias": Method(Recipe({ATTENTION: hx.hadamard_adapter(weight=False)}), _rates(3e-4)),
    "norm": Method(Recipe({}, (NORM,)), _rates(3e-4)),
    "weight + bias": Method(Recipe({ATTENTION: hx.hadamard_adapter()}), _rates(3e-4)),
    "all, classifier too": Method(Recipe({ATTENTION: hx.hadamard_adapter()}, (NORM, "classifier")), _rates(3e-4)),
    "all, quadratic": Method(Recipe({ATTENTION: hx.hadamard_adapter(order=2)}, (NORM,)), _rates(3e-4)),
    "all, cubic": Method(Recipe({ATTENTION: hx.hadamard_adapter(order=3)}, (NORM,)), _rates(3e-4)),
}
