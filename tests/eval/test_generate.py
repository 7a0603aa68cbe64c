"""Sampling, the streamed text, and a text that is put down and taken up again."""

import json
import random
import subprocess
import sys

import pytest
import torch

from palimpsest.eval import generate as command
from palimpsest.eval.generate import Printer, generate
from palimpsest.eval.sampling import Sampling, Session, choose
from palimpsest.models import build
from palimpsest.train.tokenizer import ByteTokenizer

PROMPT = list(b"Line 12 counts ")


def test_greedy_takes_the_greatest_and_top_k_1_and_tiny_top_p_do_too():
    logits = torch.tensor([0.1, 3.0, -1.0, 2.9])
    for sampling in (Sampling(0.0), Sampling(1.0, top_k=1), Sampling(5.0, top_p=1e-9)):
        assert {choose(logits, sampling, draw) for draw in range(50)} == {1}


def test_samples_follow_the_distribution():
    probabilities = torch.tensor([0.5, 0.1, 0.25, 0.15])
    counts = torch.zeros(4)
    for draw in range(4000):
        counts[choose(probabilities.log(), Sampling(seed=9), draw)] += 1
    # The standard deviation of a share is at most 0.5 / sqrt(4000) = 0.008; 0.04 is five of them.
    assert torch.allclose(counts / 4000, probabilities, atol=0.04)


def test_top_k_and_top_p_leave_what_they_say():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    seen = [choose(logits, Sampling(top_k=3), draw) for draw in range(300)]
    assert set(seen) == {0, 1, 2}
    seen = [choose(logits, Sampling(top_p=0.65), draw) for draw in range(300)]
    assert set(seen) == {0, 1}
    flat = [choose(torch.zeros(4), Sampling(temperature=100.0), draw) for draw in range(300)]
    assert set(flat) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "values",
    [{"temperature": -0.1}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": 0}, {"seed": -1}],
)
def test_a_sampling_value_out_of_range_is_named(values):
    with pytest.raises(ValueError, match=f"{next(iter(values))} was"):
        Sampling(**values)


def test_tokens_equal_those_of_reading_everything_anew(run):
    """T = 1 steps with a state write what a forward of the whole text would."""
    said = list(generate(run.model, PROMPT, max_tokens=20, temperature=0))
    text = list(PROMPT)
    with torch.no_grad():
        for token in said:
            assert int(run.model(torch.tensor([text])).logits[0, -1].argmax()) == token
            text.append(token)
    assert len(set(said)) > 1


def test_the_same_seed_writes_the_same_and_another_does_not(run):
    first, again, other = (list(generate(run.model, PROMPT, max_tokens=30, seed=seed)) for seed in (4, 4, 5))
    assert first == again != other


def test_a_stop_token_ends_the_text(run):
    whole = list(generate(run.model, PROMPT, max_tokens=30, seed=4))
    cut = list(generate(run.model, PROMPT, max_tokens=30, seed=4, stop={whole[10]}))
    assert cut == whole[: whole.index(whole[10])]


def test_tokens_come_one_by_one(run):
    stream = generate(run.model, torch.tensor(PROMPT), max_tokens=10**9)
    assert [next(stream) for _ in range(3)]


@pytest.mark.parametrize("cut", [1, 7, 29])
def test_saved_and_loaded_goes_on_exactly(run, tmp_path, cut):
    sampling = Sampling(0.9, top_k=50, top_p=0.9, seed=3)
    whole = Session(run.model, sampling)
    whole.read(PROMPT)
    expected = list(whole.write(30))
    first = Session(run.model, sampling)
    first.read(PROMPT)
    begun = list(first.write(cut))
    first.save(tmp_path / "deep" / "text.state")
    rest = list(Session.load(tmp_path / "deep" / "text.state", run.model).write(30 - cut))
    assert begun + rest == expected


def test_more_prompt_after_loading_equals_the_prompt_in_one(run, tmp_path):
    first = Session(run.model, Sampling(0.0))
    first.read(PROMPT)
    said = list(first.write(5))
    first.save(tmp_path / "s")
    second = Session.load(tmp_path / "s", run.model)
    second.read(list(b" and then"))
    expected = list(generate(run.model, PROMPT + said + list(b" and then"), max_tokens=8, temperature=0))
    assert list(second.write(8)) == expected


def saved(run, tmp_path):
    session = Session(run.model)
    session.read(PROMPT)
    list(session.write(3))
    session.save(tmp_path / "text.state")
    return tmp_path / "text.state"


def test_a_state_of_another_model_is_named(run, tmp_path):
    path = saved(run, tmp_path)
    other = build(run.config.plain(), **{"model.dim": 32})
    with pytest.raises(ValueError, match=r"is of model .* it must be of model"):
        Session.load(path, other)


def test_a_damaged_state_is_named(run, tmp_path):
    path = saved(run, tmp_path)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"text\.state'.* is damaged"):
        Session.load(path, run.model)


@pytest.mark.parametrize(
    "change", [lambda text: text[: len(text) // 2], lambda text: text.replace('"drawn": 3', '"drawn": 4')]
)
def test_a_damaged_companion_is_named(run, tmp_path, change):
    path = saved(run, tmp_path)
    beside = path.with_name("text.state.json")
    beside.write_text(change(beside.read_text()))
    with pytest.raises(ValueError, match="is damaged"):
        Session.load(path, run.model)


def test_a_companion_of_another_schema_or_missing_is_named(run, tmp_path):
    path = saved(run, tmp_path)
    beside = path.with_name("text.state.json")
    beside.write_text(json.dumps({"schema": 99}))
    with pytest.raises(ValueError, match="has schema 99"):
        Session.load(path, run.model)
    beside.unlink()
    with pytest.raises(FileNotFoundError, match=r"text\.state\.json"):
        Session.load(path, run.model)


def test_an_empty_prompt_and_a_token_outside_are_named(run):
    with pytest.raises(ValueError, match="prompt was empty"):
        generate(run.model, [], max_tokens=1)
    with pytest.raises(ValueError, match="tokens had 256"):
        generate(run.model, [1, 256], max_tokens=1)


@pytest.mark.parametrize("seed", range(5))
def test_printed_pieces_join_to_the_decoded_text(seed):
    """Whole characters, broken ones and noise: the stream shows exactly what decoding all at once shows."""
    rng = random.Random(seed)
    raw = bytearray("naïve 日本語 😀 text ".encode() * 3)
    for _ in range(12):
        raw.insert(rng.randrange(len(raw)), rng.choice([0x80, 0xC3, 0xE2, 0xF0, 0xFF, 0x9F]))
    tokenizer, pieces = ByteTokenizer(), []
    printer = Printer(tokenizer)
    for token in raw:
        pieces.append(printer.push(token))
        assert len(printer.waiting) < 4
    pieces.append(printer.flush())
    assert "".join(pieces) == tokenizer.decode(list(raw))


def test_a_character_appears_only_when_it_is_whole():
    printer = Printer(ByteTokenizer())
    assert [printer.push(byte) for byte in "é€😀".encode()] == ["", "é", "", "", "€", "", "", "", "😀"]


def test_the_command_streams_saves_and_goes_on(run_folder, tmp_path, capsysbinary):
    shared = [str(run_folder), "--past-end", "--seed", "5", "--temperature", "0.9"]
    line = [sys.executable, "-m", "palimpsest.eval.generate", *shared, "--prompt", "-", "--max-tokens", "24"]
    done = subprocess.run(line, input="Line é ".encode(), capture_output=True, check=True)
    assert command.main([*shared, "--prompt", "Line é ", "--max-tokens", "9", "--save-state", str(tmp_path / "s")]) == 0
    first = capsysbinary.readouterr().out
    rest = [str(run_folder), "--past-end", "--max-tokens", "15", "--load-state", str(tmp_path / "s")]
    assert command.main(rest) == 0
    assert first + capsysbinary.readouterr().out == done.stdout
    assert done.stdout.endswith(b"\n") and len(done.stdout) > 20


def test_the_command_names_bad_input(run_folder, make_run, tmp_path, capsys):
    broken = make_run(tmp_path / "broken")
    (broken / "model.safetensors").unlink()
    cases = {
        ("nowhere", "--prompt", "a"): "run folder 'nowhere' not found",
        (broken, "--prompt", "a"): "has no model.safetensors",
        (run_folder, "--prompt", ""): "--prompt was empty",
        (run_folder,): "--prompt was not given",
        (run_folder, "--prompt", "a", "--temperature", "-1"): "temperature was -1.0",
        (run_folder, "--prompt", "a", "--top-p", "2"): "top_p was 2.0",
        (run_folder, "--prompt", "a", "--max-tokens", "0"): "--max-tokens was 0",
        (run_folder, "--load-state", tmp_path / "none"): "not found",
    }
    for arguments, message in cases.items():
        assert command.main([str(argument) for argument in arguments]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("error: ") == 1, arguments
