"""Sequential adaptation at tiny size: how accuracy is told, and what passes from one stage to the next."""

import itertools

import jax
import numpy as np
import pytest

import hadamax as hx
from train import demo, evaluate, pretrain
from train.config import ModelConfig
from train.experiments import retention, sequential
from train.run import load_base
from train.tasks import mixture

SETTINGS = {
    "rank": 4,
    "blocks": 2,
    "seeds": 2,
    "points": [2, 1],
    "every": 2,
    "batch": 2,
    "tests": 4,
    "levels": [0.0, 0.5],
}


def test_exact_match_of_logits_is_that_of_greedy_decoding():
    base = load_base(ModelConfig(str(demo.BASE)))
    short = (record for record in mixture(5) if len(record["instruction"] + record["input"] + record["output"]) < 22)
    records = list(itertools.islice(short, 24))
    rows = sequential.rows_of(base.tokenizer, records)
    logits = jax.jit(base.model.apply)(base.params, rows["input_ids"])
    each = [
        float(sequential.exact_match(logits[i : i + 1], {name: row[i : i + 1] for name, row in rows.items()}))
        for i in range(24)
    ]
    greedy = evaluate.accuracy(base, pretrain.numbered(records), max_new_tokens=14, batch_size=24).correct
    assert each == greedy and 0 < sum(greedy) < 24
    assert float(sequential.exact_match(logits, rows)) == pytest.approx(np.mean(greedy))


def test_stage_2_begins_from_what_stage_1_learnt_continued_or_merged():
    rows = sequential.sequence("BoHA", rates=[[3e-2], [1e-3, 1e-2]], **SETTINGS)
    assert [row["way"] for row in rows] == ["stage 1", *["continued"] * 2, *["merged, fresh"] * 2]
    first, *second = rows
    assert {row["parameters"] for row in rows} == {38912}
    for row in second:
        assert row["curve"][0] == first["curve"][-1]
        assert row["matched"]["0.0"]["reached"] == 2 and len(row["curve"]) == 2
    assert sum(row["chosen"] for row in second) == 2


def test_every_method_has_the_same_budget_and_every_committed_rate_is_swept_alike():
    base = load_base(ModelConfig(str(demo.BASE)))
    sizes = set()
    for adapter in sequential.adapters(8, 4).values():
        injection = hx.inject(dict.fromkeys(sequential.LINEAR, adapter), view=base.model.view)
        sizes.add(injection.summary(base.params).trainable)
    assert sizes == {77824}
    assert {(len(first), len(second)) for first, second in sequential.RATES.values()} == {(3, 4)}


def test_what_is_left_is_read_where_the_second_accuracy_first_reaches_the_level():
    curves = np.array([[[1.0, 0.0], [0.8, 0.5], [0.2, 1.0]], [[0.5, 0.0], [0.5, 0.4], [0.1, 0.4]]])
    found = retention.matched(curves, 0.75)
    assert found["reached"] == 1 and found["absolute"]["mean"] == 0.5 == found["relative"]["mean"]
    assert retention.matched(curves, 0.2)["relative"]["all"] == pytest.approx([0.92, 1.0])
    assert retention.matched(curves[1:], 0.9) == {"reached": 0}
