"""The library's own models and directories under transformers 4.57, against its Flax Llama."""

from pathlib import Path

import jax
import numpy as np
import pytest
import transformers

import hadamax as hx
from tests_flax.models import perturbed

BASE = Path(__file__).parents[1] / "train" / "assets" / "base"
TEXT = "Encrypt. apple"


def flax_logits(directory, ids):
    """Of transformers' model of a directory with tied embeddings, which it has no code for."""
    model = transformers.FlaxLlamaForCausalLM.from_pretrained(directory)
    head = {"kernel": model.params["model"]["embed_tokens"]["embedding"].T}
    return jax.jit(model.__call__)(ids, params={**model.params, "lm_head": head}).logits


@pytest.fixture(scope="module")
def ids():
    return transformers.AutoTokenizer.from_pretrained(BASE)([TEXT], return_tensors="np")["input_ids"]


def test_the_shipped_base_gives_the_logits_of_transformers(ids):
    model, params, _ = hx.hf.load_pretrained(BASE)
    expected = flax_logits(BASE, ids)
    assert abs(expected).max() > 1
    assert abs(model.apply(params, ids) - expected).max() < 1e-4


def test_an_export_loads_in_transformers_and_here(tmp_path, ids):
    model, params, config = hx.hf.load_pretrained(BASE)
    injection = hx.inject({"*_proj": hx.boha(8, blocks=4)}, view=model.view)
    adapters = perturbed(jax.jit(injection.init)(jax.random.key(0), params), size=0.3)
    merged = injection.merge(params, adapters)
    hx.hf.save_pretrained(tmp_path / "out", model, merged, config, tokenizer_from=BASE)

    expected = injection.apply(model.apply)(params, adapters, ids)
    assert abs(expected - model.apply(params, ids)).max() > 1
    assert abs(flax_logits(tmp_path / "out", ids) - expected).max() < 1e-4
    jax.tree.map(np.testing.assert_array_equal, hx.hf.load_pretrained(tmp_path / "out")[1], merged)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer([TEXT], return_tensors="np")["input_ids"] == ids).all()
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == TEXT
