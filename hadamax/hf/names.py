"""Parameter paths and the tensor names of Hugging Face checkpoints."""

from typing import NamedTuple


class Tensor(NamedTuple):
    """One tensor of a checkpoint: where it stands in a leaf, and whether it is stored transposed."""

    name: str
    layer: int | None  # index on the leaf's first axis, None where the leaf is the tensor
    transposed: bool

    def shape(self, leaf: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that is stored, given the leaf's."""
        own = leaf if self.layer is None else leaf[1:]
        return own[::-1] if self.transposed else own


LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}


def tensors_of(path: str, num_layers: int) -> list[Tensor]:
    """The checkpoint tensors that make up the parameter at `path`.

    Example:
        >>> tensors_of("layers/self_attn/q_proj/kernel", 2)[1].name
        'model.layers.1.self_attn.q_proj.weight'
        >>> tensors_of("layers_3/mlp/up_proj/bias", 4)
        [Tensor(name='model.layers.3.mlp.up_proj.bias', layer=None, transposed=False)]
        >>> tensors_of("lm_head/kernel", 2)
        [Tensor(name='lm_head.weight', layer=None, transposed=True)]
    """
    first, *rest, leaf = path.split("/")
    ending = ".".join([*rest, LEAVES[leaf]])
    transposed = leaf == "kernel"
    if first == "lm_head":
        return [Tensor(f"lm_head.{ending}", None, transposed)]
    if first == "layers":
        return [Tensor(f"model.layers.{i}.{ending}", i, transposed) for i in range(num_layers)]
    return [Tensor(f"model.{first.replace('layers_', 'layers.')}.{ending}", None, transposed)]


def is_ignorable(name: str, tied: bool) -> bool:
    """Tensors that older checkpoints hold and nobody needs: rope tables, and a head that repeats the tied table."""
    return name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")
