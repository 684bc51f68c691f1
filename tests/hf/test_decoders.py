"""Every decoder family against transformers' own model: logits, generation, rounding, and the way back."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import transformers

from hadamax.errors import MergeError
from hadamax.hf import load_pretrained, save_pretrained
from hadamax.models import Decoder

from . import parity

CASES = parity.decoder_cases()
FAMILIES = {name: config for name, config in CASES.items() if "," not in name}


@functools.cache
def reference(name):
    return parity.reference(CASES[name])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved(name)` is the directory that transformers wrote."""

    @functools.cache
    def save(name):
        directory = tmp_path_factory.mktemp("theirs")
        reference(name).save_pretrained(directory)
        return directory

    return save


@functools.cache
def expected_logits(name):
    return parity.torch_logits(reference(name), *parity.padded_batch())


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_continuations_equal_those_of_transformers_both_ways(name, tmp_path):
    found = parity.decoder_parity(CASES[name], tmp_path)
    assert max(found.load, found.unrolled) < 1e-4
    assert found.save < 1e-4
    assert found.tokens == 0
    _, params, config = load_pretrained(tmp_path / "ours", scan_layers=False)
    assert config.model_type == name.split(",")[0]
    assert "layers_2" in params["params"]


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_rounds_no_worse_than_in_transformers(name, tmp_path):
    """The same weights, in bfloat16 here and there: our distance from float32 is at most 1.25 times theirs."""
    errors = parity.bfloat16_errors(CASES[name], tmp_path)
    assert 0 < errors["ours"] < 1.25 * errors["transformers"]


DECIDING = {
    "gemma2": {
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "query_pre_attn_scalar": None,
        "sliding_window": 6,
        "sliding_layers": (False, True, False, True),
        "norm_unit_offset": False,
        "scale_embeddings": False,
        "hidden_act": "silu",
    },
    "mistral": {"sliding_window": None, "rope_theta": 500.0, "rms_norm_eps": 1.0},
}


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, fields in DECIDING.items() for field in fields])
def test_each_feature_decides_the_logits_that_were_compared(name, field, saved):
    """So the tests above would see it if one were left out or mistaken."""
    ids, mask = parity.padded_batch()
    _, params, config = load_pretrained(saved(name))
    model = Decoder(dataclasses.replace(config, **{field: DECIDING[name][field]}))
    assert parity.difference(parity.our_logits(model, params, ids, mask), expected_logits(name), mask) > 1e-2


SHIFTS = {"attention": "layers/self_attn/o_proj/bias", "mlp": "layers/mlp/down_proj/bias"}


@pytest.mark.parametrize(
    ("name", "place"), [("llama", "attention"), ("llama", "mlp"), ("qwen3", "attention"), ("gemma2", "attention")]
)
def test_a_bias_that_merging_added_is_written_where_the_family_has_a_flag(name, place, saved, tmp_path):
    model, params, config = load_pretrained(saved(name))
    *modules, leaf = SHIFTS[place].split("/")
    module = functools.reduce(lambda tree, key: tree[key], modules, params["params"])
    module[leaf] = jax.random.normal(jax.random.key(0), module["kernel"].shape[::2])
    ids, mask = parity.padded_batch()
    expected = parity.our_logits(model, params, ids, mask)
    assert parity.difference(expected, expected_logits(name), mask) > 1e-2
    written = save_pretrained(tmp_path / "ours", model, params, config)
    assert (written.attention_bias, written.mlp_bias) == (place == "attention", place == "mlp")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    assert parity.difference(parity.torch_logits(again, ids, mask), expected, mask) < 1e-4


@pytest.mark.parametrize(
    ("name", "place", "flag"),
    [
        ("mistral", "attention", "attention_bias"),
        ("qwen2", "attention", "attention_bias"),
        ("qwen3", "mlp", "mlp_bias"),
        ("gemma2", "mlp", "mlp_bias"),
    ],
)
def test_a_bias_without_a_place_is_refused_with_a_way_out(name, place, flag, saved, tmp_path):
    model, params, config = load_pretrained(saved(name))
    *modules, leaf = SHIFTS[place].split("/")
    module = functools.reduce(lambda tree, key: tree[key], modules, params["params"])
    module[leaf] = np.ones(module["kernel"].shape[::2], np.float32)
    with pytest.raises(MergeError, match=f"{name} has no place for .*no {flag}.*bias=False") as error:
        save_pretrained(tmp_path / "ours", model, params, config)
    assert "\n" not in str(error.value) and not (tmp_path / "ours").exists()
