"""The language model: loss, weights, sizes, numbers, long streams."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from palimpsest.configs import HERE
from palimpsest.models import MemoryLM, build, load, stream
from palimpsest.train.config import read_config

from .mixers import REGISTRY, small_model

#: Parameters of every preset. What a token meets of them is within 5 % of the size that each is named by.
SIZES = {
    "170m/transformer": 169_691_904,
    "170m/titans_lmm": 171_324_480,
    "170m/titans_mac": 171_499_584,
    "170m/titans_mag": 171_490_368,
    "170m/titans_mal": 171_481_152,
    "170m/mom_gated_delta": 199_257_888,
    "170m/mom_linear": 198_704_928,
    "170m/mom_neural": 211_911_744,
    "170m/mom_hybrid": 184_474_896,
    "170m/hmt": 170_873_856,
    "170m/hcam": 170_880_768,
    "170m/block_union": 169_691_904,
    "170m/hcam_titans": 171_102_624,
    "340m/transformer": 341_099_520,
    "340m/titans_lmm": 337_883_136,
    "340m/titans_mac": 338_350_080,
    "340m/titans_mag": 338_325_504,
    "340m/titans_mal": 339_873_792,
    "340m/mom_gated_delta": 442_158_336,
    "340m/mom_linear": 440_192_256,
    "340m/mom_neural": 466_956_288,
    "340m/mom_hybrid": 390_449_280,
    "340m/hmt": 343_199_744,
    "340m/hcam": 341_124_096,
    "340m/block_union": 341_099_520,
    "340m/hcam_titans": 341_862_912,
    "760m/transformer": 757_016_064,
    "760m/titans_lmm": 759_268_608,
    "760m/titans_mac": 759_969_024,
    "760m/titans_mag": 759_932_160,
    "760m/titans_mal": 759_895_296,
    "tiny/transformer": 836_736,
    "tiny/titans_lmm": 825_152,
    "tiny/titans_mac": 828_736,
    "tiny/titans_mag": 828_224,
    "tiny/titans_mal": 844_096,
    "tiny/mom_gated_delta": 1_086_752,
    "tiny/mom_linear": 1_076_512,
    "tiny/mom_neural": 1_163_072,
    "tiny/mom_hybrid": 949_456,
    "tiny/hmt": 845_312,
    "tiny/hcam": 837_248,
    "tiny/block_union": 836_736,
    "tiny/hcam_titans": 843_488,
    "tiny/lact": 831_880,
    "tiny/tnt": 840_064,
    "170m/lact": 169_767_984,
    "170m/tnt": 176_384_640,
    "340m/lact": 342_875_232,
    "340m/tnt": 342_234_624,
    "tiny/linear_attention": 828_688,
    "tiny/mamba2": 837_408,
    "tiny/deltanet": 837_376,
    "tiny/gated_deltanet": 839_456,
    "tiny/ttt_linear": 829_200,
    "tiny/ttt_mlp": 821_008,
    "tiny/moneta": 823_088,
    "tiny/yaad": 825_152,
    "tiny/memora": 823_088,
    "tiny/omeganet": 825_200,
    "tiny/atlas": 827_264,
    "tiny/atlas_pp": 843_648,
    "tiny/dla": 823_088,
    "tiny/deep_transformer": 823_088,
    "tiny/swla": 832_832,
    "tiny/dot": 825_152,
    "tiny/moneta_hybrid": 842_200,
    "tiny/yaad_hybrid": 843_232,
    "tiny/memora_hybrid": 842_200,
    "170m/linear_attention": 166_964_880,
    "170m/mamba2": 166_384_416,
    "170m/deltanet": 166_384_128,
    "170m/gated_deltanet": 166_495_008,
    "170m/ttt_linear": 166_974_096,
    "170m/ttt_mlp": 171_102_864,
    "170m/moneta": 171_213_744,
    "170m/yaad": 171_324_480,
    "170m/memora": 171_213_744,
    "170m/omeganet": 171_324_912,
    "170m/atlas": 171_435_648,
    "170m/atlas_pp": 173_794_944,
    "170m/dla": 171_213_744,
    "170m/deep_transformer": 171_213_744,
    "170m/swla": 167_186_496,
    "170m/dot": 171_324_480,
    "170m/moneta_hybrid": 170_452_824,
    "170m/yaad_hybrid": 165_199_776,
    "170m/memora_hybrid": 170_452_824,
    "340m/linear_attention": 340_216_704,
    "340m/mamba2": 343_387_392,
    "340m/deltanet": 343_386_624,
    "340m/gated_deltanet": 339_062_016,
    "340m/ttt_linear": 340_241_280,
    "340m/ttt_mlp": 337_095_552,
    "340m/moneta": 337_489_536,
    "340m/yaad": 337_883_136,
    "340m/memora": 337_489_536,
    "340m/omeganet": 337_884_288,
    "340m/atlas": 338_277_888,
    "340m/atlas_pp": 344_569_344,
    "340m/dla": 337_489_536,
    "340m/deep_transformer": 337_489_536,
    "340m/swla": 341_004_288,
    "340m/dot": 337_883_136,
    "340m/moneta_hybrid": 341_653_824,
    "340m/yaad_hybrid": 341_850_624,
    "340m/memora_hybrid": 341_653_824,
}


def text(batch: int, length: int, vocab: int = 11) -> torch.Tensor:
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(0))


def model_of(name: str, **keys: object) -> MemoryLM:
    torch.manual_seed(0)
    return build({"model": small_model(REGISTRY[name], **keys)})


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        model = build(name)
    assert read_config(name).model == model.config
    count = sum(p.numel() for p in model.parameters())
    assert count == SIZES[name]
    named = SIZES["tiny/transformer"] if name.startswith("tiny") else float(name[:3]) * 1e6
    used = model.active_parameters()
    assert abs(used / named - 1) <= 0.05
    comment = " ".join((HERE / f"{name}.yaml").read_text().replace("\n#", "").split())
    assert f"{count:,} parameters" in comment
    assert used == count or f"of which a token meets {used:,}." in comment


def test_every_file_is_counted_above() -> None:
    files = {f"{path.parent.name}/{path.stem}" for path in HERE.glob("*/*.yaml") if path.parent.name != "ablations"}
    assert files == set(SIZES)


def test_loss_is_cross_entropy() -> None:
    model, t = model_of("mag", tie_embeddings=False, softcap=5.0).double(), text(2, 12)
    targets = t.roll(-1, 1).clone()
    targets[0, :5] = -100
    out = model(t, targets=targets)
    logits = model(t).logits
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    assert logits.abs().max() < 5 and out.logits is None and out.state is None
    assert out.valid.item() == 19
    assert torch.allclose(out.loss_sum, expected, rtol=1e-10) and torch.allclose(out.loss, expected / 19, rtol=1e-10)
    each, state = model.per_token_loss(t, targets)
    assert each.shape == (2, 12) and (each[0, :5] == 0).all() and state.position.tolist() == [12, 12]
    assert torch.allclose(each.sum(), expected, rtol=1e-6)


def test_z_loss_is_for_training_only() -> None:
    plain, with_z, t = model_of("attention"), model_of("attention", z_loss=0.1), text(2, 12)
    square = torch.logsumexp(plain(t).logits, -1).square().mean()
    assert torch.allclose(with_z(t, targets=t).loss, plain(t, targets=t).loss + 0.1 * square, rtol=1e-5)
    assert torch.equal(with_z.per_token_loss(t, t)[0], plain.per_token_loss(t, t)[0])


def test_no_valid_target() -> None:
    t = text(1, 5)
    out = model_of("lmm")(t, targets=torch.full_like(t, -100))
    assert out.loss.item() == 0 and out.valid.item() == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tokens": torch.zeros(3, dtype=torch.int64)}, "tokens was torch.int64"),
        ({"tokens": torch.zeros(1, 3)}, "tokens was torch.float32"),
        ({"tokens": torch.zeros(1, 0, dtype=torch.int64)}, "at least one token"),
        ({"tokens": torch.tensor([[0, 11]])}, r"tokens ran from 0 to 11; it must lie in \[0, 11\)"),
        ({"tokens": torch.tensor([[-1, 1]])}, "tokens ran from -1"),
        ({"targets": torch.zeros(1, 2, dtype=torch.int64)}, "targets was torch.int64"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens was torch.int64"),
    ],
)
def test_wrong_arguments(arguments: dict[str, torch.Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        model_of("attention")(**{"tokens": torch.zeros(1, 3, dtype=torch.int64), **arguments})


def test_made_on_meta_then_drawn() -> None:
    torch.manual_seed(3)
    drawn = [model_of("mal"), model_of("mac")]
    for expected, name in zip(drawn, ("mal", "mac"), strict=True):
        with torch.device("meta"):
            model = build({"model": small_model(REGISTRY[name])})
        model = model.to_empty(device="cpu")
        for p in model.parameters():
            p.data.fill_(float("nan"))
        torch.manual_seed(0)
        model.reset_parameters()
        for (key, a), b in zip(model.named_parameters(), expected.parameters(), strict=True):
            assert a.isfinite().all(), key
            assert a.numel() < 32 or 0.5 < float(a.detach().std() / b.detach().std()) < 2, key


@pytest.mark.parametrize("tied", [True, False])
def test_saved_and_loaded(tied: bool, tmp_path: Path) -> None:
    model, t = model_of("mac", tie_embeddings=tied), text(2, 9)
    model.save(tmp_path / "run", {"name": "x"})
    again = load(tmp_path / "run")
    assert again.config == model.config and torch.equal(again(t).logits, model(t).logits)
    again(t, targets=t).loss.backward()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json", "model.safetensors"]


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="config.json"):
        load(tmp_path)
    model_of("mac").save(tmp_path / "a")
    model_of("mag").save(tmp_path / "b")
    (tmp_path / "a" / "model.safetensors").replace(tmp_path / "b" / "model.safetensors")
    with pytest.raises(ValueError, match="does not fit config.json"):
        load(tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").write_bytes(b"\0" * 5)
    with pytest.raises(ValueError, match="model.safetensors"):
        load(tmp_path / "b")


def test_diagnostics() -> None:
    torch.manual_seed(0)
    mixers = [REGISTRY[name] for name in ("mac", "attention", "lmm, plain", "mal")]
    model = build({"model": small_model(mixers, layers=4, init_std=0.02)})
    numbers = model.diagnostics(text(2, 21))
    expected = {"retention", "momentum", "step", "loss_before", "loss_after", "state_norm"}
    assert {key for key in numbers if key.startswith("layer.0/")} == {f"layer.0/{name}" for name in expected}
    assert {key.split("/")[0] for key in numbers} == {"layer.0", "layer.2", "layer.3"}
    assert "layer.2/momentum" not in numbers and "layer.2/retention" not in numbers
    assert 0.9 <= numbers["layer.3/retention"] <= 1 and numbers["layer.3/momentum"] == pytest.approx(0.9, abs=0.02)
    assert numbers["layer.3/step"] == pytest.approx(0.5, abs=0.05)
    assert numbers["layer.3/loss_after"] < numbers["layer.3/loss_before"]


def test_flops_grow_as_they_must() -> None:
    model = model_of("window")
    assert model.flops_per_token(256) == pytest.approx(model.flops_per_token(512), rel=0.02)
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2 and p.shape[0] != 3)
    assert model.flops_per_token(64) > 6 * weights
    full = model_of("attention")
    assert full.flops_per_token(512) > full.flops_per_token(256)


def test_flops_where_values_decide_take_no_draws() -> None:
    """Chunks that end at surprises: counted on real tensors, and training's random numbers stay what they were."""
    memory = {"kind": "hcam", "heads": 2, "window": 8, "chunk_size": 8, "top_k": 2}
    cut = build({"model": {"vocab_size": 64, "dim": 32, "layers": 1, "mixer": {**memory, "cut": {"least": 4}}}})
    before = torch.get_rng_state()
    found = cut.flops_per_token(40)
    assert torch.equal(torch.get_rng_state(), before)
    even = build({"model": {"vocab_size": 64, "dim": 32, "layers": 1, "mixer": memory}})
    assert found == pytest.approx(even.flops_per_token(40), rel=0.25)


@pytest.mark.parametrize("name", ["attention, grouped", "window", "lmm", "mac", "mag", "mal"])
def test_under_autocast(name: str) -> None:
    """bf16 products, float32 parameters: close to float32 (bf16 has 8 bits), and splits and resets still work."""
    model, t = model_of(name, init_std=0.05), text(2, 17)
    exact = model(t, targets=t).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(t, targets=t).loss
        state = model(t[:, :9]).state.reset([1], model.init_state(1))
        model(t[:, 9:], state)
    loss.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=2**-6)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["lmm", "mac", "mag", "mal"])
@pytest.mark.parametrize("keys", [{"depth": 4}, {"depth": 4, "norm": False}, {"chunk_size": 256}])
def test_training_stays_finite(name: str, keys: dict[str, object]) -> None:
    mixer = REGISTRY[name] | {"memory": {"heads": 2, "chunk_size": 64, **keys}}
    mixer |= {"segment": 128} if name == "mac" else {}
    torch.manual_seed(0)
    model = build({"model": small_model(mixer, dim=16, layers=1, init_std=0.02)})
    optimizer, t = torch.optim.AdamW(model.parameters(), lr=1e-2), text(1, 513)
    losses = []
    for _ in range(6):
        loss = model(t[:, :-1], targets=t[:, 1:]).loss
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        losses.append(loss.item())
        assert norm < 100
    assert losses[-1] < losses[0] < 3


def test_long_contexts_train() -> None:
    torch.manual_seed(0)
    mixer = {"kind": "titans_mag", "heads": 2, "window": 64, "memory": {"heads": 2, "chunk_size": 64}}
    model = build({"model": small_model(mixer, dim=16, layers=1, init_std=0.02)})
    optimizer, t = torch.optim.AdamW(model.parameters(), lr=1e-2), text(1, 4097)
    for _ in range(3):
        loss = model(t[:, :-1], targets=t[:, 1:]).loss
        optimizer.zero_grad()
        loss.backward()
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True) < 100
        optimizer.step()


@pytest.mark.parametrize("name", ["window", "lmm", "mac", "mag", "mal"])
def test_streaming(name: str) -> None:
    """Piece by piece gives the losses of one call, and the state does not grow."""
    model, t = model_of(name).double(), text(2, 101)
    sizes, losses = set(), []
    for loss, state in stream(model, t, 20):
        losses.append(loss)
        sizes.add(state.bytes)
        assert not any(x.requires_grad for _, x in state.tensors())
    whole, _ = model.per_token_loss(t[:, :-1], t[:, 1:])
    assert torch.allclose(torch.cat(losses, 1), whole, rtol=0, atol=1e-10)
    assert max(sizes) - min(sizes) <= 2 * 2 * 2 * 2 * 14 * 8 * 8  # MAC: at most one segment of keys and values
    with pytest.raises(ValueError, match="chunk was 0"):
        next(stream(model, t, 0))


def test_deep_memory_starts_with_a_stable_step() -> None:
    """One step on the very token that was written lowers its inner loss, at every depth, with and without a norm."""
    for depth in (2, 3, 4):
        for norm in (True, False):
            torch.manual_seed(0)
            memory = {"heads": 1, "chunk_size": 64, "depth": depth, "norm": norm, "expansion": 4}
            mixer = {"kind": "neural_memory", "memory": memory}
            model = build({"model": small_model(mixer, dim=32, layers=1, init_std=0.02)})
            numbers = model.diagnostics(text(1, 256))
            assert numbers["layer.0/loss_after"] < numbers["layer.0/loss_before"] < 64, (depth, norm)
