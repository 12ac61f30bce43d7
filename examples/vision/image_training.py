"""Image classifiers in training and after it: curves, predictions of models and members, reloading."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForImageClassification, TrainingArguments, default_data_collator, set_seed
from transformers.trainer_utils import get_last_checkpoint

from hf_latephase import LatePhaseConfig, LatePhaseTrainer
from hf_latephase.analysis import (
    EnsemblePrediction,
    combine_predictions,
    evaluation_mode,
    predict_with_dropout,
    predict_with_members,
)
from hf_latephase.data.augmentation import DecodedImages, EncodedImages, EpochDraws
from hf_latephase.training.schedules import PiecewiseLinearScheduleMixin


RELOAD_TOLERANCE = 1e-5
# Views of one training run: the averaged model, its members together, its dropout masks together.
MODEL, MEMBERS, MASKS = "model", "members", "masks"

Images = DecodedImages | EncodedImages
# By view, and whether weights were averaged over time; then by image set.
Predictions = dict[tuple[str, bool], dict[str, EnsemblePrediction]]


class ImageTrainer(PiecewiseLinearScheduleMixin, LatePhaseTrainer):
    """
    [`LatePhaseTrainer`] for image classifiers.

    Differs from the parent in that `evaluate` gives the error rate on the images to watch, before and after averaging
    over time (SWA or EMA); in that weight decay reaches all weights of the plain model, biases and normalisation
    layers included, as in the paper's runs; and in the piecewise-linear learning rate.

    Args:
        watched ([`DecodedImages`] or [`EncodedImages`]):
            The images that `evaluate` looks at.
        lr_points (`list[tuple[float, float]]`, *optional*):
            As in [`~hf_latephase.training.schedules.PiecewiseLinearScheduleMixin`].
    """

    def __init__(self, *args: Any, watched: Images, **kwargs: Any) -> None:
        self._watched = watched
        super().__init__(*args, data_collator=default_data_collator, eval_dataset=watched, **kwargs)
        self.add_callback(EpochDraws())

    @property
    def has_time_average(self) -> bool:
        """Whether weights have been averaged over time."""
        return self.time_average is not None and self.time_average.num_averaged > 0

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names all parameters but rank-1 factors, which never decay."""
        return [name for name, _ in model.named_parameters() if self.late_phase.plain_name(name) is not None]

    def predict_logits(self, model: nn.Module, images: Dataset) -> Tensor:
        """Returns a model's logits for all images, `[N, classes]`, on the CPU."""
        return predict_logits(model, images, self.args.eval_batch_size, self.args.dataloader_num_workers)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Gives the error rate of the averaged model, and of the one averaged over time too once there is one."""

        def error(time_averaged: bool) -> float:
            logits = self.predict_logits(self.averaged_model(time_averaged).eval(), self._watched)
            return (logits.argmax(-1) != self._watched.labels).double().mean().item()

        metrics = {f"{metric_key_prefix}_error": error(time_averaged=False)}
        if self.has_time_average:
            metrics[f"{metric_key_prefix}_error_averaged"] = error(time_averaged=True)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def curve(self) -> list[dict[str, float]]:
        """What `evaluate` has logged so far."""
        names = {"step": "step", "eval_error": "error", "eval_error_averaged": "error_averaged"}
        return [
            {names[key]: value for key, value in entry.items() if key in names}
            for entry in self.state.log_history
            if "eval_error" in entry
        ]

    def all_predictions(self, image_sets: Mapping[str, Dataset], num_masks: int = 0) -> Predictions:
        """
        Predicts with everything that the run has brought.

        Args:
            image_sets (`Mapping[str, torch.utils.data.Dataset]`):
                The images, by name.
            num_masks (`int`, defaults to 0):
                Dropout masks for MC-dropout; 0 leaves that out.

        Returns:
            `Predictions`: Of the averaged model, of the members together if there are several, and of the dropout
            masks together, each without and with averaging over time if there was any.
        """
        predictions: Predictions = {}
        for averaged in (False, True) if self.has_time_average else (False,):
            model = self.averaged_model(averaged).eval()
            predictions[MODEL, averaged] = {
                name: combine_predictions([self.predict_logits(model, images)]) for name, images in image_sets.items()
            }
            if num_masks:
                predictions[MASKS, averaged] = {
                    name: predict_with_dropout(
                        model, lambda i=images, m=model: self.predict_logits(m, i), num_masks, self.args.seed
                    )
                    for name, images in image_sets.items()
                }
            if self.late_phase.num_members > 1:
                with self._members(averaged) as members:
                    predictions[MEMBERS, averaged] = {
                        name: predict_with_members(self.late_phase, lambda i=images: self.predict_logits(members, i))
                        for name, images in image_sets.items()
                    }
        return predictions

    @contextlib.contextmanager
    def _members(self, time_averaged: bool) -> Iterator[nn.Module]:
        """The model with its members, ready to predict."""
        with self._evaluated.applied(time_averaged), evaluation_mode(self.late_phase.model):
            yield self.late_phase.model


def train(
    make_model: Callable[[], nn.Module],
    config: LatePhaseConfig,
    args: TrainingArguments,
    train_dataset: Dataset,
    watched: Images,
    lr_points: Sequence[tuple[float, float]] | None,
    resume: bool,
) -> tuple[ImageTrainer, float]:
    """
    Train one model.

    Args:
        make_model (`Callable[[], torch.nn.Module]`):
            Makes the model; called after `args.seed` was set, so that all runs of one seed begin with equal weights.
        config ([`LatePhaseConfig`]):
            What is trained.
        args ([`~transformers.TrainingArguments`]):
            How, and where it is saved.
        train_dataset (`torch.utils.data.Dataset`):
            The images to learn from.
        watched ([`DecodedImages`] or [`EncodedImages`]):
            The images to watch on the way.
        lr_points (`list[tuple[float, float]]`, *optional*):
            The learning rate; `None`: as `args` say.
        resume (`bool`):
            Whether to go on from the last checkpoint in `args.output_dir`.

    Returns:
        `tuple[ImageTrainer, float]`: The trainer and the minutes that training took.
    """
    set_seed(args.seed)
    trainer = ImageTrainer(
        model=make_model(),
        args=args,
        late_phase_config=config,
        train_dataset=train_dataset,
        watched=watched,
        lr_points=lr_points,
    )
    folder = str(args.output_dir)
    checkpoint = get_last_checkpoint(folder) if resume and Path(folder).is_dir() else None
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    return trainer, metrics["train_runtime"] / 60


@torch.no_grad()
def predict_logits(model: nn.Module, images: Dataset, batch_size: int, num_workers: int = 0) -> Tensor:
    """
    Returns a model's logits for all images, in the mode that it is in.

    Args:
        model (`torch.nn.Module`):
            An image classifier.
        images (`torch.utils.data.Dataset`):
            Examples with `pixel_values`.
        batch_size (`int`):
            Images at a time.
        num_workers (`int`, defaults to 0):
            Processes that load images.

    Returns:
        `torch.Tensor`: `[N, classes]` on the CPU.
    """
    device = next(model.parameters()).device
    loader = DataLoader(images, batch_size, num_workers=num_workers, collate_fn=default_data_collator)
    return torch.cat([_logits(model(pixel_values=batch["pixel_values"].to(device))).cpu() for batch in loader])


def read_points(texts: Sequence[str] | None) -> list[tuple[float, float]] | None:
    """
    Reads the points of a learning rate, each written `place:rate`.

    Raises:
        `ValueError`: If one is written otherwise.
    """
    if texts is None:
        return None
    points = []
    for text in texts:
        place, _, rate = text.partition(":")
        try:
            points.append((float(place), float(rate)))
        except ValueError:
            raise ValueError(
                f"lr_points: {text!r} is no point of the learning rate. Write place:rate, where a place below 1 is a "
                "share of all steps: 0.5:0.1 0.9:0.001."
            ) from None
    return points


def save_and_check(
    trainer: ImageTrainer,
    images: Dataset,
    load: Callable[[str], nn.Module] = AutoModelForImageClassification.from_pretrained,
) -> tuple[nn.Module, float]:
    """
    Save the averaged model, load the folder as a stock model, and hold the two against each other.

    Args:
        trainer (`ImageTrainer`):
            The trainer.
        images (`torch.utils.data.Dataset`):
            Images to compare the logits on; one batch is taken.
        load (`Callable[[str], torch.nn.Module]`, *optional*):
            What loads the folder.

    Returns:
        `tuple[torch.nn.Module, float]`: The reloaded model and the largest difference of its logits, relative to the
        largest logit where that is above 1.

    Raises:
        `RuntimeError`: If that is above 1e-5.
    """
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    folder, model = str(trainer.args.output_dir), trainer.averaged_model().eval()
    reloaded = load(folder).to(next(model.parameters()).device).eval()
    probe = torch.utils.data.Subset(images, range(min(len(images), trainer.args.eval_batch_size)))
    expected = trainer.predict_logits(model, probe)
    size = expected.abs().max().clamp_min(1)  # a model that diverged has logits beyond any absolute tolerance
    difference = ((trainer.predict_logits(reloaded, probe) - expected).abs().max() / size).item()
    # BatchNorm statistics of a model that is not replicated are each process's own; one of them is saved.
    if trainer.args.should_save and not difference <= RELOAD_TOLERANCE:
        raise RuntimeError(f"The model saved in {folder} differs from the trained one: logits by {difference:.3g}.")
    return reloaded, difference


def _logits(output: Any) -> Tensor:
    return output["logits"].float()
