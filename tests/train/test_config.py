"""The command line, YAML files and their one-line errors."""

import json

import pytest

from train.config import Config, EvaluateConfig, UsageError
from train.parsing import from_dict, parse

REQUIRED = ["--model.base", "m", "--data.train", "t.jsonl"]


def parsed(*argv):
    return parse(Config, [*REQUIRED, *argv], "train.finetune")


def test_options_override_the_yaml_file_and_it_the_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("optim: {lr: 3, clip: 0.5}\nadapter: {options: {alpha: 2}}\n")
    config = parsed("--config", str(file), "--optim.lr", "1e-4", "--adapter.options.blocks", "4", "--run.steps", "7")
    assert config.optim.lr == 1e-4
    assert config.optim.clip == 0.5
    assert config.optim.weight_decay == 0.0
    assert config.adapter.options == {"alpha": 2, "blocks": 4}
    assert config.run.steps == 7


def test_a_configuration_survives_json():
    config = parsed("--optim.betas", "[0.8,0.9]", "--adapter.rules", "{q_proj: {method: hira, rank: 8}}")
    assert from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--optim.lrr", "3"], "unknown option optim.lrr; nearest: 'optim.lr'"),
        (["--optm.lr", "3"], "unknown option optm.lr; nearest: 'optim.lr'"),
        (["--optim.lr", "abc"], "--optim.lr: 'abc' is not float or list or null"),
        (["--optim.lr", "[0.1, null]"], r"--optim.lr: an entry of '\[0.1, None\]' is not float or null$"),
        (["--optim.lr", "[1e-3, -1e-3]"], "optim.lr: -0.001 is not above 0"),
        (["--optim.lr", ".nan"], "optim.lr: nan is not above 0"),
        (["--optim.lr_ratio", "0"], "optim.lr_ratio: 0.0 is not above 0"),
        (["--run.steps", "1.5"], "--run.steps: '1.5' is not int or null"),
        (["--optim.schedule", "cosin"], "--optim.schedule: .*'cosine'.*cosin"),
        (["--optim.betas", "[1,2,3]"], "--optim.betas: .*2 elements"),
        (["--run.steps"], "--run.steps: expected one argument"),
        (["stray"], "'stray' belongs to no option; a list is written in"),
        (["--run.batch_size", "0"], "run.batch_size: 0 is not at least 1"),
        (["--run.steps", "0"], "run.steps: 0 is not at least 1"),
        (["--optim.warmup", "1"], "optim.warmup: 1.0 is not 0 or more and below 1"),
        (["--run.epochs", "0"], "run.epochs: 0.0 is not above 0"),
        (["--run.save_every", "-1"], "run.save_every: -1 is not 0 or more"),
        (["--run.batch_size", "6", "--run.grad_accum", "4"], "run.grad_accum 4 does not divide run.batch_size 6"),
        (["--optim.optimizer", "lion"], "optim.lr: give one for lion"),
        (["--optim.spike", "0.5"], "optim.spike: 0.5 is not 0 or above 1"),
        (["--optim.max_skips", "-1"], "optim.max_skips: -1 is not 0 or more"),
        (["--optim.schedule", "wsd", "--optim.decay", "0.99"], "optim.decay: 0.99 is not above 0 and within 1"),
        (["--optim.schedule", "constant", "--optim.min_lr_ratio", "0.1"], "a constant schedule does not fall"),
        (["--run.patience", "3", "--run.eval_every", "0"], "run.patience: nothing to wait for; give run.eval_every"),
        (["--mesh.fsdp", "two"], "--mesh.fsdp: 'two' is not int"),
        (["--run.steps", "2", "--run.profile", "[3, 5]"], "run.profile: begins at step 3, the run ends at step 2"),
        (["--run.profile", "[5, 3]"], "run.profile: .*5, 3.* is not a first and a last step, from 1 on"),
        (["--config", "absent.yaml"], "absent.yaml"),
    ],
)
def test_a_wrong_command_line_is_one_line(argv, message):
    with pytest.raises(UsageError, match=message) as caught:
        parsed(*argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("optim:\n  lrr: 3\n", "unknown option optim.lrr; nearest: 'optim.lr'"),
        ("optim:\n  lr: 3\n - x: [\n", "line 3"),
        ("optim: [1\n", "--config is no YAML that can be read: while parsing a flow sequence"),
        ("optim: {lr: high}\n", "--optim.lr: 'high' is not float or list or null"),
        ("optmi: {lr: 3}\n", "unknown option optmi.lr; nearest: 'optim.lr'"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        parsed("--config", str(tmp_path / "c.yaml"))
    assert "\n" not in str(caught.value)


def test_required_options_are_named():
    with pytest.raises(UsageError, match=r"needed: --data\.train; --help"):
        parse(Config, ["--model.base", "m"], "train.finetune")


@pytest.mark.parametrize("argv", [[], ["--run", "r", "--model", "m"]])
def test_evaluation_takes_a_run_or_a_model(argv):
    with pytest.raises(UsageError, match="either --run"):
        parse(EvaluateConfig, ["--data", "d", *argv], "train.evaluate")


def test_help_describes_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        parse(Config, ["--help"], "train.finetune")
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "peak learning rate of the adapters" in text
    assert "rows of an optimiser step" in text


def test_a_switch_needs_no_value():
    config = parsed("--data.packing", "--run.resume", "false")
    assert config.data.packing and not config.run.resume


def test_rules_beside_a_rank_are_refused():
    with pytest.raises(UsageError, match=r"adapter\.rules: each rule has its own rank"):
        parsed("--adapter.rules", "{q_proj: {method: hira, rank: 8}}", "--adapter.rank", "4")
