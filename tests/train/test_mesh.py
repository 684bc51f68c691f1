"""One run on any mesh and in any number of processes: the same losses, data, checkpoints; and how processes end."""

import dataclasses
import itertools
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
import numpy as np
import pytest
import yaml
from jax.sharding import PartitionSpec as P

import hadamax as hx
from hadamax import hf, paths
from hadamax.models import Decoder, DecoderConfig
from tests.train.conftest import character_tokenizer
from train import cli, data, evaluate, export, finetune, metrics, processes
from train.config import Config, EvaluateConfig, MeshConfig, UsageError, from_dict

DECODER = DecoderConfig(80, 16, 32, 2, 4, 2, 4, eos_token_id=2)
ONE, DATA, FSDP = {"devices": 1}, {"data": 8, "fsdp": 1}, {"fsdp": 8}
BOTH, ALL = {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}
# Every method, one for each projection, in two runs.
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
MIXES = {
    "products": (
        {"method": "hira", "rank": 2},
        {"method": "boha", "rank": 4, "blocks": 2},
        {"method": "abba", "rank": 4, "forward": "khatri_rao"},
        {"method": "abba", "rank": 4, "forward": "merged"},
        {"method": "loha", "rank": 2},
        {"method": "lora", "rank": 2},
        {"method": "dora", "rank": 2},
        {"method": "hira", "rank": 2},
    ),
    "others": (
        {"method": "lora", "rank": 2, "rslora": True},
        {"method": "gralora", "rank": 4, "blocks": 2},
        {"method": "ia3"},
        {"method": "hadamard_adapter"},
        {"method": "hadamard_adapter", "position": "input"},
        {"method": "hira", "rank": 2, "layers": [1]},
        {"method": "dora", "rank": 2},
        {"method": "lora", "rank": 2},
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random model whose widths divide by 8, with biases at queries, keys and values."""
    folder, config = tmp_path_factory.mktemp("base"), dataclasses.replace(DECODER, attention_bias=True)
    character_tokenizer().save_pretrained(folder / "tokenizer")
    model = Decoder(config)
    params = model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    hf.save_pretrained(folder / "model", model, params, config, tokenizer_from=folder / "tokenizer")
    return folder / "model"


@pytest.fixture(scope="module")
def settings(base, records_file):
    """`settings(out, mix, mesh)`: a configuration of 20 steps of two micro-batches, evaluated on 9 rows."""

    def make(out: Path, mix: str, mesh: dict, **run) -> Config:
        return from_dict(
            {
                "model": {"base": str(base)},
                "data": {"train": str(records_file), "eval_fraction": 0.225, "max_length": 16, "template": "none"}
                | {"packing": mix == "others"},
                "adapter": {
                    "rules": dict(zip(PROJECTIONS, MIXES[mix], strict=True)),
                    "train_base": ["norm/scale", "layers/self_attn/q_proj/bias"],
                },
                "optim": {"schedule": "constant", "warmup": 0.0},  # steps do not depend on how many there will be
                "run": {"out": str(out), "steps": 20, "batch_size": 16, "grad_accum": 2, "log_every": 1}
                | {"eval_every": 10, "save_every": 10}
                | run,
                "mesh": mesh,
            }
        )

    return make


def losses(out: Path) -> np.ndarray:
    return np.array([line.get("loss", line.get("eval_loss")) for line in metrics.read(out / "metrics.jsonl")])


@pytest.fixture(scope="module")
def single(settings, tmp_path_factory):
    """The runs on one device, by mix."""
    out = tmp_path_factory.mktemp("single")
    for mix in MIXES:
        finetune.finetune(settings(out / mix, mix, ONE))
    return out


@pytest.mark.parametrize(
    "mix, mesh", [("products", m) for m in (DATA, FSDP, BOTH, ALL)] + [("others", m) for m in (BOTH, ALL)], ids=str
)
def test_losses_are_those_of_one_device(settings, single, mix, mesh, tmp_path):
    finetune.finetune(settings(tmp_path / "run", mix, mesh))
    expected = losses(single / mix)
    assert len(expected) == 23 and expected[-1] < expected[0] - 0.01
    np.testing.assert_allclose(losses(tmp_path / "run"), expected, rtol=1e-5)


ROOT = Path(__file__).parents[2]


def launch(*argv, **options) -> subprocess.Popen:
    """The program in two processes of four devices."""
    start = [sys.executable, "-m", "train.launch", "--processes", "2", "--devices", "4", "--", sys.executable, "-m"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*start, *map(str, argv)], cwd=ROOT, text=True, **pipes, **options)


def test_two_processes_stop_together_and_one_device_continues(settings, single, tmp_path):
    config = settings(tmp_path / "run", "products", BOTH, steps=10**6, save_every=0)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    with launch("train.finetune", "--config", tmp_path / "config.yaml") as program:
        file = tmp_path / "run" / "metrics.jsonl"
        while program.poll() is None and not (file.exists() and '"loss"' in file.read_text()):
            time.sleep(0.05)
        children = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
        assert len(children) == 2
        os.kill(int(children[1]), signal.SIGTERM)  # the one that writes nothing
        _, err = program.communicate()
    assert program.returncode == 143, err
    [step] = (int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    said = sorted(line for line in err.splitlines() if "stopped by" in line)
    assert [line.split(";")[0] for line in said] == [f"[{i}] stopped by SIGTERM after step {step}" for i in (0, 1)]

    end = max(20, step + 2)
    shutil.copytree(single / "products", tmp_path / "single")
    finetune.finetune(settings(tmp_path / "single", "products", ONE, steps=end))
    finetune.finetune(settings(tmp_path / "run", "products", ONE, steps=end))
    expected, found = losses(tmp_path / "single"), losses(tmp_path / "run")
    assert len(found) >= end + 2 and step > 0
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.fixture(scope="module")
def workers(single, records_file, tmp_path_factory):
    """What the two processes of `process_worker` say, and what they wrote."""
    out = tmp_path_factory.mktemp("workers")
    with launch("tests.train.process_worker", single / "products", records_file, out) as program:
        _, err = program.communicate()
    assert program.returncode == 0, err
    return [json.loads((out / f"{i}.json").read_text()) for i in (0, 1)], out


def test_a_process_reads_the_bytes_that_its_devices_hold(workers, base):
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(hf.load_pretrained(base)[1]))
    for said in workers[0]:
        assert {mesh: read == held for mesh, (read, held) in said["bytes"].items()} == dict.fromkeys(
            said["bytes"], True
        )
        assert said["bytes"]["fsdp"][0] < 0.6 * whole  # vectors and what 8 does not divide are held by both


def test_a_process_makes_the_rows_that_its_devices_hold(workers):
    one, two = (said["rows"] for said in workers[0])
    assert one["fsdp"] == [list(range(32, 40))] * 2 and two["fsdp"] == [list(range(40, 48))] * 2
    assert one["both"] == one["fsdp"] and two["both"] == two["fsdp"]
    assert one["tensor"] == two["tensor"] == [list(range(32, 48))] * 2


def test_evaluation_in_two_processes_is_that_of_one_device(workers, single, records_file, tmp_path):
    common = {"max_new_tokens": 4, "batch_size": 8, "limit": 10}
    expected = evaluate.evaluate(
        EvaluateConfig(
            str(records_file),
            str(single / "products"),
            out=str(tmp_path / "one.jsonl"),
            mesh=MeshConfig(devices=1),
            **common,
        )
    )
    said, out = workers
    for result in (result for process in said for result in process["evaluate"]):
        assert result["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert result["accuracy"] == expected["accuracy"]
    for name in ("False.jsonl", "True.jsonl"):
        assert (out / name).read_text() == (tmp_path / "one.jsonl").read_text()
