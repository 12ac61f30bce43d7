"""Where in training things happen: shares of all steps, resolved into steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config import LatePhaseConfig


# Before, the loss falls so fast that every average is behind the weights that it averages (docs/averaging.md).
DEFAULT_EMA_START = 0.6


def steps_at(point: float, max_steps: int) -> int:
    """Resolves a share of all steps (below 1) or a number of steps, rounding up as Trainer's warm-up does."""
    return math.ceil(point * max_steps) if point < 1 else int(point)


@dataclass(frozen=True)
class PointsInTraining:
    """The points in training of a config, in steps; `average_start` is `None` without an average over time."""

    late_phase_start: int
    average_start: int | None
    average_every: int


def resolve_points(config: LatePhaseConfig, max_steps: int) -> PointsInTraining:
    """
    Resolves the points in training for a number of steps.

    Raises:
        `ValueError`: If one lies outside of training, or SWA would begin before T0.
    """
    start = steps_at(config.late_phase_start, max_steps)
    # One member that does not accumulate has no late phase.
    if start >= max_steps and (config.num_members > 1 or (config.cycle_length or 1) > 1):
        raise ValueError(
            f"late_phase_start={config.late_phase_start} is step {start}, but training ends at step "
            f"{max_steps}: the late phase would never begin. Lower it, or train longer."
        )
    if not config.averages_over_time:
        return PointsInTraining(start, None, 1)
    name = "ema_start" if config.swa_start is None else "swa_start"
    chosen = getattr(config, name)
    point = DEFAULT_EMA_START if chosen is None else chosen
    average_start = steps_at(point, max_steps)
    if name == "swa_start" and config.num_members > 1 and average_start < start:
        raise ValueError(
            f"swa_start={point} is step {average_start}, before late_phase_start="
            f"{config.late_phase_start}, step {start}. Start SWA at T0 or later."
        )
    if average_start > max_steps:
        raise ValueError(f"{name}={point} is step {average_start}, but training ends at step {max_steps}.")
    every = config.ema_every if config.swa_start is None else config.swa_every
    return PointsInTraining(start, average_start, steps_at(every or 1, max_steps))
