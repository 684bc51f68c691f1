"""The merged directory and the merge loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoTokenizer, LlamaForCausalLM

from hadamax import hf, paths
from hadamax.errors import CheckpointError
from train.config import ExportConfig
from train.export import export, merge
from train.finetune import finetune
from train.run import load_run


@pytest.fixture(scope="module")
def trained(configure, tmp_path_factory):
    """A run of a few large steps, with a trained norm."""
    out = tmp_path_factory.mktemp("runs") / "run"
    adapter = {"method": "abba", "train_base": ["norm/scale"]}
    return finetune(configure(out, adapter=adapter, optim={"lr": 0.05})), out


def test_transformers_loads_the_export_with_the_logits_of_the_run(trained, tmp_path, tokenizer):
    import torch

    result, run = trained
    losses, total = export(ExportConfig(str(run), str(tmp_path / "out")))
    assert total == 0.0 == max(losses.values())
    ids = np.array([[5, 6, 7, 8]])
    ours = result.injection.apply(result.base.model.apply)(result.params, result.adapters, jnp.asarray(ids))
    with torch.no_grad():
        theirs = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    unadapted = result.base.model.apply(result.base.params, jnp.asarray(ids))
    assert float(jnp.abs(ours - unadapted).max()) > 1e-2
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("1 + 2")["input_ids"] == tokenizer("1 + 2")["input_ids"]


def test_merge_loss_is_the_share_of_the_update_that_rounding_loses(trained):
    result, run = trained
    params, losses, total = merge(load_run(run), "bfloat16")
    exact = paths.leaves(result.injection.merge(result.params, result.adapters))
    base, rounded = paths.leaves(result.base.params), paths.leaves(params)
    assert {leaf.dtype for leaf in rounded.values()} == {jnp.dtype("bfloat16")}
    assert set(losses) == {*result.adapters, "norm/scale"}
    lost, update = 0.0, 0.0
    for path, loss in losses.items():
        w0, w, r = (np.asarray(tree[path], np.float64) for tree in (base, exact, rounded))
        np.testing.assert_allclose(loss, np.linalg.norm(r - w) / np.linalg.norm(w - w0), rtol=1e-3)
        assert 0 < loss < 1
        lost, update = lost + np.sum((r - w) ** 2), update + np.sum((w - w0) ** 2)
    np.testing.assert_allclose(total, (lost / update) ** 0.5, rtol=1e-3)


def test_the_written_dtype_is_the_one_asked_for(trained, tmp_path):
    _, run = trained
    export(ExportConfig(str(run), str(tmp_path / "half"), dtype="float16"))
    _, params, config = hf.load_pretrained(tmp_path / "half")
    assert config.dtype == "float16"
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float16")}


def test_a_shift_of_a_layer_without_a_bias_is_exported(make_config, tmp_path):
    config = make_config(adapter={"method": "hadamard_adapter", "rank": None, "targets": ["o_proj"]}, optim={"lr": 0.1})
    result = finetune(config)
    export(ExportConfig(config.run.out, str(tmp_path / "out")))
    model, params, written = hf.load_pretrained(tmp_path / "out")
    assert written.attention_bias
    ids = jnp.array([[5, 6, 7]])
    ours = result.injection.apply(result.base.model.apply)(result.params, result.adapters, ids)
    np.testing.assert_allclose(model.apply(params, ids), ours, atol=1e-4)


def test_a_directory_that_is_not_empty_is_refused(trained, tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        export(ExportConfig(str(trained[1]), str(tmp_path)))
