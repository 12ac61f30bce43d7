"""LatePhaseConfig: its contract, JSON, and the command line."""

from __future__ import annotations

import dataclasses
import json

import pytest
import yaml
from transformers import HfArgumentParser

from hf_latephase import LatePhaseConfig
from hf_latephase.config import PRESETS


CONTRACT = {
    "num_members": 10,
    "late_phase_start": 0.6,
    "weights": ["rank1"],
    "target_modules": None,
    "exclude_modules": None,
    "init_noise": 0.0,
    "base_gradient_scale": None,
    "member_assignment": "minibatch",
    "cycle_length": None,
    "swa_start": None,
    "swa_every": None,
    "ema_decay": None,
    "ema_memory": None,
    "ema_start": None,
    "ema_every": None,
    "average_device": None,
    "evaluate_raw": False,
    "member_weight_decay": None,
    "batch_norm_statistics": "running",
}
EVERYTHING = {
    "num_members": 4,
    "late_phase_start": 0.5,
    "weights": ["rank1", "norm"],
    "target_modules": ["c_attn", r".*\.h\.\d\.mlp\..*"],
    "exclude_modules": ["ln_f"],
    "init_noise": 0.25,
    "base_gradient_scale": 0.25,
    "member_assignment": "sample",
    "cycle_length": 8,
    "swa_start": 0.7,
    "swa_every": 3.0,
    "ema_decay": None,
    "ema_memory": None,
    "ema_start": None,
    "ema_every": None,
    "average_device": "cpu",
    "evaluate_raw": True,
    "member_weight_decay": 0.005,
    "batch_norm_statistics": "recomputed",
}


def parse(*flags: str) -> LatePhaseConfig:
    (config,) = HfArgumentParser(LatePhaseConfig).parse_args_into_dataclasses(list(flags))
    return config


def test_the_defaults_are_the_contract() -> None:
    assert LatePhaseConfig().to_dict() == CONTRACT
    assert [field.name for field in dataclasses.fields(LatePhaseConfig)] == list(CONTRACT)
    assert LatePhaseConfig().weights is not LatePhaseConfig().weights


@pytest.mark.parametrize("values", [CONTRACT, EVERYTHING], ids=["defaults", "everything"])
def test_json_round_trip(tmp_path, values: dict) -> None:
    config = LatePhaseConfig(**values)
    config.save_pretrained(tmp_path / "made" / "for_it")
    path = tmp_path / "made" / "for_it" / "late_phase_config.json"
    assert json.loads(path.read_text(encoding="utf-8")) == values
    again = LatePhaseConfig.from_pretrained(str(path.parent))
    assert again == config and again.to_dict() == values
    again.weights.append("head")
    assert config.weights == values["weights"]


def test_a_changed_value_is_read(tmp_path) -> None:
    LatePhaseConfig().save_pretrained(tmp_path)
    path = tmp_path / "late_phase_config.json"
    path.write_text(json.dumps({"num_members": 3, "ema_decay": 0.9}))
    assert LatePhaseConfig.from_pretrained(tmp_path) == LatePhaseConfig(num_members=3, ema_decay=0.9)


def test_no_config_no_key_no_validity(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No late_phase_config\.json in .*empty"):
        LatePhaseConfig.from_pretrained(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"Unknown LatePhaseConfig fields \['members'\].*Known fields.*'num_members'"):
        LatePhaseConfig.from_dict({"members": 3})
    (tmp_path / "late_phase_config.json").write_text('{"num_members": 3, "weight": ["norm"]}')
    with pytest.raises(ValueError, match=r"Unknown LatePhaseConfig fields \['weight'\].*'weights'"):
        LatePhaseConfig.from_pretrained(tmp_path)
    (tmp_path / "late_phase_config.json").write_text('{"num_members": 0}')
    with pytest.raises(ValueError, match="num_members"):
        LatePhaseConfig.from_pretrained(tmp_path)
    (tmp_path / "late_phase_config.json").write_text('{"num_members": 3')
    with pytest.raises(ValueError, match=r"late_phase_config\.json.*is not valid JSON.*Save the config again"):
        LatePhaseConfig.from_pretrained(tmp_path)


def test_flags() -> None:
    assert parse() == LatePhaseConfig()
    config = parse(
        "--late_phase_start", "0.5", "--weights", "rank1", "norm", "--target_modules", "c_attn",
        "--member_assignment", "sample", "--swa_start", "0.7",
    )  # fmt: skip
    assert config == LatePhaseConfig(
        late_phase_start=0.5, weights=["rank1", "norm"], target_modules=["c_attn"], member_assignment="sample",
        swa_start=0.7,
    )  # fmt: skip
    flags = []
    for name, value in EVERYTHING.items():
        if value is not None:
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    config = parse(*flags)
    assert config.to_dict() == EVERYTHING
    for name, value in EVERYTHING.items():
        assert type(getattr(config, name)) is type(value), name
    assert parse("--ema_decay", "0.99").ema_decay == 0.99
    moving = parse("--ema_memory", "0.1", "--ema_start", "0.2", "--ema_every", "5", "--evaluate_raw")
    assert moving == LatePhaseConfig(ema_memory=0.1, ema_start=0.2, ema_every=5.0, evaluate_raw=True)
    assert parse("--swa_start", "700").swa_start == 700.0
    assert parse("--late_phase_start", "0").late_phase_start == 0
    assert parse("--late-phase-start", "12").late_phase_start == 12


@pytest.mark.parametrize("flags", [
    ["--num_members", "2.5"], ["--member_assignment", "rows"], ["--late_phase_start", "half"], ["--weights"],
        ["--members", "3"],
], ids=" ".join)  # fmt: skip
def test_flags_that_do_not_parse(flags: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises((SystemExit, ValueError)) as error:
        parse(*flags)
    assert flags[0] in capsys.readouterr().err or flags[0].removeprefix("--") in str(error.value)


def test_parsed_values_are_validated() -> None:
    with pytest.raises(ValueError, match="num_members must be a whole number"):
        parse("--num_members", "0")
    with pytest.raises(ValueError, match=r"weights names unknown families \['lora'\]"):
        parse("--weights", "rank1", "lora")


def test_recipes(tmp_path) -> None:
    parser = HfArgumentParser(LatePhaseConfig)
    assert parser.parse_dict(EVERYTHING)[0].to_dict() == EVERYTHING
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(EVERYTHING))
    (tmp_path / "recipe.json").write_text(json.dumps(EVERYTHING))
    assert parser.parse_yaml_file(tmp_path / "recipe.yaml")[0].to_dict() == EVERYTHING
    assert parser.parse_json_file(tmp_path / "recipe.json")[0].to_dict() == EVERYTHING
    with pytest.raises(ValueError, match="num_member"):
        parser.parse_dict({"num_member": 3})
    with pytest.raises(ValueError, match="init_noise must be finite and not negative"):
        parser.parse_dict({"init_noise": -1.0})
    # Each flag explains itself.
    text = parser.format_help()
    for field in dataclasses.fields(LatePhaseConfig):
        assert f"--{field.name}" in text and field.metadata["help"]


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets(name: str) -> None:
    config = LatePhaseConfig.preset(name)
    assert config.to_dict() == CONTRACT | PRESETS[name]
    assert LatePhaseConfig.preset(name, exclude_modules=["x"], weights=["head"]).weights == ["head"]
    config.weights.append("hypernet")
    assert "hypernet" not in LatePhaseConfig.preset(name).weights
    if name.startswith("paper"):
        assert config.base_gradient_scale == 1.0


def test_no_such_preset() -> None:
    with pytest.raises(ValueError, match=r"There is no preset 'paper': choose one of \['ema', 'finetune'"):
        LatePhaseConfig.preset("paper")
