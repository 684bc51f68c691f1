"""Continuing: the same bits, the best checkpoint, damaged ones passed over, another base refused, a full disk."""

import json
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hadamax as hx
from hadamax import hf
from hadamax.checkpoint import Checkpoints
from train import evaluate, export, metrics, optim
from train.config import EvaluateConfig, UsageError
from train.finetune import finetune, main
from train.resume import identity
from train.run import load_run

ROOT = Path(__file__).parents[2]


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


UPHILL = 0.5


@pytest.fixture(scope="module", autouse=True)
def uphill():
    """Runs at the rate `UPHILL` climb, so that their first step is the best."""
    down = optim.learning_rates

    def rates(trainable, adapters, config):
        found = down(trainable, adapters, config)
        climbs = jax.tree.map(lambda rate: -rate if config.lr == UPHILL else rate, found["adapters"])
        return found | {"adapters": climbs}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim, "learning_rates", rates)
        yield


@pytest.fixture(scope="module")
def four_steps(configure, tmp_path_factory):
    """A run of four steps, each evaluated and kept: its folder, its configuration's sections and its result."""
    out = tmp_path_factory.mktemp("resume") / "run"
    sections = {
        "run": {"eval_every": 1, "save_every": 1, "keep": 9, "log_every": 1},
        "optim": {"lr": UPHILL},
        "adapter": {"train_base": ["norm/scale"]},
    }
    return out, sections, finetune(configure(out, **sections))


@pytest.fixture
def copy(four_steps, tmp_path, configure):
    """A copy of that run, which may be harmed, and its configuration."""
    out, sections, _ = four_steps
    shutil.copytree(out, tmp_path / "run")
    return tmp_path / "run", configure(tmp_path / "run", **sections)


def flip(checkpoint):
    """Harms a checkpoint as a bad disk does: the middle byte of its largest file of factors."""
    file = max(checkpoint.glob("trainable/**/d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


HARMS = {
    "bit flipped": flip,
    "optimiser lost": lambda path: shutil.rmtree(path / "state"),
    "half removed": lambda path: [shutil.rmtree(path / name) for name in ("data", "meta", "trainable")],
}


@pytest.mark.parametrize("harm", HARMS)
def test_of_a_damaged_last_checkpoint_one_line_is_said_and_the_one_before_leads_to_the_same_bits(
    copy, four_steps, capsys, harm
):
    out, config = copy
    HARMS[harm](out / "checkpoints" / "4")
    if harm != "optimiser lost":  # which is not read there
        run = load_run(out)
        assert run.step == 3
        assert (out / "checkpoints" / "4").is_dir()  # only a run that writes moves it
    capsys.readouterr()
    result = finetune(config)
    printed = capsys.readouterr().out
    said = [line for line in printed.splitlines() if "is damaged" in line]
    assert len(said) == 1
    assert re.search(r"note: .*checkpoints/4 is damaged \(.*\); using the one before", said[0])
    assert "continuing from step 3 of 4" in printed
    assert bits((result.adapters, result.params)) == bits((four_steps[2].adapters, four_steps[2].params))
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["1", "2", "3", "4", "4.damaged"]
    figures = [
        [(line["step"], line.get("loss"), line.get("eval_loss")) for line in metrics.read(folder / "metrics.jsonl")]
        for folder in (out, four_steps[0])
    ]
    assert figures[0] == figures[1]


def test_where_no_checkpoint_is_whole_that_is_the_error(copy):
    out, config = copy
    for step in range(1, 5):
        flip(out / "checkpoints" / str(step))
    for read in (lambda: finetune(config), lambda: load_run(out)):
        with pytest.raises(
            hx.CheckpointError, match=r"no checkpoint in .* is whole: .*checkpoints/1 is damaged"
        ) as caught:
            read()
        assert "\n" not in str(caught.value)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["1", "2", "3", "4"]


def test_the_best_checkpoint_is_the_one_of_the_lowest_held_out_loss(copy, monkeypatch):
    out, _ = copy
    lines = metrics.read(out / "metrics.jsonl")
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line and line["step"]}
    assert list(losses) == [1, 2, 3, 4] and min(losses, key=losses.__getitem__) == 1
    assert [load_run(out, step=step).step for step in ("last", "best", 2)] == [4, 1, 2]
    with pytest.raises(hx.CheckpointError, match="holds the steps 1, 2, 3, 4, no step 7"):
        load_run(out, step=7)
    (out / "checkpoints" / "1" / "meta" / "metadata").write_text("{")
    with pytest.raises(hx.CheckpointError, match=r"checkpoints/1 is damaged .*; the other steps, for --step: 2, 3, 4"):
        load_run(out, step="best")
    monkeypatch.setattr(Checkpoints, "best", lambda _: None)
    with pytest.raises(hx.CheckpointError, match="none saved at a step that was evaluated"):
        load_run(out, step="best")


def test_evaluate_and_export_take_the_step_that_is_asked_for(copy, records_file, tmp_path):
    out, _ = copy
    found = {
        step: evaluate.evaluate(EvaluateConfig(str(records_file), run=str(out), step=step, max_new_tokens=0))
        for step in ("last", "best", 1)
    }
    assert [result["step"] for result in found.values()] == [4, 1, 1]
    losses = {step: result["loss"] for step, result in found.items()}
    assert losses["best"] == losses[1] < losses["last"]
    export.main([f"--run={out}", f"--out={tmp_path / 'first'}", "--adapter=native", "--step=1"])
    loaded = hx.load_adapters(tmp_path / "first", load_run(out).base.params, check_base=False)
    assert bits(loaded.adapters) == bits(load_run(out, step=1).trainable["adapters"])
    with pytest.raises(UsageError, match="--step"):
        export.main([f"--run={out}", f"--out={tmp_path / 'x'}", "--step=newest"])
    with pytest.raises(UsageError, match="--step chooses a checkpoint of --run"):
        EvaluateConfig(str(records_file), model="m", step="best")


@pytest.fixture(scope="module")
def other_base(tmp_path_factory, base_dir):
    """A base of the same shapes with one number of one weight changed."""
    folder = tmp_path_factory.mktemp("other") / "model"
    model, params, config = hf.load_pretrained(base_dir)
    kernel = params["params"]["layers"]["mlp"]["up_proj"]["kernel"]
    params["params"]["layers"]["mlp"]["up_proj"]["kernel"] = kernel.at[1, 2, 3].add(0.5)
    hf.save_pretrained(folder, model, params, config, tokenizer_from=base_dir)
    return str(folder)


def test_another_base_of_the_same_shapes_is_refused_with_the_weight_that_differs(
    copy, configure, four_steps, other_base, records_file, tmp_path
):
    out, _ = copy
    moved = configure(out, model={"base": other_base}, **four_steps[1])
    for use in (
        lambda: finetune(moved),
        lambda: evaluate.evaluate(EvaluateConfig(str(records_file), run=str(out), base=other_base)),
        lambda: export.main([f"--run={out}", f"--out={tmp_path / 'out'}", f"--base={other_base}"]),
    ):
        with pytest.raises(hx.BaseMismatchError, match=r"another base: 'layers/mlp/up_proj/kernel'") as caught:
            use()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_same_base_elsewhere_or_in_another_precision_is_the_same_base(
    copy, configure, four_steps, base_dir, tmp_path
):
    out, _ = copy
    shutil.copytree(base_dir, tmp_path / "moved")
    result = finetune(configure(out, model={"base": str(tmp_path / "moved")}, **four_steps[1]))
    assert bits(result.adapters) == bits(four_steps[2].adapters)
    for dtype in ("bfloat16", "float16"):
        assert load_run(out, str(tmp_path / "moved"), dtype).step == 4


def test_a_base_with_other_weights_or_shapes_has_another_identity(tmp_path):
    from train.resume import check_base

    params = {"a": {"kernel": jnp.ones((2, 3))}, "b": jnp.arange(3)}  # integers are no weights
    there = identity(params)
    assert list(there) == ["a/kernel"] and there["a/kernel"]["shape"] == [2, 3]
    with Checkpoints(tmp_path) as checkpoints:
        check_base(checkpoints, there, identity(params))
        for other, message in (
            ({"a": {"kernel": jnp.ones((3, 2))}}, r"'a/kernel' had the shape \[2, 3\], here it has \[3, 2\]"),
            ({"c": jnp.ones(2)}, "lacks the weight 'a/kernel'"),
            ({**params, "c": jnp.ones(2)}, "has the weight 'c'"),
        ):
            with pytest.raises(hx.BaseMismatchError, match=message):
                check_base(checkpoints, there, identity(other))


def test_the_frozen_base_is_not_in_a_checkpoint(copy):
    [size] = {len(json.loads(path.read_text())["trainable"]) for path in copy[0].glob("checkpoints/4/check/metadata")}
    assert size == 2 * 2 + 1  # two factors of two kernels, and the norm


def test_a_disk_that_is_full_ends_the_run_in_one_line_and_leaves_the_earlier_checkpoint_whole(
    records_file, tmp_path, capsys
):
    """The kernel refuses: once a checkpoint is there, no file of the running program may grow beyond 64 KiB."""
    out = tmp_path / "run"
    settings = {
        "model.base": ROOT / "train" / "assets" / "base",
        "data.train": records_file,
        "data.eval_fraction": 0,
        "data.max_length": 24,
        "adapter.method": "lora",
        "run.out": out,
        "run.batch_size": 4,
        "mesh.devices": 1,
        "run.save_every": 2,
        "run.keep": 1,
    }
    argv = [f"--{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "train.finetune", *argv, "--run.steps=100000"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        while program.poll() is None and not list(out.glob("checkpoints/*/commit_success.txt")):
            time.sleep(0.02)
        resource.prlimit(program.pid, resource.RLIMIT_FSIZE, (2**16, 2**16))
        _, err = program.communicate(timeout=300)
    assert program.returncode == 1, err
    assert re.fullmatch(rf"error: cannot write a checkpoint into {out}/checkpoints: .*File too large.*\n", err), err
    [step] = (int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdigit())
    main([*argv, f"--run.steps={step}"])  # which reads all of it
    assert f"{out} is finished" in capsys.readouterr().out
    assert [path.name for path in (out / "checkpoints").iterdir()] == [str(step)]  # what was half-written is gone


def test_a_run_killed_at_any_moment_continues_to_the_same_bits(tmp_path):
    command = [sys.executable, "-m", "benchmarks.kill", "--kills=3", "--steps=12", f"--folder={tmp_path}"]
    program = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert program.returncode == 0, program.stdout + program.stderr
    assert "all the same, bit for bit" in program.stdout
    found = re.search(r"(\d+) kills, (\d+) of them with a save open; 0 checkpoints", program.stdout)
    assert found and int(found[1]) == 3 and int(found[2]) >= 1, program.stdout
