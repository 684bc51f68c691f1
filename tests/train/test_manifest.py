"""What the manifest says of the code's version."""

import subprocess

import pytest

from train import manifest


def test_git_state_is_the_commit_and_whether_tracked_files_changed(tmp_path):
    def git(*args):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *args]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "--message", "first")
    (tmp_path / "other").write_text("not tracked")
    assert manifest.git(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "file").write_text("2")
    assert manifest.git(tmp_path)["dirty"]


@pytest.mark.parametrize("missing", ["repository", "git"])
def test_where_there_is_no_repository_or_no_git_the_state_is_null(tmp_path, monkeypatch, missing):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    if missing == "git":
        monkeypatch.setenv("PATH", str(tmp_path))
    assert manifest.git(tmp_path) is None


def test_every_package_is_named_and_an_absent_one_is_null(monkeypatch):
    monkeypatch.setattr(manifest, "PACKAGES", ("jax", "no-such-package"))
    assert list(manifest.versions()) == ["python", "hadamax", "jax", "no-such-package"]
    assert manifest.versions()["no-such-package"] is None
