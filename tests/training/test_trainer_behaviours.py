"""What transformers promises of its Trainer, asked of Trainer itself and of LatePhaseTrainer, one member and three.

Where LatePhaseTrainer differs on purpose, the test says so and asserts what its docstring promises instead.
"""

from __future__ import annotations

import gc
import inspect
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler
from transformers import (
    AutoTokenizer,
    EarlyStoppingCallback,
    GPT2LMHeadModel,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerState,
    default_data_collator,
)
from transformers.trainer_callback import DefaultFlowCallback
from transformers.trainer_utils import EvalPrediction, get_last_checkpoint

from hf_latephase import LatePhaseConfig, LatePhaseTrainer, compat
from hf_latephase.compat import RELEASE, WARMUP_SHARE, PreTrainedConfig
from test_other_trainers import tokenizer
from tiny import LOG_ERROR, VOCAB, Text, arguments, gpt2


KINDS: dict[str, int | None] = {"Trainer": None, "K=1": 1, "K=3": 3}
OWN_ARGUMENTS = set(inspect.signature(Trainer.__init__).parameters)


class Kind:
    """Makes trainers of one kind; keywords are Trainer's own arguments and TrainingArguments' together."""

    def __init__(self, num_members: int | None, folder: Path) -> None:
        self.num_members = num_members
        self.folder = folder
        self.base: Any = Trainer if num_members is None else LatePhaseTrainer

    @property
    def late(self) -> dict[str, Any]:
        if self.num_members is None:
            return {}
        config = LatePhaseConfig(num_members=self.num_members, weights=["norm"], late_phase_start=0)
        return {"late_phase_config": config}

    def __call__(self, trainer_class: Any = None, folder: Path | None = None, **kwargs: Any) -> Any:
        torch.manual_seed(0)
        given = {k: kwargs.pop(k) for k in list(kwargs) if k in OWN_ARGUMENTS}
        given = {"train_dataset": Text(24), "eval_dataset": Text(12, seed=2)} | given
        if "model_init" not in given:
            given.setdefault("model", gpt2())
        args = arguments(folder or self.folder, **kwargs)
        return (trainer_class or self.base)(args=args, **given, **self.late)

    def plain(self, **kwargs: Any) -> Any:
        """The same with Trainer itself."""
        return Kind(None, self.folder / "plain")(**kwargs)


@pytest.fixture(scope="module", autouse=True)
def _short_collections() -> Iterator[None]:
    """Trainer collects garbage in every run; what was imported need not be searched each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(params=list(KINDS))
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Kind:
    return Kind(KINDS[request.param], tmp_path)


class Recorder(TrainerCallback):
    """Writes down every event with the step it happens at."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []

    def names(self, *wanted: str) -> list[tuple[str, int]]:
        return [event for event in self.events if event[0] in wanted]

    def steps(self, name: str) -> list[int]:
        return [step for event, step in self.events if event == name]


def _recording(name: str) -> Any:
    def record(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append((name, state.global_step))

    return record


for _event in [name for name in vars(TrainerCallback) if name.startswith("on_")]:
    setattr(Recorder, _event, _recording(_event))


class Flags(TrainerCallback):
    """Sets control flags at given steps."""

    def __init__(self, **steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for flag, step in self.steps.items():
            if state.global_step == step:
                setattr(control, flag, True)


def logs_with(run: Any, key: str) -> list[dict[str, Any]]:
    return [log for log in run.state.log_history if key in log]


def steps_with(run: Any, key: str) -> list[int]:
    return [log["step"] for log in logs_with(run, key)]


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*"))


def stock_weights(run: Any) -> dict[str, torch.Tensor]:
    """What the trainer's model computes with, under the plain names."""
    late_phase = getattr(run, "late_phase", None)
    weights = run.model.state_dict() if late_phase is None else late_phase.averaged_state_dict()
    return {key: value.clone() for key, value in weights.items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return list(left) == list(right) and all(torch.equal(value, right[key]) for key, value in left.items())


def scores(*values: float) -> Any:
    """A compute_metrics that returns one given score after the other, then the last."""
    left = list(values)
    return lambda prediction: {"score": left.pop(0) if len(left) > 1 else left[0]}


# ---- logging ----


def test_logging_steps(make: Kind) -> None:
    run = make(max_steps=7, logging_steps=2)
    run.train()
    assert steps_with(run, "loss") == [2, 4, 6]
    assert all({"loss", "learning_rate", "epoch"} <= set(log) for log in logs_with(run, "loss"))
    assert steps_with(run, "train_runtime") == [7]


def test_logging_first_step(make: Kind) -> None:
    run = make(max_steps=6, logging_steps=3, logging_first_step=True)
    run.train()
    assert steps_with(run, "loss") == [1, 3, 6]


@pytest.mark.parametrize(("strategy", "steps"), [("no", []), ("epoch", [6, 12]), ("steps", [5, 10])])
def test_logging_strategy(make: Kind, strategy: str, steps: list[int]) -> None:
    run = make(max_steps=12, logging_steps=5, logging_strategy=strategy)
    run.train()
    assert steps_with(run, "loss") == steps


def test_logging_steps_below_one_are_a_share(make: Kind) -> None:
    run = make(max_steps=8, logging_steps=0.25)
    run.train()
    assert steps_with(run, "loss") == [2, 4, 6, 8]


def test_logged_losses_average_to_train_loss(make: Kind) -> None:
    run = make(max_steps=6, logging_steps=2, learning_rate=1e-3)
    output = run.train()
    losses = [log["loss"] for log in logs_with(run, "loss")]
    assert output.training_loss == pytest.approx(sum(losses) / 3, abs=max(LOG_ERROR, 4e-6))
    assert losses[0] == pytest.approx(math.log(VOCAB), rel=0.05)


def test_logged_loss_with_accumulation_is_a_mean(make: Kind) -> None:
    """Minibatches of equal size: the mean of their losses, whoever weighs them."""
    run = make(max_steps=2, logging_steps=1, gradient_accumulation_steps=3, learning_rate=0.0)
    run.train()
    plain = make.plain(max_steps=2, logging_steps=1, gradient_accumulation_steps=3, learning_rate=0.0)
    plain.train()
    for log, expected in zip(logs_with(run, "loss"), logs_with(plain, "loss"), strict=True):
        assert log["loss"] == pytest.approx(expected["loss"], abs=1e-5)


def test_nan_losses_are_filtered_from_logs(make: Kind) -> None:
    for filtered in (True, False):

        class Nan(make.base):  # type: ignore[name-defined]
            def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
                loss = super().compute_loss(*args, **kwargs)
                return loss * float("nan") if self.state.global_step == 2 else loss

        run = make(trainer_class=Nan, max_steps=3, logging_steps=3, logging_nan_inf_filter=filtered)
        run.train()
        assert math.isfinite(logs_with(run, "loss")[0]["loss"]) == filtered


def test_log_adds_to_history_and_callbacks(make: Kind) -> None:
    recorder = Recorder()
    run = make(callbacks=[recorder], max_steps=2)
    run.log({"outside": 1.0})
    run.train()
    run.log({"loss": 1.0, "learning_rate": 0.1, "mine": 2.0})
    assert run.state.log_history[-1]["mine"] == 2.0 and run.state.log_history[-1]["step"] == 2
    assert recorder.steps("on_log") == [0, 2, 2]


def test_log_takes_any_values_before_training(make: Kind) -> None:
    run = make()
    run.log({"loss": 1.0, "learning_rate": 0.1})
    plain = make.plain()
    plain.log({"loss": 1.0, "learning_rate": 0.1})
    assert run.state.log_history == plain.state.log_history  # the epoch, too, where Trainer has one by then
    assert run.state.log_history[0].items() >= {"loss": 1.0, "learning_rate": 0.1, "step": 0}.items()


# ---- steps and epochs ----


def test_epochs_and_their_fraction(make: Kind) -> None:
    run = make(max_steps=-1, num_train_epochs=2, logging_steps=3)
    output = run.train()
    assert output.global_step == run.state.global_step == run.state.max_steps == 12
    assert run.state.num_train_epochs == 2 and run.state.epoch == 2.0
    assert [log["epoch"] for log in logs_with(run, "loss")] == [0.5, 1.0, 1.5, 2.0]


def test_fractional_epochs(make: Kind) -> None:
    run = make(max_steps=-1, num_train_epochs=1.5)
    run.train()
    assert run.state.global_step == 9 and run.state.epoch == 1.5


def test_max_steps_outranks_epochs(make: Kind) -> None:
    run = make(max_steps=8, num_train_epochs=50)
    run.train()
    assert run.state.global_step == 8
    assert run.state.epoch == pytest.approx(8 / 6) and run.state.num_train_epochs == 2


@pytest.mark.parametrize("rows", [24, 28, 30])
def test_accumulation_with_a_short_last_window(make: Kind, rows: int) -> None:
    recorder = Recorder()
    run = make(
        max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=4, train_dataset=Text(rows), callbacks=[recorder]
    )
    run.train()
    batches = math.ceil(rows / 4)
    steps = math.ceil(batches / 4)
    assert run.state.global_step == 2 * steps and run.state.epoch == 2.0
    assert len(recorder.steps("on_optimizer_step")) == 2 * steps
    assert len(recorder.steps("on_substep_end")) == 2 * (batches - steps)


def test_train_output(make: Kind) -> None:
    run = make(max_steps=6)
    output = run.train()
    assert output._fields == ("global_step", "training_loss", "metrics")
    keys = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "epoch"}
    assert set(output.metrics) == keys
    assert output.metrics["train_loss"] == output.training_loss > 0
    assert run.state.total_flos == run.state.log_history[-1]["total_flos"] > 0
    rate = output.metrics["train_samples_per_second"] / output.metrics["train_steps_per_second"]
    assert rate == pytest.approx(4, rel=0.05)


def test_num_examples_and_dataloaders(make: Kind) -> None:
    run = make()
    assert run.num_examples(run.get_train_dataloader()) == 24
    assert len(run.get_train_dataloader()) == 6
    assert run.num_examples(run.get_eval_dataloader()) == 12
    assert run.num_examples(run.get_test_dataloader(Text(5))) == 5
    assert run.get_total_train_batch_size(run.args) == 4


def test_training_reduces_the_loss(make: Kind) -> None:
    run = make(max_steps=30, learning_rate=0.02, train_dataset=Text(8))
    before = run.evaluate(Text(8))["eval_loss"]
    run.train()
    assert run.evaluate(Text(8))["eval_loss"] < 0.85 * before


def test_tokens_seen(make: Kind) -> None:
    run = make(max_steps=5, logging_steps=5, include_num_input_tokens_seen="all")
    run.train()
    assert run.state.num_input_tokens_seen == 5 * 4 * 8
    assert logs_with(run, "loss")[0]["num_input_tokens_seen"] == 160
    assert "train_tokens_per_second" in logs_with(run, "loss")[0]


def test_memory_metrics(make: Kind) -> None:
    metrics = make(max_steps=2, skip_memory_metrics=False).train().metrics
    assert {"init_mem_cpu_alloc_delta", "train_mem_cpu_alloc_delta", "before_init_mem_cpu"} <= set(metrics)


# ---- callbacks and control ----


EVERYTHING: dict[str, Any] = {
    "max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 2, "train_dataset": Text(28),
    "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 4,
}  # fmt: skip


def test_callback_events_are_trainers(make: Kind) -> None:
    recorder, expected = Recorder(), Recorder()
    make(callbacks=[recorder], **EVERYTHING).train()
    make.plain(callbacks=[expected], **EVERYTHING).train()
    assert recorder.events == expected.events
    assert [event for event, _ in recorder.events[:4]] == [
        "on_init_end", "on_train_begin", "on_epoch_begin", "on_step_begin"
    ]  # fmt: skip
    assert recorder.events[-1] == ("on_train_end", 8)
    assert recorder.steps("on_step_end") == list(range(1, 9))
    assert recorder.steps("on_save") == [4, 8]


def test_callbacks_get_what_they_are_promised(make: Kind) -> None:
    seen: dict[str, Any] = {}

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.update(kwargs, args=args)

    run = make(callbacks=[Look()], max_steps=1)
    run.train()
    assert seen["model"] is run.model and seen["optimizer"] is run.optimizer and seen["args"] is run.args
    assert seen["lr_scheduler"] is run.lr_scheduler
    assert len(seen["train_dataloader"]) == 6


def test_callbacks_compute_with_the_average(make: Kind) -> None:
    """LatePhaseMixin: outside of a training step the model computes with the averaged weights, callbacks too."""
    ids = Text(2).ids
    found: list[bool] = []

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            stock = gpt2()
            stock.load_state_dict(stock_weights(run))
            model.eval()
            with torch.no_grad():
                found.append(torch.allclose(model(ids).logits, stock.eval()(ids).logits, atol=1e-6))

    run = make(callbacks=[Look()], max_steps=6)
    run.train()
    assert found == [True] * 6


def test_add_pop_and_remove_callbacks(make: Kind) -> None:
    class First(Recorder):
        pass

    class Second(Recorder):
        pass

    run = make(callbacks=[First], max_steps=1)
    names = [type(callback).__name__ for callback in run.callback_handler.callbacks]
    assert "First" in names and "DefaultFlowCallback" in names
    assert isinstance(run.pop_callback(First), First)
    assert run.pop_callback(First) is None
    second = Second()
    run.add_callback(second)
    run.add_callback(First)
    run.remove_callback(First)
    run.train()
    assert second.steps("on_train_end") == [1]
    assert run.pop_callback(second) is second
    assert run.callback_handler.callback_list.splitlines() == [
        name for name in names if name != "First"
    ]  # fmt: skip


def test_should_training_stop(make: Kind) -> None:
    recorder = Recorder()
    run = make(callbacks=[recorder, Flags(should_training_stop=4)], max_steps=10)
    assert run.train().global_step == 4
    assert recorder.events[-2:] == [("on_log", 4), ("on_train_end", 4)]


def test_should_epoch_stop(make: Kind) -> None:
    recorder = Recorder()
    run = make(callbacks=[recorder, Flags(should_epoch_stop=2)], max_steps=-1, num_train_epochs=2)
    run.train()
    assert recorder.steps("on_epoch_end") == [2, 8]
    assert run.state.global_step == 8


def test_should_save_evaluate_and_log(make: Kind) -> None:
    flags = Flags(should_save=2, should_evaluate=3, should_log=5)
    run = make(callbacks=[flags], max_steps=6)
    run.train()
    assert checkpoints(make.folder) == [2]
    assert steps_with(run, "eval_loss") == [3]
    assert steps_with(run, "loss") == [5]


def test_early_stopping(make: Kind) -> None:
    run = make(
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)], compute_metrics=scores(3.0, 1.0, 2.0, 2.0, 0.0),
        max_steps=20, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=False,
    )  # fmt: skip
    run.train()
    assert run.state.global_step == 8 and run.state.best_global_step == 4


def test_early_stopping_needs_a_metric(make: Kind) -> None:
    run = make(callbacks=[EarlyStoppingCallback()], max_steps=2)
    with pytest.raises(AssertionError, match="metric_for_best_model"):
        run.train()


def test_default_flow_can_be_replaced(make: Kind) -> None:
    run = make(max_steps=3, logging_steps=1)
    run.remove_callback(DefaultFlowCallback)
    run.add_callback(Flags(should_training_stop=5))
    run.train()
    assert run.state.global_step == 5 and steps_with(run, "loss") == []


def test_a_reporting_callback_sees_every_log(make: Kind) -> None:
    class Tracking(TrainerCallback):
        def __init__(self) -> None:
            self.logs: list[dict[str, float]] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.logs.append(dict(logs))

    tracking = Tracking()
    run = make(callbacks=[tracking], max_steps=4, logging_steps=2, eval_strategy="epoch")
    run.train()
    assert [{k: v for k, v in log.items() if k != "step"} for log in run.state.log_history] == tracking.logs
    assert all(isinstance(value, (int, float)) for log in tracking.logs for value in log.values())


def test_state_of_callbacks_is_restored(make: Kind) -> None:
    settings: dict[str, Any] = {
        "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
        "metric_for_best_model": "score", "greater_is_better": True, "load_best_model_at_end": True,
        "restore_callback_states_from_checkpoint": True, "max_steps": 8,
    }  # fmt: skip
    make(callbacks=[EarlyStoppingCallback(5)], compute_metrics=scores(9, 1, 1, 1), **settings).train()
    stopping = EarlyStoppingCallback(1)
    run = make(callbacks=[stopping], compute_metrics=scores(1), **settings)
    run.train(resume_from_checkpoint=str(make.folder / "checkpoint-6"))
    restored = [cb for cb in run.callback_handler.callbacks if isinstance(cb, EarlyStoppingCallback)]
    assert [cb.early_stopping_patience for cb in restored] == [5]
    assert restored[0].early_stopping_patience_counter == 3


# ---- evaluating ----


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"eval_strategy": "steps", "eval_steps": 4}, [4, 8, 12]),
        ({"eval_strategy": "epoch"}, [6, 12]),
        ({"eval_strategy": "no"}, []),
        ({"eval_strategy": "steps", "eval_steps": 4, "eval_delay": 5}, [8, 12]),
        ({"eval_strategy": "epoch", "eval_delay": 2}, [12]),
        ({"eval_strategy": "steps", "eval_steps": 0.5, "eval_on_start": True}, [0, 6, 12]),
        ({"eval_strategy": "steps", "logging_steps": 6}, [6, 12]),
    ],
    ids=["steps", "epoch", "no", "delay", "epoch-delay", "share-on_start", "logging_steps"],
)
def test_eval_strategy(make: Kind, settings: dict[str, Any], steps: list[int]) -> None:
    run = make(max_steps=12, **settings)
    run.train()
    assert steps_with(run, "eval_loss") == steps


def test_evaluate_metrics(make: Kind) -> None:
    run = make(max_steps=3)
    run.train()
    metrics = run.evaluate()
    keys = {"eval_loss", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "epoch"}
    assert set(metrics) - {"eval_model_preparation_time"} == keys
    assert set(run.evaluate(Text(4), metric_key_prefix="test")) >= {"test_loss", "test_runtime"}
    stock = gpt2()
    stock.load_state_dict(stock_weights(run))
    assert metrics["eval_loss"] == pytest.approx(make.plain(model=stock).evaluate()["eval_loss"], abs=1e-6)


def test_evaluate_without_training_first(make: Kind) -> None:
    assert make().evaluate()["eval_loss"] == make.plain().evaluate()["eval_loss"]


def test_several_eval_datasets(make: Kind) -> None:
    sets = {"one": Text(8, seed=3), "two": Text(4, seed=4)}
    run = make(eval_dataset=sets, max_steps=4, eval_strategy="steps", eval_steps=2)
    run.train()
    assert steps_with(run, "eval_one_loss") == steps_with(run, "eval_two_loss") == [2, 4]
    assert run.evaluate(sets)["eval_two_loss"] == pytest.approx(run.evaluate(sets["two"])["eval_loss"])
    assert run.evaluate("one")["eval_loss"] == pytest.approx(run.evaluate(sets["one"])["eval_loss"])


def test_compute_metrics(make: Kind) -> None:
    seen: list[EvalPrediction] = []

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction)
        return {"mine": 0.5, "eval_prefixed": 0.25}

    metrics = make(compute_metrics=compute_metrics).evaluate()
    assert metrics["eval_mine"] == 0.5 and metrics["eval_prefixed"] == 0.25
    assert seen[0].predictions.shape == (12, 8, VOCAB)
    assert np.array_equal(seen[0].label_ids, Text(12, seed=2).labels.numpy())
    assert seen[0].inputs is None and seen[0].losses is None


def test_compute_metrics_is_not_called_without_labels(make: Kind) -> None:
    class Unlabelled(Text):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return {"input_ids": self.ids[index]}

    def fail(prediction: EvalPrediction) -> dict[str, float]:
        raise AssertionError("called without labels")

    output = make(compute_metrics=fail).predict(Unlabelled(6))
    assert output.label_ids is None and output.predictions.shape == (6, 8, VOCAB)
    assert "test_loss" not in output.metrics


def test_include_for_metrics(make: Kind) -> None:
    seen: list[EvalPrediction] = []

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction)
        return {}

    metrics = make(compute_metrics=compute_metrics, include_for_metrics=["inputs", "loss"]).evaluate()
    assert np.array_equal(seen[0].inputs, Text(12, seed=2).ids.numpy())
    assert seen[0].losses.shape == (12,)
    assert float(seen[0].losses.mean()) == pytest.approx(metrics["eval_loss"], rel=1e-5)


def test_preprocess_logits_for_metrics(make: Kind) -> None:
    shapes = []

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        shapes.append(prediction.predictions.shape)
        return {}

    make(compute_metrics=compute_metrics, preprocess_logits_for_metrics=lambda logits, _: logits.argmax(-1)).evaluate()
    assert shapes == [(12, 8)]


def test_batch_eval_metrics(make: Kind) -> None:
    calls: list[bool] = []

    def compute_metrics(prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
        calls.append(compute_result)
        return {"batches": len(calls)}

    assert make(compute_metrics=compute_metrics, batch_eval_metrics=True).evaluate()["eval_batches"] == 3
    assert calls == [False, False, True]


def test_predict(make: Kind) -> None:
    run = make(max_steps=4)
    run.train()
    output = run.predict(Text(10, seed=5))
    stock = gpt2()
    stock.load_state_dict(stock_weights(run))
    with torch.no_grad():
        logits = stock.eval()(Text(10, seed=5).ids).logits
    assert output.predictions == pytest.approx(logits.numpy(), abs=1e-5)
    assert np.array_equal(output.label_ids, Text(10, seed=5).labels.numpy())
    assert {"test_loss", "test_runtime", "test_samples_per_second", "test_steps_per_second"} <= set(output.metrics)
    assert "mine_loss" in run.predict(Text(4), metric_key_prefix="mine").metrics


def test_eval_accumulation_steps(make: Kind) -> None:
    whole, parts = make().predict(Text(10)), make(eval_accumulation_steps=1).predict(Text(10))
    assert np.array_equal(whole.predictions, parts.predictions)
    assert whole.metrics["test_loss"] == parts.metrics["test_loss"]


def test_predictions_need_not_be_concatenated(make: Kind) -> None:
    output = make(eval_do_concat_batches=False).predict(Text(10))
    assert [batch.shape[0] for batch in output.predictions] == [4, 4, 2]


def test_prediction_loss_only(make: Kind) -> None:
    output = make(prediction_loss_only=True).predict(Text(6))
    assert output.predictions is None and output.metrics["test_loss"] > 0


def test_ignore_keys(make: Kind) -> None:
    class Chatty(GPT2LMHeadModel):
        def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
            output = super().forward(input_ids=input_ids, labels=labels, **kwargs)
            return {"loss": output.loss, "logits": output.logits, "extra": output.logits[:, 0]}

    run = make(model=Chatty(gpt2().config))
    assert len(run.predict(Text(4)).predictions) == 2
    assert run.predict(Text(4), ignore_keys=["extra"]).predictions.shape == (4, 8, VOCAB)


def test_padded_predictions(make: Kind) -> None:
    """Batches of unequal length are padded with -100 to one array."""
    rows = [{"input_ids": torch.arange(3, 3 + n), "labels": torch.arange(3, 3 + n)} for n in (4, 7)]
    output = make(per_device_eval_batch_size=1).predict(rows)
    assert output.predictions.shape == (2, 7, VOCAB)
    assert (output.predictions[0, 4:] == -100).all() and (output.label_ids[0, 4:] == -100).all()
    assert output.label_ids[1].tolist() == list(range(3, 10))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_full_eval_in_half_precision(make: Kind, dtype: str) -> None:
    if dtype == "fp16":
        run = make(fp16_full_eval=True, max_steps=3)
    else:
        run = make(bf16_full_eval=True, max_steps=3)
    run.train()
    exact = make.plain(model=_loaded(stock_weights(run))).evaluate()["eval_loss"]
    assert run.evaluate()["eval_loss"] == pytest.approx(exact, rel=0.02)


def _loaded(weights: dict[str, torch.Tensor]) -> Any:
    model = gpt2()
    model.load_state_dict(weights)
    return model


# ---- saving ----


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"save_strategy": "steps", "save_steps": 5}, [5, 10, 12]),
        ({"save_strategy": "steps", "save_steps": 0.5}, [6, 12]),
        ({"save_strategy": "epoch"}, [6, 12]),
        ({"save_strategy": "no"}, []),
        ({"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}, [10, 12]),
    ],
    ids=["steps", "share", "epoch", "no", "limit"],
)
def test_save_strategy(make: Kind, settings: dict[str, Any], steps: list[int]) -> None:
    make(max_steps=12, **settings).train()
    assert checkpoints(make.folder) == steps


def test_save_strategy_best(make: Kind) -> None:
    run = make(
        compute_metrics=scores(1, 3, 2, 4), max_steps=12, eval_strategy="steps", eval_steps=3, save_strategy="best",
        metric_for_best_model="score", greater_is_better=True,
    )  # fmt: skip
    run.train()
    assert checkpoints(make.folder) == [3, 6, 12]
    assert run.state.best_metric == 4


@pytest.mark.parametrize("limit", [1, 2])
def test_save_total_limit_keeps_the_best(make: Kind, limit: int) -> None:
    run = make(
        compute_metrics=scores(1, 9, 2, 3, 4), max_steps=10, eval_strategy="steps", eval_steps=2,
        save_strategy="steps", save_steps=2, save_total_limit=limit, load_best_model_at_end=True,
        metric_for_best_model="score",
    )  # fmt: skip
    run.train()
    assert checkpoints(make.folder) == ([4] if limit == 1 else [4, 10])


@pytest.mark.parametrize(("greater", "best"), [(True, 4), (False, 6)])
def test_best_model_is_loaded_at_the_end(make: Kind, greater: bool, best: int) -> None:
    run = make(
        compute_metrics=scores(2, 9, 1, 3), max_steps=8, eval_strategy="steps", eval_steps=2, save_strategy="steps",
        save_steps=2, load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=greater,
    )  # fmt: skip
    run.train()
    assert run.state.best_global_step == best and run.state.best_metric == (9 if greater else 1)
    assert Path(run.state.best_model_checkpoint) == make.folder / f"checkpoint-{best}"
    saved = load_file(make.folder / f"checkpoint-{best}" / "model.safetensors")
    weights = stock_weights(run)
    assert all(torch.allclose(value, weights[key], atol=1e-7) for key, value in saved.items())
    last = load_file(make.folder / "checkpoint-8" / "model.safetensors")
    assert not torch.allclose(last["transformer.wte.weight"], weights["transformer.wte.weight"], atol=1e-4)


def test_best_model_by_loss_is_the_default(make: Kind) -> None:
    run = make(
        max_steps=6, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True,
    )  # fmt: skip
    run.train()
    losses = [log["eval_loss"] for log in logs_with(run, "eval_loss")]
    assert run.args.metric_for_best_model == "loss" and run.state.best_metric == min(losses)
    assert run.evaluate()["eval_loss"] == pytest.approx(min(losses), abs=1e-5)


def test_unknown_best_metric_is_a_key_error(make: Kind) -> None:
    run = make(
        max_steps=4, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, metric_for_best_model="absent",
    )  # fmt: skip
    with pytest.raises(KeyError, match="eval_absent"):
        run.train()


def test_checkpoint_files(make: Kind) -> None:
    make(max_steps=2, save_strategy="steps", save_steps=2).train()
    names = {path.name for path in (make.folder / "checkpoint-2").iterdir()}
    assert names >= {
        "config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
        "training_args.bin", "generation_config.json",
    }  # fmt: skip
    state = json.loads((make.folder / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2 and state["max_steps"] == 2


def test_save_only_model(make: Kind) -> None:
    make(max_steps=2, save_strategy="steps", save_steps=2, save_only_model=True).train()
    names = {path.name for path in (make.folder / "checkpoint-2").iterdir()}
    assert "model.safetensors" in names and not names & {"optimizer.pt", "scheduler.pt", "rng_state.pth"}


def test_a_checkpoint_is_a_stock_model(make: Kind) -> None:
    run = make(max_steps=4, save_strategy="steps", save_steps=4)
    run.train()
    loaded = GPT2LMHeadModel.from_pretrained(make.folder / "checkpoint-4")
    assert same(loaded.state_dict(), stock_weights(run))


def test_save_model_default_folder(make: Kind) -> None:
    run = make(max_steps=2)
    run.train()
    run.save_model()
    assert same(GPT2LMHeadModel.from_pretrained(make.folder).state_dict(), stock_weights(run))
    assert torch.load(make.folder / "training_args.bin", weights_only=False).max_steps == 2


def test_a_bare_module_is_saved_as_its_state_dict(make: Kind) -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm, self.out = nn.Embedding(VOCAB, 8), nn.LayerNorm(8), nn.Linear(8, VOCAB)

        def forward(self, input_ids: torch.Tensor, labels: Any = None) -> Any:
            logits = self.out(self.norm(self.embed(input_ids)))
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
            return {"loss": loss, "logits": logits}

    run = make(model=Bare(), max_steps=4, save_strategy="steps", save_steps=2)
    run.train()
    run.save_model(make.folder / "saved")
    saved = load_file(make.folder / "saved" / "model.safetensors")
    assert set(saved) == set(Bare().state_dict())
    assert all(torch.equal(value, stock_weights(run)[key]) for key, value in saved.items())
    assert (make.folder / "checkpoint-4" / "optimizer.pt").exists()


def test_a_custom_pretrained_model(make: Kind) -> None:
    class TwoConfig(PreTrainedConfig):
        model_type = "two_layers"

    class Two(PreTrainedModel):
        config_class = TwoConfig

        def __init__(self, config: TwoConfig) -> None:
            super().__init__(config)
            self.norm, self.out = nn.LayerNorm(4), nn.Linear(4, 1)
            self.post_init()

        def forward(self, x: torch.Tensor, labels: Any = None) -> Any:
            y = self.out(self.norm(x)).squeeze(-1)
            return (y,) if labels is None else (nn.functional.mse_loss(y, labels), y)

    rows = [{"x": torch.randn(4), "labels": torch.randn(())} for _ in range(8)]
    run = make(model=Two(TwoConfig()), train_dataset=rows, eval_dataset=rows, max_steps=4)
    run.train()
    run.save_model(make.folder / "saved")
    assert same(Two.from_pretrained(make.folder / "saved").state_dict(), stock_weights(run))
    assert run.predict(rows).predictions.shape == (8,)


def test_save_metrics_and_state(make: Kind, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(max_steps=2, logging_steps=1)
    metrics = run.train().metrics
    run.save_metrics("train", metrics)
    run.log_metrics("train", metrics)
    run.save_state()
    assert json.loads((make.folder / "train_results.json").read_text()) == metrics
    assert json.loads((make.folder / "all_results.json").read_text()) == metrics
    assert "train metrics" in capsys.readouterr().out
    state = TrainerState.load_from_json(str(make.folder / "trainer_state.json"))
    assert state.global_step == 2 and state.log_history == run.state.log_history


def test_create_model_card(make: Kind) -> None:
    run = make(max_steps=2, logging_steps=1, eval_strategy="steps", eval_steps=2)
    run.train()
    run.create_model_card(model_name="tiny", language="en", tags=["mine"])
    card = (make.folder / "README.md").read_text()
    assert card.startswith("---\n") and "mine" in card and "tiny" in card


# ---- resuming ----


SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "train_sampling_strategy": "random"}


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2, "optim": "sgd"}], ids=["adam", "sgd"])
def test_resumed_is_uninterrupted(make: Kind, settings: dict[str, Any]) -> None:
    whole = make(model=gpt2(dropout=0.1), max_steps=8, logging_steps=1, **SAVING, **settings)
    whole.train()
    resumed = make(
        model=gpt2(dropout=0.1), folder=make.folder / "b", max_steps=8, logging_steps=1, **SAVING, **settings
    )
    # With accumulation step 4 lies in the second epoch, where Trainer goes on with other rows before transformers 5.0.
    step = 2 if settings and Version("5.0") > RELEASE else 4
    resumed.train(resume_from_checkpoint=str(make.folder / f"checkpoint-{step}"))
    assert same(stock_weights(whole), stock_weights(resumed))
    assert logs_with(whole, "loss") == logs_with(resumed, "loss")


def test_resume_true_takes_the_last_checkpoint(make: Kind) -> None:
    make(max_steps=6, **SAVING).train()
    assert get_last_checkpoint(str(make.folder)) == str(make.folder / "checkpoint-6")
    recorder = Recorder()
    make(max_steps=10, callbacks=[recorder], **SAVING).train(resume_from_checkpoint=True)
    assert recorder.steps("on_step_begin") == [6, 7, 8, 9]


def test_resume_true_without_checkpoint_raises(make: Kind) -> None:
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        make(max_steps=2).train(resume_from_checkpoint=True)


def test_resume_from_a_missing_folder_raises(make: Kind) -> None:
    run = make(max_steps=2)
    before = stock_weights(run)
    with pytest.raises((ValueError, FileNotFoundError), match="nowhere"):
        run.train(resume_from_checkpoint=str(make.folder / "nowhere"))
    assert same(before, stock_weights(run))


def test_resume_with_more_epochs(make: Kind) -> None:
    make(max_steps=-1, num_train_epochs=1, save_strategy="epoch").train()
    run = make(max_steps=-1, num_train_epochs=3, save_strategy="epoch")
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 18 and run.state.epoch == 3.0
    assert checkpoints(make.folder) == [6, 12, 18]


def _rows_seen(run: Any) -> list[int]:
    seen: list[int] = []
    step = run.training_step

    def training_step(model: Any, inputs: Any, *args: Any) -> Any:
        seen.append(int(inputs["input_ids"][0, 0]) * 100 + int(inputs["input_ids"][0, 1]))
        return step(model, inputs, *args)

    run.training_step = training_step
    return seen


@pytest.mark.parametrize("ignore", [False, True])
def test_ignore_data_skip(make: Kind, ignore: bool) -> None:
    make(max_steps=6, save_strategy="steps", save_steps=2).train()
    run = make(max_steps=6, ignore_data_skip=ignore)
    seen = _rows_seen(run)
    run.train(resume_from_checkpoint=str(make.folder / "checkpoint-2"))
    batches = [int(b["input_ids"][0, 0]) * 100 + int(b["input_ids"][0, 1]) for b in Text(24).batches(4)]
    assert seen == (batches[:4] if ignore else batches[2:])


def test_resume_with_frozen_parameters(make: Kind) -> None:
    """The optimizer's state holds nothing of them, so it must be laid out alike."""

    def frozen(folder: Path) -> Any:
        model = gpt2()
        model.transformer.wte.weight.requires_grad_(False)
        return make(model=model, folder=folder, max_steps=6, weight_decay=0.1, **SAVING)

    whole, resumed = frozen(make.folder), frozen(make.folder / "b")
    before = stock_weights(whole)["transformer.wte.weight"]
    whole.train()
    resumed.train(resume_from_checkpoint=str(make.folder / "checkpoint-4"))
    assert same(stock_weights(whole), stock_weights(resumed))
    assert torch.equal(stock_weights(resumed)["transformer.wte.weight"], before)


def test_resume_with_another_batch_size(make: Kind) -> None:
    """Whose size holds is Trainer's choice: the checkpoint's in older releases, then that of the new arguments."""

    def sizes(kind: Any) -> list[int]:
        settings: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
        kind(**settings).train()
        run = kind(per_device_train_batch_size=2, **settings)
        seen: list[int] = []
        step = run.training_step

        def training_step(model: Any, inputs: Any, *args: Any) -> Any:
            seen.append(len(inputs["input_ids"]))
            return step(model, inputs, *args)

        run.training_step = training_step
        run.train(resume_from_checkpoint=str(Path(run.args.output_dir) / "checkpoint-2"))
        return seen

    found = sizes(make)
    assert found == sizes(make.plain)
    assert found == [2] * 4 or not compat.LOOP_HAS_HOOKS


@pytest.mark.parametrize("holder", ["processing_class", "data_collator"])
def test_a_tokenizer_is_saved_with_the_weights(make: Kind, holder: str) -> None:
    class Collator:
        tokenizer = tokenizer()

        def __call__(self, rows: list[Any]) -> Any:
            return default_data_collator(rows)

    own: Any = tokenizer() if holder == "processing_class" else Collator()
    run = make(max_steps=2, save_strategy="steps", save_steps=2, **{holder: own})
    run.train()
    run.save_model()
    for folder in (make.folder / "checkpoint-2", make.folder):
        assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer().get_vocab()


def test_training_twice(make: Kind) -> None:
    run = make(max_steps=4)
    run.train()
    first = stock_weights(run)
    run.train()
    assert run.state.global_step == 4 and not same(first, stock_weights(run))


# ---- optimizers and schedules ----


@pytest.mark.parametrize("settings", [
    {"lr_scheduler_type": "linear"},
    {"lr_scheduler_type": "cosine", "warmup_steps": 3},
    {"lr_scheduler_type": "linear", WARMUP_SHARE: 0.25},
    {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 4},
    {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0}},
    {"lr_scheduler_type": "cosine", "gradient_accumulation_steps": 2},
], ids=["linear", "cosine", "share", "constant", "polynomial", "accumulation"])  # fmt: skip
def test_learning_rates_are_trainers(make: Kind, settings: dict[str, Any]) -> None:
    run, plain = make(logging_steps=1, **settings), make.plain(logging_steps=1, **settings)
    run.train()
    plain.train()
    rates = [log["learning_rate"] for log in logs_with(run, "learning_rate")]
    assert rates == [log["learning_rate"] for log in logs_with(plain, "learning_rate")]
    assert len(set(rates)) > 3


def test_reduce_lr_on_plateau(make: Kind) -> None:
    run = make(
        compute_metrics=scores(1, 1, 1, 1, 1, 1), max_steps=10, logging_steps=2, eval_strategy="steps", eval_steps=2,
        lr_scheduler_type="reduce_lr_on_plateau", metric_for_best_model="score", greater_is_better=False,
        lr_scheduler_kwargs={"patience": 1, "factor": 0.5},
    )  # fmt: skip
    run.train()
    assert [log["learning_rate"] for log in logs_with(run, "loss")] == [0.05, 0.05, 0.05, 0.025, 0.025]


def test_optimizer_cls_and_kwargs(make: Kind) -> None:
    class Mine(torch.optim.SGD):
        pass

    run = make(optimizer_cls_and_kwargs=(Mine, {"lr": 0.125, "momentum": 0.5}), max_steps=3, logging_steps=3)
    run.train()
    assert isinstance(run.optimizer.optimizer, Mine)
    assert all(group["lr"] == 0.125 and group["momentum"] == 0.5 for group in run.optimizer.param_groups)


def test_a_built_optimizer(make: Kind) -> None:
    """It trains the members too: a stack is the parameter that it holds."""
    model = gpt2()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = make(model=model, optimizers=(optimizer, None), max_steps=6)
    before = stock_weights(run)
    run.train()
    assert run.optimizer.optimizer is optimizer
    moved = {key for key, value in stock_weights(run).items() if not torch.equal(value, before[key])}
    assert {"transformer.ln_f.weight", "transformer.wte.weight"} <= moved
    # And it is the user's again.
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}


def test_create_optimizer_override(make: Kind) -> None:
    class Own(make.base):  # type: ignore[name-defined]
        def create_optimizer(self, model: Any = None) -> Any:
            if self.optimizer is None:
                self.optimizer = torch.optim.SGD((model or self.model).parameters(), lr=0.25)
            return self.optimizer

    run = make(trainer_class=Own, max_steps=3, logging_steps=1)
    before = stock_weights(run)
    run.train()
    assert [log["learning_rate"] for log in logs_with(run, "loss")] == [0.25] * 3
    moved = {key for key, value in stock_weights(run).items() if not torch.equal(value, before[key])}
    assert {"transformer.ln_f.weight", "transformer.wte.weight"} <= moved


def test_create_scheduler_override(make: Kind) -> None:
    class Own(make.base):  # type: ignore[name-defined]
        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            self.lr_scheduler = torch.optim.lr_scheduler.StepLR(optimizer or self.optimizer, 2, 0.5)
            return self.lr_scheduler

    run = make(trainer_class=Own, max_steps=5, logging_steps=1)
    run.train()
    assert [log["learning_rate"] for log in logs_with(run, "loss")] == [0.05, 0.05, 0.025, 0.025, 0.0125]


def test_weight_decay_groups(make: Kind) -> None:
    run = make(weight_decay=0.1, max_steps=1)
    run.train()
    decaying, plain = run.optimizer.param_groups
    assert decaying["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0
    assert len(decaying["params"]) + len(plain["params"]) == len(list(run.model.parameters()))
    matrices = [p for n, p in run.model.named_parameters() if n.endswith("weight") and "ln_" not in n]
    assert {id(p) for p in decaying["params"]} == {id(p) for p in matrices}


def test_frozen_parameters_stay(make: Kind) -> None:
    model = gpt2()
    model.transformer.wpe.weight.requires_grad_(False)
    frozen = model.transformer.wpe.weight.clone()
    run = make(model=model, max_steps=4, weight_decay=0.1)
    run.train()
    assert torch.equal(stock_weights(run)["transformer.wpe.weight"], frozen)


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.01])
def test_grad_norm_is_logged_and_clips(make: Kind, max_grad_norm: float) -> None:
    settings: dict[str, Any] = {"max_steps": 3, "logging_steps": 3, "optim": "sgd", "learning_rate": 1.0}
    run = make(max_grad_norm=max_grad_norm, **settings)
    before = stock_weights(run)
    run.train()
    # Without clipping, Trainer logs no norm before transformers 5.3.
    if max_grad_norm or compat.LOOP_HAS_HOOKS:
        assert logs_with(run, "loss")[0]["grad_norm"] > 0.05
    moved = sum((value - before[key]).square().sum() for key, value in stock_weights(run).items() if "lm_" not in key)
    # Three plain steps, or the one that ends a cycle of three with base gradients summed; a step is at most that long.
    assert (moved.sqrt() <= 3 * 0.01 * (1 + 1e-4)) == (max_grad_norm > 0)


# ---- losses ----


def test_compute_loss_override(make: Kind) -> None:
    class Doubled(make.base):  # type: ignore[name-defined]
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = 2 * nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            return (loss, outputs) if return_outputs else loss

    run = make(trainer_class=Doubled, max_steps=2, logging_steps=2, learning_rate=0.0)
    run.train()
    assert logs_with(run, "loss")[0]["loss"] == pytest.approx(2 * math.log(VOCAB), rel=0.05)
    assert run.evaluate()["eval_loss"] == pytest.approx(2 * math.log(VOCAB), rel=0.05)


def test_compute_loss_func(make: Kind) -> None:
    """It may count on `num_items_in_batch`; LatePhaseTrainer gives it each minibatch's own."""
    counts: list[int] = []

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        counts.append(int(num_items_in_batch))
        total = nn.functional.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        return total / num_items_in_batch

    settings: dict[str, Any] = {"max_steps": 2, "logging_steps": 2, "learning_rate": 0.0}
    run = make(compute_loss_func=loss, gradient_accumulation_steps=3, **settings)
    run.train()
    assert logs_with(run, "loss")[0]["loss"] == pytest.approx(math.log(VOCAB), rel=0.05)
    assert counts == [28 if make.num_members == 3 else 84] * 6


def test_label_names(make: Kind) -> None:
    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm, self.out = nn.Embedding(VOCAB, 8), nn.LayerNorm(8), nn.Linear(8, VOCAB)

        def forward(self, input_ids: torch.Tensor, targets: Any = None) -> Any:
            logits = self.out(self.norm(self.embed(input_ids)))
            if targets is None:
                return {"logits": logits}
            return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()), "logits": logits}

    rows = [{"input_ids": ids, "targets": ids} for ids in Text(8).ids]
    run = make(model=Renamed(), train_dataset=rows, eval_dataset=rows, label_names=["targets"], max_steps=3)
    run.train()
    output = run.predict(rows)
    assert output.label_ids.shape == (8, 8) and "test_loss" in output.metrics


# ---- data ----


def _columns(rows: int = 24) -> datasets.Dataset:
    ids = Text(rows).ids.tolist()
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": ids, "note": ["x"] * rows})


def test_unused_columns_are_removed(make: Kind) -> None:
    run = make(train_dataset=_columns(), eval_dataset=_columns(8), max_steps=3)
    run.train()
    assert run.evaluate()["eval_loss"] > 0
    assert set(next(iter(run.get_train_dataloader()))) == {"input_ids", "labels"}


def test_unused_columns_can_be_kept(make: Kind) -> None:
    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        assert all(row["note"] == "x" for row in rows)
        ids = torch.tensor([row["input_ids"] for row in rows])
        return {"input_ids": ids, "labels": ids}

    run = make(train_dataset=_columns(), data_collator=collate, remove_unused_columns=False, max_steps=3)
    assert run.train().global_step == 3


class Ragged(Text):
    """Rows of 3 to 8 tokens."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.ids[index, : 3 + (5 * index) % 6]
        return {"input_ids": ids, "labels": ids}


def pad(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    def padded(key: str, value: int) -> torch.Tensor:
        return nn.utils.rnn.pad_sequence([row[key] for row in rows], batch_first=True, padding_value=value)

    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100)}


def test_variable_lengths(make: Kind) -> None:
    run = make(train_dataset=Ragged(24), eval_dataset=Ragged(8), data_collator=pad, max_steps=8, logging_steps=8)
    run.train()
    assert 0 < logs_with(run, "loss")[0]["loss"] < 2 * math.log(VOCAB)
    assert math.isfinite(run.evaluate()["eval_loss"])


def test_group_by_length(make: Kind) -> None:
    run = make(train_dataset=Ragged(24), data_collator=pad, train_sampling_strategy="group_by_length", max_steps=6)
    lengths: list[int] = []
    step = run.training_step

    def training_step(model: Any, inputs: Any, *args: Any) -> Any:
        lengths.append(inputs["input_ids"].shape[1])
        return step(model, inputs, *args)

    run.training_step = training_step
    run.train()
    # The longest comes first, and short rows meet short ones: shuffled, every batch would be nearly as long.
    assert lengths[0] == 8 and min(lengths) < 7 and sum(lengths) < 6 * 7.5


def test_dataloader_drop_last(make: Kind) -> None:
    run = make(train_dataset=Text(27), dataloader_drop_last=True, max_steps=-1, num_train_epochs=1)
    run.train()
    assert run.state.global_step == 6
    assert run.num_examples(run.get_eval_dataloader(Text(11))) == 11


def test_dataloader_workers(make: Kind) -> None:
    runs = [make(dataloader_num_workers=workers, max_steps=3) for workers in (0, 1)]
    for run in runs:
        run.train()
    assert same(stock_weights(runs[0]), stock_weights(runs[1]))


class Stream(IterableDataset):
    """Ten rows, one after the other."""

    def __iter__(self) -> Any:
        for ids in Text(10).ids:
            yield {"input_ids": ids, "labels": ids}


def test_iterable_dataset(make: Kind) -> None:
    recorder = Recorder()
    run = make(train_dataset=Stream(), eval_dataset=Stream(), max_steps=7, callbacks=[recorder])
    run.train()
    assert run.state.global_step == 7 and len(recorder.steps("on_epoch_begin")) == 3
    assert run.predict(Stream()).predictions.shape[0] == 10


def test_iterable_dataset_needs_max_steps(make: Kind) -> None:
    with pytest.raises(ValueError, match="max_steps"):
        make(train_dataset=Stream(), max_steps=-1)


def test_get_train_dataloader_override(make: Kind) -> None:
    class Own(make.base):  # type: ignore[name-defined]
        def get_train_dataloader(self) -> DataLoader:
            return DataLoader(Text(9), batch_size=3, sampler=SequentialSampler(Text(9)))

    run = make(trainer_class=Own, max_steps=-1, num_train_epochs=2)
    run.train()
    assert run.state.global_step == 6


def test_training_without_dataset_raises(make: Kind) -> None:
    with pytest.raises(ValueError, match="requires a train_dataset"):
        make(train_dataset=None).train()
    with pytest.raises(ValueError, match="requires an eval_dataset"):
        make(eval_dataset=None).evaluate()


# ---- models, seeds, searches ----


def test_model_init(make: Kind) -> None:
    calls: list[int] = []

    def model_init() -> Any:
        calls.append(1)
        return gpt2()

    run = make(model_init=model_init, max_steps=3)
    run.train()
    first = stock_weights(run)
    run.train()
    assert len(calls) == 3 and same(first, stock_weights(run))


def test_a_model_is_needed_once(make: Kind) -> None:
    with pytest.raises(RuntimeError, match="model_init"):
        make(model=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # older Trainers warn, and make their own model
        with pytest.raises((ValueError, FutureWarning), match="not both"):
            make(model_init=gpt2, model=gpt2())


@pytest.mark.parametrize("settings", [{}, {"full_determinism": True}], ids=["seed", "full_determinism"])
def test_runs_are_reproducible(make: Kind, settings: dict[str, Any]) -> None:
    def trained(seed: int) -> dict[str, torch.Tensor]:
        run = make(
            model=gpt2(dropout=0.1),
            train_sampling_strategy="random",
            max_steps=4,
            seed=seed,
            data_seed=seed,
            **settings,
        )
        run.train()
        return stock_weights(run)

    try:
        torch.manual_seed(0)
        first = trained(3)
        torch.manual_seed(0)
        assert same(first, trained(3))
        torch.manual_seed(0)
        assert not same(first, trained(4))
    finally:
        torch.use_deterministic_algorithms(False)


def test_hyperparameter_search(make: Kind) -> None:
    pytest.importorskip("optuna").logging.disable_default_handler()
    run = make(
        model_init=lambda: gpt2(),
        max_steps=3,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
    )
    best = run.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", [1e-6, 1e-1])},
        compute_objective=lambda metrics: metrics["eval_loss"],
        n_trials=3,
        direction="minimize",
        hp_name=lambda trial: f"trial-{trial.number}",
    )
    assert best.run_id in {"0", "1", "2"}
    assert best.hyperparameters["learning_rate"] in {1e-6, 1e-1}
    folders = [path.name for path in make.folder.iterdir() if (path / "checkpoint-3" / "model.safetensors").exists()]
    assert sorted(folders) == ["trial-0", "trial-1", "trial-2"]


class OutOfMemory(TrainerCallback):
    """Fails once, at a given step, as a GPU that is too small does."""

    def __init__(self, step: int) -> None:
        self.step: int | None = step
        self.batch_sizes: list[int] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        self.batch_sizes.append(state.train_batch_size)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.step = None
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 byte")


@pytest.mark.parametrize("step", [0, 4])
def test_auto_find_batch_size(make: Kind, step: int) -> None:
    failing = OutOfMemory(step)
    run = make(callbacks=[failing], auto_find_batch_size=True, max_steps=-1, num_train_epochs=1)
    output = run.train()
    first, second = failing.batch_sizes
    assert first == 4 and second < 4
    assert output.global_step == math.ceil(24 / second) and run.state.epoch == 1.0
    assert run._train_batch_size == second
    if make.num_members == 3:
        assert run.late_phase.released and run.late_phase.distance_from_mean() > 0


def test_torch_empty_cache_steps(make: Kind) -> None:
    runs = [make(torch_empty_cache_steps=steps, max_steps=3) for steps in (None, 1)]
    for run in runs:
        run.train()
    assert same(stock_weights(runs[0]), stock_weights(runs[1]))


def test_nothing_goes_to_a_hub(make: Kind) -> None:
    run = make(max_steps=2, save_strategy="steps", save_steps=2, push_to_hub=False)
    run.train()
    run.save_model()
    assert run.hub_model_id is None and run.args.hub_strategy == "every_save"


def test_world(make: Kind) -> None:
    run = make()
    assert run.is_world_process_zero() and run.is_local_process_zero()
    assert run.args.world_size == 1 and run.model_wrapped is run.model


def test_is_in_train(make: Kind) -> None:
    seen: list[bool] = []

    class Look(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seen.append(run.is_in_train)

    run = make(callbacks=[Look()], max_steps=2)
    assert run.is_in_train is False
    run.train()
    assert seen == [True, True] and run.is_in_train is False
