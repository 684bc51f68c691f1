"""Bad steps, those with a value that is not finite or a spike: the compiled step leaves them out, the host counts them.

optax has `apply_if_finite`, which gives in after some bad steps, takes the update, and knows no spikes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import hadamax as hx

WINDOW = 50  # good steps that the running means look back on
FIRST = 20  # good steps before a spike can be told


class NotFiniteError(hx.HadamaxError):
    """The loss, the gradient or a parameter is NaN or infinite."""


class SpikeError(hx.HadamaxError):
    """The loss or the gradient norm is far above its running mean."""


class GuardState(NamedTuple):
    """The optimiser's state and, in the same checkpoint, what tells a bad step."""

    inner: Any
    skipped: Array  # int32: bad steps so far
    in_a_row: Array  # int32: bad steps since the last good one
    good: Array  # int32: good steps so far
    means: Array  # float32 [2]: running means of the loss and the gradient norm over good steps


def guard(inner: optax.GradientTransformation, spike: float = 0.0) -> optax.GradientTransformationExtraArgs:
    """An optimiser that a bad step leaves as it was, and with it the parameters, to the bit.

    `update` takes the loss as `value=`, as optax's line searches do. A step is bad where the loss or the norm of the
    gradient is not finite or is above `spike` times its running mean.

    Args:
        inner: the optimiser.
        spike: that factor; 0 tells no spikes. The first 20 good steps are none.

    Example:
        >>> optimizer = guard(optax.sgd(0.5))
        >>> params = jnp.ones(2)
        >>> for slope in (1.0, jnp.nan, 1.0):
        ...     updates, state = optimizer.update(jnp.full(2, slope), optimizer.init(params), params, value=slope)
        ...     print(optax.apply_updates(params, updates), state.skipped)
        [0.5 0.5] 0
        [1. 1.] 1
        [0.5 0.5] 0
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> GuardState:
        skipped, in_a_row, good = (jnp.zeros((), jnp.int32) for _ in range(3))  # three buffers, to be donated
        return GuardState(inner.init(params), skipped, in_a_row, good, jnp.zeros(2))

    def update(updates: Any, state: GuardState, params: Any = None, *, value: Any, **extra: Any) -> Any:
        watched = jnp.stack([value, optax.tree.norm(updates)]).astype(jnp.float32)
        updates, new = inner.update(updates, state.inner, params, value=value, **extra)
        ok = jnp.isfinite(watched).all()
        if spike:
            ok &= (state.good < FIRST) | (watched <= spike * state.means).all()
        # -0: it changes no bit of what it is added to (subnormal numbers aside, which XLA flushes); 0 turns -0 into 0.
        updates = jax.tree.map(lambda u: jnp.where(ok, u, jnp.full_like(u, -0.0)), updates)
        good = state.good + 1
        candidate = GuardState(
            new,
            skipped=state.skipped,
            in_a_row=jnp.zeros_like(state.in_a_row),
            good=good,
            means=state.means + (watched - state.means) / jnp.minimum(good, WINDOW).astype(jnp.float32),
        )
        left = state._replace(skipped=state.skipped + 1, in_a_row=state.in_a_row + 1)
        return updates, jax.tree.map(lambda a, b: jnp.where(ok, a, b), candidate, left)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def counts(state: Any) -> dict[str, Array]:
    """What a step reports: all bad steps so far, and those in a row up to this one (0: it was good)."""
    return {"skipped_steps": state.skipped, "bad_in_a_row": state.in_a_row}


def check(fetched: Sequence[dict[str, Any]], last: int, allowed: int, saved: int, out: Path) -> None:
    """Raises at the first of the last steps, which end with step `last`, that should end the run.

    Args:
        fetched: `loss`, `grad_norm`, `param_norm` and `counts` of each step.
        allowed: bad steps in a row that only count.
        saved: step of the newest checkpoint (0: none), which is in `out`, for the message.

    Raises:
        NotFiniteError: a parameter is not finite, or too many steps in a row were bad and this one not finite.
        SpikeError: too many steps in a row were bad, this one by a spike.
    """
    kept = f"the checkpoint of step {saved} is kept in {out}" if saved else "no checkpoint had been written yet"
    for step, values in enumerate(fetched, last - len(fetched) + 1):
        names = [name for name in ("loss", "grad_norm", "param_norm") if not np.isfinite(values[name])]
        if values["bad_in_a_row"] <= allowed and "param_norm" not in names:  # a bad parameter does not mend itself
            continue
        row = f", bad step {values['bad_in_a_row']} in a row (optim.max_skips {allowed})" if allowed else ""
        if names:
            found = f"{names[0]} is {float(values[names[0]])} at step {step}{row}"
            raise NotFiniteError(f"{found}; stopped, {kept}; a lower optim.lr often helps")
        found = f"a spike at step {step}: loss {values['loss']:.4g}, gradient norm {values['grad_norm']:.4g}{row}"
        raise SpikeError(f"{found}; stopped, {kept}; raise optim.spike or optim.max_skips, or lower optim.lr")


def means(fetched: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Figures of the last steps: means over the good ones, where there are any, and the count of all bad ones so far.

    Example:
        >>> good = {"loss": 2.0, "skipped_steps": 0, "bad_in_a_row": 0}
        >>> means([good, good | {"loss": np.nan, "skipped_steps": 1, "bad_in_a_row": 1}])
        {'loss': 2.0, 'skipped_steps': 1}
    """
    good = [values for values in fetched if not values["bad_in_a_row"]]
    names = [name for name in fetched[0] if name not in ("skipped_steps", "bad_in_a_row")] if good else []
    figures: dict[str, float] = {name: float(np.mean([values[name] for values in good])) for name in names}
    return figures | {"skipped_steps": int(fetched[-1]["skipped_steps"])}
