"""Paths and tensor names agree with what transformers saves."""

import pytest

from hadamax.hf.families import build, expected_leaves, read_config, tensors
from hadamax.hf.names import is_ignorable


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("flags", [{}, {"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}])
def test_every_leaf_maps_onto_the_tensors_of_transformers(llama, scan_layers, flags):
    model = llama(**flags).model
    config, task = read_config(model.config.to_dict())
    ours = build(config, task=task, scan_layers=scan_layers)
    leaves = expected_leaves(ours)
    ours = {t.name: t.shape(leaves[path].shape) for path, found in tensors(ours).items() for t in found}
    theirs = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert ours == theirs


def test_only_a_tied_head_and_rope_tables_are_ignorable():
    assert is_ignorable("lm_head.weight", tied=True)
    assert not is_ignorable("lm_head.weight", tied=False)
    assert is_ignorable("model.layers.0.self_attn.rotary_emb.inv_freq", tied=False)
    assert not is_ignorable("model.layers.0.self_attn.q_proj.weight", tied=True)
