"""Evaluation of a model with memory over segments: it writes, is asked for passkeys and looked into as any other."""

import pytest
import torch

from palimpsest.eval import harness, inspect
from palimpsest.eval.generate import generate
from palimpsest.eval.sampling import Sampling, Session
from palimpsest.eval.tasks import haystack, passkey

PROMPT = list(b"Line 12 counts 4 stones and")  # 27 tokens: three segments of 8, and three tokens


@pytest.fixture(scope="module")
def segments(make_run, tmp_path_factory):
    hmt = {"segment": 8, "sensory": 2, "memories": 4, "bptt": 2}
    return harness.open_run(make_run(tmp_path_factory.mktemp("segments") / "hmt", hmt=hmt), torch.device("cpu"))


def test_tokens_equal_those_of_reading_everything_anew(segments, tmp_path):
    said = list(generate(segments.model, PROMPT, max_tokens=14, temperature=0))
    text = list(PROMPT)
    with torch.no_grad():
        for token in said:
            assert int(segments.model(torch.tensor([text])).logits[0, -1].argmax()) == token
            text.append(token)
    session = Session(segments.model, Sampling(0.0))
    session.read(PROMPT)
    first = list(session.write(5))
    session.save(tmp_path / "state")
    assert first + list(Session.load(tmp_path / "state", segments.model).write(9)) == said


def test_a_passkey_is_asked_for_in_pieces_as_at_once(segments):
    length = passkey.shortest(segments.tokenizer.encode) + 50
    (example,) = passkey.generate(segments.tokenizer.encode, length=length, depth=0.5, count=1)
    prompt = torch.tensor([example.prompt])
    model = segments.model
    said = [haystack.write(model, haystack.read(model, prompt, chunk), 6) for chunk in (length, 32, 13)]
    assert torch.equal(said[0], said[1]) and torch.equal(said[0], said[2])


def test_it_can_be_looked_into(segments, capsys):
    text = segments.folder / "text"
    text.write_text("Line 12 counts 4 stones and 5 birds.\n")
    assert inspect.main([str(segments.folder), "--text", str(text)]) == 0
    page = (segments.folder / "inspect.html").read_text()
    assert '"hmt/age"' in page and '"layer.1/loss_before"' in page
