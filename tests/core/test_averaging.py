"""Averages over time against their closed forms in NumPy, and what a user may do to the model meanwhile."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from hf_latephase import LatePhaseConfig
from hf_latephase.core.averaging import AverageSchedule, TimeAverage
from hf_latephase.core.points import resolve_points
from test_trainer import assert_same, weights_of
from tiny import gpt2, trainer


STEPS = 40


class Walk(nn.Module):
    """Two weights, of which the second may be frozen; each step is a random one."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.zeros(3, dtype=dtype))
        self.two = nn.Parameter(torch.zeros(2, 2, dtype=dtype))

    @torch.no_grad()
    def walk(self, generator: torch.Generator) -> np.ndarray:
        for parameter in (self.one, self.two):
            if parameter.requires_grad:
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(drawn.to(parameter.dtype))
        return self.flat()

    def flat(self) -> np.ndarray:
        return np.concatenate([p.detach().double().numpy().ravel() for p in (self.one, self.two)])


def averaged(config: LatePhaseConfig, model: Walk, each: Any = lambda step: None) -> tuple[TimeAverage, np.ndarray]:
    """The average after `STEPS` steps, and the weights after each of them."""
    average = TimeAverage(model, config.ema_decay, config.ema_memory, config.average_device)
    schedule = AverageSchedule(resolve_points(config, STEPS), 0)
    generator, path = torch.Generator().manual_seed(0), []
    for step in range(1, STEPS + 1):
        path.append(model.walk(generator))
        each(step)
        schedule.sample(average, step)
    return average, np.stack(path)


def value_of(average: TimeAverage) -> np.ndarray:
    return np.concatenate([average.values[name].double().numpy().ravel() for name in ("one", "two")])


def weighted(path: np.ndarray, weights: dict[int, float]) -> np.ndarray:
    """The mean of the weights after some steps, counted from 1."""
    return sum(weight * path[step - 1] for step, weight in weights.items()) / sum(weights.values())


def polynomial_weights(first: int, last: int, memory: float) -> dict[int, float]:
    """Γ(j + η) / Γ(j) of the j-th sample, η = 1 / memory - 2 (Shamir and Zhang, 2013)."""
    eta = 1 / memory - 2
    steps = range(first, last + 1)
    return {s: math.exp(math.lgamma(s - first + 1 + eta) - math.lgamma(s - first + 1)) for s in steps}


def decayed(path: np.ndarray, sampled: list[int], decay: Any) -> np.ndarray:
    """The recursion, one training step at a time: between two samples the later one stands for all steps."""
    value, previous = path[sampled[0] - 1], sampled[0]
    for step in sampled[1:]:
        for own in range(previous + 1, step + 1):
            rate = decay(own - sampled[0])
            value = rate * value + (1 - rate) * path[step - 1]
        previous = step
    return value


@pytest.mark.parametrize(
    "settings", [{}, {"start": 7}, {"start": 0.25}, {"every": 5}, {"start": 0.1, "every": 0.2}], ids=str
)
@pytest.mark.parametrize("kind", ["ema_decay", "ema_memory", "swa"])
def test_closed_forms(kind: str, settings: dict[str, float]) -> None:
    start, every = settings.get("start", 0), settings.get("every", 1)
    first = max(1, math.ceil(start * STEPS) if start < 1 else int(start))
    each = math.ceil(every * STEPS) if every < 1 else int(every)
    sampled = list(range(first, STEPS + 1, each))
    given = {f"{'swa' if kind == 'swa' else 'ema'}_{name}": value for name, value in settings.items()}
    if kind == "swa":
        config = LatePhaseConfig(num_members=1, **({"swa_start": 0.0} | given))
    else:
        given = {"ema_start": 0, kind: 0.7 if kind == "ema_decay" else 0.15} | given
        config = LatePhaseConfig(num_members=1, **given)
    average, path = averaged(config, Walk())
    if kind == "swa":
        expected = weighted(path, dict.fromkeys(sampled, 1.0))
    elif kind == "ema_decay":
        expected = decayed(path, sampled, lambda n: min(0.7, (1 + n) / (10 + n)))
    else:
        expected = decayed(path, sampled, lambda n: n / (n + 1 / 0.15 - 1))
    np.testing.assert_allclose(value_of(average), expected, rtol=0, atol=1e-12)
    assert average.num_averaged == len(sampled)


@pytest.mark.parametrize("memory", [0.05, 0.1, 0.3, 0.5])
def test_the_mean_age_of_what_is_averaged_is_the_memory(memory: float) -> None:
    average, path = averaged(LatePhaseConfig(num_members=1, ema_start=0, ema_memory=memory), Walk())
    weights = polynomial_weights(1, STEPS, memory)
    np.testing.assert_allclose(value_of(average), weighted(path, weights), rtol=0, atol=1e-12)
    age = sum(weight * (STEPS - step) for step, weight in weights.items()) / sum(weights.values())
    assert age == pytest.approx(memory * (STEPS - 1), rel=1e-9)
    if memory == 0.5:
        np.testing.assert_allclose(value_of(average), path.mean(0), rtol=0, atol=1e-12)


def test_the_first_samples_do_not_linger() -> None:
    """Without a ramp 0.96 of an EMA of 0.999 would be the first sample after 40 steps."""
    average, path = averaged(LatePhaseConfig(num_members=1, ema_start=0, ema_decay=0.999), Walk())
    np.testing.assert_allclose(
        value_of(average), decayed(path, list(range(1, STEPS + 1)), lambda n: (1 + n) / (10 + n)), rtol=0, atol=1e-12
    )
    share = math.prod((1 + n) / (10 + n) for n in range(1, STEPS))
    assert share < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_averaged_in_float32(dtype: torch.dtype) -> None:
    config = LatePhaseConfig(num_members=1, ema_start=0, ema_memory=0.1)
    average, path = averaged(config, Walk(dtype))
    assert {value.dtype for value in average.values.values()} == {torch.float32}
    expected = weighted(path, polynomial_weights(1, STEPS, 0.1))
    np.testing.assert_allclose(value_of(average), expected, rtol=0, atol=2e-6)


# ---- what belongs to an average ----


@pytest.mark.parametrize("settings", [{"swa_start": 0.0}, {"ema_memory": 0.1, "ema_start": 0}], ids=str)
def test_a_parameter_that_begins_to_train_joins(settings: dict[str, float]) -> None:
    model = Walk()
    model.two.requires_grad_(False)
    average, path = averaged(
        LatePhaseConfig(num_members=1, **settings), model, lambda step: model.two.requires_grad_(step >= 10)
    )
    weights = dict.fromkeys(range(1, STEPS + 1), 1.0) if "swa_start" in settings else polynomial_weights(1, STEPS, 0.1)
    # Frozen before, so the average since the beginning is what it is with its first value.
    np.testing.assert_allclose(value_of(average), weighted(path, weights), rtol=0, atol=1e-12)


def test_a_frozen_parameter_stays() -> None:
    model = Walk()
    average, path = averaged(
        LatePhaseConfig(num_members=1, ema_start=0, ema_memory=0.3),
        model,
        lambda step: model.one.requires_grad_(step < 20),
    )
    expected = weighted(path, polynomial_weights(1, STEPS, 0.3))
    np.testing.assert_allclose(value_of(average), expected, rtol=0, atol=1e-12)
    raw = model.flat()
    model.requires_grad_(False)
    with average.applied():
        np.testing.assert_allclose(model.flat(), expected, rtol=0, atol=1e-12)
    assert (model.flat() == raw).all()


def test_what_was_never_trained_is_not_averaged() -> None:
    model = Walk()
    model.two.requires_grad_(False)
    average, _ = averaged(LatePhaseConfig(num_members=1, ema_start=0, ema_memory=0.3), model)
    assert list(average.values) == ["one"]


# ---- samples that are not finite ----


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [(1,), (1, 2), (9, 10, 25)], ids=str)
@pytest.mark.parametrize("settings", [{"swa_start": 0.0}, {"ema_decay": 0.7, "ema_start": 0}], ids=str)
def test_a_sample_that_is_not_finite_is_left_out(
    settings: dict[str, float], at: tuple[int, ...], bad: float, caplog: pytest.LogCaptureFixture
) -> None:
    model = Walk()
    config = LatePhaseConfig(num_members=1, **settings)
    average = TimeAverage(model, config.ema_decay, config.ema_memory)
    schedule = AverageSchedule(resolve_points(config, STEPS), 0)
    generator, path = torch.Generator().manual_seed(0), []
    for step in range(1, STEPS + 1):
        path.append(model.walk(generator))
        kept = model.two.detach().clone()
        if step in at:
            model.two.detach()[1, 1] = bad
        schedule.sample(average, step)
        model.two.detach().copy_(kept)
    for _ in range(3):
        average.warn_of_samples_left_out()
    good = [step for step in range(1, STEPS + 1) if step not in at]
    if "swa_start" in settings:
        expected = weighted(np.stack(path), dict.fromkeys(good, 1.0))
    else:
        value = path[good[0] - 1]
        for step in good[1:]:
            n = step - good[0]
            rate = min(0.7, (1 + n) / (10 + n))
            value = rate * value + (1 - rate) * path[step - 1]
        expected = value
    np.testing.assert_allclose(value_of(average), expected, rtol=0, atol=1e-12)
    warnings = [record for record in caplog.records if "not finite and was left out" in record.getMessage()]
    assert len(warnings) == 1


# ---- through the trainer ----


class Poison(TrainerCallback):
    """A step whose weights are lost, and restored by a callback once the next begins."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.at:
            self.kept = {name: p.detach().clone() for name, p in model.named_parameters()}
            with torch.no_grad():
                next(model.parameters()).fill_(math.nan)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        if state.global_step == self.at:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(self.kept[name])


def test_a_step_that_is_lost_leaves_an_average_that_can_be_evaluated(tmp_path) -> None:
    config = LatePhaseConfig(num_members=1, weights=["norm"], ema_memory=0.1, ema_start=0)
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 6}
    run = trainer(tmp_path, gpt2(), config, extra={"callbacks": [Poison(4)]}, **settings)
    run.train()
    assert run.time_average.num_left_out == 1
    assert math.isfinite(run.evaluate()["eval_loss"])
    again = trainer(tmp_path / "again", gpt2(), config, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert_same(*(dict(sorted(each.time_average.values.items())) for each in (run, again)))


def test_on_another_device_it_is_the_same(tmp_path) -> None:
    runs = []
    for device in (None, "cpu"):
        torch.manual_seed(0)
        config = LatePhaseConfig(num_members=2, weights=["norm"], ema_memory=0.1, ema_start=0.2, average_device=device)
        run = trainer(tmp_path, gpt2(), config, max_steps=12)
        run.train()
        runs.append(weights_of(run.averaged_model()))
    assert_same(*runs)


def test_points_of_a_moving_average() -> None:
    config = LatePhaseConfig(num_members=1, ema_decay=0.9, ema_start=0.5, ema_every=0.1)
    points = resolve_points(config, 30)
    assert (points.average_start, points.average_every) == (15, 3)
    with pytest.raises(ValueError, match="ema_start=99 is step 99, but training ends at step 30"):
        resolve_points(LatePhaseConfig(num_members=1, ema_decay=0.9, ema_start=99), 30)
    # One member has no late phase, unless it accumulates from T0 on.
    assert resolve_points(LatePhaseConfig(num_members=1, ema_decay=0.9), 1).average_start == 1
    assert resolve_points(LatePhaseConfig(num_members=1, ema_memory=0.1), 41).average_start == 25
    with pytest.raises(ValueError, match="the late phase would never begin"):
        resolve_points(LatePhaseConfig(num_members=1, ema_decay=0.9, cycle_length=3), 1)


def test_a_layout_that_changes_mixes_no_elements() -> None:
    """The fused kernel goes through memory: a model whose images lie channels last, then first, then resumed."""
    torch.manual_seed(0)
    model = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    average = TimeAverage(model)
    samples = []
    for layout in (torch.channels_last, torch.contiguous_format, torch.channels_last):
        model.to(memory_format=layout)
        model.weight.data = torch.randn_like(model.weight)
        samples.append(model.weight.detach().clone())
        average.update()
    torch.testing.assert_close(average.values["weight"], torch.stack(samples).mean(0), rtol=0, atol=1e-6)
    again = TimeAverage(model)
    again.load({name: value.contiguous() for name, value in average.values.items()}, average.num_averaged, average.age)
    for each in (average, again):
        each.update()
    for name, value in average.values.items():
        assert torch.equal(value, again.values[name]) and value.stride() == again.values[name].stride(), name
