"""The recipes against the paper's table, written out here, and two cycles of each on stand-in data."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification, TrainingArguments

import run_cifar
import run_imagenet
from common.model_arguments import build_config
from common.recipe import parse_arguments
from hf_latephase import LatePhaseConfig
from hf_latephase.core.points import resolve_points
from hf_latephase.data.vision import load_images
from image_training import read_points, train


EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RECIPES, BENCHMARKS = EXAMPLES / "vision" / "recipes", EXAMPLES / "benchmarks" / "evidence" / "recipes"
CIFAR = (
    run_cifar.ModelArguments, run_cifar.ImageArguments, run_cifar.MethodArguments, LatePhaseConfig, TrainingArguments,
)  # fmt: skip
IMAGENET = (run_imagenet.FineTuningArguments, run_imagenet.ImageArguments, LatePhaseConfig, TrainingArguments)

# Epochs, T0 and the knots of the rate as (epoch, rate), SWA from epoch. 28-14 with SGD is inferred from 28-10.
SGD = (200, 120, [(100, 0.1), (180, 0.001)], None)
SWA = (200, 100, [(80, 0.1), (144, 0.05)], 161)
SWA_28_14 = (300, 120, [(80, 0.1), (240, 0.05)], 241)
# And the widening factor, Cutout, the weight decay of the members.
PAPER = {
    "cifar10_sgd": (SGD, 10, 0, 5e-4),
    "cifar10_swa": (SWA, 10, 0, 5e-4),
    "cifar100_sgd": (SGD, 10, 0, 5e-3),
    "cifar100_swa": (SWA, 10, 0, 5e-4),
    "cifar10_swa_28_14": (SWA_28_14, 14, 16, 5e-4),
    "cifar100_swa_28_14": (SWA_28_14, 14, 16, 5e-4),
    "cifar10_sgd_28_14": (SGD, 14, 16, 5e-4),
    "cifar100_sgd_28_14": (SGD, 14, 16, 5e-3),
}
FINE_TUNED = {
    "imagenet_resnet50": "microsoft/resnet-50",
    "imagenet_resnet152": "microsoft/resnet-152",
    "imagenet_densenet161": "timm/densenet161.tv_in1k",
}
SMALL = ("cifar_digits", "benchmark_cifar")
STEPS_PER_EPOCH = 391  # 50,000 images in minibatches of 128


def parsed(types, name, tmp_path, *flags):
    folder = BENCHMARKS if name.startswith("benchmark") else RECIPES
    arguments = [str(folder / f"{name}.yaml"), f"--output_dir={tmp_path / 'out'}", *flags]
    return parse_arguments(types, arguments)


def test_no_recipe_is_left_out():
    names = {path.stem for kind in ("cifar", "imagenet") for path in RECIPES.glob(f"{kind}*.yaml")}
    assert names == {*PAPER, *FINE_TUNED, "cifar_digits"}


@pytest.mark.parametrize("name", PAPER)
def test_cifar_recipes_are_the_papers(name, tmp_path):
    (epochs, start, knots, swa_start), widen_factor, cutout, member_decay = PAPER[name]
    model, images, methods, config, args = parsed(CIFAR, name, tmp_path)
    data, other = ("cifar100", "cifar10") if "cifar100" in name else ("cifar10", "cifar100")
    assert images.dataset == f"uoft-cs/{data}"
    assert images.ood_dataset[0].startswith("ufldl-stanford/svhn") and images.ood_dataset[-1] == f"uoft-cs/{other}"
    assert len(images.ood_dataset) == 4
    assert (images.padding, images.flip, images.cutout, images.image_size) == (4, True, cutout, 32)
    assert (images.validation_share, model.model_type) == (0.0, "wide_resnet")
    assert model.model_config == {"depth": 28, "widen_factor": widen_factor}

    assert args.num_train_epochs == epochs and args.max_steps == -1
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (128, 1)
    assert (args.optim, args.optim_args) == ("sgd", "momentum=0.9,nesterov=true")
    assert (args.weight_decay, args.max_grad_norm, args.warmup_steps) == (5e-4, 0, 0)
    assert (args.label_smoothing_factor, args.fp16, args.bf16) == (0, False, False)

    assert (config.num_members, config.base_gradient_scale, config.init_noise) == (10, 1.0, 0.0)
    assert (config.weights, config.member_assignment, config.cycle_length) == (["norm", "head"], "minibatch", None)
    assert (config.member_weight_decay or args.weight_decay) == member_decay
    points = resolve_points(config, epochs * STEPS_PER_EPOCH)
    # A share is rounded up to a step.
    assert points.late_phase_start == pytest.approx(start * STEPS_PER_EPOCH, abs=1)
    if swa_start is None:
        assert (config.swa_start, config.ema_decay) == (None, None)
    else:
        assert points.average_start == pytest.approx(swa_start * STEPS_PER_EPOCH, abs=1)
        assert points.average_every == STEPS_PER_EPOCH
        assert config.batch_norm_statistics == "recomputed_members"
    lr_points = [(place * epochs, rate) for place, rate in read_points(methods.lr_points)]
    assert lr_points == [(pytest.approx(epoch, abs=1e-6), rate) for epoch, rate in knots]


@pytest.mark.parametrize("name", FINE_TUNED)
def test_imagenet_recipes_are_the_papers(name, tmp_path):
    tuning, images, config, args = parsed(IMAGENET, name, tmp_path)
    assert (tuning.model, images.dataset, tuning.new_head) == (FINE_TUNED[name], "ILSVRC/imagenet-1k", False)
    assert (args.num_train_epochs, args.per_device_train_batch_size, args.max_steps) == (20, 256, -1)
    assert (args.optim, args.optim_args) == ("sgd", "momentum=0.9")
    assert (args.weight_decay, args.max_grad_norm, args.warmup_steps) == (1e-4, 0, 0)
    assert (config.num_members, config.weights, config.late_phase_start) == (10, ["norm"], 0)
    assert (config.base_gradient_scale, config.init_noise, config.swa_start) == (0.1, 0.0, None)
    assert read_points(tuning.lr_points)[-2:] == [(0.5, 0.001), (0.5, 0.0001)]  # epoch 10 of 20


@pytest.mark.parametrize("name", [*PAPER, *SMALL])
def test_cifar_models_have_their_size(name, tmp_path):
    model, images, *_ = parsed(CIFAR, name, tmp_path)
    classes = 100 if images.dataset == "uoft-cs/cifar100" else 10
    config = build_config(model.model_type, model.model_config, [str(label) for label in range(classes)])
    with torch.device("meta"):
        network = AutoModelForImageClassification.from_config(config)
    millions = {10: 36.5, 14: 71.4, 1: 0.08}[config.widen_factor]
    assert network.num_parameters() / 1e6 == pytest.approx(millions, rel=0.03)
    assert network(torch.zeros(2, 3, 32, 32, device="meta")).logits.shape == (2, classes)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for index in range(10):
                image = PIL.Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
                image.save(tmp_path / "data" / split / name / f"{index}.png")
    return str(tmp_path / "data")


# What stands in: a few steps of small minibatches, without evaluation or checkpoints on the way.
SHORT = (
    "--per_device_train_batch_size=4", "--per_device_eval_batch_size=20", "--eval_strategy=no", "--save_strategy=no",
    "--use_cpu", "--disable_tqdm=true", "--dataloader_num_workers=0", "--dataloader_persistent_workers=false",
    "--dataloader_pin_memory=false", "--report_to=none", "--logging_steps=1",
)  # fmt: skip


@pytest.mark.parametrize("name", [*PAPER, *SMALL])
def test_cifar_recipes_run_two_cycles(name, folder, tmp_path):
    members = 5 if name in SMALL else 10
    flags = ("--dataset", folder, "--image_size=8", "--padding=1", "--ood_dataset", folder, "--curve_images=4")
    # The cycles and the samples of SWA lie within the last 2 K steps.
    steps = ("--late_phase_start=1", f"--max_steps={2 * members + 1}")
    _, images, methods, config, args = parsed(CIFAR, name, tmp_path, *flags, *SHORT, *steps)
    if config.swa_start is not None:
        config.swa_start, config.swa_every = 2.0, 1.0
    splits = load_images(folder, show_progress=False)
    sets = run_cifar.prepare_images(splits, images, 0, show_progress=False)
    model_config = build_config("wide_resnet", {"depth": 10, "widen_factor": 1}, splits.class_names)
    methods.lr_points = methods.lr_points[:1]
    trained = run_cifar.run_training(config, model_config, sets, methods, args, num_masks=0)
    assert trained.steps == 2 * members + 1
    results = run_cifar.results_of("late_phase", [trained], sets.labels, "SWA")
    expected = ["", "SWA", "ensemble", "SWA, ensemble"] if config.swa_start else ["", "ensemble"]
    assert [result.variant for result in results] == expected
    assert all(np.isfinite(result.scores["test"]["nll"]) for result in results)
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", FINE_TUNED)
def test_imagenet_recipes_run_two_cycles(name, folder, tmp_path, monkeypatch):
    tuning, images, config, args = parsed(IMAGENET, name, tmp_path, "--dataset", folder, "--max_steps=20", *SHORT)
    sets = run_imagenet.prepare_images(load_images(folder, show_progress=False), images, 0)
    model = ResNetForImageClassification(
        ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=2)
    )
    trainer, _ = train(
        lambda: model, config, args, sets["train"], sets["watched"], read_points(tuning.lr_points), resume=False
    )
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([1e-3] * 10 + [1e-4] * 10)
    assert trainer.late_phase.released
    moved = [stack for stack in trainer.late_phase.stacks().values() if not torch.equal(stack[0], stack[1])]
    assert moved
