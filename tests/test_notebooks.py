"""The notebooks run from top to bottom, and what they keep is theirs and no machine's."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = ["composing", "huggingface", "reading", "reconstruction", "sharding", "tour"]
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def execute(*arguments):
    """In a process of its own, as Jupyter's event loops and warnings are not these tests'."""
    command = [sys.executable, "-m", "notebooks.execute", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_there_are_six_notebooks_and_the_readme_links_them():
    assert [path.stem for path in NOTEBOOKS] == NAMES
    readme = (ROOT / "README.md").read_text()
    assert all(f"(notebooks/{name}.ipynb)" in readme for name in NAMES)


@each
def test_a_notebook_runs_from_top_to_bottom_and_gives_outputs_of_the_kinds_that_are_kept(path):
    kept = path.read_bytes()
    done = execute("--check", path)
    assert done.returncode == 0, done.stderr
    assert path.read_bytes() == kept


@each
def test_what_is_kept_is_of_one_run_with_figures_and_small(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)
    assert path.stat().st_size < 300_000


@each
def test_what_is_kept_names_no_machine_path_and_no_version(path):
    notebook = nbformat.read(path, as_version=4)
    assert all(cell.metadata == {} for cell in notebook.cells)
    assert notebook.metadata.language_info == {"name": "python"}  # not which version
    text = re.sub(r'"image/png": "[^"]*"', "", path.read_text())
    assert not re.search(r"(?<![\w.])/(home|root|tmp|usr|opt|Users|private|var)/", text)
    assert str(ROOT) not in text and str(Path.home()) not in text


@pytest.mark.parametrize(
    "cells, complaint",
    [
        (["1 + 1", "raise ValueError('what is wrong')"], "what is wrong"),
        (["import sys\n_ = sys.stderr.write('noise')"], "cell 1 writes to stderr: noise"),
        (["print('new')"], "the outputs kept are not those of its cells"),
    ],
)
def test_a_notebook_that_raises_is_noisy_or_has_other_outputs_is_named_and_left_alone(cells, complaint, tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    path = tmp_path / "bad.ipynb"
    nbformat.write(notebook, path)
    before = path.read_bytes()
    done = execute("--check", path)
    assert done.returncode == 1 and "bad.ipynb" in done.stderr and complaint in done.stderr
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["bad.ipynb"]


def test_a_notebook_that_is_not_there_is_one_line():
    done = execute("nowhere.ipynb")
    assert done.returncode == 1 and done.stderr.strip() == "no notebook nowhere.ipynb"
