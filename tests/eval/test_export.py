"""Tokenizers in the Hugging Face form, and a run in the form that their libraries read."""

import random
from pathlib import Path

import pytest
import tokenizers
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from palimpsest.eval import export
from palimpsest.eval.generate import generate
from palimpsest.eval.harness import Run
from palimpsest.models.hub import PalimpsestForCausalLM
from palimpsest.train.tokenizer import ByteTokenizer, VocabularyTokenizer

TEXT = "Aé漢😀 Ā Ġ\n\t <|endoftext|>  naïve — 日本語 " + "".join(map(chr, range(0x20, 0x400)))


def test_bytes_are_themselves(tmp_path: Path) -> None:
    ours, theirs = ByteTokenizer(), export.hugging_face_tokenizer(ByteTokenizer())
    theirs.save_pretrained(tmp_path)
    drawn = random.Random(0)
    strings = [[drawn.randrange(256) for _ in range(30)] for _ in range(100)] + [list(range(256))]
    for made in (theirs, AutoTokenizer.from_pretrained(tmp_path)):
        assert len(made) == 256
        assert made(TEXT).input_ids == ours.encode(TEXT) and made("a\0b").input_ids == [97, 0, 98]
        assert all(made.decode(tokens) == ours.decode(tokens) for tokens in strings)
        assert made.decode([97, 0, 98], skip_special_tokens=True) == "ab"
        assert made.eos_token_id == made.bos_token_id == made.pad_token_id == 0
        assert made(["ab", "c"], padding=True).input_ids == [[97, 98], [0, 99]]


def test_a_vocabulary_adds_nothing_and_reads_special_tokens_as_text(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TEXT * 3], trainer)
    template = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    backend.post_processor = template
    ours = VocabularyTokenizer("x", backend, 0)
    export.hugging_face_tokenizer(ours).save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXT).input_ids == ours.encode(TEXT) and 0 not in ours.encode(TEXT)
    assert theirs.decode(ours.encode(TEXT)) == TEXT and theirs.eos_token_id == 0


def test_a_run_as_a_folder_of_theirs(
    run: Run, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export.main([str(run_folder), str(tmp_path / "out")]) == 0
    assert "tokenizer.json" in capsys.readouterr().out
    model, tokenizer = (kind.from_pretrained(tmp_path / "out") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert isinstance(model, PalimpsestForCausalLM) and model.config.run == run.config.plain()
    assert model.generation_config.eos_token_id == 0
    said = model.generate(**tokenizer("Line 12 ", return_tensors="pt"), max_new_tokens=5, do_sample=False)[0, 8:]
    expected = list(generate(run.model, torch.tensor(list(b"Line 12 ")), max_tokens=5, temperature=0, stop={0}))
    assert [token for token in said.tolist() if token] == expected
    assert export.main(["nowhere", str(tmp_path)]) == 2
