"""The shipped base and the demo's path, with a few steps of one method; the real run is `make demo`."""

import json
import random
import re

import pytest
from transformers import AutoTokenizer

from train import demo, evaluate, tasks
from train.config import ModelConfig
from train.pretrain import byte_tokenizer, numbered
from train.run import load_base


@pytest.fixture(scope="module")
def base():
    return load_base(ModelConfig(str(demo.BASE)))


def test_shipped_base_is_small():
    assert sum(path.stat().st_size for path in demo.BASE.iterdir()) <= 4e6


def test_shipped_base_knows_the_steps_but_not_the_new_word(base):
    rng = random.Random(5)
    words = [tasks.letters(rng, 4, 6) for _ in range(30)]
    for step in tasks.HELD_OUT:
        known = [
            {"instruction": f"{step.capitalize()}.", "input": word, "output": tasks.apply((step,), word)}
            for word in words
        ]
        assert evaluate.accuracy(base, numbered(known), max_new_tokens=8).accuracy >= 0.8
    held_out = tasks.held_out(5, 0, 30)[1]
    assert evaluate.accuracy(base, numbered(held_out), max_new_tokens=8).accuracy <= 0.1


@pytest.mark.parametrize("text", ["plain", "tabs\tand\nlines", "caf\u00e9 \u20ac 5 \U0001f600", " lead and trail "])
def test_tokenizer_gives_every_text_back(text):
    shipped = AutoTokenizer.from_pretrained(demo.BASE)
    ids = shipped(text).input_ids
    assert ids == byte_tokenizer()(text).input_ids
    assert len(ids) == 1 + len(text.encode())  # the first is <bos>
    assert shipped.decode(ids, skip_special_tokens=True) == text


def test_demo_writes_its_files_and_fails_only_when_transformers_disagrees(monkeypatch, tmp_path, capsys):
    out = tmp_path / "demo"
    monkeypatch.setattr(demo, "OUT", out)
    monkeypatch.setattr(demo, "STEPS", 2)
    monkeypatch.setattr(demo, "METHODS", {"hira": demo.METHODS["hira"]})
    monkeypatch.setattr(demo, "TOLERANCE", -1.0)  # so that even equal logits are refused
    with pytest.raises(SystemExit, match="gives other logits"):
        demo.main([])
    (row,) = json.loads((out / "table.json").read_text())
    assert row["method"] == "hira"
    assert row["merge_loss_float32"] < 1e-3 < row["merge_loss_bfloat16"]
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (out / "exported").iterdir()
    }
    printed = capsys.readouterr().out
    difference = re.search(r"largest difference of logits from transformers' (\S+)", printed)
    assert difference and float(difference[1]) < 1e-4
