"""
Which BatchNorm should the averaged model have? One training run a seed, its average taken in four ways.

    python examples/benchmarks/evidence/batch_norm_averages.py --dataset path/to/cifar10

The members of one late-phase run (`recipes/benchmark_cifar.yaml`) are averaged by the fold of their affine maps with
running statistics (`batch_norm_statistics="running"`), by averaged scale and shift with statistics measured over the
training set (`"recomputed"`), by the fold with each member's statistics measured (`"recomputed_members"`), and, for
comparison, by averaging scale, shift and statistics one by one; each for the last weights and for their average over
time (SWA). Figures go to `batch_norm_averages.json` beside this file, the table to `batch_norm_averages.md`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageClassification, TrainingArguments


sys.path.extend(str(Path(__file__).resolve().parents[2] / name) for name in (".", "benchmarks", "vision"))

from common.model_arguments import ModelArguments
from common.recipe import parse_arguments
from hf_latephase import LatePhaseConfig
from hf_latephase.analysis import combine_predictions
from hf_latephase.data.vision import load_images
from hf_latephase.metrics import Calibration
from image_classifiers import RECIPE, SWA
from image_training import ImageTrainer, read_points, train
from run_cifar import ImageArguments, MethodArguments, model_config_of, prepare_images
from runs import environment, markdown, spread


RESULTS = Path(__file__).with_name("batch_norm_averages.json")
KINDS = ("running", "recomputed", "recomputed_members", "one by one")


def averaged_one_by_one(trainer: ImageTrainer, time_averaged: bool) -> nn.Module:
    """The averaged model with the plain means of scale, shift, mean and variance."""
    model = trainer.averaged_model(time_averaged)
    average = trainer.time_average.values if time_averaged and trainer.time_average is not None else {}
    source = trainer.late_phase.model.state_dict() | average
    for target in trainer.late_phase.targets:
        stack = source[f"{target.module}.parametrizations.{target.tensor}.original"]
        if target.family == "norm" and stack.is_floating_point():
            with torch.no_grad():
                getattr(model.get_submodule(target.module), target.tensor).copy_(stack.mean(0))
    return model


def figures(trainer: ImageTrainer, images: Any) -> list[dict[str, Any]]:
    """Accuracy and likelihood on the test images, of each kind of average."""
    records = []
    for kind in KINDS:
        for time_averaged in (False, True):
            if kind == "one by one":
                model = averaged_one_by_one(trainer, time_averaged)
            else:
                trainer.late_phase_config.batch_norm_statistics = kind
                trainer._evaluated.forget()  # noqa: SLF001  # statistics of another kind than the config's
                model = trainer.averaged_model(time_averaged)
            prediction = combine_predictions([trainer.predict_logits(model.eval(), images)])
            metric = Calibration(keep_in_memory=True)
            metric.add_batch(log_probs=prediction.log_probs.double().numpy(), labels=images.labels.numpy())
            records.append({"statistics": kind, "SWA": time_averaged} | metric.compute())
        trainer._evaluated.forget()  # noqa: SLF001
    trainer.late_phase_config.batch_norm_statistics = "running"
    return records


def table(records: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over the seeds; accuracy in per cent."""
    rows = []
    for kind in KINDS:
        for time_averaged in (False, True):
            own = [r for r in records if r["statistics"] == kind and r["SWA"] == time_averaged]
            accuracy = spread([100 * r["accuracy"] for r in own], 2)
            rows.append([kind, "yes" if time_averaged else "no", accuracy, spread([r["nll"] for r in own], 4)])
    return markdown(["statistics", "SWA", "accuracy", "NLL"], 2, rows)


def main(argv: list[str] | None = None) -> None:
    """Trains with every seed, averages, and writes the figures."""
    types = (ModelArguments, ImageArguments, MethodArguments, LatePhaseConfig, TrainingArguments)
    argv = [str(RECIPE), *SWA, *(sys.argv[1:] if argv is None else argv)]
    model_arguments, image_arguments, methods, config, args = parse_arguments(types, argv, __doc__)
    splits = load_images(image_arguments.dataset)
    model_config = model_config_of("late_phase", model_arguments, methods, splits.class_names)
    images = prepare_images(splits, image_arguments, args.seed)
    records = []
    for seed in range(args.seed, args.seed + 3):
        trainer, _ = train(
            lambda: AutoModelForImageClassification.from_config(model_config).to(memory_format=torch.channels_last),
            dataclasses.replace(config),
            dataclasses.replace(args, seed=seed),
            images.train.reseeded(seed),
            images.watched,
            read_points(methods.lr_points),
            resume=False,
        )
        records += [{"seed": seed} | record for record in figures(trainer, images.scored["test"])]
        content = {"command": " ".join(["python", *sys.argv]), "environment": environment(), "runs": records}
        RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        RESULTS.with_suffix(".md").write_text(table(records), encoding="utf-8")
        print(table(records), flush=True)


if __name__ == "__main__":
    main()
