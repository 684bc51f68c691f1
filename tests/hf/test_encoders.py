"""BERT and RoBERTa: the same outputs and losses as transformers, both ways; old and foreign checkpoints; configs."""

import dataclasses
import json
import logging

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import hadamax as hx
from hadamax.errors import CheckpointError, ConfigError, MergeError
from hadamax.hf import load_pretrained, save_pretrained
from hadamax.hf.families import FAMILIES, read_config, write_config
from hadamax.models import EncoderConfig

from .conftest import assert_same
from .parity_encoders import SIZES, encoder_cases, encoder_differences

CASES = encoder_cases()


@pytest.mark.parametrize("name", CASES)
def test_outputs_equal_those_of_transformers_both_ways(tmp_path, name):
    case = CASES[name]
    expected = case.expected(case.reference(), case.batch())
    assert np.abs(expected).max() > 0.3 and expected.std() > 0.1  # else the tolerance would say nothing
    differences = encoder_differences(case, tmp_path)
    assert differences.keys() == {"load", "load unrolled", "save"}
    assert max(differences.values()) < 1e-4, differences


@pytest.mark.parametrize("name", ["Bert hidden", "Roberta masked LM"])
def test_bfloat16_is_as_near_to_float32_as_that_of_transformers(tmp_path, name):
    case = CASES[name]
    batch, reference = case.batch(), case.reference()
    exact = case.expected(reference, batch)
    reference.to(torch.bfloat16).save_pretrained(tmp_path)
    model, params, _ = load_pretrained(tmp_path, task=case.task)
    found = case.found(model, params, batch)
    assert found.dtype == jnp.bfloat16 and {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    ours, theirs = (np.abs(value - exact) for value in (found.astype(np.float32), case.expected(reference, batch)))
    assert ours.max() < 2 * theirs.max() and ours.mean() < 1.25 * theirs.mean()


def labels_of(name, case, shape):
    rng = np.random.default_rng(1)
    count = case.config.num_labels
    if name.endswith("masked LM"):
        return np.where(rng.random(shape) < 0.3, rng.integers(0, SIZES["vocab_size"], shape), -100)
    if name.endswith("tokens"):
        return np.where(rng.random(shape) < 0.8, rng.integers(0, count, shape), -100)
    if name.endswith("sequence"):
        return rng.integers(0, count, shape[0])
    if name.endswith("regression"):
        return rng.standard_normal((shape[0], count)).astype(np.float32)
    return rng.integers(0, 2, (shape[0], count)).astype(np.float32)


def sequence_case(**config):
    config = transformers.BertConfig(**SIZES, **config)
    return CASES["Bert sequence"]._replace(config=config)


LOSSES = {
    **{name: CASES[f"Bert {name}"] for name in ("masked LM", "tokens", "sequence", "regression", "multi-label")},
    "Roberta masked LM": CASES["Roberta masked LM"],
    "several values: regression": sequence_case(num_labels=3, problem_type="regression"),
    "by one class: regression": sequence_case(num_labels=1),
    "by the labels' type: multi-label": sequence_case(num_labels=3),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_equal_those_of_transformers(tmp_path, name):
    case = LOSSES[name]
    reference, batch = case.reference(), case.batch()
    labels = labels_of(name, case, batch["input_ids"].shape)
    reference.save_pretrained(tmp_path)  # before transformers writes the problem type into its config
    with torch.no_grad():
        tensors = {key: torch.tensor(value) for key, value in batch.items()}
        expected = reference(**tensors, labels=torch.tensor(labels)).loss.item()
    model, params, _ = load_pretrained(tmp_path)
    ignored = (labels != -100).all(-1) if labels.dtype == np.float32 else labels != -100
    total, count = jax.jit(lambda params: model.apply(params, labels=labels, weights=ignored, **batch, method="loss"))(
        params
    )
    assert model.task == case.task and count == ignored.sum()
    np.testing.assert_allclose(total / count, expected, rtol=1e-5)


@pytest.mark.parametrize(("position", "fold"), [("output", hx.Injection.merge), ("input", hx.Injection.bind)])
def test_adapters_keep_their_logits_in_transformers_merged_before_saving_or_by_it(tmp_path, position, fold):
    case = CASES["Bert sequence"]
    batch = case.batch()
    case.reference().save_pretrained(tmp_path / "base")
    model, params, config = load_pretrained(tmp_path / "base")
    rules = {"**/attention/output/dense": hx.hadamard_adapter(position=position), "query": hx.hira(4)}
    injection = hx.inject(rules, view=model.view)
    adapters = injection.init(jax.random.key(0), params)
    keys = iter(jax.random.split(jax.random.key(1), 9))
    adapters = jax.tree.map(lambda leaf: leaf + 0.5 * jax.random.normal(next(keys), leaf.shape), adapters)
    lazy = np.asarray(jax.jit(injection.apply(model.apply))(params, adapters, **batch))
    assert np.abs(lazy - case.found(model, params, batch)).max() > 0.02
    save_pretrained(tmp_path / "merged", model, fold(injection, params, adapters), config)
    back, info = case.architecture.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values())
    assert np.abs(case.expected(back.eval(), batch) - lazy).max() < 1e-4


def test_a_bias_that_no_encoder_has_is_refused():
    with pytest.raises(MergeError, match=r"^bert has no place for 'embeddings/x/bias'; leave its shift out"):
        FAMILIES["bert"].admit(EncoderConfig(61, 24, 40, 2, 4), ["embeddings/x/bias"])


def bert(folder, architecture="BertForPreTraining", edit=None, **config):
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(transformers.BertConfig(**SIZES, **config)).eval()
    model.save_pretrained(folder)
    if edit:
        tensors = load_file(folder / "model.safetensors")
        save_file(edit(tensors), folder / "model.safetensors")
    return model


def old(tensors):
    """As the first checkpoints of BERT: no prefix, norms with gamma and beta, buffers and tied weights in the file."""
    new = {}
    for name, value in tensors.items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        new[name.removeprefix("bert.")] = value
    new["embeddings.position_ids"] = np.arange(20)[None]
    new["cls.predictions.decoder.weight"] = new["embeddings.word_embeddings.weight"]
    new["cls.predictions.decoder.bias"] = new["cls.predictions.bias"]
    return new


@pytest.mark.parametrize("task", ["hidden", "pooled", "masked_lm"])
def test_old_names_without_a_prefix_load_like_new_ones_with_it(tmp_path, task):
    bert(tmp_path / "new")
    bert(tmp_path / "old", edit=old)
    found, expected = (load_pretrained(tmp_path / name, task=task)[1] for name in ("old", "new"))
    assert_same(found, expected)


@pytest.mark.parametrize("bare", ["hidden", "pooled"])
def test_a_model_without_a_head_loads_with_the_prefix_and_without(tmp_path, bare):
    reference = bert(tmp_path / "whole")
    reference.bert.save_pretrained(tmp_path / "bare")
    found, expected = (load_pretrained(tmp_path / name, task=bare)[1] for name in ("bare", "whole"))
    assert_same(found, expected)


def test_heads_of_other_tasks_are_left_and_named(tmp_path, caplog):
    bert(tmp_path)
    with caplog.at_level(logging.WARNING, logger="hadamax"):
        load_pretrained(tmp_path, task="hidden")
    (record,) = caplog.records
    assert "'bert.pooler.dense." in record.getMessage() or "'cls." in record.getMessage()


NEW_HEADS = {
    ("Bert", "token_classification"): ["classifier/bias", "classifier/kernel"],
    ("Bert", "masked_lm"): [f"cls/predictions/{leaf}" for leaf in ("bias", "transform/dense/kernel")],
    ("Roberta", "sequence_classification"): ["classifier/dense/kernel", "classifier/out_proj/bias"],
    ("Roberta", "masked_lm"): ["lm_head/bias", "lm_head/dense/kernel", "lm_head/layer_norm/scale"],
}


@pytest.mark.parametrize(("family", "task"), NEW_HEADS)
def test_a_new_head_is_initialised_and_said(tmp_path, caplog, family, task):
    case = CASES[f"{family} hidden"]
    case.reference().save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="hadamax"):
        _, params, _ = load_pretrained(tmp_path, task=task)
        _, again, _ = load_pretrained(tmp_path, task=task)
    said = [record.getMessage() for record in caplog.records if "newly initialised" in record.getMessage()]
    assert len(said) == 2 and all(path in said[0] for path in NEW_HEADS[family, task])
    assert_same(again, params)
    body = load_pretrained(tmp_path, task="hidden")[1]["params"]
    assert_same({name: params["params"][name] for name in body}, body)
    head = {key: value for key, value in params["params"].items() if key not in body}
    leaves = {keys[-1].key: leaf for keys, leaf in jax.tree.leaves_with_path(head)}
    assert not leaves["bias"].any() and 0.01 < leaves["kernel"].std() < 0.03  # transformers' initializer_range


def test_bert_gets_a_new_pooler_with_a_new_sequence_classifier(tmp_path, caplog):
    bert(tmp_path, "BertForMaskedLM")  # has no pooler
    with caplog.at_level(logging.WARNING, logger="hadamax"):
        load_pretrained(tmp_path, task="sequence_classification")
    assert any(
        "pooler/dense/kernel" in r.getMessage() and "classifier/kernel" in r.getMessage() for r in caplog.records
    )


Q1 = "bert.encoder.layer.1.attention.self.query.weight"
REFUSED_TENSORS = {
    "missing": (lambda t: {n: v for n, v in t.items() if n != Q1}, rf"lacks 1 of 37 tensors: '{Q1[5:]}'"),
    "foreign": (
        lambda t: {**t, "bert.encoder.layer.0.crossattention.self.query.weight": np.ones((24, 24), np.float32)},
        r"not in the architecture .*crossattention",
    ),
    "relative": (
        lambda t: {**t, "bert.encoder.layer.0.attention.self.distance_embedding.weight": np.ones((39, 6), np.float32)},
        r"not in the architecture .*distance_embedding",
    ),
    "twice": (lambda t: {**t, Q1[5:]: t[Q1]}, r"which are one tensor"),
}


@pytest.mark.parametrize(("edit", "message"), REFUSED_TENSORS.values(), ids=REFUSED_TENSORS)
def test_tensors_of_the_encoder_itself_must_be_there_and_be_all(tmp_path, edit, message):
    bert(tmp_path, edit=edit)
    with pytest.raises(CheckpointError, match=message) as error:
        load_pretrained(tmp_path, task="hidden")
    assert "\n" not in str(error.value)


def test_an_architecture_without_a_task_here_asks_for_one(tmp_path):
    bert(tmp_path)
    with pytest.raises(
        ConfigError,
        match=r"'BertForPreTraining' is not .*: BertModel, .*; or give task=, one of hidden",
    ):
        load_pretrained(tmp_path)


RENAMED = {
    "embeddings.LayerNorm.gamma": "bert.embeddings.LayerNorm.weight",
    "bert.encoder.layer.3.output.LayerNorm.beta": "bert.encoder.layer.3.output.LayerNorm.bias",
    "pooler.dense.weight": "bert.pooler.dense.weight",
    "cls.predictions.transform.LayerNorm.gamma": "cls.predictions.transform.LayerNorm.weight",
    "cls.predictions.bias": "cls.predictions.bias",
    "classifier.weight": "classifier.weight",
    "other.gamma": "other.gamma",
}


@pytest.mark.parametrize(("name", "known"), RENAMED.items())
def test_every_name_that_a_tensor_has_had_becomes_one(name, known):
    rename = FAMILIES["bert"].rename
    assert rename(name) == known == rename(known)


@pytest.mark.parametrize(
    ("family", "name", "expected"),
    [
        ("bert", "bert.embeddings.position_ids", True),
        ("bert", "bert.pooler.dense.bias", True),
        ("bert", "cls.seq_relationship.weight", True),
        ("bert", "qa_outputs.weight", True),
        ("bert", "bert.embeddings.extra.weight", False),
        ("bert", "bert.encoder.layer.2.output.dense.bias", False),
        ("bert", "roberta.pooler.dense.bias", False),
        ("bert", "extra.weight", False),
        ("roberta", "roberta.embeddings.token_type_ids", True),
        ("roberta", "lm_head.decoder.weight", True),
    ],
)
def test_only_heads_and_buffers_may_be_left(family, name, expected):
    config = EncoderConfig(61, 24, 40, 2, 4, model_type=family)
    assert FAMILIES[family].ignorable(name, config) is expected


# config.json of the released models
BERT_BASE = {
    "architectures": ["BertForMaskedLM"],
    "attention_probs_dropout_prob": 0.1,
    "gradient_checkpointing": False,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "transformers_version": "4.6.0.dev0",
    "type_vocab_size": 2,
    "use_cache": True,
    "vocab_size": 30522,
}
RELEASED = {
    "bert-base-uncased": (BERT_BASE, "masked_lm", {}),
    "bert-base-multilingual-cased": (
        BERT_BASE
        | {"directionality": "bidi", "pooler_fc_size": 768, "pooler_num_attention_heads": 12, "pooler_num_fc_layers": 3}
        | {"pooler_size_per_head": 128, "pooler_type": "first_token_transform", "vocab_size": 119547},
        "masked_lm",
        {"vocab_size": 119547},
    ),
    "bert-base-NER": (
        BERT_BASE
        | {"architectures": ["BertForTokenClassification"], "_num_labels": 3, "output_past": True}
        | {"id2label": {"0": "O", "1": "B-MISC", "2": "I-MISC"}, "label2id": {"B-MISC": 1, "I-MISC": 2, "O": 0}},
        "token_classification",
        {"labels": ("O", "B-MISC", "I-MISC")},
    ),
    "all-MiniLM-L6-v2": (
        BERT_BASE
        | {"_name_or_path": "nreimers/MiniLM-L6-H384-uncased", "architectures": ["BertModel"], "hidden_size": 384}
        | {"intermediate_size": 1536, "num_hidden_layers": 6},
        "hidden",
        {"hidden_size": 384, "labels": ("LABEL_0", "LABEL_1")},
    ),
    "roberta-base": (
        {
            "architectures": ["RobertaForMaskedLM"],
            "attention_probs_dropout_prob": 0.1,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.1,
            "hidden_size": 768,
            "initializer_range": 0.02,
            "intermediate_size": 3072,
            "layer_norm_eps": 1e-05,
            "max_position_embeddings": 514,
            "model_type": "roberta",
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
            "pad_token_id": 1,
            "type_vocab_size": 1,
            "vocab_size": 50265,
        },
        "masked_lm",
        {"layer_norm_eps": 1e-5, "pad_token_id": 1, "bos_token_id": 0, "type_vocab_size": 1},
    ),
}


@pytest.mark.parametrize(("config", "task", "fields"), RELEASED.values(), ids=RELEASED)
def test_configs_of_released_models_are_read(config, task, fields):
    read, found = read_config(config)
    assert found == task
    assert {name: getattr(read, name) for name in fields} == fields


SMALL = {"model_type": "bert", **SIZES}


def test_both_generations_of_transformers_say_the_same():
    four = {**SMALL, "position_embedding_type": "absolute", "torch_dtype": "bfloat16", "output_attentions": False}
    five = {**SMALL, "dtype": "bfloat16", "is_decoder": False, "add_cross_attention": False, "classifier_dropout": None}
    assert read_config(four) == read_config(five)
    assert read_config({**SMALL, "model_type": "roberta"})[0].pad_token_id == 1  # transformers' default


def test_number_of_labels_names_them():
    assert read_config({**SMALL, "num_labels": 3})[0].labels == ("LABEL_0", "LABEL_1", "LABEL_2")


CONFIGS = st.builds(
    EncoderConfig,
    vocab_size=st.integers(3, 99),
    hidden_size=st.sampled_from([12, 24]),
    intermediate_size=st.integers(1, 50),
    num_hidden_layers=st.integers(1, 5),
    num_attention_heads=st.sampled_from([1, 2, 6]),
    max_position_embeddings=st.integers(1, 600),
    type_vocab_size=st.integers(1, 3),
    hidden_act=st.sampled_from(["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"]),
    layer_norm_eps=st.sampled_from([1e-12, 1e-5]),
    labels=st.lists(st.text(max_size=3), min_size=2, max_size=4, unique=True).map(tuple),
    problem_type=st.sampled_from([None, "regression", "single_label_classification", "multi_label_classification"]),
    hidden_dropout_prob=st.sampled_from([0.0, 0.1, 1.0]),
    classifier_dropout=st.none() | st.floats(0, 1),
    pad_token_id=st.integers(0, 2),
    bos_token_id=st.none() | st.integers(0, 2),
    eos_token_id=st.none() | st.integers(0, 2) | st.lists(st.integers(0, 2), min_size=1).map(tuple),
    dtype=st.sampled_from([None, "float32", "bfloat16"]),
)


@hypothesis.given(CONFIGS, st.sampled_from(["bert", "roberta"]), st.sampled_from(list(FAMILIES["bert"].architectures)))
@hypothesis.settings(max_examples=40)
def test_what_is_written_means_the_same_to_transformers_and_to_us(config, family, task):
    config = dataclasses.replace(config, model_type=family)
    if family == "roberta":  # null is not said by transformers 4, and means its default
        config = dataclasses.replace(
            config, bos_token_id=config.bos_token_id or 0, eos_token_id=config.eos_token_id or 2
        )
    written = json.loads(json.dumps(write_config(config, task)))
    bare = ("hidden", "pooled", "sentence_embedding")
    assert read_config(written) == (config, "hidden" if task in bare else task)
    theirs = transformers.BertConfig if family == "bert" else transformers.RobertaConfig
    assert read_config(theirs(**written).to_dict() | {"dtype": config.dtype}, task) == (config, task)


REFUSED = {
    "positions": ({"position_embedding_type": "relative_key"}, r"position_embedding_type 'relative_key' is not impl"),
    "decoder": ({"is_decoder": True}, r"is_decoder True is not implemented; implemented: False"),
    "cross": ({"add_cross_attention": True}, r"add_cross_attention True is not implemented"),
    "untied": ({"tie_word_embeddings": False}, r"tie_word_embeddings False is not implemented; implemented: True"),
    "pruned": ({"pruned_heads": {"0": [1]}}, r"pruned_heads .* is not implemented"),
    "activation": (
        {"hidden_act": "quick_gelu"},
        r"hidden_act 'quick_gelu' is not implemented; implemented: gelu, gelu_",
    ),
    "activation-list": ({"hidden_act": ["gelu"]}, r"hidden_act \['gelu'\] is not implemented"),
    "unknown": ({"embedding_size": 12}, r"bert: config key 'embedding_size' \(12\) is not known; remove it"),
    "remote-code": ({"auto_map": {"AutoModel": "x.Y"}}, r"config key 'auto_map'"),
    "quantised": ({"quantization_config": {"bits": 4}}, r"quantization_config"),
    "missing": ({"hidden_size": None, "vocab_size": None}, r"the model config lacks vocab_size, hidden_size$"),
    "heads": ({"num_attention_heads": 5}, r"num_attention_heads \(5\) must divide hidden_size \(24\)"),
    "zero": ({"type_vocab_size": 0}, r"type_vocab_size must be a positive integer below 2\^31, found 0"),
    "text": ({"num_attention_heads": "4"}, r"num_attention_heads must be a positive integer below 2\^31, found '4'"),
    "huge": ({"max_position_embeddings": 2**31}, r"max_position_embeddings must be a positive integer below 2\^31"),
    "eps-huge": ({"layer_norm_eps": 10**400}, r"layer_norm_eps must be a positive number, found 1000"),
    "architectures": ({"architectures": "BertModel"}, r"architectures must be a list of names, found 'BertModel'"),
    "bool": ({"num_hidden_layers": True}, r"num_hidden_layers must be a positive integer below 2\^31, found True"),
    "eps": ({"layer_norm_eps": float("nan")}, r"layer_norm_eps must be a positive number, found nan"),
    "dropout": ({"hidden_dropout_prob": 2}, r"hidden_dropout_prob must be between 0 and 1, found 2"),
    "pad": ({"pad_token_id": -1}, r"pad_token_id must be a token id, found -1"),
    "no-pad": ({"model_type": "roberta", "pad_token_id": None}, r"pad_token_id must be a token id, found None"),
    "dtype": ({"dtype": 16}, r"dtype must be a name such as 'float32', found 16"),
    "problem": ({"problem_type": "ranking"}, r"problem_type 'ranking' is not implemented; implemented: regression"),
    "one-class": ({"problem_type": "single_label_classification", "num_labels": 1}, r"1 label\(s\) are too few"),
    "no-class": ({"id2label": {}}, r"0 label\(s\) are too few"),
    "labels": ({"id2label": {"0": "a", "2": "b"}}, r"id2label must name the classes 0 to 1, found"),
    "labels-list": ({"id2label": ["a"]}, r"id2label must map class ids to names, found \['a'\]"),
    "many-labels": ({"num_labels": 10**9}, r"num_labels must be an integer from 1 to 1000000, found 1000000000"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_implemented_or_impossible_is_refused_by_name(change, message):
    with pytest.raises(ConfigError, match=message) as error:
        read_config({**SMALL, **change})
    assert "\n" not in str(error.value)
