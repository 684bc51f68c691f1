"""GLUE's experiment at tiny size: a random BERT of two layers and sentences in which one word decides."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hadamax import hf, paths
from hadamax.errors import DataError
from hadamax.models import Encoder, EncoderConfig
from train import cli
from train.experiments import (
    experiment,
    glue,
    glue_analysis,
    glue_data,
    glue_fit,
    glue_study,
    retention,
    sequential_glue,
)
from train.experiments.glue_methods import HADAMARD, METHODS, VARIANTS

WORDS = ["good", "bad", *(f"w{at}" for at in range(12))]
WIDEST = {task: form.widths[-1] for task, form in glue_data.TASKS.items()}
CONFIG = EncoderConfig(
    vocab_size=4 + len(WORDS),
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=32,
    initializer_range=0.2,
)
SMALL = {"train_examples": 96, "seeds": [0, 1], "epochs": 2, "batch": 16, "head": {"rate": 0.03, "steps": 20}}
SWEEP = {"sweep": {"examples": 48, "held_out": 32, "epochs": 1}}


def sentence(rng, label):
    words = [str(word) for word in rng.choice(WORDS[2:], rng.integers(1, 9))]
    words[int(rng.integers(len(words)))] = ("bad", "good")[label]
    return " ".join(words)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    """A Hugging Face directory of a random BERT."""
    return save(tmp_path_factory.mktemp("encoder"), CONFIG)


def save(folder, config) -> str:
    vocabulary = {word: at for at, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(folder / "tokenizer")
    model = Encoder(config, task="sequence_classification")
    params = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 4), jnp.int32))
    hf.save_pretrained(folder / "model", model, params, config, tokenizer_from=folder / "tokenizer")
    return str(folder / "model")


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory):
    """SST-2 and CoLA in files of GLUE's form, where `HADAMAX_DATA` says."""
    folder, rng = tmp_path_factory.mktemp("data") / "glue", np.random.default_rng(0)
    folder.mkdir()
    for part, count in (("train", 120), ("dev", 60)):
        labels = rng.integers(0, 2, (2, count))
        lines = [f"{sentence(rng, label)} \t{label}\n" for label in labels[0]]
        (folder / f"SST-2_{part}.tsv").write_text("sentence\tlabel\n" + "".join(lines))
        lines = [f"gj04\t{label}\t\t{sentence(rng, label)}\n" for label in labels[1]]
        (folder / f"CoLA_{part}.tsv").write_text("".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HADAMAX_DATA", str(folder.parent))
        for task in ("SST-2", "CoLA"):  # one width, one compilation
            patch.setitem(glue_data.TASKS, task, glue_data.TASKS[task]._replace(widths=(12,)))
        yield folder
    glue_study.prepare.cache_clear()
    glue_fit.load.cache_clear()


def test_records_are_read_with_quotes_as_text_and_a_pair_keeps_its_order(tmp_path, monkeypatch):
    (tmp_path / "glue").mkdir()
    monkeypatch.setenv("HADAMAX_DATA", str(tmp_path))
    (tmp_path / "glue" / "RTE_dev.tsv").write_text(
        'index\tsentence1\tsentence2\tlabel\n0\tHe said "no\tHe spoke\tentailment\n1\ta\tb\tnot_entailment\n'
    )
    assert glue_data.read("RTE", "dev") == [(('He said "no', "He spoke"), 0), (("a", "b"), 1)]
    (tmp_path / "glue" / "CoLA_dev.tsv").write_text("gj04\t0\t*\tNot this.\n")
    assert glue_data.read("CoLA", "dev") == [(("Not this.",), 0)]
    (tmp_path / "glue" / "CoLA").mkdir()
    (tmp_path / "glue" / "CoLA" / "train.tsv").write_text("gj04\t1\t\tThis.\n")  # as downloaded
    assert glue_data.read("CoLA", "train") == [(("This.",), 1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no GLUE file SST-2_dev.tsv in .*; set HADAMAX_DATA"),
        ("sentence\tlabel\na film\t1\nanother\n", r"SST-2_dev.tsv:3: 1 column\(s\), SST-2 has 2"),
        ("sentence\tlabel\na film\t2\n", "SST-2_dev.tsv:2: label '2'; SST-2 has '0' and '1'"),
        ("sentence\tlabel\n", "holds no examples"),
        (b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_a_file_that_is_not_there_or_not_of_the_task_is_one_line(tmp_path, monkeypatch, text, message):
    (tmp_path / "glue").mkdir()
    monkeypatch.setenv("HADAMAX_DATA", str(tmp_path))
    path = tmp_path / "glue" / "SST-2_dev.tsv"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message) as error:
        glue_data.read("SST-2", "dev")
    assert "\n" not in str(error.value)


def test_an_epoch_has_every_row_once_in_each_seeds_own_order_and_no_text_is_cut():
    lengths, widths = np.random.default_rng(0).integers(2, 17, 50), (4, 8, 16)
    found = list(glue_data.batches(lengths, widths, 8, [0, 1, 2], epoch=0))
    kept = np.concatenate([batch.rows[:, batch.weights == 1] for batch in found], axis=1)
    assert (np.sort(kept, axis=1) == np.arange(50)).all()
    assert not (kept[0] == kept[1]).all()
    assert all((lengths[batch.rows] <= batch.width).all() and batch.width in widths for batch in found)
    assert sum(batch.weights.sum() for batch in found) == 50 and {batch.rows.shape for batch in found} == {(3, 8)}
    again = list(glue_data.batches(lengths, widths, 8, [1], epoch=0))  # a seed's order is its own, whoever is beside it
    assert all((a.rows[0] == b.rows[1]).all() for a, b in zip(again, found, strict=True))


def test_texts_that_are_too_long_are_cut_to_the_widest(encoder):
    tokenizer = glue_fit.load(encoder).tokenizer
    cut = glue_data.encode([(("w0 w1 w2 w3", "w4"), 1)], tokenizer, 6)
    assert cut.ids.tolist() == [[2, 6, 7, 3, 10, 3]] and cut.types.tolist() == [[0, 0, 0, 0, 1, 1]]
    assert (cut.lengths.tolist(), cut.labels.tolist()) == ([6], [1])


def test_what_the_methods_train_on_minilm_has_the_sizes_of_their_papers():
    """MiniLM's shapes: 6 layers of width 384, the feed-forward's 1,536; no weights are needed to count."""
    config = EncoderConfig(30522, 384, 1536, 6, 12)
    model = Encoder(config, task="sequence_classification")
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 4), jnp.int32))
    base = glue_fit.Base(model, shapes, None)
    found = {name: glue_fit.program(base, method.recipe).trainable for name, method in {**METHODS, **VARIANTS}.items()}
    budget = 6 * 2 * 8 * (384 + 384)
    assert found == {
        HADAMARD: 9216,
        "full fine-tuning": 22_713_986,
        **dict.fromkeys(["LoRA", "LoHa", "HiRA", "ABBA", "BoHA"], budget),
        "BitFit": 6 * (6 * 384 + 1536 + 384) + 384 + 384,
        "LN-tuning": (2 * 6 + 1) * 2 * 384,
        "(IA)^3": 6 * (2 * 384 + 1536),
        **dict.fromkeys(["weight", "bias"], 6 * 384),
        **dict.fromkeys(["norm", "weight + bias"], 6 * 2 * 384),
        "all, classifier too": 9216 + 2 * 384 + 2,
        "all, quadratic": 9216 + 6 * 384,
        "all, cubic": 9216 + 2 * 6 * 384,
    }


@pytest.fixture(scope="module")
def prepared(encoder):
    return glue_study.prepare(encoder, "SST-2", 96)


@pytest.fixture(scope="module")
def two(prepared):
    """The Hadamard Adapter's program, two classifiers and two trainings from them."""
    program = glue_fit.program(prepared.base, METHODS[HADAMARD].recipe)
    classifiers = glue_study.heads(prepared, slice(0, 96), [0, 1], glue_study.Head(0.03, 20))
    return program, classifiers, run(prepared, program, classifiers, [0, 1])


def run(prepared, program, classifiers, seeds, **of):
    sizes = {
        "epochs": 1,
        "batch": 20,
        "rates": [3e-2] * len(seeds),
    }  # 96 is no multiple of 20: the last batch is filled
    return glue_study.trained(prepared, "SST-2", slice(0, 96), program, classifiers, seeds=seeds, **sizes | of)


def test_the_frozen_head_on_first_tokens_is_the_models_own(prepared, two):
    program, classifiers, _ = two
    start, _ = program.start(jnp.stack([jax.random.key(0), jax.random.key(1)]), classifiers)
    found = glue_fit.predict(program, prepared.dev, glue_data.TASKS["SST-2"].widths, start, classifiers)
    expected = jax.vmap(lambda one: glue_fit.head_logits(prepared.base, one, prepared.dev_states))(classifiers)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_roberta_is_trained_in_both_stages_too(tmp_path):
    config = dataclasses.replace(CONFIG, model_type="roberta", type_vocab_size=1, pad_token_id=0)
    model = save(tmp_path, config)
    prepared = glue_study.prepare(model, "SST-2", 96)
    classifiers = glue_study.heads(prepared, slice(0, 96), [0], glue_study.Head(0.03, 20))
    expected = jax.vmap(lambda one: glue_fit.head_logits(prepared.base, one, prepared.dev_states))(classifiers)
    program = glue_fit.program(prepared.base, METHODS[HADAMARD].recipe)
    start, _ = program.start(jax.random.key(0)[None], classifiers)
    found = glue_fit.predict(program, prepared.dev, glue_data.TASKS["SST-2"].widths, start, classifiers)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    _, losses = run(prepared, program, classifiers, [0], epochs=3)
    assert losses[-5:].mean() < losses[:5].mean()


def test_a_training_is_the_same_alone_as_beside_another(prepared, two):
    program, classifiers, (trainable, losses) = two
    assert losses.shape == (5, 2) and not np.allclose(losses[:, 0], losses[:, 1])
    second = jax.tree.map(lambda leaf: leaf[1:], classifiers)
    alone, loss = run(prepared, program, second, [1])
    np.testing.assert_allclose(loss[:, 0], losses[:, 1], rtol=1e-4)
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(trainable), strict=True):
        np.testing.assert_allclose(a[0], b[1], atol=1e-4)


def test_layers_that_are_left_out_stay_where_they_started(prepared, two):
    program, classifiers, (trainable, _) = two
    start, _ = program.start(jnp.stack([jax.random.key(0), jax.random.key(1)]), classifiers)
    scale = glue_analysis.of_layers(start, np.array([False, True]))
    some, _ = run(prepared, program, classifiers, [0, 1], scale=scale)
    for before, after, every in zip(*map(jax.tree.leaves, (start, some, trainable)), strict=True):
        assert (after[:, 0] == before[:, 0]).all()
        assert (after[:, 1] != before[:, 1]).any() and (every[:, 0] != before[:, 0]).any()


def test_the_share_of_the_rate_goes_up_then_down_to_its_last_step():
    shares = [glue_fit.share(step, 40) for step in range(40)]
    assert shares[:4] == [0.25, 0.5, 0.75, 1.0] and shares[-1] == pytest.approx(1 / 36)
    assert glue_fit.share(0, 1) == 1.0


@pytest.mark.parametrize("method", [HADAMARD, "full fine-tuning"])
def test_a_method_learns_which_word_decides(encoder, method):
    rates = {"full fine-tuning": [1e-5, 1e-3]}.get(method, [1e-3, 3e-2])
    sizes = SMALL | {"epochs": 12, "sweep": {"examples": 48, "held_out": 32, "epochs": 8}}
    (row,) = glue_study.compare(encoder, "SST-2", method, rates, **sizes)
    (alone,) = glue_study.classifier_alone(encoder, "SST-2", 96, [0, 1], SMALL["head"])
    assert row["mean"] > {"full fine-tuning": 0.85}.get(method, alone["mean"] + 0.02)
    assert max(row["train_loss"]) < 0.6 < min(alone["train_loss"])
    assert (row["lr"], row["seeds"], row["train_examples"]) == (rates[1], 2, 96)
    assert row["sweep"][0][1] > row["sweep"][1][1]


def tiny_parts(encoder):
    sizes = {"model": encoder} | SMALL | {"epochs": 1}
    head = {key: sizes[key] for key in ("model", "train_examples", "seeds", "head")}
    rates = {"rates": [1e-2, 3e-2]}
    return {
        "SST-2, classifier alone": (glue_study.classifier_alone, {"task": "SST-2"} | head),
        f"SST-2, {HADAMARD}": (glue_study.compare, {"task": "SST-2", "method": HADAMARD} | rates | sizes | SWEEP),
        "SST-2, layers": (glue_analysis.layers, {"task": "SST-2", "judged_by": 32, "rate": 3e-2} | sizes),
        "similarity": (glue_analysis.similarity, {"tasks": ["SST-2", "CoLA"], "rate": 3e-2} | sizes),
    }


def test_parts_run_by_name_and_the_report_holds_what_is_there(encoder, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(glue, "PARTS", tiny_parts(encoder))
    glue.main(["--out", str(tmp_path), "--only", f"*{HADAMARD}"])
    results = json.loads((tmp_path / "glue.json").read_text())
    assert list(results) == [f"SST-2, {HADAMARD}"]
    report = (tmp_path / "glue.md").read_text()
    assert "## SST-2: accuracy, 60 dev examples" in report and "fewer layers" not in report
    glue.main(["--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert out.count(": there") == 1 and "so training takes about" in out
    results = json.loads((tmp_path / "glue.json").read_text())
    assert list(results) == list(glue.PARTS)
    counts = [(len(row["layers"]), row["trainable"]) for row in results["SST-2, layers"]["rows"]]
    assert counts == [(2, 2 * 4 * 16), (1, 4 * 16)]
    rows = results["similarity"]["rows"]
    assert {(row["task"], row["method"]) for row in rows if "mean" in row} == {
        (task, f"{kind} adapter") for task in ("SST-2", "CoLA") for kind in ("own", "shared")
    }
    assert all(-1 <= row["cosine"] <= 1 and len(row["by_layer"]) == 2 for row in rows if "cosine" in row)
    report = (tmp_path / "glue.md").read_text()
    assert "## SST-2: fewer layers" in report and "## Alike across tasks?" in report
    assert (tmp_path / "glue.png").read_bytes().startswith(b"\x89PNG")


def test_a_sequence_begins_its_second_task_from_what_the_first_taught_continued_or_merged(encoder):
    settings = {"model": encoder, "tasks": ["SST-2", "CoLA"], "rank": 2, "blocks": 2, "seeds": [0, 1], "batch": 16}
    sizes = {"train_examples": [80, 32], "dev_examples": 50, "epochs": [8, 2], "points": [1, 2]}
    first, *second = sequential_glue.sequence(
        method="BoHA",
        rates=[[1e-1], [0.0, 1e-1]],
        head={"rate": 0.03, "steps": 20},
        levels=[-1.0],
        **settings | sizes,
    )
    assert [row["way"] for row in second] == ["continued"] * 2 + ["merged, fresh"] * 2
    assert first["curve"][-1][0] > first["curve"][0][0]
    still, moved = (second[0], second[2]), (second[1], second[3])
    for row in second:
        assert row["curve"][0][0] == pytest.approx(first["curve"][-1][0]) and len(row["curve"]) == 3
        assert row["matched"]["-1.0"]["reached"] == 2
    assert all(len({first for first, _ in row["curve"]}) == 1 for row in still)  # at rate 0 nothing is forgotten
    assert all(len({tuple(point) for point in row["curve"]}) > 1 for row in moved)


def test_the_fresh_adapter_of_the_second_stage_is_made_for_the_merged_weights(encoder, monkeypatch):
    calls, climb = [], sequential_glue.climb

    def spy(program, part, judged, classifiers, start, **of):
        calls.append((program, start))
        return climb(program, part, judged, classifiers, start, **of)

    monkeypatch.setattr(sequential_glue, "climb", spy)
    settings = {"model": encoder, "tasks": ["SST-2", "CoLA"], "rank": 4, "blocks": 2, "seeds": [0], "batch": 16}
    sizes = {"train_examples": [80, 32], "dev_examples": 50, "epochs": [2, 1], "points": [1, 1]}
    head = {"rate": 0.03, "steps": 20}
    sequential_glue.sequence(method="ABBA", rates=[[1e-1], [0.0]], head=head, levels=[0.5], **settings, **sizes)
    _, (base, _), (merged, fresh) = calls
    path = "encoder/layer/attention/self/query/kernel"
    before, after = (paths.leaves(program.params["params"])[path] for program in (base, merged))
    assert np.abs(after - before).max() > 1e-3
    factors = fresh["adapters"][path]
    u, s, vt = np.linalg.svd(after, full_matrices=False)
    expected = (u[..., :2] * s[:, None, :2]) @ vt[..., :2, :]
    np.testing.assert_allclose(factors["a1"][0] @ factors["b1"][0], expected, atol=1e-5 * np.abs(expected).max())


def test_a_report_of_a_sequence_names_its_tasks_and_reads_every_method():
    curve = np.linspace([0.8, 0.0], [0.6, 0.2], 5)
    results = {}
    for name, kept in (("LoRA", 1.0), ("GraLoRA", 1.0), ("BoHA", 0.9)):
        curves = np.stack([curve * [kept, 1.0]] * 2)[None]
        of = {"parameters": 8, "rates": [0.1], "costs": np.array([0.5]), "curves": curves}
        _, first = retention.rows_of(name, "stage 1", **of)
        second = [row for way in retention.WAYS for row in retention.rows_of(name, way, levels=[0.1], **of)[1]]
        settings = sequential_glue.SETTINGS | {"seeds": [0, 1], "levels": [0.1]}
        results[name] = {"settings": settings, "rows": json.loads(json.dumps(first + second))}
    report = sequential_glue.report(results)
    assert "# Sequential adaptation: SST-2, then CoLA" in report and "| SST-2 at 10% of CoLA |" in report
    assert "mean of the controls (70.0 %), in points, ± standard error, start for start: BoHA -7.0 ± 0.0." in report


def test_the_rates_that_other_tasks_take_are_those_of_the_committed_sweep():
    results = json.loads((experiment.RESULTS / "glue.json").read_text())
    found = {name: results[f"{glue.SWEPT}, {name}"]["rows"][0] for name in METHODS}
    assert {name: row["lr"] for name, row in found.items()} == glue.RATES
    for row in found.values():
        assert row["lr"] == min(row["sweep"], key=lambda pair: pair[1])[0] and not row["rate_at_edge"]


def test_without_the_data_the_program_ends_in_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HADAMAX_DATA", str(tmp_path / "none"))
    assert cli.run(glue.main, ["--out", str(tmp_path / "out"), "--only", "CoLA, LoRA"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: no GLUE file CoLA_train.tsv in ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_committed_rows_have_the_agreed_columns():
    results = json.loads((experiment.RESULTS / "glue.json").read_text())
    columns = (
        "task",
        "method",
        "metric",
        "mean",
        "std",
        "seeds",
        "lr",
        "trainable",
        "share",
        "train_examples",
        "seconds",
    )
    for name, part in results.items():
        for row in part["rows"]:
            assert name == "similarity" or row.keys() >= set(columns), name
            assert "cut_to" not in row or row["cut_to"] == WIDEST[row["task"]], name
