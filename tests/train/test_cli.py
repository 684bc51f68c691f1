"""A user's mistakes through the command line: one line on stderr and an exit code."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from train import cli, evaluate, export, finetune, metrics, program
from train.step import make_steps


@pytest.fixture
def run(base_dir, records_file, tmp_path, capsys):
    """`run("--run.steps", "2")`: exit code and stderr of a small `train.finetune`, which must be one line or none."""

    def call(*argv, main=finetune.main):
        small = ["--model.base", str(base_dir), "--data.train", str(records_file), "--data.max_length", "24"]
        small += ["--adapter.method", "hira", "--adapter.rank", "2", "--adapter.targets", "[q_proj]"]
        small += ["--run.out", str(tmp_path / "run"), "--run.steps", "2", "--run.batch_size", "4"]
        small += ["--mesh.devices", "1"]
        code = cli.run(main, [*small, *argv] if main is finetune.main else list(argv))
        err = capsys.readouterr().err
        assert err.count("\n") <= 1
        assert "Traceback" not in err
        return code, err.strip()

    return call


def test_success_is_silent_and_zero(run, tmp_path):
    assert run() == (0, "")
    assert run("--run", str(tmp_path / "run"), "--out", str(tmp_path / "out"), main=export.main) == (0, "")
    argv = ["--model", str(tmp_path / "out"), "--max_new_tokens", "1", "--data"]
    (tmp_path / "one.jsonl").write_text(json.dumps({"question": "1?", "answer": "1"}))
    assert run(*argv, str(tmp_path / "one.jsonl"), main=evaluate.main) == (0, "")


@pytest.mark.parametrize(
    "argv, code, message",
    [
        (["--optim.lrr", "3"], 2, "error: unknown option optim.lrr; nearest: 'optim.lr'"),
        (["--lr", "3"], 2, "error: unknown option lr; nearest: 'optim.lr'"),
        (["--data", "F.jsonl"], 2, "error: --data is a group of options, found 'F.jsonl'; say which: --data.train, "),
        (["--adapter.targets", "q_proj"], 2, "error: --adapter.targets: 'q_proj' is not list; a list is written in"),
        (["--optim.lr", "1e-3", "3e-3"], 2, "error: '3e-3' belongs to no option; a list is written in quotes and"),
        (["--optim.lr", "[1e-3, x]"], 2, "error: --optim.lr: an entry of \"[0.001, 'x']\" is not float or null"),
        (["--adapter.method", "boha"], 1, "error: boha: missing a required argument: 'blocks'; it goes into "),
        (["--run.steps", "many"], 2, "error: --run.steps: 'many' is not int or null"),
        (["--model.base", "no/such/model"], 1, "error: no directory at no/such/model"),
        (["--data.train", "absent.jsonl"], 1, "error: no data file absent.jsonl"),
        (["--data.template", "alpacca"], 1, "nearest: 'alpaca'"),
        (["--adapter.method", "hirra"], 1, "error: unknown method 'hirra'; nearest: 'hira'"),
        (["--adapter.options.scalle", "2"], 1, "error: hira has no option 'scalle'; nearest: 'scale'"),
        (["--adapter.rank", "17"], 1, "rank 17"),
        (["--adapter.targets", "[q_prj]"], 1, "q_proj"),
        (["--adapter.targets", "[q_proj,input_layernorm]"], 1, "'layers/input_layernorm/scale'"),
        (["--adapter.train_base", "[nrm/scale]"], 1, "norm/scale"),
        (
            ["--adapter.rank", "null", "--adapter.rules", "{q_proj: {method: lora, ranc: 2}}"],
            1,
            "'q_proj': lora has no option 'ranc'",
        ),
        (["--adapter.rank", "null", "--adapter.rules", "{q_proj: {rank: 2}}"], 1, "needs a 'method' by name"),
        (["--data.max_length", "3"], 1, "has a response within data.max_length 3"),
        (["--data.eval_fraction", "0.001"], 1, "data.eval_fraction 0.001 of 40 records is 0"),
    ],
)
def test_a_wrong_setting(run, argv, code, message):
    found, err = run(*argv)
    assert found == code
    assert err.startswith("error: ")
    assert message in err


@pytest.mark.parametrize("main", [finetune.main, evaluate.main, export.main])
def test_no_arguments_at_all(main, capsys):
    assert cli.run(main, []) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: needed: --") and error.endswith("; --help has all options\n")


def test_an_option_of_another_program(run):
    code, err = run("--data.eval", "F", main=evaluate.main)
    assert (code, err) == (2, "error: unknown option data.eval; nearest: 'data'")


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "holds no records"),
        ('{"question": "1", "answer": "2"}\n{"question"\n', "bad.jsonl:2: malformed JSON"),
        ('{"question": "1", "answer": "2"}\n\n{"prompt": "1"}\n', "bad.jsonl:3: no 'instruction' and 'output'"),
    ],
)
def test_bad_data(run, tmp_path, text, message):
    (tmp_path / "bad.jsonl").write_text(text)
    code, err = run("--data.train", str(tmp_path / "bad.jsonl"), "--data.eval_fraction", "0")
    assert code == 1
    assert message in err


def test_no_base_files(run, tmp_path):
    code, err = run("--model.base", str(tmp_path))
    assert code == 1
    assert str(tmp_path) in err


def test_a_base_without_a_tokenizer(run, base_dir, tmp_path):
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(base_dir / name, tmp_path / "bare" / name)
    code, err = run("--model.base", str(tmp_path / "bare"))
    assert code == 1
    assert "has no tokenizer" in err


def test_an_encoder_is_refused(run, base_dir, tmp_path):
    from hadamax import hf
    from hadamax.models import Encoder, EncoderConfig

    config = EncoderConfig(80, 16, 24, 2, 2, max_position_embeddings=32)
    model = Encoder(config)
    params = model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    hf.save_pretrained(tmp_path / "bert", model, params, config, tokenizer_from=base_dir)
    code, err = run("--model.base", str(tmp_path / "bert"))
    assert code == 1
    assert "task 'causal_lm' is unknown for bert" in err


def test_checkpoints_that_are_all_damaged(run, tmp_path):
    assert run()[0] == 0
    for path in (tmp_path / "run/checkpoints/2").glob("trainable/**/d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for argv, main in (
        (["--run.steps", "4"], finetune.main),
        (["--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")], export.main),
    ):
        code, err = run(*argv, main=main)
        assert code == 1
        assert f"error: no checkpoint in {tmp_path}/run/checkpoints is whole: " in err
        assert "checkpoints/2 is damaged" in err and err.endswith("; give another run.out")


def test_a_checkpoint_of_other_adapters(run):
    assert run()[0] == 0
    code, err = run("--adapter.rank", "4")
    assert code == 1
    assert "was made with other adapters" in err


@pytest.mark.parametrize("main", [evaluate.main, export.main])
def test_no_run(run, records_file, tmp_path, main):
    rest = ["--data", str(records_file)] if main is evaluate.main else ["--out", str(tmp_path / "out")]
    assert run("--run", str(tmp_path / "no"), *rest, main=main) == (1, f"error: no run directory {tmp_path / 'no'}")
    (tmp_path / "empty").mkdir()
    code, err = run("--run", str(tmp_path / "empty"), *rest, main=main)
    assert code == 1
    assert "no checkpoints in" in err


def test_a_loss_that_is_not_a_number(run, monkeypatch):
    def poisoned(*args):
        train, evaluate = make_steps(*args)

        def bad(state, frozen, batch):
            return train(state, frozen, batch | {"weights": jnp.nan * batch["weights"]})

        return jax.jit(bad), evaluate

    monkeypatch.setattr(program, "make_steps", poisoned)
    code, err = run()
    assert code == 1
    assert "loss is nan at step 1; stopped" in err


@pytest.mark.parametrize(
    "target, name, number",
    [
        (ocp.CheckpointManager, "save", errno.EROFS),
        (ocp.CheckpointManager, "wait_until_finished", errno.ENOSPC),
        (metrics.Metrics, "log", errno.ENOSPC),
    ],
)
def test_a_disk_that_refuses(run, monkeypatch, target, name, number):
    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(target, name, refuse)
    code, err = run()
    assert code == 1
    assert err.startswith("error: ")
    assert os.strerror(number) in err


def test_an_output_below_a_file(run, records_file):
    code, err = run("--run.out", str(records_file / "run"))
    assert code == 1
    assert "is a file; give a directory" in err


def test_out_of_memory_says_what_to_do(run, monkeypatch):
    import jax

    def greedy(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

    monkeypatch.setattr(program, "make_steps", greedy)
    code, err = run()
    assert code == 1
    assert "lower run.batch_size" in err


def test_an_interrupt_before_the_loop(run, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "load_base", interrupted)
    assert run() == (130, "interrupted")


@pytest.fixture
def process(base_dir, records_file, tmp_path):
    """Starts a real `python -m train.finetune`."""

    def start(*argv):
        small = ["--model.base", base_dir, "--data.train", records_file, "--data.max_length", "24"]
        small += [
            "--adapter.method",
            "hira",
            "--adapter.rank",
            "2",
            "--run.out",
            tmp_path / "run",
            "--run.batch_size",
            "4",
            "--mesh.devices",
            "1",
        ]
        root = Path(__file__).parents[2]
        command = [sys.executable, "-m", "train.finetune", *map(str, small), *argv]
        return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


def test_the_program_reports_usage_with_exit_code_2(process):
    with process("--run.stepps", "3") as program:
        _, err = program.communicate()
    assert program.returncode == 2
    assert err.startswith("error: unknown option run.stepps; nearest: 'run.steps'")
    assert err.count("\n") == 1


def test_ctrl_c_saves_a_checkpoint_and_the_same_command_continues(process, tmp_path):
    with process("--run.steps", "1000000", "--run.log_every", "1") as program:
        file = tmp_path / "run" / "metrics.jsonl"
        while program.poll() is None and not (file.exists() and '"loss"' in file.read_text()):
            time.sleep(0.05)
        program.send_signal(signal.SIGINT)
        _, err = program.communicate()
    assert program.returncode == 130, err
    assert err.startswith("stopped by SIGINT after step ")
    assert err.count("\n") == 1
    [step] = (path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    with process("--run.steps", str(int(step) + 1)) as program:
        out, err = program.communicate()
    assert (program.returncode, err) == (0, "")
    assert f"continuing from step {step} of {int(step) + 1}" in out
