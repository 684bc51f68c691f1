"""Greedy decoding: token for token what transformers generates, compiled once, stopped early."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import hadamax as hx
from hadamax.errors import ConfigError
from hadamax.generate import generate
from hadamax.hf import load_pretrained
from hadamax.hf.decoders import write
from hadamax.models import Decoder, DecoderConfig

CONFIG = DecoderConfig(61, 24, 40, 2, 4, 2, 6, initializer_range=0.4)
IDS = jnp.asarray(np.random.default_rng(0).integers(3, 61, (3, 7)))
FULL = jnp.ones_like(IDS)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    hf = transformers.LlamaConfig(**write(CONFIG))
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(hf).eval()
    model.save_pretrained(directory)
    return model, *load_pretrained(directory)[:2]


@pytest.fixture(scope="module")
def own():
    model = Decoder(CONFIG)
    return model, jax.jit(model.init)(jax.random.key(0), IDS)


def theirs(model, ids, mask, new, eos=None, pad=0):
    ids, mask = torch.tensor(np.asarray(ids)), torch.tensor(np.asarray(mask))
    settings = transformers.GenerationConfig(do_sample=False, max_new_tokens=new, eos_token_id=eos, pad_token_id=pad)
    with torch.no_grad():
        out = model.generate(ids, attention_mask=mask, generation_config=settings)
    out = out[:, ids.shape[1] :].numpy()
    return np.pad(out, ((0, 0), (0, new - out.shape[1])), constant_values=pad)


def test_left_padded_prompts_continue_as_in_transformers(reference):
    torch_model, model, params = reference
    mask = FULL.at[1, :3].set(0).at[2, :1].set(0)
    expected = theirs(torch_model, IDS, mask, 12)
    found = generate(model, params, IDS, mask, max_new_tokens=12, eos_id=None, pad_id=0)
    assert len(np.unique(expected)) > 5  # no constant continuation
    assert found.dtype == jnp.int32 and np.array_equal(found, expected)


def test_rows_end_at_any_end_token_and_are_padded_as_in_transformers(reference):
    torch_model, model, params = reference
    free = theirs(torch_model, IDS, FULL, 12)
    ends = [int(free[0, 3]), int(free[1, 5])]
    expected = theirs(torch_model, IDS, FULL, 12, eos=ends, pad=1)
    found = generate(model, params, IDS, FULL, max_new_tokens=12, eos_id=ends, pad_id=1)
    assert (expected == 1).sum() > 3
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("window", [None, 4])
def test_right_padding_continues_like_left_padding(own, window):
    """Also where the padding lies between a token and what its window reaches."""
    model, params = Decoder(dataclasses.replace(CONFIG, sliding_window=window)), own[1]
    left, left_mask = jnp.roll(IDS, 2, axis=1), FULL.at[:, :2].set(0)
    right_mask = FULL.at[:, -2:].set(0)
    a, b = (
        generate(model, params, ids, mask, max_new_tokens=8, eos_id=None, pad_id=0)
        for ids, mask in ((left, left_mask), (IDS, right_mask))
    )
    assert np.array_equal(a, b)


def test_one_program_per_shape_and_parameters_are_arguments(own):
    model, params = own
    traces = []

    def apply(pair, *args, **kwargs):
        traces.append(args[0].shape)
        base, shift = pair
        logits, cache = model.apply(base, *args, **kwargs)
        return logits + jnp.broadcast_to(shift, logits.shape), cache

    settings = {"max_new_tokens": 5, "eos_id": None, "pad_id": 0, "apply": apply}
    zero = jnp.zeros((1, 61))
    plain = generate(model, (params, zero), IDS, FULL, **settings)
    once = len(traces)
    forced = generate(model, (params, zero.at[0, 9].set(1e6)), IDS + 1, FULL, **settings)
    assert np.array_equal(forced, np.full((3, 5), 9))  # new values of the parameters are seen
    assert np.array_equal(plain, generate(model, params, IDS, FULL, max_new_tokens=5, eos_id=None, pad_id=0))
    assert len(traces) == once and {(3, 7), (3, 1)} == set(traces)


def test_unmerged_adapters_generate_what_merged_ones_do(own):
    model, params = own
    injection = hx.inject({"{q,o}_proj": hx.hira(2), "**/mlp/*_proj/kernel": hx.lora(2)}, view=model.view)
    adapters = jax.tree.map(lambda leaf: leaf + 0.3, injection.init(jax.random.key(2), params))
    fn = injection.apply(model.apply)
    settings = {"max_new_tokens": 8, "eos_id": None, "pad_id": 0}
    lazy = generate(model, (params, adapters), IDS, FULL, **settings, apply=lambda pair, *a, **k: fn(*pair, *a, **k))
    assert np.array_equal(lazy, generate(model, injection.merge(params, adapters), IDS, FULL, **settings))
    assert not np.array_equal(lazy, generate(model, params, IDS, FULL, **settings))


def test_decoding_stops_once_every_row_has_ended(own):
    model, params = own
    steps = []

    def apply(params, *args, **kwargs):
        jax.debug.callback(lambda: steps.append(1))
        return model.apply(params, *args, **kwargs)

    free = np.asarray(generate(model, params, IDS[:1], FULL[:1], max_new_tokens=30, eos_id=None, pad_id=0))[0]
    end = int(free[4])
    first = int(np.argmax(free == end))
    generate(model, params, IDS[:1], FULL[:1], max_new_tokens=30, eos_id=end, pad_id=0, apply=apply).block_until_ready()
    jax.effects_barrier()
    assert len(steps) == first + 1  # the prompt and each token before the end


def test_shapes_and_counts_that_make_no_sense_are_refused(own):
    model, params = own
    with pytest.raises(ConfigError, match=r"must both be \[batch, length\], found \(3, 7\) and \(3, 6\)"):
        generate(model, params, IDS, FULL[:, 1:], max_new_tokens=3, eos_id=None, pad_id=0)
    with pytest.raises(ConfigError, match="max_new_tokens must be at least 1, found 0"):
        generate(model, params, IDS, FULL, max_new_tokens=0, eos_id=None, pad_id=0)
