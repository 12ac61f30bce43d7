"""What a run says it will do, in numbers that are counted while it does it."""

from __future__ import annotations

import math
from typing import Any

import pytest
from transformers import TrainerCallback

from hf_latephase import LatePhaseConfig
from hf_latephase.core.cycle import Cycle
from hf_latephase.core.points import resolve_points
from hf_latephase.training.plan import Plan, make_plan
from tiny import gpt2, trainer


def plan_of(
    config: LatePhaseConfig, max_steps: int, accumulation: int = 1, processes: int = 1, scale: float = 1.0
) -> Plan:
    cycle = Cycle(
        config.num_members, config.cycle_length, accumulation, processes, 0, config.member_assignment == "sample"
    )
    return make_plan(config, cycle, resolve_points(config, max_steps), max_steps, accumulation, scale)


def test_updates_that_are_lost() -> None:
    plan = plan_of(LatePhaseConfig(), 1000, scale=0.1)
    assert plan.text == (
        "Late phase from step 600 of 1,000 on: 10 members, 10 minibatches to a cycle, base_gradient_scale=0.1. After "
        "step 600 the base takes 40 updates instead of 400; gradient_accumulation_steps=10 would keep all. Evaluated "
        "and saved: the members' average."
    )
    assert plan.loses_updates
    assert plan.figures == {
        "late_phase_start": 600, "minibatches_per_cycle": 10, "base_updates": 640, "base_updates_without": 1000,
        "base_gradient_scale": 0.1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("members", "length", "accumulation", "processes"),
    [
        (10, None, 1, 1),
        (10, None, 4, 1),
        (10, None, 1, 2),
        (3, 6, 1, 4),
        (1, 5, 1, 1),
        (10, None, 12, 1),
        (4, None, 1, 8),
    ],
)
def test_the_accumulation_that_is_named_keeps_all_updates(
    members: int, length: int | None, accumulation: int, processes: int
) -> None:
    config = LatePhaseConfig(num_members=members, cycle_length=length, late_phase_start=7)
    plan = plan_of(config, 107, accumulation, processes)
    minibatches = accumulation * processes
    whole = (length or members) // math.gcd(length or members, minibatches)
    assert plan.loses_updates == (whole > 1)
    assert plan.figures["base_updates"] == 7 + math.ceil(100 / whole)
    assert plan.figures["minibatches_per_cycle"] == whole * minibatches
    if plan.loses_updates:
        named = int(plan.text.split("gradient_accumulation_steps=")[1].split()[0])
        assert named >= accumulation and not plan_of(config, 107, named, processes).loses_updates
        assert all(plan_of(config, 107, fewer, processes).loses_updates for fewer in range(accumulation, named))
    else:
        assert "The base takes 100 updates from then on, as without" in plan.text


@pytest.mark.parametrize(("settings", "saved"), [
    ({}, "the weights as they are"),
    ({"ema_decay": 0.999},
     "a moving average over time (ema_decay=0.999, ramped) of the weights, from step 600 on, taken after each update"),
    ({"ema_memory": 0.1, "ema_start": 0, "ema_every": 10},
     "a moving average over time (ema_memory=0.1) of the weights, from step 1 on, taken every 10 steps"),
    ({"swa_start": 0.75},
     "the equal average over time (SWA) of the weights, from step 750 on, taken after each update"),
], ids=str)  # fmt: skip
def test_what_is_saved(settings: dict[str, Any], saved: str) -> None:
    plan = plan_of(LatePhaseConfig(num_members=1, **settings), 1000)
    assert plan.text == f"Plain training, num_members=1. Evaluated and saved: {saved}."
    assert not plan.loses_updates and not plan.figures
    if "swa_start" in settings:
        of_members = plan_of(LatePhaseConfig(num_members=2, **settings), 1000).text
        assert of_members.endswith("(SWA) of the members' average, from step 750 on, taken after each update.")


class Count(TrainerCallback):
    """Counts the steps at which a base weight moves."""

    def __init__(self) -> None:
        self.moved, self.before = 0, None

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        now = model.transformer.h[0].mlp.c_fc.weight.detach().clone()
        self.moved += self.before is None or not bool((now == self.before).all())
        self.before = now


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_run_does_what_it_says(tmp_path, caplog: pytest.LogCaptureFixture, accumulation: int) -> None:
    config, count = LatePhaseConfig(num_members=3, weights=["norm"], late_phase_start=4), Count()
    run = trainer(
        tmp_path, gpt2(), config, max_steps=14, logging_steps=2, gradient_accumulation_steps=accumulation,
        extra={"callbacks": [count]},
    )  # fmt: skip
    run.train()
    first, *others = [log for log in run.state.log_history if "loss" in log]
    assert first["base_updates"] == count.moved == (4 + 4 if accumulation == 1 else 14)
    assert (first["base_updates_without"], first["late_phase_start"], first["minibatches_per_cycle"]) == (14, 4, 3)
    assert first["base_gradient_scale"] == pytest.approx(1 / 3)
    assert not any("base_updates" in log for log in others)
    warned = [
        r for r in caplog.records if r.levelname == "WARNING" and "the base takes 4 updates instead of 10" in r.message
    ]
    assert len(warned) == (accumulation == 1)
    *_, cost, plan = run.late_phase.summary().splitlines()
    assert cost.startswith("3 members: ")
    assert plan.startswith("Late phase from step 4 of 14 on") and ("instead of 10" in plan) == (accumulation == 1)
