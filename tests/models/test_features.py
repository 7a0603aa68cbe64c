"""Feature maps against their formulas, and the gates of memories of the whole space at their start."""

import math

import pytest
import torch

from palimpsest.kernels import neural_memory
from palimpsest.models.config import ConfigError, ModelConfig, validate
from palimpsest.models.features import FeatureMap
from palimpsest.models.mixer_config import Features, MemoryConfig
from palimpsest.models.mixers.neural_memory import MemoryLayer

from .mixers import small_model


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_a_polynomial_of_every_channel() -> None:
    features = FeatureMap(Features(degree=3), heads=2, dim=4).double()
    with torch.no_grad():
        features.coefficients += draw(2, 4)
    x, a = draw(5, 4, 4), features.coefficients  # queries of both heads, then keys
    for head in range(4):
        wanted = sum(a[head % 2, i] * x[:, head] ** i for i in range(4))
        torch.testing.assert_close(features(x)[:, head], wanted, rtol=1e-13, atol=0)
    fresh = FeatureMap(Features(degree=3), heads=2, dim=4)
    torch.testing.assert_close(
        fresh(x[..., :2]), sum(x[..., :2] ** i / math.factorial(i) for i in range(4)), rtol=1e-6, atol=1e-6
    )


def test_the_other_maps() -> None:
    x = draw(3, 2, 4)
    assert torch.equal(FeatureMap(Features(kind="exp"), 2, 4)(x), x.exp())
    assert torch.equal(FeatureMap(Features(kind="identity"), 2, 4)(x), x)


def test_a_sketch_has_the_products_of_all_monomials_on_average() -> None:
    """⟨φ(x), φ(y)⟩ = Σ a_i² ⟨x, y⟩ⁱ up to the spread of 40,000 columns a degree, of variance at most 10."""
    features = FeatureMap(Features(degree=2, width=80_000), heads=1, dim=6).double()
    x, y = (torch.nn.functional.normalize(draw(1, 6, seed=i), dim=-1) for i in (1, 2))
    product = (x * y).sum()
    wanted = 1.0 * product + 0.5**2 * product**2
    assert abs(((features(x) * features(y)).sum() - wanted).item()) < 5 * (10 / 40_000) ** 0.5
    assert torch.equal(
        FeatureMap(Features(degree=2, width=9), 1, 6).signs, FeatureMap(Features(degree=2, width=9), 1, 6).signs
    )
    assert features.signs.abs().eq(1).all()


@pytest.mark.parametrize(
    "memory, told",
    [
        ({"features": {"kind": "exp", "width": 8}}, "width was 8; it must be null for the features exp"),
        ({"features": {"degree": 3, "width": 2}}, "width was 2; it must be at least degree = 3"),
        ({"features": {"width": 8}}, "width of features was 8; with residual: true it must be null"),
        ({"retention": "kl", "rule": "muon"}, "rule was 'muon' with retention 'kl'"),
        ({"rule": "muon", "ns_every": 7}, "ns_every was 7; it must divide chunk_size = 64"),
    ],
)
def test_what_makes_no_sense_is_refused(memory: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        validate(ModelConfig, small_model({"kind": "neural_memory", "memory": {"heads": 2, **memory}}))


SPACE = {
    "titans": {},
    "moneta": {"bias": "lp", "retention": "lq", "rule": "gd"},
    "yaad": {"bias": "huber", "rule": "gd"},
    "memora": {"retention": "kl", "rule": "gd"},
    "omega": {"window": 8, "rule": "gd"},
    "atlas": {"window": 8, "rule": "muon", "features": {"degree": 2}},
    "lact": {"network": "gated_mlp", "bias": "dot", "retention": "norm", "rule": "muon_gd"},
    "deep": {"depth": 4},
    "linear": {"network": "linear", "retention": "lq"},
    "channels": {"retention": "lq", "gates": "channel"},
}


@pytest.mark.parametrize("name", SPACE)
def test_one_chunk_moves_a_memory_by_a_step_of_order_one(name: str) -> None:
    """At the start a chunk of one key, written again and again, moves what that key returns by a share of it that is
    neither nothing nor more than all, at 16 and 64 tokens a chunk alike."""
    moved = []
    for size in (16, 64):
        torch.manual_seed(0)
        memory = MemoryConfig(**{"heads": 2, "chunk_size": size, "expansion": 2, "output_gate": "none", **SPACE[name]})
        config = validate(ModelConfig, small_model({"kind": "neural_memory"}) | {"dim": 64, "init_std": 0.02})
        layer = MemoryLayer(config, memory)
        x = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(1)).expand(1, memory.chunk_size + 4, 64)
        _, k, v, _, _ = layer._write_inputs(x, None, None, False)
        o, _ = neural_memory(k, k, v, **layer.gates(x), weights=layer.start(), spec=layer.spec, norm=layer.norm)
        before, after = o[:, 3], o[:, size + 3]  # the convolution has filled; and a chunk later
        moved.append(((after - before).norm() / before.norm()).item())
    assert all(0.1 < x < (0.6 if memory.spec.norm else 1.0) for x in moved), moved
    assert 0.5 < moved[0] / moved[1] < 2.0, moved


def test_channels_start_as_a_head_and_are_seen_as_their_mean() -> None:
    """Without a projection every gate of a channel is a head's at the start; what is told of them is one a head."""
    config = validate(ModelConfig, small_model({"kind": "neural_memory"}))
    made = {}
    for kind in ("head", "channel"):
        memory = MemoryConfig(heads=2, chunk_size=4, gates=kind, window=2, bias="huber")
        made[kind] = MemoryLayer(config, memory)
    layer, x = made["channel"], draw(2, 9, config.dim).float()
    none = torch.zeros(1, 3, 1)
    found, wanted = (
        gates.activate(none.expand(1, 3, gates.outputs)) for gates in (made[kind].gates for kind in ("channel", "head"))
    )
    for name, gate in found.items():
        wide = name in ("step", "log_retain", "log_momentum")
        assert gate.shape == (1, 3, 2, layer.width) if wide else (1, 3, 2)
        if name == "log_retain":  # its rate is drawn, softplus(b) being 1
            rate = layer.gates.retain_log.exp()
            torch.testing.assert_close(gate, -rate.expand_as(gate))
            assert rate.unique().numel() == rate.numel()
        else:
            assert gate.equal(wanted[name].unsqueeze(-1).expand_as(gate) if wide else wanted[name])
    seen, told = layer.observe(x), layer.diagnose(x)
    gates = layer.gates(x)
    assert all(value.shape == (2, 9) for value in seen.values()) and all(value.dim() == 0 for value in told.values())
    torch.testing.assert_close(seen["retention"], gates["log_retain"].exp().mean((-1, -2)))
    named = layer.gates.named(torch.nn.functional.linear(x, layer.gates.proj.weight))
    torch.testing.assert_close(named["momentum"].mean(-1), seen["momentum"])
    effective = (gates["step"] / -torch.expm1(gates["log_momentum"])).mean(-1) * gates["gamma"] * 2
    torch.testing.assert_close(seen["step"], 4 * effective.mean(-1))
    assert layer.recall(x[:1], [0, 5, 9]).shape == (3, 9)
