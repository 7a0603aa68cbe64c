"""Decay groups and rules by name, which matrices a method takes, and the gradient's norm."""

import math

import pytest
import torch
from torch import nn

from palimpsest.models import build
from palimpsest.train import optim

CONFIG = {
    "model": {
        "vocab_size": 64,
        "dim": 16,
        "layers": 2,
        "tie_embeddings": False,
        "mixer": [
            {"kind": "window_attention", "heads": 2, "window": 8},
            {"kind": "titans_mag", "heads": 2, "window": 8, "memory": {"heads": 2, "chunk_size": 8}},
        ],
    }
}

DECAYING = {
    "embed.weight",
    "head.weight",
    "blocks.0.mixer.core.qkv.weight",
    "blocks.0.mixer.out.weight",
    "blocks.0.mlp.gate_up.weight",
    "blocks.0.mlp.down.weight",
    "blocks.1.mixer.attention.qkv.weight",
    "blocks.1.mixer.memory.proj.weight",
    "blocks.1.mixer.memory.gates.proj.weight",
    "blocks.1.mixer.memory.out.weight",
    "blocks.1.mixer.gate.out.weight",
    "blocks.1.mlp.gate_up.weight",
    "blocks.1.mlp.down.weight",
}
OTHERS = {
    "norm.weight",
    "blocks.0.norm_mixer.weight",
    "blocks.0.norm_mlp.weight",
    "blocks.1.norm_mixer.weight",
    "blocks.1.norm_mlp.weight",
    "blocks.1.mixer.attention.persistent.tokens",
    "blocks.1.mixer.memory.conv",
    "blocks.1.mixer.memory.norm",
    "blocks.1.mixer.memory.gates.step_bias",
    "blocks.1.mixer.memory.gates.retain_bias",
    "blocks.1.mixer.memory.gates.retain_log",
    "blocks.1.mixer.memory.gates.momentum_bias",
    "blocks.1.mixer.memory.weights.0",
    "blocks.1.mixer.memory.weights.1",
    "blocks.1.mixer.memory.out_norm.weight",
    "blocks.1.mixer.gate.norm_y.weight",
    "blocks.1.mixer.gate.norm_memory.weight",
}


def test_what_decays_and_what_does_not_name_by_name():
    decaying, others = optim.decay_groups(build(CONFIG))
    assert set(decaying) == DECAYING
    assert set(others) == OTHERS


def test_a_tied_embedding_is_one_parameter_and_decays():
    model = build(CONFIG, **{"model.tie_embeddings": True})
    decaying, others = optim.decay_groups(model)
    assert "embed.weight" in decaying and "head.weight" not in decaying | others
    assert len(decaying) + len(others) == len(list(model.parameters()))


def test_only_the_first_group_loses_weight():
    model = build(CONFIG)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = optim.adamw(model, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1 - 0.1 * 0.5 if name in DECAYING else 1.0
        assert torch.equal(parameter, before[name] * factor) or name in DECAYING, name
        torch.testing.assert_close(parameter, before[name] * factor, rtol=1e-6, atol=0)


def test_frozen_parameters_are_left_out():
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    assert [set(group) for group in optim.decay_groups(model)] == [{"weight"}, set()]
    assert len(optim.adamw(model, lr=1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0).param_groups) == 1


def with_gradients(*values):
    parameters = [nn.Parameter(torch.zeros(len(value))) for value in values]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.grad = torch.tensor(value)
    return parameters


def test_clipping_scales_all_gradients_by_the_global_norm():
    parameters = with_gradients([3.0], [0.0, 4.0])
    assert float(optim.clip([*parameters, nn.Parameter(torch.ones(1))], 1.0)) == 5.0
    torch.testing.assert_close(torch.cat([p.grad for p in parameters]), torch.tensor([0.6, 0.0, 0.8]))


def test_a_small_gradient_and_no_limit_are_left_as_they_are():
    for limit in (10.0, None):
        parameters = with_gradients([3.0], [0.0, 4.0])
        assert float(optim.clip(parameters, limit)) == 5.0
        assert torch.cat([p.grad for p in parameters]).tolist() == [3.0, 0.0, 4.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_gradient_shows_in_the_norm_and_a_bad_weight_is_found(bad):
    assert not math.isfinite(float(optim.clip(with_gradients([1.0], [2.0, bad]), 1.0)))
    assert optim.all_finite([torch.ones(3), torch.zeros(2)])
    assert not optim.all_finite([torch.ones(3), torch.tensor([0.0, bad])])


def test_the_optimizer_is_the_textbooks():
    """Two updates of one decaying matrix against AdamW written out (Loshchilov & Hutter, 2019, algorithm 2)."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2, bias=False).double()
    optimizer = optim.adamw(model, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    w = model.weight.detach().clone()
    m = v = torch.zeros_like(w)
    for step in (1, 2):
        gradient = torch.randn_like(w)
        model.weight.grad = gradient.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
        w = w - 0.01 * (m / (1 - 0.9**step) / ((v / (1 - 0.95**step)).sqrt() + 1e-8) + 0.1 * w)
        torch.testing.assert_close(model.weight.detach(), w, rtol=1e-12, atol=1e-14)
