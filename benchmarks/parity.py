"""Largest differences from the peers, on tiny random models in float32: `python -m benchmarks.parity`.

Models against transformers' PyTorch, in both directions and under greedy decoding; adapters against HF PEFT, in both
directions. The cases are those of the tests (tests/hf): the worst of each family is printed, with `--cases` each case.
"""

import argparse
import copy
import itertools
import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import peft
import torch
import transformers
from rich.console import Console
from rich.progress import track

import hadamax as hx
from tests.hf.parity import decoder_cases, decoder_parity, difference, our_logits, padded_batch, reference, torch_logits
from tests.hf.parity_encoders import encoder_cases, encoder_differences

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "lora": peft.LoraConfig(r=4, lora_alpha=6, target_modules=LINEAR),
    "lora, patterns, saved head": peft.LoraConfig(
        r=4, target_modules=LINEAR, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 5}, modules_to_save=["norm"]
    ),
    "rslora": peft.LoraConfig(r=4, lora_alpha=6, target_modules=LINEAR, use_rslora=True),
    "dora": peft.LoraConfig(r=4, lora_alpha=6, target_modules=LINEAR, use_dora=True),
    "loha": peft.LoHaConfig(r=4, alpha=6, target_modules=LINEAR),
    "hira": peft.HiraConfig(r=4, target_modules=LINEAR),
    "ia3": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "gralora": peft.GraloraConfig(r=4, alpha=6, gralora_k=2, target_modules=LINEAR),
}


class Row(NamedTuple):
    """One case: the largest differences of outputs, and tokens that differ (None: nothing is generated)."""

    family: str
    case: str
    reads: float  # the peer wrote, hadamax read
    writes: float  # hadamax wrote, the peer read
    tokens: int | None


def rows(folder: Path) -> Iterator[Row]:
    """Measures every case, writing below `folder`."""
    for name, config in decoder_cases().items():
        found = decoder_parity(config, folder / name)
        yield Row(name.split(",")[0], name, max(found.load, found.unrolled), found.save, found.tokens)
    for name, case in encoder_cases().items():
        differences = encoder_differences(case, folder / name)
        reads = max(differences["load"], differences["load unrolled"])
        yield Row(name.split()[0].lower(), name, reads, differences["save"], None)
    for name, config in ADAPTERS.items():
        yield Row(f"PEFT {name.split(',')[0]}", f"PEFT {name}", *adapter_parity(config, folder / f"peft {name}"), None)


def adapter_parity(config: peft.PeftConfig, folder: Path) -> tuple[float, float]:
    """Of a random adapter on the Llama: PEFT saved and we loaded; we saved and PEFT loaded."""
    base, (ids, mask) = reference(decoder_cases()["llama"]), padded_batch()
    base.save_pretrained(folder / "base")
    theirs = peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(config))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:  # scales and norms move from where they are, factors are drawn anew
                keep = 1.0 if any(part in name for part in ("ia3", "magnitude", "modules_to_save")) else 0.0
                parameter.copy_(keep * parameter + 0.2 * torch.randn_like(parameter))
    theirs.eval().save_pretrained(folder / "theirs")
    expected = torch_logits(theirs, ids, mask)
    model, params, _ = hx.hf.load_pretrained(folder / "base")
    injection, adapters, trained = hx.hf.load_adapter(folder / "theirs", model, params)
    merged = injection.merge(hx.join(trained, params), adapters)
    found = our_logits(model, merged, ids, mask)
    assert np.abs(expected - torch_logits(base, ids, mask)).max() > 1e-2  # the adapter matters
    hx.hf.save_adapter(folder / "ours", model, injection, adapters, base=trained)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder / "ours").eval()
    return difference(found, expected, mask), difference(torch_logits(again, ids, mask), found, mask)


def worst(measured: Iterable[Row]) -> Iterator[Row]:
    """The worst of each family, in the families' order."""
    for family, found in itertools.groupby(measured, lambda row: row.family):
        cases = list(found)
        tokens = None if cases[0].tokens is None else sum(row.tokens or 0 for row in cases)
        case = f"{family} ({len(cases)} cases)" if len(cases) > 1 else family
        yield Row(family, case, max(row.reads for row in cases), max(row.writes for row in cases), tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", action="store_true", help="print each case")
    cases = parser.parse_args().cases
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    total = len(decoder_cases()) + len(encoder_cases()) + len(ADAPTERS)
    with tempfile.TemporaryDirectory() as folder:
        measured = list(track(rows(Path(folder)), "measuring", total, console=Console(stderr=True)))
    print("| | peer writes, hadamax reads | hadamax writes, peer reads | tokens that differ |\n|---|---|---|---|")
    for row in measured if cases else worst(measured):
        tokens = "" if row.tokens is None else row.tokens
        print(f"| {row.case} | {row.reads:.1e} | {row.writes:.1e} | {tokens} |")
    packages = ", ".join(f"{name} {version(name)}" for name in ("transformers", "peft", "torch", "jax"))
    print(f"\nlargest difference of float32 outputs, tiny random models; {packages}")


if __name__ == "__main__":
    main()
