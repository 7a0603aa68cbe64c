"""What stands around a needle, and how a model is asked: against the whole text read at once."""

import pytest
import torch

from palimpsest.eval.tasks import haystack
from palimpsest.train.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()


def test_pieces_lie_between_sentences_at_their_depth_in_order():
    filler = haystack.Filler("x", [list(b"aa. "), list(b"bbbb. ")])
    assert bytes(filler.around([b"1", b"2", b"3"], [0.0, 0.45, 1.0], 20)) == b"1aa. bbbb. 2aa. bbbb. 3"
    assert bytes(filler.around([b"1"], [0.3], 13)) == b"b. 1aa. bbbb. "
    assert filler.around([b"1"], [0.5], 0) == [ord("1")]
    tokens, borders = filler.stretch(13)
    assert bytes(tokens) == b"b. aa. bbbb. " and borders.tolist() == [0, 3, 7, 13]


def test_prose_is_the_sentences_of_a_file_as_far_as_they_are_needed(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("One went.\nTwo   came!\n\nWas it three? The end")
    whole = haystack.make_filler(BYTES.encode, str(path), 1000)
    assert whole.name == "book.txt"
    assert [bytes(s).decode() for s in whole.sentences] == ["One went. ", "Two came! ", "Was it three? ", "The end "]
    assert len(haystack.prose(BYTES.encode, path, 11).sentences) == 2
    assert haystack.make_filler(BYTES.encode, None, 5).name == "own sentences"
    for content, words in ((b" \n", "it is empty"), (b"\xff\xfe", "must be UTF-8 text")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            haystack.prose(BYTES.encode, path, 5)
    with pytest.raises(FileNotFoundError, match="filler was '.*gone'; it must be a text file"):
        haystack.prose(BYTES.encode, tmp_path / "gone", 5)


def test_score_counts_the_value_anywhere_and_characters_at_their_place():
    assert haystack.score(" 4821763", "4821763") == (True, 1.0)
    assert haystack.score(" it is 4821763.", "4821763") == (True, 0.0)
    assert haystack.score(" 4821999.", "4821763") == (False, 4 / 7)
    assert haystack.score("", "4821763") == (False, 0.0)


def test_reading_in_pieces_and_going_on_is_the_whole_read_at_once(run):
    prompts = torch.randint(1, 256, (2, 45), generator=torch.Generator().manual_seed(0))
    after = haystack.read(run.model, prompts, 16)
    candidate = [7, 200, 31]
    found = haystack.likelihood(run.model, after, candidate)
    said = haystack.write(run.model, after, 3)
    for row in range(2):
        whole = torch.cat([prompts[row], torch.tensor(candidate)])[None]
        with torch.no_grad():
            told = run.model(whole).logits[0].double().log_softmax(-1)
            greedy = run.model(torch.cat([prompts[row], said[row, :2]])[None]).logits[0, 44:].argmax(-1)
        expected = sum(float(told[44 + i, token]) for i, token in enumerate(candidate))
        assert float(found[row]) == pytest.approx(expected, rel=1e-4)  # float32 logits in pieces and at once
        assert greedy.tolist() == said[row].tolist()


def test_lengths_too_short_are_left_out_or_refused(caplog):
    with caplog.at_level("INFO", logger="palimpsest.eval"):
        assert haystack.long_enough("x", (64, 320, 100), 100) == ([320, 100], [64])
    assert "x: lengths [64] are left out, the question alone takes 100 tokens" in caplog.text
    with pytest.raises(ValueError, match=r"x lengths were \(64,\); at least one must hold 100 tokens"):
        haystack.long_enough("x", (64,), 100)
