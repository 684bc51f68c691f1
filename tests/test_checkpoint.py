"""Checkpoints: round trips on any mesh and by several processes, retention, and one clear error for each damage."""

import errno
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from hadamax.checkpoint import Checkpoints, DamagedError
from hadamax.errors import CheckpointError
from hadamax.sharding import make_mesh
from tests.checkpoint_process import arrays, mesh, trees

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


def test_the_best_is_kept_beside_the_newest_also_after_a_restart(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: None, 4: float("nan"), 5: 2.0, 6: 1.0, 7: 4.0, 8: 5.0}
    kept = {3: ([2, 3], 2), 5: ([2, 4, 5], 2), 6: ([5, 6], 6), 8: ([6, 7, 8], 6)}  # of equals the newest
    for steps in ((1, 2, 3), (4, 5), (6,), (7, 8)):
        with Checkpoints(tmp_path, keep=2) as checkpoints:
            for step in steps:
                checkpoints.save(step, TRAINABLE, STATE, data={}, meta={}, loss=losses[step])
        with Checkpoints(tmp_path, create=False) as checkpoints:
            assert (checkpoints.steps(), checkpoints.best()) == kept[steps[-1]]


def test_without_losses_none_is_the_best(tmp_path):
    with Checkpoints(save(tmp_path)) as checkpoints:
        assert checkpoints.best() is None


def test_what_was_left_half_written_is_no_step_and_goes_when_writing_begins(tmp_path):
    save(tmp_path)
    for name in ("2.orbax-checkpoint-tmp", "1.damaged"):  # all is written but the last rename
        shutil.copytree(tmp_path / "1", tmp_path / name)
    with Checkpoints(tmp_path, create=False) as checkpoints:
        assert checkpoints.steps() == [1]
    assert (tmp_path / "2.orbax-checkpoint-tmp").is_dir()  # another process may be writing it
    save(tmp_path, steps=(2,))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "1.damaged", "2"]


def test_a_checkpoint_that_was_set_aside_is_no_step_and_can_be_saved_again(tmp_path):
    for _ in range(2):
        with Checkpoints(save(tmp_path)) as checkpoints:
            checkpoints.set_aside(1)
            assert checkpoints.steps() == []
        assert [path.name for path in tmp_path.iterdir()] == ["1.damaged"]
    assert sound(save(tmp_path))


def test_a_float32_checkpoint_is_read_as_another_dtype_where_that_is_asked_for(tmp_path):
    tree = {"a": jnp.linspace(0, 1, 7)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree, STATE, data={}, meta={})
        checkpoints.wait()
        found = checkpoints.arrays(1, "trainable", {"a": jnp.zeros(7, jnp.bfloat16)})["a"]
    np.testing.assert_array_equal(found, tree["a"].astype(jnp.bfloat16))


def test_a_checkpoint_moves_to_another_mesh_and_to_one_device(tmp_path):
    """Straight onto the shardings of `like`, which may be arrays or only shapes."""
    saved = arrays(mesh(fsdp=4, tensor=2))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, *saved, data={}, meta={})
    others = [arrays(mesh(fsdp=8)), arrays(mesh(data=2, fsdp=2, tensor=2)), jax.tree.map(jnp.asarray, trees())]
    others += [jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), others[0])]
    with Checkpoints(tmp_path, create=False) as checkpoints:
        for like in others:
            for item, wanted, old in zip(("trainable", "state"), like, saved, strict=True):
                found = checkpoints.arrays(1, item, wanted)
                for new, there, expected in zip(*map(jax.tree.leaves, (found, wanted, old)), strict=True):
                    assert new.sharding == there.sharding
                    np.testing.assert_array_equal(new, expected)


def test_arrays_that_were_free_to_move_stay_free(tmp_path):
    sharded = NamedSharding(make_mesh(fsdp=8), PartitionSpec("fsdp"))
    state = {"count": jnp.array(3), "moment": jax.device_put(jnp.arange(8.0), sharded)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, TRAINABLE, state, data={}, meta={})
        checkpoints.wait()
        found = checkpoints.arrays(1, "state", state)
        alone = checkpoints.arrays(1, "trainable", jax.eval_shape(lambda: TRAINABLE))
    assert float((found["count"] * found["moment"]).sum()) == 84  # refused where `count` is bound to one device
    assert isinstance(jax.tree.leaves(alone)[0].sharding, SingleDeviceSharding)


def processes(folder):
    """Two processes of four devices each, which run `tests.checkpoint_process`; the lines that each wrote."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.checkpoint_process", str(folder / "run"), str(port)]
    root, files = Path(__file__).parents[1], [folder / f"{index}.txt" for index in range(2)]
    running = [
        subprocess.Popen([*command, str(index), str(file)], cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for index, file in enumerate(files)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    for process, err in zip(running, errors, strict=True):
        assert process.returncode == 0, err.decode()
    return [file.read_text().splitlines() for file in files]


def test_two_processes_and_one_read_what_the_other_wrote_and_agree_on_what_is_damaged(tmp_path):
    saved = arrays(mesh(fsdp=4, tensor=2))
    with Checkpoints(tmp_path / "run") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, *saved, data={"next_index": step}, meta={"seed": 0})
    for file in (tmp_path / "run" / "2" / "trainable").glob("**/d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    for lines in processes(tmp_path):
        assert lines == [
            "on process 1 alone: DamagedError: torn",
            "step 2: DamagedError",
            "step 1: same, {'next_index': 1}",
            "left: [1]",
            "saved: [5, 6], best 5",
        ]
    with Checkpoints(tmp_path / "run", create=False) as checkpoints:
        assert (checkpoints.steps(), checkpoints.best()) == ([5, 6], 5)
        for item, like in zip(("trainable", "state"), saved, strict=True):
            found = checkpoints.arrays(6, item, like)
            for new, old in zip(*map(jax.tree.leaves, (found, like)), strict=True):
                assert new.sharding == old.sharding
                np.testing.assert_array_equal(new, old)
        assert checkpoints.json(6, "data") == {"next_index": 6}


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


def sound(folder):
    """Whether step 1 is read as it was saved; None where it is refused as damaged, or not even listed."""
    try:
        with Checkpoints(folder, create=False) as checkpoints:
            if checkpoints.latest() != 1:
                return None
            found = checkpoints.arrays(1, "trainable", TRAINABLE), checkpoints.arrays(1, "state", STATE)
            documents = checkpoints.json(1, "data"), checkpoints.json(1, "meta")
    except DamagedError as error:
        assert "\n" not in str(error) and f"checkpoint {folder}/1 is damaged" in str(error)
        return None
    bits = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(found)]
    same = bits == [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((TRAINABLE, STATE))]
    return same and documents == ({"next_index": 1}, {"seed": 0})


def flipped(file, rng):
    """One bit another."""
    content = bytearray(file.read_bytes())
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    file.write_bytes(content)


DAMAGES = {
    "flipped": flipped,
    "cut off": lambda file, rng: file.write_bytes(file.read_bytes()[: rng.integers(file.stat().st_size)]),
    "empty": lambda file, rng: file.write_bytes(b""),
    "lost": lambda file, rng: file.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_noticed_or_was_not_needed(tmp_path, damage):
    rng = np.random.default_rng(0)
    whole = save(tmp_path / "whole")
    files = [path.relative_to(whole) for path in sorted(whole.glob("1/**/*")) if path.is_file() and path.stat().st_size]
    assert sound(whole)
    noticed = set()
    for name in files:
        folder = tmp_path / "damaged"
        shutil.copytree(whole, folder)
        DAMAGES[damage](folder / name, rng)
        result = sound(folder)
        assert result is not False, f"{name} was damaged and passed unnoticed"
        noticed |= {name.parts[1]} if result is None else set()
        shutil.rmtree(folder)
    assert {"trainable", "state", "data", "meta", "check"} <= noticed


def test_a_flipped_bit_of_a_weight_is_noticed(tmp_path):
    """zarr's chunks have no checksum: the value would be read as another number."""
    large = {"q": {"a": jax.random.normal(jax.random.key(0), (200, 200))}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, large, STATE, data={}, meta={})
    file = max(tmp_path.glob("1/trainable/**/d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(DamagedError, match=r"tensor 'q/a' .*\(its checksum"):
        checkpoints.arrays(1, "trainable", large)


@pytest.mark.parametrize("lost", ["trainable", "state", "data", "meta", "check"])
def test_a_lost_item_is_refused(tmp_path, lost):
    shutil.rmtree(save(tmp_path) / "1" / lost)
    assert sound(tmp_path) is None


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


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}, "two leaves have the path 'a/b'"),
        ({"rng": jax.random.key(0)}, "'rng' is key<fry>, no numbers; keep jax.random.key_data of it"),
    ],
)
def test_a_tree_that_cannot_be_kept_is_one_clear_line(tmp_path, tree, message):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match=message):
            checkpoints.save(1, tree, {"count": jnp.ones(1)}, data={}, meta={})
        assert checkpoints.steps() == []


def test_float64_is_not_read_as_damage_where_it_is_off(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with jax.enable_x64(True):
            tree = {"a": jnp.ones(3, jnp.float64)}
            checkpoints.save(1, tree, tree, data={}, meta={})
            checkpoints.wait()
            chex.assert_trees_all_equal(checkpoints.arrays(1, "trainable", tree), tree)
        with pytest.raises(CheckpointError, match=r"tensor .a. in .* is float64; set jax_enable_x64 to read it"):
            checkpoints.arrays(1, "trainable", {"a": jnp.ones(3)})


def test_documents_are_plain_json_files(tmp_path):
    assert json.loads((save(tmp_path) / "1" / "meta" / "metadata").read_text()) == {"seed": 0}
