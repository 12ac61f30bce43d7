"""
Trains image classifiers with late-phase weights beside their controls and baselines, and compares them: accuracy,
likelihood, calibration, and how well they notice images from elsewhere.

    cd examples/vision
    python run_cifar.py recipes/cifar_digits.yaml
    python run_cifar.py recipes/cifar10_swa.yaml --method late_phase base deep_ensemble --seed 1
    python run_cifar.py recipes/cifar10_sgd.yaml --dataset path/to/folder --output_dir outputs/mine

A recipe, YAML or JSON, comes first; flags after it override it. All methods start from the same weights and see the
same minibatches, augmented alike, in the same order and equally many; each is scored with and without averaging over
time (SWA or EMA), from one run. Methods that share a run (base, swa and the deep ensemble's first member; dropout and
mc_dropout) train it once.

| method | what it is |
|---|---|
| `base` | plain training |
| `swa` | the same run, its weights averaged over time |
| `accumulation` | as late_phase but with one member: one update in K minibatches from T0 on |
| `dropout`, `mc_dropout` | plain training with dropout; predicted without masks, or averaged over masks |
| `batch_ensemble` | rank-1 members for the whole run, dealt out over the rows of a batch; predictions averaged |
| `deep_ensemble` | K plain runs of seeds of their own; predictions averaged |
| `late_phase` | as the recipe says |
| `late_phase_t0` | the same with T0 = 0 |
| `late_phase_full` | the same with every weight replicated |
| `late_phase_hypernet` | the same with a hypernetwork's embeddings replicated |
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torchvision
import transformers
from torch import Tensor
from transformers import AutoModelForImageClassification, TrainingArguments


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where `common` is

import hf_latephase.models  # noqa: F401  # makes wide_resnet and pyramidnet known to the Auto classes
from common.model_arguments import ModelArguments, build_config
from common.recipe import check_methods, name_base_gradient_scale, parse_arguments
from hf_latephase import LatePhaseConfig
from hf_latephase.analysis import combine_predictions
from hf_latephase.compat import PreTrainedConfig
from hf_latephase.core.points import steps_at
from hf_latephase.core.weights import find_targets
from hf_latephase.data.augmentation import DecodedImages, channel_statistics
from hf_latephase.data.decoding import decode_images
from hf_latephase.data.vision import DIGITS, PHOTOS, ImageSplits, load_images, load_unlabelled
from image_report import ImageResult, score, write_results
from image_training import MASKS, MEMBERS, MODEL, Predictions, read_points, save_and_check, train


METHODS = (
    "base",
    "swa",
    "accumulation",
    "dropout",
    "mc_dropout",
    "batch_ensemble",
    "deep_ensemble",
    "late_phase",
    "late_phase_t0",
    "late_phase_full",
    "late_phase_hypernet",
)
DEFAULT_METHODS = ("late_phase", "base", "accumulation")
# BatchEnsemble's factors begin as N(1, 0.5^2), so that its members differ (Wen et al., 2020).
BATCH_ENSEMBLE_NOISE = 0.5


@dataclass
class ImageArguments:
    """The images, and how they are augmented."""

    dataset: str | None = field(
        default=None,
        metadata={
            "help": "A local folder of parquet files or of images (train/CLASS/*.png, test/CLASS/*.png), or a data "
            "set of the Hub, uoft-cs/cifar10. Default: scikit-learn's digits, which need no network."
        },
    )
    label_column: str | None = field(default=None, metadata={"help": "Default: the only column of class labels."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})
    image_size: int = field(default=32, metadata={"help": "Height and width; other images are resized and cropped."})
    validation_share: float = field(
        default=0.0, metadata={"help": "Share of the training images held out to choose by; the test split is left."}
    )
    padding: int = field(default=4, metadata={"help": "Random crops after padding so many pixels; 0: none."})
    flip: bool | None = field(default=None, metadata={"help": "Mirror at random. Default: all data but digits."})
    cutout: int = field(default=0, metadata={"help": "Side of the square cut out at random; 0: none."})
    ood_dataset: list[str] | None = field(
        default=None,
        metadata={
            "help": "Data to be noticed as from elsewhere: photos, digits, folders, or data sets of the Hub "
            "(owner/name, owner/name:configuration). Default: photos, and digits unless they are the data."
        },
    )
    curve_images: int = field(
        default=1000, metadata={"help": "Validation images (else test images) watched for the curves on the way."}
    )

    def __post_init__(self) -> None:
        for name, least in (("image_size", 1), ("curve_images", 1), ("padding", 0), ("cutout", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        is_digits = self.dataset in (None, DIGITS)
        if self.flip is None:
            self.flip = not is_digits
        if self.ood_dataset is None:
            self.ood_dataset = [PHOTOS] if is_digits else [PHOTOS, DIGITS]


@dataclass
class MethodArguments:
    """What is compared."""

    method: list[str] = field(
        default_factory=lambda: list(DEFAULT_METHODS),
        metadata={"help": f"One or several of {', '.join(METHODS)}. Default: {', '.join(DEFAULT_METHODS)}."},
    )
    lr_points: list[str] | None = field(
        default=None,
        metadata={
            "help": "Points of a piecewise-linear learning rate, each place:rate, a place below 1 being a share of "
            "all steps. Replaces learning_rate and lr_scheduler_type."
        },
    )
    dropout_rate: float = field(default=0.3, metadata={"help": "Of the methods dropout and mc_dropout."})
    mc_samples: int = field(default=10, metadata={"help": "Dropout masks that mc_dropout averages over."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint of each run."})

    def __post_init__(self) -> None:
        check_methods(self.method, METHODS)
        if not 0 < self.dropout_rate < 1:
            raise ValueError(f"dropout_rate must lie between 0 and 1 (both excluded), got {self.dropout_rate}.")
        if self.mc_samples < 1:
            raise ValueError(f"mc_samples must be at least 1, got {self.mc_samples}.")


@dataclass
class ImageSets:
    """All images, decoded: what is learnt from, what is scored, and the few that the curves show."""

    train: DecodedImages
    scored: dict[str, DecodedImages]  # test, validation if there is one, and the out-of-distribution data
    watched: DecodedImages
    watched_split: str

    @property
    def labels(self) -> dict[str, Tensor]:
        """The labels of the sets that have some."""
        return {name: images.labels for name, images in self.scored.items() if images.labels is not None}


@dataclass
class Trained:
    """What one training run has brought."""

    predictions: Predictions
    steps: int
    minutes: float
    curve: list[dict[str, float]]
    details: dict[str, Any]


def method_configs(config: LatePhaseConfig, batch_size: int) -> dict[str, LatePhaseConfig]:
    """
    What each training run is, as a `LatePhaseConfig`: plain training is late-phase training with one member.

    Args:
        config (`LatePhaseConfig`):
            The settings of `late_phase`.
        batch_size (`int`):
            Images in a minibatch. BatchEnsemble deals them out, so it has the most members, up to K, that divide it.

    Returns:
        `dict[str, LatePhaseConfig]`: By run: every method but `swa`, `mc_dropout` and `deep_ensemble`, which are views
        of `base` and `dropout`.
    """
    one_member = dataclasses.replace(config, num_members=1, cycle_length=None, init_noise=0.0, base_gradient_scale=1.0)
    minibatches = config.cycle_length or (config.num_members if config.member_assignment == "minibatch" else 1)
    # Families that add no parameters: with one member they leave the model what it is.
    plain = [family for family in config.weights if family in ("norm", "head")] or ["head"]
    everywhere = {"target_modules": None, "exclude_modules": None}
    # Weight decay and statistics of its own are settings of the replicated weights that the recipe is about.
    others = everywhere | {"member_weight_decay": None}
    base = dataclasses.replace(one_member, weights=plain, member_assignment="minibatch", **others)
    without_norm = {"batch_norm_statistics": "running"}
    members = max(count for count in range(1, config.num_members + 1) if batch_size % count == 0)
    return {
        "base": base,
        "dropout": base,
        "accumulation": dataclasses.replace(
            one_member,
            cycle_length=minibatches,
            # The members' base gradients are summed; a single member's is a mean.
            base_gradient_scale=config.base_gradient_scale * config.num_members,
        ),
        "batch_ensemble": dataclasses.replace(
            base,
            num_members=members,
            weights=["rank1"],
            late_phase_start=0,
            member_assignment="sample",
            init_noise=BATCH_ENSEMBLE_NOISE,
            **without_norm,
        ),
        "late_phase": config,
        "late_phase_t0": dataclasses.replace(config, late_phase_start=0),
        "late_phase_full": dataclasses.replace(config, weights=["full"], member_assignment="minibatch", **others),
        "late_phase_hypernet": dataclasses.replace(config, weights=["hypernet"], **others, **without_norm),
    }


def runs_of(method: str, num_members: int) -> list[tuple[str, int]]:
    """The training runs that a method needs: their kind, and what is added to the seed."""
    if method == "deep_ensemble":
        return [("base", offset) for offset in range(num_members)]
    return [({"swa": "base", "mc_dropout": "dropout"}.get(method, method), 0)]


def model_config_of(run: str, model: ModelArguments, methods: MethodArguments, names: list[str]) -> PreTrainedConfig:
    """The model's config, with dropout for the run of that name."""
    chosen = dict(model.model_config or {})
    model_config = build_config(model.model_type, chosen, names)
    if run != "dropout":
        return model_config
    if not hasattr(model_config, "dropout"):
        raise ValueError(f"{type(model_config).__name__} has no field 'dropout'. Leave dropout and mc_dropout out.")
    return build_config(model.model_type, chosen | {"dropout": methods.dropout_rate}, names)


def check_runs(configs: dict[str, LatePhaseConfig], model_configs: dict[str, PreTrainedConfig]) -> None:
    """Refuses, before any of them trains, runs whose late-phase weights the model does not have."""
    for run, model_config in model_configs.items():
        with torch.device("meta"):
            model = AutoModelForImageClassification.from_config(model_config)
        try:
            find_targets(model, configs[run])
        except ValueError as error:
            raise ValueError(f"The method {run!r} cannot run: {error}") from error


def prepare_images(splits: ImageSplits, images: ImageArguments, seed: int, show_progress: bool = True) -> ImageSets:
    """Decode all images and normalise them by the training images' own mean and standard deviation."""
    decoded = {
        name: decode_images(split, splits.image_column, images.image_size, f"the {name} images", show_progress)
        for name, split in splits.named().items()
    }
    labels = {name: splits.labels(split) for name, split in splits.named().items()}
    mean, std = channel_statistics(decoded["train"])
    training = DecodedImages(
        decoded["train"], labels["train"], mean, std, images.padding, bool(images.flip), images.cutout, seed
    )
    scored = {
        name: DecodedImages(decoded[name], labels[name], mean, std)
        for name in ("validation", "test")
        if name in decoded
    }
    watched = next(iter(scored))
    count = images.curve_images
    for name in images.ood_dataset or []:
        split, column = load_unlabelled(name, images.cache_dir)
        outside = decode_images(split, column, images.image_size, name, show_progress)
        scored[name] = DecodedImages(outside, None, mean, std)
    shown = DecodedImages(decoded[watched][:count], labels[watched][:count], mean, std)
    return ImageSets(training, scored, shown, watched)


def run_training(
    config: LatePhaseConfig,
    model_config: PreTrainedConfig,
    images: ImageSets,
    methods: MethodArguments,
    args: TrainingArguments,
    num_masks: int,
) -> Trained:
    """Train one model, predict with it, save it and reload it."""
    trainer, minutes = train(
        # The layout of the weights that convolutions are fastest with, on CPUs and GPUs.
        lambda: AutoModelForImageClassification.from_config(model_config).to(memory_format=torch.channels_last),
        config,
        args,
        images.train.reseeded(args.seed),
        images.watched,
        read_points(methods.lr_points),
        methods.resume,
    )
    predictions = trainer.all_predictions(images.scored, num_masks)
    reloaded, difference = save_and_check(trainer, images.scored["test"])
    if args.process_index == 0:
        print(f"Saved in {args.output_dir}, reloaded as {type(reloaded).__name__}: logits differ by {difference:.1e}.")
    details = {
        "num_members": config.num_members,
        "parameters": sum(parameter.numel() for parameter in reloaded.parameters()),
        "reload_difference": difference,
    }
    return Trained(predictions, trainer.state.max_steps, minutes, trainer.curve(), details)


def results_of(method: str, trained: list[Trained], labels: dict[str, Tensor], average: str) -> list[ImageResult]:
    """The rows of a method, from the runs that it needs."""
    first = trained[0]
    views = {
        "swa": [(MODEL, True)],
        "mc_dropout": [(MASKS, False), (MASKS, True)],
        # Its members never were one model: their predictions are averaged, not their weights.
        "batch_ensemble": [(MEMBERS, False), (MEMBERS, True)],
    }.get(method, [(MODEL, False), (MODEL, True), (MEMBERS, False), (MEMBERS, True)])
    if method == "deep_ensemble":
        views = [(MODEL, False), (MODEL, True)]
    if method == "batch_ensemble" and first.details["num_members"] == 1:
        views = [(MODEL, False), (MODEL, True)]
    results = []
    for view, averaged in views:
        if (view, averaged) not in first.predictions:
            continue
        predictions = first.predictions[view, averaged]
        if method == "deep_ensemble":
            predictions = {
                name: combine_predictions([run.predictions[view, averaged][name].log_probs for run in trained])
                for name in predictions
            }
        scores, outside = score(predictions, labels, view != MODEL or method == "deep_ensemble")
        words = [average] if averaged and method != "swa" else []
        words += ["ensemble"] if view == MEMBERS and method != "batch_ensemble" else []
        minutes = sum(run.minutes for run in trained)
        # One curve a method: that of its (first) run.
        curve = first.curve if method not in ("swa", "mc_dropout", "deep_ensemble") and not results else []
        results.append(ImageResult(method, ", ".join(words), minutes, scores, outside, curve, first.details))
    return results


def describe_settings(arguments: list[Any], args: TrainingArguments) -> dict[str, Any]:
    """The settings worth keeping beside the figures."""
    names = """seed max_steps num_train_epochs per_device_train_batch_size gradient_accumulation_steps learning_rate
        weight_decay lr_scheduler_type warmup_steps optim optim_args max_grad_norm bf16 fp16 world_size"""
    settings = {key: value for part in arguments for key, value in dataclasses.asdict(part).items()}
    settings |= {name: getattr(args, name) for name in names.split()}
    versions = {module.__name__: module.__version__ for module in (torch, torchvision, transformers)}
    return settings | versions


def main(argv: list[str] | None = None) -> None:
    """Runs every method and reports."""
    types = (ModelArguments, ImageArguments, MethodArguments, LatePhaseConfig, TrainingArguments)
    *arguments, args = parse_arguments(types, argv, __doc__)
    model, image_arguments, methods, config = arguments
    config = name_base_gradient_scale(config, args.optim)
    if args.resume_from_checkpoint is not None:
        raise ValueError("resume_from_checkpoint names one run, and here each method is one. Use --resume.")
    if "swa" in methods.method and config.swa_start is None:
        raise ValueError("The method 'swa' needs swa_start: set it, or take a recipe that does.")
    read_points(methods.lr_points)

    is_main = args.process_index == 0
    show_progress = is_main and not args.disable_tqdm
    splits = load_images(
        image_arguments.dataset,
        image_arguments.validation_share,
        label_column=image_arguments.label_column,
        cache_dir=image_arguments.cache_dir,
        show_progress=show_progress,
    )
    batch_size = args.per_device_train_batch_size
    configs = method_configs(config, batch_size)
    kinds = {kind for method in methods.method for kind, _ in runs_of(method, config.num_members)}
    model_configs = {kind: model_config_of(kind, model, methods, splits.class_names) for kind in sorted(kinds)}
    check_runs(configs, model_configs)
    images = prepare_images(splits, image_arguments, args.seed, show_progress)

    settings = describe_settings(arguments, args)
    average = "EMA" if config.swa_start is None else "SWA"
    watched = f"{len(images.watched)} {images.watched_split} images"
    num_masks = methods.mc_samples if "mc_dropout" in methods.method else 0
    folder, trained, results = Path(args.output_dir), {}, []
    for method in methods.method:
        runs = runs_of(method, config.num_members)
        for kind, offset in runs:
            if (kind, offset) in trained:
                continue
            name = kind if offset == 0 else f"{kind}_seed{args.seed + offset}"
            if is_main:
                print(f"\n== {method}: run {name}", flush=True)
            run_args = copy.deepcopy(args)
            run_args.output_dir, run_args.seed = str(folder / name), args.seed + offset
            masks = num_masks if kind == "dropout" else 0
            trained[kind, offset] = run_training(configs[kind], model_configs[kind], images, methods, run_args, masks)
        results += results_of(method, [trained[run] for run in runs], images.labels, average)
        if is_main:
            # After every method: what is done stays if a later one fails.
            start = steps_at(config.late_phase_start, trained[runs[0]].steps)
            text = write_results(results, settings, average, start, watched, folder)
    if is_main:
        print(f"\n{text}\nIn {folder}: results.md, results.json, curves.png, and a folder for each run's model.")


if __name__ == "__main__":
    main()
