"""Retention: each reading against the text written out and read at once."""

import pytest
import torch

from palimpsest.eval.tasks import retention


def test_gaps_double_to_the_length():
    assert retention.doubling(64, 2) == (16, 32, 64, 128)
    assert retention.doubling(100, 1) == (16, 32, 64, 100)
    assert retention.doubling(8, 1) == (8,)


def test_each_reading_is_that_of_the_text_written_out(run):
    rows = torch.randint(1, 256, (3, 60), generator=torch.Generator().manual_seed(0))
    settings = retention.Settings(gaps=(21, 0, 40, 99), passage=20, chunk=16, batch=2)
    result = retention.run(run.model, rows, settings)
    assert (result["passage"], result["rows"], result["left_out"]) == (20, 3, [99])
    passage, following = rows[:, :20], rows[:, 20:]

    def last(text):
        with torch.no_grad():
            return run.model.per_token_loss(text[:, :-1], text[:, 1:])[0][:, -19:].mean(1)

    assert result["first"] == pytest.approx(last(passage).mean().item(), rel=1e-5)
    assert [item["gap"] for item in result["gaps"]] == [0, 21, 40]
    for item in result["gaps"]:
        between = following[:, : item["gap"]]
        second, unread = last(torch.cat([passage, between, passage], 1)), last(torch.cat([between, passage], 1))
        # float32 losses of about 10 nats, in pieces and at once.
        assert item["second"] == pytest.approx(second.mean().item(), rel=1e-5)
        assert item["unread"] == pytest.approx(unread.mean().item(), rel=1e-5)
        difference, remembered = second - last(passage), second - unread
        assert item["difference"] == pytest.approx(difference.mean().item(), abs=1e-4)
        assert item["remembered"] == pytest.approx(remembered.mean().item(), abs=1e-4)
        assert item["stderr"] == pytest.approx(difference.std().item() / 3**0.5, abs=1e-4)
        assert item["remembered_stderr"] == pytest.approx(remembered.std().item() / 3**0.5, abs=1e-4)


def test_bad_input_is_named(run):
    with pytest.raises(ValueError, match="retention passage was 1"):
        retention.Settings((4,), passage=1)
    with pytest.raises(ValueError, match=r"retention gaps were \(-1,\)"):
        retention.Settings((-1,))
    with pytest.raises(ValueError, match="held-out rows were 10 tokens long; they must hold 12"):
        retention.run(run.model, torch.ones(1, 10, dtype=torch.int64), retention.Settings((4,), passage=8))
