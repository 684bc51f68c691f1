"""The encoder cases whose outputs are compared with transformers' PyTorch, and the comparison."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
import transformers

from hadamax.hf import load_pretrained, save_pretrained

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 20,
}
BERT, ROBERTA = transformers.BertConfig, transformers.RobertaConfig


class Case(NamedTuple):
    architecture: Any  # class of transformers
    task: str
    config: Any

    def reference(self) -> Any:
        """A random model; every parameter is moved, because the defaults of norms and biases would hide a mix-up."""
        torch.manual_seed(0)
        model = self.architecture(self.config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        return model

    def batch(self) -> dict[str, np.ndarray]:
        """Rows that are whole, padded left and padded right, with tokens of both types."""
        rng = np.random.default_rng(0)
        ids = rng.integers(3, SIZES["vocab_size"], (3, 14))
        mask = np.ones_like(ids)
        mask[1, :4] = 0
        mask[2, -5:] = 0
        types = rng.integers(0, self.config.type_vocab_size, ids.shape)
        return {
            "input_ids": np.where(mask, ids, self.config.pad_token_id),
            "attention_mask": mask,
            "token_type_ids": types,
        }

    def expected(self, model: Any, batch: dict[str, np.ndarray]) -> np.ndarray:
        """What transformers computes; for sentence embeddings the recipe of sentence-transformers on top of it."""
        with torch.no_grad():
            out = model(**{name: torch.tensor(value) for name, value in batch.items()})
            if self.task == "sentence_embedding":
                mask = torch.tensor(batch["attention_mask"])[..., None].float()
                mean = (out.last_hidden_state * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
                return torch.nn.functional.normalize(mean, dim=1).numpy()
        field = {"hidden": "last_hidden_state", "pooled": "pooler_output"}.get(self.task, "logits")
        return out[field].float().numpy()

    def found(self, model: Any, params: Any, batch: dict[str, np.ndarray]) -> np.ndarray:
        return np.asarray(jax.jit(model.apply)(params, **batch))


def encoder_cases() -> dict[str, Case]:
    """The cases by name: every head of both families."""

    def case(family, head, task, **config):
        config_class = BERT if family == "Bert" else ROBERTA
        return Case(getattr(transformers, family + head), task, config_class(**SIZES, **config))

    cases = {}
    for family in ("Bert", "Roberta"):
        for task in ("hidden", "pooled", "sentence_embedding"):
            cases[f"{family} {task}"] = case(family, "Model", task, hidden_act="silu")
        cases[f"{family} masked LM"] = case(family, "ForMaskedLM", "masked_lm", hidden_act="gelu_new")
        cases[f"{family} tokens"] = case(family, "ForTokenClassification", "token_classification", num_labels=5)
        sequence = (family, "ForSequenceClassification", "sequence_classification")
        cases[f"{family} sequence"] = case(*sequence, num_labels=3, hidden_act="relu", type_vocab_size=1)
        cases[f"{family} regression"] = case(*sequence, num_labels=1, problem_type="regression")
        cases[f"{family} multi-label"] = case(*sequence, num_labels=4, problem_type="multi_label_classification")
    return cases


def encoder_differences(case: Case, folder: Path) -> dict[str, float]:
    """The largest differences of outputs from those of transformers, by direction.

    "load" is our output from a directory that transformers wrote, "load unrolled" with a module for each layer; "save"
    is transformers' output from a directory that we wrote, compared with ours.
    """
    reference, batch = case.reference(), case.batch()
    expected = case.expected(reference, batch)
    reference.save_pretrained(folder / "theirs")
    model, params, config = load_pretrained(folder / "theirs", task=case.task)
    unrolled = load_pretrained(folder / "theirs", task=case.task, scan_layers=False)
    save_pretrained(folder / "ours", model, params, config)
    back, info = case.architecture.from_pretrained(folder / "ours", output_loading_info=True)
    lost = set(info["missing_keys"]) - {f"pooler.dense.{leaf}" for leaf in ("weight", "bias") if case.task != "pooled"}
    assert not lost and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert back.config.num_labels == case.config.num_labels and back.config.problem_type == case.config.problem_type
    ours = case.found(model, params, batch)
    pairs = {
        "load": (ours, expected),
        "load unrolled": (case.found(*unrolled[:2], batch), expected),
        "save": (case.expected(back.eval(), batch), ours),
    }
    return {direction: float(np.abs(a - b).max()) for direction, (a, b) in pairs.items()}
