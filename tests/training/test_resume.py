"""A run resumed anywhere ends as if it had never stopped: weights, optimizer, logs and evaluation, to the bit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from torch.utils.data import IterableDataset

from hf_latephase import LatePhaseConfig
from test_trainer import assert_same, weights_of
from tiny import Text, gpt2, lstm, trainer


MODELS = {"gpt2": gpt2, "lstm": lstm}
AVERAGES: dict[str, dict[str, Any]] = {
    "none": {},
    "swa": {"swa_start": 8, "swa_every": 2},
    "ema": {"ema_decay": 0.3, "ema_start": 0},  # past its ramp after three steps
    "memory": {"ema_memory": 0.2, "ema_start": 4, "ema_every": 2},
}
# Of 13 steps, T0 being 5 and an epoch 7: before T0, inside a cycle, at an epoch's end, after SWA began.
SAVES = (3, 6, 7, 11)
SETTINGS: dict[str, Any] = {
    "max_steps": 13, "logging_steps": 2, "save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 5,
    "train_sampling_strategy": "random", "weight_decay": 0.1, "lr_scheduler_type": "linear", "warmup_steps": 2,
    "dataloader_drop_last": True,
}  # fmt: skip


class Stream(IterableDataset):
    """Rows without a length."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return iter([Text(72)[i] for i in range(72)])


def logs(run: Any) -> list[dict[str, Any]]:
    """What was logged, but for times and the last log, which is about one call of train()."""
    timed = ("runtime", "per_second")
    return [{k: v for k, v in log.items() if not k.endswith(timed)} for log in run.state.log_history[:-1]]


def assert_same_end(whole: Any, other: Any) -> None:
    assert_same(weights_of(whole.model), weights_of(other.model))
    ours, theirs = whole.optimizer.state_dict()["state"], other.optimizer.state_dict()["state"]
    assert list(ours) == list(theirs)
    for index, state in ours.items():
        assert_same(state, theirs[index])
    if whole.time_average is not None:
        assert_same(*(dict(sorted(run.time_average.values.items())) for run in (whole, other)))
    assert logs(whole) == logs(other)
    assert whole.evaluate()["eval_loss"] == other.evaluate()["eval_loss"]


def check_resume(folder: Any, model: Any, config: LatePhaseConfig, save_at: int, **settings: Any) -> None:
    batch = settings.get("per_device_train_batch_size", 4) * settings.get("gradient_accumulation_steps", 1)
    epochs, inside = divmod(save_at, settings.get("rows", 64) // batch)
    if epochs and inside and Version(transformers.__version__) < Version("5"):
        pytest.skip("Before transformers 5.0 plain Trainer, too, goes on in a later epoch with other rows.")

    def new(name: str) -> Any:
        return trainer(folder / name, model(dropout=0.2), config, save_steps=save_at, **{**SETTINGS, **settings})

    torch.manual_seed(0)
    whole = new("whole")
    whole.train()
    resumed = new("resumed")
    resumed.train(resume_from_checkpoint=str(folder / "whole" / f"checkpoint-{save_at}"))
    assert_same_end(whole, resumed)


PRODUCT = list(
    itertools.product(MODELS, ["several steps", "one step"], ["minibatch", "sample"], [1, 4, 10], AVERAGES, SAVES)
)
# Every value of every column, and most pairs of them, in a few rows.
CHOICE = [
    ("gpt2", "several steps", "minibatch", 4, "none", 6),
    ("gpt2", "several steps", "sample", 10, "swa", 11),
    ("gpt2", "one step", "minibatch", 10, "ema", 7),
    ("gpt2", "one step", "sample", 1, "none", 3),
    ("gpt2", "one step", "minibatch", 1, "memory", 7),
    ("lstm", "several steps", "minibatch", 10, "swa", 7),
    ("lstm", "several steps", "sample", 4, "ema", 3),
    ("lstm", "one step", "minibatch", 4, "swa", 11),
    ("lstm", "one step", "sample", 10, "none", 6),
    ("lstm", "several steps", "minibatch", 1, "ema", 6),
]


def check_row(folder: Any, row: tuple[str, str, str, int, str, int]) -> None:
    name, mapping, assignment, K, average, save_at = row
    config = LatePhaseConfig(
        num_members=K, weights=["rank1", "norm"] if name == "gpt2" else ["rank1"], late_phase_start=5,
        member_assignment=assignment, **AVERAGES[average],
    )  # fmt: skip
    accumulation, batch = K if mapping == "one step" else 1, K if assignment == "sample" else 2
    check_resume(
        folder, MODELS[name], config, save_at, gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=batch, rows=7 * accumulation * batch, max_grad_norm=1.0 if save_at % 2 else 0.0,
    )  # fmt: skip


@pytest.mark.parametrize("row", CHOICE, ids=str)
def test_resume(tmp_path, row: tuple[str, str, str, int, str, int]) -> None:
    check_row(tmp_path, row)


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in PRODUCT if row not in CHOICE], ids=str)
def test_resume_everywhere(tmp_path, row: tuple[str, str, str, int, str, int]) -> None:
    check_row(tmp_path, row)


def test_the_choice_covers_every_value() -> None:
    assert set(CHOICE) <= set(PRODUCT)
    assert [set(column) for column in zip(*CHOICE, strict=True)] == [
        set(column) for column in zip(*PRODUCT, strict=True)
    ]


@pytest.mark.parametrize("save_at", [6, 10])
def test_resume_of_a_stream(tmp_path, save_at: int) -> None:
    config = LatePhaseConfig(num_members=4, weights=["rank1"], late_phase_start=5)
    extra = {"train_dataset": Stream()}

    def new(name: str) -> Any:
        run = trainer(tmp_path / name, gpt2(dropout=0.2), config, save_steps=save_at, **SETTINGS)
        run.train_dataset = extra["train_dataset"]
        return run

    torch.manual_seed(0)
    whole = new("whole")
    whole.train()
    resumed = new("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{save_at}"))
    assert_same_end(whole, resumed)


@pytest.mark.parametrize("save_at", [3, 7, 8])
def test_resume_of_the_control(tmp_path, save_at: int) -> None:
    """One member that steps once in several minibatches; saved before T0, inside a cycle and at its end."""
    config = LatePhaseConfig(num_members=1, weights=["norm"], late_phase_start=4, cycle_length=4)
    check_resume(tmp_path, gpt2, config, save_at, rows=28, max_grad_norm=0.5)


def test_resume_between_two_logs_loses_no_loss(tmp_path) -> None:
    """Trainer forgets the losses since its last log: the next one would be the mean over fewer steps."""
    config = LatePhaseConfig(num_members=3, weights=["norm"], late_phase_start=2)
    check_resume(tmp_path, gpt2, config, 8, logging_steps=5, rows=60)


def test_the_last_checkpoint_has_no_step_left(tmp_path) -> None:
    """In the middle of an epoch Trainer takes one more: a run killed after its last save would not end the same."""
    config = LatePhaseConfig(num_members=3, weights=["norm"], late_phase_start=2, swa_start=5)
    check_resume(tmp_path, gpt2, config, 13)


def best_run(folder: Any, **kwargs: Any) -> Any:
    scores = iter([3.0, 1.0, 2.0])
    config = LatePhaseConfig(num_members=3, weights=["rank1", "norm"], late_phase_start=2)
    return trainer(
        folder, gpt2(), config, max_steps=12, eval_strategy="steps", eval_steps=4, save_strategy="steps", save_steps=4,
        load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=False, logging_steps=2,
        extra={"compute_metrics": lambda prediction: {"score": next(scores, 9.0)}}, **kwargs,
    )  # fmt: skip


def test_the_best_model_trains_on(tmp_path) -> None:
    """After load_best_model_at_end, train() starts anew from the best model, as a new trainer that holds it does."""
    run = best_run(tmp_path / "first")
    run.train()
    best = run.state.best_model_checkpoint
    assert best.endswith("checkpoint-8")
    fresh = best_run(tmp_path / "fresh")
    fresh.model.load_state_dict(load_file(f"{best}/model.safetensors"), strict=False)  # but for tied weights
    assert_same(weights_of(run.model), weights_of(fresh.model))
    run.optimizer = None  # Trainer would go on with the moments of the end of training
    for each in (run, fresh):
        each.args.load_best_model_at_end = False
        torch.manual_seed(3)
        each.train()
        assert each.state.global_step == 12
    assert_same(weights_of(run.model), weights_of(fresh.model))
    losses = [[log["loss"] for log in each.state.log_history if "loss" in log] for each in (run, fresh)]
    assert losses[0] == losses[1]


def test_the_best_checkpoint_is_resumed_by_the_trainer_that_loaded_it(tmp_path) -> None:
    run = best_run(tmp_path / "first")
    run.train()
    best = run.state.best_model_checkpoint
    fresh = best_run(tmp_path / "fresh")
    for each in (run, fresh):
        each.args.load_best_model_at_end = False
        each.train(resume_from_checkpoint=best)
    assert_same(weights_of(run.model), weights_of(fresh.model))
    ours, theirs = run.optimizer.state_dict()["state"], fresh.optimizer.state_dict()["state"]
    for index, state in ours.items():
        assert_same(state, theirs[index])
