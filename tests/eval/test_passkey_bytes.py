"""Passkey as examples: texts of the passkey task, seven labels each, and exact when all of them are right."""

import hashlib
import re

import pytest
import torch

from palimpsest.eval.tasks import passkey, passkey_bytes
from palimpsest.train.examples import scores


class Oracle(torch.nn.Module):
    """Says the number that it has read, with the digits of some rows changed at some place."""

    def __init__(self, wrong: dict[int, int]) -> None:
        super().__init__()
        self.nothing, self.wrong, self.rows = torch.nn.Parameter(torch.zeros(1)), wrong, 0

    def forward(self, tokens: torch.Tensor, state: object = None, return_state: bool = False) -> object:
        logits = torch.zeros(*tokens.shape, 256)
        for row, text in enumerate(tokens.tolist()):
            value = re.search(r": (\d{7})\. ", bytes(text).decode())[1]  # type: ignore[index]
            for place, digit in enumerate(value, -7):
                logits[row, place, ord("x") if self.wrong.get(self.rows) == place + 7 else ord(digit)] = 1.0
            self.rows += 1
        return type("Output", (), {"logits": logits, "state": None})


def test_every_example_keeps_the_rules() -> None:
    tokens, labels = passkey_bytes.generate(400, 60, seed=3)
    assert tokens.shape == labels.shape == (60, 399)
    depths = []
    for row, label in zip(tokens.tolist(), labels.tolist(), strict=True):
        text = bytes(row).decode()
        (place,) = list(re.finditer(r"The special number for ([a-z]+-[a-z]+) is: (\d{7})\. ", text))
        assert text.startswith(passkey.OPENING)
        assert text.endswith(passkey.QUESTION.format(key=place[1]) + " " + place[2][:-1])
        assert label[:-7] == [-100] * 392 and bytes(label[-7:]).decode() == place[2]
        depths.append(place.start())
    assert min(depths) < 80 and max(depths) > 220 and len(set(depths)) > 6


def test_the_worked_example_is_right() -> None:
    shown = [line[4:] for line in passkey_bytes.__doc__.splitlines() if line.startswith("    ")]
    tokens, labels = passkey_bytes.generate(200, 1)
    made = bytes(tokens[0].tolist()).decode()
    assert shown == [line.rstrip() for line in made.splitlines()]
    assert f"``{bytes(labels[0, -7:].tolist()).decode()}``" in passkey_bytes.__doc__


def test_the_numbers_are_these_on_every_machine() -> None:
    tokens, labels = passkey_bytes.generate(320, 20, seed=1)
    digest = hashlib.sha256(tokens.numpy().astype("<i8").tobytes() + labels.numpy().astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == "244fcaffdd42376c"


def test_an_example_depends_on_its_number_alone() -> None:
    whole, part = passkey_bytes.generate(256, 30, seed=2), passkey_bytes.generate(256, 10, seed=2, start=20)
    assert all(torch.equal(a[20:], b) for a, b in zip(whole, part, strict=True))
    made = passkey_bytes.task(train=[[256, 30]], validation=[[256, 5]], test=[[400, 5]])
    assert [group.name for group in made.test] == ["400"] and made.vocab_size == 256
    assert not torch.equal(made.train[0].read(0, 5)[0], made.validation[0].read(0, 5)[0])


def test_exact_asks_for_all_seven_digits() -> None:
    (group,) = passkey_bytes.task(test=[[256, 8]]).test
    found = scores(Oracle({1: 0, 4: 6}), group, tokens=600)
    assert found["exact"] == pytest.approx(6 / 8) and found["accuracy"] == pytest.approx(1 - 2 / 56)


def test_a_stream_may_not_cut_the_number() -> None:
    (group,) = passkey_bytes.task(test=[[256, 1]]).test
    logits = torch.zeros(3, 256)
    with pytest.raises(ValueError, match="stream cuts the number in examples of 255 tokens"):
        group.judge(logits, torch.tensor([[0, 252], [0, 253], [0, 254]]))


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="length was 100; it must be at least"):
        passkey_bytes.task(test=[[100, 5]])
