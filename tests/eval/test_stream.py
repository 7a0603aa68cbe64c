"""Streaming a long text: every token scored once, in a state and a process that do not grow."""

import json

import torch

from palimpsest.eval import stream
from palimpsest.train.data import prepare


def test_the_command_scores_every_token_and_shows_the_memory(run_folder, run, tmp_path, capsys):
    folder, out = run_folder, tmp_path / "stream.json"
    assert stream.main([str(folder), "--tokens", "4001", "--chunk", "400", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert [row["tokens"] for row in found["rows"]] == [400 * i for i in range(1, 11)]
    assert found["state_bytes"]["least"] == found["state_bytes"]["most"] > 0
    assert abs(found["process_growth"]) < 0.05
    assert "the process grew" in capsys.readouterr().out

    text = torch.from_numpy(prepare(run.config.data).split("train").read(0, 4001))[None]
    with torch.no_grad():
        loss, _ = run.model.per_token_loss(text[:, :-1], text[:, 1:])
    bits = [float(part.double().mean()) / 0.6931471805599453 for part in loss.split(400, 1)]
    assert [row["bits_per_token"] for row in found["rows"]] == [round(x, 4) for x in bits]


def test_more_tokens_than_there_are_is_refused(run_folder, capsys):
    assert stream.main([str(run_folder), "--tokens", "100000000"]) == 2
    assert "tokens was 100,000,000; it must lie between 2 and" in capsys.readouterr().err
