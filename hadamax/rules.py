"""Rules rewritten for kernels whose adapters have changed one by one."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from hadamax import paths
from hadamax.adapter import Adapter
from hadamax.inject import Injection
from hadamax.targets import Rule, Target


def replaced(injection: Injection, params: Any, adapters: Mapping[str, Adapter]) -> Injection:
    """The injection that selects the same kernels, some with another adapter.

    A rule whose kernels all get the same adapter keeps its pattern; any other becomes a rule for each kernel.

    Args:
        adapters: `{kernel path: adapter}` for the kernels that change.

    Raises:
        HadamaxError: what `Injection.targets` raises.

    Example:
        >>> import jax.numpy as jnp, hadamax as hx
        >>> params = {"up": {"kernel": jnp.ones((4, 8))}, "down": {"kernel": jnp.ones((8, 4))}}
        >>> injection = replaced(hx.inject({"*": hx.hira(4)}), params, {"up/kernel": hx.lora(2)})
        >>> [(pattern, rule.adapter.config["method"]) for pattern, rule in injection.rules]
        [('down/kernel', 'hira'), ('up/kernel', 'lora')]
    """
    # an adapter of its own for each rule, however many rules share one, tells which rule a kernel came from
    own = tuple((pattern, rule._replace(adapter=rule.adapter._replace())) for pattern, rule in injection.rules)
    targets = injection._replace(rules=own).targets(params)
    rules = []
    for (pattern, rule), (_, marked) in zip(injection.rules, own, strict=True):
        mine = {path: target for path, target in targets.items() if target.adapter is marked.adapter}
        new = {path: adapters.get(path, rule.adapter) for path in mine}
        if len({repr(adapter.config) for adapter in new.values()}) == 1:
            rules.append((pattern, rule._replace(adapter=next(iter(new.values())))))
        else:
            rules += _each(rule, mine, new)
    return injection._replace(rules=tuple(rules))


def exact(injection: Injection, params: Any) -> Injection:
    """The injection that selects the same kernels by their own paths, without a wildcard."""
    targets = injection.targets(params)
    rules = [
        rule
        for path, target in targets.items()
        for rule in _each(Rule(target.adapter, "".join(label[0] for label in target.axes)), {path: target}, {})
    ]
    return injection._replace(rules=tuple(rules), exclude=())


def _each(
    rule: Rule, targets: Mapping[str, Target], adapters: Mapping[str, Adapter]
) -> Iterator[tuple[paths.Pattern, Rule]]:
    for path, target in targets.items():
        plain = "/" in path and not set(path) & set("*?{}")
        # the number in a path has done its work; only layers of a stack are still to be chosen
        adapter = adapters.get(path, rule.adapter)
        yield path if plain else re.compile(re.escape(path)), Rule(adapter, rule.view, target.layers)
