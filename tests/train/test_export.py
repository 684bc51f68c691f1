"""The merged directory and the merge loss."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

from hadamax import hf, paths
from hadamax.errors import CheckpointError
from train import cli
from train.config import ExportConfig
from train.export import export_merged, largest_difference, main
from train.finetune import finetune
from train.merging import merge, merge_loss
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
    losses, total = export_merged(ExportConfig(str(run), str(tmp_path / "out")), load_run(run))
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
    losses, total = merge_loss(load_run(run), "bfloat16")
    exact = paths.leaves(result.injection.merge(result.params, result.adapters))
    base, rounded = paths.leaves(result.base.params), paths.leaves(merge(load_run(run), "bfloat16"))
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
    export_merged(ExportConfig(str(run), str(tmp_path / "half"), dtype="float16"), load_run(run))
    _, params, config = hf.load_pretrained(tmp_path / "half")
    assert config.dtype == "float16"
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float16")}


def test_a_shift_of_a_layer_without_a_bias_is_exported(make_config, tmp_path):
    config = make_config(adapter={"method": "hadamard_adapter", "rank": None, "targets": ["o_proj"]}, optim={"lr": 0.1})
    result = finetune(config)
    export_merged(ExportConfig(config.run.out, str(tmp_path / "out")), load_run(config.run.out))
    model, params, written = hf.load_pretrained(tmp_path / "out")
    assert written.attention_bias
    ids = jnp.array([[5, 6, 7]])
    ours = result.injection.apply(result.base.model.apply)(result.params, result.adapters, ids)
    np.testing.assert_allclose(model.apply(params, ids), ours, atol=1e-4)


def test_a_directory_that_is_not_empty_is_refused(trained, tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        export_merged(ExportConfig(str(trained[1]), str(tmp_path)), load_run(trained[1]))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--merged"],
        ["--adapter", "native"],
        ["--adapter", "native", "--as", "loha"],
        ["--adapter", "peft", "--as", "loha"],
        ["--adapter", "peft", "--as", "lora"],
        ["--adapter", "native", "--as=lora", "--energy", "1.0"],
    ],
    ids=" ".join,
)
def test_what_is_exact_is_verified(trained, tmp_path, arguments, capsys):
    _, run = trained
    main(["--run", str(run), "--out", str(tmp_path / "out"), "--verify", *arguments])
    found = re.search(r"verified: logits differ from the run's by at most (\S+) ", capsys.readouterr().out)
    assert float(found[1]) < 1e-4


def test_a_lower_rank_reports_the_error_that_it_makes(make_config, tmp_path, capsys):
    config = make_config(adapter={"train_base": ["norm/scale"]}, optim={"lr": 0.1})  # HiRA
    result, run = finetune(config), config.run.out
    capsys.readouterr()
    arguments = ["--out", str(tmp_path / "out"), "--adapter", "peft", "--as", "lora", "--rank", "1", "--verify"]
    main(["--run", run, *arguments])
    out = capsys.readouterr().out
    errors = [float(error) for error in re.findall(r"kernel *│ *(\S+)%", out)]
    assert len(errors) == len(result.adapters) and all(0 < error < 100 for error in errors)
    assert float(re.search(r"by at most (\S+) ", out)[1]) > 1e-4
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["modules_to_save"]) == ("LORA", 1, ["model.norm"])
    assert config["base_model_name_or_path"] == load_run(run).config.model.base


def test_verification_sees_a_directory_that_was_changed(trained, tmp_path):
    _, run = trained
    config = ExportConfig(str(run), str(tmp_path / "out"))
    export_merged(config, load_run(run))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = -tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "out" / "model.safetensors")
    difference, largest = largest_difference(config, load_run(run))
    assert difference > 1e-2 and largest > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapter", "peft"], "abba"),
        (["--adapter", "peft", "--as", "hira"], "abba"),
        (["--adapter", "peft", "--merged"], "either --merged or --adapter"),
        (["--as", "lora"], "give --adapter peft or --adapter native with it"),
        (["--adapter", "peft", "--rank", "3"], "--rank and --energy are for --as lora"),
        (["--adapter", "peft", "--as", "lora", "--rank", "3", "--energy", "0.5"], "not both"),
        (["--adapter", "native", "--dtype", "float16"], "--dtype is for the merged model"),
        (["--adapter", "native", "--as", "dora"], "--as: 'dora'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_exported_is_one_line(trained, tmp_path, arguments, message, capsys):
    assert cli.run(main, ["--run", str(trained[1]), "--out", str(tmp_path / "out"), *arguments]) > 0
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_run_without_adapters_has_a_native_directory(make_config, tmp_path, capsys):
    config = make_config(adapter={"method": None, "rank": None, "train_base": ["scale"]}, optim={"lr": 0.1})
    finetune(config)
    arguments = ["--run", config.run.out, "--out", str(tmp_path / "out"), "--adapter"]
    assert cli.run(main, [*arguments, "peft"]) == 1
    assert "has no adapters, only trained base parameters" in capsys.readouterr().err
    main([*arguments, "native", "--verify"])
    assert float(re.search(r"by at most (\S+) ", capsys.readouterr().out)[1]) < 1e-5


def test_a_target_that_is_taken_is_refused_before_the_run_is_read(tmp_path, capsys):
    (tmp_path / "file").touch()
    for out, message in ((tmp_path, "exists and is not empty"), (tmp_path / "file" / "x", "file is a file")):
        assert cli.run(main, ["--run", "absent", "--out", str(out)]) == 1
        assert message in capsys.readouterr().err
