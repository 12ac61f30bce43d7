"""Learning rates in straight pieces, alone and through Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Trainer

from hf_latephase import LatePhaseConfig, LatePhaseTrainer
from hf_latephase.training.schedules import PiecewiseLinearScheduleMixin, get_piecewise_linear_schedule
from tiny import arguments, gpt2, trainer


class Plain(PiecewiseLinearScheduleMixin, Trainer):
    pass


class LatePhased(PiecewiseLinearScheduleMixin, LatePhaseTrainer):
    pass


def optimizer_with(*rates: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates])


def rates_of(points: Any, num_training_steps: int, *initial: Any) -> list[list[float]]:
    """The rates of all parameter groups in each step, as the optimizer sees them."""
    optimizer = optimizer_with(*(initial or (0.7,)))
    schedule = get_piecewise_linear_schedule(optimizer, points, num_training_steps)
    rates = []
    for _ in range(num_training_steps):
        rates.append([float(group["lr"]) for group in optimizer.param_groups])
        assert schedule.get_last_lr() == rates[-1]
        optimizer.step()
        schedule.step()
    return rates


def test_the_papers_schedule() -> None:
    # An epoch is 3 steps: 0.1 to epoch 100, linear to 0.001 at 180, then flat to 200.
    rates = np.array(rates_of([[0.5, 0.1], [0.9, 0.001]], 600))[:, 0]
    assert (rates[:301] == 0.1).all() and (rates[540:] == 0.001).all()
    np.testing.assert_allclose(rates[300:541], np.linspace(0.1, 0.001, 241), rtol=1e-12)


def test_two_points_in_one_place_jump() -> None:
    assert rates_of([(10, 1e-3), (10, 1e-4)], 20) == [[1e-3]] * 10 + [[1e-4]] * 10
    assert rates_of([(0.5, 1e-3), (0.5, 1e-4)], 20) == [[1e-3]] * 10 + [[1e-4]] * 10
    # A jump at the very beginning leaves nothing of the first point, one in between keeps both slopes.
    assert rates_of([(0, 3.0), (0, 1.0), (2, 0.0)], 3) == [[1.0], [0.5], [0.0]]
    assert rates_of([(0, 0.0), (2, 1.0), (2, 3.0), (4, 5.0)], 6) == [[0.0], [0.5], [3.0], [4.0], [5.0], [5.0]]


@pytest.mark.parametrize("seed", range(5))
def test_between_distinct_points_it_is_numpys_interpolation(seed: int) -> None:
    generator = np.random.default_rng(seed)
    places = np.sort(generator.choice(np.arange(1, 120), size=6, replace=False))
    values = generator.uniform(0, 1, size=6)
    rates = rates_of(list(zip(places.tolist(), values.tolist(), strict=True)), 100)
    np.testing.assert_allclose(np.array(rates)[:, 0], np.interp(np.arange(100), places, values), rtol=1e-12)


def test_shares_and_steps_mix_and_round_up() -> None:
    assert rates_of([(2, 1.0), (0.35, 3.0)], 10) == [[1.0], [1.0], [1.0], [2.0]] + [[3.0]] * 6
    # The end of training as a share: the rate reaches 0 just after the last step.
    assert rates_of([(0, 4.0), (0.999999, 0.0)], 4) == [[4.0], [3.0], [2.0], [1.0]]


def test_rates_are_absolute_for_every_group_and_kind_of_rate() -> None:
    expected = [[0.25, 0.25], [0.125, 0.125]]
    assert rates_of([(0, 0.25), (1, 0.125)], 2, 0.7, 0.7) == expected
    assert rates_of([(0, 0.25), (1, 0.125)], 2, 0.0, 0.0) == expected
    assert rates_of([(0, 0.25), (1, 0.125)], 2, torch.tensor(0.7), torch.tensor(0.7)) == expected


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], "at least one"),
        (0.1, "at least one"),
        ("0.5:0.1", "at least one"),
        ([0.5, 0.1], "pair"),
        ([(0.5, 0.1, 0.2)], "pair"),
        (["ab"], "pair"),
        ([(0.5, -0.1)], "learning rate of a point"),
        ([(0.5, float("nan"))], "learning rate of a point"),
        ([(0.5, float("inf"))], "learning rate of a point"),
        ([(0.5, "0.1")], "learning rate of a point"),
        ([(-1, 0.1)], "place of a point"),
        ([(float("inf"), 0.1)], "place of a point"),
        ([(0.9, 0.1), (0.5, 0.1)], "ordered"),
        ([(9, 0.1), (5, 0.1)], "ordered"),
    ],
)
def test_bad_points_are_refused_before_anything_is_made(tmp_path: Path, points: Any, message: str) -> None:
    optimizer = optimizer_with(0.7)
    with pytest.raises(ValueError, match=message):
        get_piecewise_linear_schedule(optimizer, points, 100)
    assert "initial_lr" not in optimizer.param_groups[0]
    with pytest.raises(ValueError, match=message):
        Plain(model=nn.Linear(1, 1), args=arguments(tmp_path), lr_points=points)


def test_order_is_checked_in_steps() -> None:
    with pytest.raises(ValueError, match=r"steps \[50, 1\] of 100.*1 is one step"):
        get_piecewise_linear_schedule(optimizer_with(0.7), [(0.5, 0.1), (1.0, 0.0)], 100)
    with pytest.raises(ValueError, match="not in order"):
        get_piecewise_linear_schedule(optimizer_with(0.7), [(60, 0.1), (0.5, 0.0)], 100)
    with pytest.raises(ValueError, match="at least 1"):
        get_piecewise_linear_schedule(optimizer_with(0.7), [(60, 0.1)], 0)


def test_groups_of_different_rates_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[0.1, 0.7\]"):
        get_piecewise_linear_schedule(optimizer_with(0.7, 0.1), [(0.5, 0.1)], 100)


# ---- through Trainer ----

POINTS = [(0.2, 0.1), (0.6, 0.02)]
EXPECTED = [0.1, 0.1, 0.1, 0.08, 0.06, 0.04, 0.02, 0.02, 0.02, 0.02]


def logged_rates(run: Any) -> list[float]:
    return [entry["learning_rate"] for entry in run.state.log_history if "loss" in entry]


def make(folder: Path, points: Any = POINTS, late: bool = True, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    config = LatePhaseConfig(num_members=2, late_phase_start=0.4, weights=["norm"]) if late else None
    settings: dict[str, Any] = {"logging_steps": 1, "optim": "sgd", **kwargs}
    return trainer(
        folder, gpt2(), config, trainer_class=LatePhased if late else Plain, extra={"lr_points": points}, **settings
    )


@pytest.mark.parametrize("late", [False, True], ids=["Trainer", "LatePhaseTrainer"])
def test_trainer_follows_the_points(tmp_path: Path, late: bool) -> None:
    run = make(tmp_path, late=late)
    run.train()
    assert logged_rates(run) == pytest.approx(EXPECTED, rel=1e-12)


def test_base_and_members_step_at_the_same_rate(tmp_path: Path) -> None:
    run = make(tmp_path, max_steps=2)
    run.train()
    assert {group["lr"] for group in run.optimizer.param_groups} == {0.02}


def test_without_points_the_parents_schedule_stays(tmp_path: Path) -> None:
    run = make(tmp_path, points=None, max_steps=3)
    run.train()
    assert logged_rates(run) == [0.05] * 3


def test_training_again_makes_a_new_schedule(tmp_path: Path) -> None:
    run = make(tmp_path, late=False, max_steps=4)
    run.train()
    run.args.max_steps = 10
    run.train()
    assert logged_rates(run) == pytest.approx(EXPECTED, rel=1e-12)


@pytest.mark.parametrize("late", [False, True], ids=["Trainer", "LatePhaseTrainer"])
def test_resumes_through_a_checkpoint(tmp_path: Path, late: bool) -> None:
    whole = make(tmp_path / "whole", late=late)
    whole.train()
    first = make(tmp_path / "parts", late=late, save_strategy="steps", save_steps=4)
    first.train()
    # Another learning_rate on resuming: the rates are absolute and stay what they were.
    second = make(tmp_path / "parts", late=late, learning_rate=0.5)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    assert second.lr_scheduler.last_epoch == 10
    assert logged_rates(second) == logged_rates(whole)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, second.model.state_dict()[name]), name


def test_a_warm_up_and_a_scheduler_of_ones_own_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"warmup_steps=5 .*points"):
        make(tmp_path, warmup_steps=5)
    optimizer = optimizer_with(0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(ValueError, match="leave one out"):
        Plain(model=gpt2(), args=arguments(tmp_path), optimizers=(optimizer, scheduler), lr_points=POINTS)
