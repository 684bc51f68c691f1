"""Loss and accuracy of runs and models."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hadamax as hx
from hadamax.errors import CheckpointError
from train.config import DataConfig, EvaluateConfig, ModelConfig
from train.data import Record
from train.evaluate import accuracy, evaluate, exact, last_number, mean_loss
from train.finetune import finetune
from train.run import load_base


@pytest.fixture(scope="module")
def learnt(configure, tmp_path_factory):
    """A run that has learnt to answer "7" to everything, and a file of such questions."""
    folder = tmp_path_factory.mktemp("learnt")
    questions = folder / "sevens.jsonl"
    questions.write_text("".join(json.dumps({"question": f"{i}?", "answer": "7"}) + "\n" for i in range(20)))
    rules = {"lm_head": {"method": "lora", "rank": 4}, "down_proj": {"method": "lora", "rank": 4}}
    config = configure(
        folder / "run",
        data={"train": str(questions), "eval_fraction": 0.0, "template": "{instruction}="},
        adapter={"rules": rules},
        optim={"lr": 0.05},
        run={"steps": 60, "batch_size": 8, "log_every": 60},
    )
    finetune(config)
    return folder / "run", questions


def test_a_run_that_learnt_the_answer_is_right_lazily_and_merged(learnt, tmp_path, base_dir):
    run, questions = learnt
    settings = {"data": str(questions), "max_new_tokens": 4, "batch_size": 8}
    lazy = evaluate(EvaluateConfig(run=str(run), out=str(tmp_path / "o"), **settings))
    merged = evaluate(EvaluateConfig(run=str(run), merge=True, **settings))
    before = evaluate(EvaluateConfig(model=str(base_dir), **settings))
    assert lazy["accuracy"] == merged["accuracy"] == 1.0
    assert before["accuracy"] == 0.0
    assert lazy["loss"] == pytest.approx(merged["loss"], rel=1e-4)
    assert lazy["loss"] < 0.2 < before["loss"]
    written = [json.loads(line) for line in (tmp_path / "o").read_text().splitlines()]
    assert len(written) == 20
    assert written[3] == {"question": "3?", "answer": "7", "generated": "7", "correct": True}


def test_the_loss_is_the_mean_over_response_tokens(base_dir):
    base = load_base(ModelConfig(str(base_dir)))
    record, config = Record("", {"question": "1", "answer": "23"}), DataConfig("", template="none", max_length=8)
    ids = jnp.array([[*base.tokenizer("123")["input_ids"], base.tokenizer.eos_token_id]])
    logits = jax.nn.log_softmax(base.model.apply(base.params, ids[:, :-1]))
    expected = -jnp.take_along_axis(logits, ids[:, 1:, None], -1).mean()
    np.testing.assert_allclose(mean_loss(base, [record], config, batch_size=3), expected, rtol=1e-5)


def test_answers_do_not_depend_on_the_batch(base_dir):
    base = load_base(ModelConfig(str(base_dir)))
    records = [Record("", {"question": "1" * n, "answer": "2"}) for n in (1, 5, 3, 9, 2)]
    injection = hx.inject({"q_proj": hx.lora(2)}, view=base.model.view)
    adapters = jax.tree.map(lambda leaf: leaf + 0.3, injection.init(jax.random.key(0), base.params))
    settings = {"injection": injection, "adapters": adapters, "max_new_tokens": 5}
    whole = accuracy(base, records, batch_size=5, **settings)
    assert accuracy(base, records, batch_size=2, **settings) == whole
    assert len(whole.texts) == len(whole.correct) == 5


@pytest.mark.parametrize(
    "rule, text, reference, right",
    [
        (exact, " 72\n", "72", True),
        (exact, "72.", "72", False),
        (last_number, "so 9 x 8 = 72.", "#### 72", True),
        (last_number, "1,234", "it is 1234.0", True),
        (last_number, "-3.5", "-3.5001", True),
        (last_number, "3.5", "-3.5", False),
        (last_number, "none", "3", False),
        (last_number, "3", "", False),
    ],
)
def test_answer_rules(rule, text, reference, right):
    assert rule(text, reference) is right


def test_a_base_that_the_run_does_not_fit_is_refused(learnt, base_dir, tmp_path):
    from hadamax import hf
    from hadamax.hf.families import read_config
    from hadamax.models import Decoder

    config = read_config(json.loads((base_dir / "config.json").read_text()) | {"intermediate_size": 32})[0]
    model = Decoder(config)
    params = model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    hf.save_pretrained(tmp_path / "other", model, params, config, tokenizer_from=base_dir)
    run, questions = learnt
    message = r"tensor 'adapters/layers/mlp/down_proj/kernel/a' .*expected shape \(2, 32, 4\), found \(2, 24, 4\)"
    with pytest.raises(CheckpointError, match=message):
        evaluate(EvaluateConfig(str(questions), run=str(run), base=str(tmp_path / "other")))
