"""The comparison of image classifiers: its methods, its refusals, and whole runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments, default_data_collator, set_seed

from common.model_arguments import build_config
from common.recipe import parse_arguments
from hf_latephase import LatePhaseConfig
from hf_latephase.analysis import EnsemblePrediction, combine_predictions
from hf_latephase.data.augmentation import DecodedImages, EpochDraws
from hf_latephase.data.vision import load_images
from image_report import ImageResult, score, table
from image_training import ImageTrainer, predict_logits, read_points, save_and_check, train
from run_cifar import (
    METHODS,
    ImageArguments,
    MethodArguments,
    ModelArguments,
    main,
    method_configs,
    prepare_images,
    results_of,
    runs_of,
)


EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "vision"
TYPES = (ModelArguments, ImageArguments, MethodArguments, LatePhaseConfig, TrainingArguments)
TINY = {"depth": 10, "widen_factor": 1}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two classes of noise on dark and on bright ground."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 8)):
        for label, name in enumerate(("dark", "light")):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for index in range(count):
                image = rng.integers(100 * label, 100 * label + 120, (8, 8, 3), dtype=np.uint8)
                PIL.Image.fromarray(image).save(tmp_path / "data" / split / name / f"{index}.png")
    return tmp_path / "data"


@pytest.fixture
def flags(tmp_path, folder):
    return [
        *("--dataset", str(folder), "--output_dir", str(tmp_path / "out"), "--image_size", "8", "--padding", "1"),
        *("--model_config", json.dumps(TINY), "--ood_dataset", str(folder), "--num_members", "2"),
        *("--weights", "norm", "head", "--late_phase_start", "0.5", "--swa_start", "0.5", "--max_steps", "8"),
        *("--per_device_train_batch_size", "8", "--optim", "sgd", "--optim_args", "momentum=0.9,nesterov=true"),
        *("--lr_points", "0.5:0.1", "0.9:0.01", "--weight_decay", "5e-4", "--max_grad_norm", "0"),
        *("--eval_strategy", "steps", "--eval_steps", "4", "--logging_steps", "4", "--save_strategy", "no"),
        *("--use_cpu", "--disable_tqdm", "true", "--dataloader_pin_memory", "false"),
    ]


def results_in(tmp_path):
    return json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["results"]


# ---- the methods ----


def test_what_the_methods_are():
    config = LatePhaseConfig(
        num_members=10, weights=["norm", "head"], swa_start=0.8, base_gradient_scale=0.5, member_weight_decay=5e-3,
        batch_norm_statistics="recomputed_members",
    )  # fmt: skip
    configs = method_configs(config, batch_size=128)
    assert configs["late_phase"] == config
    assert {name: c.num_members for name, c in configs.items()} == {
        "base": 1, "dropout": 1, "accumulation": 1, "batch_ensemble": 8, "late_phase": 10, "late_phase_t0": 10,
        "late_phase_full": 10, "late_phase_hypernet": 10,
    }  # fmt: skip
    assert (configs["accumulation"].cycle_length, configs["accumulation"].base_gradient_scale) == (10, 5.0)
    assert {name for name, c in configs.items() if c.late_phase_start == 0} == {"batch_ensemble", "late_phase_t0"}
    batch = configs["batch_ensemble"]
    assert (batch.weights, batch.member_assignment, batch.init_noise) == (["rank1"], "sample", 0.5)
    assert configs["late_phase_full"].weights == ["full"] and configs["late_phase_hypernet"].weights == ["hypernet"]
    assert {name for name, c in configs.items() if c.member_weight_decay} == {
        "late_phase", "late_phase_t0", "accumulation",
    }  # fmt: skip
    assert {c.swa_start for c in configs.values()} == {0.8}
    assert configs["base"].weights == ["norm", "head"] and configs["base"].cycle_length is None
    assert method_configs(LatePhaseConfig(weights=["rank1"], base_gradient_scale=1.0), 7)["base"].weights == ["head"]


def test_methods_share_runs():
    assert runs_of("swa", 3) == runs_of("base", 3) == [("base", 0)]
    assert runs_of("mc_dropout", 3) == [("dropout", 0)]
    assert runs_of("deep_ensemble", 3) == [("base", 0), ("base", 1), ("base", 2)]


def test_points_are_read():
    assert read_points(["0.5:0.1", "100:1e-3"]) == [(0.5, 0.1), (100, 0.001)]
    assert read_points(None) is None


def images_of(folder, seed=0):
    arguments = ImageArguments(dataset=str(folder), image_size=8, padding=1, cutout=2, ood_dataset=[str(folder)])
    return prepare_images(load_images(str(folder), show_progress=False), arguments, seed, False)


def training_arguments(folder, **kwargs):
    settings = {
        "max_steps": 10, "per_device_train_batch_size": 8, "optim": "sgd", "optim_args": "momentum=0.9,nesterov=true",
        "learning_rate": 0.1, "lr_scheduler_type": "constant", "save_strategy": "no", "logging_steps": 1,
        "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False, "report_to": "none",
    }  # fmt: skip
    return TrainingArguments(str(folder), **(settings | kwargs))


def make_model():
    return AutoModelForImageClassification.from_config(build_config("wide_resnet", TINY, ["dark", "light"]))


def test_base_is_plain_training_to_the_bit(folder, tmp_path):
    images = images_of(folder)
    late_phase = LatePhaseConfig(num_members=2, weights=["norm", "head"], base_gradient_scale=1.0)
    config = method_configs(late_phase, 8)["base"]
    args = training_arguments(tmp_path / "a")
    trainer, _ = train(make_model, config, args, images.train, images.watched, None, False)
    set_seed(args.seed)
    plain = Trainer(
        model=make_model(), args=args, train_dataset=images.train, data_collator=default_data_collator,
        callbacks=[EpochDraws()],
    )  # fmt: skip
    plain.train()
    state, expected = trainer.averaged_model().state_dict(), plain.model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_decay_reaches_all_weights_but_rank1_factors(folder, tmp_path, monkeypatch):
    decay, parameters, begin = {}, {}, ImageTrainer._begin_training

    def watch(trainer):
        begin(trainer)
        for group in trainer.optimizer.param_groups:
            decay.update({id(p): group["weight_decay"] for p in group["params"]})
        parameters.update(trainer.model.named_parameters())

    monkeypatch.setattr(ImageTrainer, "_begin_training", watch)
    images = images_of(folder)
    config = LatePhaseConfig(num_members=2, weights=["norm", "rank1"])
    args = training_arguments(tmp_path / "a", weight_decay=0.1)
    train(make_model, config, args, images.train, images.watched, None, False)
    factors = {name for name in parameters if name.endswith((".left", ".right"))}
    assert factors and {decay[id(parameters[name])] for name in factors} == {0.0}
    assert {decay[id(parameters[name])] for name in parameters.keys() - factors} == {0.1}


def test_all_methods_see_the_same_minibatches(folder, tmp_path, monkeypatch):
    seen: dict[str, list] = {}
    plain = DecodedImages.pixel_values

    def watch(self, indices):
        pixels = plain(self, indices)
        if self.padding:
            seen.setdefault(current, []).append(pixels)
        return pixels

    monkeypatch.setattr(DecodedImages, "pixel_values", watch)
    images = images_of(folder)
    late_phase = LatePhaseConfig(num_members=2, weights=["head"], base_gradient_scale=1.0)
    for current, config in method_configs(late_phase, 8).items():
        if current in ("base", "accumulation", "late_phase"):
            args = training_arguments(tmp_path / current)
            train(make_model, config, args, images.train.reseeded(0), images.watched, None, False)
    assert len(seen["base"]) >= 10
    for method in ("accumulation", "late_phase"):
        assert all(torch.equal(a, b) for a, b in zip(seen["base"], seen[method], strict=True))
    assert not torch.equal(seen["base"][0], seen["base"][6])


# ---- the figures ----


def test_predictions_are_scored():
    inside = combine_predictions(
        [torch.tensor([[0.9, 0.1], [0.6, 0.4]]).log(), torch.tensor([[0.9, 0.1], [0.2, 0.8]]).log()]
    )
    outside = combine_predictions([torch.tensor([[0.5, 0.5], [0.99, 0.01]]).log()])
    scores, ood = score({"test": inside, "other": outside}, {"test": torch.tensor([0, 0])}, is_ensemble=True)
    assert scores["test"]["accuracy"] == 0.5
    assert scores["test"]["nll"] == pytest.approx(-(np.log(0.9) + np.log(0.4)) / 2, abs=1e-6)
    assert scores["test"]["disagreement"] == 0.5
    assert ood == {"other": 0.5}  # one of the two from outside is surer than both test images
    assert "disagreement" not in score({"test": inside}, {"test": torch.tensor([0, 0])}, is_ensemble=False)[0]["test"]


def test_the_table_leaves_gaps():
    measures = {"accuracy": 0.5, "nll": 1.0, "brier_score": 0.25, "calibration_error": 0.125}
    ensemble = measures | {"disagreement": 0.0625, "mutual_information": 0.03}
    rows = [
        ImageResult("base", "", 1.5, {"test": measures}, {"photos": 0.75}),
        ImageResult("base", "SWA, ensemble", 1.5, {"test": ensemble}, {"photos": 0.5}),
    ]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table(rows).splitlines()]
    assert cells[0][:2] + cells[0][-2:] == ["method", "accuracy", "OOD photos", "minutes"]
    assert cells[2:] == [
        ["base", "0.5000", "1.0000", "0.2500", "0.1250", "–", "–", "0.7500", "1.50"],
        ["base, SWA, ensemble", "0.5000", "1.0000", "0.2500", "0.1250", "0.0625", "0.0300", "0.5000", "1.50"],
    ]


def test_a_deep_ensemble_averages_probabilities():
    from run_cifar import Trained

    def trained(probs):
        log_probs = torch.tensor(probs).log()
        prediction = EnsemblePrediction(log_probs, torch.zeros(1), torch.zeros(1))
        return Trained({("model", False): {"test": prediction}}, 10, 1.0, [], {"num_members": 1})

    runs = [trained([[0.9, 0.1]]), trained([[0.3, 0.7]])]
    (result,) = results_of("deep_ensemble", runs, {"test": torch.tensor([0])}, "SWA")
    assert result.scores["test"]["nll"] == pytest.approx(-np.log(0.6), abs=1e-6)
    assert (result.scores["test"]["disagreement"], result.minutes, result.name) == (1.0, 2.0, "deep_ensemble")


def test_a_saved_model_that_differs_is_noticed(folder, tmp_path):
    images = images_of(folder)
    config = LatePhaseConfig(num_members=2, weights=["head"], base_gradient_scale=1.0)
    args = training_arguments(tmp_path / "a", max_steps=4)
    trainer, _ = train(make_model, config, args, images.train, images.watched, None, False)
    assert save_and_check(trainer, images.watched)[1] == 0
    with pytest.raises(RuntimeError, match="differs from the trained one"):
        save_and_check(trainer, images.watched, load=lambda path: make_model())


# ---- bad input ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "late_phases"], "Unknown method 'late_phases'; did you mean 'late_phase'"),
        (["--model_type", "wide_resnets"], "Unknown model_type 'wide_resnets'.*wide_resnet"),
        (["--model_config", '{"dept": 10}'], "no field 'dept'.*depth"),
        (["--model_config", "{8}"], "model_config is no JSON"),
        (["--model_config", '{"num_labels": 3}'], "num_labels=3, but the data have 2 classes"),
        (["--lr_points", "0.5"], "'0.5' is no point of the learning rate"),
        (["--resume_from_checkpoint", "out"], "Use --resume"),
        (["--padding", "-1"], "padding must be at least 0"),
        (["--mc_samples", "0"], "mc_samples must be at least 1"),
        (["--dropout_rate", "1"], "dropout_rate must lie between"),
        (["--dataset", "/no/such/folder"], "/no/such/folder does not exist"),
        (["--method", "base", "late_phase", "--target_modules", "nothing"], "'late_phase' cannot run.*'nothing'"),
    ],
)
def test_bad_input_is_refused_before_training(arguments, message, flags, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main([*flags, *arguments])
    assert not list(tmp_path.glob("out/**/*.safetensors"))


def test_swa_needs_its_start(flags):
    at = flags.index("--swa_start")
    with pytest.raises(ValueError, match="'swa' needs swa_start"):
        main([*flags[:at], *flags[at + 2 :], "--method", "swa"])


def test_dropout_needs_a_model_that_has_it(flags):
    with pytest.raises(ValueError, match="ResNetConfig has no field 'dropout'"):
        main([*flags, "--method", "dropout", "--model_type", "resnet", "--model_config", "{}"])


# ---- whole runs ----


@pytest.mark.slow
def test_the_script_runs_every_method_end_to_end(flags, tmp_path):
    command = [sys.executable, str(EXAMPLES / "run_cifar.py"), *flags, "--method", *METHODS]
    run = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert run.returncode == 0, run.stderr
    results = results_in(tmp_path)
    assert list(dict.fromkeys(result["method"] for result in results)) == list(METHODS)
    assert (tmp_path / "out" / "results.md").read_text(encoding="utf-8") in run.stdout


def test_a_run_end_to_end(flags, folder, tmp_path, capsys):
    main([*flags, "--method", "base", "swa", "late_phase", "deep_ensemble", "--validation_share", "0.25"])
    results = results_in(tmp_path)
    assert [(result["method"], result["variant"]) for result in results] == [
        ("base", ""),
        ("base", "SWA"),
        ("swa", ""),
        ("late_phase", ""),
        ("late_phase", "SWA"),
        ("late_phase", "ensemble"),
        ("late_phase", "SWA, ensemble"),
        ("deep_ensemble", ""),
        ("deep_ensemble", "SWA"),
    ]
    assert results[2]["scores"] == results[1]["scores"] != results[0]["scores"]
    for result in results:
        assert list(result["scores"]) == ["validation", "test"]
        assert ("disagreement" in result["scores"]["test"]) == ("ensemble" in result["method"] + result["variant"])
    # Before T0 the members are one: the curves begin alike.
    base, late = results[0], results[3]
    assert [point["step"] for point in base["curve"]] == [4, 8]
    assert base["curve"][0] == late["curve"][0]
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"base", "late_phase", "base_seed43"}
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "results.md").read_text(encoding="utf-8") in capsys.readouterr().out
    # The saved folder is the model averaged over time.
    splits = load_images(str(folder), validation_share=0.25, show_progress=False)
    images = prepare_images(splits, ImageArguments(dataset=str(folder), image_size=8, ood_dataset=[]), 0, False)
    model = AutoModelForImageClassification.from_pretrained(out / "late_phase").eval()
    assert model.config.id2label == {0: "dark", 1: "light"}
    log_probs = combine_predictions([predict_logits(model, images.scored["test"], 8)])
    scores, _ = score({"test": log_probs}, {"test": images.labels["test"]}, is_ensemble=False)
    assert scores["test"] == pytest.approx(results[4]["scores"]["test"], abs=1e-6)


def test_two_processes_train_and_one_reports(flags, folder, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, str(EXAMPLES / "run_cifar.py"), *flags, "--method", "base", "late_phase"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=300)
    assert run.returncode == 0, run.stderr[:6000]
    out = tmp_path / "out"
    report = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert report["settings"]["world_size"] == 2
    assert run.stdout.count("== late_phase") == 1
    rows = {(row["method"], row["variant"]): row["scores"]["test"] for row in report["results"]}
    images = prepare_images(
        load_images(str(folder), show_progress=False), ImageArguments(dataset=str(folder), image_size=8), 0, False
    )
    for method in ("base", "late_phase"):
        model = AutoModelForImageClassification.from_pretrained(out / method).eval()
        log_probs = combine_predictions([predict_logits(model, images.scored["test"], 8)])
        scores, _ = score({"test": log_probs}, {"test": images.labels["test"]}, is_ensemble=False)
        assert scores["test"] == pytest.approx(rows[method, "SWA"], abs=1e-6)


def test_dropout_is_trained_once_for_both_of_its_methods(flags, tmp_path, capsys):
    main([*flags, "--method", "mc_dropout", "dropout", "--mc_samples", "3", "--eval_strategy", "no"])
    assert capsys.readouterr().out.count("run dropout") == 1
    results = results_in(tmp_path)
    assert [result["method"] for result in results] == ["mc_dropout"] * 2 + ["dropout"] * 2
    assert results[0]["scores"]["test"]["nll"] != results[2]["scores"]["test"]["nll"]


def test_batch_ensemble_reports_its_ensemble(flags, tmp_path):
    main([*flags, "--method", "batch_ensemble", "--eval_strategy", "no"])
    results = results_in(tmp_path)
    assert [(result["method"], result["variant"]) for result in results] == [
        ("batch_ensemble", ""), ("batch_ensemble", "SWA"),
    ]  # fmt: skip
    assert all(result["scores"]["test"]["mutual_information"] > 0 for result in results)


def test_resume_ends_where_an_unbroken_run_ends(flags, tmp_path):
    # Six minibatches an epoch: the checkpoint lies inside of the first, in the second minibatch of a cycle.
    arguments = [*flags, "--method", "late_phase", "--save_strategy", "steps", "--save_steps", "5", "--cutout", "3"]
    main(arguments)
    unbroken = results_in(tmp_path)
    folder = tmp_path / "out" / "late_phase"
    (folder / "checkpoint-8").rename(tmp_path / "checkpoint-8")
    assert (folder / "checkpoint-5").is_dir()
    main([*arguments, "--resume"])
    for resumed, expected in zip(results_in(tmp_path), unbroken, strict=True):
        assert {k: v for k, v in resumed.items() if k != "minutes"} == {
            k: v for k, v in expected.items() if k != "minutes"
        }


def test_flags_override_the_recipe():
    recipe = str(EXAMPLES / "recipes" / "cifar_digits.yaml")
    model, images, methods, config, args = parse_arguments(TYPES, [recipe, "--method", "base", "--lr_points", "0:1"])
    assert (methods.method, methods.lr_points, images.flip, images.ood_dataset) == (
        ["base"],
        ["0:1"],
        False,
        ["photos"],
    )
    assert parse_arguments(TYPES, ["--dataset", "uoft-cs/cifar10"])[1].flip is True
