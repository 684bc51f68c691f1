"""What one of several processes has to say, as JSON: `python -m tests.train.process_worker RUN DATA OUT`."""

import json
import sys
from pathlib import Path

import grain
import jax
import numpy as np

import hadamax as hx
from hadamax import paths, tensor_files
from hadamax.hf import load_pretrained
from train import data, processes
from train.config import EvaluateConfig, MeshConfig
from train.evaluate import evaluate
from train.parsing import from_dict


def bytes_read_and_held(directory: str, mesh: jax.sharding.Mesh) -> tuple[int, int]:
    """By this process: from the files, and by its devices, a part that several of them hold counted once."""
    read, into = [], tensor_files._read_into

    def counting(file, view, begin):
        read.append(view.nbytes)
        return into(file, view, begin)

    tensor_files._read_into = counting
    _, params, _ = load_pretrained(directory, mesh=mesh)
    tensor_files._read_into = into
    shards = [(path, s) for path, leaf in paths.leaves(params).items() for s in leaf.addressable_shards]
    return sum(read), sum({(path, str(s.index)): s.data.nbytes for path, s in shards}.values())


def rows_made(mesh: jax.sharding.Mesh) -> tuple[list[int], list[int]]:
    """The rows that this process makes for the third of some batches of 16, and those that its devices hold."""
    made: list[int] = []

    def row(i: int) -> dict[str, np.ndarray]:
        made.append(i)
        return {"input_ids": np.full(4, i, np.int32)}

    batches = data.eval_batches(grain.MapDataset.range(48).map(row), 16, hx.batch_sharding(mesh))
    *_, batch = batches
    held = {int(i) for s in batch["input_ids"].addressable_shards for i in s.data[:, 0]}
    return sorted(i for i in made if i >= 32), sorted(held)


def main(run: str, records: str, out: str) -> None:
    processes.join(MeshConfig())
    base = from_dict(json.loads((Path(run) / "config.json").read_text())).model.base
    meshes = {"fsdp": hx.make_mesh(), "tensor": hx.make_mesh(fsdp=1, tensor=-1), "both": hx.make_mesh(fsdp=4, tensor=2)}
    found = {
        "bytes": {name: bytes_read_and_held(base, mesh) for name, mesh in meshes.items()},
        "rows": {name: rows_made(mesh) for name, mesh in meshes.items()},
        "evaluate": [
            evaluate(EvaluateConfig(records, run, merge=merge, out=f"{out}/{merge}.jsonl", **settings()))
            for merge in (False, True)
        ],
    }
    try:  # as where each machine has a disk of its own
        processes.make_shared(Path(out) / f"disk {jax.process_index()}")
    except hx.ConfigError as error:
        found["refused"] = str(error)
    Path(out, f"{jax.process_index()}.json").write_text(json.dumps(found))


def settings() -> dict:
    return {"max_new_tokens": 4, "batch_size": 8, "limit": 10, "mesh": MeshConfig(fsdp=4, tensor=2)}


if __name__ == "__main__":
    main(*sys.argv[1:])
