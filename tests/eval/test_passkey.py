"""The passkey task: its examples, its score, and a model that is known to answer."""

import types

import pytest
import torch

from palimpsest.eval.tasks import passkey
from palimpsest.train.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()


def text_of(example):
    return BYTES.decode(example.prompt)


@pytest.mark.parametrize("length", [320, 512, 1000])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_prompt_and_answer_fill_the_length_and_hold_one_needle(length, depth):
    for example in passkey.generate(BYTES.encode, length=length, depth=depth, count=5, seed=3):
        assert len(example.prompt) + len(example.answer) == length
        text = text_of(example)
        assert text.count(example.value) == 1 and len(example.value) == 7
        assert text.startswith(passkey.OPENING) and text.endswith(" is:")
        key = text.rsplit(" for ", 1)[1].removesuffix(" is:")
        assert f"The special number for {key} is: {example.value}. " in text
        assert BYTES.decode(example.answer) == f" {example.value}"


def test_the_needle_stands_at_its_depth_between_sentences():
    places = []
    for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
        example = passkey.generate(BYTES.encode, length=2000, depth=depth, count=1)[0]
        before, after = text_of(example).removeprefix(passkey.OPENING).split("The special number for ", 1)
        after = after.split(example.value + ". ", 1)[1].split("\nWhich", 1)[0]
        assert before.endswith(". ") or before == ""
        assert after == "" or after.startswith(passkey.FILLER) or depth == 0.0
        places.append(len(before) / (len(before) + len(after)))
    # A sentence is 30 of 1800 bytes, so the nearest border is within 0.01.
    assert places == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0], abs=0.01)


def test_examples_are_fixed_by_the_seed_and_the_same_at_every_length():
    values = [e.value for e in passkey.generate(BYTES.encode, length=400, depth=0.5, count=4, seed=0)]
    assert values == ["5757234", "2566608", "4992487", "2952870"]
    longer = passkey.generate(BYTES.encode, length=900, depth=0.0, count=9, seed=0)
    assert [e.value for e in longer[:4]] == values and len({e.value for e in longer}) == 9
    assert values != [e.value for e in passkey.generate(BYTES.encode, length=400, depth=0.5, count=4, seed=1)]


def test_a_tokenizer_of_words_also_fills_the_length():
    words: dict[str, int] = {}

    def encode(text):
        return [words.setdefault(word, len(words)) for word in text.split()]

    for example in passkey.generate(encode, length=120, depth=0.5, count=3):
        assert len(example.prompt) + len(example.answer) == 120


class Oracle(torch.nn.Module):
    """A model with a perfect memory: its state is the text itself, and it says what stands after the needle."""

    def __init__(self, share=1.0):
        super().__init__()
        self.unused, self.share = torch.nn.Parameter(torch.zeros(1)), share

    def forward(self, tokens, state=None):
        seen = tokens if state is None else torch.cat([state, tokens], dim=1)
        logits = torch.zeros(*tokens.shape, 256)
        for row, line in enumerate(seen.tolist()):
            text = bytes(line).decode()
            question, said = text.rsplit(" is:", 1) if "\nWhich" in text else (text, "")
            if "\nWhich" in question:
                found = question.split(" is: ", 1)[1][:7]
                answer = f" {found[: int(7 * self.share)]}".ljust(20, "x")
                logits[row, -1, ord(answer[len(said)])] = 1.0
        return types.SimpleNamespace(logits=logits, state=seen)


@pytest.mark.parametrize(("share", "hits", "digits"), [(1.0, 1.0, 1.0), (3 / 7, 0.0, 3 / 7)])
def test_a_model_that_remembers_is_scored_right(share, hits, digits):
    settings = passkey.Settings((320, 640), depths=(0.0, 1.0), examples=3, chunk=100)
    result = passkey.run(Oracle(share), BYTES, settings)
    assert len(result["cells"]) == 4
    assert result["accuracy"] == hits and result["digits"] == pytest.approx(digits)


def test_lengths_too_short_are_left_out_and_said(caplog):
    with caplog.at_level("INFO", logger="palimpsest.eval"):
        result = passkey.run(Oracle(), BYTES, passkey.Settings((64, 320), depths=(0.5,), examples=1))
    assert result["left_out"] == [64] and "lengths [64] are left out" in caplog.text


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"depth was 1\.5"):
        passkey.generate(BYTES.encode, length=400, depth=1.5, count=1)
    with pytest.raises(ValueError, match="length was 100; it must be at least"):
        passkey.generate(BYTES.encode, length=100, depth=0.5, count=1)
    with pytest.raises(ValueError, match=r"passkey lengths were \(64,\)"):
        passkey.run(Oracle(), BYTES, passkey.Settings((64,)))


def test_the_shortest_length_holds_every_question():
    least = passkey.shortest(BYTES.encode)
    assert len(passkey.generate(BYTES.encode, length=least, depth=0.5, count=200)) == 200
