"""Tokenizers: nothing is lost on the way there and back, and bytes are counted."""

import pickle
import sys

import pytest
import tokenizers
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from palimpsest.train.sources import DataError
from palimpsest.train.tokenizer import ByteTokenizer, VocabularyTokenizer, load_tokenizer

TEXT = "def forward(self, x):\n    return x + 1  # naïve — 日本語 🙂 <|endoftext|>\n" * 20
any_text = settings(deadline=None, database=None, derandomize=True, max_examples=60)
texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


def byte_level(special: str = "<|endoftext|>", size: int = 400) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[special], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TEXT], trainer)
    return backend


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "bpe.json"
    byte_level().save(str(path))
    return load_tokenizer(str(path))


@any_text
@given(text=texts)
def test_bytes_round_trip(text):
    tokenizer = load_tokenizer("bytes")
    tokens = tokenizer.encode(text)
    assert tokens == list(text.encode()) == tokenizer.encode(text.encode())
    assert tokenizer.decode(tokens) == text
    assert tokenizer.bytes_per_token(torch.tensor(tokens, dtype=torch.int64)).sum() == len(text.encode())


def test_bytes_contract():
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.separator, tokenizer.identity) == (256, 0, {"name": "bytes"})
    assert tokenizer.decode([0xE2, 0x82]) == "\ufffd"
    assert tokenizer.bytes_per_token(torch.tensor([[0, 65], [-100, 200]])).tolist() == [[0.0, 1.0], [0.0, 1.0]]


@any_text
@given(text=texts)
def test_vocabulary_round_trip(vocabulary, text):
    tokens = vocabulary.encode(text)
    assert vocabulary.decode(tokens) == text
    assert vocabulary.bytes_per_token(torch.tensor(tokens, dtype=torch.int64)).sum() == len(text.encode())
    assert all(0 <= token < vocabulary.vocab_size for token in tokens)


def test_text_never_makes_a_separator(vocabulary):
    tokens = vocabulary.encode(TEXT)
    assert vocabulary.separator not in tokens and vocabulary.decode(tokens) == TEXT
    assert len(tokens) < len(TEXT.encode()) / 2
    assert vocabulary.bytes_per_token(torch.tensor([vocabulary.separator])).tolist() == [0.0]


def test_another_process_has_the_same_tokenizer(vocabulary):
    """It is sent what was found, but the tensor, and reads a separator that a text spells out as plain text, too."""
    counts, table = vocabulary.byte_counts, vocabulary.byte_table
    there = pickle.loads(pickle.dumps(vocabulary))
    assert "byte_table" not in there.__dict__ and there.__dict__["byte_counts"].tolist() == counts.tolist()
    assert torch.equal(there.byte_table, table) and there.identity == vocabulary.identity
    assert there.vocab_size == vocabulary.vocab_size and there.separator == vocabulary.separator
    assert there.encode(TEXT) == vocabulary.encode(TEXT) and vocabulary.separator not in there.encode(TEXT)


def test_one_by_one_equals_together(vocabulary):
    pieces = [TEXT.encode(), b"x", "é".encode()]
    assert [found.tolist() for found in vocabulary.encode_documents(pieces)] == [vocabulary.encode(p) for p in pieces]


@pytest.mark.parametrize("text", ["x", TEXT])
def test_truncation_padding_and_templates_of_a_file_are_switched_off(text):
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer = VocabularyTokenizer("x", backend, 0)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_identity_is_the_content(tmp_path):
    paths = [tmp_path / name for name in ("a.json", "b.json", "c.json")]
    for path, size in zip(paths, (400, 400, 300), strict=True):
        byte_level(size=size).save(str(path))
    sums = [load_tokenizer(str(path)).identity["sha256"] for path in paths]
    assert sums[0] == sums[1] != sums[2]


def unigram() -> tokenizers.Tokenizer:
    """Pieces with the word mark, and bytes for what the vocabulary lacks, as in Llama's tokenizers."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((f"<0x{i:02X}>", -9.0) for i in range(256))]
    pieces += [("\u2581the", -1.0), ("\u2581", -3.0), ("cat", -1.0), ("a", -4.0)]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def test_bytes_of_word_marks_and_byte_pieces():
    tokenizer = VocabularyTokenizer("x", unigram(), 1)
    text = "cat the cat é"
    tokens = tokenizer.encode(text)
    counts = tokenizer.bytes_per_token(torch.tensor(tokens))
    assert tokenizer.decode(tokens) == text and counts.tolist() == [3, 4, 1, 3, 1, 1, 1]
    assert tokenizer.bytes_per_token(torch.tensor([-100, 0])).tolist() == [0, 5]


def test_bytes_of_word_pieces_and_added_tokens():
    words = {"[UNK]": 0, "[SEP]": 1, "run": 2, "##ning": 3}
    backend = tokenizers.Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    backend.normalizer, backend.decoder = normalizers.Lowercase(), decoders.WordPiece()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["[SEP]", "[UNK]"])
    backend.add_tokens(["éé"])
    tokenizer = VocabularyTokenizer("x", backend, 1)
    tokens = tokenizer.encode("Running éé")
    assert tokens == [2, 3, 4]
    assert tokenizer.bytes_per_token(torch.tensor(tokens)).tolist() == [3, 4, 4]


def test_hugging_face_folder(tmp_path):
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level("<end>"), eos_token="<end>")
    made.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.decode([tokenizer.separator]) == "<end>"
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_hugging_face_folder_without_a_separator(tmp_path):
    transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level()).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"data.tokenizer was .* must have an eos, bos or sep token"):
        load_tokenizer(str(tmp_path))


def test_unknown_tokenizers_are_named(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"data.tokenizer was 'byte'; it must be 'bytes', the path .* or a Hugging"):
        load_tokenizer("byte")
    with pytest.raises(DataError, match=r"data.tokenizer was 'no.json'; it must be an existing file"):
        load_tokenizer("no.json")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DataError, match=r"data.tokenizer was 'gpt2'.*palimpsest\[hf\]"):
        load_tokenizer("gpt2")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"data.tokenizer was 'no.json'.*palimpsest\[data\]"):
        load_tokenizer("no.json")


@pytest.mark.parametrize("content", [b"", b"not json", b'{"a": 1}', b'{"model": {"type": "BPE"', b"\xff\xfe"])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, content):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"data.tokenizer was '.*bad.json'; it must be a JSON file of the tokenizers"):
        load_tokenizer(str(path))


def test_a_vocabulary_without_a_separator_is_refused(tmp_path):
    byte_level("<end>").save(str(tmp_path / "bare.json"))
    with pytest.raises(DataError, match=r"bare.json', whose vocabulary has no document separator; it must have one of"):
        load_tokenizer(str(tmp_path / "bare.json"))
