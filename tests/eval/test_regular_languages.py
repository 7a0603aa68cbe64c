"""Regular languages: automata keep the rules and differ, strings are theirs, and the true distribution judges right."""

import hashlib
import re

import numpy as np
import pytest
import torch

from palimpsest.eval.tasks import regular_languages as languages
from palimpsest.eval.tasks.regular_languages import FILL, IGNORE, SEPARATOR, VOCABULARY, Automata, Settings
from palimpsest.train.examples import scores

Machine = list[dict[int, int]]


def machines(made: Automata) -> list[Machine]:
    """Each automaton as a list of states, each a mapping of symbols to states."""
    return [
        [dict(zip(s[:n], t[:n], strict=True)) for n, s, t in zip(*rows, strict=True)]
        for rows in zip(*(part.tolist() for part in made), strict=True)
    ]


def minimal(machine: Machine) -> list[tuple]:
    """The states that are reached, without those of equal language, in the order of a walk: by partition refinement."""
    order = [0]
    for state in order:
        order += [t for _, t in sorted(machine[state].items()) if t not in order]
    block = dict.fromkeys(order, 0)
    for _ in order:
        kinds = [(block[s], tuple(sorted((x, block[t]) for x, t in machine[s].items()))) for s in order]
        block = {s: kinds.index(kind) for s, kind in zip(order, kinds, strict=True)}
    first = {block[s]: s for s in reversed(order)}
    kept = [s for s in order if first[block[s]] == s]
    return [tuple(sorted((x, kept.index(first[block[t]])) for x, t in machine[s].items())) for s in kept]


def test_automata_keep_the_rules_and_no_two_are_alike() -> None:
    made = machines(languages.automata(3, 0, 300))
    seen = set()
    for machine in made:
        kept = minimal(machine)
        reached = len({s for s in range(12) if machine[s]})
        assert 4 <= len(kept) <= reached <= 12
        assert all(1 <= len(edges) <= 3 for edges in kept), "no state without an edge"
        assert all(
            len({t for _, t in edges}) == len(edges) and i not in dict(edges).values() for i, edges in enumerate(kept)
        )
        assert len({x for edges in kept for x, _ in edges}) <= 18
        assert tuple(kept) not in seen
        seen.add(tuple(kept))


def test_what_is_not_minimal_is_found_and_equal_languages_have_equal_numbers(monkeypatch) -> None:
    monkeypatch.setattr(languages, "ALPHABET", (3, 3))
    drawn = languages._draw(1, 0, 300)
    number, accepted = languages._languages(drawn)
    whole = [minimal(machine) for machine in machines(drawn)]
    assert 50 < accepted.sum() < 290
    for machine, kept, good in zip(machines(drawn), whole, accepted.tolist(), strict=True):
        order = [0]
        for state in order:
            order += [t for t in machine[state].values() if t not in order]
        assert good == (len(kept) == len(order) >= 4)
    doubled = Automata(*(np.concatenate([part, part]) for part in drawn))
    again, _ = languages._languages(doubled)
    assert np.array_equal(again[300:], number) and np.array_equal(again[:300], number)
    assert len(set(number.tolist())) == len({tuple(kept) for kept in whole})


def test_no_language_comes_twice(monkeypatch) -> None:
    for name, value in (("SYMBOLS", 4), ("ALPHABET", (4, 4)), ("STATES", (4, 4)), ("EDGES", (1, 1)), ("BLOCK", 600)):
        monkeypatch.setattr(languages, name, value)
    drawn, made = languages._draw(98, 0, 600), machines(languages._pool(98, 1))
    kinds = [tuple(minimal(machine)) for machine in made]
    assert 50 < len(set(kinds)) == len(kinds) < languages._languages(drawn)[1].sum()


def test_strings_are_walks_and_the_truth_is_that_of_the_automaton() -> None:
    settings = Settings(2, 5, 7, (3, 6), (1, 9))
    tokens, labels = languages.generate(40, 7, 2, first=5, strings=(3, 6), symbols=(1, 9))
    assert tokens.shape == labels.shape == (40, 59)
    made, sizes = machines(languages.automata(2, 5, 7)), []
    for i, (row, label) in enumerate(zip(tokens.tolist(), labels.tolist(), strict=True)):
        machine, state = made[i % 7], 0
        text = row[: row.index(FILL)] if FILL in row else row
        assert set(row[len(text) :]) <= {FILL} and text[-1] != SEPARATOR != text[0]
        parts = [part.split() for part in " ".join(map(str, text)).split(str(SEPARATOR) + " ")]
        sizes.append((len(parts), *map(len, parts)))
        for t, token in enumerate(text):
            state = 0 if token == SEPARATOR else machine[state][token]
            asked = t + 1 < len(text) and text[t + 1] != SEPARATOR
            assert label[t] == (text[t + 1] if asked else IGNORE)
            if asked:
                wanted = [1 / len(machine[state]) if x in machine[state] else 0 for x in range(VOCABULARY)]
                assert languages.truth(settings, torch.tensor([[i, t]]))[0].tolist() == pytest.approx(wanted)
        assert label[len(text) - 1 :] == [IGNORE] * (60 - len(text))
    assert {n for n, *_ in sizes} == {3, 4, 5, 6} and {n for _, *rest in sizes for n in rest} == set(range(1, 10))


class Oracle(torch.nn.Module):
    """Knows the distribution, mixed with as much of nonsense."""

    def __init__(self, settings: Settings, nonsense: float) -> None:
        super().__init__()
        self.settings, self.nonsense, self.seen = settings, nonsense, 0
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, state=None, return_state=False):
        """Rows are read in order, each from its beginning."""
        first = self.seen
        self.seen += len(x)
        labels = languages._read(self.settings, first, len(x))[1]
        place = (labels != IGNORE).nonzero()
        p = torch.zeros(*x.shape, VOCABULARY)
        known = languages.truth(self.settings, place + torch.tensor([first, 0]))
        p[tuple(place.T)] = (1 - self.nonsense) * known
        p[..., FILL] += self.nonsense
        return type("Output", (), {"logits": p.clamp(min=1e-30).log(), "state": None})


def test_the_truth_is_the_best_answer() -> None:
    group = languages.task(test=[[8, 24]], strings=(3, 6), symbols=(1, 9)).test[0]
    settings = Settings(0, 0, 8, (3, 6), (1, 9))
    found = scores(Oracle(settings, 0.0), group, tokens=300)
    assert found["legal"] == 1 and found["l1"] < 1e-6 and abs(found["accuracy"] - found["best"]) < 0.1
    found = scores(Oracle(settings, 0.25), group, tokens=300)
    assert found["legal"] > 0.99 and found["l1"] == pytest.approx(0.5, abs=1e-5)
    found = scores(Oracle(settings, 1.0), group)
    assert found["legal"] == 0 and found["l1"] == pytest.approx(2, abs=1e-5) and found["accuracy"] == 0
    with pytest.raises(ValueError, match="where had a position without a label"):
        languages.truth(settings, torch.tensor([[0, 58]]))


def test_splits_have_automata_of_their_own() -> None:
    made = languages.task(
        train=[[40, 80], [9, 9]], validation=[[20, 20]], test=[[30, 30]], strings=(2, 3), symbols=(1, 4)
    )
    assert [(group.name, group.count) for group in made.train] == [("40 automata", 80), ("9 automata", 9)]
    parts = [group.read.args[0] for split in made[2:] for group in split]
    spans = [range(part.first, part.first + part.count) for part in parts]
    assert sorted(x for span in spans for x in span) == list(range(99))
    more = languages.task(test=[[30, 30]], strings=(2, 3), symbols=(1, 4))
    assert torch.equal(more.test[0].read(3, 9)[0], made.test[0].read(3, 9)[0])


def test_the_worked_example_is_right() -> None:
    rows = [line.split()[1:] for line in languages.__doc__.splitlines() if re.match(r" +(tokens|labels) ", line)]
    found = [[IGNORE if x == "-" else int(x) for x in row] for row in rows]
    assert found == [x[0].tolist() for x in languages.generate(1, 1, strings=(3, 3), symbols=(1, 5))]


def test_the_numbers_are_these_on_every_machine() -> None:
    tokens, labels = languages.generate(20, 10, 1)
    digest = hashlib.sha256(tokens.numpy().astype("<i8").tobytes() + labels.numpy().astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == "eb75037854af5d23"


def test_an_example_depends_on_its_number_alone() -> None:
    whole, part = languages.generate(30, 7, 2), languages.generate(10, 7, 2, start=20)
    assert all(torch.equal(a[20:], b) for a, b in zip(whole, part, strict=True))
    assert not torch.equal(whole[0][0], whole[0][7]), "the same automaton says other strings"
    whole[0].zero_()
    assert languages.generate(30, 7, 2)[0].any(), "what one changes is one's own"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strings": [0, 3]}, r"strings was \(0, 3\); it must be the fewest, at least 1, and the most"),
        ({"symbols": [5, 4]}, r"symbols was \(5, 4\)"),
        ({"test": [[0, 5]]}, "automata were 0 and length 949; they must be at least 1 and 2"),
        ({"strings": [1, 1], "symbols": [1, 1]}, "length 1; they must be at least 1 and 2"),
    ],
)
def test_bad_input(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        languages.task(**options)
