"""Parameters on a mesh: the same values, placed by path, and each byte of a file read only where it is held."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from hadamax import paths, tensor_files
from hadamax.errors import ConfigError
from hadamax.hf import load_pretrained, save_pretrained
from hadamax.models import Decoder, DecoderConfig
from hadamax.sharding import param_shardings

CONFIG = DecoderConfig(24, 16, 32, 2, 4, 2, 4)
EXPECTED = {
    "embed_tokens/embedding": P("tensor", "fsdp"),
    "layers/self_attn/q_proj/kernel": P(None, "fsdp", "tensor"),
    "layers/self_attn/o_proj/kernel": P(None, "tensor", "fsdp"),
    "layers/mlp/gate_proj/kernel": P(None, "fsdp", "tensor"),
    "layers/mlp/down_proj/kernel": P(None, "tensor", "fsdp"),
    "layers/input_layernorm/scale": P(None, None),
    "norm/scale": P(None),
    "lm_head/kernel": P("fsdp", "tensor"),
}


def mesh_of(**axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model, directory = Decoder(CONFIG), tmp_path_factory.mktemp("saved") / "out"
    save_pretrained(directory, model, model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)), CONFIG)
    return directory


@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8}, {"tensor": 4}], ids=str)
@pytest.mark.parametrize("scan_layers", [True, False])
def test_loading_onto_a_mesh_gives_the_same_values_in_their_places(saved, axes, scan_layers, monkeypatch):
    read = []
    into = tensor_files._read_into
    _, plain, _ = load_pretrained(saved, scan_layers=scan_layers)
    monkeypatch.setattr(
        tensor_files, "_read_into", lambda file, v, begin: read.append(v.nbytes) or into(file, v, begin)
    )
    mesh = mesh_of(**axes)
    _, params, _ = load_pretrained(saved, mesh=mesh, scan_layers=scan_layers)
    expected = param_shardings(plain, mesh)
    for leaf, value, sharding in zip(*map(jax.tree.leaves, (params, plain, expected)), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        assert leaf.dtype == value.dtype and np.array_equal(leaf, value)
    held = {
        (path, str(s.index)): s.data.nbytes
        for path, leaf in paths.leaves(params).items()
        for s in leaf.addressable_shards
    }
    assert sum(read) == sum(held.values())


def test_rules_by_path():
    shapes = jax.eval_shape(Decoder(CONFIG).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    found = paths.leaves(param_shardings(shapes, mesh_of(data=1, fsdp=2, tensor=4)))
    assert {path: found[path].spec for path in EXPECTED} == EXPECTED
    encoder = {
        "encoder/layer/attention/self/query/kernel": (P(None, "fsdp", "tensor"), (2, 8, 8)),
        "encoder/layer/attention/output/dense/kernel": (P(None, "tensor", "fsdp"), (2, 8, 8)),
        "encoder/layer/intermediate/dense/kernel": (P(None, "fsdp", "tensor"), (2, 8, 8)),
        "encoder/layer/output/dense/kernel": (P(None, "tensor", "fsdp"), (2, 8, 8)),
        "embeddings/word_embeddings/embedding": (P("tensor", "fsdp"), (8, 8)),
        "pooler/dense/kernel": (P(None, None), (8, 8)),
        "encoder/layer/output/dense/bias": (P(None, None), (2, 8)),
    }
    shapes = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, (_, shape) in encoder.items()}
    found = param_shardings(shapes, mesh_of(fsdp=2, tensor=4))
    assert {path: sharding.spec for path, sharding in found.items()} == {
        path: spec for path, (spec, _) in encoder.items()
    }


def test_a_dimension_that_does_not_divide_and_an_axis_that_is_absent_stay_whole():
    shapes = {"q_proj/kernel": jax.ShapeDtypeStruct((6, 16), jnp.float32)}
    assert param_shardings(shapes, mesh_of(fsdp=4, tensor=2))["q_proj/kernel"].spec == P(None, "tensor")
    assert param_shardings(shapes, mesh_of(data=2))["q_proj/kernel"].spec == P(None, None)


def test_an_unknown_mesh_axis_is_refused(saved):
    with pytest.raises(ConfigError, match="mesh axis 'model' is unknown; known: data, fsdp, tensor"):
        load_pretrained(saved, mesh=mesh_of(model=2))


def test_sharded_parameters_save_as_plain_ones_do(saved, tmp_path):
    model, sharded, config = load_pretrained(saved, mesh=mesh_of(fsdp=2, tensor=4))
    save_pretrained(tmp_path / "out", model, sharded, config)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (saved / name).read_bytes()
