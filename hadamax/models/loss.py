"""Cross-entropy over a large vocabulary, without the logits of the whole batch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding

from hadamax.sharding import batch_axes, fitting

_LOGITS = 2**25  # float32 logits that exist at a time on a device: 128 MiB, as large a vocabulary as there may be


def positions_at_a_time(rows: int, vocabulary: int, mesh: Mesh | None = None) -> int:
    """The pieces of a sequence whose logits take a fixed amount of memory on each device, a power of two.

    Example:
        >>> positions_at_a_time(4, 128_256), positions_at_a_time(4, 256_512)
        (64, 32)
    """
    if mesh is not None:
        spec = fitting(mesh, (batch_axes(mesh), "tensor"), (rows, vocabulary))
        rows, vocabulary = NamedSharding(mesh, spec).shard_shape((rows, vocabulary))
    return 2 ** (max(1, _LOGITS // (rows * vocabulary)).bit_length() - 1)


def chunked_cross_entropy(
    logits_of: Callable[[Array], Array], hidden: Array, targets: Array, weights: Array, chunk: int
) -> tuple[Array, Array]:
    """Sum of the weighted negative log-likelihoods, and sum of the weights.

    The sequence is cut into pieces of `chunk` positions (the batch axis stays whole, so a sharded batch stays where it
    is). `jax.checkpoint` rebuilds each piece's logits in the backward pass: at most `[B, chunk, V]` exist at a time.

    Args:
        logits_of: `[B, c, D] -> [B, c, V]`, any float dtype; the softmax is float32.
        hidden: `[B, S, D]`.
        targets: `[B, S]` integers; where the weight is 0 any value will do (-100, say).
        weights: `[B, S]` float, 0 = ignored.
        chunk: positions per piece.

    Returns:
        Two float32 scalars.

    Example:
        >>> hidden, targets = jnp.zeros((1, 3, 4)), jnp.array([[0, 1, -100]])
        >>> total, count = chunked_cross_entropy(lambda h: h, hidden, targets, jnp.array([[1.0, 1.0, 0.0]]), chunk=2)
        >>> f"{total / count:.4f}"  # log 4
        '1.3863'
    """
    batch, length, width = hidden.shape
    chunk = min(chunk, length)
    pad = -length % chunk
    padding = ((0, 0), (0, pad))
    hidden = jnp.pad(hidden, (*padding, (0, 0))).reshape(batch, -1, chunk, width).swapaxes(0, 1)
    weights = jnp.pad(weights.astype(jnp.float32), padding).reshape(batch, -1, chunk).swapaxes(0, 1)
    targets = jnp.pad(targets, padding).reshape(batch, -1, chunk).swapaxes(0, 1)
    targets = jnp.where(weights == 0, 0, targets)

    def piece(total, xs):
        h, t, w = xs
        logits = logits_of(h).astype(jnp.float32)
        picked = jnp.take_along_axis(logits, t[..., None], axis=-1)[..., 0]
        return total + jnp.sum(w * (jax.nn.logsumexp(logits, axis=-1) - picked)), None

    piece = jax.checkpoint(piece, prevent_cse=False)
    total, _ = jax.lax.scan(piece, jnp.zeros((), jnp.float32), (hidden, targets, weights))
    return total, jnp.sum(weights)
