"""Checkpoints: round trips, retention, and one clear error for each kind of damage."""

import errno
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hadamax.checkpoint import Checkpoints
from hadamax.errors import CheckpointError

TRAINABLE = {"adapters": {"layers/q_proj/kernel": {"a": jnp.ones((4, 2)), "b": jnp.zeros((2, 4), jnp.bfloat16)}}}
STATE = {"count": jnp.array(3), "moments": (jnp.arange(3.0), [jnp.arange(4.0)])}


def save(folder, steps=(1,), keep=2):
    with Checkpoints(folder, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, TRAINABLE, STATE, data={"next_index": step}, meta={"seed": 0})
    return folder


def test_trees_and_documents_return_as_they_were(tmp_path):
    with Checkpoints(save(tmp_path)) as checkpoints:
        assert checkpoints.latest() == 1
        for item, tree in (("trainable", TRAINABLE), ("state", STATE)):
            restored = checkpoints.arrays(1, item, jax.eval_shape(lambda tree=tree: tree))
            assert jax.tree.structure(restored) == jax.tree.structure(tree)
            for new, old in zip(jax.tree.leaves(restored), jax.tree.leaves(tree), strict=True):
                assert new.dtype == old.dtype
                np.testing.assert_array_equal(new, old)
        assert checkpoints.json(1, "data") == {"next_index": 1}
        assert checkpoints.json(1, "meta") == {"seed": 0}


def test_a_saved_array_may_be_donated_at_once(tmp_path):
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        x = jnp.zeros((300, 300))
        for i in range(5):
            checkpoints.save(i, {"x": x}, STATE, data={}, meta={})
            x = step(x)
    with Checkpoints(tmp_path) as checkpoints:
        for i in range(5):
            np.testing.assert_array_equal(checkpoints.arrays(i, "trainable", {"x": x})["x"], np.full((300, 300), i))


def test_only_the_newest_are_kept(tmp_path):
    save(tmp_path, steps=(1, 2, 3), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]


def test_a_directory_without_checkpoints(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() is None
    with pytest.raises(CheckpointError, match=r"no checkpoints in .*absent"):
        Checkpoints(tmp_path / "absent", create=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot use .*file"):
        Checkpoints(tmp_path / "file" / "below")


def like(**changes):
    return {"adapters": {"layers/q_proj/kernel": {**TRAINABLE["adapters"]["layers/q_proj/kernel"], **changes}}}


@pytest.mark.parametrize(
    "wanted, message",
    [
        (like(a=jnp.ones((4, 3))), r"tensor 'adapters/.*/kernel/a' .*expected shape \(4, 3\), found \(4, 2\)"),
        (like(c=jnp.ones(5)), r"lacks tensor 'adapters/layers/q_proj/kernel/c', expected of shape \(5,\)"),
        ({"adapters": {}}, r"has tensor 'adapters/layers/q_proj/kernel/a' of shape \(4, 2\), expected none"),
    ],
)
def test_another_tree_is_refused_with_the_tensor_and_both_shapes(tmp_path, wanted, message):
    with Checkpoints(save(tmp_path)) as checkpoints, pytest.raises(CheckpointError, match=message) as caught:
        checkpoints.arrays(1, "trainable", wanted)
    assert "\n" not in str(caught.value)


def test_truncated_arrays_are_refused(tmp_path):
    large = {"adapters": {"q": {"a": jax.random.normal(jax.random.key(0), (200, 200)), "b": jnp.ones(3)}}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, large, STATE, data={}, meta={})
    largest = max(tmp_path.glob("1/trainable/**/d/*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:1000])
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match=r"tensor 'adapters/q/a' in checkpoint .* is damaged") as caught:
            checkpoints.arrays(1, "trainable", large)
        assert "\n" not in str(caught.value)
        for path in tmp_path.glob("1/trainable/**/d/*"):  # the index too
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(CheckpointError, match=f"checkpoint {tmp_path}/1 is damaged"):
            checkpoints.arrays(1, "trainable", large)


@pytest.mark.parametrize("lost", ["trainable/_METADATA", "trainable/manifest.ocdbt", "meta/metadata"])
def test_a_lost_file_is_refused(tmp_path, lost):
    (save(tmp_path) / "1" / lost).unlink()
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match=f"{tmp_path}/1") as caught:
        checkpoints.arrays(1, "trainable", TRAINABLE)
        checkpoints.json(1, "meta")
    assert "\n" not in str(caught.value)


def test_malformed_metadata_is_refused(tmp_path):
    next((save(tmp_path) / "1" / "meta").glob("metadata")).write_text('{"seed": ')
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match="is damaged"):
        checkpoints.json(1, "meta")


@pytest.mark.parametrize(
    "error, reason",
    [
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (ValueError("RESOURCE_EXHAUSTED: Error writing ..."), "No space left on device"),  # what tensorstore raises
    ],
)
@pytest.mark.parametrize("where", ["save", "wait_until_finished"])
def test_a_disk_that_refuses_is_one_clear_line(tmp_path, monkeypatch, error, reason, where):
    def refuse(*args, **kwargs):
        raise error

    with Checkpoints(tmp_path) as checkpoints, monkeypatch.context() as patch:
        patch.setattr(checkpoints._manager, where, refuse)
        with pytest.raises(CheckpointError, match=f"cannot write a checkpoint into {tmp_path}: {reason}"):
            checkpoints.save(1, TRAINABLE, STATE, data={}, meta={})
            checkpoints.wait()


def test_documents_are_plain_json_files(tmp_path):
    assert json.loads((save(tmp_path) / "1" / "meta" / "metadata").read_text()) == {"seed": 0}
