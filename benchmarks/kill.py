"""Kills a fine-tuning run again and again, with SIGKILL, and compares what it ends with to a run left alone.

    python -m benchmarks.kill [--kills 20] [--seed 0] [--steps 48] [--folder /tmp]

Each kill is of a fresh `python -m train.finetune` on the shipped base that continues what the killed ones left. Every
other one falls at a random moment, uniform over the time that the whole run took; the rest fall inside a save: a short
random while after orbax's temporary directory was seen. Where a run ends before its kill, it is compared, and the next
begins anew. After the last kill the run may end. Trained arrays, optimiser state, and the steps and losses in
metrics.jsonl must be the same, bit for bit. Exit code 1: they are not.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
ROOT = Path(__file__).parents[1]
SAVE_EVERY, BATCH, RECORDS = 4, 4, 40


def program(out: Path, steps: int) -> subprocess.Popen[str]:
    """The run, as a user starts it. Compiled programs are kept, or compiling would take most of the time."""
    folder = out.parent
    settings = {
        "model.base": ROOT / "train" / "assets" / "base",
        "data.train": folder / "records.jsonl",
        "data.eval_fraction": 0.1,
        "data.max_length": 24,
        "adapter.method": "hira",
        "adapter.rank": 4,
        "adapter.train_base": "[norm/scale]",
        "run.out": out,
        "run.steps": steps,
        "run.batch_size": BATCH,
        "mesh.devices": 1,
        "run.eval_every": 2 * SAVE_EVERY,
        "run.save_every": SAVE_EVERY,
        "run.log_every": 1,
    }
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, "-m", "train.finetune", *(f"--{name}={value}" for name, value in settings.items())]
    log = (folder / "log.txt").open("a")
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **cache}, stdout=log, stderr=log, text=True)


def steps_in(out: Path) -> list[int]:
    """The checkpoints of a run, by the names of their directories."""
    folder = out / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def unfinished(out: Path) -> set[Path]:
    """orbax's temporary directories."""
    return set((out / "checkpoints").glob("*.orbax-checkpoint-tmp"))


def finish(process: subprocess.Popen[str], folder: Path) -> None:
    """Waits for a run that nothing kills."""
    if process.wait():
        sys.exit(f"error: a run failed with code {process.returncode}:\n{(folder / 'log.txt').read_text()[-2000:]}")


def kill(
    process: subprocess.Popen[str], out: Path, left: set[Path], moment: float, aimed: bool, delay: float
) -> set[Path] | None:
    """Kills at `moment` seconds, or, aimed, in the first save that is open after that.

    Returns:
        The temporary directories of its own saves, not those `left` by one killed before; None where the run ended.
    """
    began = time.perf_counter()
    while process.poll() is None:
        left = left & unfinished(out)
        if time.perf_counter() - began >= moment and (not aimed or unfinished(out) - left):
            time.sleep(delay if aimed else 0)
            process.kill()
            return unfinished(out) - left if process.wait() else None
        time.sleep(0.0005)
    return None


def read(out: Path) -> dict[str, Any]:
    """What a finished run left: arrays by name, and the figures of each step."""
    import orbax.checkpoint as ocp

    step, arrays = steps_in(out)[-1], {}
    for item in ("trainable", "state"):
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore(out / "checkpoints" / str(step) / item)
        arrays |= {f"{item}/{name}": array for name, array in tree.items()}
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    figures = [(line["step"], line.get("loss"), line.get("eval_loss")) for line in lines]
    return {"steps": steps_in(out), "arrays": arrays, "figures": figures}


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """What of a finished run is not as in the other."""
    import numpy as np

    ours, theirs = found["arrays"], expected["arrays"]
    names = [name for name in ("steps", "figures") if found[name] != expected[name]]
    names += sorted(ours.keys() ^ theirs.keys())
    same = {
        name: np.asarray(ours[name]).tobytes() == np.asarray(theirs[name]).tobytes() for name in ours if name in theirs
    }
    return names + [name for name, equal in same.items() if not equal]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        records = [{"question": f"{i}+{i % 7}=", "answer": str(i + i % 7)} for i in range(RECORDS)]
        (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        seconds = []
        for out in (
            folder / "whole",
            folder / "again",
        ):  # the first compiles; both are the same, or nothing here counts
            began = time.perf_counter()
            finish(program(out, args.steps), folder)
            seconds.append(time.perf_counter() - began)
        expected = read(folder / "whole")
        wrong = differences(read(folder / "again"), expected)
        print(f"a run of {args.steps} steps, saved every {SAVE_EVERY}: {seconds[1]:.1f} s", flush=True)
        print(f"{'kill':>4}  {'run':>3}  {'aimed at':<8}  {'after s':>7}  {'from step':>9}  {'to step':>7}  save open")
        runs, killed, inside, compared = 1, 0, 0, 0
        while True:
            out = folder / f"run{runs}"
            aimed, moment, delay = killed % 2 == 1, rng.uniform(0, seconds[1]), rng.uniform(0, 0.05)
            start, left = (steps_in(out) or [0])[-1], unfinished(out)
            process, began = program(out, args.steps), time.perf_counter()
            opened = kill(process, out, left, moment, aimed, delay) if killed < args.kills else None
            if opened is not None:
                killed, inside, after = killed + 1, inside + bool(opened), time.perf_counter() - began
                content = [f"{path.name.split('.')[0]} ({len(list(path.iterdir()))} items)" for path in opened]
                row = f"{killed:>4}  {runs:>3}  {'a save' if aimed else 'any time':<8}  {after:>7.2f}  {start:>9}"
                print(f"{row}  {(steps_in(out) or [0])[-1]:>7}  {', '.join(content) or '-'}", flush=True)
                continue
            finish(process, folder)
            wrong += differences(read(out), expected)
            compared, runs = compared + 1, runs + 1
            if killed == args.kills:
                break
        damaged = (folder / "log.txt").read_text().count("is damaged")
    print(f"{killed} kills, {inside} of them with a save open; {damaged} checkpoints were found damaged")
    print(f"{compared} runs ended and were compared, {len(expected['arrays'])} arrays each, with the run left alone")
    if wrong:
        sys.exit(f"error: not the same: {', '.join(sorted(set(wrong)))}")
    print("all the same, bit for bit")


if __name__ == "__main__":
    main()
