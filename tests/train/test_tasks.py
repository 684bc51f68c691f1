"""The synthetic skills are right, and the held-out task is held out."""

import itertools
import json
import random
import re

import pytest

from train import tasks


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ("copy", "zab"),
        ("reverse", "baz"),
        ("sort", "abz"),
        ("capitalize", "ZAB"),
        ("advance", "abc"),
        ("rotate", "abz"),
        ("double", "zzaabb"),
    ],
)
def test_every_step_does_what_its_name_says(step, expected):
    assert tasks.apply((step,), "zab") == expected


def test_advance_keeps_capitals():
    assert tasks.apply(("capitalize", "advance"), "xyz") == "YZA"


def test_steps_are_applied_from_left_to_right():
    assert tasks.apply(("rotate", "double"), "abc") == "bbccaa"


@pytest.mark.parametrize("skill", tasks.SKILLS, ids=lambda skill: skill.__name__)
def test_every_skill_makes_text_records(skill):
    record = skill(random.Random(0))
    assert set(record) == {"instruction", "input", "output"}
    assert record["instruction"] and record["output"]
    assert all(value.isascii() for value in record.values())


def test_word_problems_are_solved():
    rng = random.Random(0)
    for record in (tasks.word_problem(rng) for _ in range(50)):
        sums, result = record["output"].split(" = ")
        assert eval(sums.replace("x", "*")) == int(result.split()[0])


def test_arithmetic_is_right():
    record = tasks.add(random.Random(0))
    assert sum(map(int, record["input"].split())) == int(record["output"])


def test_mixture_follows_from_its_seed():
    first, again, other = (list(itertools.islice(tasks.mixture(seed), 20)) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_shares_add_up_to_one():
    assert sum(tasks.SKILLS.values()) == pytest.approx(1)


def test_base_is_never_shown_the_new_word_nor_the_two_steps_together():
    instructions = {record["instruction"] for record in itertools.islice(tasks.mixture(0), 20_000)}
    a, b = tasks.HELD_OUT
    seen = " ".join(instructions).lower()
    assert "encrypt" not in seen
    assert f"{a} and {b}" not in seen and f"{b} and {a}" not in seen
    assert f"{a}." in seen and f"{b}." in seen  # but each by itself


def test_training_and_test_words_are_disjoint():
    train, test = tasks.held_out(0, 500, 100)
    words = [record["input"] for record in train + test]
    assert (len(train), len(test)) == (500, 100)
    assert len(set(words)) == 600


def test_written_files_are_what_held_out_gives(tmp_path):
    paths = tasks.write(tmp_path / "data", seed=3, n_train=5, n_test=2)
    read = tuple([json.loads(line) for line in path.read_text().splitlines()] for path in paths)
    assert read == tasks.held_out(3, 5, 2)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["test.jsonl", "train.jsonl"]


def test_look_up_answers_from_its_table():
    record = tasks.look_up(random.Random(1))
    key = re.fullmatch(r"Look up (\w)\.", record["instruction"])
    assert key and f"{key[1]}={record['output']}" in record["input"].split()
