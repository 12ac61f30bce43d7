"""The main job: its recipes, its refusals, and whole runs of every method."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from byte_lm import TextTrainer, reload_and_check, sample_text
from common.recipe import parse_arguments
from common.report import Result, markdown_table
from hf_latephase import LatePhaseConfig
from hf_latephase.data import BYTE_VOCAB_SIZE, ByteWindows, encode_bytes
from run_enwik8 import (
    METHODS,
    DataArguments,
    LanguageModelArguments,
    MethodArguments,
    build_config,
    load_splits,
    main,
    make_scorer,
    method_configs,
)


EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "language_modeling"
KINDS = ("enwik8_*", "benchmark_lstm", "benchmark_gpt2")
RECIPES = sorted(path for kind in KINDS for path in (EXAMPLES / "recipes").glob(f"{kind}.yaml"))
TYPES = (LanguageModelArguments, DataArguments, MethodArguments, LatePhaseConfig, TrainingArguments)
TINY_LSTM = '{"embedding_size": 6, "hidden_size": 8}'
TINY_TRANSFORMER = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def text(tmp_path):
    words = np.random.default_rng(0).choice(["late ", "phase ", "weights\n", "é "], 600)
    path = tmp_path / "text.txt"
    path.write_text("".join(words), encoding="utf-8")
    return path


@pytest.fixture
def flags(tmp_path, text):
    return [
        *("--data_file", str(text), "--output_dir", str(tmp_path / "out"), "--window", "16", "--curve_bytes", "60"),
        *("--model_config", TINY_LSTM, "--num_members", "2", "--swa_start", "0.6", "--max_steps", "10"),
        *("--per_device_train_batch_size", "4", "--learning_rate", "1e-2", "--lr_scheduler_type", "constant"),
        *("--eval_strategy", "steps", "--eval_steps", "5", "--logging_steps", "5", "--save_strategy", "no"),
        *("--sample_bytes", "40", "--use_cpu", "--disable_tqdm", "true", "--dataloader_pin_memory", "false"),
    ]


def results_of(tmp_path):
    return json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))


# ---- recipes and flags ----


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses_and_describes_a_run(recipe, tmp_path):
    model, data, methods, config, args = parse_arguments(TYPES, [str(recipe), f"--output_dir={tmp_path}"])
    model_config = build_config(model, data.window)
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(model_config)
    # One member of an output layer is base itself.
    compared = [method for method in METHODS if method != "one_member" or config.weights != ["head"]]
    assert list(method_configs(config, methods.method, model_config)) == compared
    assert config.swa_start is not None
    assert args.eval_strategy == "steps"


def test_the_papers_recipe_has_the_papers_sizes():
    model, data, *_ = parse_arguments(TYPES, [str(EXAMPLES / "recipes" / "enwik8_lstm_paper.yaml")])
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(build_config(model, data.window))
    # 1,558,730 with 205 symbols; 54 more, each with a row of the embedding, of the output layer, and a bias.
    assert network.num_parameters() == 1_558_730 + 54 * (205 + 500 + 1) == 1_596_854


def test_flags_override_the_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "learning_rate: 1e-3\nmethod: [base, late_phase]\nweights: norm\nbf16: false\nmax_bytes: null\n"
        "model_config: {hidden_size: 4}\n"
    )
    arguments = [str(recipe), "--method", "one_member", "--num-members=3", "--output_dir", str(tmp_path)]
    model, data, methods, config, args = parse_arguments(TYPES, arguments)
    assert args.learning_rate == 1e-3  # YAML reads 1e-3 as a string
    assert methods.method == ["one_member"]
    assert config.weights == ["norm"]
    assert config.num_members == 3
    assert model.model_config == {"hidden_size": 4}
    assert data.max_bytes is None


def test_a_json_recipe_equals_a_yaml_one(tmp_path):
    values = {"window": 7, "target_modules": ["lstm"], "model_config": {"dropout": 0.5}, "decay_after_start": True}
    (tmp_path / "recipe.json").write_text(json.dumps(values))
    lines = ["window: 7", "target_modules: [lstm]", "model_config: {dropout: 0.5}", "decay_after_start: true"]
    (tmp_path / "recipe.yaml").write_text("\n".join(lines))
    parsed = [parse_arguments(TYPES[:4], [str(tmp_path / f"recipe.{suffix}")]) for suffix in ("json", "yaml")]
    assert parsed[0] == parsed[1]


def test_an_unknown_key_is_named_with_the_nearest(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("num_member: 3\n")
    with pytest.raises(ValueError, match=r"Unknown key 'num_member' .*recipe.yaml.*'num_members'"):
        parse_arguments(TYPES, [str(recipe)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--swa_strat", "0.5"], "Unknown argument '--swa_strat'.*--swa_start"),
        (["--num_member=5"], "Unknown argument '--num_member'.*--num_members"),  # no abbreviations
        (["--window", "8", "late.yaml"], "Unknown argument 'late.yaml'.*A recipe comes first"),
    ],
)
def test_an_unknown_argument_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(TYPES, arguments)


@pytest.mark.parametrize(("name", "content"), [("a.yaml", "- 1\n"), ("b.yaml", "a: [\n"), ("c.json", "{")])
def test_a_recipe_that_is_no_mapping_is_refused(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"The recipe .*{name}"):
        parse_arguments(TYPES, [str(tmp_path / name)])


def test_a_missing_recipe_is_named():
    with pytest.raises(FileNotFoundError, match="no_such.yaml does not exist"):
        parse_arguments(TYPES, ["no_such.yaml"])


# ---- bad input ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "late_phases"], "Unknown method 'late_phases'; did you mean 'late_phase'"),
        (["--model_type", "gtp2"], "Unknown model_type 'gtp2'.*gpt2"),
        (["--model_config", '{"hiden_size": 8}'], "no field 'hiden_size'.*hidden_size"),
        (["--model_config", "{8}"], "model_config is no JSON"),
        (["--model_config", "[8]"], "model_config must be a mapping"),
        (["--max_bytes", "0"], "max_bytes must be at least 1"),
        (["--max_bytes", "100"], "The text has .* bytes, but one window"),
        (["--window", "5000"], "The text has .* bytes, but one window"),
        (["--resume_from_checkpoint", "out"], "Use --resume"),
        (["--weights", "rank2"], "unknown families"),
        (["--swa_start", "0.1"], "swa_start=0.1 lies before late_phase_start=0.6"),
    ],
)
def test_bad_input_is_refused_before_training(arguments, message, flags, tmp_path):
    with pytest.raises(ValueError, match=message):
        main([*flags, *arguments])
    assert not list(tmp_path.glob("out/**/*.safetensors"))


def test_a_file_replaces_the_data_that_a_recipe_names(text):
    """No download is tried."""
    assert len(load_splits(DataArguments(data_file=str(text), dataset="enwik8")).train) < 10_000


def test_bad_data_files_are_refused(flags, tmp_path):
    with pytest.raises(FileNotFoundError, match="no_such.txt does not exist"):
        main([*flags, "--data_file", str(tmp_path / "no_such.txt")])
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="empty.txt is empty"):
        main([*flags, "--data_file", str(tmp_path / "empty.txt")])


# ---- the parts ----


def test_the_controls_are_late_phase_configs_with_one_member():
    config = LatePhaseConfig(num_members=5, swa_start=0.7, init_noise=0.1, base_gradient_scale=0.5)
    model_config = build_config(LanguageModelArguments(), window=8)
    configs = method_configs(config, ["base", "late_phase", "accumulation", "one_member"], model_config)
    assert list(configs) == ["base", "late_phase", "accumulation", "one_member"]
    assert configs["late_phase"] == config
    assert {c.num_members for name, c in configs.items() if name != "late_phase"} == {1}
    assert {(c.late_phase_start, c.swa_start) for c in configs.values()} == {(0.6, 0.7)}
    assert configs["one_member"].weights == configs["accumulation"].weights == ["rank1"]
    assert configs["one_member"].cycle_length is None
    # The sum over five members of half their gradients is two and a half times the mean.
    assert (configs["accumulation"].cycle_length, configs["accumulation"].base_gradient_scale) == (5, 2.5)


def test_accumulation_steps_as_often_as_late_phase():
    model_config = build_config(LanguageModelArguments(), window=8)

    def length(**settings):
        config = LatePhaseConfig(num_members=5, base_gradient_scale=1.0, **settings)
        return method_configs(config, ["accumulation"], model_config)["accumulation"].cycle_length

    assert length(cycle_length=10) == 10
    assert length(member_assignment="sample") == 1


def byte_trainer(tmp_path, config, windows, trainer_class=TextTrainer, model_type="lstm", **kwargs):
    settings = json.loads(TINY_LSTM) if model_type == "lstm" else TINY_TRANSFORMER
    set_seed(0)
    model = AutoModelForCausalLM.from_config(
        build_config(LanguageModelArguments(model_type, settings), windows.window)
    )
    args = TrainingArguments(
        str(tmp_path), max_steps=10, learning_rate=0.1, per_device_train_batch_size=4, save_strategy="no",
        lr_scheduler_type="constant", weight_decay=0.1, use_cpu=True, disable_tqdm=True, logging_steps=1,
        dataloader_pin_memory=False,
    )  # fmt: skip
    if config is not None:
        kwargs |= {"late_phase_config": config, "score": lambda model: 0.0}
    return trainer_class(
        model=model, args=args, train_dataset=windows, data_collator=default_data_collator,
        processing_class=ByT5Tokenizer(extra_ids=0), **kwargs,
    )  # fmt: skip


@pytest.fixture
def windows(text):
    return ByteWindows(load_splits(DataArguments(data_file=str(text))).train, window=16)


@pytest.mark.parametrize("model_type", ["lstm", "gpt2", "llama"])
def test_base_is_plain_training_to_the_bit(model_type, windows, tmp_path):
    config = LatePhaseConfig(num_members=3, swa_start=0.6, base_gradient_scale=1.0)
    base = method_configs(config, ["base"], build_config(LanguageModelArguments(model_type), 16))["base"]
    trainer = byte_trainer(tmp_path, base, windows, model_type=model_type)
    trainer.train()  # before the other is made: a trainer seeds when it is constructed
    plain = byte_trainer(tmp_path, None, windows, Trainer, model_type)
    plain.train()
    state = trainer.averaged_model(time_averaged=False).state_dict()
    expected = plain.model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_the_rate_decays_linearly_from_t0(windows, tmp_path):
    config = LatePhaseConfig(num_members=2, late_phase_start=0.6)
    trainer = byte_trainer(tmp_path, config, windows, decay_after_start=True)
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    # What each step used: T0 comes after six steps of ten, and after all ten the rate would be 0.
    assert rates == pytest.approx([0.1] * 7 + [0.075, 0.05, 0.025])


@pytest.mark.parametrize("model_type", ["lstm", "gpt2"])
def test_a_sample_has_its_length_whatever_the_positions(model_type):
    settings = json.loads(TINY_LSTM) if model_type == "lstm" else TINY_TRANSFORMER
    model = AutoModelForCausalLM.from_config(build_config(LanguageModelArguments(model_type, settings), window=10))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # every id equally likely, the end of text too
    first, second = (sample_text(model, b"abcdefgh", 50, seed=0) for _ in range(2))
    assert first == second
    assert first.startswith("abcdefgh")
    assert all(character.isprintable() or character in "\n\t" for character in first)
    assert len(first.encode("utf-8")) > 40 and len(first) <= 58


def test_max_bytes_keeps_the_proportions(text):
    whole = load_splits(DataArguments(data_file=str(text)))
    cut = load_splits(DataArguments(data_file=str(text), max_bytes=1000))
    assert [len(split) for split in cut] == pytest.approx([900, 50, 50], abs=1)
    assert all(np.array_equal(part, all_of_it[: len(part)]) for part, all_of_it in zip(cut, whole, strict=True))
    assert list(map(len, load_splits(DataArguments(data_file=str(text), max_bytes=10**9)))) == list(map(len, whole))


def test_max_eval_bytes_shortens_what_is_scored_only(text):
    whole = load_splits(DataArguments(data_file=str(text)))
    short = load_splits(DataArguments(data_file=str(text), max_eval_bytes=30))
    assert np.array_equal(short.train, whole.train)
    assert np.array_equal(short.validation, whole.validation[:30]) and np.array_equal(short.test, whole.test[:30])
    with pytest.raises(ValueError, match="max_eval_bytes must be at least 1"):
        DataArguments(max_eval_bytes=0)


def test_a_saved_model_that_differs_is_noticed(tmp_path):
    config = build_config(LanguageModelArguments(model_config=json.loads(TINY_LSTM)), window=8)
    model, other = AutoModelForCausalLM.from_config(config), AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    assert reload_and_check(str(tmp_path), model, encode_bytes(b"text"))[1] == 0
    with pytest.raises(RuntimeError, match="differs from the trained one"):
        reload_and_check(str(tmp_path), other, encode_bytes(b"text"))


def test_the_table_shows_what_was_not_averaged():
    results = [
        Result("late_phase", 1.5, {"validation": 2.0, "test": 1.0}, {"validation": 1.9, "test": 0.9}),
        Result("base", 0.25, {"validation": 2.5, "test": 1.25}),
    ]
    assert markdown_table(results, "EMA").splitlines() == [
        "| method     | validation | validation, EMA |   test | test, EMA | minutes |",
        "| ---------- | ---------: | --------------: | -----: | --------: | ------: |",
        "| late_phase |     2.0000 |          1.9000 | 1.0000 |    0.9000 |    1.50 |",
        "| base       |     2.5000 |               – | 1.2500 |         – |    0.25 |",
    ]


# ---- whole runs ----


def test_the_script_runs_all_methods_end_to_end(flags, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model_type: lstm\nmethod: [{', '.join(METHODS)}]\nnum_members: 7\n")
    command = [sys.executable, str(EXAMPLES / "run_enwik8.py"), str(recipe), *flags]
    run = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert run.returncode == 0, run.stderr

    out = tmp_path / "out"
    table = (out / "results.md").read_text(encoding="utf-8")
    assert table in run.stdout
    assert [line.split()[1] for line in table.splitlines()[2:6]] == list(METHODS)
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")

    report = results_of(tmp_path)
    assert report["settings"]["num_members"] == 2
    assert [result["method"] for result in report["results"]] == list(METHODS)
    splits = load_splits(DataArguments(data_file=str(tmp_path / "text.txt")))
    score = make_scorer(DataArguments(window=16), show_progress=False)
    for result in report["results"]:
        assert [point["step"] for point in result["curve"]] == [5, 10]
        assert "bpc_averaged" not in result["curve"][0] and "bpc_averaged" in result["curve"][1]
        assert result["details"]["reload_difference"] <= 1e-5
        assert f"A sample after 50 bytes of the test text:\n{result['details']['sample']}" in run.stdout
        # The saved folder is what the averaged columns are about.
        folder = out / result["method"]
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert score(model, splits.test) == pytest.approx(result["averaged_scores"]["test"], abs=1e-9)
        assert score(model, splits.validation) == pytest.approx(result["averaged_scores"]["validation"], abs=1e-9)
        assert result["scores"] != result["averaged_scores"]
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert len(tokenizer) == BYTE_VOCAB_SIZE
        assert tokenizer("é", add_special_tokens=False).input_ids == encode_bytes("é".encode()).tolist()
    members = report["results"][0]["details"]["members"]
    assert list(members) == ["member_0", "member_1", "average", "ensemble"]
    # Before T0 the three with rank-1 factors are one run.
    first = {result["method"]: result["curve"][0]["bpc"] for result in report["results"]}
    assert first["late_phase"] == first["one_member"] == first["accumulation"] != first["base"]


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_transformers_run_too(model_type, flags, tmp_path, capsys):
    settings = TINY_TRANSFORMER | ({"intermediate_size": 12} if model_type == "llama" else {})
    main([*flags, "--model_type", model_type, "--model_config", json.dumps(settings), "--weights", "rank1", "norm"])
    report = results_of(tmp_path)
    assert [result["method"] for result in report["results"]] == list(METHODS)
    assert all(2 < bpc < 9 for result in report["results"] for bpc in result["averaged_scores"].values())
    assert "windows of 16 bytes that score their last 8" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base").config.model_type == model_type


def test_without_an_average_or_curves(flags, tmp_path):
    arguments = [flag for flag in flags if flag not in ("--swa_start", "0.6")]
    main([*arguments, "--method", "base", "--eval_strategy", "no"])
    (result,) = results_of(tmp_path)["results"]
    assert result["averaged_scores"] is None and result["curve"] == []
    assert (tmp_path / "out" / "curves.png").is_file()


def test_resume_ends_where_an_unbroken_run_ends(flags, tmp_path):
    arguments = [*flags, "--method", "late_phase", "--save_strategy", "steps", "--save_steps", "7"]
    main(arguments)
    (unbroken,) = results_of(tmp_path)["results"]
    folder = tmp_path / "out" / "late_phase"
    last = folder / "checkpoint-10"
    last.rename(tmp_path / "checkpoint-10")  # as if it had stopped inside the second cycle after T0
    assert (folder / "checkpoint-7").is_dir()
    main([*arguments, "--resume"])
    (resumed,) = results_of(tmp_path)["results"]
    for key in ("scores", "averaged_scores", "curve"):
        assert resumed[key] == unbroken[key]
