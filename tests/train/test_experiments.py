"""The experiments at tiny size: what they say of the methods, and how their results are kept."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hadamax as hx
from benchmarks import many
from hadamax.errors import CheckpointError
from train import demo
from train.config import ModelConfig, UsageError
from train.experiments import (
    boha_target,
    digits,
    experiment,
    fitting,
    glue,
    hira_ablations,
    reconstruction,
    sequential,
    sequential_glue,
)
from train.run import load_base

TINY = {"rates": [0.03, 0.1, 0.3], "starts": 2, "steps": 150, "seed": 0}


def test_boha_of_rank_one_blocks_is_exact_where_hira_of_one_rank_less_than_all_is_not():
    rows = boha_target.exact(
        size=12, blocks=[2], bases=["signs", "bounded"], rates=[0.1, 0.3], starts=4, steps=2000, last=1e-10, seed=0
    )
    for base in ("signs", "bounded"):
        error = {row["method"]: row["error"] for row in rows if row["base"] == base}
        assert error["BoHA"] < 1e-10
        assert error["HiRA 4"] < 1e-6
        assert error["HiRA 3"] > 0.05
    bounded_below = [row for row in rows if row.get("bound") is not None]
    assert {row["method"] for row in bounded_below} == {"HiRA 2", "HiRA 3", "HiRA 4"}
    for row in bounded_below:  # the fits reach what no fit can pass
        assert row["bound"] - 1e-9 <= row["error"] <= row["bound"] + 1e-3


def test_fits_of_lora_reach_the_svd_optimum_and_never_pass_it():
    bases, targets = reconstruction.problems(reconstruction.SYNTHETIC, 16, seed=0)
    fits = fitting.fit(hx.lora(4), bases, targets, rates=[0.03, 0.1, 0.3], starts=2, steps=500)
    assert fits.errors.shape == (5, 3, 2)
    for at, wanted in enumerate(np.asarray(targets)):
        optimum = fitting.svd_error(wanted, 4)
        assert (fits.errors[at] > optimum - 1e-5).all()
        assert fits.row(at)["error"] == pytest.approx(optimum, abs=2e-3)


def test_abba_with_both_pairs_lora_style_has_no_gradient_and_never_moves():
    rows = reconstruction.inits(kinds=["gaussian"], size=12, rank=4, **TINY)
    found = {row["init"]: row for row in rows}
    stuck = found["LoRA-style, LoRA-style"]
    assert set(stuck["gradient_norms"].values()) == {0.0}
    assert stuck["error"] == 1.0 and stuck["effective_rank"] == 0.0
    paper = found["SVD, LoRA-style (paper)"]
    assert [name for name, norm in paper["gradient_norms"].items() if norm] == ["b2"]
    assert paper["error"] < 0.95


def test_every_method_of_a_table_trains_the_same_number_of_parameters():
    rows = reconstruction.budget(kinds=["gaussian", "blocks"], size=16, rank=2, **TINY | {"steps": 2})
    assert {row["parameters"] for row in rows if row["method"] != "LoRA, optimum at 2r"} == {64}
    assert len(rows) == 2 * (2 + len(reconstruction.methods(2)))


def test_gradient_norms_are_flat_in_the_rank_where_the_scale_falls_as_one_over_it():
    rows = reconstruction.stability(size=32, ranks=[1, 4, 16], alpha=24.0, base_rms=0.02, rate=0.1, steps=2, seed=0)
    spread = {}
    for name in reconstruction.SCALINGS:
        norms = [row["first"] for row in rows if row["scaling"] == name]
        spread[name] = max(norms) / min(norms)
    paper, once, each_pair, constant = spread.values()
    assert max(paper, once) < 2 and min(each_pair, constant) > 4


def test_hira_over_another_matrix_than_w0_misses_a_target_tied_to_w0():
    rows = hira_ablations.anchors(
        kinds=[hira_ablations.COUPLED],
        of=["W0", "random", "ones", "SVD 4"],
        size=16,
        ranks=[4],
        **TINY | {"steps": 600},
    )
    error = {row["R"]: row["error"] for row in rows}
    assert error["W0"] < 1e-2
    assert min(error["random"], error["ones"], error["SVD 4"]) > 0.1


def test_hira_over_ones_is_lora():
    base, wanted = (x[0] for x in hira_ablations.problems(["gaussian"], 16, 0))
    ones = hira_ablations.anchor("ones", base, jax.random.key(0))
    fits = fitting.fit(hx.hira(4), ones[None], wanted[None], rates=[0.1, 0.3], starts=1, steps=300)
    assert fits.row(0)["error"] == pytest.approx(fitting.svd_error(np.asarray(wanted), 4), abs=5e-3)


def test_hilora_fits_a_mixed_target_that_neither_part_does():
    rows = hira_ablations.splits(kinds=[hira_ablations.MIXED], size=16, rank=8, of=[8, 4, 0], **TINY | {"steps": 800})
    alone, both, lora = (row["error"] for row in rows)
    assert both < 0.5 * min(alone, lora)


def test_digits_learn_the_new_ones_and_lose_the_old():
    data = digits.load()
    base = digits.pretrained(data, steps=150)
    before = [float(digits.accuracy(base, split)) for split in (data.old_test, data.new_test)]
    assert before[0] > 0.9 and before[1] < 0.1
    injection = hx.inject({"**/kernel": hx.hira(2)})
    row = digits.adapt(
        lambda factors: injection.merge(base, factors),
        lambda key: injection.init(key, base),
        data,
        rates=[0.01, 0.1],
        starts=1,
        steps=60,
    )
    assert row["new_accuracy"] > 0.85 and row["loss"] < 0.3
    assert row["old_accuracy"] < before[0]


def test_finished_parts_are_not_run_again_and_a_broken_run_keeps_them(tmp_path, capsys):
    path, calls = tmp_path / "results" / "x.json", []

    def compute(value, fail=False):
        calls.append(value)
        if fail:
            raise ValueError("no")
        return [{"error": value}]

    parts = {"one": (compute, {"value": 1.0}), "two": (compute, {"value": 2.0, "fail": True})}
    with pytest.raises(ValueError, match="no"):
        experiment.run_parts(path, parts)
    assert list(json.loads(path.read_text())) == ["one"]
    parts["two"] = (compute, {"value": float("2.0")})
    results = experiment.run_parts(path, parts)
    assert calls == [1.0, 2.0, 2.0]
    assert [results[name]["rows"] for name in ("one", "two")] == [[{"error": 1.0}], [{"error": 2.0}]]
    parts["one"] = (compute, {"value": 3.0})  # other settings
    experiment.run_parts(path, parts)
    assert calls == [1.0, 2.0, 2.0, 3.0]
    path.write_text('{"one": {}}')  # damaged: run again
    assert list(experiment.run_parts(path, {"one": parts["one"]})) == ["one"] and calls[4:] == [3.0]
    with pytest.raises(UsageError, match="--only on: no part of that name; nearest: 'one'"):
        experiment.run_parts(path, parts, only="on")
    path.write_text("[")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        experiment.run_parts(path, parts)


def tiny(module):
    """The module's parts at tiny size."""
    small = {
        "size": 16,
        "ranks": [2, 4],
        "rank": 4,
        "rates": [0.01, 0.1, 0.3],
        "starts": 1,
        "steps": 3,
        "alphas": [4, 24],
        "blocks": [2],
    }
    parts = {}
    for name, (compute, settings) in module.PARTS.items():
        changed = settings | {key: value for key, value in small.items() if key in settings}
        if "kinds" in settings:
            changed["kinds"] = [kind for kind in settings["kinds"] if kind != "fine-tuning"][:2]  # that has one size
        if module is hira_ablations:
            changed["of"] = [4, 0] if name == "splits" else ["W0", "ones"]
        if name == "toy" and "splits" in settings:
            changed["splits"] = [2]
        if name.startswith("rank "):
            changed["rank"] = min(settings["rank"], 8)
        parts[name] = (compute, changed)
    return parts


@pytest.mark.parametrize("module", [reconstruction, boha_target], ids=lambda module: module.__name__.split(".")[-1])
def test_each_experiment_writes_json_a_table_and_a_figure(module, tmp_path, monkeypatch, capsys):
    name = module.__name__.split(".")[-1]
    monkeypatch.setattr(module, "PARTS", tiny(module))
    module.main(["--out", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.json", f"{name}.md", f"{name}.png"]
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    report = (tmp_path / f"{name}.md").read_text()
    assert "## How it was run" in report and '"seed"' not in report and "seed = 0" in report
    module.main(["--out", str(tmp_path)])
    assert capsys.readouterr().out.count(": there") == len(module.PARTS)


COMMITTED = (reconstruction, boha_target, hira_ablations, digits, sequential, glue, sequential_glue, many)


@pytest.mark.parametrize("module", COMMITTED, ids=lambda module: module.__name__.split(".")[-1])
def test_committed_results_are_whole_and_hold_the_settings_of_the_code(module):
    """The tables that are quoted come from the parts as they stand."""
    name = module.__name__.split(".")[-1]
    results = json.loads((experiment.RESULTS / f"{name}.json").read_text())
    settings = {part: json.loads(json.dumps(values)) for part, (_, values) in module.PARTS.items()}
    assert {part: result["settings"] for part, result in results.items()} == settings
    assert (experiment.RESULTS / f"{name}.md").read_text().startswith(module.report(results).strip())


def test_several_adapters_are_compiled_from_shapes_as_from_arrays():
    base = load_base(ModelConfig(str(demo.BASE)))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), base.params)
    programs = []
    for params in (base.params, shapes):
        made = many.program(base._replace(params=params), "LoRA", 2, 2)
        state = jax.eval_shape(made.begin, params)
        state = jax.tree.map(lambda leaf, at: leaf.update(sharding=at), state, made.shardings.state)
        programs.append(made.train.lower(state, made.frozen, many.rows_of(1, 8, made)).as_text())
    assert programs[0] == programs[1]
    (row,) = many.times(["LoRA"], [2], rank=2, batch=1, length=8, rounds=1)
    assert (row["method"], row["K"]) == ("LoRA", 2) and row["smallest"] == row["ratio"] == row["largest"]


def test_effective_rank_of_a_product_of_orthogonal_matrices_is_its_size():
    q = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (6, 6)))[0]
    assert fitting.effective_rank(np.asarray(q)) == pytest.approx(6, abs=1e-4)
