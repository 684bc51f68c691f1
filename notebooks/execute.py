"""Runs the notebooks from top to bottom, and keeps their outputs free of what changes from run to run.

    python -m notebooks.execute                             # all of them, in place (make notebooks)
    python -m notebooks.execute notebooks/tour.ipynb        # one
    python -m notebooks.execute --check                     # run, and write nothing

A cell that raises or writes to stderr ends it, and the notebook stays as it was.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).parent
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(FOLDER.parent),
    # jaxlib 0.10.2 and 0.11.0 end the process in some fused products on CPU (jax issues 39257 and 40412)
    "XLA_FLAGS": "--xla_cpu_experimental_ynn_fusion_type=",
    # tqdm says that there are no widgets; transformers that PEFT asks by an old name
    "PYTHONWARNINGS": "ignore:IProgress not found,ignore:`is_gradient_checkpointing` is deprecated",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
}
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(path: Path) -> Any:
    """The notebook with the outputs of this run, without times, versions and the like.

    Raises:
        RuntimeError: a cell that raises, or that writes to stderr: its notebook, number and text.
    """
    notebook: Any = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=900,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(FOLDER)}},  # where Jupyter runs it, too
    )
    try:
        client.execute(env={**os.environ, **ENVIRONMENT})
    except CellExecutionError as error:
        raise RuntimeError(f"{path.name}: {error}") from None
    for number, cell in enumerate(notebook.cells, 1):
        cell.metadata = {}
        for output in cell.get("outputs", []):
            output.pop("metadata", None) if output.output_type == "stream" else output.update(metadata={})
            if output.get("name") == "stderr":
                raise RuntimeError(f"{path.name}, cell {number} writes to stderr: {output.text}")
    notebook.metadata = METADATA
    return notebook


def kinds(notebook: Any) -> list[list[list[str]]]:
    """For each code cell the kinds of its outputs: what does not depend on rounding."""
    return [
        [sorted(output.get("data", {output.get("name"): None})) for output in cell.outputs]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m notebooks.execute")
    parser.add_argument("notebooks", nargs="*", type=Path, help="all of the folder where none is given")
    parser.add_argument("--check", action="store_true", help="write nothing; the outputs kept must be of these kinds")
    args = parser.parse_args(argv)
    for path in args.notebooks or sorted(FOLDER.glob("*.ipynb")):
        if not path.is_file():
            sys.exit(f"no notebook {path}")
        try:
            notebook = execute(path)
        except RuntimeError as error:
            sys.exit(str(error))
        if args.check:
            if kinds(notebook) != kinds(nbformat.read(path, as_version=4)):
                sys.exit(f"{path.name}: the outputs kept are not those of its cells; run make notebooks")
        else:
            partial = path.with_name(f".{path.name}")
            nbformat.write(notebook, partial)
            os.replace(partial, path)
        print(f"{path.name}: ran", flush=True)


if __name__ == "__main__":
    main()
