"""Mutated adapter directories: every outcome is one clear line, or adapters that fit the model."""

import json

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import hadamax as hx
from hadamax.errors import HadamaxError
from hadamax.models import Decoder, DecoderConfig
from tests.hf.test_fuzz import damaged_file, evil

RULES = {
    "lora": {"q_proj": hx.lora(2), "up_proj": hx.lora(1)},
    "dora": {"{q,down}_proj": hx.dora(2)},
    "loha": {"v_proj": hx.loha(2)},
    "hira": {"o_proj": hx.hira(2)},
    "ia3": {"k_proj": hx.ia3(), "down_proj": hx.ia3(position="input")},
    "gralora": {"q_proj": hx.gralora(2, 2)},
}
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base():
    model = Decoder(DecoderConfig(11, 8, 12, 2, 2, 1, 4))
    return model, model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))


@pytest.fixture(scope="module")
def written(base, tmp_path_factory):
    """Directories of every method, with a trained norm; a LyCORIS file and an official ABBA checkpoint."""
    model, params = base
    folder = tmp_path_factory.mktemp("adapters")
    for name, rules in RULES.items():
        injection = hx.inject(rules, view=model.view)
        trained, _ = hx.split(params, ["norm/scale"])
        hx.hf.save_adapter(folder / name, model, injection, injection.init(jax.random.key(1), params), base=trained)
    rng = np.random.default_rng(0)
    (folder / "abba").mkdir()
    (folder / "abba" / "adapter_config.json").write_text('{"r1": 2, "r2": 2, "alpha1": 4, "alpha2": 4}')
    shapes = {"A1": (2, 8), "B1": (8, 2), "A2": (2, 8), "B2": (8, 2)}
    torch.save(
        {
            f"model.layers.{i}.self_attn.q_proj.lora_{name}.default": torch.tensor(rng.normal(size=shape))
            for i in range(2)
            for name, shape in shapes.items()
        },
        folder / "abba" / "adapter_model.bin",
    )
    return folder


def outcome(base, directory):
    """Loads, or is refused in one line."""
    model, params = base
    try:
        injection, adapters, trained = hx.hf.load_adapter(directory, model, params)
    except HadamaxError as error:
        assert "\n" not in str(error) and 0 < len(str(error)) < 3000
        return
    merged = jax.eval_shape(lambda a: injection.merge(hx.join(trained, params), a), adapters)
    assert jax.tree.map(lambda leaf: leaf.shape, merged) == jax.tree.map(lambda leaf: leaf.shape, params)


@pytest.mark.parametrize("name", [*RULES, "abba"])
def test_mutated_configurations(base, written, tmp_path, name):
    tensors = WEIGHTS if name != "abba" else "adapter_model.bin"
    (tmp_path / tensors).write_bytes((written / name / tensors).read_bytes())
    config = json.loads((written / name / "adapter_config.json").read_text())

    @hypothesis.given(st.sampled_from([*config, "alpha", "use_khatri_rao", "modules_to_save"]), evil)
    @hypothesis.settings(max_examples=60)
    def check(key, value):
        text = json.dumps(config | {key: "EVIL"}).replace('"EVIL"', value)
        (tmp_path / "adapter_config.json").write_bytes(text.encode(errors="surrogatepass"))
        outcome(base, tmp_path)

    check()


@pytest.mark.parametrize("name", RULES)
def test_mutated_tensors(base, written, tmp_path, name):
    (tmp_path / "adapter_config.json").write_bytes((written / name / "adapter_config.json").read_bytes())
    data = (written / name / WEIGHTS).read_bytes()

    @hypothesis.given(damaged_file(data))
    @hypothesis.settings(max_examples=60)
    def check(damaged):
        (tmp_path / WEIGHTS).write_bytes(damaged)
        outcome(base, tmp_path)

    check()


def test_mutated_pickles(base, written, tmp_path):
    (tmp_path / "adapter_config.json").write_bytes((written / "abba" / "adapter_config.json").read_bytes())
    data = (written / "abba" / "adapter_model.bin").read_bytes()

    @hypothesis.given(st.integers(0, len(data) - 1), st.binary(min_size=1, max_size=4), st.booleans())
    @hypothesis.settings(max_examples=100)
    def check(at, replacement, cut):
        damaged = data[:at] + replacement + (b"" if cut else data[at + len(replacement) :])
        (tmp_path / "adapter_model.bin").write_bytes(damaged)
        outcome(base, tmp_path)

    check()


def test_mutated_lycoris_files(base, tmp_path):
    from safetensors.numpy import save

    rng = np.random.default_rng(0)
    shapes = {"hada_w1_a": (8, 2), "hada_w1_b": (2, 8), "hada_w2_a": (8, 2), "hada_w2_b": (2, 8), "alpha": ()}
    module = "lycoris_model_layers_0_self_attn_q_proj"
    data = save({f"{module}.{n}": np.asarray(rng.normal(size=s), np.float32) for n, s in shapes.items()})

    @hypothesis.given(damaged_file(data))
    @hypothesis.settings(max_examples=60)
    def check(damaged):
        (tmp_path / "file.safetensors").write_bytes(damaged)
        outcome(base, tmp_path / "file.safetensors")

    check()
