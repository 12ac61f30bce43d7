"""Learning-rate schedules in straight pieces, for optimizers and for Trainer."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from ..core.points import steps_at


if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class _AbsoluteLambdaLR(LambdaLR):
    """
    `LambdaLR` whose function gives the rate itself. Factors would have to be multiplied with the base rate that
    scheduler.pt brings back, which is another one if the run was resumed with another `learning_rate`.
    """

    def get_lr(self) -> list[float | torch.Tensor]:
        """Returns the rate of each parameter group."""
        return [rate(self.last_epoch) for rate in self.lr_lambdas]


def get_piecewise_linear_schedule(
    optimizer: torch.optim.Optimizer, points: Sequence[tuple[float, float]], num_training_steps: int
) -> LambdaLR:
    """
    Create a schedule with a learning rate that is linear between given points and constant before and after them.

    Args:
        optimizer ([`~torch.optim.Optimizer`]):
            The optimizer whose rate to schedule. Its own rate is of no account.
        points (`Sequence[tuple[float, float]]`):
            Pairs of a place and the learning rate there, ordered by place. A place below 1 is a share of
            `num_training_steps` (rounded up), any other a number of steps. A rate is absolute, not a factor, and holds
            for all parameters. Two points in one place make a jump: the step there has the rate of the later point.
            Points past the end are allowed; training stops before it gets there.
        num_training_steps (`int`):
            The number of steps that shares relate to.

    Returns:
        [`~torch.optim.lr_scheduler.LambdaLR`]: The schedule. Its state, as in Trainer's `scheduler.pt`, holds the
        position but not the points: a resumed run follows the points that it is given.

    Raises:
        `ValueError`: If there are no points, they are not ordered, a place or rate is negative or not finite,
            `num_training_steps` is below 1, or the parameter groups have different rates.

    Example:

    ```python
    >>> import torch
    >>> from hf_latephase.training.schedules import get_piecewise_linear_schedule

    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    >>> schedule = get_piecewise_linear_schedule(optimizer, [(0.5, 0.1), (0.9, 0.02)], num_training_steps=10)
    >>> rates = []
    >>> for _ in range(10):
    ...     rates.append(round(schedule.get_last_lr()[0], 6))
    ...     optimizer.step()
    ...     schedule.step()
    >>> rates
    [0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.08, 0.06, 0.04, 0.02]

    >>> # ImageNet fine-tuning: 0.001, a tenth of it in the second half.
    >>> schedule = get_piecewise_linear_schedule(optimizer, [(0.5, 1e-3), (0.5, 1e-4)], num_training_steps=10)

    ```
    """
    rate = _piecewise_linear(points, num_training_steps)
    group_rates = sorted({float(group["lr"]) for group in optimizer.param_groups})
    if len(group_rates) > 1:
        raise ValueError(
            f"The optimizer's parameter groups have different learning rates {group_rates}, which the absolute rates "
            "of the points would make equal. Give all groups one rate, or use a schedule of factors."
        )
    return _AbsoluteLambdaLR(optimizer, rate)


class PiecewiseLinearScheduleMixin(_Base):
    """
    Gives a [`~transformers.Trainer`] class the schedule of [`get_piecewise_linear_schedule`]:
    `class MyTrainer(PiecewiseLinearScheduleMixin, LatePhaseTrainer)`.

    Differs from the parent in that `learning_rate`, `lr_scheduler_type` and `lr_scheduler_kwargs` have no effect if
    points are given. The late-phase members have the rate of the base weights: one optimizer steps both.

    Args:
        lr_points (`Sequence[tuple[float, float]]`, *optional*):
            The points, as in [`get_piecewise_linear_schedule`]. `None`: the parent's schedule. All other arguments are
            the parent's.

    Raises:
        `ValueError`: If the points are not valid, or come with a warm-up or with a scheduler of the user's.
    """

    def __init__(self, *args: Any, lr_points: Sequence[tuple[float, float]] | None = None, **kwargs: Any) -> None:
        if lr_points is not None:
            _check_points(lr_points)
        self._lr_points = lr_points
        super().__init__(*args, **kwargs)
        if lr_points is None:
            return
        if self.lr_scheduler is not None:
            raise ValueError("lr_points and a scheduler in `optimizers` exclude each other: leave one out.")
        if self.args.warmup_steps:
            raise ValueError(
                f"lr_points and warmup_steps={self.args.warmup_steps} exclude each other. Write the warm-up as "
                "points: [(0, 0.0), (100, 0.1), ...] rises for 100 steps."
            )

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Creates the schedule through the points, or the parent's if there are none."""
        if self._lr_points is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        optimizer = self.optimizer if optimizer is None else optimizer
        assert optimizer is not None  # Trainer creates it first
        self.lr_scheduler = get_piecewise_linear_schedule(optimizer, self._lr_points, num_training_steps)
        self._created_lr_scheduler = True  # the next call of `train` makes a new one
        return self.lr_scheduler


def _piecewise_linear(points: Sequence[tuple[float, float]], num_training_steps: int) -> Callable[[int], float]:
    """Returns the rate as a function of the steps already done."""
    _check_points(points)
    if num_training_steps < 1:
        raise ValueError(f"num_training_steps must be at least 1, got {num_training_steps}.")
    steps = [steps_at(place, num_training_steps) for place, _ in points]
    rates = [float(rate) for _, rate in points]
    if steps != sorted(steps):
        raise ValueError(
            f"The points of the learning rate {list(points)} lie at steps {steps} of {num_training_steps}, which are "
            "not in order. A place below 1 is a share of all steps, and 1 is one step: write the end of training as "
            "its number of steps, or as 0.999999."
        )

    def rate(step: int) -> float:
        after = bisect_right(steps, step)
        if after == 0:
            return rates[0]
        if after == len(steps):
            return rates[-1]
        share = (step - steps[after - 1]) / (steps[after] - steps[after - 1])
        return rates[after - 1] + share * (rates[after] - rates[after - 1])

    return rate


def _check_points(points: Any) -> None:
    """Refuses points that no number of steps would make valid."""
    form = "Give pairs of a place in training and a learning rate: [(0.5, 0.1), (0.9, 0.001)]."
    if isinstance(points, str) or not isinstance(points, Sequence) or not points:
        raise ValueError(f"The points of the learning rate must be a list with at least one, got {points!r}. {form}")
    for point in points:
        if isinstance(point, str) or not isinstance(point, Sequence) or len(point) != 2:
            raise ValueError(f"A point of the learning rate must be a pair, got {point!r}. {form}")
        for name, value in zip(("place", "learning rate"), point, strict=True):
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
                raise ValueError(
                    f"The {name} of a point must be a finite number and not negative, got {value!r} in {point!r}. "
                    f"{form}"
                )
    places = [place for place, _ in points]
    shares, steps = [place for place in places if place < 1], [place for place in places if place >= 1]
    if shares != sorted(shares) or steps != sorted(steps):
        raise ValueError(f"The points of the learning rate must be ordered by place, got {list(points)}. Sort them.")
