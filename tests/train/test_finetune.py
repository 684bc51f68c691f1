"""The loop: what it computes, what it writes, how it stops and continues."""

import hashlib
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache

import hadamax as hx
from hadamax.models import Decoder
from tests.train.conftest import DECODER
from train import cli, data, finetune, flops, manifest, metrics, processes, program
from train.config import DataConfig
from train.guard import NotFiniteError, guard
from train.run import Base, apply_of, initial_trainable, load_run, trainable_shardings
from train.step import State, make_steps, placement


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
    optimizer = guard(optax.sgd(1.0))
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


def poison(monkeypatch, values):
    """Replaces the weights of some training batches, counted from 1: `{6: nan}` makes the loss of step 6 NaN."""
    build = data.train_batches

    class Poisoned:
        def __init__(self, *args):
            self.inner, self.count = build(*args), 0

        def __next__(self):
            self.count += 1
            batch = next(self.inner)
            if self.count in values:
                batch = batch | {"weights": np.full_like(batch["weights"], values[self.count])}
            return batch

        def get_state(self):
            return self.inner.get_state() | {"count": self.count}

        def set_state(self, state):
            self.count = state.pop("count")
            self.inner.set_state(state)

    monkeypatch.setattr(data, "train_batches", Poisoned)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(make_config, tmp_path, monkeypatch):
    poison(monkeypatch, {6: np.nan})
    config = make_config(run={"steps": 12, "save_every": 4, "log_every": 12})
    with pytest.raises(NotFiniteError, match="loss is nan at step 6; stopped, the checkpoint of step 4 is kept"):
        finetune.finetune(config)
    assert load_run(tmp_path / "run").step == 4


def test_a_run_that_stopped_at_a_bad_step_continues_when_it_may_skip_it(make_config, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, {6: np.nan, 7: np.nan})
    run = {"steps": 12, "save_every": 4, "log_every": 1}
    with pytest.raises(NotFiniteError):
        finetune.finetune(make_config(run=run))
    with pytest.raises(NotFiniteError, match=r"at step 7, bad step 2 in a row \(optim.max_skips 1\); stopped, the ch"):
        finetune.finetune(make_config(run=run, optim={"max_skips": 1}))
    result = finetune.finetune(make_config(run=run, optim={"max_skips": 2}))
    assert result.summary["skipped_steps"] == 2
    lines = [line for line in metrics.read(tmp_path / "run" / "metrics.jsonl") if "skipped_steps" in line]
    assert [line["skipped_steps"] for line in lines] == [0] * 5 + [1] + [2] * 6
    assert [line["step"] for line in lines if "loss" not in line] == [6, 7]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.adapters))
    assert "2 skipped" in capsys.readouterr().out


def test_skipped_steps_and_the_means_that_tell_spikes_resume_to_the_same_bits(make_config, tmp_path, monkeypatch):
    poison(monkeypatch, {3: np.nan, 9: np.inf})

    def config(name):
        run = {"out": str(tmp_path / name), "steps": 12, "log_every": 1}
        return make_config(run=run, optim={"lr": 1e-2, "max_skips": 1, "spike": 8.0})

    whole = finetune.finetune(config("whole"))
    with monkeypatch.context() as patch:
        StopAt(patch, 5, signal.SIGTERM)
        assert cli.run(lambda _: finetune.finetune(config("parts"))) == 143
    parts = finetune.finetune(config("parts"))
    assert whole.summary["skipped_steps"] == parts.summary["skipped_steps"] == 2
    assert_trees_equal(parts.adapters, whole.adapters)


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


def evaluations(monkeypatch, losses):
    """Evaluation steps that give these losses, one after the other, whatever the parameters are."""

    def scripted(*args):
        train, evaluate = make_steps(*args)
        left = iter(losses)
        return train, jax.jit(
            lambda *args: jax.pure_callback(lambda: np.float32([next(left), 1]), shape) + 0 * evaluate(*args)
        )

    shape = jax.ShapeDtypeStruct((2,), np.float32)
    monkeypatch.setattr(program, "make_steps", scripted)


def test_patience_ends_a_run_whose_held_out_loss_no_longer_falls_also_after_a_resume(
    make_config, tmp_path, monkeypatch, capsys
):
    losses = [5.0, 4.0, 4.5, 3.0, 3.5, 3.25, 2.0]  # before, and after steps 2, 4, ...
    run = {"steps": 20, "eval_every": 2, "log_every": 1, "patience": 2}
    with monkeypatch.context() as patch:
        evaluations(patch, losses)
        whole = finetune.finetune(make_config(run={**run, "out": str(tmp_path / "whole")}))
    assert (whole.summary["steps"], whole.summary["best_step"], whole.summary["eval_loss_best"]) == (10, 6, 3.0)
    assert "stopped after step 10 of 20: no lower held-out loss since step 6 (run.patience)" in capsys.readouterr().out
    config = make_config(run={**run, "out": str(tmp_path / "parts")})
    with monkeypatch.context() as patch:  # a signal at step 8 leaves its evaluation to the continued run
        evaluations(patch, losses)
        StopAt(patch, 7, signal.SIGTERM)
        assert cli.run(lambda _: finetune.finetune(config)) == 143
    with monkeypatch.context() as patch:
        evaluations(patch, losses[4:])
        parts = finetune.finetune(config)
    assert_trees_equal(parts.adapters, whole.adapters)
    assert (parts.summary["steps"], parts.summary["best_step"], parts.summary["eval_loss_last"]) == (10, 6, 3.25)
    assert load_run(tmp_path / "parts").step == 10
    capsys.readouterr()
    again = finetune.finetune(config)
    assert "parts is finished" in capsys.readouterr().out
    assert again.summary == parts.summary


@pytest.fixture
def compiled_names():
    """The name of each function that is compiled, or taken from the cache of compilations, as JAX reports them."""
    names, on = [], [True]

    def listen(event, _, **kwargs):
        if on[0] and event == "/jax/core/compile/backend_compile_duration":
            names.append(kwargs["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    on[0] = False  # there is no public way to take a listener away


def test_a_run_compiles_each_step_once_and_so_does_its_continuation(make_config, monkeypatch, capsys, compiled_names):
    config = make_config(run={"steps": 8, "eval_every": 2, "log_every": 1, "save_every": 3})
    StopAt(monkeypatch, 4, signal.SIGTERM)
    assert cli.run(lambda _: finetune.finetune(config)) == 143
    assert [compiled_names.count(name) for name in ("jit(train)", "jit(evaluate)")] == [1, 1]
    compiled_names.clear()
    finetune.finetune(config)
    assert [compiled_names.count(name) for name in ("jit(train)", "jit(evaluate)")] == [1, 1]


def test_a_batch_of_another_shape_is_one_line_and_not_a_compilation(make_config, monkeypatch, capsys):
    build = data.train_batches

    def shrinking(*args):
        for i, batch in enumerate(build(*args)):
            yield {name: rows[: 4 if i < 2 else 3] for name, rows in batch.items()}

    monkeypatch.setattr(data, "train_batches", shrinking)
    assert cli.run(lambda _: finetune.finetune(make_config())) == 1
    assert capsys.readouterr().err == (
        "error: the training step was compiled for argument 2/input_ids int32[4,24] and called with int32[3,24]; "
        "it would compile again, so keep one shape for a run\n"
    )


def test_a_second_run_takes_its_compilations_from_the_cache(make_config, tmp_path):
    hits, on = [], [True]
    jax.monitoring.register_event_listener(lambda event, **_: on[0] and event == HIT and hits.append(event))
    names = ("compilation_cache_dir", "persistent_cache_min_compile_time_secs", "persistent_cache_min_entry_size_bytes")
    old = {f"jax_{name}": getattr(jax.config, f"jax_{name}") for name in names}
    try:
        for name in ("first", "second"):
            hits.clear()
            jax.clear_caches()
            run = {"out": str(tmp_path / name), "steps": 2, "compilation_cache": str(tmp_path / "cache")}
            finetune.finetune(make_config(run=run))
            assert any((tmp_path / "cache").glob("jit_train-*"))
            if name == "first":
                first = len(hits)
        assert len(hits) >= first + 2  # the two steps at least
    finally:
        on[0] = False
        for name, value in old.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


HIT = "/jax/compilation_cache/cache_hits"


def test_a_cache_that_is_a_file_is_one_line(make_config, records_file):
    with pytest.raises(hx.ConfigError, match=r"run\.compilation_cache: .*sums.jsonl is a file; give a directory"):
        finetune.finetune(make_config(run={"compilation_cache": str(records_file)}))


def test_a_window_of_steps_is_traced_below_the_runs_folder_also_when_the_run_is_cut_short(
    make_config, tmp_path, monkeypatch
):
    StopAt(monkeypatch, 3, signal.SIGTERM)
    config = make_config(run={"steps": 6, "log_every": 1, "profile": [3, 5]})
    assert cli.run(lambda _: finetune.finetune(config)) == 143  # after step 4, inside the window
    assert len(list((tmp_path / "run/profile/process_0").rglob("*.xplane.pb"))) == 1
    with pytest.raises(hx.ConfigError, match=r"run\.profile: begins at step 9, the run ends at step 6"):
        finetune.finetune(make_config(run={"steps": 6, "profile": [9, 10]}))


def test_the_log_has_the_speed_and_on_known_devices_the_utilisation(make_config, tmp_path, monkeypatch):
    result = finetune.finetune(make_config(run={"log_every": 1}))
    line = metrics.read(tmp_path / "run" / "metrics.jsonl")[-2]
    assert line["tokens_per_second"] == line["tokens_per_second_per_device"] > 0 < line["step_seconds"]
    assert "mfu" not in line | result.summary
    monkeypatch.setitem(flops.PEAKS, "cpu", 1e12)
    result = finetune.finetune(make_config(run={"log_every": 1, "out": str(tmp_path / "known")}))
    speed = result.summary["mfu"] * result.summary["step_seconds"] * 1e12  # FLOPs of a step
    assert 1e6 < speed < 1e7


def test_the_manifest_has_every_start_and_no_environment(make_config, tmp_path, monkeypatch, records_file):
    config = make_config(run={"steps": 8, "log_every": 1})
    monkeypatch.setenv("SOME_TOKEN", "very-secret")
    with monkeypatch.context() as patch:
        StopAt(patch, 4, signal.SIGTERM)
        assert cli.run(lambda _: finetune.finetune(config)) == 143
    finetune.finetune(config)
    finetune.finetune(config)  # finished: no start
    text = (tmp_path / "run" / "manifest.json").read_text()
    first, second = json.loads(text)["starts"]
    assert (first["step"], second["step"]) == (0, 5)
    assert first["config"] == json.loads(json.dumps(config.to_dict()))
    assert first["data_sha256"] == {str(records_file): hashlib.sha256(records_file.read_bytes()).hexdigest()}
    assert first["versions"]["jax"] == jax.__version__
    assert (first["device_kind"], first["processes"]) == ("cpu", 1)
    assert "very-secret" not in text
    (tmp_path / "run" / "manifest.json").write_text("[]")
    with pytest.raises(hx.ConfigError, match="is not a run's manifest; move it away"):
        manifest.append(tmp_path / "run" / "manifest.json", {})
