"""The run config: every bad key or value is named, with its place and what it must be."""

import pytest
import yaml

from palimpsest.models.config import ConfigError
from palimpsest.train.__main__ import main
from palimpsest.train.config import FREE, RunConfig, TrainConfig, parse_overrides, read_config

MODEL = {"vocab_size": 256, "dim": 16, "layers": 1, "mixer": {"kind": "attention", "heads": 2}}


def read(**overrides):
    return read_config(
        {"name": "x", "model": MODEL}, {key.replace("__", "."): value for key, value in overrides.items()}
    )


def test_everything_but_the_model_has_a_default_and_a_run_folder_of_its_name():
    config = read()
    assert str(config.folder) == "runs/x"
    assert str(read(train__out="elsewhere").folder) == "elsewhere"


def test_the_resolved_text_reads_back_as_the_same_config():
    config = read(train__lr=3e-4, train__betas=[0.8, 0.9], data__validation_fraction=0.1, eval__prompt="é: '\n")
    assert read_config(yaml.safe_load(config.to_yaml())) == config
    assert read_config(config.plain()) == config


def test_a_file_gives_the_name_and_overrides_win_over_it(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({"model": MODEL, "train": {"lr": 0.1}}))
    config = read_config(path, parse_overrides(["train.lr=1e-3", "train.grad_clip=null", "seed=1", "seed=2"]))
    assert (config.name, config.train.lr, config.train.grad_clip, config.seed) == ("small", 1e-3, None, 2)


BAD = [
    ({"train__step": 5}, "train.step: unknown key 'step' in train; did you mean 'steps'?"),
    ({"trian__steps": 5}, "trian: unknown key 'trian'.*did you mean 'train'?"),
    ({"data__sorce": "text"}, "data.sorce: unknown key.*did you mean 'source'?"),
    ({"eval__promt": "a"}, "eval.promt: unknown key.*did you mean 'prompt'?"),
    ({"model__mixer": {"kind": "atention"}}, "model.mixer.kind was 'atention'.*did you mean 'attention'?"),
    ({"train__steps": 0}, "train.steps was 0; it must be greater than or equal to 1"),
    ({"train__steps": "many"}, "train.steps was 'many'; it must be a valid integer"),
    ({"train__steps": True}, "steps was True; it must be a number"),
    ({"train__lr": -1.0}, "train.lr was -1.0; it must be greater than 0"),
    ({"train__schedule": "cosin"}, "train.schedule was 'cosin'; it must be 'cosine', 'wsd', 'constant' or 'infinite'"),
    ({"train__precision": "fp16"}, "train.precision was 'fp16'; it must be 'fp32', 'bf16' or 'fp8'"),
    ({"train__parallel": "tp"}, "train.parallel was 'tp'; it must be 'none', 'ddp' or 'fsdp'"),
    ({"train__betas": [0.9, 1.0]}, r"train.betas was \[0.9, 1.0\]; both must be less than 1"),
    ({"train__steps": 5, "train__warmup_steps": 6}, "train.warmup_steps was 6; it must be at most train.steps = 5"),
    ({"train__micro_batch_size": 3}, "train.micro_batch_size was 3; it must divide train.batch_size = 16"),
    ({"train__fsdp_shard": 2}, "train.fsdp_shard was 2; it must be null unless train.parallel is fsdp"),
    ({"train__optimizer": "adam"}, "train.optimizer was 'adam'; it must be 'adamw', 'muon', .* or 'spam'"),
    ({"train__galore": {"rank": 4}}, "train.galore was .*; it must be null unless train.optimizer is galore"),
    (
        {"train__optimizer": "muon", "train__spam": {}},
        "train.spam was .*; it must be null unless train.optimizer is spam",
    ),
    ({"train__optimizer": "muon", "train__muon": {"mometum": 0.9}}, "train.muon.mometum: unknown key .* 'momentum'"),
    (
        {"train__optimizer": "fira", "train__fira": {"growth": 0.5}},
        "train.fira.growth was 0.5; it must be greater than",
    ),
    ({"train__optimizer": "frugal", "train__frugal": {"density": 0}}, "train.frugal.density was 0; it must be greater"),
    ({"train__optimizer": "spam", "train__spam": {"warmup_steps": 501}}, "warmup_steps was 501; .* reset_every = 500"),
    (
        {"train__optimizer": "galore", "train__parallel": "fsdp"},
        "train.optimizer was 'galore' with train.parallel 'fsdp'",
    ),
    ({"train__optimizer": "muon", "train__sltrain": {}}, "train.optimizer was 'muon'; it must be adamw or spam with"),
    ({"train__init": "runs/a", "train__sltrain": {}}, "train.sltrain was given with train.init 'runs/a'"),
    ({"train__sltrain": {"density": 1.0}}, "train.sltrain.density was 1.0; it must be less than 1"),
    ({"train__groups": [{"match": ""}]}, "train.groups.0.match was ''; String should have at least 1 character"),
    ({"train__groups": [{"match": "*", "lr": 1}]}, "train.groups.0.lr: unknown key 'lr' in train.groups.0"),
    ({"data__source": "text"}, "data.path was None"),
    ({"name": ""}, "name was ''"),
    ({"seed": -1}, "seed was -1; it must be greater than or equal to 0"),
]


@pytest.mark.parametrize(
    ("overrides", "message"), BAD, ids=[f"{number} {' '.join(case[0])}" for number, case in enumerate(BAD)]
)
def test_bad_values_are_named(overrides, message):
    with pytest.raises(ConfigError, match=message):
        read(**overrides)


def test_the_record_has_the_options_of_the_chosen_optimizer():
    config = read(train__optimizer="galore")
    assert config.plain()["train"]["galore"] == {"rank": 128, "refresh_every": 200, "scale": 0.25}
    assert config.train.muon is None and read_config(yaml.safe_load(config.to_yaml())) == config


def test_a_missing_model_is_named():
    with pytest.raises(ConfigError, match="model is missing; it must be given"):
        read_config({"name": "x"})


def test_the_batch_divides_over_processes_and_micro_batches():
    train = read(train__batch_size=12, train__micro_batch_size=3).train
    assert train.micro_batches(1) == (4, 3)
    assert train.micro_batches(2) == (2, 3)
    assert read(train__batch_size=12).train.micro_batches(4) == (1, 3)
    with pytest.raises(ConfigError, match="train.batch_size was 12; it must be a multiple of the 5 processes"):
        train.micro_batches(5)
    with pytest.raises(ConfigError, match="train.micro_batch_size was 3; it must divide .* = 12 / 3 = 4"):
        train.micro_batches(3)


def test_the_free_keys_exist():
    known = {f"train.{key}" for key in TrainConfig.model_fields} | {"name", "data.folder"}
    assert known >= FREE
    assert "train.seq_len" not in FREE and "train.lr" not in FREE


def test_the_command_prints_the_resolved_config(tmp_path, capsys):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({"model": MODEL}))
    assert main([str(path), "train.lr=0.5", "--resume", "never", "--print-config"]) == 0
    config = RunConfig.model_validate(yaml.safe_load(capsys.readouterr().out))
    assert (config.train.lr, config.train.resume, config.name) == (0.5, "never", "small")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.yaml"], "error: config 'absent.yaml' not found"),
        (["{path}", "train.lr"], "error: override was 'train.lr'; it must be key=value"),
        (["{path}", "train.lr=fast"], "error: train.lr was 'fast'; it must be a valid number"),
    ],
)
def test_the_command_names_what_is_wrong_and_exits_with_2(tmp_path, capsys, arguments, message):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({"model": MODEL}))
    assert main([argument.format(path=path) for argument in arguments]) == 2
    assert message in capsys.readouterr().err
