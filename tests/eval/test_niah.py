"""The needle tasks: their texts, their values, and a model that is known to answer."""

import re
import types
import uuid

import pytest
import torch

from palimpsest.eval.tasks import haystack, niah
from palimpsest.train.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("niah") / "book.txt"
    path.write_text("".join(f"The {i}th ship came home. " for i in range(60)))
    return str(path)


UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"


@pytest.mark.parametrize(("variant", "shape"), [(1, r"\d{7}"), (3, UUID)])
def test_an_example_has_its_length_and_one_needle_at_its_depth(variant, shape, book):
    filler = haystack.make_filler(BYTES.encode, book if variant > 1 else None, 900)
    for depth in (0.0, 0.5, 1.0):
        for example in niah.generate(BYTES.encode, filler, variant, length=900, depth=depth, count=3):
            text = BYTES.decode(example.prompt)
            assert len(example.prompt) + len(example.answer) == 900 and text.count(example.value) == 1
            assert re.fullmatch(shape, example.value) and BYTES.decode(example.answer) == f" {example.value}"
            key = text.rsplit(" for ", 1)[1].removesuffix(" mentioned in the provided text is")
            before, after = text.split(f"One of the special magic {niah.KINDS[variant]}s for {key} is: ")
            around = before.split("afterwards.\n")[1], after.split(". ", 1)[1].split("\nWhat is the special")[0]
            assert len(around[0]) / len("".join(around)) == pytest.approx(depth, abs=0.05)
            assert ("ship came home" in text) == (variant > 1)


def test_values_are_fixed_by_the_seed():
    assert niah.values("number", 0, 2) == ["5757234", "2566608"]
    found = niah.values("uuid", 0, 40)
    assert found[0] == "9efa4afa-deb5-4ce9-a618-a88a15985433" and len(set(found)) == 40
    assert {uuid.UUID(value).version for value in found} == {4} and found[3:5] == niah.values("uuid", 0, 5)[3:]
    assert found[0] != niah.values("uuid", 1, 1)[0]


class Oracle(torch.nn.Module):
    """A model with a perfect memory: its state is the text itself, and it says what stands after the needle."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, tokens, state=None):
        seen = tokens if state is None else torch.cat([state, tokens], dim=1)
        logits = torch.zeros(*tokens.shape, 256)
        for row, line in enumerate(seen.tolist()):
            text = bytes(line).decode()
            if "text is" in text:
                value = re.search(r" is: (\S+)\. ", text).group(1)
                logits[row, -1, ord(f" {value}".ljust(60)[len(text.split("provided text is")[1])])] = 1.0
        return types.SimpleNamespace(logits=logits, state=seen)


def test_all_three_are_asked_where_there_is_prose_and_say_which(book):
    shape = {"depths": (0.0, 1.0), "examples": 2, "chunk": 300}
    result = niah.run(Oracle(), BYTES, niah.Settings((700,), filler=book, **shape))
    names = ["S-NIAH-1, filler: own sentences", "S-NIAH-2, filler: book.txt", "S-NIAH-3, filler: book.txt"]
    assert [variant["name"] for variant in result["variants"]] == names
    assert all(variant["accuracy"] == variant["digits"] == 1.0 for variant in result["variants"])
    assert [len(variant["cells"]) for variant in result["variants"]] == [2, 2, 2]
    alone = niah.run(Oracle(), BYTES, niah.Settings((100, 450), **shape))
    assert [variant["left_out"] for variant in alone["variants"]] == [[100]]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="niah filler was None; it must name a text file for variant 3"):
        niah.Settings((900,), variants=(1, 3))
    with pytest.raises(ValueError, match=r"niah variants were \(4,\)"):
        niah.Settings((900,), variants=(4,), filler="x")
    filler = haystack.own_filler(BYTES.encode)
    with pytest.raises(ValueError, match=r"depth was 1\.5"):
        niah.generate(BYTES.encode, filler, 1, length=900, depth=1.5, count=1)
    with pytest.raises(ValueError, match="length was 100; it must be at least 3"):
        niah.generate(BYTES.encode, filler, 1, length=100, depth=0.5, count=1)
