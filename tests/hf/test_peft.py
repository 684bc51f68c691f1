"""What PEFT saved gives PEFT's logits here, and what is saved here gives our logits in PEFT."""

import copy
import fnmatch
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import hadamax as hx
from hadamax import paths
from hadamax.errors import CheckpointError, ConfigError
from tests.hf import parity, parity_encoders
from tests.hf.conftest import assert_same, logits_of, torch_logits

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT asks it
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]
WEIGHTS = "adapter_model.safetensors"
QV = ["q_proj", "v_proj"]
ALL = [*QV, "o_proj", "up_proj", "down_proj"]


def random_peft(model, config, adapter_name="default"):
    """PEFT's model around a copy, with random adapter weights, and whatever else trains moved a little."""
    model = peft.get_peft_model(copy.deepcopy(model), config, adapter_name=adapter_name)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                keep = 1.0 if any(part in name for part in ("ia3", "magnitude", "modules_to_save", "bias")) else 0.0
                parameter.copy_(keep * parameter + 0.2 * torch.randn_like(parameter))
    return model.eval()


def load(reference, directory, **options):
    model, params, _ = hx.hf.load_pretrained(reference.directory, **options)
    return model, params, *hx.hf.load_adapter(directory, model, params)


def merged_logits(model, params, injection, adapters, base, batch):
    merged = injection.merge(hx.join(base, params), adapters)
    return np.asarray(logits_of(model, merged, *map(jnp.asarray, batch)))


def assert_close(found, expected, mask, base=None):
    """On tokens; and the adapter must matter."""
    on = np.asarray(mask, bool)
    np.testing.assert_allclose(found[on], expected[on], atol=1e-4)
    if base is not None:
        assert np.abs(expected[on] - base[on]).max() > 1e-2


def tensors_in(directory):
    return load_file(directory / "adapter_model.safetensors")


LORA = {"r": 4, "lora_alpha": 6, "target_modules": QV}
CONFIGS = {
    "lora": peft.LoraConfig(**LORA),
    "lora-all-linear": peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
    "lora-regex": peft.LoraConfig(r=4, target_modules=r".*layers\.1\.(self_attn\.[qk]_proj|mlp\.up_proj)"),
    "lora-excluded": peft.LoraConfig(r=4, target_modules=ALL, exclude_modules=["0.mlp.up_proj", "o_proj"]),
    "lora-one-layer": peft.LoraConfig(**LORA, layers_to_transform=[1], layers_pattern="layers"),
    "lora-patterns": peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=ALL,
        rank_pattern={"q_proj": 2, r"layers\.1\.mlp.*": 3, "0.self_attn.o_proj": 6},
        alpha_pattern={"^model.layers.0.self_attn.q_proj": 3, "v_proj": 5},
    ),
    "rslora-patterns": peft.LoraConfig(
        **LORA, use_rslora=True, rank_pattern={"1.self_attn.q_proj": 9}, alpha_pattern={"0.self_attn.q_proj": 3}
    ),
    "dora-patterns": peft.LoraConfig(**LORA, use_dora=True, rank_pattern={"1.self_attn.q_proj": 3}),
    "dora-rslora": peft.LoraConfig(**LORA, use_dora=True, use_rslora=True),
    "lora-embedding": peft.LoraConfig(r=4, lora_alpha=6, target_modules=["embed_tokens", "lm_head", "k_proj"]),
    "lora-head-saved": peft.LoraConfig(**LORA, modules_to_save=["lm_head", "norm"], task_type="CAUSAL_LM"),
    "lora-embedding-saved": peft.LoraConfig(**LORA, modules_to_save=["embed_tokens", "0.input_layernorm"]),
    "lora-bias-all": peft.LoraConfig(**LORA, bias="all"),
    "lora-bias-only": peft.LoraConfig(**LORA, bias="lora_only", layers_to_transform=1),
    "loha": peft.LoHaConfig(r=4, alpha=6, target_modules=ALL, init_weights=False),
    "loha-patterns": peft.LoHaConfig(
        r=4, alpha=6, target_modules=ALL, rank_pattern={"1.mlp.up_proj": 2}, alpha_pattern={"0.mlp.up_proj": 3}
    ),
    "hira": peft.HiraConfig(r=4, target_modules=ALL),
    "hira-embedding": peft.HiraConfig(r=4, target_modules=[*QV, "embed_tokens"]),
    "ia3": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "gralora": peft.GraloraConfig(r=4, alpha=6, gralora_k=2, target_modules=ALL),
    "gralora-saved": peft.GraloraConfig(r=4, gralora_k=4, target_modules=QV, modules_to_save=["norm"], bias="all"),
}


UNSTACKED = ("lora-patterns", "ia3", "lora-one-layer")  # loaded with scan_layers=False
# several ranks in one stacked kernel, or base leaves of which PEFT trained some layers
FOLDED = (
    "rslora-patterns",
    "dora-patterns",
    "loha-patterns",
    "hira-patterns",
    "lora-embedding-saved",
    "lora-bias-only",
)


@pytest.mark.parametrize("name", CONFIGS)
def test_pefts_directory_gives_pefts_logits_and_so_does_ours_back_in_peft(name, llama, batch, tmp_path):
    scan = name not in UNSTACKED
    reference = llama(attention_bias=True)
    theirs = random_peft(reference.model, CONFIGS[name])
    theirs.save_pretrained(tmp_path / "theirs")
    expected = torch_logits(theirs, *batch)
    loaded = load(reference, tmp_path / "theirs", scan_layers=scan)
    assert_close(merged_logits(*loaded, batch), expected, batch[1], reference.logits(*batch))
    model, params, injection, adapters, base = loaded
    rebuilt = hx.from_config(json.loads(json.dumps(injection.to_config())))
    assert rebuilt.targets(params).keys() == adapters.keys()

    hx.hf.save_adapter(tmp_path / "back", model, injection, adapters, base=base)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(reference.model), tmp_path / "back").eval()
    assert_close(torch_logits(again, *batch), expected, batch[1])
    if name not in FOLDED:
        theirs_, back = tensors_in(tmp_path / "theirs"), tensors_in(tmp_path / "back")
        kept = {key for key in theirs_ if ".base_layer.weight" not in key}  # PEFT copies embeddings that it adapts
        assert back.keys() == kept
        assert all(np.array_equal(back[key], theirs_[key]) for key in kept)


def test_logits_through_apply_equal_pefts(llama, batch, tmp_path):
    reference = llama()
    theirs = random_peft(reference.model, peft.LoHaConfig(r=4, alpha=6, target_modules=ALL, rank_pattern={"1.*": 3}))
    theirs.save_pretrained(tmp_path / "theirs")
    model, params, injection, adapters, base = load(reference, tmp_path / "theirs")
    found = jax.jit(injection.apply(model.apply))(hx.join(base, params), adapters, *map(jnp.asarray, batch))
    assert_close(np.asarray(found), torch_logits(theirs, *batch), batch[1], reference.logits(*batch))


RULES = {
    "lora": {"self_attn/*_proj": hx.lora(4, alpha=6), "**/mlp/up_proj": hx.lora(2, alpha=3)},
    "lora-layers": {"q_proj": hx.at(hx.lora(4, alpha=6), layers=[1]), "v_proj": hx.at(hx.lora(3), layers=[1])},
    "lora-mixed-layers": {"q_proj": hx.at(hx.lora(4), layers=[0]), "{k,v}_proj": hx.lora(4, alpha=2.5)},
    "rslora": {"{q,down}_proj": hx.lora(4, alpha=6, rslora=True)},
    "dora": {"{k,up}_proj": hx.dora(4, alpha=6), "lm_head": hx.dora(2)},
    "loha": {"o_proj": hx.loha(4, alpha=6), "down_proj": hx.at(hx.loha(2), layers=[0])},
    "hira-scaled": {"{q,up}_proj": hx.hira(4, scale=0.7), "embed_tokens": hx.hira(2, scale=3)},
    "ia3": {"{k,v}_proj": hx.ia3(), "down_proj": hx.at(hx.ia3(position="input"), layers=[1])},
    "gralora-scaled": {"q_proj": hx.gralora(4, 2, alpha=8), "{k,v}_proj": hx.gralora(2, 2, alpha=6)},
}


def random_adapters(injection, params):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(injection.init, jax.random.key(0), params)
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype), shapes)


@pytest.mark.parametrize("name", RULES)
def test_saved_adapters_give_our_logits_in_peft_and_come_back(name, llama, batch, tmp_path):
    scan = name not in ("lora-mixed-layers", "rslora")
    reference = llama(attention_bias=True)
    model, params, _ = hx.hf.load_pretrained(reference.directory, scan_layers=scan)
    rules = {
        pattern if "/" not in pattern else f"**/{pattern.removeprefix('**/')}": r for pattern, r in RULES[name].items()
    }
    injection = hx.inject(rules, view=model.view)
    adapters = random_adapters(injection, params)
    expected = merged_logits(model, params, injection, adapters, params, batch)
    hx.hf.save_adapter(tmp_path / "a", model, injection, adapters, base_model_name_or_path="tiny/llama")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(reference.model), tmp_path / "a").eval()
    assert_close(torch_logits(theirs, *batch), expected, batch[1], reference.logits(*batch))
    assert theirs.peft_config["default"].base_model_name_or_path == "tiny/llama"
    again, back, _ = hx.hf.load_adapter(tmp_path / "a", model, params)
    if "scaled" not in name:  # PEFT has no scale for the one, and one rank and scale for the other
        assert_same(back, adapters)
    assert_close(merged_logits(model, params, again, back, params, batch), expected, batch[1])


def test_the_written_configuration_is_short(llama, tmp_path):
    model, params, _ = hx.hf.load_pretrained(llama().directory)
    injection = hx.inject(
        {"{q,v}_proj": hx.at(hx.lora(4, alpha=6), layers=[1]), "up_proj": hx.at(hx.lora(2, alpha=6), layers=[1])},
        view=model.view,
    )
    hx.hf.save_adapter(tmp_path / "a", model, injection, random_adapters(injection, params))
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text()) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "modules_to_save": None,
        "target_modules": ["up_proj", "q_proj", "v_proj"],
        "layers_to_transform": [1],
        "r": 4,
        "rank_pattern": {"up_proj": 2},
        "lora_alpha": 6,
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
    }
    rules = hx.hf.load_adapter(tmp_path / "a", model, params)[0].to_config()["rules"]
    assert [(rule["pattern"], rule["layers"]) for rule in rules] == [
        ("layers/mlp/up_proj/kernel", [1]),
        ("layers/self_attn/{q_proj,v_proj}/kernel", [1]),
    ]


def test_trained_norms_and_head_are_saved_as_modules_of_their_own(llama, batch, tmp_path):
    reference = llama()
    model, params, _ = hx.hf.load_pretrained(reference.directory)
    injection = hx.inject({"q_proj": hx.hira(4)}, view=model.view)
    adapters = random_adapters(injection, params)
    base, _ = hx.split(params, ["**/scale", "lm_head"])
    base = jax.tree.map(lambda leaf: leaf * 1.3, base)
    hx.hf.save_adapter(tmp_path / "a", model, injection, adapters, base=base)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["input_layernorm", "post_attention_layernorm", "lm_head", "norm"]
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(reference.model), tmp_path / "a").eval()
    expected = merged_logits(model, params, injection, adapters, base, batch)
    assert_close(torch_logits(theirs, *batch), expected, batch[1])
    assert_same(hx.hf.load_adapter(tmp_path / "a", model, params)[2], base)
    hx.hf.save_adapter(tmp_path / "b", model, injection, adapters, base=paths.leaves(base))
    assert_same(tensors_in(tmp_path / "a"), tensors_in(tmp_path / "b"))


def test_a_tied_embedding_trains_in_both_places_or_is_refused(llama, batch, tmp_path):
    reference = llama(tie_word_embeddings=True)
    tying = peft.LoraConfig(**LORA, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    theirs = random_peft(reference.model, tying)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load(reference, tmp_path / "theirs")
    assert_close(merged_logits(*loaded, batch), torch_logits(theirs, *batch), batch[1], reference.logits(*batch))
    model, params, injection, adapters, base = loaded
    hx.hf.save_adapter(tmp_path / "back", model, injection, adapters, base=base)
    with pytest.warns(UserWarning, match="tie|tied"):
        again = peft.PeftModel.from_pretrained(copy.deepcopy(reference.model), tmp_path / "back").eval()
    assert_close(torch_logits(again, *batch), torch_logits(theirs, *batch), batch[1])

    for change in ({"modules_to_save": ["embed_tokens"]}, {"target_modules": ["embed_tokens"]}):
        with pytest.warns(UserWarning):
            random_peft(reference.model, peft.LoraConfig(**{**LORA, **change})).save_pretrained(tmp_path / str(change))
        with pytest.raises(CheckpointError, match="embed_tokens/embedding is also the model's head"):
            hx.hf.load_adapter(tmp_path / str(change), model, params)
    injection = hx.inject({"embed_tokens": hx.lora(2)})
    with pytest.raises(CheckpointError, match="embed_tokens/embedding is also the model's head"):
        hx.hf.save_adapter(tmp_path / "no", model, injection, random_adapters(injection, params))


def test_an_adapter_that_peft_saved_by_name_or_as_a_pickle(llama, tmp_path):
    reference = llama()
    theirs = random_peft(reference.model, peft.LoraConfig(**LORA), "mine")
    theirs.save_pretrained(tmp_path / "named")
    model, params, *expected = load(reference, tmp_path / "named")
    assert_same(hx.hf.load_adapter(tmp_path / "named" / "mine", model, params)[1:], tuple(expected[1:]))
    theirs.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert_same(hx.hf.load_adapter(tmp_path / "pickled", model, params)[1:], tuple(expected[1:]))
    (tmp_path / "named" / "other").mkdir()
    (tmp_path / "named" / "other" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds 2 adapters, mine, other: give the directory of one"):
        hx.hf.load_adapter(tmp_path / "named", model, params)


@pytest.fixture
def directory(llama, tmp_path):
    """`(model, params, a directory of a LoRA)`."""
    model, params, _ = hx.hf.load_pretrained(llama().directory)
    injection = hx.inject({"q_proj": hx.lora(4)}, view=model.view)
    hx.hf.save_adapter(tmp_path / "a", model, injection, random_adapters(injection, params))
    return model, params, tmp_path / "a"


def rewrite(directory, config=None, tensors=None):
    file = directory / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **(config or {})}))
    if tensors is not None:
        save_file(tensors(tensors_in(directory)), directory / "adapter_model.safetensors")


REFUSED = {
    "lora_bias": True,
    "use_qalora": True,
    "alora_invocation_tokens": [1, 2],
    "target_parameters": ["mlp.experts"],
    "trainable_token_indices": [3],
    "layer_replication": [[0, 2]],
    "megatron_config": {"tp": 2},
    "kasa_config": {"rank": 2},
    "init_lora_weights": "pissa",
    "invented_in_the_future": "yes",
    "peft_type": "LOKR",
    "use_dora": "yes",
    "lora_alpha": [8],
    "alpha_pattern": {"(a+)+": 4},
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_change_the_function_are_refused_by_name(name, directory):
    model, params, path = directory
    rewrite(path, {name: REFUSED[name]})
    with pytest.raises(
        (ConfigError, CheckpointError), match="repeats groups" if "pattern" in name else f"{name}|number"
    ):
        hx.hf.load_adapter(path, model, params)


def test_options_that_do_not_are_ignored(directory):
    model, params, path = directory
    expected = hx.hf.load_adapter(path, model, params)[1]
    full = peft.LoraConfig(
        **{**LORA, "target_modules": ["q_proj"]}, lora_dropout=0.3, init_lora_weights="gaussian"
    ).to_dict()
    full = {name: sorted(value) if isinstance(value, set) else value for name, value in full.items()}
    rewrite(path, {**full, "peft_type": "LORA", "lora_alpha": 4, "invented_in_the_future": None})
    assert_same(hx.hf.load_adapter(path, model, params)[1], expected)


KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
DAMAGE = {
    "lacks tensor 'model.layers.1.self_attn.q_proj.lora_B.weight'": lambda t: {k: v for k, v in t.items() if k != KEY},
    "lacks the factors of 1 modules that target_modules names, first 'model.layers.1.self_attn.q_proj'": lambda t: {
        k: v for k, v in t.items() if "layers.1" not in k
    },
    r"expected shape \(24, 4\), found \(24, 5\)": lambda t: {**t, KEY: np.zeros((24, 5), np.float32)},
    "rank must be a positive integer": lambda t: {**t, KEY.replace("_B", "_A"): np.zeros(4, np.float32)},
    "adapts 2 modules that the model lacks, first 'layers.0.self_attn.q_proj'": lambda t: {
        k.replace("model.model.", "model."): v for k, v in t.items()
    },
    "holds 1 tensors that are neither factors nor the model's": lambda t: {**t, KEY + "s": np.zeros(3, np.float32)},
    "are the same tensor": lambda t: {**t, KEY.removeprefix("base_model.model."): t[KEY]},
    "dtype I32": lambda t: {**t, KEY: np.zeros((24, 4), np.int32)},
    "adapts no module": lambda t: {},
    r"norm.weight': expected shape \(24,\), found \(7,\)": lambda t: {
        **t,
        "base_model.model.model.norm.weight": np.zeros(7, np.float32),
    },
}


@pytest.mark.parametrize("message", DAMAGE)
def test_tensors_that_do_not_fit_are_named(message, directory):
    model, params, path = directory
    rewrite(path, tensors=DAMAGE[message])
    with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
        hx.hf.load_adapter(path, model, params)
    assert "\n" not in str(caught.value)


def test_no_value_in_the_configuration_is_more_than_a_clear_error(directory):
    model, params, path = directory
    file = path / "adapter_config.json"
    config = json.loads(file.read_text())
    junk = [
        None,
        True,
        0,
        -1,
        10**400,
        1e300,
        "x",
        "(((",
        [],
        [None],
        [[1]],
        {},
        {"a": None},
        {"(": 1},
        {"q_proj": "x"},
    ]
    outcomes = set()
    for name in [*config, "alpha_pattern", "layers_pattern", "exclude_modules", "init_lora_weights", "r1"]:
        for value in junk:
            file.write_text(json.dumps({**config, name: value}))
            try:
                hx.hf.load_adapter(path, model, params)
                outcomes.add("loaded")
            except hx.HadamaxError as error:
                assert "\n" not in str(error)
                outcomes.add("refused")
    assert outcomes == {"loaded", "refused"}


def test_an_adapter_of_the_hub(directory, monkeypatch):
    model, params, path = directory

    def snapshot(name, allow_patterns):
        assert name == "owner/adapter"
        for file in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "mine/adapter_model.bin"):
            assert any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns)
        return path

    with pytest.raises(CheckpointError, match="could not be fetched from the hub"):
        hx.hf.load_adapter("owner/adapter", model, params)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    found = hx.hf.load_adapter("owner/adapter", model, params)
    assert_same(found[1], hx.hf.load_adapter(path, model, params)[1])


def test_nothing_outside_of_the_directory_is_read(directory, tmp_path):
    model, params, path = directory
    (path / "adapter_model.safetensors").rename(tmp_path / "outside.safetensors")
    (path / "adapter_model.safetensors").symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(CheckpointError, match="link out of the directory"):
        hx.hf.load_adapter(path, model, params)
    with pytest.raises(CheckpointError, match=r"base holds a model, no adapter: load it with hx\.hf\.load_pretrained"):
        hx.hf.load_adapter(tmp_path / "base", model, params)
    with pytest.raises(CheckpointError, match="is one file of an adapter; give its directory"):
        hx.hf.load_adapter(path / "adapter_model.safetensors", model, params)


def test_directories_of_other_kinds_say_what_they_are(directory, tmp_path):
    model, params, path = directory
    injection = hx.inject({"q_proj": hx.boha(4, blocks=2)}, view=model.view)
    hx.save_adapters(tmp_path / "native", injection, random_adapters(injection, params), params)
    with pytest.raises(CheckpointError, match=r"hadamax's own format: load it with hx\.load_adapters"):
        hx.hf.load_adapter(tmp_path / "native", model, params)
    for folder, function in ((path, "hx.hf.load_adapter"), (tmp_path / "native", "hx.load_adapters")):
        with pytest.raises(CheckpointError, match=f"holds an adapter: load its base, and then it with {function}"):
            hx.hf.load_pretrained(folder)
    (path / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds adapter_model.safetensors, but not the adapter_config.json"):
        hx.hf.load_adapter(path, model, params)


def test_stacked_layers_of_two_kinds_need_a_model_without_stacks(llama, tmp_path):
    reference = llama()
    config = peft.IA3Config(target_modules=["0.mlp.up_proj", "1.mlp.up_proj"], feedforward_modules=["0.mlp.up_proj"])
    random_peft(reference.model, config).save_pretrained(tmp_path / "a")
    with pytest.raises(CheckpointError, match="load the model with scan_layers=False"):
        load(reference, tmp_path / "a")
    _, _, injection, *_ = load(reference, tmp_path / "a", scan_layers=False)
    assert len(injection.rules) == 2


def test_what_peft_cannot_express_is_refused_with_advice(directory, tmp_path):
    model, params, path = directory

    def save(rules, base=None, where=tmp_path / "new"):
        injection = hx.inject(rules, view=model.view)
        hx.hf.save_adapter(where, model, injection, random_adapters(injection, params), base=base)

    for adapter in (hx.abba(4), hx.boha(4, blocks=2), hx.add(hx.lora(2), hx.hira(2))):
        with pytest.raises(ConfigError, match=r"PEFT has no \w+: convert it with hx.convert.*hx.save_adapters"):
            save({"q_proj": adapter})
    with pytest.raises(ConfigError, match=r"PEFT has no hadamard_adapter: merge it, or keep it with hx\.save_adapters"):
        save({"q_proj": hx.hadamard_adapter()})
    with pytest.raises(ConfigError, match=r"one method, found 'q_proj': lora, 'k_proj': lora \(rslora\)"):
        save({"q_proj": hx.lora(2), "k_proj": hx.lora(2, rslora=True)})
    kernel = params["params"]["layers"]["self_attn"]["q_proj"]["kernel"]
    with pytest.raises(ConfigError, match="is adapted; merge"):
        save({"q_proj": hx.lora(2)}, {"layers/self_attn/q_proj/kernel": kernel})
    with pytest.raises(ConfigError, match=r"base leaf 'norm/scal' is no parameter of the model; nearest: 'norm/scale'"):
        save({"q_proj": hx.lora(2)}, {"norm/scal": jnp.ones(24)})
    with pytest.raises(ConfigError, match=r"'norm/scale': expected shape \(24,\), found \(3,\)"):
        save({"q_proj": hx.lora(2)}, {"norm/scale": jnp.ones(3)})
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        save({"q_proj": hx.lora(2)}, where=path)
    assert not (tmp_path / "new").exists()
    injection = hx.inject({"q_proj": hx.lora(4)}, view=model.view)
    with pytest.raises(ConfigError, match="made by other rules"):
        hx.hf.save_adapter(tmp_path / "new", model, injection, {})


SIZES = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 50}
DECODER = {"num_key_value_heads": 2, "head_dim": 8}
SEQ = {"r": 4, "task_type": "SEQ_CLS"}
FAMILIES = {
    "gemma2": ("Gemma2ForCausalLM", DECODER, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")),
    "qwen3": (
        "Qwen3ForCausalLM",
        DECODER,
        peft.HiraConfig(r=4, target_modules=QV, modules_to_save=["q_norm"], task_type="CAUSAL_LM"),
    ),
    "bert-lm": ("BertForMaskedLM", {}, peft.LoraConfig(r=4, target_modules=["value"], bias="all")),
    "bert": ("BertForSequenceClassification", {}, peft.LoraConfig(**SEQ, target_modules=["query", "output.dense"])),
    "bert-tokens": (
        "BertForTokenClassification",
        {},
        peft.HiraConfig(r=4, target_modules=["key"], task_type="TOKEN_CLS"),
    ),
    "roberta-ia3": (
        "RobertaForSequenceClassification",
        {},
        peft.IA3Config(
            task_type="SEQ_CLS", target_modules=["key", "output.dense"], feedforward_modules=["output.dense"]
        ),
    ),
    "roberta-norms": (
        "RobertaForSequenceClassification",
        {},
        peft.LoHaConfig(**SEQ, target_modules=["key"], modules_to_save=["LayerNorm", "classifier"]),
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families_and_trained_heads(name, tmp_path):
    architecture, sizes, config = FAMILIES[name]
    torch.manual_seed(0)
    model_class = getattr(transformers, architecture)
    plain = model_class(model_class.config_class(**SIZES, **sizes)).eval()
    plain.save_pretrained(tmp_path / "base")
    ids = np.random.default_rng(0).integers(3, 61, (2, 9))
    mask = np.ones_like(ids)
    theirs = random_peft(plain, config)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = torch_logits(theirs, ids, mask)
    model, params, _ = hx.hf.load_pretrained(tmp_path / "base")
    injection, adapters, base = hx.hf.load_adapter(tmp_path / "theirs", model, params)
    found = merged_logits(model, params, injection, adapters, base, (ids, mask))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(expected - torch_logits(plain, ids, mask)).max() > 1e-2
    hx.hf.save_adapter(tmp_path / "back", model, injection, adapters, base=base)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "back").eval()
    np.testing.assert_allclose(torch_logits(again, ids, mask), expected, atol=1e-4)
    theirs_, back = tensors_in(tmp_path / "theirs"), tensors_in(tmp_path / "back")
    assert_same(back, {key: value for key, value in theirs_.items() if not key.endswith("decoder.bias")})
    written, original = (json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("back", "theirs"))
    assert written["task_type"] == original["task_type"]


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
def test_a_rank_above_the_matrix_is_the_same_function(config, llama, batch, tmp_path):
    reference = llama()
    lora = peft.LoraConfig(r=16, lora_alpha=8, target_modules=["q_proj", "k_proj"], **config)  # k_proj is [24, 12]
    theirs = random_peft(reference.model, lora)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load(reference, tmp_path / "theirs", scan_layers=False)
    assert_close(merged_logits(*loaded, batch), torch_logits(theirs, *batch), batch[1], reference.logits(*batch))


def test_a_module_to_save_that_the_file_lacks_is_refused(llama, tmp_path):
    reference = llama()
    random_peft(reference.model, CONFIGS["lora-head-saved"]).save_pretrained(tmp_path / "a")
    tensors = tensors_in(tmp_path / "a")
    save_file({key: v for key, v in tensors.items() if "lm_head" not in key}, tmp_path / "a" / WEIGHTS)
    with pytest.raises(CheckpointError, match="lacks the tensors of 'lm_head', which modules_to_save names"):
        load(reference, tmp_path / "a")


@pytest.mark.parametrize("pattern", [".?" * 33 + "[!]", "(?:" * 2000 + ")" * 2000, "(a+)+", "|".join("ab" * 99)])
def test_a_pattern_that_could_take_for_ever_is_refused(pattern, llama, tmp_path):
    reference = llama()
    random_peft(reference.model, peft.LoraConfig(**LORA)).save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"alpha_pattern": {pattern: 16}}))
    with pytest.raises(ConfigError, match="write it simpler"):
        load(reference, tmp_path / "a")


def test_hira_on_a_scaled_embedding_is_refused_both_ways(tmp_path):
    base = parity.reference(parity.decoder_cases()["gemma2, no caps, biases"])
    base.save_pretrained(tmp_path / "base")
    random_peft(base, peft.HiraConfig(r=2, target_modules=["embed_tokens"])).save_pretrained(tmp_path / "a")
    model, params, _ = hx.hf.load_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match="HiRA of a scaled embedding"):
        hx.hf.load_adapter(tmp_path / "a", model, params)
    injection = hx.inject({"embed_tokens": hx.hira(2)})
    with pytest.raises(CheckpointError, match="HiRA of a scaled embedding"):
        hx.hf.save_adapter(tmp_path / "b", model, injection, random_adapters(injection, params))


def test_all_biases_and_a_trained_head_of_an_encoder(tmp_path):
    case = parity_encoders.encoder_cases()["Roberta sequence"]
    base, inputs = case.reference(), case.batch()
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", bias="all")
    theirs = random_peft(base, config)
    theirs.save_pretrained(tmp_path / "a")
    assert any(".original_module." in key for key in tensors_in(tmp_path / "a"))
    model, params, _ = hx.hf.load_pretrained(tmp_path / "base")
    injection, adapters, trained = hx.hf.load_adapter(tmp_path / "a", model, params)
    merged = injection.merge(hx.join(trained, params), adapters)
    np.testing.assert_allclose(case.found(model, merged, inputs), case.expected(theirs, inputs), atol=1e-4)
