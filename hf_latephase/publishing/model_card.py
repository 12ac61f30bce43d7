"""Model cards: how to load a model, what was averaged, what it achieves beside its controls, how it was trained."""

from __future__ import annotations

import csv
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import jinja2
import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modelcard import TASK_TAG_TO_NAME_MAPPING
from transformers.utils import logging

from ..config import CONFIG_NAME, LatePhaseConfig
from ..core.late_phase import LatePhase
from ..core.points import PointsInTraining


logger = logging.get_logger(__name__)

TAG = "late-phase-weights"
EMISSIONS_NAME = "emissions.csv"

_TEMPLATES = Path(__file__).parent / "templates"
_TASKS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForSeq2SeqLM": "text2text-generation",
    "AutoModelForTokenClassification": "token-classification",
}


@dataclass
class CardContents:
    """
    What a card says below its metadata.

    Args:
        name (`str`):
            The model's name.
        late_phase (`str`):
            The section that [`describe_late_phase`] wrote.
        loading (`str`):
            Python code that loads the model; empty if transformers cannot.
        dataset (`str`, *optional*):
            What it was trained on.
        base_model (`str`, *optional*):
            What it was fine-tuned from.
        results (`dict[str, dict[str, float]]`):
            Figures by row: this model first, then its controls.
        results_note (`str`):
            How to read them.
        hyperparameters (`dict[str, Any]`):
            By name.
        history (`list[dict[str, Any]]`):
            Evaluations on the way.
        emissions (`dict[str, Any]`, *optional*):
            As [`read_emissions`] returns them.
        provenance (`dict[str, str]`):
            Versions, and the like.
    """

    name: str
    late_phase: str
    loading: str
    dataset: str | None = None
    base_model: str | None = None
    results: dict[str, dict[str, float]] = field(default_factory=dict)
    results_note: str = ""
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    emissions: dict[str, Any] | None = None
    provenance: dict[str, str] = field(default_factory=dict)


def render_card(data: ModelCardData, contents: CardContents) -> ModelCard:
    """
    Renders a card.

    Args:
        data (`huggingface_hub.ModelCardData`):
            The metadata. The tag `late-phase-weights` is added.
        contents (`CardContents`):
            The text's parts.

    Returns:
        `huggingface_hub.ModelCard`: The card.
    """
    data.tags = _unique([*(data.tags or []), TAG])
    parts: dict[str, Any] = {f.name: getattr(contents, f.name) for f in fields(contents)}
    # The row of the model itself, and what it is compared with, one a line.
    parts["results"] = format_rows([{"": name, **figures} for name, figures in contents.results.items()])
    parts["history"] = format_rows(contents.history)
    if contents.emissions is not None:
        grams, where = contents.emissions["emissions"], contents.emissions.get("geographical_location")
        parts["emissions"] = f"{_shown(grams)} g of CO2 equivalents{f' in {where}' if where else ''}, by CodeCarbon."
    citation = (_TEMPLATES / "citation.bib").read_text(encoding="utf-8").rstrip()
    card = ModelCard.from_template(data, str(_TEMPLATES / "model_card.md"), citation=citation, **parts)
    card.text += "\n"  # which Jinja leaves out
    return card


def describe_late_phase(
    late_phase: LatePhase,
    points: PointsInTraining | None = None,
    num_averaged: int | None = None,
    released: bool = True,
) -> str:
    """
    Writes the section about what was replicated and averaged.

    Args:
        late_phase ([`LatePhase`]):
            The members, on the model.
        points (`PointsInTraining`, *optional*):
            The points in training, in steps, if they are known.
        num_averaged (`int`, *optional*):
            How many times weights were taken into the average over time, if it is known.
        released (`bool`, defaults to `True`):
            Whether T0 has passed.

    Returns:
        `str`: Markdown.
    """
    config = late_phase.config
    weights = [target for target in late_phase.targets if target.tensor != "num_batches_tracked"]  # a counter
    counts = Counter((_without_numbers(target.key), target.family) for target in weights)
    template = jinja2.Template((_TEMPLATES / "late_phase.md").read_text(encoding="utf-8"))
    return template.render(
        members=config.num_members,
        released=released,
        settings=_settings(config, points, num_averaged),
        layers=[(name, family, count) for (name, family), count in counts.items()],
        size=late_phase.summary().splitlines()[-1],
        config_name=CONFIG_NAME,
    )


def loading_code(model: Any, processing_class: Any, repo: str) -> str:
    """
    Writes the code that loads a saved model.

    Args:
        model (`torch.nn.Module`):
            The model.
        processing_class (*optional*):
            Its tokenizer, image processor or processor, saved with it.
        repo (`str`):
            Its repository, or folder.

    Returns:
        `str`: Python code; empty for a model that transformers cannot load.
    """
    if not isinstance(model, PreTrainedModel):
        return ""
    names = {"model": auto_class(model)}
    if isinstance(processing_class, PreTrainedTokenizerBase):
        names["tokenizer"] = "AutoTokenizer"
    elif isinstance(processing_class, BaseImageProcessor):
        names["image_processor"] = "AutoImageProcessor"
    elif processing_class is not None:
        names["processor"] = "AutoProcessor"
    # A model whose code lies beside its weights.
    flag = ", trust_remote_code=True" if model._auto_class is not None else ""
    lines = [f'{name} = {loader}.from_pretrained("{repo}"{flag})' for name, loader in names.items()]
    return "\n".join([f"from transformers import {', '.join(sorted(set(names.values())))}", "", *lines])


def auto_class(model: PreTrainedModel) -> str:
    """The class that loads a model: the Auto class of its task, or else its own class."""
    if model._auto_class is not None:
        return model._auto_class
    for name in _TASKS:
        if type(model) in getattr(transformers, name)._model_mapping.values():
            return name
    return type(model).__name__


def task_of(model: Any) -> str | None:
    """The identifier of a model's task, if its Auto class tells."""
    return _TASKS.get(auto_class(model)) if isinstance(model, PreTrainedModel) else None


def eval_results(
    results: Mapping[str, float],
    task: str | None,
    dataset: str | None,
    dataset_type: str | None,
    **dataset_fields: Any,
) -> list[EvalResult]:
    """
    The entries of a model index.

    Args:
        results (`Mapping[str, float]`):
            Figures by name; those that are no finite number are left out.
        task (`str`, *optional*):
            The task's identifier. Without one the Hub takes no results.
        dataset, dataset_type (`str`, *optional*):
            The data's name and identifier.
        dataset_fields:
            More about the data, such as `dataset_split`.

    Returns:
        `list[huggingface_hub.EvalResult]`: One a figure.
    """
    if task is None:
        return []
    return [
        EvalResult(
            task_type=task,
            task_name=TASK_TAG_TO_NAME_MAPPING.get(task),
            dataset_type=dataset_type or "unknown",
            dataset_name=dataset or dataset_type or "unknown",
            metric_type=name,
            metric_name=name.replace("_", " "),
            metric_value=float(value),
            **dataset_fields,
        )
        for name, value in results.items()
        if math.isfinite(value)
    ]


def read_emissions(folder: str | os.PathLike) -> dict[str, Any] | None:
    """
    Reads what CodeCarbon measured, the last row of its `emissions.csv`.

    Args:
        folder (`str` or `os.PathLike`):
            Where the file may be.

    Returns:
        `dict[str, Any]`, *optional*: As the Hub wants it, in grams; `None` if nothing legible was left.
    """
    path = Path(folder, EMISSIONS_NAME)
    if not path.is_file():
        return None
    try:
        with path.open(newline="", encoding="utf-8") as file:
            row = list(csv.DictReader(file))[-1]
        grams = float(row["emissions"]) * 1000
    except (IndexError, KeyError, TypeError, ValueError) as error:
        logger.warning(f"{path} is not what CodeCarbon writes ({error!r}): the model card leaves emissions out.")
        return None
    known = {
        "geographical_location": row.get("country_name"),
        "hardware_used": row.get("gpu_model") or row.get("cpu_model"),
    }
    return {"emissions": grams, "source": "CodeCarbon"} | {key: value for key, value in known.items() if value}


def format_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """
    Lays rows out as a table in markdown.

    Args:
        rows (`Sequence[Mapping[str, Any]]`):
            Cells by column. The first column is aligned to the left, all others to the right.

    Returns:
        `str`: The table; empty if there are no rows.
    """
    if not rows:
        return ""
    columns = _unique([column for row in rows for column in row])
    lines = [columns, ["---", *("---:" for _ in columns[1:])]]
    lines += [[_shown(row[column]) if column in row else "–" for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def library_versions() -> dict[str, str]:
    """The versions that a card names."""
    return {"transformers": transformers.__version__, "torch": torch.__version__}


def _settings(config: LatePhaseConfig, points: PointsInTraining | None, num_averaged: int | None) -> dict[str, str]:
    def place(point: float, step: int | None) -> str:
        return f"{point}" if step is None else f"{point}: step {step}"

    start, average_start, every = (
        (points.late_phase_start, points.average_start, points.average_every) if points else (None, None, None)
    )
    settings = {
        "families": ", ".join(config.weights),
        "members (K)": str(config.num_members),
        "late phase from (T0)": place(config.late_phase_start, start),
    }

    def sampled(chosen: float | None) -> str:
        taken = f", {num_averaged} sample{'s' if num_averaged != 1 else ''}" if num_averaged is not None else ""
        return ("each update" if chosen is None else f"every {every or chosen} steps") + taken

    if config.swa_start is not None:
        settings["SWA from"] = f"{place(config.swa_start, average_start)}, {sampled(config.swa_every)}"
    elif config.averages_over_time:
        begun = f", from {place(config.ema_start, average_start)}" if config.ema_start is not None else ""
        kind = f"decay {config.ema_decay} per step, ramped" if config.ema_decay else f"memory {config.ema_memory}"
        settings["EMA"] = f"{kind}{begun}, {sampled(config.ema_every)}"
    named = {"weights", "num_members", "late_phase_start", "swa_start", "swa_every"}
    named |= {"ema_decay", "ema_memory", "ema_start", "ema_every"}
    default = LatePhaseConfig().to_dict()
    others = {key: value for key, value in config.to_dict().items() if key not in named and value != default[key]}
    return settings | {f"`{key}`": _shown(value) for key, value in others.items()}


def _without_numbers(key: str) -> str:
    """Layers that differ only in their number are one line."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", key)


def _shown(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _unique(values: list[str]) -> list[str]:
    return list(dict.fromkeys(values))
