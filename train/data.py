"""Records on disk to fixed-shape token batches: read, tokenise, pack, and a grain pipeline with a position to save.

Every process reads and tokenises all records: packing, the counts of cut and left-out records and the number of steps
depend on all of them. From then on each makes, and puts on its devices, only the rows that these hold.
"""

import bisect
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding

from hadamax.errors import DataError
from train.config import DataConfig
from train.prompts import render, template_text

# Arguments of `Decoder.loss`: input_ids, targets int32 and weights float32, of a row [length], of a batch
# [rows, length]; packed rows also have positions and segment_ids int32.
Row = dict[str, np.ndarray]
Batch = dict[str, jax.Array]


class Record(NamedTuple):
    """A record and where it stands, for messages."""

    where: str
    fields: dict[str, Any]


class Example(NamedTuple):
    """A tokenised record: `ids` int32 [n] and whether each is to be learnt, bool [n]."""

    ids: np.ndarray
    learn: np.ndarray


class Encoded(NamedTuple):
    """Examples, how many were cut to the row's length, and how many had nothing left to learn and were left out."""

    examples: list[Example]
    truncated: int
    dropped: int


def read_records(path: str | Path) -> list[Record]:
    """Records of a JSON array or of a JSONL file.

    Raises:
        DataError: a file that is missing, empty or malformed, with its line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"no data file {path}") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a directory; give a JSON or JSONL file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start})") from None
    if text.lstrip().startswith("["):
        try:
            values = [(f"{path}, record {i}", value) for i, value in enumerate(json.loads(text), 1)]
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}: malformed JSON: {error.msg} (column {error.colno})") from None
    else:
        values = []
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                try:
                    values.append((f"{path}:{number}", json.loads(line)))
                except json.JSONDecodeError as error:
                    message = f"malformed JSON: {error.msg} (column {error.colno})"
                    message += "; give a record a line (JSON Lines), or one JSON list"
                    raise DataError(f"{path}:{number}: {message}") from None
    if not values:
        raise DataError(f"{path} holds no records")
    for where, value in values:
        if not isinstance(value, dict):
            raise DataError(f"{where}: a record should be an object, found {type(value).__name__}")
    return [Record(where, value) for where, value in values]


def load(config: DataConfig, seed: int) -> tuple[list[Record], list[Record]]:
    """Training and held-out records; the latter from their own file or split off by `seed`."""
    train = read_records(config.train)[: config.limit]
    if config.eval is not None:
        return train, read_records(config.eval)
    share = config.eval_fraction
    held_out = round(len(train) * share)
    if share and not 0 < held_out < len(train):
        counted = f"data.eval_fraction {share} of {len(train)} records is {held_out}"
        raise DataError(f"{config.train}: {counted}; give another, data.eval, or 0 for no evaluation")
    order = np.random.default_rng(seed).permutation(len(train))
    return [train[i] for i in sorted(order[held_out:])], [train[i] for i in sorted(order[:held_out])]


def tokenize(records: Sequence[Record], tokenizer: Any, template: str) -> list[list[tuple[list[int], bool]]]:
    """The parts of each record as token ids, and whether the model says them.

    Parts are tokenised apart from each other: a prompt has the same tokens in training, where a response follows, as in
    evaluation.

    Raises:
        DataError: a record without the fields, with its place.
    """
    template, texts, counts = template_text(template), [], []
    for record in records:
        try:
            parts = render(record.fields, template, tokenizer)
        except DataError as error:
            raise DataError(f"{record.where}: {error}") from None
        texts += parts
        counts.append(len(parts))
    # not verbose: it warns of lengths, which `encode` counts
    tokens = iter(tokenizer([part.text for part in texts], add_special_tokens=False, verbose=False)["input_ids"])
    says = iter(part.learn for part in texts)
    bos = tokenizer.bos_token_id
    puts_bos = bos is not None and tokenizer("")["input_ids"][:1] == [bos]
    result = []
    for record, count in zip(records, counts, strict=True):
        pieces = [(list(next(tokens)), next(says)) for _ in range(count)]
        if puts_bos and pieces[0][0][:1] != [bos]:  # a chat template may have written it
            pieces[0][0].insert(0, bos)
        if not ("messages" in record.fields and tokenizer.chat_template):  # which ends each turn itself
            pieces = [([*ids, tokenizer.eos_token_id] if says else ids, says) for ids, says in pieces]
        result.append(pieces)
    return result


def encode(records: Sequence[Record], tokenizer: Any, config: DataConfig) -> Encoded:
    """Tokenised records, cut to the row's length.

    Raises:
        DataError: a record without the fields, with its place; no record with anything to learn.
    """
    limit = config.max_length + 1  # n tokens make n - 1 pairs of input and target
    examples, truncated, dropped = [], 0, 0
    for pieces in tokenize(records, tokenizer, config.template):
        ids = [token for piece, _ in pieces for token in piece]
        learn = [says or not config.response_only for piece, says in pieces for _ in piece]
        truncated += len(ids) > limit
        if any(learn[1:limit]):
            examples.append(Example(np.asarray(ids[:limit], np.int32), np.asarray(learn[:limit])))
        else:
            dropped += 1
    if not examples:
        found = f"none of {len(records)} records has a response"
        raise DataError(f"{found} within data.max_length {config.max_length} tokens")
    return Encoded(examples, truncated, dropped)


def pack(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices of the examples of each row, every row at most `size` long: best fit, longest first.

    Example:
        >>> pack([3, 5, 2, 6], 8)
        [[3, 2], [1, 0]]
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(free, (lengths[i], -1))
        left, row = free.pop(at) if at < len(free) else (size, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        bisect.insort(free, (left - lengths[i], row))
    return rows


def build_row(examples: Sequence[Example], size: int) -> Row:
    """One padded row. Segments count from 1 and positions from 0 in each example; padding is segment 0, weight 0."""
    row: Row = {key: np.zeros(size, np.int32) for key in ("input_ids", "targets", "positions", "segment_ids")}
    row["weights"] = np.zeros(size, np.float32)
    start = 0
    for segment, (ids, learn) in enumerate(examples, 1):
        at = slice(start, start + len(ids) - 1)
        row["input_ids"][at], row["targets"][at], row["weights"][at] = ids[:-1], ids[1:], learn[1:]
        row["positions"][at], row["segment_ids"][at] = np.arange(len(ids) - 1), segment
        start = at.stop
    return row


def rows(examples: Sequence[Example], config: DataConfig) -> grain.MapDataset:
    """Rows of one or, with packing, several examples, made when they are asked for."""
    if config.packing:
        bins = pack([len(example.ids) - 1 for example in examples], config.max_length)
        keys = ("input_ids", "targets", "weights", "positions", "segment_ids")
    else:  # padding follows the tokens, so causal attention needs no mask
        bins = [[i] for i in range(len(examples))]
        keys = ("input_ids", "targets", "weights")

    def row(bin: list[int]) -> Row:
        full = build_row([examples[i] for i in bin], config.max_length)
        return {key: full[key] for key in keys}

    return grain.MapDataset.source(bins).map(row)


class _Batches:
    """Batch `s` has rows `s B` to `s B + B - 1` of a stream, past its end rows of weight 0. A source for grain.

    Each process makes the rows that its devices hold and no others. What stands where follows from `s` alone, so that
    order and position do not depend on the number of devices or processes.
    """

    def __init__(self, stream: grain.MapDataset, count: int, batch_size: int, sharding: NamedSharding):
        self.stream, self.count, self.batch_size, self.sharding = stream, count, batch_size, sharding

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __getitem__(self, index: int) -> Batch:
        start, made = index * self.batch_size, dict[int, Row]()

        def rows(where: Any) -> range:
            return range(self.batch_size)[where[0]]

        for where in self.sharding.addressable_devices_indices_map((self.batch_size,)).values():
            for r in rows(where):  # devices that split a width hold the same rows
                if r not in made:
                    made[r] = self.row(start + r)

        def part(key: str, where: Any) -> np.ndarray:
            return np.stack([made[r][key] for r in rows(where)])

        return {
            key: jax.make_array_from_callback(
                (self.batch_size, *row.shape), self.sharding, functools.partial(part, key)
            )
            for key, row in next(iter(made.values())).items()
        }

    def row(self, i: int) -> Row:
        row: Any = self.stream[min(i, self.count - 1)]
        return row if i < self.count else {key: np.zeros_like(value) for key, value in row.items()}


def _iterator(batches: _Batches) -> grain.DatasetIterator:
    """Made in the background, a few ahead: a batch takes memory on the devices."""
    dataset = grain.MapDataset.source(batches)
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    return iter(dataset.to_iter_dataset(options))  # pyright: ignore[reportReturnType]


def train_batches(rows: grain.MapDataset, batch_size: int, seed: int, sharding: NamedSharding) -> grain.DatasetIterator:
    """Batches without end, reshuffled every epoch; `get_state` and `set_state` give and take the position.

    Args:
        sharding: where rows lie (`hx.batch_sharding`); order and position are the same for any.
    """
    stream = rows.seed(seed).shuffle().repeat(None)
    return _iterator(_Batches(stream, len(stream), batch_size, sharding))


def eval_batches(
    rows: grain.MapDataset, batch_size: int, sharding: NamedSharding, limit: int | None = None
) -> grain.DatasetIterator:
    """Every row once, in order; the last batch is filled up with rows of weight 0."""
    return _iterator(_Batches(rows, min(len(rows), limit or len(rows)), batch_size, sharding))
