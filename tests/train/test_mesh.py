"""One run on any mesh and in any number of processes: the same losses, data, checkpoints; and how processes end."""

import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

import hadamax as hx
from hadamax import hf, paths
from hadamax.models import Decoder, DecoderConfig
from tests.train.conftest import character_tokenizer
from train import cli, compiling, data, evaluate, export, finetune, metrics, processes
from train.config import Config, EvaluateConfig, MeshConfig, UsageError
from train.parsing import from_dict

DECODER = DecoderConfig(80, 16, 32, 2, 4, 2, 4, eos_token_id=2)
ONE, DATA, FSDP = {"devices": 1}, {"data": 8, "fsdp": 1}, {"fsdp": 8}
BOTH, ALL = {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}
ONE_DEVICE = hx.batch_sharding(hx.make_mesh(devices=jax.devices()[:1]))
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


def test_factors_and_their_moments_lie_as_their_kernels_and_one_program_runs_every_step(
    settings, tmp_path, monkeypatch
):
    seen, once = {}, compiling.once

    def watched(name, function):
        call = once(name, function)

        def step(*args):
            seen[name] = jax.tree.map(lambda x: x.sharding, args), args[1], args[2]
            return call(*args)

        return step

    monkeypatch.setattr(compiling, "once", watched)  # which refuses a second program
    finetune.finetune(settings(tmp_path / "run", "products", ALL, steps=3))
    (state, *_), frozen, batch = seen["the training step"]
    q = state.trainable["adapters"]["layers/self_attn/q_proj/kernel"]
    assert (q["a"].spec, q["b"].spec) == (P(None, "fsdp", None), P(None, None, "tensor"))
    adam = state.optimizer.inner[1]
    assert adam.mu == adam.nu == state.trainable
    assert adam.count.is_fully_replicated
    for shard in batch["input_ids"].addressable_shards:
        assert shard.data.shape == (4, 16)
    kernel = paths.leaves(frozen)["layers/self_attn/q_proj/kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 8, 8)


@pytest.mark.parametrize("mesh", [FSDP, BOTH, {"fsdp": 1, "tensor": 8}, ONE], ids=str)
def test_order_and_position_of_the_data_are_the_same_on_any_mesh(mesh):
    rows = grain.MapDataset.range(50).map(lambda i: {"input_ids": np.full(4, i, np.int32)})
    sharding = hx.batch_sharding(processes.mesh_of(MeshConfig(**mesh)))
    batches = data.train_batches(rows, 8, 3, sharding)
    found = [np.asarray(next(batches)["input_ids"])[:, 0].tolist() for _ in range(9)]
    stream = rows.seed(3).shuffle().repeat(None)
    assert list(itertools.chain(*found)) == [int(stream[i]["input_ids"][0]) for i in range(72)]
    assert batches.get_state() == {"next_index": 9}
    again = data.train_batches(rows, 8, 3, ONE_DEVICE)
    again.set_state(batches.get_state())
    np.testing.assert_array_equal(next(again)["input_ids"], next(batches)["input_ids"])


@pytest.mark.parametrize("mix, mesh", [("products", BOTH), ("others", FSDP)], ids=str)
def test_what_a_mesh_exports_is_what_one_device_exports(single, mix, mesh, tmp_path, capsys):
    """The merged model; the two only differ by the order of sums."""
    for name, sizes in (("one", ONE), ("mesh", mesh)):
        arguments = [f"--mesh.{size}={value}" for size, value in sizes.items()]
        export.main(["--run", str(single / mix), "--out", str(tmp_path / name), *arguments])
    one, several = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "mesh"))
    assert one.keys() == several.keys()
    for name, value in one.items():
        np.testing.assert_allclose(several[name], value, rtol=1e-5, atol=1e-7)


def test_evaluation_on_a_mesh_is_that_of_one_device(single, records_file):
    common = {"max_new_tokens": 4, "batch_size": 8, "limit": 10}
    one, several = (
        evaluate.evaluate(EvaluateConfig(str(records_file), str(single / "others"), mesh=MeshConfig(**mesh), **common))
        for mesh in (ONE, BOTH)
    )
    assert several == one | {"loss": pytest.approx(one["loss"], rel=1e-5)}


@pytest.mark.parametrize(
    "mesh, run, message",
    [
        (FSDP, {"batch_size": 12}, "run.batch_size / run.grad_accum is 6, which mesh.data 1 x mesh.fsdp 8 devices"),
        (FSDP, {"grad_accum": 4}, "give a multiple of 8, more devices to mesh.tensor, or fewer by mesh.devices"),
        ({"fsdp": 3}, {}, "mesh data 1, fsdp 3, tensor 1: does not make 8, the number of devices"),
        ({"devices": 9}, {}, "mesh.devices 9: there are 8 devices"),
    ],
    ids=str,
)
def test_a_mesh_that_does_not_fit_is_one_line_before_the_model_is_loaded(settings, tmp_path, mesh, run, message):
    config = settings(tmp_path / "run", "products", mesh, **run)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, base=str(tmp_path / "absent")))
    with pytest.raises(hx.ConfigError, match=re.escape(message)) as caught:
        finetune.finetune(config)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_mesh_that_a_slices_wiring_cannot_have_is_one_line(monkeypatch):
    def refuse(**_):  # what JAX says of 16 x 16 on a v5p 4x8x8, where there is one
        raise NotImplementedError(
            "Failed to find assignment for logical_axis_index 1 of size 16. The size of each axis"
        )

    monkeypatch.setattr(hx, "make_mesh", refuse)
    with pytest.raises(
        hx.ConfigError, match=r"cannot be laid out so \(Failed to find .* of size 16\); make each of mesh"
    ):
        processes.mesh_of(MeshConfig())


SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}
TPU = {"TPU_ML_PLATFORM": "JAX"}  # `import jax` sets it where there are TPU chips


@pytest.mark.parametrize(
    "environ, expected",
    [
        ({}, None),
        ({"JAX_COORDINATOR_ADDRESS": "n:1"}, {}),
        (
            {"JAX_COORDINATOR_ADDRESS": "n:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
            {"num_processes": 2, "process_id": 1},
        ),
        (SLURM, {}),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),  # an interactive shell in a larger allocation
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        ({name: SLURM[name] for name in SLURM if name != "SLURM_STEP_NODELIST"}, None),  # a batch script without srun
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, {}),
        (TPU, {}),
        (TPU | {"JAX_PLATFORMS": "cpu"}, None),
        (TPU | {"TPU_SKIP_MDS_QUERY": "1"}, None),
        (TPU | {"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        (TPU | {"TPU_WORKER_HOSTNAMES": "a,b"}, {}),
        (TPU | {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, None),  # compiling for TPUs without any
        ({"KUBERNETES_SERVICE_HOST": "h"}, None),
        ({"KUBERNETES_SERVICE_HOST": "h", "JOB_COMPLETION_INDEX": "0"}, {}),
    ],
    ids=str,
)
def test_a_process_joins_others_only_where_the_environment_tells_of_them(environ, expected):
    assert processes.found(environ) == expected


def test_what_the_environment_says_is_checked(monkeypatch, capsys):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(UsageError, match="JAX_NUM_PROCESSES and JAX_PROCESS_ID must be numbers"):
        processes.join(MeshConfig())
    processes.join(MeshConfig(distributed="never"))
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    assert cli.run(export.main, ["--run", "run", "--out", "out"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: export runs in one process; start it on one machine with --mesh.distributed never")


def test_the_launcher_passes_on_output_signals_and_the_first_failure():
    fails = (
        "import os, time; print('hello', flush=True); int(os.environ['JAX_PROCESS_ID']) and exit(3); time.sleep(600)"
    )
    start = time.monotonic()
    done = subprocess.run([*LAUNCH, sys.executable, "-c", fails], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 3 and time.monotonic() - start < 60
    assert sorted(done.stdout.splitlines()) == ["[0] hello", "[1] hello"]
    waits = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(7)); print(flush=True); time.sleep(600)"
    with subprocess.Popen([*LAUNCH, sys.executable, "-c", waits], cwd=ROOT, stdout=subprocess.PIPE) as program:
        assert program.stdout.readline() and program.stdout.readline()
        program.terminate()
        program.communicate()
    assert program.returncode == 7
    done = subprocess.run([*LAUNCH, "no-such-program"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (127, "error: no-such-program: No such file or directory\n")


ROOT = Path(__file__).parents[2]
LAUNCH = [sys.executable, "-m", "train.launch", "--processes", "2", "--devices", "4", "--"]


def launch(*argv) -> subprocess.Popen:
    """The program in two processes of four devices."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*LAUNCH, sys.executable, "-m", *map(str, argv)], cwd=ROOT, text=True, **pipes)


def test_two_processes_stop_together_and_one_device_continues(settings, single, tmp_path):
    config = settings(tmp_path / "run", "products", BOTH, steps=10**6, save_every=0)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
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


def test_the_other_methods_in_two_processes_have_the_losses_of_one_device(settings, single, tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings(tmp_path / "run", "others", BOTH).to_dict()))
    with launch("train.finetune", "--config", tmp_path / "config.yaml") as program:
        _, err = program.communicate()
    assert program.returncode == 0, err
    expected, found = losses(single / "others"), losses(tmp_path / "run")
    assert len(found) == len(expected) >= 20
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


def test_a_directory_that_is_not_shared_is_refused_by_all_alike(workers):
    said, out = workers
    expected = [
        f"not every process sees {out / f'disk {i}'}; give a directory on a file system that all share" for i in (0, 1)
    ]
    assert [process["refused"] for process in said] == expected
