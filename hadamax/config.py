"""Adapters from their JSON configuration: the inverse of `Adapter.config`."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from hadamax import compose, methods
from hadamax.adapter import Adapter
from hadamax.errors import ConfigError, nearest

METHODS: Mapping[str, Callable[..., Adapter]] = {name: getattr(methods, name) for name in methods.__all__}


def adapter_from_config(config: Mapping[str, Any]) -> Adapter:
    """Rebuild an adapter, combinators included.

    Args:
        config: `{"method": name, **arguments of its factory}`; see `Adapter.config`.

    Raises:
        ConfigError: an unknown method or argument (with the nearest names), or a value that its factory refuses.

    Example:
        >>> adapter_from_config({"method": "hira", "rank": 8}).config
        {'method': 'hira', 'rank': 8, 'scale': 1.0}
    """
    if not isinstance(config, Mapping) or not isinstance(config.get("method"), str):
        raise ConfigError(f"an adapter's configuration needs a 'method' by name, found {config!r}")
    method, options = config["method"], {name: value for name, value in config.items() if name != "method"}
    combinators = {"add": compose.add, "chain": compose.chain, "scaled": compose.scaled}
    factory = METHODS.get(method) or combinators.get(method)
    if factory is None:
        names = [*METHODS, *combinators]
        raise ConfigError(f"unknown method {method!r}{nearest(method, names) or '; known: ' + ', '.join(names)}")
    allowed = ["adapters"] if method in ("add", "chain") else list(inspect.signature(factory).parameters)
    for name in options:
        if name not in allowed:
            known = nearest(name, allowed) or f"; it has {', '.join(allowed) or 'none'}"
            raise ConfigError(f"{method} has no option {name!r}{known}")
    if method in ("add", "chain"):
        parts = options.get("adapters")
        if not isinstance(parts, list):
            raise ConfigError(f"{method}: needs 'adapters', a list of configurations, found {parts!r}")
        return factory(*map(adapter_from_config, parts))
    if method == "scaled" and "adapter" in options:
        options["adapter"] = adapter_from_config(options["adapter"])
    try:
        bound = inspect.signature(factory).bind(**options)
    except TypeError as error:
        raise ConfigError(f"{method}: {error}") from None
    return factory(*bound.args, **bound.kwargs)
