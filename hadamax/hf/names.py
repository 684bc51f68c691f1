"""Parameter paths and the tensor names of Hugging Face checkpoints."""

import re
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
STACKED = ("layers", "layer")  # modules whose parameters lead with a layer axis


def tensors_of(
    path: str, num_layers: int, prefix: str = "model", heads: tuple[str, ...] = ("lm_head",)
) -> list[Tensor]:
    """The checkpoint tensors that make up the parameter at `path`.

    Args:
        prefix: before every name but the heads'.
        heads: first components of the paths that have no prefix.

    Example:
        >>> tensors_of("layers/self_attn/q_proj/kernel", 2)[1].name
        'model.layers.1.self_attn.q_proj.weight'
        >>> tensors_of("layers_3/mlp/up_proj/bias", 4)
        [Tensor(name='model.layers.3.mlp.up_proj.bias', layer=None, transposed=False)]
        >>> tensors_of("lm_head/kernel", 2)
        [Tensor(name='lm_head.weight', layer=None, transposed=True)]
        >>> tensors_of("encoder/layer/output/dense/bias", 1, "bert")[0].name
        'bert.encoder.layer.0.output.dense.bias'
    """
    *modules, leaf = path.split("/")
    transposed = leaf == "kernel"
    parts = [re.sub(rf"^({'|'.join(STACKED)})_(\d+)$", r"\1.\2", module) for module in modules] + [LEAVES[leaf]]
    if prefix and modules[0] not in heads:
        parts.insert(0, prefix)
    for at, part in enumerate(parts):
        if part in STACKED:
            names = [".".join([*parts[: at + 1], str(i), *parts[at + 1 :]]) for i in range(num_layers)]
            return [Tensor(name, i, transposed) for i, name in enumerate(names)]
    return [Tensor(".".join(parts), None, transposed)]


def is_ignorable(name: str, tied: bool) -> bool:
    """What checkpoints hold and no model needs: tables that the config implies, a head that repeats the tied one."""
    return name.endswith(("rotary_emb.inv_freq", ".position_ids")) or (tied and name == "lm_head.weight")
