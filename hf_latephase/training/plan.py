"""What a run will do, in one line before its first step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from transformers import TrainerState, TrainingArguments
from transformers.utils import logging

from ..config import LatePhaseConfig
from ..core.cycle import Cycle
from ..core.points import PointsInTraining


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Plan:
    """
    What a run will do.

    Args:
        text (`str`):
            One line for people.
        loses_updates (`bool`):
            Whether the base takes fewer updates than plain training would.
        figures (`dict[str, float]`):
            The same in numbers, for the first entry of the logs; empty if training is plain.
    """

    text: str
    loses_updates: bool
    figures: dict[str, float]


def make_plan(
    config: LatePhaseConfig,
    cycle: Cycle,
    points: PointsInTraining,
    max_steps: int,
    accumulation_steps: int = 1,
    base_gradient_scale: float = 1.0,
) -> Plan:
    """
    Returns what a run will do.

    Args:
        config (`LatePhaseConfig`), cycle (`Cycle`), points (`PointsInTraining`):
            The settings, the cycle and the points in training that follow from them.
        max_steps (`int`):
            Trainer's steps.
        accumulation_steps (`int`, defaults to 1):
            Minibatches of a process to one of Trainer's steps.
        base_gradient_scale (`float`, defaults to 1.0):
            γ_θ, as it was chosen.
    """
    saved = f"Evaluated and saved: {_saved(config, points)}."
    if cycle.is_plain:
        return Plan(f"Plain training, num_members=1. {saved}", False, {})
    minibatches = cycle.steps_per_cycle * accumulation_steps * cycle.num_processes
    start = points.late_phase_start
    without = max_steps - start
    updates = math.ceil(without / cycle.steps_per_cycle)  # the last cycle may be cut short
    late = (
        f"Late phase from step {start:,} of {max_steps:,} on: {_count(config.num_members, 'member')}, "
        f"{_count(minibatches, 'minibatch', 'minibatches')} to a cycle, base_gradient_scale={base_gradient_scale:g}"
    )
    if updates < without:
        keeps = cycle.accumulation_for_one_step(accumulation_steps)
        effect = (
            f"After step {start:,} the base takes {_count(updates, 'update')} instead of {without:,}; "
            f"gradient_accumulation_steps={keeps} would keep all"
        )
    else:
        effect = f"The base takes {_count(updates, 'update')} from then on, as without"
    figures = {
        "late_phase_start": start,
        "minibatches_per_cycle": minibatches,
        "base_updates": start + updates,
        "base_updates_without": max_steps,
        "base_gradient_scale": base_gradient_scale,
    }
    return Plan(f"{late}. {effect}. {saved}", updates < without, figures)


def announce(plan: Plan, state: TrainerState, args: TrainingArguments) -> dict[str, float]:
    """Logs a plan as training begins, as a warning if updates are lost, and returns its figures, unless logged."""
    if args.process_index == 0:
        (logger.warning if plan.loses_updates else logger.info)(plan.text)
    logged = any(plan.figures.keys() <= entry.keys() for entry in state.log_history)
    return {} if logged else plan.figures


def _saved(config: LatePhaseConfig, points: PointsInTraining) -> str:
    weights = "the members' average" if config.num_members > 1 else "the weights"
    if not config.averages_over_time:
        return weights if config.num_members > 1 else "the weights as they are"
    begin = f"from step {max(points.average_start or 0, 1):,} on"
    chosen = config.ema_every if config.swa_start is None else config.swa_every
    often = f"every {_count(points.average_every, 'step')}" if chosen is not None else "after each update"
    if config.swa_start is not None:
        kind = "the equal average over time (SWA)"
    elif config.ema_decay is not None:
        kind = f"a moving average over time (ema_decay={config.ema_decay:g}, ramped)"
    else:
        kind = f"a moving average over time (ema_memory={config.ema_memory:g})"
    return f"{kind} of {weights}, {begin}, taken {often}"


def _count(number: int, noun: str, plural: str | None = None) -> str:
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
