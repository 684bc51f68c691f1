"""Several adapters at once over one base: each is the run by itself; what is logged, kept, chosen and refused."""

import json
import re
import signal

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import hadamax as hx
from tests.train.test_finetune import StopAt, assert_trees_equal
from train import cli, evaluate, export, finetune, metrics
from train.config import EvaluateConfig, UsageError
from train.group import Group
from train.guard import NotFiniteError
from train.members import Member, members_of, select
from train.run import load_run

# Several methods in one model, clipping, a schedule, micro-batches and a trained norm.
SECTIONS = {
    "adapter": {
        "rules": {
            "q_proj": {"method": "hira", "rank": 2},
            "k_proj": {"method": "abba", "rank": 4},
            "o_proj": {"method": "hadamard_adapter"},
            "up_proj": {"method": "boha", "rank": 4, "blocks": 2},
        },
        "train_base": ["norm/scale"],
    },
    "optim": {"lr": [3e-3, 3e-2, 1e38], "warmup": 0.1, "weight_decay": 0.1, "lr_ratio": 2.0},
}
RUN = {"steps": 20, "batch_size": 8, "grad_accum": 2, "log_every": 1, "eval_every": 10, "save_every": 10}


def at(sections, **changes):
    """The sections with some settings changed, `section={name: value}`."""
    return sections | {name: sections.get(name, {}) | values for name, values in changes.items()}


@pytest.fixture(scope="module")
def several(configure, tmp_path_factory):
    """Two seeds with three rates, of which the last diverges: folder, the configuration's sections, result."""
    out = tmp_path_factory.mktemp("members") / "run"
    sections = at(SECTIONS, run=RUN | {"seed": 3, "seeds": 2})
    return out, sections, finetune.finetune(configure(out, **sections))


def logged(out, name):
    return np.array([line[name] for line in metrics.read(out / "metrics.jsonl") if name in line], float)


def test_each_adapter_is_that_of_the_run_by_itself(several, configure, tmp_path):
    out, sections, result = several
    assert result.summary["trainable_parameters"] == 704 + 16
    seed, lr = members_of(configure(out, **sections))[3]
    assert (seed, lr) == (4, 3e-2)
    alone = at(sections, run={"seed": seed, "seeds": 1}, data={"seed": 3}, optim={"lr": lr})
    single = finetune.finetune(configure(tmp_path / "run", **alone))
    for name, count in (("loss", 20), ("grad_norm", 20), ("eval_loss", 3)):
        together = logged(out, name)
        assert together.shape == (count, 6)
        np.testing.assert_allclose(together[:, 3], logged(tmp_path / "run", name), rtol=1e-5, err_msg=name)
    alone = {"adapters": single.adapters, "base": single.params["params"]["norm"]}
    for member in (2, 3):  # of one rate, and another seed
        kept = load_run(out, member=member).trainable
        together = select({"adapters": result.adapters, "base": result.params["params"]["norm"]}, member)
        assert_trees_equal(kept["adapters"], together["adapters"])
        gaps = [
            np.linalg.norm(a - b) / np.linalg.norm(b)
            for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True)
        ]
        assert max(gaps) < 1e-5 if member == 3 else max(gaps) > 0.1


def test_each_adapter_on_a_mesh_is_that_of_one_device(several, configure, tmp_path):
    out, sections, result = several
    on_mesh = at(sections, mesh={"devices": None, "fsdp": 4, "tensor": 2})
    spread = finetune.finetune(configure(tmp_path / "run", **on_mesh))
    for name in ("loss", "grad_norm", "eval_loss"):
        np.testing.assert_allclose(logged(tmp_path / "run", name), logged(out, name), rtol=1e-5)
    q = spread.adapters["layers/self_attn/q_proj/kernel"]
    assert (q["a"].sharding.spec, q["b"].sharding.spec) == (P(None, None, "fsdp", None), P(None, None, None, "tensor"))
    at_member = load_run(tmp_path / "run", member=1)  # read on one device
    for ours, theirs in zip(
        jax.tree.leaves(at_member.trainable["adapters"]), jax.tree.leaves(select(result.adapters, 1)), strict=True
    ):
        assert np.linalg.norm(ours - theirs) < 1e-4 * np.linalg.norm(theirs)


def test_a_stopped_run_of_several_continues_to_the_same_bits_and_refuses_other_members(
    several, configure, tmp_path, monkeypatch, capsys
):
    out, sections, result = several
    config = configure(tmp_path / "run", **sections)
    with monkeypatch.context() as patch:
        StopAt(patch, 12, signal.SIGTERM)
        assert cli.run(lambda _: finetune.finetune(config)) == 143
    for section, values in (("run", {"seeds": 1}), ("optim", {"lr": [3e-3]}), ("run", {"seed": 2})):
        changed = configure(tmp_path / "run", **at(sections, **{section: values}, data={"seed": 3}))
        with pytest.raises(hx.ConfigError, match=r"with other seeds and learning rates at once: .*; give another run"):
            finetune.finetune(changed)
    resumed = finetune.finetune(config)
    assert "continuing from step 13 of 20" in capsys.readouterr().out
    assert_trees_equal(resumed.adapters, result.adapters)
    for name in ("loss", "eval_loss"):
        np.testing.assert_array_equal(logged(tmp_path / "run", name), logged(out, name))
    assert resumed.summary["members"] == result.summary["members"]


def test_a_learning_rate_that_is_changed_takes_hold_when_several_continue(configure, tmp_path):
    sections = at(SECTIONS, run=RUN | {"steps": 2, "seeds": 2, "save_every": 0}, optim={"lr": 3e-3})
    before = finetune.finetune(configure(tmp_path / "run", **sections))
    sections = at(sections, run={"steps": 4}, optim={"base_lr": 0.0})
    after = finetune.finetune(configure(tmp_path / "run", **sections))
    assert_trees_equal(after.params, before.params)  # norms whose rate is 0
    assert not np.array_equal(*(jax.tree.leaves(result.adapters)[0] for result in (before, after)))


def test_evaluation_and_export_take_the_best_or_the_one_that_is_named(several, records_file, tmp_path, capsys):
    out, _, result = several
    summary = json.loads((out / "summary.json").read_text())
    rows = summary["members"]
    assert [(row["seed"], row["lr"]) for row in rows] == [(s, lr) for lr in (3e-3, 3e-2, 1e38) for s in (3, 4)]
    losses = logged(out, "eval_loss")
    assert [row["eval_loss_last"] for row in rows] == [*losses[-1, :4], None, None]
    best = int(losses[-1, :4].argmin())
    assert summary["best_member"] == best and summary["eval_loss_last"] == losses[-1, best]
    lowest = rows[summary["best_step_member"]]  # what --step best takes, and not always the best at the end
    assert summary["eval_loss_best"] == lowest["eval_loss_best"] == losses[:, :4].min()
    assert summary["best_step"] == lowest["best_step"]
    assert (out / "loss.png").is_file()
    for member, found in ((None, best), (1, 1)):
        capsys.readouterr()
        values = evaluate.evaluate(EvaluateConfig(str(records_file), run=str(out), member=member, max_new_tokens=0))
        loss = capsys.readouterr().out
        assert f"adapter {found} of 6 (seed {rows[found]['seed']}, lr {rows[found]['lr']:g})" in loss
        assert ("lowest held-out loss" in loss) == (member is None)
        native = tmp_path / str(member)
        arguments = [] if member is None else ["--member", str(member)]
        export.main(["--run", str(out), "--out", str(native), "--adapter", "native", *arguments])
        assert f"adapter {found} of 6" in capsys.readouterr().out
        exported = hx.load_adapters(native, result.base.params)
        assert_trees_equal(exported.adapters, select(result.adapters, found))
        assert values["loss"] > 0
    with pytest.raises(hx.ConfigError, match=r"has the adapters 0 to 5, no --member 6"):
        load_run(out, member=6)


def test_an_adapter_that_diverges_is_left_out(several, capsys):
    out, _, result = several
    rows = result.summary["members"]
    assert [row["failed"] is None for row in rows] == [True] * 4 + [False] * 2
    assert re.fullmatch(r"\w+ is (inf|nan) at step \d", rows[4]["failed"]) and result.summary["skipped_steps"] == 0
    assert rows[4]["eval_loss_last"] is None and np.isnan(logged(out, "loss")[-1, 4:]).all()
    with pytest.raises(hx.ConfigError, match="--member 5, was left out: "):
        load_run(out, member=5)


def test_a_run_ends_when_no_adapter_is_left(tmp_path, capsys):
    group = Group((Member(0, 0.1), Member(0, 0.2)))
    fetched = {"loss": np.array([1.0, np.nan]), "grad_norm": np.ones(2), "param_norm": np.ones(2)}
    fetched |= {"skipped_steps": np.array([0, 1]), "bad_in_a_row": np.array([0, 1])}
    assert group.figures([fetched], 5, 0, 0, tmp_path)["loss"] == [1.0, None]
    assert group.evaluated([0.5, 0.1]) == ([0.5, None], 0.5) and group.best() == 0
    fetched["param_norm"][:] = np.inf
    with pytest.raises(NotFiniteError, match=r"^all 2 adapters; the last: param_norm is inf at step 6"):
        group.figures([fetched], 6, 0, 0, tmp_path)
    assert "note: adapter 1 (seed 0, lr 0.2) is left out: loss is nan at step 5\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"run": {"seeds": 0}}, r"run.seeds: 0 is not at least 1"),
        (
            {"run": {"seeds": 2, "patience": 1, "eval_every": 1}},
            r"run.patience: adapters that train at once .* end",
        ),
        ({"optim": {"lr": [0.1, 0.1]}}, r"optim.lr: \[0.1, 0.1\] should be learning rates, each of them once"),
        ({"optim": {"lr": []}}, r"optim.lr: \[\] should be learning rates"),
        (
            {"optim": {"lr": [0.1, 0.2]}, "adapter": {"method": None, "train_base": ["scale"], "rank": None}},
            r"optim.lr: it is for adapters, and adapter.method is null",
        ),
        (
            {"run": {"seeds": 2}, "adapter": {"method": "ia3", "rank": None}},
            r"run.seeds 2: these adapters start",
        ),
        (
            {"run": {"seeds": 2}, "adapter": {"method": None, "train_base": ["scale"], "rank": None}},
            r"run.seeds 2: these adapters start from constants",
        ),
    ],
)
def test_what_cannot_train_at_once_is_refused_in_one_line(make_config, sections, message):
    with pytest.raises(hx.ConfigError, match=message) as caught:
        finetune.finetune(make_config(**sections))
    assert "\n" not in str(caught.value)


def test_a_run_of_one_adapter_has_no_other_member(make_config):
    config = make_config(optim={"lr": [1e-2]}, run={"steps": 1})
    assert members_of(config) == (Member(0, 1e-2),)
    finetune.finetune(config)
    assert load_run(config.run.out, member=0).step == 1
    with pytest.raises(hx.ConfigError, match="has one adapter, no --member 1"):
        load_run(config.run.out, member=1)
    with pytest.raises(UsageError, match="--member chooses an adapter of --run"):
        EvaluateConfig("data", model="base", member=0)
