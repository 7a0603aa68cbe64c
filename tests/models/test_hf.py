"""HMT over a Hugging Face causal model: a small Llama with random weights.

Its norms compute in float32 whatever it is given, so differences are bounded by 1e-5 of values of about 3: some ten
times float32's rounding through two layers.
"""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, MistralConfig

from palimpsest.eval.tasks import passkey
from palimpsest.models import build, load, load_state
from palimpsest.models.hf import HuggingFaceLM, wrap
from palimpsest.train.start import freeze_backbone
from palimpsest.train.tokenizer import load_tokenizer

BOUND = 1e-5
LENGTH = 31
HMT = {"segment": 6, "sensory": 2, "memories": 3, "bptt": 2, "summary": 4}
SHAPE = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(**changed: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**(SHAPE | {"num_key_value_heads": 1, "initializer_range": 0.4} | changed))
    return AutoModelForCausalLM.from_config(config)


def model_of(mode: str = "previous", **changed: Any) -> HuggingFaceLM:
    model = wrap(llama(**changed), HMT | {"recall": mode})
    with torch.no_grad():
        model.hmt.gain.normal_(generator=torch.Generator().manual_seed(0))
    return model


def text(batch: int, length: int = LENGTH, vocabulary: int = 11) -> Tensor:
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))


def near(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=BOUND * 3)


def test_one_segment_is_the_model_behind_a_slot() -> None:
    causal, t = llama(), text(2, 6)
    model = wrap(causal, HMT)
    slot = (model.hmt.empty * model.hmt.gain).expand(2, 1, -1)
    expected = causal(inputs_embeds=torch.cat([slot, causal.get_input_embeddings()(t)], 1)).logits[:, 1:]
    assert near(model(t).logits, expected)
    assert model.hmt.gain.mean().item() == pytest.approx(causal.get_input_embeddings().weight.std().item(), rel=1e-5)


@pytest.mark.parametrize("mode", ["previous", "half", "none"])
def test_split_anywhere_is_whole_and_decoding_is_prefill(mode: str) -> None:
    model, t = model_of(mode), text(2)
    whole, sound = model(t), torch.arange(LENGTH) % 6 >= (3 if mode == "half" else 0)
    for cut in (1, 4, 6, 9, 12, 23):
        first = model(t[:, :cut])
        rest = model(t[:, cut:], first.state)
        assert near(torch.cat([first.logits, rest.logits], 1)[:, sound], whole.logits[:, sound]), cut
        for (name, a), (_, b) in zip(rest.state.tensors(), whole.state.tensors(), strict=True):
            assert a.shape == b.shape and near(a, b), (cut, name)
    state, found = model.init_state(2), []
    for token in t.split(1, 1):
        out = model(token, state)
        state = out.state
        found.append(out.logits)
    assert near(torch.cat(found, 1)[:, sound], whole.logits[:, sound])


def test_no_token_sees_a_later_one() -> None:
    model, t = model_of(), text(1)
    x = model.embed.weight.detach()[t[0]].requires_grad_()
    model.backbone.set_input_embeddings(Places(x))
    hidden, _ = model.hmt(model, torch.arange(LENGTH)[None], None, None, None, False)
    for place in (0, 5, 6, 11, 16, 29):
        (grad,) = torch.autograd.grad(hidden[:, place].sum(), x, retain_graph=True)
        reached = grad.abs().amax(-1) > 0
        assert not reached[place + 1 :].any() and reached[place]
        assert not reached[: max(0, 6 * (place // 12 * 2) - 4)].any()  # the window of two segments


class Places(torch.nn.Module):
    """Embeddings given one by one."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x, self.weight = x, x.detach()

    def forward(self, places: Tensor) -> Tensor:
        return self.x[places]


def test_packed_documents_and_rows_at_different_places() -> None:
    model, t = model_of(), text(1)
    borders = [0, 4, 4, 11, 12, 25, LENGTH]
    cu_seqlens = torch.tensor(borders, dtype=torch.int32)
    packed = model(t, cu_seqlens=cu_seqlens)
    again = model(t, packed.state, cu_seqlens)
    for a, b in pairwise(borders):
        if a < b:
            alone = model(t[:, a:b])
            assert near(packed.logits[:, a:b], alone.logits)
            assert near(again.logits[:, a:b], model(t[:, a:b], alone.state).logits)
    rows = text(3)
    state = model(rows[:, :10]).state.reset([1], model.init_state(1))
    mixed = model(rows[:, 10:], state)
    assert near(mixed.logits[[0, 2]], model(rows).logits[[0, 2], 10:])
    assert near(mixed.logits[1], model(rows[1:2, 10:]).logits[0])


@pytest.mark.parametrize("tied", [True, False])
def test_saved_and_loaded(tied: bool, tmp_path: Path) -> None:
    model, t = model_of(tie_word_embeddings=tied), text(2)
    model.save(tmp_path)
    again = load(tmp_path)
    assert isinstance(again, HuggingFaceLM) and again.config == model.config
    assert torch.equal(again(t).logits, model(t).logits) and (again.head is None) == tied
    model(t[:, :9]).state.save(tmp_path / "state")
    state = load_state(tmp_path / "state")
    assert torch.equal(again(t[:, 9:], state).logits, model(t[:, 9:], state).logits)


def test_training_lowers_the_loss() -> None:
    """Stage one without recall; then, from its weights, the memory alone with a frozen backbone."""
    t, states = text(4, 25), []
    for mode in ("none", "previous"):
        torch.manual_seed(0)
        model = build(model_of(mode).config)
        if states:
            model.load_state_dict(states[-1], strict=False)
            freeze_backbone(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(15):
            loss = model(t[:, :-1], targets=t[:, 1:]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - (0.01 if states else 0.3), mode
        states.append(model.state_dict())
    held = [name for name, x in states[0].items() if not name.startswith("hmt.") and torch.equal(x, states[1][name])]
    assert len(held) == sum(not name.startswith("hmt.") for name in states[0])


def test_checkpointed_layers_give_the_same() -> None:
    from functools import partial

    from torch.utils.checkpoint import checkpoint

    grads = []
    for checkpointed in (False, True):
        model, t = model_of(), text(2)
        for block in model.blocks if checkpointed else []:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        model(t, targets=t).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(near(a, b) for a, b in zip(*grads, strict=True))


def test_sizes_and_numbers() -> None:
    model, t = model_of(), text(2)
    assert model.active_parameters() == sum(p.numel() for p in model.parameters())
    assert model.flops_per_token(12) > 6 * sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert set(model.observe(t)) == {"hmt/age", "hmt/recalled"} and model.diagnostics(t)["hmt/age"] > 1


def test_the_passkey_is_asked_of_it() -> None:
    model = model_of(vocab_size=256)
    tokenizer = load_tokenizer("bytes")
    length = passkey.shortest(tokenizer.encode)
    found = passkey.run(model, tokenizer, passkey.Settings((length,), depths=(0.5,), examples=2, chunk=64))
    assert [cell["length"] for cell in found["cells"]] == [length] and 0 <= found["digits"] <= 1


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    sliding = AutoModelForCausalLM.from_config(MistralConfig(**SHAPE, num_key_value_heads=1, sliding_window=4))
    with pytest.raises(ValueError, match="model was MistralModel, which keeps DynamicSlidingWindowLayer; it must keep"):
        wrap(sliding, HMT)
    scaled = llama()
    scaled.lm_head.register_forward_hook(lambda module, args, output: output * 3)
    with pytest.raises(ValueError, match="model was LlamaForCausalLM, whose logits are scaled"):
        wrap(scaled, HMT)
    biased = llama()
    biased.lm_head = torch.nn.Linear(8, 11)
    with pytest.raises(ValueError, match="LlamaForCausalLM, whose head has a bias"):
        wrap(biased, HMT)
    with pytest.raises(ValueError, match="sensory was 7; it must be at most segment = 6"):
        wrap(llama(), HMT | {"sensory": 7})
    told = model_of().config.model_dump()
    with pytest.raises(ValueError, match="hmt was null; it must be given with huggingface"):
        build({"model": told | {"hmt": None}})
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match="transformers"):
        build({"model": told})


def test_in_a_checkout_it_is_not_another_projects_package() -> None:
    """transformers looks for a package ``kernels``, and finds the folder of that name where it is started."""
    code = "from transformers import LlamaConfig; import palimpsest.kernels as k; print(k.rms_norm.__module__)"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("palimpsest.kernels"), done.stderr


def test_another_family() -> None:
    """Parallel residual, rotation of a part of each head, LayerNorm."""
    torch.manual_seed(0)
    causal = AutoModelForCausalLM.from_config(GPTNeoXConfig(**SHAPE))
    model, t = wrap(causal, HMT), text(2)
    cut = model(t[:, :9])
    assert near(torch.cat([cut.logits, model(t[:, 9:], cut.state).logits], 1), model(t).logits)
