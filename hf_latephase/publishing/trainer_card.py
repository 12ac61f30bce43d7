"""The model card of a trainer: what it knows about its model, its data and its evaluations."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import Trainer
from transformers.modelcard import METRIC_TAGS, TrainingSummary

from ..core.late_phase import LatePhase
from ..core.optimizers import unwrapped
from ..core.points import PointsInTraining
from .model_card import (
    TAG,
    CardContents,
    describe_late_phase,
    eval_results,
    library_versions,
    loading_code,
    read_emissions,
    render_card,
    task_of,
)


CARD_NAME = "README.md"
THIS_MODEL = "**this model**"

# What an evaluation logs about itself, not about the model.
_NO_RESULTS = re.compile(r"(^|_)(runtime|samples_per_second|steps_per_second|model_preparation_time)$")


@dataclass(frozen=True)
class Record:
    """
    What a trainer did beyond what Trainer does.

    Args:
        late_phase (`LatePhase`):
            The members.
        points (`PointsInTraining`, *optional*):
            When they came, and the average over time; `None` before training.
        num_averaged (`int`, *optional*):
            The samples in the average over time; `None` without one.
        control_results (`dict[str, dict[str, float]]`):
            Figures of controls by name, as their trainers' `evaluate()` returned them.
    """

    late_phase: LatePhase
    points: PointsInTraining | None
    num_averaged: int | None
    control_results: dict[str, dict[str, float]]

    def section(self) -> str:
        """The card's section on it."""
        return describe_late_phase(self.late_phase, self.points, self.num_averaged, self.late_phase.released)


def write_model_card(trainer: Trainer, record: Record, parents: Callable[..., None], options: dict[str, Any]) -> None:
    """
    Writes `README.md` into a trainer's output folder.

    A trainer class with cards of its own (TRL's), and an adapter, keep theirs, and get our section below.

    Args:
        trainer (`transformers.Trainer`):
            The trainer.
        record (`Record`):
            What it did beyond Trainer.
        parents (`Callable`):
            Its parent's `create_model_card`.
        options (`dict[str, Any]`):
            The arguments of Trainer's `create_model_card`.
    """
    if not trainer.is_world_process_zero():
        return
    assert trainer.args.output_dir is not None  # TrainingArguments has filled it in
    path = os.path.join(trainer.args.output_dir, CARD_NAME)
    tags = [*_listed(options["tags"]), *(_tags_of(path)), TAG]
    is_trainers = getattr(parents, "__func__", None) is Trainer.create_model_card
    if is_trainers and not hasattr(record.late_phase.model, "peft_config"):
        card = _trainer_card(trainer, record, options | {"tags": _unique(tags)})
    else:
        known = inspect.signature(parents).parameters
        renamed = options | {"dataset_name": next(iter(_listed(options["dataset"])), None)}
        parents(**{name: value for name, value in renamed.items() if name in known})
        card = ModelCard.load(path)
        card.data.tags = _unique([*(card.data.tags or []), *tags])
        card.text = f"{card.text.rstrip()}\n\n{record.section()}\n"
    card.save(path)


def final_results(trainer: Trainer) -> tuple[dict[str, float], int | None]:
    """
    The figures of the model that a trainer now holds, from its logs.

    Args:
        trainer (`Trainer`):
            The trainer.

    Returns:
        `tuple[dict[str, float], int | None]`: The figures, without the prefix `eval_`, and the step that they are of:
        what was evaluated after training, else at the best step if that was loaded, else last.
    """
    log = trainer.state.log_history
    ends = [index for index, entry in enumerate(log) if "train_runtime" in entry]
    after = _evaluations(log[ends[-1] + 1 :]) if ends else []
    if after:
        return after[-1][1], after[-1][0]
    before = _evaluations(log)
    if ends and trainer.args.load_best_model_at_end and trainer.state.best_global_step:
        before = [found for found in before if found[0] == trainer.state.best_global_step] or before
    return (before[-1][1], before[-1][0]) if before else ({}, None)


def _trainer_card(trainer: Trainer, record: Record, options: dict[str, Any]) -> ModelCard:
    model, args = record.late_phase.model, trainer.args
    if not hasattr(model, "config"):
        # Where Trainer's summary looks for the base model.
        options = options | {"finetuned_from": options["finetuned_from"] or ""}
    summary = TrainingSummary.from_trainer(trainer, **options)
    tasks = _listed(options["tasks"]) or _listed(task_of(model)) or _listed(summary.tasks)
    dataset_types, datasets = _listed(summary.dataset_tags), _listed(summary.dataset)
    base_model = summary.finetuned_from if _is_repo(summary.finetuned_from) else None
    metadata: dict[str, Any] = next(iter(_listed(summary.dataset_metadata)), {})
    arguments = next(iter(_listed(summary.dataset_args)), None)
    results, step = final_results(trainer)
    index = eval_results(
        results,
        next(iter(tasks), None),
        next(iter(datasets), None),
        next(iter(dataset_types), None),
        dataset_split=metadata.get("split"),
        dataset_config=metadata.get("config"),
        dataset_args=arguments,
    )
    emissions = read_emissions(args.output_dir or "")
    name = summary.model_name or "model"
    data = ModelCardData(
        language=summary.language,
        license=summary.license,
        library_name="transformers",
        pipeline_tag=tasks[0] if len(tasks) == 1 else None,
        base_model=base_model,
        tags=summary.tags,
        datasets=dataset_types or None,
        metrics=[metric for metric in results if metric in METRIC_TAGS] or None,
        model_name=name if index else None,
        eval_results=index or None,
        co2_eq_emissions=emissions,
    )
    controls = {control: _plain(figures) for control, figures in record.control_results.items()}
    note = "" if step is None else f"Evaluated at step {step} of {trainer.state.max_steps}."
    if controls:
        note += " The other rows are its controls."
    contents = CardContents(
        name=name,
        late_phase=record.section(),
        loading=loading_code(model, trainer.processing_class, trainer.hub_model_id or args.hub_model_id or name),
        dataset=", ".join(datasets) or None,
        base_model=base_model,
        results={THIS_MODEL: results, **controls} if results or controls else {},
        results_note=note,
        hyperparameters=_hyperparameters(trainer, summary.hyperparameters or {}),
        history=_history(trainer.state.log_history),
        emissions=emissions,
        provenance=library_versions(),
    )
    return render_card(data, contents)


def _hyperparameters(trainer: Trainer, trainers: dict[str, Any]) -> dict[str, Any]:
    args, state = trainer.args, trainer.state
    found = trainers | {"weight_decay": args.weight_decay, "max_grad_norm": args.max_grad_norm}
    if trainer.optimizer is not None:
        # Trainer names that of its arguments, whichever was passed.
        optimizer = unwrapped(trainer.optimizer)
        used = {key: optimizer.defaults[key] for key in ("betas", "eps", "momentum", "nesterov", "alpha")
                if key in optimizer.defaults}  # fmt: skip
        settings = ", ".join(f"{key}={value}" for key, value in used.items())
        found["optimizer"] = f"{type(optimizer).__name__}{f' ({settings})' if settings else ''}"
    if state.global_step:
        found["steps trained"] = f"{state.global_step} of {state.max_steps}"
    return found


def _history(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The evaluations during training, each with the training loss last logged before it."""
    rows: dict[int, dict[str, Any]] = {}
    loss: Any = "no log"
    for entry in log:
        if "train_runtime" in entry:
            break
        loss = entry.get("loss", loss)
        figures = _plain(entry, of_log=True)
        if figures:
            known = {"step": entry["step"], "epoch": entry.get("epoch", "–"), "training loss": loss}
            rows[entry["step"]] = rows.get(entry["step"], known) | figures
    return list(rows.values())


def _evaluations(log: list[dict[str, Any]]) -> list[tuple[int, dict[str, float]]]:
    """By step; several evaluation sets are evaluated at the same one."""
    found: dict[int, dict[str, float]] = {}
    for entry in log:
        figures = _plain(entry, of_log=True)
        if figures:
            found.setdefault(entry["step"], {}).update(figures)
    return list(found.items())


def _plain(metrics: Mapping[str, Any], of_log: bool = False) -> dict[str, float]:
    """The figures among what `evaluate` returned, or logged, without its prefix."""
    return {
        key.removeprefix("eval_"): value
        for key, value in metrics.items()
        if (key.startswith("eval_") or not of_log and key != "epoch")
        and not _NO_RESULTS.search(key)
        and isinstance(value, (int, float))
    }


def _tags_of(path: str) -> list[str]:
    """The tags of the card that is there, which are kept."""
    return ModelCard.load(path).data.tags or [] if os.path.isfile(path) else []


def _is_repo(name: Any) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return bool(name)


def _listed(value: Any) -> list[Any]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [one for one in values if one is not None]


def _unique(values: list[str]) -> list[str]:
    return list(dict.fromkeys(values))
