"""Fine-tuning of pretrained classifiers: of transformers, timm and torchvision, before and after."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import torchvision
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification, TrainingArguments

from hf_latephase import LatePhaseConfig
from hf_latephase.data import augmentation
from hf_latephase.data.vision import load_images
from image_training import predict_logits, save_and_check, train
from run_imagenet import ImageArguments, load_model, main, method_configs, prepare_images, reloader, take_labels


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for label, name in enumerate(("dark", "light")):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for index in range(count):
                image = rng.integers(100 * label, 100 * label + 120, (20, 24, 3), dtype=np.uint8)
                PIL.Image.fromarray(image).save(tmp_path / "data" / split / name / f"{index}.jpg")
    return tmp_path / "data"


@pytest.fixture
def pretrained(tmp_path):
    torch.manual_seed(0)
    names = {0: "dark", 1: "light"}
    config = ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", id2label=names,
        label2id={name: label for label, name in names.items()},
    )  # fmt: skip
    ResNetForImageClassification(config).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def flags(tmp_path, folder, pretrained):
    return [
        *(
            "--model",
            pretrained,
            "--dataset",
            str(folder),
            "--output_dir",
            str(tmp_path / "out"),
            "--num_members",
            "2",
        ),
        *("--weights", "norm", "--late_phase_start", "0", "--base_gradient_scale", "0.5", "--max_steps", "4"),
        *("--per_device_train_batch_size", "4", "--optim", "sgd", "--optim_args", "momentum=0.9"),
        *("--lr_points", "0:0.01", "0.5:0.01", "0.5:0.001", "--max_grad_norm", "0", "--curve_images", "4"),
        *("--eval_strategy", "steps", "--eval_steps", "2", "--logging_steps", "1", "--save_strategy", "no"),
        *("--use_cpu", "--disable_tqdm", "true", "--dataloader_pin_memory", "false"),
    ]


def test_a_run_scores_before_and_after(flags, folder, pretrained, tmp_path):
    main([*flags, "--method", "late_phase", "base"])
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["results"]
    assert [(result["method"], result["variant"]) for result in results] == [
        ("before", ""),
        ("late_phase", ""),
        ("late_phase", "ensemble"),
        ("base", ""),
    ]
    assert [point["step"] for point in results[1]["curve"]] == [2, 4]
    images = prepare_images(load_images(str(folder), show_progress=False), ImageArguments(dataset=str(folder)), 0)
    assert len(images["test"]) == 8

    def nll(path):
        model = AutoModelForImageClassification.from_pretrained(path).eval()
        logits = predict_logits(model, images["test"], 8)
        return torch.nn.functional.cross_entropy(logits, images["test"].labels).item()

    for row, path in ((0, pretrained), (1, tmp_path / "out" / "late_phase"), (3, tmp_path / "out" / "base")):
        assert results[row]["scores"]["test"]["nll"] == pytest.approx(nll(path), abs=1e-5)
    assert len({result["scores"]["test"]["nll"] for result in results}) == 4


def test_two_processes_fine_tune_and_one_reports(flags, folder, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = Path(__file__).resolve().parents[2] / "examples" / "vision" / "run_imagenet.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*launcher, str(script), *flags, "--method", "late_phase"]
    run = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    report = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert report["settings"]["world_size"] == 2
    assert run.stdout.count("== late_phase") == 1
    images = prepare_images(load_images(str(folder), show_progress=False), ImageArguments(dataset=str(folder)), 0)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "late_phase").eval()
    logits = predict_logits(model, images["test"], 8)
    nll = torch.nn.functional.cross_entropy(logits, images["test"].labels).item()
    (late,) = [r for r in report["results"] if (r["method"], r["variant"]) == ("late_phase", "")]
    assert late["scores"]["test"]["nll"] == pytest.approx(nll, abs=1e-5)


def test_the_watched_images_are_spread_over_the_split(folder):
    splits = load_images(str(folder), show_progress=False)
    images = prepare_images(splits, ImageArguments(dataset=str(folder), curve_images=4), 0)
    assert images["watched"].labels.tolist() == [0, 0, 1, 1]
    assert prepare_images(splits, ImageArguments(curve_images=99), 0)["watched"].labels.tolist() == [0] * 4 + [1] * 4


def test_base_gradients_of_the_controls():
    configs = method_configs(LatePhaseConfig(num_members=10, weights=["norm"], base_gradient_scale=0.1))
    assert (configs["accumulation"].cycle_length, configs["accumulation"].base_gradient_scale) == (10, 1.0)
    assert (configs["base"].weights, configs["base"].cycle_length, configs["base"].num_members) == (["norm"], None, 1)


def test_a_fresh_output_layer_fits_the_data(pretrained):
    with pytest.raises(ValueError, match="has 2 classes, the data 3. Set new_head"):
        load_model(pretrained, False, ["a", "b", "c"])
    model = load_model(pretrained, True, ["a", "b", "c"])
    assert (model.config.num_labels, model.config.id2label[2]) == (3, "c")


@pytest.fixture
def small_transform(monkeypatch):
    """Crops of 32 x 32, so that whole networks run in no time."""
    plain = augmentation.v2.RandomResizedCrop, augmentation.v2.CenterCrop
    monkeypatch.setattr(augmentation.v2, "RandomResizedCrop", lambda size: plain[0](32))
    monkeypatch.setattr(augmentation.v2, "CenterCrop", lambda size: plain[1](32))


def test_torchvisions_models_are_saved_under_their_own_keys(folder, small_transform, tmp_path):
    images = prepare_images(load_images(str(folder), show_progress=False), ImageArguments(dataset=str(folder)), 0)
    torch.manual_seed(0)
    model = take_labels(torchvision.models.mobilenet_v3_small(num_classes=2))
    args = TrainingArguments(
        str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True,
        save_strategy="no", dataloader_pin_memory=False, optim="sgd", report_to="none",
    )  # fmt: skip
    config = LatePhaseConfig(num_members=2, weights=["norm"], late_phase_start=0)
    trainer, _ = train(lambda: model, config, args, images["train"], images["watched"], None, False)
    assert save_and_check(trainer, images["test"], reloader(trainer.averaged_model()))[1] == 0
    stock = torchvision.models.mobilenet_v3_small(num_classes=2)
    stock.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    logits = torch.cat([stock.eval()(images["test"][i]["pixel_values"][None]) for i in range(8)])
    expected = predict_logits(trainer.averaged_model().eval(), images["test"], 8)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_timms_models_have_batch_norm_to_replicate(folder, small_transform, tmp_path):
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    config = TimmWrapperConfig(
        architecture="densenet121", num_labels=2, model_args={"growth_rate": 4, "block_config": (1, 1)}
    )
    torch.manual_seed(0)
    model = TimmWrapperForImageClassification(config)
    images = prepare_images(load_images(str(folder), show_progress=False), ImageArguments(dataset=str(folder)), 0)
    args = TrainingArguments(
        str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True,
        save_strategy="no", dataloader_pin_memory=False, optim="sgd", report_to="none",
    )  # fmt: skip
    late = LatePhaseConfig(num_members=2, weights=["norm"], late_phase_start=0)
    trainer, _ = train(lambda: model, late, args, images["train"], images["watched"], None, False)
    assert save_and_check(trainer, images["test"])[1] <= 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/no/such/model"], "'/no/such/model' cannot be loaded"),
        (["--model", "torchvision:densnet161"], "no classifier 'densnet161'.*densenet161"),
        (["--model", "torchvision:resnet18", "--new_head", "true"], "new_head serves"),
        (["--method", "late"], "did you mean 'late_phase'"),
        (["--image_mean", "0.5"], "image_mean takes three numbers"),
        (["--curve_images", "0"], "curve_images must be at least 1"),
        (["--lr_points", "0.5"], "no point of the learning rate"),
        (["--resume_from_checkpoint", "out"], "Use --resume"),
    ],
)
def test_bad_input_is_refused_before_training(arguments, message, flags, tmp_path):
    with pytest.raises(ValueError, match=message):
        main([*flags, *arguments])
    assert not list(tmp_path.glob("out/**/*.safetensors"))
