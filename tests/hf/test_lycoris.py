"""LyCORIS files: the network's own forward is the reference."""

import copy

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from lycoris import LycorisNetwork
from safetensors.numpy import load_file, save_file

import hadamax as hx
from hadamax.errors import CheckpointError
from tests.hf.conftest import logits_of, torch_logits


@pytest.fixture
def network(monkeypatch):
    """`network(model, algo, names, **options)` -> LyCORIS's network of random weights around a copy, and that copy."""
    for name in ("TARGET_REPLACE_MODULE", "TARGET_REPLACE_NAME", "LORA_PREFIX", "USE_FNMATCH", "ENABLE_CONV"):
        monkeypatch.setattr(LycorisNetwork, name, getattr(LycorisNetwork, name))  # its presets are global

    def make(model, algo, names, prefix="lycoris", **options):
        preset = {"target_module": [], "target_name": names, "use_fnmatch": True, "lora_prefix": prefix}
        LycorisNetwork.apply_preset(preset)
        model = copy.deepcopy(model)
        made = LycorisNetwork(model, 1.0, lora_dim=4, alpha=2, network_module=algo, **options)
        made.apply_to()
        torch.manual_seed(2)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.copy_(0.4 * torch.randn_like(parameter))
        return made, model.eval()

    return make


@pytest.mark.parametrize(
    ("algo", "names", "scan", "prefix"),
    [
        ("loha", ["*_proj"], True, "lycoris"),
        ("loha", ["*layers.1.*.q_proj", "*.up_proj", "lm_head"], False, "mine"),
        ("locon", ["*.v_proj", "*.down_proj"], True, "lycoris"),
    ],
)
def test_a_file_gives_the_networks_logits(algo, names, scan, prefix, network, llama, batch, tmp_path):
    reference = llama()
    made, theirs = network(reference.model, algo, names, prefix)
    made.save_weights(str(tmp_path / "lycoris.safetensors"), torch.float32, None)
    expected = torch_logits(theirs, *batch)
    model, params, _ = hx.hf.load_pretrained(reference.directory, scan_layers=scan)
    injection, adapters, base = hx.hf.load_adapter(tmp_path / "lycoris.safetensors", model, params)
    merged = injection.merge(hx.join(base, params), adapters)
    found = np.asarray(logits_of(model, merged, *map(jnp.asarray, batch)))
    on = batch[1].astype(bool)
    np.testing.assert_allclose(found[on], expected[on], atol=1e-4)
    assert np.abs(expected - reference.logits(*batch))[on].max() > 1e-2
    methods = {rule.adapter.config["method"] for _, rule in injection.rules}
    assert methods == {"loha" if algo == "loha" else "lora"}


@pytest.fixture
def file(network, llama, tmp_path):
    """`(model, params, a directory that holds one LoHa file)`."""
    reference = llama()
    model, params, _ = hx.hf.load_pretrained(reference.directory)
    (tmp_path / "mine").mkdir()
    made, _ = network(reference.model, "loha", ["*.q_proj"])
    made.save_weights(str(tmp_path / "mine" / "x.safetensors"), torch.float32, None)
    return model, params, tmp_path / "mine" / "x.safetensors"


Q = "lycoris_model_layers_0_self_attn_q_proj"


def test_ranks_and_alphas_of_layers_may_differ_and_an_absent_alpha_is_the_rank(file):
    model, params, path = file
    tensors = load_file(path)
    del tensors[f"{Q}.alpha"]
    for name in ("hada_w1_a", "hada_w2_a"):
        tensors[f"{Q}.{name}"] = tensors[f"{Q}.{name}"][:, :3]
    for name in ("hada_w1_b", "hada_w2_b"):
        tensors[f"{Q}.{name}"] = tensors[f"{Q}.{name}"][:3]
    save_file({name: value.copy() for name, value in tensors.items()}, path)
    injection, adapters, _ = hx.hf.load_adapter(path.parent, model, params)
    merged = injection.merge(params, adapters)
    for layer, scale in ((0, 1.0), (1, 0.5)):
        w = {n: tensors[f"{Q.replace('0', str(layer))}.hada_{n}"] for n in ("w1_a", "w1_b", "w2_a", "w2_b")}
        expected = scale * (w["w1_a"] @ w["w1_b"]) * (w["w2_a"] @ w["w2_b"])
        q = [np.asarray(tree["params"]["layers"]["self_attn"]["q_proj"]["kernel"][layer]) for tree in (merged, params)]
        np.testing.assert_allclose((q[0] - q[1]).T, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k.replace("self_attn", "attention"): v for k, v in t.items()}, "no LyCORIS name of a module"),
        (lambda t: {k: v for k, v in t.items() if k != f"{Q}.hada_w2_a"}, "lacks tensor"),
        (lambda t: {**t, f"{Q}.hada_w2_a": np.zeros((3, 4), np.float32)}, r"expected shape \(24, 4\), found \(3, 4\)"),
        (lambda t: {**t, f"{Q}.dora_scale": np.zeros((24, 1), np.float32)}, "holds dora_scale; implemented"),
        (lambda t: {f"{Q}.lokr_w1": np.zeros((2, 2), np.float32)}, "holds lokr_w1; implemented"),
        (lambda t: {**t, f"{Q}.alpha": np.zeros(2, np.float32)}, "should be one number"),
        (lambda t: {}, "no LyCORIS name"),
    ],
)
def test_files_that_do_not_fit_are_refused(change, message, file):
    model, params, path = file
    save_file(change(load_file(path)), path)
    with pytest.raises(CheckpointError, match=message):
        hx.hf.load_adapter(path, model, params)
