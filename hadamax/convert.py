"""Adapters of one method as adapters of another: exactly where the algebra allows it, or by the nearest low rank.

    to_lora    ABBA, LoHa: the Khatri-Rao product, rank r1 r2 (ABBA, Theorem 1). GraLoRA: a rank for each block, k r.
               LoRA and rsLoRA: the scale alone. Sums, chains and multiples of these: their ranks together. Anything
               else, given `rank=` or `energy=`: the truncated SVD of the merged update (Eckart-Young).
    to_loha    ABBA of r1 = r2: alpha = s r
    to_hira    BoHA: its modulator is GraLoRA's update, of rank b r; for one block, the same factors
    to_boha    HiRA: BoHA of one block

Kernels that have no form in the method stay as they are, each with its reason.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hadamax import paths, stacks
from hadamax.adapter import Adapter, Config, Factors, Linear
from hadamax.errors import ConfigError, ConversionError, HadamaxError
from hadamax.inject import Injection
from hadamax.methods import boha, hira, loha, lora
from hadamax.methods.abba import top_singular
from hadamax.methods.merging import widened
from hadamax.methods.products import check_positive, khatri_rao, on_last, wide
from hadamax.rules import replaced
from hadamax.targets import Target

_LARGE = 1024  # an exact SVD of a larger matrix takes seconds to minutes


class Converted(NamedTuple):
    """What a conversion returns.

    Attributes:
        injection: the rules, with the new methods. A rule stays one rule where its kernels agree in the new method, and
            becomes one rule for each kernel where they do not (other ranks).
        adapters: `{kernel path: factors}`.
        errors: `{kernel path: ||dW - dW'||_F / ||dW||_F}`, an array of the kernel's (adapted) batch axes; 0 for what is
            exact but for rounding, and for an update that is zero.
        kept: `{kernel path: reason}` for the kernels that keep their method.
    """

    injection: Injection
    adapters: dict[str, Factors]
    errors: dict[str, np.ndarray]
    kept: dict[str, str]


class _Form(NamedTuple):
    """One kernel's new method, its factors for all matrices, and the error of each matrix (None for an exact form)."""

    adapter: Adapter
    factors: Factors
    errors: np.ndarray | None = None


def to_lora(
    injection: Injection,
    adapters: Mapping[str, Factors],
    params: Any,
    *,
    rank: int | None = None,
    energy: float | None = None,
) -> Converted:
    """LoRA with the same update, or with the nearest one of a lower rank.

    With neither `rank` nor `energy`, only what is exact is converted. An exact form of rank `min(in, out)` or less is
    also taken where it needs no more than `rank`. The truncated SVD is computed for one matrix at a time, of the
    update in at least float32; for `rank=` and matrices larger than 1024 that have no low-rank form, by the randomised
    method with power iterations, whose error is at most a little above the optimum. The rank of a stacked kernel is the
    largest that one of its matrices needs.

    Args:
        injection: the rules of `adapters`.
        adapters: `{kernel path: factors}`.
        params: the base.
        rank: of each LoRA, at most.
        energy: share of `||dW||_F^2` to keep in each matrix, above 0 and at most 1; the smallest rank that does.

    Raises:
        ConversionError: no kernel can be converted, for the reason given; factors that are not finite.
        ConfigError: both `rank` and `energy`, or one out of range; adapters made for other kernels.

    Example:
        >>> import jax, jax.numpy as jnp, hadamax as hx
        >>> params = {"up": {"kernel": jax.random.normal(jax.random.key(0), (6, 8))}}
        >>> injection = hx.inject({"up": hx.abba(4)})
        >>> adapters = injection.init(jax.random.key(1), params)
        >>> converted = hx.convert.to_lora(injection, adapters, params)
        >>> converted.injection.to_config()["rules"][0]["adapter"]
        {'method': 'lora', 'rank': 4, 'alpha': 4, 'rslora': False}
    """
    if rank is not None:
        if energy is not None:
            raise ConfigError("to_lora takes either rank or energy, not both")
        check_positive("to_lora", rank=rank)
    if energy is not None and (isinstance(energy, bool) or not isinstance(energy, int | float) or not 0 < energy <= 1):
        raise ConfigError(f"to_lora: energy must be above 0 and at most 1, found {energy!r}")

    def convert(stack: _Stack) -> _Form:
        config, limit, needed = stack.config, min(stack.shape), _rank(stack)
        if config["method"] == "lora" and energy is None and config["rank"] <= (rank or limit):
            alpha = scale_of(config) * config["rank"] if config["rslora"] else config["alpha"]
            return _Form(lora(config["rank"], alpha=alpha), stack.factors)
        if rank is None and energy is None:
            if needed is None:
                raise ConversionError(f"{config['method']} has no exact LoRA form; give rank= or energy=")
            return _exact(stack, min(needed, limit))
        if rank is not None and needed is not None and needed <= min(rank, limit):
            return _exact(stack, needed)
        return _truncated(stack, rank, energy)

    return _converted(injection, adapters, params, convert)


def to_loha(injection: Injection, adapters: Mapping[str, Factors], params: Any) -> Converted:
    """ABBA with r1 = r2 as LoHa of that rank, the same factors and `alpha = s r`. Exact.

    Raises:
        ConversionError: no kernel can be converted, for the reason given; factors that are not finite.
        ConfigError: adapters made for other kernels.

    Example:
        >>> import jax, jax.numpy as jnp, hadamax as hx
        >>> params, injection = {"up": {"kernel": jnp.ones((6, 8))}}, hx.inject({"up": hx.abba(4, alpha=2)})
        >>> converted = hx.convert.to_loha(injection, injection.init(jax.random.key(0), params), params)
        >>> converted.injection.to_config()["rules"][0]["adapter"]
        {'method': 'loha', 'rank': 2, 'alpha': 4.0, 'forward': 'auto'}
    """

    def convert(stack: _Stack) -> _Form:
        config = stack.config
        if config["method"] == "loha":
            return _Form(stack.target.adapter, stack.factors)
        if config["method"] != "abba":
            raise ConversionError(f"{config['method']} has no LoHa form; only ABBA has")
        if config["r1"] != config["r2"]:
            raise ConversionError(f"LoHa's pairs have one rank, and here r1 = {config['r1']}, r2 = {config['r2']}")
        alpha = scale_of(config) * config["r1"]
        return _Form(loha(config["r1"], alpha=alpha, forward=config["forward"]), stack.factors)

    return _converted(injection, adapters, params, convert)


def to_hira(injection: Injection, adapters: Mapping[str, Factors], params: Any) -> Converted:
    """BoHA as HiRA of rank `blocks` times its own, at most `min(in, out)`. Exact.

    Raises:
        ConversionError: no kernel can be converted, for the reason given; factors that are not finite.
        ConfigError: adapters made for other kernels.
    """

    def convert(stack: _Stack) -> _Form:
        config = stack.config
        if config["method"] == "hira":
            return _Form(stack.target.adapter, stack.factors)
        if config["method"] != "boha":
            raise ConversionError(f"{config['method']} has no HiRA form; only BoHA has")
        rank = min(config["rank"] * config["blocks"], *stack.shape)
        return _Form(hira(rank, scale=config["scale"]), stack.map(lambda f: _capped(*_blocks(f), rank)))

    return _converted(injection, adapters, params, convert)


def to_boha(injection: Injection, adapters: Mapping[str, Factors], params: Any) -> Converted:
    """HiRA as BoHA of one block. Exact.

    Raises:
        ConversionError: no kernel can be converted, for the reason given; factors that are not finite.
        ConfigError: adapters made for other kernels.
    """

    def convert(stack: _Stack) -> _Form:
        config = stack.config
        if config["method"] == "boha":
            return _Form(stack.target.adapter, stack.factors)
        if config["method"] != "hira":
            raise ConversionError(f"{config['method']} has no BoHA form; only HiRA has")
        factors = jax.tree.map(lambda factor: factor[..., None, None, :, :], stack.factors)
        return _Form(boha(config["rank"], 1, scale=config["scale"]), factors)

    return _converted(injection, adapters, params, convert)


class _Stack(NamedTuple):
    """A kernel with its factors, as matrices.

    Attributes:
        target: what the rule says of it, all layers in place of some.
        linear: the layer's leaves, by the paths in `target`.
        factors: leaves `[batch..., ...]`.
        batch: the adapted batch axes.
        shape: of one matrix.
        numbers: which of the kernel's matrices, batch axes flattened, is adapted.
    """

    target: Target
    linear: dict[str, Any]
    factors: Factors
    batch: tuple[int, ...]
    shape: tuple[int, int]
    numbers: list[int]

    @property
    def config(self) -> Config:
        return self.target.adapter.config

    @property
    def flat(self) -> Factors:
        """Factors of one batch axis."""
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[len(self.batch) :]), self.factors)

    def map(self, function: Callable[[Factors], tuple[jax.Array, jax.Array]]) -> Factors:
        """`{"a", "b"}` of each matrix from its factors."""
        return self.stacked(*jax.vmap(function)(self.flat))

    def stacked(self, a: jax.Array, b: jax.Array) -> Factors:
        """`{"a", "b"}` with the kernel's batch axes."""
        return {"a": a.reshape(*self.batch, *a.shape[1:]), "b": b.reshape(*self.batch, *b.shape[1:])}


def _stack(target: Target, leaves: Mapping[str, Any], factors: Factors) -> _Stack:
    *batch, n_in, n_out = jax.eval_shape(lambda: stacks.canonical(leaves, target)).kernel.shape
    numbers = np.arange(math.prod(batch)).reshape(batch)
    if target.layers is not None:
        numbers = numbers[list(target.layers)]
    linear = {"kernel": leaves[target.path]} | ({} if target.bias is None else {"bias": leaves[target.bias]})
    # the same names everywhere: kernels of one shape share their programs
    target = target._replace(path="kernel", bias=target.bias and "bias", new_bias=None, layers=None)
    return _Stack(target, linear, factors, numbers.shape, (n_in, n_out), numbers.ravel().tolist())


def _converted(
    injection: Injection, adapters: Mapping[str, Factors], params: Any, convert: Callable[[_Stack], _Form]
) -> Converted:
    """Every kernel through `convert`, and the rules for what came out."""
    selected, leaves = injection.checked(params, adapters), paths.leaves(params)
    forms: dict[str, _Form] = {}
    kept: dict[str, str] = {}
    errors: dict[str, np.ndarray] = {}
    for path, target in selected.items():
        if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(adapters[path])):
            raise ConversionError(f"{path}: the factors hold NaN or infinity; nothing was converted")
        stack = _stack(target, leaves, adapters[path])
        try:
            with jax.default_matmul_precision("highest"):
                form = forms[path] = convert(stack)
        except HadamaxError as error:
            kept[path] = str(error)
        else:
            errors[path] = np.zeros(stack.batch) if form.errors is None else form.errors
    if not forms:
        path, reason = next(iter(kept.items()), ("the injection", "it has no rules"))
        more = f" ({len(kept) - 1} more kernels cannot either)" if len(kept) > 1 else ""
        raise ConversionError(f"{path}: {reason}{more}")
    new = replaced(injection, params, {path: form.adapter for path, form in forms.items()})
    factors = {path: forms[path].factors if path in forms else adapters[path] for path in selected}
    return Converted(new, factors, errors, kept)


# Low-rank forms of one matrix: dW = a @ b, a [in, R], b [R, out], the scale folded into b.


def scale_of(config: Config) -> float:
    """s of a method whose update is `s` times a product of its factors (and W0).

    Example:
        >>> import hadamax as hx
        >>> scale_of(hx.lora(4, alpha=8).config), scale_of(hx.hira(4).config)
        (2.0, 1.0)
    """
    if config["method"] in ("hira", "boha"):
        return config["scale"]
    if config["method"] == "abba":
        s = config["scale"]
        return config["alpha"] ** 2 / math.sqrt(config["r1"] * config["r2"]) if s is None else s
    return config["alpha"] / (config["rank"] ** 0.5 if config.get("rslora") else config["rank"])


def _blocks(f: Factors) -> tuple[jax.Array, jax.Array]:
    """The low-rank form of `blockwise(a, b)`: the pair of block (i, j) on its rows and its columns."""
    blocks, _, n_in, _ = f["a"].shape
    on = jnp.eye(blocks, dtype=f["a"].dtype)
    a = f["a"][None] * on[:, :, None, None, None]  # [row block, i, j, in, r]
    b = f["b"][:, :, :, None] * on[None, :, None, :, None]  # [i, j, r, column block, out]
    a = jnp.moveaxis(a, 3, 1).reshape(blocks * n_in, -1)
    return a, b.reshape(a.shape[1], -1)


def _low_rank(config: Config, factors: Factors) -> tuple[jax.Array, jax.Array] | None:
    """The form of a method whose update does not depend on W0; None for any other."""
    method, f = config["method"], jax.tree.map(lambda leaf: leaf.astype(wide(leaf.dtype)), factors)
    if method == "lora":
        return f["a"], scale_of(config) * f["b"]
    if method in ("abba", "loha"):
        return khatri_rao(f["a1"].T, f["a2"].T).T, scale_of(config) * khatri_rao(f["b1"], f["b2"])
    if method == "gralora":
        a, b = _blocks(f)
        return a, scale_of(config) * b
    if method == "scaled" and (low := _low_rank(config["adapter"], f)):
        return low[0], config["scale"] * low[1]
    if method in ("add", "chain"):  # no part sees what the ones before it did, so that a chain is a sum
        parts = [low for part, g in zip(config["adapters"], f, strict=True) if (low := _low_rank(part, g))]
        if len(parts) == len(config["adapters"]):
            return jnp.concatenate([a for a, _ in parts], 1), jnp.concatenate([b for _, b in parts])
    return None


def _rank(stack: _Stack) -> int | None:
    """R of the low-rank form, or None without one."""
    low = jax.eval_shape(jax.vmap(functools.partial(_low_rank, stack.config)), stack.flat)
    return None if low is None else low[0].shape[-1]


def _capped(a: jax.Array, b: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """The form at `rank`: its own, or `min(in, out)`, where it is the product itself and the identity."""
    if a.shape[1] == rank:
        return a, b
    dense, eye = a @ b, jnp.eye(rank, dtype=a.dtype)
    return (dense, eye) if rank == b.shape[1] else (eye, dense)


def _exact(stack: _Stack, rank: int) -> _Form:
    def convert(factors: Factors) -> tuple[jax.Array, jax.Array]:
        low = _low_rank(stack.config, factors)
        assert low is not None
        return _capped(*low, rank)

    return _Form(lora(rank), stack.map(convert))


# The nearest low rank: dW = left @ core @ right with orthonormal sides, and the SVD of the core.


def _truncated(stack: _Stack, rank: int | None, energy: float | None) -> _Form:
    pairs, errors = [], []
    for at, number in enumerate(stack.numbers):  # one after the other, for the memory
        factors = jax.tree.map(lambda leaf, at=at: leaf[at], stack.flat)
        left, core, right = _core(stack.target, stack.linear, factors, number)
        large = rank is not None and left is None and min(core.shape) > _LARGE
        svd = _svd(core, rank if large else None)
        keep = min(rank, len(svd[1])) if rank is not None else _rank_of_energy(svd[1], energy)
        a, b, error = _cut(left, core, right, svd, keep)
        pairs.append((a, b))
        errors.append(error)
    width = max(a.shape[1] for a, _ in pairs)
    a = jnp.stack([jnp.pad(a, ((0, 0), (0, width - a.shape[1]))) for a, _ in pairs])
    b = jnp.stack([jnp.pad(b, ((0, width - len(b)), (0, 0))) for _, b in pairs])
    errors = np.asarray(jax.device_get(errors), np.float64).reshape(stack.batch)
    return _Form(lora(width), stack.stacked(a, b), errors)


@functools.partial(jax.jit, static_argnums=0)
def _core(target: Target, linear: dict[str, jax.Array], factors: Factors, number: int):
    """`(left, core, right)` of one matrix; without sides where there is no form of a rank below `min(in, out)`."""
    stacked, _ = stacks.stacked(stacks.canonical(linear, target), target)
    base: Linear = widened(stacks.dense(jax.tree.map(lambda leaf: leaf[number], stacked)))
    if low := _low_rank(target.adapter.config, factors):
        if low[0].shape[1] >= min(base.kernel.shape):
            return None, low[0] @ low[1], None
        (left, r1), (right, r2) = jnp.linalg.qr(low[0]), jnp.linalg.qr(low[1].T)
        return left, r1 @ r2.T, right.T
    merged = target.adapter.merge(factors, base)
    if merged.bias is not base.bias:
        raise ConversionError(
            f"{target.adapter.config['method']} also changes the layer's bias, which LoRA cannot: merge it, or keep it"
            " with hx.save_adapters"
        )
    return None, merged.kernel - base.kernel, None


@functools.partial(jax.jit, static_argnums=1)
def _svd(core: jax.Array, rank: int | None) -> tuple[jax.Array, ...]:
    """All singular triples, or about the `rank` largest."""
    if rank is None:
        return tuple(jnp.linalg.svd(core, full_matrices=False))
    return top_singular(core, rank, key=jax.random.key(0))


def _rank_of_energy(singular: jax.Array, energy: float | None) -> int:
    """The smallest rank that keeps the share; singular values that are rounding alone count as zero."""
    s = np.asarray(singular, np.float64)
    s = np.where(s > s[0] * len(s) * jnp.finfo(singular.dtype).eps, s, 0)
    kept = np.cumsum(s**2)
    return int(np.searchsorted(kept, energy * kept[-1])) + 1


@functools.partial(jax.jit, static_argnums=4)
def _cut(left, core: jax.Array, right, svd: tuple[jax.Array, ...], rank: int):
    """`(a, b, error)` at a rank, the singular values shared between a and b."""
    u, s, vt = svd[0][:, :rank], jnp.sqrt(svd[1][:rank]), svd[2][:rank]
    a, b = u * on_last(s, u), s[:, None] * vt
    norm = jnp.linalg.norm(core)
    error = jnp.where(norm > 0, jnp.linalg.norm(core - a @ b) / jnp.where(norm > 0, norm, 1), 0)
    return a if left is None else left @ a, b if right is None else b @ right, error
