"""The same factors through the peers' own layers give the same outputs: Hugging Face PEFT and LyCORIS (torch)."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

import hadamax as hx

IN, OUT, R = 12, 8, 4
TORCH = torch.float64


def wrapped(config) -> torch.nn.Module:
    """PEFT's layer around a random linear layer, every adapter parameter random."""
    torch.manual_seed(0)
    model = torch.nn.Sequential()
    model.add_module("dense", torch.nn.Linear(IN, OUT, dtype=TORCH))
    model = peft.get_peft_model(model, config).to(TORCH)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * 0.5 + (1.0 if "ia3" in name or "magnitude" in name else 0.0)
    return model


def tensor(model, name: str) -> np.ndarray:
    (found,) = [p for n, p in model.named_parameters() if f".{name}" in n]
    return found.detach().numpy()


def blocks_of_peft(model, blocks: int) -> dict[str, np.ndarray]:
    """PEFT's `A [n, in/n, (j s)]` and `B [j, (n s), out/n]` as blocks (n, j) of rank s."""
    a, b = tensor(model, "gralora_A"), tensor(model, "gralora_B")
    a = a.reshape(blocks, IN // blocks, blocks, R // blocks).transpose(0, 2, 1, 3)
    b = b.reshape(blocks, blocks, R // blocks, OUT // blocks).transpose(1, 0, 2, 3)
    return {"a": a, "b": b}


def low_rank(model, name="lora", suffix=".default.weight"):
    return {"a": tensor(model, f"{name}_A{suffix}").T, "b": tensor(model, f"{name}_B{suffix}").T}


def hada(model):
    names = {"a1": "hada_w1_b", "b1": "hada_w1_a", "a2": "hada_w2_b", "b2": "hada_w2_a"}
    return {ours: tensor(model, theirs).T for ours, theirs in names.items()}


TARGET = {"target_modules": ["dense"]}
PEERS = {
    "lora": (peft.LoraConfig(r=R, lora_alpha=6, **TARGET), hx.lora(R, alpha=6), low_rank),
    "rslora": (
        peft.LoraConfig(r=R, lora_alpha=6, use_rslora=True, **TARGET),
        hx.lora(R, alpha=6, rslora=True),
        low_rank,
    ),
    "dora": (
        peft.LoraConfig(r=R, lora_alpha=6, use_dora=True, **TARGET),
        hx.dora(R, alpha=6),
        lambda m: {**low_rank(m), "magnitude": tensor(m, "lora_magnitude_vector")},
    ),
    "loha": (peft.LoHaConfig(r=R, alpha=6, **TARGET), hx.loha(R, alpha=6), hada),
    "hira": (peft.HiraConfig(r=R, **TARGET), hx.hira(R), lambda m: low_rank(m, "hira", ".default")),
    "gralora": (
        peft.GraloraConfig(r=R, alpha=6, gralora_k=2, **TARGET),
        hx.gralora(R, 2, alpha=6),
        lambda m: blocks_of_peft(m, 2),
    ),
    "ia3": (
        peft.IA3Config(feedforward_modules=[], **TARGET),
        hx.ia3(),
        lambda m: {"weight": tensor(m, "ia3_l").reshape(-1)},
    ),
    "ia3-feedforward": (
        peft.IA3Config(feedforward_modules=["dense"], **TARGET),
        hx.ia3(position="input"),
        lambda m: {"weight": tensor(m, "ia3_l").reshape(-1)},
    ),
}


def our_layer(model) -> hx.Linear:
    weight, bias = tensor(model, "base_layer.weight"), tensor(model, "base_layer.bias")
    return hx.Linear(jnp.asarray(weight.T), jnp.asarray(bias))


@pytest.mark.parametrize(("config", "adapter", "factors_of"), PEERS.values(), ids=PEERS.keys())
def test_outputs_and_factor_gradients_equal_pefts(config, adapter, factors_of, x64):
    model = wrapped(config)
    x = torch.randn(5, IN, dtype=TORCH, generator=torch.Generator().manual_seed(1))
    theirs = model(x)
    torch.sin(theirs).sum().backward()
    factors = jax.tree.map(jnp.asarray, factors_of(model))
    linear, ours = our_layer(model), jnp.asarray(x.numpy())

    def forward(factors):
        return adapter.dot(factors, linear, ours) + linear.bias[None]

    np.testing.assert_allclose(forward(factors), theirs.detach().numpy(), rtol=1e-6, atol=1e-7)
    gradient = jax.grad(lambda f: jnp.sin(forward(f)).sum())(factors)
    for parameter in model.parameters():  # read the peer's gradients by the same mapping as its values
        if parameter.requires_grad:
            parameter.data = parameter.grad
    for ours_, theirs_ in zip(jax.tree.leaves(gradient), jax.tree.leaves(factors_of(model)), strict=True):
        np.testing.assert_allclose(ours_, theirs_, rtol=1e-6, atol=1e-6)


def test_lycoris_loha_forward_with_its_alpha_over_rank(x64):
    from lycoris.modules.loha import LohaModule

    torch.manual_seed(0)
    dense = torch.nn.Linear(IN, OUT)
    module = LohaModule("dense", dense, multiplier=1.0, lora_dim=R, alpha=2.0)
    module.apply_to()
    for parameter in module.parameters():
        parameter.data = torch.randn_like(parameter) * 0.5
    x = torch.randn(5, IN)
    theirs = dense(x).detach().numpy()
    names = {"a1": "hada_w1_b", "b1": "hada_w1_a", "a2": "hada_w2_b", "b2": "hada_w2_a"}
    factors = {ours: jnp.asarray(getattr(module, name).detach().numpy().T) for ours, name in names.items()}
    linear = hx.Linear(jnp.asarray(dense.weight.detach().numpy().T), jnp.asarray(dense.bias.detach().numpy()))
    ours = hx.loha(R, alpha=2.0).dot(factors, linear, jnp.asarray(x.numpy())) + linear.bias[None]
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
