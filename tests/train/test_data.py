"""Reading, tokenising, packing and the pipeline's order."""

import json

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hadamax as hx
from hadamax.errors import DataError
from train import data
from train.config import DataConfig
from train.data import Example, Record

ONE = hx.batch_sharding(hx.make_mesh(devices=jax.devices()[:1]))
SUM = {"question": "1 + 2?", "answer": "3"}


def write(path, text):
    path.write_text(text)
    return path


def text_of(tokenizer, ids):
    return "".join(tokenizer.convert_ids_to_tokens([int(i) for i in ids]))


def test_an_array_and_lines_read_alike(tmp_path):
    array = data.read_records(write(tmp_path / "a.json", json.dumps([SUM, SUM], indent=2)))
    lines = data.read_records(write(tmp_path / "a.jsonl", f"{json.dumps(SUM)}\n\n{json.dumps(SUM)}\n"))
    assert [r.fields for r in array] == [r.fields for r in lines] == [SUM, SUM]
    assert [r.where for r in array] == [f"{tmp_path}/a.json, record 1", f"{tmp_path}/a.json, record 2"]
    assert [r.where for r in lines] == [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/a.jsonl:3"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "holds no records"),
        ("\n\n", "holds no records"),
        ("[]", "holds no records"),
        ('{"a": 1}\n{"a": \n', r":2: malformed JSON: .* give a record a line"),
        ('[\n {"a": 1},\n {"a" 2}\n]', r":3: malformed JSON"),
        ('{"a": 1}\n[1]\n', r":2: a record should be an object, found list"),
        ('[{"a": 1}, 3]', r"record 2: a record should be an object, found int"),
    ],
)
def test_malformed_files_are_refused_with_the_line(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        data.read_records(write(tmp_path / "d", text))


def test_wrong_paths_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"no data file .*absent\.json"):
        data.read_records(tmp_path / "absent.json")
    with pytest.raises(DataError, match="is a directory"):
        data.read_records(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="is not UTF-8"):
        data.read_records(tmp_path / "binary")


def test_the_held_out_split_is_disjoint_complete_and_by_seed(records_file):
    config = DataConfig(str(records_file), eval_fraction=0.25)
    train, held_out = data.load(config, seed=0)
    names = [{r.where for r in part} for part in (train, held_out)]
    assert [len(part) for part in (train, held_out)] == [30, 10]
    assert len(names[0] | names[1]) == 40
    assert data.load(config, seed=0)[1] == held_out != data.load(config, seed=1)[1]
    assert data.load(DataConfig(str(records_file), eval_fraction=0.0), seed=0)[1] == []
    with pytest.raises(DataError, match=r"0\.001 of 40 records is 0"):
        data.load(DataConfig(str(records_file), eval_fraction=0.001), seed=0)


def test_only_the_response_and_its_end_are_learnt(tokenizer):
    config = DataConfig("", template="{instruction}=", max_length=16)
    [example], truncated, dropped = data.encode([Record("here", SUM)], tokenizer, config)
    assert text_of(tokenizer, example.ids) == "1 + 2?=3</s>"
    assert text_of(tokenizer, example.ids[example.learn]) == "3</s>"
    assert (truncated, dropped) == (0, 0)
    [example], *_ = data.encode([Record("here", SUM)], tokenizer, DataConfig("", response_only=False))
    assert example.learn.all()


def test_a_first_token_is_put_where_the_tokenizer_puts_one(tokenizer):
    class Bos:
        bos_token_id, eos_token_id, chat_template = 0, tokenizer.eos_token_id, None

        def __call__(self, text, add_special_tokens=True, verbose=True):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [0, *ids] if add_special_tokens else ids}

    [[(prompt, _), (response, _)]] = data.tokenize([Record("here", SUM)], Bos(), "none")
    assert text_of(tokenizer, prompt) == "<pad>1 + 2?"
    assert text_of(tokenizer, response) == "3</s>"


def test_cut_records_are_counted_and_those_without_a_response_left_out(tokenizer):
    records = [Record("a", {"question": "1", "answer": "9" * n}) for n in (1, 30)]
    records.append(Record("b", {"question": "1" * 30, "answer": "2"}))
    encoded = data.encode(records, tokenizer, DataConfig("", template="none", max_length=8))
    assert [len(e.ids) for e in encoded.examples] == [3, 9]
    assert (encoded.truncated, encoded.dropped) == (2, 1)
    with pytest.raises(DataError, match=r"none of 1 records has a response within data\.max_length 8"):
        data.encode(records[2:], tokenizer, DataConfig("", template="none", max_length=8))


def test_a_bad_record_is_named_with_its_place(tokenizer):
    with pytest.raises(DataError, match=r"f\.jsonl:7: no 'instruction'"):
        data.encode([Record("f.jsonl:7", {"text": "x"})], tokenizer, DataConfig(""))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_packing_puts_every_example_into_one_row_that_holds_it(lengths):
    bins = data.pack(lengths, 20)
    assert sorted(i for row in bins for i in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= 20 for row in bins)
    sizes = sorted(sum(lengths[i] for i in row) for row in bins)
    assert len(sizes) == 1 or sizes[0] + sizes[1] > 20, "two rows would have fitted into one"


def test_a_packed_row_predicts_within_each_example_only():
    ids = [np.array([5, 6, 7]), np.array([8, 9])]
    learn = [np.array([False, False, True]), np.array([False, True])]
    row = data.build_row([Example(*pair) for pair in zip(ids, learn, strict=True)], 6)
    assert row["input_ids"].tolist() == [5, 6, 8, 0, 0, 0]
    assert row["targets"].tolist() == [6, 7, 9, 0, 0, 0]
    assert row["weights"].tolist() == [0, 1, 1, 0, 0, 0]
    assert row["positions"].tolist() == [0, 1, 0, 0, 0, 0]
    assert row["segment_ids"].tolist() == [1, 1, 2, 0, 0, 0]


def examples(count):
    return [Example(np.array([3, i, i]), np.array([False, True, True])) for i in range(count)]


def first_ids(batch):
    return batch["targets"][:, 0].tolist()


def test_every_epoch_has_all_rows_in_another_order():
    rows = data.rows(examples(12), DataConfig("", max_length=4))
    batches = data.train_batches(rows, 4, 0, ONE)
    epochs = [[i for _ in range(3) for i in first_ids(next(batches))] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12))
    assert epochs[0] != epochs[1] != list(range(12))
    again = data.train_batches(rows, 4, 0, ONE)
    assert [i for _ in range(3) for i in first_ids(next(again))] == epochs[0]


def test_the_position_continues_after_json():
    rows = data.rows(examples(10), DataConfig("", max_length=4))
    batches = data.train_batches(rows, 4, 0, ONE)
    for _ in range(4):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    expected = [first_ids(next(batches)) for _ in range(5)]
    fresh = data.train_batches(rows, 4, 0, ONE)
    fresh.set_state(state)
    assert [first_ids(next(fresh)) for _ in range(5)] == expected


def test_evaluation_sees_each_row_once_in_full_batches():
    rows = data.rows(examples(5), DataConfig("", max_length=4, packing=False))
    batches = list(data.eval_batches(rows, 4, ONE))
    assert [batch["weights"].sum() for batch in batches] == [8, 2]
    assert {batch["input_ids"].shape for batch in batches} == {(4, 4)}
    assert len(list(data.eval_batches(rows, 4, ONE, limit=4))) == 1


def test_packed_rows_have_segments_and_others_no_mask():
    assert set(data.rows(examples(2), DataConfig("", max_length=4))[0]) == {"input_ids", "targets", "weights"}
    packed = data.rows(examples(2), DataConfig("", max_length=4, packing=True))
    assert len(packed) == 1
    assert set(packed[0]) == {"input_ids", "targets", "weights", "positions", "segment_ids"}
