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
