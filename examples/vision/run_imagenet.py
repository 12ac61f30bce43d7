"""
Fine-tunes a pretrained image classifier with late-phase weights, and scores it before and after.

    cd examples/vision
    python run_imagenet.py recipes/imagenet_resnet50.yaml
    python run_imagenet.py recipes/imagenet_resnet50.yaml --dataset path/to/imagenet
    python run_imagenet.py recipes/imagenet_densenet161.yaml --model path/to/a/saved/model
    python run_imagenet.py --model microsoft/resnet-50 --new_head true --dataset path/to/images --weights norm

A recipe, YAML or JSON, comes first; flags after it override it. The model is any image classifier of transformers
(`microsoft/resnet-50`), of timm through transformers (`timm/densenet161.tv_in1k`), a local folder that
`save_pretrained` wrote, or one of torchvision (`torchvision:densenet161`). All but the last are saved as stock models
of transformers. One of torchvision is saved as `model.safetensors` under its own keys, without a config: load it with
`torchvision.models.densenet161().load_state_dict(safetensors.torch.load_file(...))`.

Images are cropped and resized to 224 x 224 at random and mirrored for training, resized to 256 and cropped to 224 at
the centre for scoring, and normalised as ImageNet's classifiers are used to.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torchvision
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, PreTrainedModel, TrainingArguments


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where `common` is

import hf_latephase.models  # noqa: F401  # makes wide_resnet and pyramidnet known to the Auto classes
from common.recipe import check_methods, name_base_gradient_scale, parse_arguments
from hf_latephase import LatePhaseConfig
from hf_latephase.analysis import combine_predictions
from hf_latephase.core.points import steps_at
from hf_latephase.core.weights import find_targets
from hf_latephase.data.augmentation import IMAGENET_MEAN, IMAGENET_STD, EncodedImages, imagenet_transform
from hf_latephase.data.vision import ImageSplits, load_images
from image_report import ImageResult, score, write_results
from image_training import MEMBERS, ImageTrainer, Predictions, predict_logits, read_points, save_and_check, train


METHODS = ("late_phase", "base", "accumulation")
TORCHVISION = "torchvision:"


@dataclass
class FineTuningArguments:
    """The pretrained model, and what is compared."""

    model: str = field(
        default="microsoft/resnet-50",
        metadata={"help": "A model of the Hub (transformers or timm/...), a local folder, or torchvision:NAME."},
    )
    new_head: bool = field(
        default=False,
        metadata={"help": "Replace the output layer by a fresh one for the classes of the data (not torchvision's)."},
    )
    method: list[str] = field(
        default_factory=lambda: ["late_phase"],
        metadata={"help": f"One or several of {', '.join(METHODS)}. Scores before fine-tuning come with them."},
    )
    lr_points: list[str] | None = field(
        default=None,
        metadata={"help": "Points of a piecewise-linear learning rate, each place:rate. Replaces learning_rate."},
    )
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint of each method."})

    def __post_init__(self) -> None:
        check_methods(self.method, METHODS)


@dataclass
class ImageArguments:
    """The images."""

    dataset: str | None = field(
        default=None,
        metadata={
            "help": "A local folder (train/CLASS/*.jpg, val/CLASS/*.jpg, or parquet files), or a data set of the Hub, "
            "ILSVRC/imagenet-1k. Default: scikit-learn's digits, which need no network."
        },
    )
    label_column: str | None = field(default=None, metadata={"help": "Default: the only column of class labels."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})
    image_mean: list[float] = field(default_factory=lambda: list(IMAGENET_MEAN))
    image_std: list[float] = field(default_factory=lambda: list(IMAGENET_STD))
    curve_images: int = field(default=5000, metadata={"help": "Images watched for the curves on the way."})

    def __post_init__(self) -> None:
        if self.curve_images < 1:
            raise ValueError(f"curve_images must be at least 1, got {self.curve_images}.")
        for name in ("image_mean", "image_std"):
            if len(getattr(self, name)) != 3:
                raise ValueError(f"{name} takes three numbers, one a channel, got {getattr(self, name)}.")


def take_labels(network: nn.Module) -> nn.Module:
    """
    Has a classifier of torchvision take and give what Trainer expects, in place; its state dict stays what it is.

    Args:
        network (`torch.nn.Module`):
            From images `[B, 3, H, W]` to logits `[B, classes]`.

    Returns:
        `torch.nn.Module`: The network, which now takes `pixel_values` and `labels` (`[B]`, or none), and gives a
        dictionary of the `logits` and, if there are labels, the cross entropy as `loss`.
    """
    plain: Any = type(network)

    class Classifier(plain):
        def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            logits = super().forward(pixel_values)
            if labels is None:
                return {"logits": logits}
            return {"loss": nn.functional.cross_entropy(logits.float(), labels), "logits": logits}

    network.__class__ = Classifier
    return network


def load_model(name: str, new_head: bool, class_names: list[str]) -> nn.Module:
    """
    Load a pretrained classifier.

    Args:
        name (`str`):
            A model of the Hub, a local folder, or `torchvision:NAME`.
        new_head (`bool`):
            Whether to replace the output layer.
        class_names (`list[str]`):
            The classes of the data.

    Returns:
        `torch.nn.Module`: The model.

    Raises:
        `ValueError`: If the model is unknown or cannot be loaded, or has another number of classes.
    """
    if name.startswith(TORCHVISION):
        if new_head:
            raise ValueError(
                "new_head serves the models of transformers and timm. Name one of those, or leave it out."
            )
        network = name.removeprefix(TORCHVISION)
        known = torchvision.models.list_models(module=torchvision.models)
        if network not in known:
            nearest = difflib.get_close_matches(network, known, n=3, cutoff=0.0)
            raise ValueError(f"torchvision has no classifier {network!r}. The nearest are {nearest}.")
        model: nn.Module = take_labels(torchvision.models.get_model(network, weights="DEFAULT"))
        classes = 1000  # of ImageNet, as all of torchvision's
    else:
        names = dict(enumerate(class_names))
        labels = {"id2label": names, "label2id": {name: label for label, name in names.items()}}
        options: dict[str, Any] = labels | {"ignore_mismatched_sizes": True} if new_head else {}
        try:
            model = AutoModelForImageClassification.from_pretrained(name, **options)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"The model {name!r} cannot be loaded ({error}). Name a folder that save_pretrained wrote, a "
                "classifier of the Hub, or torchvision:NAME."
            ) from error
        classes = model.config.num_labels
    if classes != len(class_names):
        raise ValueError(
            f"The model {name!r} has {classes} classes, the data {len(class_names)}. Set new_head to give it a fresh "
            "output layer, or name the data that it was trained for."
        )
    return model


def reloader(model: nn.Module) -> Callable[[str], nn.Module]:
    """Returns what loads a saved folder of that kind of model as a stock model."""
    if isinstance(model, PreTrainedModel):
        return AutoModelForImageClassification.from_pretrained

    def load(folder: str) -> nn.Module:
        reloaded = copy.deepcopy(model)
        reloaded.load_state_dict(load_file(Path(folder) / "model.safetensors"))
        return reloaded

    return load


def method_configs(config: LatePhaseConfig) -> dict[str, LatePhaseConfig]:
    """What each method is, as a `LatePhaseConfig`: a control is late-phase training with one member."""
    one_member = dataclasses.replace(config, num_members=1, cycle_length=None, init_noise=0.0, base_gradient_scale=1.0)
    minibatches = config.cycle_length or (config.num_members if config.member_assignment == "minibatch" else 1)
    plain = [family for family in config.weights if family in ("norm", "head")] or ["head"]
    return {
        "late_phase": config,
        "base": dataclasses.replace(
            one_member,
            weights=plain,
            member_assignment="minibatch",
            member_weight_decay=None,
            target_modules=None,
            exclude_modules=None,
        ),
        "accumulation": dataclasses.replace(
            one_member, cycle_length=minibatches, base_gradient_scale=config.base_gradient_scale * config.num_members
        ),
    }


def prepare_images(splits: ImageSplits, images: ImageArguments, seed: int) -> dict[str, EncodedImages]:
    """The sets `"train"`, `"test"` and `"watched"`, decoded as they are needed."""

    def encoded(split: Any, name: str, is_training: bool) -> EncodedImages:
        transform = imagenet_transform(is_training, images.image_mean, images.image_std)
        return EncodedImages(split, splits.image_column, splits.label_column, transform, name, seed)

    # Spread over the split, which may be sorted by class.
    count = len(splits.test)
    watched = splits.test.select(range(0, count, max(1, -(-count // images.curve_images))))
    return {
        "train": encoded(splits.train, "the training images", True),
        "test": encoded(splits.test, "the test images", False),
        "watched": encoded(watched, "the test images", False),
    }


def results_of(
    method: str, trainer: ImageTrainer, minutes: float, predictions: Predictions, labels: Tensor, average: str
) -> list[ImageResult]:
    """The rows of a method."""
    results = []
    for (view, averaged), sets in predictions.items():
        scores, _ = score(sets, {"test": labels}, is_ensemble=view == MEMBERS)
        words = ([average] if averaged else []) + (["ensemble"] if view == MEMBERS else [])
        curve = [] if results else trainer.curve()
        results.append(ImageResult(method, ", ".join(words), minutes, scores, curve=curve))
    return results


def main(argv: list[str] | None = None) -> None:
    """Scores the pretrained model, fine-tunes it by every method and reports."""
    types = (FineTuningArguments, ImageArguments, LatePhaseConfig, TrainingArguments)
    *arguments, args = parse_arguments(types, argv, __doc__)
    tuning, image_arguments, config = arguments
    config = name_base_gradient_scale(config, args.optim)
    if args.resume_from_checkpoint is not None:
        raise ValueError("resume_from_checkpoint names one run, and here each method is one. Use --resume.")
    lr_points = read_points(tuning.lr_points)
    is_main = args.process_index == 0
    splits = load_images(
        image_arguments.dataset,
        label_column=image_arguments.label_column,
        cache_dir=image_arguments.cache_dir,
        show_progress=is_main and not args.disable_tqdm,
    )
    # Seeded: a fresh output layer begins alike for all methods.
    transformers.set_seed(args.seed)
    pretrained = load_model(tuning.model, tuning.new_head, splits.class_names)
    configs = {method: method_configs(config)[method] for method in tuning.method}
    for method_config in configs.values():
        find_targets(pretrained, method_config)
    images = prepare_images(splits, image_arguments, args.seed)
    labels = images["test"].labels

    settings = {key: value for part in arguments for key, value in dataclasses.asdict(part).items()}
    names = "seed max_steps num_train_epochs per_device_train_batch_size weight_decay optim optim_args world_size"
    settings |= {name: getattr(args, name) for name in names.split()}
    settings |= {module.__name__: module.__version__ for module in (torch, torchvision, transformers)}
    average, folder = "EMA" if config.swa_start is None else "SWA", Path(args.output_dir)
    if is_main:
        print(f"\n== {tuning.model} as it is", flush=True)
    network = pretrained.to(args.device).eval()
    logits = predict_logits(network, images["test"], args.eval_batch_size, args.dataloader_num_workers)
    pretrained = pretrained.cpu()
    scores, _ = score({"test": combine_predictions([logits])}, {"test": labels}, is_ensemble=False)
    results = [ImageResult("before", "", 0.0, scores)]
    for method, method_config in configs.items():
        if is_main:
            print(f"\n== {method}", flush=True)
        run_args = copy.deepcopy(args)
        run_args.output_dir = str(folder / method)
        trainer, minutes = train(
            lambda: copy.deepcopy(pretrained),
            method_config,
            run_args,
            images["train"].reseeded(args.seed),
            images["watched"],
            lr_points,
            tuning.resume,
        )
        predictions = trainer.all_predictions({"test": images["test"]})
        _, difference = save_and_check(trainer, images["watched"], reloader(pretrained))
        results += results_of(method, trainer, minutes, predictions, labels, average)
        results[-1].details["reload_difference"] = difference
        if is_main:
            # After every method: what is done stays if a later one fails.
            start = steps_at(config.late_phase_start, trainer.state.max_steps)
            watched = f"{len(images['watched'])} test images"
            text = write_results(results, settings, average, start, watched, folder)
    if is_main:
        print(f"\n{text}\nIn {folder}: results.md, results.json, curves.png, and a folder for each method's model.")


if __name__ == "__main__":
    main()
