"""Config readers take what transformers 4 and 5 write, and refuse by name what is not implemented."""

import json

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


CLASSES = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "gemma2": transformers.Gemma2Config,
}
FIXED = {
    "qwen2": {"qkv_bias": True},
    "qwen3": {"query_key_norm": True},
    "gemma2": {"post_norms": True, "norm_unit_offset": True, "scale_embeddings": True},
}


@pytest.mark.parametrize("family", CLASSES)
def test_absent_keys_mean_what_they_mean_to_transformers(family):
    sizes = {**SIZES, "model_type": family, "hidden_size": 64, "num_attention_heads": 32, "num_hidden_layers": 30}
    theirs = CLASSES[family](**{name: value for name, value in sizes.items() if name != "model_type"})
    assert read_config(sizes)[0] == read_config(theirs.to_dict())[0]


def test_null_is_not_absent():
    mistral = {**SIZES, "model_type": "mistral", "num_key_value_heads": 2}
    assert read_config(mistral)[0].sliding_window == 4096
    assert read_config({**mistral, "sliding_window": None})[0].sliding_window is None


@st.composite
def configs(draw):
    """Any config that a family's `config.json` can say."""
    family = draw(st.sampled_from(list(CLASSES)))
    flags = ["tie_word_embeddings"]
    flags += ["attention_bias"] * (family in ("llama", "qwen3", "gemma2")) + ["mlp_bias"] * (family == "llama")
    fields = FIXED.get(family, {}) | {flag: draw(st.booleans()) for flag in flags}
    if family == "gemma2":
        fields["hidden_act"] = draw(st.sampled_from(["gelu_pytorch_tanh", "silu"]))
        fields["query_pre_attn_scalar"] = draw(st.integers(1, 300))
        caps = st.none() | st.floats(0.5, 90)
        fields |= {"attn_logit_softcapping": draw(caps), "final_logit_softcapping": draw(caps)}
    if family != "llama" and draw(st.booleans()):
        fields["sliding_window"] = draw(st.integers(1, 5000))
        pattern = draw(st.tuples(*[st.booleans()] * 4))
        if family != "mistral" and len(set(pattern)) == 2:
            fields["sliding_layers"] = pattern
    rope = st.builds(Llama3Rope, st.floats(1, 64), st.floats(0.5, 2), st.floats(3, 8), st.integers(8, 9000))
    return DecoderConfig(
        61, 24, 40, 4, 4, draw(st.sampled_from([1, 2, 4])), 2 * draw(st.integers(1, 8)),
        rope_theta=draw(st.floats(1.0, 1e7)), rope_scaling=draw(st.none() | rope),
        eos_token_id=draw(st.none() | st.integers(0, 60) | st.lists(st.integers(0, 60), min_size=1).map(tuple)),
        bos_token_id=draw(st.none() | st.integers(0, 60)), dtype="float32", model_type=family, **fields,
    )  # fmt: skip


@hypothesis.given(configs())
@hypothesis.settings(max_examples=60)
def test_what_is_written_means_the_same_to_transformers_and_to_us(config):
    written = write_config(config, "causal_lm")
    assert read_config(written)[0] == config
    assert read_config(json.loads(json.dumps(written)))[0] == config
    theirs = CLASSES[config.model_type](**written).to_dict()
    assert read_config(theirs)[0] == config


UNSAID = {
    "window": ({"sliding_window": 4}, "config.json of 'llama' cannot say sliding_window=4"),
    "bias": ({"model_type": "mistral", "mlp_bias": True}, "config.json of 'mistral' cannot say mlp_bias=True"),
    "qkv": ({"qkv_bias": True}, "config.json of 'llama' cannot say qkv_bias=True"),
    "norm": ({"model_type": "qwen3"}, "config.json of 'qwen3' cannot say query_key_norm=False"),
    "windows": (
        {"model_type": "mistral", "sliding_window": 4, "sliding_layers": (True, False)},
        r"config.json of 'mistral' cannot say sliding_layers=\(True, False\)",
    ),
}


@pytest.mark.parametrize(("fields", "message"), UNSAID.values(), ids=UNSAID)
def test_a_feature_that_the_family_has_no_key_for_is_not_dropped_in_writing(fields, message):
    with pytest.raises(ConfigError, match=message):
        write_config(DecoderConfig(61, 24, 40, 2, 4, 2, 6, **fields), "causal_lm")


# Keys and values as in the released files.
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "hidden_act": "silu"}
LLAMA |= {"initializer_range": 0.02, "rms_norm_eps": 1e-05, "use_cache": True, "pretraining_tp": 1}
LLAMA_3 = {**LLAMA, "attention_dropout": 0.0, "mlp_bias": False, "bos_token_id": 128000, "eos_token_id": 128001}
LLAMA_3 |= {"rope_theta": 500000.0, "torch_dtype": "bfloat16", "vocab_size": 128256, "num_key_value_heads": 8}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "bos_token_id": 1, "eos_token_id": 2}
MISTRAL |= {"hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336}
MISTRAL |= {"max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32, "use_cache": True}
MISTRAL |= {"num_key_value_heads": 8, "rms_norm_eps": 1e-05, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
QWEN = {"attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643, "hidden_act": "silu"}
QWEN |= {"initializer_range": 0.02, "rms_norm_eps": 1e-06, "use_cache": True, "use_sliding_window": False}
QWEN_2 = {**QWEN, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rope_theta": 1000000.0}
QWEN_3 = {**QWEN, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False}
QWEN_3 |= {"head_dim": 128, "max_position_embeddings": 40960, "rope_scaling": None, "rope_theta": 1000000}
GEMMA = {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "attention_bias": False, "bos_token_id": 2}
GEMMA |= {"attention_dropout": 0.0, "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid"}
GEMMA |= {"eos_token_id": 1, "final_logit_softcapping": 30.0, "hidden_act": "gelu_pytorch_tanh", "pad_token_id": 0}
GEMMA |= {"hidden_activation": "gelu_pytorch_tanh", "initializer_range": 0.02, "max_position_embeddings": 8192}
GEMMA |= {"rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "torch_dtype": "float32"}
GEMMA |= {"transformers_version": "4.42.0.dev0", "use_cache": True, "vocab_size": 256000}
SCALING = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3"}
SCALING |= {"original_max_position_embeddings": 8192}


def shape(width, inner, layers, heads, kv=None):
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return dict(zip(names, (width, inner, layers, heads, heads if kv is None else kv), strict=True))


RELEASED = {
    "Llama-2-7b-hf": {
        **LLAMA, **shape(4096, 11008, 32, 32), "_name_or_path": "meta-llama/Llama-2-7b-hf", "bos_token_id": 1,
        "eos_token_id": 2, "max_position_embeddings": 4096, "rope_scaling": None, "tie_word_embeddings": False,
        "torch_dtype": "float16", "transformers_version": "4.31.0.dev0", "vocab_size": 32000,
    },
    "Llama-3.1-8B": {
        **LLAMA_3, **shape(4096, 14336, 32, 32, 8), "max_position_embeddings": 131072,
        "rope_scaling": {**SCALING, "factor": 8.0}, "tie_word_embeddings": False, "transformers_version": "4.43.0.dev0",
    },
    "Llama-3.1-8B-Instruct": {
        **LLAMA_3, **shape(4096, 14336, 32, 32, 8), "max_position_embeddings": 131072,
        "eos_token_id": [128001, 128008, 128009], "rope_scaling": {**SCALING, "factor": 8.0},
        "tie_word_embeddings": False, "transformers_version": "4.42.3",
    },
    "Llama-3.2-1B": {
        **LLAMA_3, **shape(2048, 8192, 16, 32, 8), "head_dim": 64, "max_position_embeddings": 131072,
        "rope_scaling": SCALING, "tie_word_embeddings": True, "transformers_version": "4.45.0.dev0",
    },
    "Mistral-7B-v0.1": {
        **MISTRAL, "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 32000,
        "transformers_version": "4.34.0.dev0",
    },
    "Mistral-7B-Instruct-v0.2": {
        **MISTRAL, "attention_dropout": 0.0, "rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32000,
        "transformers_version": "4.36.0",
    },
    "Mistral-7B-v0.3": {
        **MISTRAL, "attention_dropout": 0.0, "rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32768,
        "transformers_version": "4.42.0.dev0",
    },
    "Qwen2-7B": {
        **QWEN_2, **shape(3584, 18944, 28, 28, 4), "max_position_embeddings": 131072, "max_window_layers": 28,
        "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.37.2", "vocab_size": 152064,
    },
    "Qwen2.5-0.5B": {
        **QWEN_2, **shape(896, 4864, 24, 14, 2), "max_position_embeddings": 32768, "max_window_layers": 24,
        "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1", "use_mrope": False, "vocab_size": 151936,
    },
    "Qwen3-0.6B": {
        **QWEN_3, **shape(1024, 3072, 28, 16, 8), "max_window_layers": 28, "sliding_window": None,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "vocab_size": 151936,
    },
    "gemma-2-2b": {**GEMMA, **shape(2304, 9216, 26, 8, 4), "head_dim": 256, "query_pre_attn_scalar": 256},
    "gemma-2-9b": {
        **GEMMA, **shape(3584, 14336, 42, 16, 8), "head_dim": 256, "query_pre_attn_scalar": 256,
        "sliding_window_size": 4096,
    },
    "gemma-2-27b": {
        **GEMMA, **shape(4608, 36864, 46, 32, 16), "head_dim": 128, "query_pre_attn_scalar": 144,
        "sliding_window_size": 4096, "_attn_implementation": "eager",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_released_files_are_read_as_transformers_reads_them(name):
    released = RELEASED[name]
    config, task = read_config(released)
    theirs = CLASSES[released["model_type"]](**{k: v for k, v in released.items() if k != "model_type"})
    assert config == read_config(theirs.to_dict())[0]
    assert task == "causal_lm" and config.num_hidden_layers == released["num_hidden_layers"]
    windows = {"Mistral-7B-v0.1": 4096, "gemma-2-2b": 4096, "gemma-2-9b": 4096, "gemma-2-27b": 4096}
    assert config.sliding_window == windows.get(name)


def test_windows_by_layer_from_every_form_of_the_keys():
    qwen = {**SIZES, "model_type": "qwen2", "num_key_value_heads": 2, "sliding_window": 5}
    upper, _ = read_config({**qwen, "use_sliding_window": True, "max_window_layers": 1})
    kinds = ["full_attention", "sliding_attention"]
    named, _ = read_config({**qwen, "use_sliding_window": True, "layer_types": kinds})
    assert upper == named and (upper.sliding_window, upper.sliding_layers) == (5, (False, True))
    whole, _ = read_config({**qwen, "use_sliding_window": True, "max_window_layers": 0})
    assert (whole.sliding_window, whole.sliding_layers) == (5, None)
    gemma = {**SIZES, "model_type": "gemma2", "sliding_window": 5}
    assert read_config(gemma)[0].sliding_layers == (True, False)
    assert read_config({**gemma, "layer_types": kinds})[0].sliding_layers == (False, True)
    assert read_config({**gemma, "layer_types": kinds[:1] * 2})[0].sliding_window is None


MISTRAL_2 = {"model_type": "mistral", "num_key_value_heads": 2}
GEMMA_2 = {"model_type": "gemma2", "num_key_value_heads": 2}
QWEN_SMALL = {"num_key_value_heads": 2}
REFUSED = {
    "family": ({"model_type": "lama"}, r"model_type 'lama' is not implemented.*nearest: 'llama'"),
    "activation": ({"hidden_act": "relu"}, r"hidden_act 'relu' is not implemented; implemented: silu, gelu_"),
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
    "dropout": ({"attention_dropout": 0.1}, r"attention_dropout 0.1 is not implemented; implemented: 0"),
    "missing": ({"hidden_size": None, "vocab_size": None}, r"the model config lacks vocab_size, hidden_size$"),
    "zero": ({"num_attention_heads": 0}, r"num_attention_heads must be a positive integer, found 0"),
    "text": ({"num_attention_heads": "4"}, r"num_attention_heads must be a positive integer, found '4'"),
    "groups": ({"num_key_value_heads": 3}, r"num_key_value_heads \(3\) must divide num_attention_heads \(4\)"),
    "linear-rope": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope type 'linear' is not implemented"),
    "rope-key": (
        {"rope_parameters": {"rope_type": "default", "mrope_section": [1]}},
        r"rope_parameters of type 'default': mrope_section \[1\] is not implemented",
    ),
    "unknown": ({"attention_sinks": 4}, r"llama: config key 'attention_sinks' \(4\) is not known; remove it"),
    "code": ({"auto_map": {"AutoModel": "x.Y"}}, r"llama: config key 'auto_map' \({'AutoModel': 'x.Y'}\) is not known"),
    "window": ({"sliding_window": 4}, r"llama: config key 'sliding_window' \(4\) is not known"),
    "cross": ({"add_cross_attention": True}, r"add_cross_attention True is not implemented; implemented: False"),
    "pruned": ({"pruned_heads": {"0": [1]}}, r"pruned_heads {'0': \[1\]} is not implemented; implemented: {}"),
    "mistral-bias": ({**MISTRAL_2, "attention_bias": True}, r"mistral: attention_bias True is not implemented"),
    "mistral-types": ({**MISTRAL_2, "layer_types": ["full_attention"] * 2}, r"mistral: config key 'layer_types'"),
    "mrope": ({**QWEN_SMALL, "model_type": "qwen2", "use_mrope": True}, r"qwen2: use_mrope True is not implemented"),
    "window-off": (
        {**QWEN_SMALL, "model_type": "qwen3", "layer_types": ["sliding_attention"] * 2},
        r"layer_types has 'sliding_attention' layers, but sliding_window is null or use_sliding_window false",
    ),
    "window-flag": (
        {**QWEN_SMALL, "model_type": "qwen2", "use_sliding_window": "no"},
        r"use_sliding_window must be true or f",
    ),
    "bidirectional": (
        {**GEMMA_2, "use_bidirectional_attention": True},
        r"use_bidirectional_attention True is not impl",
    ),
    "gemma-act": (
        {**GEMMA_2, "hidden_activation": "gelu"},
        r"hidden_act 'gelu' is not implemented; implemented: silu, g",
    ),
    "gemma-second-act": ({**GEMMA_2, "hidden_act": "silu"}, r"gemma2: hidden_act 'silu' is not implemented"),
    "gemma-window": ({**GEMMA_2, "sliding_window": None}, r"but sliding_window is null"),
    "gemma-windows": (
        {**GEMMA_2, "sliding_window_size": 2},
        r"sliding_window_size 2 is not implemented; implemented: 40",
    ),
    "kinds": (
        {**GEMMA_2, "layer_types": ["full_attention", "chunked_attention"]},
        r"layer type 'chunked_attention' is not implemented; implemented: 'sliding_attention', 'full_attention'",
    ),
    "few-kinds": ({**GEMMA_2, "layer_types": ["full_attention"]}, r"one entry for each of the 2 layers, found \['full"),
    "cap": (
        {**GEMMA_2, "attn_logit_softcapping": 0},
        r"attn_logit_softcapping must be a positive number or None, found 0",
    ),
    "scalar": ({**GEMMA_2, "query_pre_attn_scalar": -1}, r"query_pre_attn_scalar must be a positive integer or None"),
    "layers": ({**GEMMA_2, "num_hidden_layers": 10**9}, r"num_hidden_layers must be at most 10000, found 1000000000"),
    "size": ({"vocab_size": 10**30}, r"vocab_size must be a positive integer, found 1000"),
    "infinite": ({"rope_theta": float("inf")}, r"rope_theta must be a positive number, found inf"),
    "flag": ({"tie_word_embeddings": "yes"}, r"tie_word_embeddings must be true or false, found 'yes'"),
    "eos": ({"eos_token_id": [1, "2"]}, r"eos_token_id must be an integer, found \(1, '2'\)"),
    "dtype": ({"torch_dtype": 16}, r"dtype must be a text, found 16"),
    "type": ({"model_type": ["llama"]}, r"model_type \['llama'\] is not implemented"),
    "odd": ({"head_dim": 5}, r"head_dim must be even for rotary embeddings, found 5"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_implemented_or_impossible_is_refused_by_name(change, message):
    with pytest.raises(ConfigError, match=message) as error:
        read_config({**SIZES, **change})
    assert "\n" not in str(error.value)


def test_bookkeeping_and_generation_defaults_of_transformers_4_are_read_past():
    old = {
        "return_dict": True,
        "torchscript": False,
        "pruned_heads": {},
        "top_k": 50,
        "temperature": 1.0,
        "prefix": None,
    }
    old |= {"id2label": {"0": "LABEL_0"}, "is_decoder": False, "_name_or_path": "x", "transformers_version": "4.30.0"}
    assert read_config({**SIZES, **old}) == read_config(SIZES)


STRANGE = [None, True, -1, 0, 10**400, 1.5, float("nan"), float("inf"), "", "x\ny", [], [1], ["x"] * 3, {}, {"a": [1]}]
SAMPLES = ["Llama-3.2-1B", "Mistral-7B-v0.1", "Qwen2-7B", "Qwen3-0.6B", "gemma-2-9b"]


@pytest.mark.parametrize("name", SAMPLES)
def test_a_strange_value_of_any_key_is_read_or_refused_in_one_line(name):
    sample = {"rope_parameters": {}, "layer_types": None, **RELEASED[name]}
    changes = [{key: value} for key in sample for value in STRANGE]
    scaling = sample.get("rope_scaling") or {"rope_type": "default"}
    changes += [{"rope_scaling": {**scaling, key: value}} for key in (*SCALING, "type") for value in STRANGE]
    refused = 0
    for change in changes:
        try:
            config, task = read_config({**sample, **change})
        except ConfigError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 500, change
        else:
            assert read_config(write_config(config, task)) == (config, task), change
    assert len(changes) / 3 < refused < len(changes)


def test_where_both_forms_of_the_rope_stand_the_older_counts_as_in_transformers():
    both = {**SIZES, "rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}
    assert read_config(both)[0].rope_scaling == Llama3Rope(**LLAMA3)
