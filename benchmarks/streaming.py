"""Peak host memory of loading and saving a checkpoint, above the parameters themselves.

    python -m benchmarks.streaming [--gib 2.0] [--dtype bfloat16] [--folder /tmp]

Writes a random Llama in shards of 500 MB to a temporary folder, then loads it, loads it with a cast, saves it and saves
it merged with an adapter, each in a process of its own. A thread samples /proc/self/status every few milliseconds:
`anonymous` is RssAnon, `resident` (VmRSS) also counts the pages of mapped files. What the process has before the step
is left out: the interpreter with JAX and XLA, which load code at their first use, and the parameters that are saved.
The rule: load and save take at most the largest tensor above the parameters.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
MIB = 2**20
STEPS = ("load", "load and cast", "save", "save merged")


class Peak:
    """The largest resident and anonymous memory since `start`, above what they were then."""

    def __init__(self):
        self.start, self.peak, self.done = self.now(), (0, 0), threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()

    @staticmethod
    def now() -> tuple[int, int]:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return tuple(int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon"))

    def watch(self) -> None:
        while not self.done.wait(0.002):
            self.peak = tuple(map(max, self.peak, self.now()))

    def stop(self) -> list[int]:
        self.done.set()
        self.thread.join()
        return [peak - start for peak, start in zip(self.peak, self.start, strict=True)]


def write(folder: Path, gib: float, dtype: str, width: int = 2048, vocabulary: int = 32000) -> None:
    """A random checkpoint of about this size, one tensor at a time."""
    import ml_dtypes
    import numpy as np

    from hadamax.hf.export import _write_weights
    from hadamax.hf.families import build, expected_leaves, tensors, write_config
    from hadamax.models import DecoderConfig
    from hadamax.tensor_files import Piece

    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    layers = max(2, round((gib * 2**30 / kind.itemsize - 2 * vocabulary * width) / (16 * width**2)))
    config = DecoderConfig(vocabulary, width, 4 * width, layers, 4, 4, width // 4, dtype=dtype)
    model, rng = build(config, task="causal_lm"), np.random.default_rng(0)
    leaves = expected_leaves(model)
    pieces = []
    for path, found in tensors(model).items():
        for t in found:
            shape = t.shape(leaves[path].shape)
            pieces.append(Piece(t.name, shape, kind, lambda s=shape: [rng.standard_normal(s, np.float32).astype(kind)]))
    folder.mkdir()
    _write_weights(folder, sorted(pieces), 500 * 10**6)
    (folder / "config.json").write_text(json.dumps(write_config(config, "causal_lm")))


def measure(step: str, folder: Path) -> None:
    """Prints one step's figures as JSON."""
    import jax

    import hadamax as hx
    from hadamax import hf
    from hadamax.tensor_files import stored_tensors

    largest = max(tensor.nbytes for tensor in stored_tensors(folder).values())
    if step.startswith("load"):
        with tempfile.TemporaryDirectory() as tiny:  # the code of JAX and XLA is loaded at its first use
            write(Path(tiny) / "model", 0, "float32", width=8, vocabulary=16)
            hf.load_pretrained(Path(tiny) / "model", dtype="bfloat16")
        peak, began = Peak(), time.perf_counter()
        _, params, config = hf.load_pretrained(folder, dtype="float32" if "cast" in step else None)
        seconds, above = time.perf_counter() - began, peak.stop()
        own = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        above = [bytes - own for bytes in above]
    else:
        model, params, config = hf.load_pretrained(folder)
        own = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        if "merged" in step:
            injection = hx.inject({"*_proj": hx.hira(8)}, view=model.view)
            params = injection.bind(params, injection.init(jax.random.key(0), params))
        peak, began = Peak(), time.perf_counter()
        hf.save_pretrained(folder / "out", model, params, config, max_shard_size="500MB")
        seconds, above = time.perf_counter() - began, peak.stop()
    figures = {"seconds": seconds, "parameters": own / MIB, "largest": largest / MIB}
    print(json.dumps(figures | {"resident": above[0] / MIB, "anonymous": above[1] / MIB}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--folder", help="where the checkpoint is made, and removed afterwards")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        measure(args.step, Path(args.folder))
        return
    print(f"{'MiB':14} {'parameters':>11} {'largest':>8} {'above: resident':>16} {'anonymous':>10} {'seconds':>8}")
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary) / "model"
        write(folder, args.gib, args.dtype)
        for step in STEPS:
            command = [sys.executable, "-m", "benchmarks.streaming", "--step", step, "--folder", str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            f = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{step:14} {f['parameters']:11.0f} {f['largest']:8.0f} {f['resident']:16.0f} {f['anonymous']:10.0f}"
                f" {f['seconds']:8.1f}",
                flush=True,
            )
            for file in (folder / "out").glob("*"):
                file.unlink()
            if (folder / "out").exists():
                (folder / "out").rmdir()


if __name__ == "__main__":
    main()
