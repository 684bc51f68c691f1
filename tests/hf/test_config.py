"""Config readers take what transformers 4 and 5 write, and refuse by name what is not implemented."""

import hypothesis
import hypothesis.strategies as st
import pytest
import transformers

from hadamax.errors import ConfigError
from hadamax.hf.families import read_config, write_config
from hadamax.models import DecoderConfig, Llama3Rope

SIZES = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 24}


def test_both_generations_of_transformers_say_the_same():
    four = {**SIZES, "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}, "torch_dtype": "bfloat16"}
    five = {**SIZES, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}, "dtype": "bfloat16"}
    config, _ = read_config(four)
    assert config == read_config(five)[0]
    assert (config.rope_theta, config.rope_scaling, config.dtype) == (5e5, Llama3Rope(**LLAMA3), "bfloat16")
    assert (config.num_key_value_heads, config.head_dim) == (4, 6)  # both follow from the sizes


@hypothesis.given(
    scaling=st.none()
    | st.builds(Llama3Rope, st.floats(1, 64), st.floats(0.5, 2), st.floats(3, 8), st.integers(8, 9000)),
    theta=st.floats(1.0, 1e7),
    kv=st.sampled_from([1, 2, 4]),
    head_dim=st.integers(1, 8).map(lambda half: 2 * half),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    eos=st.none() | st.integers(0, 60) | st.lists(st.integers(0, 60), min_size=1).map(tuple),
)
@hypothesis.settings(max_examples=30)
def test_what_is_written_means_the_same_to_transformers_and_to_us(scaling, theta, kv, head_dim, flags, eos):
    tie, attention_bias, mlp_bias = flags
    config = DecoderConfig(
        61, 24, 40, 2, 4, kv, head_dim,
        rope_theta=theta, rope_scaling=scaling, tie_word_embeddings=tie, attention_bias=attention_bias,
        mlp_bias=mlp_bias, eos_token_id=eos, dtype="float32",
    )  # fmt: skip
    written = write_config(config, "causal_lm")
    assert read_config(written)[0] == config
    assert read_config(transformers.LlamaConfig(**written).to_dict())[0] == config


REFUSED = {
    "family": ({"model_type": "lama"}, r"model_type 'lama' is not implemented.*nearest: 'llama'"),
    "activation": ({"hidden_act": "relu"}, r"hidden_act 'relu' is not implemented; implemented: silu"),
    "rope": ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, r"rope type 'yarn' is not implemented"),
    "partial-rope": ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor 0.5 is not implemented"),
    "rope-lacks": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}},
        r"lacks low_freq_factor, high_freq_factor",
    ),
    "rope-order": (
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 4.0}},
        r"low_freq_factor \(4.0\) must be below high_freq_factor \(4.0\)",
    ),
    "rope-text": ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "factor": "8"}}, r"factor must be .*found '8'"),
    "rope-list": ({"rope_scaling": [1]}, r"rope_scaling must be a mapping, found \[1\]"),
    "theta": ({"rope_theta": "1e4"}, r"rope_theta must be a positive number, found '1e4'"),
    "quantised": ({"quantization_config": {"bits": 4}}, r"quantization_config"),
    "dropout": ({"attention_dropout": 0.1}, r"attention_dropout 0.1 is not implemented; set it to 0"),
    "missing": ({"hidden_size": None, "vocab_size": None}, r"the model config lacks vocab_size, hidden_size$"),
    "zero": ({"num_attention_heads": 0}, r"num_attention_heads must be a positive integer, found 0"),
    "text": ({"num_attention_heads": "4"}, r"num_attention_heads must be a positive integer, found '4'"),
    "groups": ({"num_key_value_heads": 3}, r"num_key_value_heads \(3\) must divide num_attention_heads \(4\)"),
    "odd": ({"head_dim": 5}, r"head_dim must be even for rotary embeddings, found 5"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_implemented_or_impossible_is_refused_by_name(change, message):
    with pytest.raises(ConfigError, match=message) as error:
        read_config({**SIZES, **change})
    assert "\n" not in str(error.value)
