"""(IA)^3 (Liu et al. 2022, arXiv 2205.05638): a trained scale per feature, the Hadamard Adapter without its bias.

    k, v projections:  y = l .* (W x)             position="output"
    FFN's down:        y = W (l .* x)             position="input"

l starts as ones.
"""

from hadamax.adapter import Adapter
from hadamax.methods.hadamard import Position, hadamard_adapter


def ia3(*, position: Position = "output") -> Adapter:
    """Scale of a layer's output features (keys and values) or input features (the feed-forward's second layer).

    Example:
        >>> import hadamax as hx
        >>> hx.ia3(position="input").config
        {'method': 'ia3', 'position': 'input'}
    """
    adapter = hadamard_adapter(position=position, bias=False)
    return adapter._replace(config={"method": "ia3", "position": position})
