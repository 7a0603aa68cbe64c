"""The Hugging Face form of small models with random weights, against our own loading, loss and generation.

Where two computations differ in the order of sums alone, values of size about one differ by float32's rounding: 1e-5.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig

from palimpsest.eval.generate import generate
from palimpsest.models import MemoryLM, build, load
from palimpsest.models.hf import HuggingFaceLM, wrap
from palimpsest.models.hub import PalimpsestConfig, PalimpsestForCausalLM, StateCache

PRESETS = ["titans_mac", "mom_hybrid", "hcam", "block_union", "hmt"]
HMT = {"segment": 6, "sensory": 2, "memories": 3, "bptt": 2, "summary": 4}
VOCABULARY = 40


def small(preset: str, **changed: Any) -> MemoryLM:
    """A preset of configs/tiny with one small layer, whose untrained logits tell tokens apart."""
    shape = {"vocab_size": VOCABULARY, "dim": 16, "layers": 1, "ffn_hidden": 32, "init_std": 0.5}
    shape |= {f"hmt.{key}": value for key, value in HMT.items()} if preset == "hmt" else {}
    torch.manual_seed(0)
    return build(f"tiny/{preset}", **{f"model.{key}": value for key, value in (shape | changed).items()}).eval()


def backed() -> HuggingFaceLM:
    """HMT over a small Llama."""
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=1, initializer_range=0.4, **shape)
    return wrap(AutoModelForCausalLM.from_config(config), HMT).eval()


def text(batch: int, length: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(0))


def padded(rows: list[Tensor], side: str = "left") -> tuple[Tensor, Tensor]:
    """Rows of any lengths as one tensor, with the last token for padding, and their mask."""
    longest = max(map(len, rows))
    ends = [(longest - len(row), 0) if side == "left" else (0, longest - len(row)) for row in rows]
    filled = [F.pad(row, end, value=VOCABULARY - 1) for row, end in zip(rows, ends, strict=True)]
    return torch.stack(filled), torch.stack([F.pad(torch.ones_like(r), e) for r, e in zip(rows, ends, strict=True)])


def near(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=1e-5 * max(1.0, float(b.detach().abs().max())))


@pytest.mark.parametrize("name", [*PRESETS, "backed"])
def test_a_folder_of_ours_is_one_of_theirs_and_writes_the_same(name: str, tmp_path: Path) -> None:
    model = backed() if name == "backed" else small(name)
    model.save(tmp_path / "ours", {"name": "it"})
    hub = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert isinstance(hub, PalimpsestForCausalLM) and not hub.training and hub.config.run == {"name": "it"}
    hub.save_pretrained(tmp_path / "theirs")
    again = load(tmp_path / "theirs")
    for other in (hub.model, again):
        assert other.config == model.config and other.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(x, model.state_dict()[key]) for key, x in other.state_dict().items())
    rows = [text(2, 15)[0], text(2, 15)[1, :9]]
    tokens, mask = padded(rows)
    out = hub.generate(tokens, attention_mask=mask, max_new_tokens=7, do_sample=False, return_dict_in_generate=True)
    for row, said in zip(rows, out.sequences[:, tokens.shape[1] :].tolist(), strict=True):
        assert said == list(generate(model, row, max_tokens=7, temperature=0)) and len(set(said)) > 1
    assert isinstance(out.past_key_values, StateCache)
    assert out.past_key_values.state.position.tolist() == [len(row) + 6 for row in rows]


def test_generation_reads_each_token_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, lengths = small("titans_lmm"), []
    hub = PalimpsestForCausalLM.of(model)
    monkeypatch.setattr("palimpsest.models.hub.PIECE", 8)
    model.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    tokens = text(1, 20)
    cached = hub.generate(tokens, max_new_tokens=5, do_sample=False)
    assert lengths == [8, 8, 4, 1, 1, 1, 1]
    assert torch.equal(hub.generate(tokens, max_new_tokens=5, do_sample=False, use_cache=False), cached)


def test_samples_and_beams() -> None:
    hub, tokens = PalimpsestForCausalLM.of(small("titans_lmm")), text(2, 9)
    torch.manual_seed(0)
    drawn = hub.generate(tokens, max_new_tokens=4, do_sample=True, num_return_sequences=3)
    assert drawn.shape == (6, 13) and len({tuple(row) for row in drawn.tolist()}) > 2
    beams = hub.generate(tokens, max_new_tokens=4, do_sample=False, num_beams=3)
    again = hub.generate(tokens, max_new_tokens=4, do_sample=False, num_beams=3, use_cache=False)
    assert torch.equal(beams, again)


def test_going_on_from_a_state() -> None:
    model, tokens = small("titans_mac"), text(2, 20)
    hub = PalimpsestForCausalLM.of(model)
    state = model(tokens[:, :13]).state
    before = [x.clone() for _, x in state.tensors()]
    cache = StateCache(state)
    whole = hub.generate(tokens, max_new_tokens=4, do_sample=False)
    assert torch.equal(hub.generate(tokens, past_key_values=cache, max_new_tokens=4, do_sample=False), whole)
    assert cache.get_seq_length() == 23
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, state.tensors(), strict=True))
    assert near(hub(tokens[:, 13:], past_key_values=state).logits, model(tokens).logits[:, 13:])
    cache.batch_repeat_interleave(2)
    assert cache.state.rows == 4
    cache.reset()
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_read(side: str) -> None:
    model = small("mom_neural")
    hub, rows = PalimpsestForCausalLM.of(model), [text(3, 12)[0], text(3, 12)[1, :7], text(3, 12)[2, :1]]
    tokens, mask = padded(rows, side)
    out, last = hub(tokens, attention_mask=mask), hub(tokens, attention_mask=mask, logits_to_keep=3)
    assert torch.equal(last.logits, out.logits[:, -3:])
    for i, row in enumerate(rows):
        alone = model(row[None])
        assert near(out.logits[i][mask[i].bool()], alone.logits[0]) and not out.logits[i][~mask[i].bool()].any()
        after = hub(tokens[:, :1], past_key_values=out.past_key_values.state, attention_mask=torch.ones(3, 13))
        assert near(after.logits[i], model(tokens[i : i + 1, :1], alone.state).logits[0])


@pytest.mark.parametrize("name", ["mom_neural", "hmt"])
def test_the_loss_is_ours(name: str) -> None:
    changed = {} if name == "mom_neural" else {"hmt.recall": "half"}
    model = small(name, **changed)
    hub, tokens = PalimpsestForCausalLM.of(model), text(2, 16)
    labels = tokens.clone()
    labels[0, 3:6] = -100
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    ours = model(tokens, targets=targets)
    judged = hub(tokens, labels=labels)
    assert near(judged.loss, ours.loss) and judged.logits.shape == (2, 16, VOCABULARY)
    assert "past_key_values" not in judged
    model.train(), hub.train()
    ours = model(tokens, targets=targets)
    trained = hub(input_ids=tokens, labels=labels)
    assert near(trained.loss, ours.loss + sum(ours.aux.values())) and trained.logits is None
    assert bool(ours.aux) == (name == "mom_neural")
    trained.loss.backward()
    assert all(p.grad is not None for p in hub.get_input_embeddings().parameters())
    halves = [hub(tokens[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=ours.valid).loss for i in (0, 1)]
    if not ours.aux:  # those depend on what is in the batch
        assert near(sum(halves), ours.loss)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_of_padded_rows(side: str) -> None:
    hub, rows = PalimpsestForCausalLM.of(small("titans_lmm")), [text(2, 12)[0], text(2, 12)[1, :7]]
    tokens, mask = padded(rows, side)
    alone = [hub(row[None], labels=row[None]).loss for row in rows]
    expected = (alone[0] * 11 + alone[1] * 6) / 17
    for training in (False, True):
        assert near(hub.train(training)(tokens, attention_mask=mask, labels=tokens).loss, expected)
    assert isinstance(hub(tokens, attention_mask=mask, labels=tokens, return_dict=False), tuple)


def test_a_folder_from_before_and_what_is_refused(tmp_path: Path) -> None:
    model, tokens = small("titans_lmm"), text(1, 5)
    model.save(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    assert AutoConfig.from_pretrained(tmp_path).vocab_size == VOCABULARY
    assert about.pop("model_type") == "palimpsest"
    (tmp_path / "config.json").write_text(json.dumps(about))
    assert torch.equal(load(tmp_path)(tokens).logits, model(tokens).logits)
    assert torch.equal(PalimpsestForCausalLM.from_pretrained(tmp_path)(tokens).logits, model(tokens).logits)
    (tmp_path / "config.json").write_text(json.dumps(about | {"model": about["model"] | {"layers": 2}}))
    with pytest.raises(
        ValueError, match=r"weights were not those of the configuration; there is missing model\.blocks\.1"
    ):
        PalimpsestForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="schema of the configuration was 7; it must be 1"):
        PalimpsestConfig(schema=7)
    with pytest.raises(ValueError, match="model of the configuration was null"):
        PalimpsestForCausalLM(PalimpsestConfig())
    hub = PalimpsestForCausalLM.of(model)
    with pytest.raises(ValueError, match="past_key_values was DynamicCache; it must be a StateCache"):
        hub(tokens, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match=r"attention_mask was \(1, 4\); it must be \[1, 5 or more\]"):
        hub(tokens, attention_mask=torch.ones(1, 4))
    with pytest.raises(ValueError, match="embeddings were to be replaced"):
        hub.resize_token_embeddings(99)
    with pytest.raises(ValueError, match="stateful"):
        hub.generate(tokens, assistant_model=hub, max_new_tokens=2)
    with pytest.raises(ValueError, match="crop was asked"):
        StateCache().crop(1)
