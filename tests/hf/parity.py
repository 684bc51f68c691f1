"""What the decoders are compared with: tiny random models of transformers, and how far ours are from them."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
import transformers

from hadamax.generate import generate
from hadamax.hf import load_pretrained, save_pretrained

VOCAB, LENGTH, PROMPT, NEW_TOKENS = 61, 24, 9, 12
SIZES = {"vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3_ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 24}
MIXED = ["full_attention", "sliding_attention", "full_attention"]


def decoder_cases() -> dict[str, transformers.PretrainedConfig]:
    """Configs by name, `family` or `family, what differs`; each window is shorter than the prompts."""
    t = transformers
    gemma = {"num_hidden_layers": 4, "head_dim": 10, "query_pre_attn_scalar": 3, "sliding_window": 5}
    return {
        "llama": t.LlamaConfig(**SIZES),
        "llama, 3.2 rope": t.LlamaConfig(**SIZES, tie_word_embeddings=True, head_dim=10, rope_parameters=LLAMA3_ROPE),
        "llama, biases": t.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
        "mistral": t.MistralConfig(**SIZES, sliding_window=5, head_dim=10),
        "mistral, no window": t.MistralConfig(**SIZES, sliding_window=None),
        "qwen2": t.Qwen2Config(**SIZES, tie_word_embeddings=True),
        "qwen2, windows": t.Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1),
        "qwen3": t.Qwen3Config(**SIZES, head_dim=10, tie_word_embeddings=True),
        "qwen3, windows, biases": t.Qwen3Config(
            **SIZES, head_dim=6, attention_bias=True, use_sliding_window=True, sliding_window=4, layer_types=MIXED
        ),
        "gemma2": t.Gemma2Config(
            **{**SIZES, **gemma}, attn_logit_softcapping=2.0, final_logit_softcapping=5.0, rms_norm_eps=1e-5
        ),
        "gemma2, no caps, biases": t.Gemma2Config(
            **{**SIZES, **gemma},
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
            attention_bias=True,
            tie_word_embeddings=False,
        ),
    }


def reference(config: transformers.PretrainedConfig, dtype: torch.dtype = torch.float32) -> Any:
    """A random model of transformers; norms and biases are random too, as their defaults would hide a mix-up.

    Args:
        dtype: that all weights are rounded to; the model itself stays float32.
    """
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    model.generation_config.eos_token_id = None  # it would end rows early
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter + 0.2 * torch.randn_like(parameter)).to(dtype).float())
    return model


def padded_batch(length: int = LENGTH) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of three rows: whole, padded left, padded right."""
    ids = np.random.default_rng(0).integers(0, VOCAB, (3, length))
    mask = np.ones_like(ids)
    mask[1, :3] = 0
    mask[2, -5:] = 0
    return ids, mask


def torch_logits(model: Any, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.float().numpy()


def our_logits(model: Any, params: Any, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(model.apply)(params, ids, mask), np.float32)


def difference(found: np.ndarray, expected: np.ndarray, mask: np.ndarray) -> float:
    """The largest difference of logits on tokens; infinite where one of them is not finite."""
    distance = np.abs(found - expected)[mask.astype(bool)]
    return float(distance.max()) if np.all(np.isfinite(distance)) else float("inf")


def torch_generated(model: Any, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    settings = transformers.GenerationConfig(do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)
    with torch.no_grad():
        tokens = model.generate(torch.tensor(ids), attention_mask=torch.tensor(mask), generation_config=settings)
    return tokens[:, ids.shape[1] :].numpy()


def generated_differences(torch_model: Any, model: Any, params: Any) -> tuple[int, np.ndarray]:
    """Tokens in which greedy continuations of a left-padded batch differ; and transformers' tokens."""
    ids, mask = padded_batch(PROMPT)
    mask[2] = 1
    expected = torch_generated(torch_model, ids, mask)
    assert len(np.unique(expected)) > 5  # equal constants would say nothing
    found = generate(model, params, ids, mask, max_new_tokens=NEW_TOKENS, eos_id=None, pad_id=0)
    return int((np.asarray(found) != expected).sum()), expected


class Parity(NamedTuple):
    """Largest difference of logits by direction, and tokens that differ under greedy decoding."""

    load: float  # transformers saved, we loaded
    unrolled: float  # the same with scan_layers=False
    save: float  # we saved, transformers loaded; compared with ours
    tokens: int


def decoder_parity(config: transformers.PretrainedConfig, directory: Path) -> Parity:
    """Measures one case of `decoder_cases`, writing below `directory`."""
    torch_model, (ids, mask) = reference(config), padded_batch()
    torch_model.save_pretrained(directory / "theirs")
    expected = torch_logits(torch_model, ids, mask)
    model, params, loaded = load_pretrained(directory / "theirs")
    ours = our_logits(model, params, ids, mask)
    unrolled = our_logits(*load_pretrained(directory / "theirs", scan_layers=False)[:2], ids, mask)
    save_pretrained(directory / "ours", model, params, loaded)
    again = transformers.AutoModelForCausalLM.from_pretrained(directory / "ours", attn_implementation="eager").eval()
    return Parity(
        difference(ours, expected, mask),
        difference(unrolled, expected, mask),
        difference(torch_logits(again, ids, mask), ours, mask),
        generated_differences(torch_model, model, params)[0],
    )


def bfloat16_errors(config: transformers.PretrainedConfig, directory: Path) -> Mapping[str, float]:
    """Root mean square of the logits' rounding errors in bfloat16, ours and transformers', from the same weights."""
    exact, (ids, mask) = reference(config, torch.bfloat16), padded_batch()
    rounded = copy.deepcopy(exact).bfloat16()
    rounded.save_pretrained(directory)
    expected, tokens = torch_logits(exact, ids, mask), mask.astype(bool)
    found = {
        "transformers": torch_logits(rounded, ids, mask),
        "ours": our_logits(*load_pretrained(directory)[:2], ids, mask),
    }
    return {name: float(np.sqrt(np.square(logits - expected)[tokens].mean())) for name, logits in found.items()}
