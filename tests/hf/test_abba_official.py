"""ABBA's official checkpoints: `torch.save` of `<module>.lora_A1.default`, and a raw configuration."""

import json
import pickle

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import hadamax as hx
from hadamax.errors import CheckpointError, ConfigError
from hadamax.hf.adapters import tensors
from tests.hf.conftest import logits_of, torch_logits

MODULES = [f"model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in "qv"]
R1, R2 = 3, 2


def write(directory, factors, **changes):
    directory.mkdir(exist_ok=True)
    config = {
        "r1": R1,
        "r2": R2,
        "alpha1": 16.0,
        "alpha2": 9.0,
        "dropout": 0.05,
        "target_modules": ["q_proj", "v_proj"],
    }
    (directory / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    torch.save(factors, directory / "adapter_model.bin")


@pytest.fixture
def official(llama, tmp_path):
    """`(reference, directory, {module: (A1, B1, A2, B2)})`."""
    reference = llama()
    torch.manual_seed(0)
    matrices = {}
    for name in MODULES:
        out, n_in = reference.model.get_submodule(name).weight.shape
        shapes = ((R1, n_in), (out, R1), (R2, n_in), (out, R2))
        matrices[name] = tuple((0.1 * torch.randn(shape)).bfloat16() for shape in shapes)
    names = ("A1", "B1", "A2", "B2")
    factors = {f"{m}.lora_{n}.default": f for m, fs in matrices.items() for n, f in zip(names, fs, strict=True)}
    write(tmp_path / "abba", factors)
    return reference, tmp_path / "abba", matrices, factors


@pytest.mark.parametrize("scan", [True, False])
def test_the_scale_is_the_codes_and_not_the_papers(scan, official, batch):
    reference, directory, matrices, _ = official
    model, params, _ = hx.hf.load_pretrained(reference.directory, scan_layers=scan)
    before = reference.logits(*batch)
    injection, adapters, base = hx.hf.load_adapter(directory, model, params)
    merged = injection.merge(hx.join(base, params), adapters)
    found = np.asarray(logits_of(model, merged, *map(jnp.asarray, batch)))
    with torch.no_grad():
        for name, (a1, b1, a2, b2) in matrices.items():  # 12 = sqrt(16 * 9)
            update = 12 * (b1.float() @ a1.float()) * (b2.float() @ a2.float())
            reference.model.get_submodule(name).weight += update
    expected, on = torch_logits(reference.model, *batch), batch[1].astype(bool)
    np.testing.assert_allclose(found[on], expected[on], atol=1e-4)
    assert np.abs(expected - before)[on].max() > 1e-2


@pytest.mark.parametrize(
    ("prefix", "suffix"), [("base_model.model.", "default"), ("model.", "default"), ("", "another_name")]
)
def test_the_names_of_a_wrapped_model_are_understood(prefix, suffix, official):
    reference, directory, _, factors = official
    model, params, _ = hx.hf.load_pretrained(reference.directory)
    expected = hx.hf.load_adapter(directory, model, params)[1]
    write(directory, {prefix + name.replace("default", suffix): value for name, value in factors.items()})
    found = hx.hf.load_adapter(directory, model, params)[1]
    for path, ours in expected.items():
        assert all(np.array_equal(ours[name], found[path][name]) for name in ours)


KEY = f"{MODULES[0]}.lora_B2.default"


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (
            lambda f: {k: v for k, v in f.items() if k != KEY},
            {},
            "lacks tensor 'model.layers.0.self_attn.q_proj.lora_B2'",
        ),
        (lambda f: {**f, KEY: torch.zeros(24, 5)}, {}, r"lora_B2': expected shape \(24, 2\), found \(24, 5\)"),
        (lambda f: {**f, KEY: torch.zeros(24, 2, dtype=torch.int32)}, {}, "dtype torch.int32"),
        (lambda f: {**f, "x.weight": torch.zeros(2)}, {}, "is none of ABBA's"),
        (lambda f: {**f, KEY.replace("default", "b"): torch.zeros(24, 2)}, {}, "holds two adapters of"),
        (
            lambda f: {k.replace("self_attn", "attn"): v for k, v in f.items()},
            {},
            "adapts 4 modules that the model lacks",
        ),
        (lambda f: [1, 2], {}, "must hold named tensors, found list"),
        (lambda f: {}, {}, "adapts no module"),
        (lambda f: f, {"alpha1": None}, "alpha1 must be a positive number, found None"),
        (lambda f: f, {"alpha2": -1}, "alpha2 must be a positive number, found -1"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(change, config, message, official):
    reference, directory, _, factors = official
    model, params, _ = hx.hf.load_pretrained(reference.directory)
    write(directory, change(factors), **config)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        hx.hf.load_adapter(directory, model, params)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("legacy", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(legacy, official, tmp_path):
    reference, directory, _, factors = official
    model, params, _ = hx.hf.load_pretrained(reference.directory)
    factors = {**factors, "x": Malicious(tmp_path / "created")}
    if legacy:
        (directory / "adapter_model.bin").write_bytes(pickle.dumps(factors, protocol=2))
    else:
        torch.save(factors, directory / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="was not executed") as caught:
        hx.hf.load_adapter(directory, model, params)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "created").exists()


def test_without_torch_a_pickle_is_refused_with_the_reason(official, monkeypatch):
    _, directory, _, _ = official
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(CheckpointError, match="only PyTorch reads safely: install torch"):
        tensors.read_torch(directory / "adapter_model.bin")


def test_tensors_that_claim_numbers_they_have_not_are_refused(official):
    reference, directory, _, factors = official
    model, params, _ = hx.hf.load_pretrained(reference.directory)
    claims = {
        "huge": torch.zeros(1, dtype=torch.bfloat16).as_strided((10**7, 10**7), (0, 0)),
        "meta": torch.zeros(3, device="meta"),
    }
    for value in claims.values():
        write(directory, {**factors, "model.layers.0.self_attn.q_proj.lora_A1.default": value})
        with pytest.raises(CheckpointError, match="claims numbers it has not"):
            hx.hf.load_adapter(directory, model, params)
