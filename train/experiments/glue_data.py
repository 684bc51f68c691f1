"""GLUE's RTE, SST-2 and CoLA from their TSV files: reading, tokenising, batches of few widths, metrics."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hadamax.errors import DataError

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"  # HADAMAX_DATA overrides


class Task(NamedTuple):
    """One of GLUE's tasks.

    Attributes:
        text: columns of the sentences.
        label: column of the label.
        labels: the label's two values, of class 0 and 1.
        head: whether the first line names the columns.
        metric: "accuracy" or "matthews".
        widths: the lengths that batches are padded to; longer texts are cut to the last.
    """

    text: tuple[int, ...]
    label: int
    labels: tuple[str, str]
    head: bool
    metric: str
    widths: tuple[int, ...]


TASKS = {
    "RTE": Task((1, 2), 3, ("entailment", "not_entailment"), True, "accuracy", (32, 48, 64)),
    "SST-2": Task((0,), 1, ("0", "1"), True, "accuracy", (8, 16, 32, 64)),
    "CoLA": Task((3,), 1, ("0", "1"), False, "matthews", (10, 16, 32)),
}


class Examples(NamedTuple):
    """Tokenised texts.

    Attributes:
        ids: `[N, widest]` int32, padded on the right.
        types: `[N, widest]` int32, 0 for the first sentence and 1 for the second.
        lengths: `[N]`, tokens of each.
        labels: `[N]` int32.
    """

    ids: np.ndarray
    types: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray

    def take(self, rows: Any) -> "Examples":
        """Those of some rows."""
        return Examples(*(field[rows] for field in self))


def read(task: str, part: str) -> list[tuple[tuple[str, ...], int]]:
    """The sentences and the class of each line of a task's "train" or "dev" file.

    Raises:
        DataError: a file that is not there, a line with too few columns or an unknown label.
    """
    form = TASKS[task]
    folder = Path(os.environ.get("HADAMAX_DATA") or DATA) / "glue"
    path = folder / f"{task}_{part}.tsv"
    if not path.exists() and (downloaded := folder / task / f"{part}.tsv").exists():
        path = downloaded
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"no GLUE file {path.name} in {folder}; set HADAMAX_DATA to the folder above glue/, GLUE's downloads"
            f" ({task}/{part}.tsv) as they are"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start})") from None
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or (form.head and number == 1):
            continue
        columns = line.rstrip("\r").split("\t")  # quotes are text here
        if len(columns) <= max(*form.text, form.label):
            raise DataError(f"{path}:{number}: {len(columns)} column(s), {task} has {max(*form.text, form.label) + 1}")
        if columns[form.label] not in form.labels:
            known = " and ".join(map(repr, form.labels))
            raise DataError(f"{path}:{number}: label {columns[form.label]!r}; {task} has {known}")
        records.append((tuple(columns[at] for at in form.text), form.labels.index(columns[form.label])))
    if not records:
        raise DataError(f"{path} holds no examples")
    return records


def encode(records: Sequence[tuple[tuple[str, ...], int]], tokenizer: Any, widest: int) -> Examples:
    """Records as token ids; of a pair that is too long, the longer sentence is cut."""
    texts = [texts[0] if len(texts) == 1 else texts for texts, _ in records]
    tokenizer.enable_truncation(widest, strategy="longest_first")
    tokenizer.no_padding()
    encoded = tokenizer.encode_batch(texts)
    ids, types = np.zeros((2, len(records), widest), np.int32)
    for at, one in enumerate(encoded):
        ids[at, : len(one.ids)], types[at, : len(one.ids)] = one.ids, one.type_ids
    lengths = np.array([len(one.ids) for one in encoded], np.int32)
    return Examples(ids, types, lengths, np.array([label for _, label in records], np.int32))


class Batch(NamedTuple):
    """Which rows meet: `rows` `[K, B]` of K orders, `weights` `[B]` (0 for filling), `width` their padded length."""

    rows: np.ndarray
    weights: np.ndarray
    width: int


def batches(lengths: np.ndarray, widths: Sequence[int], size: int, seeds: Sequence[int], epoch: int) -> Iterator[Batch]:
    """One epoch: every row once in each of K orders, in batches of rows of nearly one length.

    All orders have the same widths at the same time, so that K trainings can be one program; which rows of a width
    meet, and when, is each seed's own.
    """
    width_of = np.searchsorted(widths, lengths)
    sorted_rows = [np.flatnonzero(width_of == at) for at in range(len(widths))]
    shuffled = [np.random.default_rng((seed, epoch)) for seed in seeds]
    orders = np.stack([np.concatenate([rng.permutation(rows) for rows in sorted_rows]) for rng in shuffled])
    count = orders.shape[1]
    starts = np.arange(0, count, size)
    for start in np.random.default_rng(epoch).permutation(starts):
        rows = orders[:, start : start + size]
        weights = np.arange(size) < rows.shape[1]
        rows = np.pad(rows, [(0, 0), (0, size - rows.shape[1])], mode="edge")
        yield Batch(rows, weights.astype(np.float32), int(widths[width_of[rows].max()]))


def score(metric: str, labels: np.ndarray, predictions: np.ndarray) -> float:
    """Accuracy, or Matthews' correlation.

    Example:
        >>> score("accuracy", np.array([0, 1, 1, 1]), np.array([0, 1, 1, 0]))
        0.75
    """
    if metric == "accuracy":
        return float((labels == predictions).mean())
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predictions))
