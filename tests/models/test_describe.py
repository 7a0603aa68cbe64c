"""Sizes of configurations, against the tensors of real models."""

import resource
from pathlib import Path

import pytest
import torch

from palimpsest.configs import HERE
from palimpsest.models import build, describe
from palimpsest.models.config import ConfigError
from palimpsest.models.describe import count, main, outline, read, state_of

TINY = sorted(path.stem for path in (HERE / "tiny").glob("*.yaml"))
SMALL = {"vocab_size": 32, "dim": 16, "layers": 3, "ffn_hidden": 24}
BANK = {"kind": "hcam", "heads": 2, "window": 8, "chunk_size": 8, "top_k": 2, "bank": {"capacity": 4}}
CUT = {"kind": "hcam", "heads": 2, "window": 8, "chunk_size": 8, "top_k": 2, "cut": {"least": 4}}


@pytest.mark.parametrize("name", TINY)
def test_presets_are_as_large_as_their_tensors(name: str) -> None:
    config, seq_len = read(f"tiny/{name}", {"train.seq_len": 72, "model.layers": 2})
    assert seq_len == 72
    told, model = outline(config), build(config)
    assert all(p.is_meta for p in told.parameters())
    tokens = torch.randint(config.vocab_size, (1, seq_len), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        state = model(tokens).state
    assert count(told) == sum(x.numel() for x in model.parameters())
    told_state = state_of(told, seq_len)
    assert {name: (x.shape, x.dtype) for name, x in told_state.tensors()} == {
        name: (x.shape, x.dtype) for name, x in state.tensors()
    }
    assert told_state.bytes == state.bytes == sum(x.untyped_storage().nbytes() for x in map(clone, state.tensors()))


def clone(named: tuple[str, torch.Tensor]) -> torch.Tensor:
    """A tensor with a storage of exactly its own."""
    return named[1].contiguous().clone()


def test_the_largest_take_no_memory() -> None:
    config, _ = read("760m/titans_mag")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = outline(config)
    assert count(model) == 759_932_160  # 3 GB of float32
    assert state_of(model, 16).bytes > 10**8
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 5e8


@pytest.mark.parametrize("mixer", [BANK, CUT], ids=["bank", "cut"])
def test_memories_that_look_at_values_are_counted_on_real_tensors(mixer: dict) -> None:
    content = {"model": SMALL | {"layers": 1, "mixer": mixer}, "train": {"seq_len": 40}}
    found = describe.describe(content)
    with torch.no_grad():
        assert found.state_bytes == build(content)(torch.zeros(1, 40, dtype=torch.int64)).state.bytes
    assert found.flops_per_token > 6 * 8 * 16 * 16


def test_everything_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("model: {vocab_size: 32, dim: 8, layers: 3, ffn_hidden: 24, mixer: {kind: attention, heads: 2}}\n")
    assert main([str(path), "train.seq_len=10", "model.dim=16"]) == 0
    said = capsys.readouterr().out
    found = describe.describe(path, **{"train.seq_len": 10, "model.dim": 16})
    model = build(path, **{"model.dim": 16})
    # Embedding 32 × 16; a layer: two norms of 16, q k v 48 × 16, out 16 × 16, gate and up 48 × 16, down 16 × 24.
    assert found.parameters == count(model) == 32 * 16 + 3 * (2 * 16 + 48 * 16 + 16 * 16 + 48 * 16 + 16 * 24) + 16
    # k and v of 10 tokens, float32; the count and the position of each layer, int32; the sequence's position, int64.
    assert found.state_bytes == 3 * (2 * 10 * 16 * 4 + 2 * 4) + 8
    assert found.flops_per_token == model.flops_per_token(10) and found.head_flops_per_token == 6 * 16 * 32
    assert found.seq_len == 10 and found.active_parameters == found.parameters
    for line in (
        "state bytes, one sequence of 10 tokens",
        f"state {found.state_bytes:,} bytes",
        "    0-2: Block 2,208 (each of 3)",
        "        gate_up: Linear 768  weight [48, 16]",
        "  layers 0-2 (each of 3)",
        "    cache/k [1, 10, 2, 8]",
    ):
        assert f"\n{line}" in f"\n{said}"
    assert said == f"{found.text()}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tiny/titans_mag", "model.dimm=3"], "unknown key 'dimm'"),
        (["tiny/titans_mag", "train.seq_len=0"], "train.seq_len was 0; it must be an integer of at least 1"),
        (["tiny/titans_mag", "train.lr=1"], "override was 'train.lr'; it must be a key of the model"),
        (["tiny/titan"], "titan"),
    ],
)
def test_bad_input(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert words in capsys.readouterr().err
    with pytest.raises(ConfigError, match="model is missing"):
        describe.describe({"train": {}})


def test_what_a_gpu_would_run_is_told() -> None:
    content = {"model": SMALL | {"layers": 2, "dim": 32, "mixer": {"kind": "neural_memory", "memory": {"heads": 2}}}}
    found = describe.describe(content, **{"train.seq_len": 8, "model.mixer.memory.depth": 3})
    assert "neural_memory × 2: plain torch, for depth was 3; it must be 1 or 2" in found.kernels
    assert "short_conv × 2: Triton" in found.kernels and "\non a GPU\n" in found.text()
    assert "neural_memory × 2: Triton" in describe.describe(content, **{"train.seq_len": 8}).kernels
    found = describe.describe(content, **{"train.seq_len": 8, "model.mixer.memory.rule": "muon"})
    assert "neural_memory × 2: Triton" in found.kernels
    window = {"model.mixer.memory.rule": "muon", "model.mixer.memory.window": 2}
    found = describe.describe(content, **{"train.seq_len": 8, **window})
    assert "neural_memory × 2: Triton, but plain torch on sm_80" in found.kernels
