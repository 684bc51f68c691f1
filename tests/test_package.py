"""The wheel stands alone, and `import hadamax` stays light."""

import ast
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command, cwd=None):
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT)
    (wheel,) = out.glob("*.whl")
    return wheel


def test_wheel_holds_the_library_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "hadamax/__init__.py" in names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"hadamax"}


def test_wheel_installs_into_an_empty_environment(wheel, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel)
    # The dependencies (2 GB) are borrowed from the running environment; a .pth file adds its packages, but does not
    # follow the .pth files in it, so an editable hadamax there stays out of sight.
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = run(python, "-c", "import hadamax; hadamax.lora(4); print(hadamax.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(tmp_path)


def requirements(names):
    """The import names of requirement strings."""
    renamed = {"orbax_checkpoint": "orbax", "pyyaml": "yaml", "scikit_learn": "sklearn"}
    plain = [re.match(r"[\w-]+", name)[0].lower().replace("-", "_") for name in names]
    return {renamed.get(name, name) for name in plain}


@pytest.mark.parametrize(("folder", "extras"), [("hadamax", ()), ("train", ("train", "experiments"))])
def test_every_import_is_declared(folder, extras):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = requirements(project["dependencies"])
    for extra in extras:
        declared |= requirements(project["optional-dependencies"][extra])
    imported = set()
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0].lower() for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").split(".")[0].lower())
    own = {"hadamax", "train", *sys.stdlib_module_names}
    # torch is optional: hadamax.hf reads pickles with it, the demo checks its export with it
    assert imported - own - declared <= ({"torch", "google"} if extras else {"torch"})


def test_import_brings_in_no_model_library():
    heavy = ("flax", "orbax", "transformers", "torch", "optax", "safetensors")
    loaded = run(sys.executable, "-c", "import hadamax, sys; print(*sys.modules)", cwd=ROOT).split()
    assert "jax" in loaded
    assert not set(heavy) & set(loaded)


@pytest.mark.parametrize("name", ["hf", "models", "generate", "checkpoint"])
def test_heavy_parts_come_with_their_first_use(name):
    run(sys.executable, "-c", f"import hadamax; hadamax.{name}", cwd=ROOT)
