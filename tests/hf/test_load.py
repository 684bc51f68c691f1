"""load_pretrained: the same logits as transformers, and one clear line for every damaged directory."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import hadamax.hf.load
from hadamax.errors import CheckpointError, ConfigError
from hadamax.hf import load_pretrained

from .conftest import assert_same, logits_of, torch_logits


def test_without_a_mask_every_position_counts(llama, batch):
    reference = llama()
    ids, _ = batch
    model, params, _ = load_pretrained(str(reference.directory))
    assert np.abs(logits_of(model, params, ids) - reference.logits(ids, np.ones_like(ids))).max() < 1e-4


def test_shards_load_like_a_single_file(llama):
    single, sharded = llama("single"), llama("sharded", max_shard_size="10KB")
    assert len(list(sharded.directory.glob("model-*.safetensors"))) > 2
    _, expected, _ = load_pretrained(single.directory)
    _, found, _ = load_pretrained(sharded.directory)
    assert_same(found, expected)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_tensors_that_are_read_in_parts_are_the_same(llama, monkeypatch, scan_layers):
    directory = llama().directory
    expected = [load_pretrained(directory, dtype=dtype, scan_layers=scan_layers)[1] for dtype in (None, "bfloat16")]
    monkeypatch.setattr(hadamax.hf.load, "_PART", 1000)  # 3 of 24 rows, 10 of 61 the last of which is short
    for dtype, params in zip((None, "bfloat16"), expected, strict=True):
        assert_same(load_pretrained(directory, dtype=dtype, scan_layers=scan_layers)[1], params)


def test_bfloat16_stays_as_in_the_file_unless_asked(llama, batch):
    reference = llama(dtype=torch.bfloat16)
    ids, mask = batch
    model, params, config = load_pretrained(reference.directory)
    kernel = params["params"]["layers"]["mlp"]["up_proj"]["kernel"]
    weight = reference.model.model.layers[1].mlp.up_proj.weight.detach().float().numpy()
    assert (model.dtype, kernel.dtype, config.dtype) == (jnp.bfloat16, jnp.bfloat16, "bfloat16")
    assert np.array_equal(np.asarray(kernel[1], np.float32), weight.T)
    assert logits_of(model, params, ids, mask).dtype == jnp.bfloat16
    model, params, _ = load_pretrained(reference.directory, dtype="float32")
    reference = transformers.LlamaForCausalLM.from_pretrained(reference.directory, dtype=torch.float32)
    expected = torch_logits(reference, ids, mask)
    assert np.abs(logits_of(model, params, ids, mask) - expected)[mask == 1].max() < 1e-4


def test_a_repeated_tied_head_and_rope_tables_are_ignored(llama):
    reference = llama(tie_word_embeddings=True)
    path = reference.directory / "model.safetensors"
    tensors = load_file(path)
    _, expected, _ = load_pretrained(reference.directory)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    save_file(tensors, path)
    assert_same(load_pretrained(reference.directory)[1], expected)


def edit_tensors(change):
    def damage(directory):
        path = directory / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return damage


def edit_index(change):
    def damage(directory):
        path = directory / "model.safetensors"
        tensors = load_file(path)
        path.rename(directory / "shard.safetensors")
        index = {"weight_map": dict.fromkeys(tensors, "shard.safetensors")}
        change(index)
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))

    return damage


def write(name, text):
    return lambda directory: (directory / name).write_text(text)


def truncate(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def cut_header(directory):
    (directory / "model.safetensors").write_bytes(b"\x10")


def only_a_pickle(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


Q0 = "model.layers.0.self_attn.q_proj.weight"
DAMAGE = {
    "missing-tensor": (edit_tensors(lambda t: t.pop(Q0)), rf"lacks 1 of 21 tensors: '{Q0}' of shape \(24, 24\)"),
    "unexpected-tensor": (
        edit_tensors(lambda t: t.update({"model.extra": np.ones((2, 3), np.float32)})),
        r"has 1 tensors that are not in the architecture of config.json: 'model.extra' of shape \(2, 3\)",
    ),
    "wrong-shape": (
        edit_tensors(lambda t: t.update({Q0: np.ones((24, 23), np.float32)})),
        rf"'{Q0}' .*expected shape \(24, 24\), found \(24, 23\)",
    ),
    "integer-tensor": (edit_tensors(lambda t: t.update({Q0: np.ones((24, 24), np.int8)})), rf"'{Q0}' .*dtype 'I8'"),
    "truncated": (truncate, r"model.safetensors is damaged or incomplete"),
    "no-header": (cut_header, r"model.safetensors is damaged or incomplete"),
    "pickle-only": (only_a_pickle, r"holds neither .*found pytorch_model.bin: convert"),
    "config-malformed": (write("config.json", '{\n"a": 1,\n"b" 2}'), r"config.json is not valid JSON: line 3"),
    "config-no-object": (write("config.json", "[]"), r"config.json must hold a JSON object, found list"),
    "config-binary": (lambda d: (d / "config.json").write_bytes(b"\xff\xfe{"), r"config.json is not UTF-8"),
    "config-absent": (lambda d: (d / "config.json").unlink(), r"cannot read .*config.json: No such file"),
    "index-outside": (
        edit_index(lambda i: i["weight_map"].update({Q0: "../shard.safetensors"})),
        rf"puts tensor '{Q0}' into '../shard.safetensors', which is no file inside",
    ),
    "index-absolute": (edit_index(lambda i: i["weight_map"].update({Q0: "/etc/passwd"})), r"no file inside"),
    "index-number": (edit_index(lambda i: i["weight_map"].update({Q0: 3})), r"into 3, which is no file inside"),
    "index-empty": (edit_index(lambda i: i.clear()), r"index.json has no weight_map"),
    "shard-absent": (
        edit_index(lambda i: i["weight_map"].update({Q0: "b.safetensors"})),
        r"cannot read .*b.safetensors: No such file",
    ),
    "shard-lacks": (
        edit_index(lambda i: i["weight_map"].update({"model.ghost": "shard.safetensors"})),
        r"shard.safetensors lacks tensor 'model.ghost'",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_directory_gives_one_line_that_names_the_culprit(llama, damage, message):
    directory = llama().directory
    damage(directory)
    with pytest.raises(CheckpointError, match=message) as error:
        load_pretrained(directory)
    assert "\n" not in str(error.value)


def test_a_tensor_named_nearly_right_is_suggested(llama):
    directory = llama().directory
    edit_tensors(lambda t: t.update({Q0.replace("q_proj", "qproj"): t.pop(Q0)}))(directory)
    with pytest.raises(CheckpointError, match=r"nearest: 'model.layers.0.self_attn.qproj.weight'"):
        load_pretrained(directory)


def test_a_path_that_is_no_directory_is_refused(tmp_path):
    (tmp_path / "weights").write_text("")
    with pytest.raises(CheckpointError, match="is a file; give the directory"):
        load_pretrained(tmp_path / "weights")
    with pytest.raises(CheckpointError, match="no directory at"):
        load_pretrained(tmp_path / "nowhere")


def test_a_hub_id_that_cannot_be_fetched_is_one_line(monkeypatch):
    def refuse(*_, **__):
        raise OSError("offline\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=r"^'some/model' is not a directory .* from the hub: offline$"):
        load_pretrained("some/model")


def test_a_hub_id_is_fetched_where_no_directory_has_that_name(llama, monkeypatch):
    directory = llama().directory
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: asked.append(name) or str(directory))
    load_pretrained("some/model")
    assert asked == ["some/model"]


@pytest.mark.parametrize("dtype", ["int8", "float31"])
def test_a_dtype_that_is_not_floating_is_refused(llama, dtype):
    with pytest.raises(ConfigError, match=f"dtype '{dtype}' is no floating type"):
        load_pretrained(llama().directory, dtype=dtype)


@pytest.fixture
def bert(tmp_path):
    """A random BERT for a task, saved by transformers; `edit(tensors)` changes what the file holds."""

    def make(kind="BertForPreTraining", edit=None):
        sizes = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        torch.manual_seed(0)
        config = transformers.BertConfig(**sizes, intermediate_size=40, max_position_embeddings=64)
        model = getattr(transformers, kind)(config).eval()
        model.save_pretrained(tmp_path / kind)
        if edit is not None:
            tensors = load_file(tmp_path / kind / "model.safetensors")
            save_file(edit(tensors), tmp_path / kind / "model.safetensors")
        return tmp_path / kind

    return make


def test_two_tensors_of_one_name_are_refused(bert):
    name = "embeddings.word_embeddings.weight"
    directory = bert("BertModel", lambda tensors: tensors | {"bert." + name: tensors[name]})
    with pytest.raises(CheckpointError, match=rf"has '(bert\.)?{name}' and '(bert\.)?{name}', which are one tensor"):
        load_pretrained(directory)


def test_a_new_head_is_initialised_the_same_each_time_and_said(bert, caplog):
    directory = bert("BertForMaskedLM")
    with caplog.at_level(logging.WARNING, "hadamax"):
        model, params, _ = load_pretrained(directory, task="sequence_classification", dtype="bfloat16")
    said = " ".join(record.getMessage() for record in caplog.records if "newly initialised" in record.getMessage())
    assert "classifier/kernel" in said and "pooler/dense/kernel" in said and "encoder" not in said.split(" has no ")[1]
    kernel, bias = (params["params"]["classifier"][name] for name in ("kernel", "bias"))
    assert 0.01 < float(jnp.std(kernel.astype(jnp.float32))) < 0.04 and not bias.any()
    assert kernel.dtype == bias.dtype == model.dtype == jnp.bfloat16
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    assert_same(load_pretrained(directory, task="sequence_classification", dtype="bfloat16", mesh=mesh)[1], params)


def test_half_a_head_is_no_new_head(bert):
    def cut(tensors):
        del tensors["classifier.bias"]
        return tensors

    with pytest.raises(CheckpointError, match=r"lacks 1 of \d+ tensors: 'classifier.bias' of shape \(2,\)"):
        load_pretrained(bert("BertForSequenceClassification", cut))


def test_biases_that_the_config_denies_are_refused_not_dropped(llama):
    directory = llama(attention_bias=True).directory
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "attention_bias": False}))
    with pytest.raises(CheckpointError, match=r"not in the architecture of config.json: .*self_attn.k_proj.bias'"):
        load_pretrained(directory)


@pytest.mark.parametrize(
    "size", [{"num_hidden_layers": 10**9}, {"vocab_size": 10**12}, {"num_attention_heads": 10**40}], ids=str
)
def test_sizes_that_the_files_cannot_have_are_refused_before_a_model_is_built(llama, size):
    directory = llama().directory
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **size}))
    with pytest.raises((CheckpointError, ConfigError), match=next(iter(size))):
        load_pretrained(directory, scan_layers=False)


def test_a_misspelt_hub_id_says_what_to_check(monkeypatch):
    from huggingface_hub.errors import RepositoryNotFoundError

    def refuse(*_, **__):
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError, "404 Client Error\nmore")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=r"could not be fetched from the hub: it does not exist.*owner/name"):
        load_pretrained("meta-lama/Llama")


def test_a_tied_head_with_other_numbers_is_refused(llama):
    reference = llama()  # untied
    path = reference.directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' differs from .*; set tie_word_embeddings to false"):
        load_pretrained(reference.directory)


def test_a_tensor_that_the_index_leaves_out_is_refused(llama):
    reference = llama(max_shard_size="10KB")
    path = reference.directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"holds tensor 'model.norm.weight', which .* does not name"):
        load_pretrained(reference.directory)


def test_any_mask_that_is_not_zero_counts_as_a_token(llama, batch):
    model, params, _ = load_pretrained(llama().directory)
    ids, mask = batch
    assert np.array_equal(logits_of(model, params, ids, 3 * mask), logits_of(model, params, ids, mask))
