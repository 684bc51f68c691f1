"""A tiny base with a character tokenizer, and files of records, for the training application's tests."""

import functools
import json
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hadamax import hf
from hadamax.models import Decoder, DecoderConfig
from train.config import Config
from train.parsing import from_dict


@pytest.fixture(autouse=True)
def interruptible():
    """SIGINT as in a terminal: a shell starts its background jobs, perhaps these tests, with SIGINT ignored."""
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)


CHARACTERS = "\n abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:#+-=?"
DECODER = DecoderConfig(
    vocab_size=80,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    eos_token_id=2,
)


def character_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<unk>", "</s>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return character_tokenizer()


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory, tokenizer) -> Path:
    """A Hugging Face directory of a random model."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer.save_pretrained(folder / "tokenizer")
    model = Decoder(DECODER)
    params = model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    hf.save_pretrained(folder / "model", model, params, DECODER, tokenizer_from=folder / "tokenizer")
    return folder / "model"


@pytest.fixture(scope="session")
def records_file(tmp_path_factory) -> Path:
    """40 sums."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    sums = [{"question": f"{i} + {i + 3}?", "answer": f"{2 * i + 3}"} for i in range(40)]
    path.write_text("".join(json.dumps(record) + "\n" for record in sums))
    return path


@pytest.fixture(scope="session")
def configure(base_dir, records_file):
    """A configuration of a run of a few small steps: `configure(out, run={"steps": 3})`."""

    def make(out: Path, **sections) -> Config:
        values = {
            "model": {"base": str(base_dir)},
            "data": {"train": str(records_file), "eval_fraction": 0.1, "max_length": 24},
            "adapter": {"method": "hira", "rank": 2, "targets": ["q_proj", "down_proj"]},
            "optim": {"warmup": 0.0},
            "run": {"out": str(out), "steps": 4, "batch_size": 4, "eval_every": 0, "save_every": 0},
            "mesh": {"devices": 1},
        }
        if "rules" in sections.get("adapter", {}):
            del values["adapter"]["rank"]
        for name, section in sections.items():
            values[name] = values[name] | section
        return from_dict(values)

    return make


@pytest.fixture
def make_config(configure, tmp_path):
    """The same, in `tmp_path / "run"`."""
    return functools.partial(configure, tmp_path / "run")
