"""Combinators: adapters made of adapters. All merge inside the layer, whatever their parts do: 3 matmul units."""

import jax

from hadamax.adapter import Adapter, Linear
from hadamax.errors import ConfigError
from hadamax.methods.merging import merged_dot, widened
from hadamax.methods.products import check_number


def _composed(method: str, adapters: tuple[Adapter, ...], merge) -> Adapter:
    if not adapters or not all(isinstance(adapter, Adapter) for adapter in adapters):
        raise ConfigError(f"{method}: needs adapters, one argument each, found {adapters!r}")

    def init(key, linear):
        keys = jax.random.split(key, len(adapters))
        return tuple(adapter.init(k, linear) for adapter, k in zip(adapters, keys, strict=True))

    def rows(factors, select):
        return tuple(adapter.rows(f, select) for adapter, f in zip(adapters, factors, strict=True) if adapter.rows)

    config = {"method": method, "adapters": [dict(adapter.config) for adapter in adapters]}
    return Adapter(init, merge, merged_dot(merge), config, rows if all(a.rows for a in adapters) else None, merges=True)


def _plus(linear: Linear, scale: float, new: Linear, base: Linear) -> Linear:
    """`linear + scale (new - base)`, an absent bias counting as zero."""
    kernel = linear.kernel + scale * (new.kernel - base.kernel)
    if new.bias is base.bias or new.bias is None:
        return Linear(kernel, linear.bias)
    update = scale * (new.bias if base.bias is None else new.bias - base.bias)
    return Linear(kernel, update if linear.bias is None else linear.bias + update)


def _widely(merge):
    """Give `merge` a layer in at least float32, and round what it returns once."""

    def rounded(factors, linear: Linear) -> Linear:
        base = widened(linear)
        kernel, bias = merge(factors, base)
        if bias is base.bias:
            return Linear(kernel.astype(linear.kernel.dtype), linear.bias)
        dtype = linear.kernel.dtype if linear.bias is None else linear.bias.dtype
        return Linear(kernel.astype(linear.kernel.dtype), bias.astype(dtype))

    return rounded


def add(*adapters: Adapter) -> Adapter:
    """The updates summed, each anchored on the original W0 (Hugging Face PEFT's convention for several adapters).

    `add(hira(20), lora(12))` is HiLoRA (HiRA paper, section 5): `W0 .* (1 + A B) + L1 L2`.

    Args:
        adapters: at least one. The factors are the tuple of theirs.

    Raises:
        ConfigError: no adapter, or an argument that is none.

    Example:
        >>> import hadamax as hx
        >>> [part["method"] for part in hx.add(hx.hira(20), hx.lora(12)).config["adapters"]]
        ['hira', 'lora']
    """

    @_widely
    def merge(factors, linear):
        merged = linear
        for adapter, f in zip(adapters, factors, strict=True):
            merged = _plus(merged, 1.0, adapter.merge(f, linear), linear)
        return merged

    return _composed("add", adapters, merge)


def chain(*adapters: Adapter) -> Adapter:
    """One after the other, each on the weight that the ones before it merged.

    Args:
        adapters: at least one. The factors are the tuple of theirs.

    Raises:
        ConfigError: no adapter, or an argument that is none.

    Example:
        >>> import hadamax as hx
        >>> hx.chain(hx.lora(4), hx.hira(4)).config["method"]
        'chain'
    """

    @_widely
    def merge(factors, linear):
        for adapter, f in zip(adapters, factors, strict=True):
            linear = adapter.merge(f, linear)
        return linear

    return _composed("chain", adapters, merge)


def scaled(adapter: Adapter, scale: float) -> Adapter:
    """The update times `scale`: `W0 + scale (W - W0)`. 0 turns an adapter off, 1 leaves it as it is.

    Raises:
        ConfigError: no adapter, or a scale that is no finite number.

    Example:
        >>> import hadamax as hx
        >>> hx.scaled(hx.lora(4), 0.5).config["scale"]
        0.5
    """

    if not isinstance(adapter, Adapter):
        raise ConfigError(f"scaled: needs an adapter, found {adapter!r}")
    check_number("scaled", scale=scale)
    scale = float(scale)

    @_widely
    def merge(factors, linear):
        return _plus(linear, scale, adapter.merge(factors, linear), linear)

    config = {"method": "scaled", "adapter": dict(adapter.config), "scale": scale}
    return Adapter(adapter.init, merge, merged_dot(merge), config, adapter.rows, merges=True)
