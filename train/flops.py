"""Model FLOPs of a training step, and the share of the devices' peak that they make.

Counted in the jaxpr of the forward pass, so for any model, adapter and shape: a matrix product of `m x k` and `k x n`
takes `2 m k n` forward, and as many again for each operand that a gradient flows through. So a frozen kernel costs
`4 N` for each token (forward, and the gradient of its input), one whose merged weight has a dense gradient (HiRA,
merged ABBA) or that trains itself `6 N`, LoRA's factors `6 r (in + out)`, and attention `12 L H T` in all (width H of
the heads together, T keys, masked ones included), as in PaLM (arXiv:2204.02311, appendix B). Recomputation (remat)
does not count: a forward pass has none. Nor do element-wise work, look-ups, and loops of unknown length. Padding counts
as tokens do.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal, jaxprs_in_params

import hadamax as hx

# Dense bfloat16 FLOP/s of a device by the beginning of `device_kind`, the first that fits. TPUs: Google Cloud's page of
# each version, peak per chip; a v7 chip is two devices. GPUs: NVIDIA's data sheets, half of the figure "with sparsity".
PEAKS = {
    "TPU v4 lite": None,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "TPU7": 2307e12 / 2,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989.5e12,
    "NVIDIA H200": 989.5e12,
}


def peak(device_kind: str) -> float | None:
    """The FLOP/s of a device at its best, in bfloat16 without sparsity; None where unknown.

    Example:
        >>> peak("TPU v5 lite") / 1e12, peak("NVIDIA H100 80GB HBM3") / 1e12, peak("cpu")
        (197.0, 989.5, None)
    """
    return next((flops for start, flops in PEAKS.items() if device_kind.startswith(start)), None)


def training_flops(loss: Callable[..., Any], trainable: Any, *args: Any) -> float:
    """FLOPs of a step's forward and backward pass; nothing is computed.

    Args:
        loss: `(trainable, *args) -> anything that is differentiated`; gradients are those of `trainable`.
        trainable: arrays or `jax.ShapeDtypeStruct`s, and so are `args`.

    Example:
        >>> x, kernel, a, b = (jax.ShapeDtypeStruct(s, float) for s in ((8, 64), (64, 32), (64, 2), (2, 32)))
        >>> lora = lambda factors, kernel, x: x @ kernel + x @ factors[0] @ factors[1]
        >>> training_flops(lora, (a, b), kernel, x) / 8  # of a first layer: no gradient flows to x
        4992.0
        >>> 2 * (64 * 32) + 4 * (64 * 2) + 6 * (2 * 32)
        4992
    """
    jaxpr = jax.make_jaxpr(loss)(trainable, *args).jaxpr
    count = len(jax.tree.leaves(trainable))
    return float(_count(jaxpr, [i < count for i in range(len(jaxpr.invars))])[0])


def _count(jaxpr: Jaxpr, active: Sequence[bool]) -> tuple[int, list[bool]]:
    """FLOPs of a jaxpr, and which of its outputs depend on an input that is `active`, so that a gradient flows."""
    live = {var for var, flows in zip(jaxpr.invars, active, strict=True) if flows}

    def flows(var: Any) -> bool:
        return not isinstance(var, Literal) and var in live

    total = 0
    for eqn in jaxpr.eqns:
        flops, outputs = _equation(eqn, [flows(var) for var in eqn.invars])
        total += flops
        for var, on in zip(eqn.outvars, outputs, strict=True):
            if on and jnp.issubdtype(var.aval.dtype, jnp.inexact):  # pyright: ignore[reportAttributeAccessIssue]
                live.add(var)
    return total, [flows(var) for var in jaxpr.outvars]


def _equation(eqn: JaxprEqn, active: list[bool]) -> tuple[int, list[bool]]:
    name, inner = eqn.primitive.name, list(jaxprs_in_params(eqn.params))
    if name == "stop_gradient":
        return 0, [False]
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        left, out = (var.aval.shape for var in (eqn.invars[0], eqn.outvars[0]))  # pyright: ignore[reportAttributeAccessIssue]
        terms = math.prod(left[axis] for axis in contracted)
        return 2 * terms * math.prod(out) * (1 + sum(active)), [any(active)]
    if name == "scan":
        if "ft_in" in eqn.params:  # JAX 0.11: the grouping is a tree
            groups = eqn.params["ft_in"].update(eqn.invars).unpack()
            consts, carry = (len(list(group.vals)) for group in groups[:2])
        else:
            consts, carry = eqn.params["num_consts"], eqn.params["num_carry"]
        while True:  # a carry may become active on the way
            flops, outputs = _count(inner[0], active)
            carried = [a or b for a, b in zip(active[consts : consts + carry], outputs[:carry], strict=True)]
            if carried == active[consts : consts + carry]:
                return flops * eqn.params["length"], outputs
            active = active[:consts] + carried + active[consts + carry :]
    if name == "cond":  # its first operand chooses
        branches = [_count(branch, active[1:]) for branch in inner]
        return max(flops for flops, _ in branches), [any(on) for on in zip(*(on for _, on in branches), strict=True)]
    if len(inner) == 1 and len(inner[0].invars) == len(active):  # jit, checkpoint, custom derivatives
        flops, outputs = _count(inner[0], active)
        devices = math.prod(eqn.params["mesh"].shape.values()) if name == "shard_map" else 1  # shapes of one device
        return flops * devices, outputs
    return 0, [any(active)] * len(eqn.outvars)


class Meter(NamedTuple):
    """What figures of speed are made of: a step's tokens and model FLOPs, the devices, the peak of one."""

    tokens: float
    flops: float | None
    devices: int
    peak: float | None

    def rates(self, steps: int, seconds: float) -> dict[str, float]:
        """Figures of so many steps; `mfu`, model-FLOP utilisation, where the peak is known.

        Example:
            >>> Meter(tokens=1000, flops=8e12, devices=2, peak=20e12).rates(10, 5.0)
            {'step_seconds': 0.5, 'tokens_per_second': 2000.0, 'tokens_per_second_per_device': 1000.0, 'mfu': 0.4}
        """
        step, speed = seconds / steps, steps * self.tokens / seconds
        figures = {
            "step_seconds": step,
            "tokens_per_second": speed,
            "tokens_per_second_per_device": speed / self.devices,
        }
        if self.flops is None or self.peak is None:
            return figures
        return figures | {"mfu": self.flops / (step * self.devices * self.peak)}


def meter(tokens: float, apply: Callable[..., Any], trainable: Any, frozen: Any, batch: Any, members: int = 1) -> Meter:
    """The meter of steps on this batch, by the devices that hold it; `apply(params, adapters, **batch, method=)`.

    Args:
        tokens: of a batch.
        members: adapters that train at once, each on the whole batch (`train.members`).
    """
    devices = jax.tree.leaves(batch)[0].sharding.device_set
    best = peak(next(iter(devices)).device_kind)

    def loss(trainable, frozen, batch):
        return apply(hx.join(trainable["base"], frozen), trainable["adapters"], **batch, method="loss")

    count = None if best is None else training_flops(loss, trainable, frozen, batch)
    return Meter(tokens * members, count and count * members, len(devices), best)
