"""The weights without their average over time, evaluated beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_latephase import LatePhaseConfig
from hf_latephase.training.raw_evaluation import verdict
from test_trainer import assert_same, weights_of
from tiny import Text, gpt2, trainer


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]).mean())}


def run_of(folder: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    K = settings.pop("num_members", 1)
    config = LatePhaseConfig(num_members=K, weights=["norm"], late_phase_start=2, **settings.pop("config", {}))
    return trainer(
        folder, gpt2(dropout=0.1), config, max_steps=9, eval_strategy="steps", eval_steps=3, logging_steps=3,
        train_sampling_strategy="random", **settings,
    )  # fmt: skip


@pytest.mark.parametrize("K", [1, 3])
def test_both_are_evaluated_and_training_does_not_notice(tmp_path, K: int) -> None:
    average = {"swa_start": 5}
    both = run_of(tmp_path / "both", num_members=K, config=average | {"evaluate_raw": True},
                  extra={"compute_metrics": accuracy})  # fmt: skip
    one = run_of(tmp_path / "one", num_members=K, config=average, extra={"compute_metrics": accuracy})
    raw = run_of(tmp_path / "raw", num_members=K, extra={"compute_metrics": accuracy})
    for run in (both, one, raw):
        torch.manual_seed(0)
        run.train()
    assert_same(weights_of(both.model), weights_of(one.model))
    logs = {name: [log for log in run.state.log_history if "eval_loss" in log]
            for name, run in (("both", both), ("one", one), ("raw", raw))}  # fmt: skip
    assert [log["step"] for log in logs["both"]] == [3, 6, 9]
    # Before the average begins there is one model.
    assert "eval_loss_raw" not in logs["both"][0]
    for own, of_average, of_raw in zip(*(each[1:] for each in logs.values()), strict=True):
        for metric in ("eval_loss", "eval_accuracy"):
            assert own[metric] == of_average[metric]
            assert own[f"{metric}_raw"] == of_raw[metric]
        assert not any("model_preparation" in name and name.endswith("_raw") for name in own)
    assert logs["both"][-1]["eval_loss"] != logs["both"][-1]["eval_loss_raw"]
    assert "eval_loss_raw" in both.evaluate()
    # Not asked for, or no evaluation: one pass.
    assert "eval_loss_raw" not in one.evaluate()
    assert not any(name.endswith("_raw") for name in both.predict(Text(4)).metrics)


def test_datasets_by_name_and_the_best_model(tmp_path) -> None:
    run = run_of(
        tmp_path, config={"ema_memory": 0.2, "ema_start": 0, "evaluate_raw": True}, load_best_model_at_end=True,
        save_strategy="steps", save_steps=3, metric_for_best_model="a_loss",
    )  # fmt: skip
    run.eval_dataset = {"a": Text(4, seed=3), "b": Text(4, seed=4)}
    run.train()
    logs = [log for log in run.state.log_history if "eval_a_loss" in log]
    assert all({"eval_a_loss_raw"} <= log.keys() for log in logs)
    assert run.state.best_metric == min(log["eval_a_loss"] for log in logs)


@pytest.mark.parametrize(("average", "raw", "greater", "words"), [
    (1.0, 2.0, False, "was better than the raw weights"),
    (2.0, 1.0, False, "was worse than the raw weights, though it is what is saved"),
    (2.0, 1.0, True, "was better than the raw weights"),
    (1.0, 2.0, True, "was worse than"),
    (1.0, 1.0, False, "were equally good"),
])  # fmt: skip
def test_verdict(average: float, raw: float, greater: bool, words: str) -> None:
    history = [{"m": 9, "m_raw": 9, "step": 1}, {"m": average, "m_raw": raw, "step": 7}, {"m": 0.5, "step": 8}]
    line = verdict(history, "m", greater)
    assert line is not None and words in line and line.startswith("At the last evaluation (step 7)")
    assert f"m {average:g} against {raw:g}" in line
    assert verdict([{"m": 1.0}], "m") is None


def test_the_end_of_training_says_which_was_better(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    # The first weights again and again: an average of a fall from high is worse than its end.
    run = run_of(tmp_path, config={"ema_memory": 0.5, "ema_start": 0, "evaluate_raw": True}, learning_rate=1e-2)
    run.train()
    last = [log for log in run.state.log_history if "eval_loss_raw" in log][-1]
    assert last["eval_loss"] > last["eval_loss_raw"]
    (line,) = [r.message for r in caplog.records if r.message.startswith("At the last evaluation (step 9)")]
    assert "was worse than the raw weights" in line and f"{last['eval_loss_raw']:.5g}" in line
