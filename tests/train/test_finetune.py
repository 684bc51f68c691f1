"""The loop: what it computes, what it writes, how it stops and continues."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hadamax as hx
from hadamax.models import Decoder
from tests.train.conftest import DECODER
from train import cli, data, finetune, metrics, processes
from train.config import DataConfig
from train.finetune import NotFiniteError, State, make_steps, placement
from train.run import Base, apply_of, initial_trainable, load_run, trainable_shardings


def assert_trees_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def tiny():
    """Base, injection, trainable tree with nonzero factors and a batch of uneven rows."""
    model, mesh = Decoder(DECODER), hx.make_mesh(devices=jax.devices()[:1])
    params = model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    injection = hx.inject({"q_proj": hx.hira(2), "down_proj": hx.lora(2)}, view=model.view)
    trainable = initial_trainable(jax.random.key(1), params, injection, ["norm/scale"])
    trainable["adapters"] = jax.tree.map(lambda leaf: leaf + 0.1, trainable["adapters"])
    rng = np.random.default_rng(0)
    batch = {name: rng.integers(3, 80, (4, 8)).astype(np.int32) for name in ("input_ids", "targets")}
    batch["weights"] = (np.arange(8) < np.array([[8], [1], [3], [5]])).astype(np.float32)
    base = Base(model, jax.device_put(params, hx.param_shardings(params, mesh)), DECODER, None, mesh)
    at = trainable_shardings(base, injection, ["norm/scale"])
    return base, injection, jax.device_put(trainable, at), batch


def steps_of(tiny, grad_accum=1):
    """The optimiser, the steps and the frozen base."""
    base, injection, trainable, _ = tiny
    _, frozen = hx.split(base.params, ["norm/scale"])
    optimizer = optax.sgd(1.0)
    shardings = placement(optimizer, trainable, frozen, base.mesh)
    return optimizer, make_steps(apply_of(base, injection), optimizer, grad_accum, shardings), frozen


def step_once(tiny, grad_accum):
    _, _, trainable, batch = tiny
    optimizer, (train, _), frozen = steps_of(tiny, grad_accum)
    state = State(jax.tree.map(jnp.copy, trainable), optimizer.init(trainable))
    return train(state, frozen, batch)


def test_a_step_descends_the_mean_loss_over_tokens_of_the_merged_model(tiny):
    base, injection, trainable, batch = tiny

    def dense(trainable):
        _, frozen = hx.split(base.params, ["norm/scale"])
        merged = injection.merge(hx.join(trainable["base"], frozen), trainable["adapters"])
        logits = jax.nn.log_softmax(base.model.apply(merged, batch["input_ids"]))
        nll = -jnp.take_along_axis(logits, jnp.asarray(batch["targets"])[..., None], -1)[..., 0]
        return (nll * batch["weights"]).sum() / batch["weights"].sum()

    loss, grads = jax.value_and_grad(dense)(trainable)
    state, values = step_once(tiny, grad_accum=1)
    np.testing.assert_allclose(values["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(values["grad_norm"], optax.tree.norm(grads), rtol=1e-4)
    assert jax.tree.structure(state.trainable) == jax.tree.structure(trainable)
    for new, old, grad in zip(*map(jax.tree.leaves, (state.trainable, trainable, grads)), strict=True):
        np.testing.assert_allclose(old - new, grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("grad_accum", [2, 4])
def test_micro_batches_of_uneven_tokens_give_the_step_of_the_whole_batch(tiny, grad_accum):
    whole, values = step_once(tiny, 1)
    parts, part_values = step_once(tiny, grad_accum)
    np.testing.assert_allclose(part_values["loss"], values["loss"], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(parts.trainable), jax.tree.leaves(whole.trainable), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_the_base_is_an_argument_of_the_step_and_not_a_constant(tiny):
    _, _, trainable, batch = tiny
    optimizer, (train, _), frozen = steps_of(tiny)
    traced = train.trace(State(trainable, optimizer.init(trainable)), frozen, batch)
    assert sum(np.size(constant) for constant in traced.jaxpr.consts) < 100


def test_a_packed_batch_has_the_loss_of_its_records_apart(tiny, tokenizer):
    base, _, trainable, _ = tiny
    records = [data.Record("", {"question": f"{i}+{i}", "answer": str(2 * i)}) for i in range(9)]
    _, (_, evaluate), frozen = steps_of(tiny)
    sums = []
    for packing in (False, True):
        config = DataConfig("", template="none", max_length=16, packing=packing)
        rows = data.rows(data.encode(records, tokenizer, config).examples, config)
        batches = data.eval_batches(rows, 2, hx.batch_sharding(base.mesh))
        sums.append(sum(evaluate(trainable, frozen, batch) for batch in batches))
    assert sums[0][1] == sums[1][1] > 9
    np.testing.assert_allclose(sums[0], sums[1], rtol=1e-5)


def test_a_run_lowers_the_loss_and_leaves_its_records(make_config, tmp_path, capsys):
    config = make_config(
        run={"steps": 30, "log_every": 10, "eval_every": 20, "save_every": 25, "epochs": 9.0},
        optim={"lr": 3e-2},
        adapter={
            "rules": {"q_proj": {"method": "hira", "rank": 2}, "lm_head": {"method": "lora", "rank": 4}},
            "train_base": ["norm/scale"],
        },
    )
    result = finetune.finetune(config)
    out = tmp_path / "run"
    assert result.summary == json.loads((out / "summary.json").read_text())
    assert result.summary["eval_loss_last"] < result.summary["eval_loss_first"] - 0.5
    assert result.summary["method"] == "hira+lora"
    # q_proj [16, 16] at rank 2 in 2 layers, lm_head [16, 80] at rank 4, and the last norm
    assert result.summary["trainable_parameters"] == 2 * 2 * 32 + 4 * 96 + 16
    assert result.summary["tokens_per_second"] > 0
    lines = metrics.read(out / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 10, 20, 25, 30]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 20, 30]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((out / "tensorboard").iterdir())
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["25", "30"]
    assert "step 30/30" in capsys.readouterr().out
    # what is on disk is what was returned
    run = load_run(out)
    assert run.step == 30
    assert_trees_equal(run.trainable["adapters"], result.adapters)
    norm = result.params["params"]["norm"]["scale"]
    np.testing.assert_array_equal(run.trainable["base"]["params"]["norm"]["scale"], norm)
    assert float(jnp.abs(norm - 1).max()) > 1e-3
    assert run.injection.to_config() == result.injection.to_config()


def test_the_given_base_is_not_changed(make_config, base_dir):
    from train.config import ModelConfig
    from train.run import load_base

    base = load_base(ModelConfig(str(base_dir)))
    before = jax.tree.map(np.array, base.params)
    finetune.finetune(make_config(adapter={"train_base": ["norm/scale"]}, optim={"lr": 0.1}), base)
    assert_trees_equal(base.params, before)


def test_base_parameters_alone_can_train(make_config):
    result = finetune.finetune(make_config(adapter={"method": None, "rank": None, "train_base": ["scale"]}))
    assert result.injection is None
    assert result.adapters == {}
    assert result.summary["trainable_parameters"] == 16 * 2 * 2 + 16


def test_rules_choose_methods_by_pattern(make_config):
    rules = {
        "q_proj": {"method": "abba", "rank": 2, "layers": [1]},
        "mlp/up_proj": {"method": "boha", "rank": 2, "blocks": 2},
    }
    rules["**/mlp/up_proj/kernel"] = rules.pop("mlp/up_proj")
    result = finetune.finetune(make_config(adapter={"rules": rules}))
    assert result.summary["method"] == "abba+boha"
    assert jax.tree.leaves(result.adapters["layers/self_attn/q_proj/kernel"])[0].shape[0] == 1


class StopAt:
    """Sends a signal when a step is logged."""

    def __init__(self, monkeypatch, step, signum):
        log = metrics.Metrics.log

        def stopping(self, at, **values):
            log(self, at, **values)
            if at == step and "loss" in values:
                os.kill(os.getpid(), signum)

        monkeypatch.setattr(metrics.Metrics, "log", stopping)


@pytest.mark.parametrize("packing, signum, code", [(False, signal.SIGINT, 130), (True, signal.SIGTERM, 143)])
def test_a_run_stopped_by_a_signal_continues_to_the_same_bits(
    make_config, tmp_path, monkeypatch, capsys, packing, signum, code
):
    def config(name):
        return make_config(
            run={"out": str(tmp_path / name), "steps": 12, "log_every": 1, "eval_every": 4},
            data={"packing": packing},
            adapter={"train_base": ["norm/scale"]},
            optim={"lr": 1e-2, "warmup": 0.2},
        )

    whole = finetune.finetune(config("whole"))
    with monkeypatch.context() as patch:
        StopAt(patch, 5, signum)
        assert cli.run(lambda _: finetune.finetune(config("parts"))) == code
    message = capsys.readouterr().err.strip()
    assert message.startswith(f"stopped by {signal.Signals(signum).name} after step 6; the checkpoint is in")
    assert "\n" not in message
    assert signal.getsignal(signum) == (signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
    resumed = finetune.finetune(config("parts"))
    assert "continuing from step 6 of 12" in capsys.readouterr().out
    assert_trees_equal(resumed.adapters, whole.adapters)
    assert_trees_equal(resumed.params, whole.params)
    figures = [
        [
            (line["step"], line.get("loss"), line.get("eval_loss"))
            for line in metrics.read(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("whole", "parts")
    ]
    assert figures[0] == figures[1]


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(make_config, tmp_path, monkeypatch):
    def poisoned(*args):
        train, evaluate = make_steps(*args)
        count = iter(range(1, 100))

        def bad_after_five(state, frozen, batch):
            state, values = train(state, frozen, batch)
            return state, {**values, "loss": values["loss"] * (jnp.nan if next(count) > 5 else 1)}

        return bad_after_five, evaluate

    monkeypatch.setattr(finetune, "make_steps", poisoned)
    config = make_config(run={"steps": 12, "save_every": 4, "log_every": 12})
    with pytest.raises(NotFiniteError, match="loss is nan at step 6; stopped, the checkpoint of step 4 is kept"):
        finetune.finetune(config)
    assert load_run(tmp_path / "run").step == 4


def test_divergence_is_noticed(make_config):
    with pytest.raises(NotFiniteError, match=r"at step \d.* no checkpoint had been written yet"):
        finetune.finetune(make_config(optim={"lr": 1e30, "clip": 0.0}, run={"steps": 6}))


def test_a_finished_run_is_not_trained_further(make_config):
    first = finetune.finetune(make_config())
    again = finetune.finetune(make_config())
    assert_trees_equal(again.adapters, first.adapters)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"adapter": {"rank": 4}}, r"was made with other adapters: rules\.0\.adapter\.rank was 2, now 4;"),
        ({"adapter": {"train_base": ["norm/scale"]}}, "was made with other train_base"),
        ({"run": {"resume": False}}, "holds step 4; give another run.out"),
    ],
)
def test_another_run_in_the_same_place_is_refused(make_config, change, message):
    finetune.finetune(make_config())
    with pytest.raises(hx.ConfigError, match=message) as caught:
        finetune.finetune(make_config(**change))
    assert "\n" not in str(caught.value)


def test_a_second_signal_has_its_own_effect():
    with processes.signals() as received:
        os.kill(os.getpid(), signal.SIGINT)
        assert received == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.sigtimedwait([], 1)  # where a signal has not been delivered yet


def test_a_finished_run_that_is_started_again_stays_as_it_is(make_config, tmp_path, capsys):
    config = make_config(run={"steps": 2})
    first = finetune.finetune(config)
    files = {name: (tmp_path / "run" / name).read_bytes() for name in ("config.json", "summary.json")}
    again = finetune.finetune(make_config(run={"steps": 2}, optim={"lr": 7.0}))
    assert "run is finished" in capsys.readouterr().out
    assert files == {name: (tmp_path / "run" / name).read_bytes() for name in files}
    assert again.summary == first.summary
    assert_trees_equal(again.adapters, first.adapters)


def test_a_method_that_is_none_and_a_run_folder_that_is_a_file_are_said_before_the_model_is_loaded(
    make_config, tmp_path
):
    model = {"base": str(tmp_path / "nowhere")}
    with pytest.raises(hx.ConfigError, match="unknown method 'hirra'; nearest: 'hira'"):
        finetune.finetune(make_config(model=model, adapter={"method": "hirra"}))
    (tmp_path / "run").touch()
    with pytest.raises(hx.ConfigError, match="run is a file; give a directory"):
        finetune.finetune(make_config(model=model))
