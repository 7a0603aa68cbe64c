"""Configuration faults: every message names the place, what was there, and what must be."""

from pathlib import Path
from typing import Any

import pytest

from palimpsest.models import ConfigError, build
from palimpsest.models.config import ModelConfig, apply_overrides, load_config, load_yaml, parse_override, validate

from .mixers import small_model

MAG = {"kind": "titans_mag", "heads": 2, "memory": {"heads": 2}}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ({"model.mixer.memory.heds": 2}, ["model.mixer.memory.heds", "unknown key 'heds'", "did you mean 'heads'?"]),
        ({"model.mixer.windw": 2}, ["model.mixer.windw", "did you mean 'window'?"]),
        ({"model.layer": 2}, ["model.layer", "in model", "did you mean 'layers'?"]),
        ({"model.zzz": 2}, ["model.zzz", "valid here: dim, ffn_hidden"]),
        ({"model.mixer.kind": "titan_mag"}, ["model.mixer.kind was 'titan_mag'", "did you mean 'titans_mag'?"]),
        ({"model.mixer": {"heads": 2}}, ["model.mixer.kind is missing", "neural_memory"]),
        ({"model.mixer": "titans_mag"}, ["mixer was 'titans_mag'", "section"]),
        ({"model.mixer": []}, ["model.mixer was []"]),
        ({"model.dim": "wide"}, ["model.dim was 'wide'", "integer"]),
        ({"model.dim": 0}, ["model.dim was 0", "greater than or equal to 1"]),
        ({"model.dim": 7}, ["heads of mixer titans_mag was 2", "divide dim = 7"]),
        ({"model.layers": True}, ["layers was True", "number"]),
        ({"model.mixer.heads": 8}, ["head width of mixer titans_mag was 1", "even"]),
        ({"model.mixer.kv_heads": 3}, ["model.mixer", "kv_heads was 3", "divide heads = 2"]),
        ({"model.mixer.memory.depth": 1}, ["model.mixer.memory", "depth was 1", "at least 2"]),
        ({"model.mixer.memory.bias": "l3"}, ["model.mixer.memory.bias was 'l3'", "'l2', 'dot', 'lp' or 'huber'"]),
        ({"model.mixer.memory": None}, ["model.mixer.memory was None"]),
        ({"train.steps": 3}, ["'train.steps'", "key of the model"]),
    ],
)
def test_a_fault_is_named(override: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        build({"model": small_model(MAG)}, **override)
    for word in words:
        assert word in str(error.value)


def test_every_fault_has_its_line() -> None:
    with pytest.raises(ConfigError) as error:
        build({"model": small_model([MAG, {"kind": "attention", "hads": 2}], dmi=3)})
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == ["model.mixer.1.hads", "model.dmi"]


def test_a_missing_key_and_section() -> None:
    with pytest.raises(ConfigError, match=r"^model\.vocab_size is missing; it must be given$"):
        build({"model": {key: value for key, value in small_model(MAG).items() if key != "vocab_size"}})
    with pytest.raises(ConfigError, match="model is missing"):
        build({"modle": {}})


def test_a_missing_file_names_where_it_was_looked_for() -> None:
    with pytest.raises(FileNotFoundError, match="tiny/titan_mag"):
        build("tiny/titan_mag")


def test_overrides() -> None:
    config = {"a": {"b": 1, "c": [{"d": 2}]}, "e": None}
    changed = apply_overrides(config, {"a.b": 3, "a.c.0.d": 4, "e.f": 5, "new.key": 6})
    assert changed == {"a": {"b": 3, "c": [{"d": 4}]}, "e": {"f": 5}, "new": {"key": 6}}
    assert config == {"a": {"b": 1, "c": [{"d": 2}]}, "e": None}
    with pytest.raises(ConfigError, match=r"a\.b was 1; it must be a section"):
        apply_overrides(config, {"a.b.x": 1})
    with pytest.raises(ConfigError, match=r"a\.c is a list of 1; '1' must be an index"):
        apply_overrides(config, {"a.c.1.d": 1})


def test_overrides_are_read_as_yaml() -> None:
    assert parse_override("train.lr=1e-3") == ("train.lr", 0.001)
    assert parse_override("a.b=null") == ("a.b", None)
    assert parse_override("a.b={kind: attention}") == ("a.b", {"kind": "attention"})
    assert parse_override("a.b=x=y") == ("a.b", "x=y")
    for text in ("a.b", "=3", "a..b=3", "a=[1"):
        with pytest.raises(ConfigError, match="override"):
            parse_override(text)


def test_yaml_files(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for text, word in (("a: 1\na: 2\n", "twice"), ("a: [1\n", "not valid YAML"), ("- 1\n", "must hold a mapping")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=word):
            load_yaml(path)
    path.write_text("lr: 1e-3\neps: 1.5e-8\nn: 12\nname: 1e\n")
    assert load_yaml(path) == {"lr": 1e-3, "eps": 1.5e-8, "n": 12, "name": "1e"}


def test_a_file_stands_on_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = "model: {dim: 8, mixer: {kind: a, heads: 2, memory: {depth: 3}}}\ndata: {source: [x, y]}\n"
    Path("first.yaml").write_text(first)
    Path("second.yaml").write_text(
        "base: first.yaml\nname: s\nmodel: {mixer: {memory: {bias: lp}}}\ndata: {source: [z]}\n"
    )
    Path("third.yaml").write_text("base: second.yaml\nmodel: {dim: 9, mixer: {kind: b}}\n")
    mixer = {"kind": "a", "heads": 2, "memory": {"depth": 3, "bias": "lp"}}
    assert load_config("second.yaml") == {"name": "s", "model": {"dim": 8, "mixer": mixer}, "data": {"source": ["z"]}}
    wanted = {"name": "s", "model": {"dim": 9, "mixer": {"kind": "b"}}, "data": {"source": ["z"]}}
    assert load_config("third.yaml") == wanted
    Path("first.yaml").write_text("base: third.yaml")
    with pytest.raises(ConfigError, match=r"base of .*first.yaml was 'third.yaml'; it must not lead back"):
        load_config("third.yaml")
    Path("first.yaml").write_text("base: [a]")
    with pytest.raises(ConfigError, match=r"base of .*first.yaml was \['a'\]; it must be the name of"):
        load_config("first.yaml")
    Path("first.yaml").write_text("base: nowhere")
    with pytest.raises(FileNotFoundError, match="'nowhere' not found"):
        load_config("first.yaml")


def test_mixers_are_cycled_and_the_mlp_rounded() -> None:
    config = validate(ModelConfig, small_model([MAG, {"kind": "attention", "heads": 2}], layers=5, ffn_hidden=None))
    kinds = [config.mixer_of(layer).kind for layer in range(5)]
    assert kinds == ["titans_mag", "attention", "titans_mag", "attention", "titans_mag"]
    assert config.hidden == 32
    assert validate(ModelConfig, config.model_dump()) == config
