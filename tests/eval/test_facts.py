"""Facts in filler: stories against a reader of their text, the layout, and a model that is known to answer."""

import re
import types

import pytest
import torch

from palimpsest.eval.tasks import facts, haystack
from palimpsest.train.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()


def answer(sentences, question):
    """The place that a question asks for, read off the text alone; None where the sentences do not tell."""
    where, holds, been = {}, {}, {}
    for sentence in sentences:
        person, did, what = re.fullmatch(r"(\w+) (went to|picked up|put down) the (\w+)\.", sentence).groups()
        if did == "went to":
            where[person] = what
        elif did == "picked up":
            holds[what] = person
        elif holds.pop(what, None) != person:
            return None
        for thing, holder in holds.items():
            places = been.setdefault(thing, [])
            if holder in where and (not places or places[-1] != where[holder]):
                places.append(where[holder])
    if found := re.fullmatch(r"Where is (?:the )?(\w+)\?", question):
        name = found.group(1)
        return where.get(name) or (been[name][-1] if been.get(name) else None)
    thing, place = re.fullmatch(r"Where was the (\w+) before the (\w+)\?", question).groups()
    at = been.get(thing, []).index(place) if place in been.get(thing, []) else 0
    return been[thing][at - 1] if at else None


@pytest.mark.parametrize("supports", [1, 2, 3])
def test_a_reader_of_the_text_answers_and_needs_the_supporting_facts(supports):
    answers = []
    for number in range(60):
        told = facts.story(supports, 8, 0, number)
        assert len(told.facts) == 8 and len(told.supports) == supports
        assert answer(told.facts, told.question) == told.answer
        kept = [fact for i, fact in enumerate(told.facts) if i in told.supports]
        if "put down" not in "".join(kept):  # what is put down may have been picked up long before
            assert answer(kept, told.question) == told.answer
            for i in range(supports):  # each of them is needed
                assert answer(kept[:i] + kept[i + 1 :], told.question) != told.answer
        answers.append(told.answer)
    assert set(answers) == set(facts.PLACES), "every place is an answer"


def test_the_worked_example_and_the_same_story_everywhere():
    told = facts.story(2, 6, seed=0, number=1)
    shown = [*told.facts, told.question, f"{told.answer}, from facts {', '.join(str(i + 1) for i in told.supports)}"]
    assert [" ".join(line.split()) for line in shown] == [
        " ".join(line.split()) for line in facts.__doc__.split("::\n\n")[1].split("\n\nDraws")[0].split("\n")
    ]
    assert told == facts.story(2, 6, 0, 1) != facts.story(2, 6, 1, 1)
    assert {len(place) for place in facts.PLACES} == {7}


def test_the_facts_lie_in_order_in_a_prompt_of_the_length():
    filler = haystack.own_filler(BYTES.encode)
    shape = {"supports": 2, "facts": 6, "count": 3}
    for n, example in enumerate(facts.generate(BYTES.encode, filler, length=700, **shape)):
        text, told = BYTES.decode(example.prompt), facts.story(2, 6, 0, n)
        assert len(example.prompt) + len(example.answer) == 700
        places = [text.index(fact) for fact in told.facts]
        assert places == sorted(places) and text.endswith(f"\nQuestion: {told.question}\nAnswer: the")
        assert example.value == told.answer and BYTES.decode(example.answer) == f" {told.answer}"
        assert text.count("The rain came over the hills. ") >= 2
    with pytest.raises(ValueError, match="length was 100; it must be at least"):
        facts.generate(BYTES.encode, filler, length=100, **shape)


class Reader(torch.nn.Module):
    """Reads the prompt as :func:`answer` does; ``sure`` or, if not, only a little likelier than a byte that is none."""

    def __init__(self, sure=True):
        super().__init__()
        self.unused, self.sure = torch.nn.Parameter(torch.zeros(1)), sure

    def forward(self, tokens, state=None):
        seen = tokens if state is None else torch.cat([state, tokens], dim=1)
        logits = torch.zeros(*tokens.shape, 256)
        for row, line in enumerate(seen.tolist()):
            text = bytes(line).decode()
            if "Answer: the" not in text:
                continue
            story, said = text.split("\nQuestion: ")
            question, said = said.split("\nAnswer: the")
            told = re.findall(r"[A-Z][a-z]+ (?:went to|picked up|put down) the [a-z]+\.", story)
            right = f" {answer(told, question)}".ljust(30)
            for back in range(min(tokens.shape[1], len(said) + 1)):
                logits[row, -1 - back, ord(right[len(said) - back])] = 2.0
                logits[row, -1 - back, ord("x")] = 1.0 if self.sure else 3.0
        return types.SimpleNamespace(logits=logits, state=seen)


@pytest.mark.parametrize(("sure", "accuracy"), [(True, 1.0), (False, 0.0)])
def test_a_model_that_reads_is_scored_right(sure, accuracy):
    result = facts.run(Reader(sure), BYTES, facts.Settings((100, 600), facts=6, examples=3, chunk=200))
    assert [(cell["length"], cell["supports"]) for cell in result["cells"]] == [(600, 1), (600, 2), (600, 3)]
    assert (result["accuracy"], result["choice"]) == (accuracy, 1.0)
    assert result["left_out"] == [100] and result["filler"] == "own sentences"


def test_the_first_place_named_counts():
    assert facts.first_place(" old station, not the kitchen") == "station"
    assert facts.first_place(" nowhere") is None


def test_bad_input_is_named():
    for supports, count in ((4, 8), (3, 2)):
        with pytest.raises(ValueError, match=f"facts were {count} and supports {supports}"):
            facts.story(supports, count, 0, 0)
