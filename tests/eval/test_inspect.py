"""The page about a model's memories: what it says is what the model computes, and it stands by itself."""

import json
import re

import pytest
import torch

from palimpsest.eval import harness, inspect

MIXTURE = {"kind": "mixture", "heads": 2, "memories": 3, "top_k": 2}
TEXT = "Line 7 counts 49 stones </script> and 0 birds.\nZürich\n"


@pytest.fixture(scope="module")
def routed(make_run, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("inspect") / "routed", mixer=MIXTURE)


def data_of(page: str) -> dict:
    return json.loads(re.search(r"const data = (.*);\n", page).group(1).replace("<\\/", "</"))


def test_the_page_of_a_router(routed, tmp_path, capsys) -> None:
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    assert inspect.main([str(routed), "--text", str(tmp_path / "text"), "--out", str(tmp_path / "a.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "http" not in page and "src=" not in page and page.count("</script>") == 1
    found, model = data_of(page), harness.open_run(routed, torch.device("cpu")).model
    ids = list(TEXT.encode())
    assert len(found["tokens"]) == len(ids) and found["tokens"][:4] == list("Line") and "⟨195⟩" in found["tokens"]
    names = [c["name"] for c in found["channels"]]
    shown = ("memories", "entropy", "write", "retention")
    assert names == ["loss (nats)", *(f"layer.{i}/{n}" for i in (0, 1) for n in shown)]
    tokens = torch.tensor([ids])
    loss = model.per_token_loss(tokens[:, :-1], tokens[:, 1:])[0][0]
    assert found["channels"][0]["values"][0] is None
    assert torch.allclose(torch.tensor(found["channels"][0]["values"][1:]), loss, atol=1e-5)
    shares = torch.tensor(found["channels"][1]["shares"])
    assert shares.shape == (3, len(ids)) and ((shares > 0).sum(0) == 2).all()
    assert torch.allclose(shares.sum(0), torch.ones(len(ids)), atol=1e-4)


def test_a_neural_memory_tells_its_surprise_and_gates(run) -> None:
    found = inspect.look(run, list(TEXT.encode()))
    names = {c["name"] for c in found["channels"]}
    assert {f"layer.1/{n}" for n in ("retention", "momentum", "step", "loss_before", "loss_after", "gate")} <= names
    tokens = torch.tensor([list(TEXT.encode())])
    means = run.model.diagnostics(tokens)
    for c in found["channels"][1:]:
        assert abs(sum(c["values"]) / len(c["values"]) - means[c["name"]]) <= 1e-4 * max(1.0, abs(means[c["name"]]))


def test_only_the_beginning_is_read(routed, tmp_path) -> None:
    (tmp_path / "text").write_text("ü" * 50, encoding="utf-8")  # and a character may be cut
    arguments = [str(routed), "--text", str(tmp_path / "text"), "--tokens", "11", "--out", str(tmp_path / "a.html")]
    assert inspect.main(arguments) == 0
    assert len(data_of((tmp_path / "a.html").read_text(encoding="utf-8"))["tokens"]) == 11


@pytest.mark.parametrize(
    ("text", "more", "words"),
    [
        ("", [], "text had 0 tokens; it must have at least two"),
        ("ab", ["--tokens", "1"], "--tokens was 1; it must be at least 2"),
        (None, [], "No such file"),
    ],
)
def test_bad_input(routed, tmp_path, capsys, text, more, words) -> None:
    if text is not None:
        (tmp_path / "text").write_text(text)
    assert inspect.main([str(routed), "--text", str(tmp_path / "text"), *more]) == 2
    assert words in capsys.readouterr().err and not (routed / "inspect.html").exists()


def test_the_retention_curve_is_the_mean_by_distance() -> None:
    cosines = torch.tensor([[0.0, 0.1, 0.2, 0.3], [1.0, 0.1, 0.2, 0.3], [0.5, 0.6, 0.8, 0.9], [0.2, 0.3, 0.4, 0.5]])
    found = inspect.curve(cosines, [0, 1, 3, 4])
    assert [(p["from"], p["to"], p["pairs"]) for p in found] == [(0, 0, 8), (1, 1, 3), (2, 3, 4), (4, 7, 1)]
    means = [2.1 / 8, (1.0 + 0.8 + 0.5) / 3, (0.6 + 0.5 + 0.4 + 0.3) / 4, 0.2]
    assert [p["recall"] for p in found] == pytest.approx(means, abs=1e-5)


def test_the_page_tells_what_a_memory_returns_later(run, routed) -> None:
    for opened in (run, harness.open_run(routed, torch.device("cpu"))):
        found = inspect.look(opened, list(TEXT.encode()))
        assert set(found["recall"]) == {"layer.0", "layer.1"} and found["marks"][0] == 0
        assert found["marks"][-1] == len(found["tokens"]) and len(found["marks"]) == inspect.MARKS + 1
        for told in found["recall"].values():
            cosines = torch.tensor(told["cosines"])
            assert cosines.shape == (33, len(found["tokens"])) and cosines.abs().max() <= 1 + 1e-4
            again = inspect.curve(cosines, found["marks"])
            assert [p["recall"] for p in told["curve"]] == pytest.approx([p["recall"] for p in again], abs=2e-5)
    found = inspect.look(run, [65, 66, 67])
    assert found["marks"] == [0, 1, 2, 3]
