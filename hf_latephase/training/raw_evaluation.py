"""The weights without their average over time, evaluated beside it."""

from __future__ import annotations

from typing import Any

from transformers import TrainingArguments
from transformers.utils import logging


logger = logging.get_logger(__name__)
SUFFIX = "_raw"


def with_suffix(metrics: dict[str, Any]) -> dict[str, Any]:
    """Returns the metrics of an evaluation of the raw weights under their own names, `eval_loss_raw`."""
    return {name + SUFFIX: value for name, value in metrics.items() if not name.endswith("_model_preparation_time")}


def verdict(log_history: list[dict[str, Any]], metric: str, greater_is_better: bool = False) -> str | None:
    """
    Says which was better when both were last evaluated, the average over time or the raw weights.

    Args:
        log_history (`list[dict]`):
            What was logged.
        metric (`str`):
            The metric to compare by.
        greater_is_better (`bool`, defaults to `False`):
            Whether larger values of it are better.

    Returns:
        `str`, *optional*: One line; `None` if they were never evaluated both.
    """
    both = [log for log in log_history if metric in log and metric + SUFFIX in log]
    if not both:
        return None
    average, raw = both[-1][metric], both[-1][metric + SUFFIX]
    if average == raw:
        result = "the average over time and the raw weights were equally good"
    elif (average > raw) == greater_is_better:
        result = "the average over time was better than the raw weights"
    else:
        result = "the average over time was worse than the raw weights, though it is what is saved"
    return f"At the last evaluation (step {both[-1]['step']}) {result}: {metric} {average:.5g} against {raw:.5g}."


def tell_which_was_better(history: list[dict[str, float]], args: TrainingArguments) -> None:
    """Logs the verdict when training ends, as a warning if the raw weights were better."""
    chosen = args.metric_for_best_model
    lines = []
    if chosen is not None:
        name = chosen if chosen.startswith("eval_") else f"eval_{chosen}"
        lines.append(verdict(history, name, bool(args.greater_is_better)))
    losses = dict.fromkeys(name for log in history for name in log if name.endswith("_loss"))  # of each dataset
    lines += [verdict(history, name) for name in losses]
    line = next((line for line in lines if line is not None), None)
    if line is not None and args.process_index == 0:
        (logger.warning if " was worse " in line else logger.info)(line)
