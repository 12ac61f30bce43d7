"""Others' tools on the model that training gives back, and every way in which training may end."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn
from transformers import EarlyStoppingCallback, GPT2LMHeadModel, TrainerCallback, pipeline

from hf_latephase import LatePhaseConfig
from test_other_trainers import tokenizer
from test_trainer import assert_same, weights_of
from test_users_model import IDS, TRACES, At, late_phase_trainer, logits, stock
from tiny import Text, exact_loss, gpt2, trainer


NAMES = ["norm", "rank1", "norm swa", "one ema"]


@pytest.fixture(params=NAMES)
def trained(request: Any, tmp_path: Path) -> tuple[Any, Any, Any]:
    """A trainer, its model, and a stock model that `save_model` wrote."""
    model = stock(request.param)
    run = late_phase_trainer(tmp_path, request.param, model)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    return run, model.eval(), GPT2LMHeadModel.from_pretrained(tmp_path / "saved").eval()


class Logits(nn.Module):
    """Tracing takes tensors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, use_cache=False).logits


def test_tools(trained: tuple[Any, Any, Any]) -> None:
    _, model, expected = trained
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit and dynamic quantisation are on their way out
        if TRACES:
            traced = torch.jit.trace(Logits(copy.deepcopy(model)), (IDS,), check_trace=False)
            torch.testing.assert_close(traced(IDS), logits(expected), rtol=0, atol=1e-5)
        linear = nn.Sequential(nn.Linear(4, 4), copy.deepcopy(model.transformer.ln_f))
        quantised = torch.ao.quantization.quantize_dynamic(linear, {nn.Linear})
        assert type(quantised[1]) is nn.LayerNorm
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    torch.testing.assert_close(compiled(IDS).logits, logits(expected), rtol=0, atol=1e-6)
    texts = [
        pipeline("text-generation", model=each, tokenizer=tokenizer(), device="cpu")(
            "w1 w2 w3", max_new_tokens=5, do_sample=False
        )
        for each in (model, expected)
    ]
    assert texts[0] == texts[1] and len(texts[0][0]["generated_text"]) > len("w1 w2 w3")
    halves = [copy.deepcopy(each).half().float() for each in (model, expected)]
    assert torch.equal(logits(halves[0]), logits(halves[1]))


def test_an_adapter_is_merged(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from test_other_trainers import ADAPTER, lora

    for config in (
        LatePhaseConfig(num_members=3, weights=["full"], target_modules=ADAPTER, late_phase_start=2, init_noise=0.3),
        LatePhaseConfig(num_members=1, ema_decay=0.5),
    ):
        model = lora()
        run = trainer(tmp_path, model, config, max_steps=8)
        run.train()
        ids = Text(3).ids
        with torch.no_grad():
            before = model.eval()(ids).logits
            merged = copy.deepcopy(model).merge_and_unload()
            torch.testing.assert_close(merged.eval()(ids).logits, before, rtol=0, atol=1e-5)
        assert not isinstance(merged, peft.PeftModel)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
@pytest.mark.parametrize("name", NAMES)
def test_whatever_ends_training_inside_a_step(tmp_path: Path, name: str, error: type[BaseException]) -> None:
    """Ctrl-C while a member computes: the model is the average, not the member whose turn it was."""
    model = stock(name)
    run = late_phase_trainer(tmp_path, name, model)
    keys = list(model.state_dict())
    calls: list[int] = []

    def interrupt(*_: Any) -> None:
        calls.append(run.state.global_step)
        if run.state.global_step == 6:
            raise error

    handle = model.transformer.h[1].register_forward_hook(interrupt)
    with pytest.raises(error):
        run.train()
    handle.remove()
    assert calls[-1] == 6 and list(model.state_dict()) == keys
    assert run.evaluate()["eval_loss"] == trainer(tmp_path, copy.deepcopy(model), None).evaluate()["eval_loss"]
    # And on it goes, from the average.
    between = weights_of(model)
    run.train()
    assert run.state.global_step == 10
    assert not torch.equal(weights_of(model)["transformer.wte.weight"], between["transformer.wte.weight"])


@pytest.mark.parametrize("name", NAMES)
def test_early_stop_and_best_model(tmp_path: Path, name: str) -> None:
    model = stock(name)
    run = late_phase_trainer(
        tmp_path, name, model, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, max_steps=40, learning_rate=0.5,
        extra={"callbacks": [EarlyStoppingCallback(early_stopping_patience=1)]},
    )  # fmt: skip
    run.train()
    assert run.state.global_step < 40
    best = GPT2LMHeadModel.from_pretrained(run.state.best_model_checkpoint)
    assert_same(weights_of(best), weights_of(model))
    assert run.evaluate()["eval_loss"] == pytest.approx(run.state.best_metric, abs=1e-6)


def test_model_init_and_search(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rates: list[float] = []

    class Rates(TrainerCallback):
        def on_train_begin(self, *args: Any, optimizer: Any, **kwargs: Any) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    def make() -> Any:
        torch.manual_seed(0)
        return gpt2()

    config = LatePhaseConfig(num_members=2, weights=["norm"], late_phase_start=2)
    run = trainer(
        tmp_path, None, config, max_steps=5, eval_strategy="no",  # type: ignore[arg-type]
        extra={"model_init": make, "callbacks": [Rates()]},
    )  # fmt: skip
    run.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", [0.25, 0.5])},
        compute_objective=lambda metrics: metrics["eval_loss"], n_trials=2, direction="minimize",
    )  # fmt: skip
    assert set(rates) <= {0.25, 0.5} and len(rates) == 2
    assert list(run.late_phase.model.state_dict()) == list(gpt2().state_dict())
    assert run.late_phase.distance_from_mean() > 0


class PlainBatchNorm(nn.Module):
    """A BatchNorm layer without scale and shift between two that have them."""

    def __init__(self, affine: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(48, 8)
        self.first = nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8, affine=affine)
        self.last_norm = nn.BatchNorm1d(8)
        self.lm_head = nn.Linear(8, 48)
        self.loss_function = exact_loss

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        hidden = self.last_norm(self.norm(self.first(self.embed(input_ids).transpose(1, 2))).relu())
        scores = self.lm_head(hidden.transpose(1, 2))
        result = {"logits": scores}
        return result if labels is None else {"loss": self.loss_function(scores, labels, 48), **result}


@pytest.mark.parametrize("members", [1, 3])
def test_statistics_of_all_batch_norms_are_recomputed(tmp_path: Path, members: int) -> None:
    """As torch's `update_bn` does with the averaged model, whether or not a layer has anything to replicate."""
    torch.manual_seed(0)
    model = PlainBatchNorm()
    config = LatePhaseConfig(
        num_members=members, weights=["norm"], late_phase_start=2, swa_start=5, batch_norm_statistics="recomputed"
    )  # fmt: skip
    during: list[float] = []

    class Look(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
            during.append(metrics["eval_loss"])

    run = trainer(
        tmp_path, model, config, max_steps=12, rows=32, eval_strategy="steps", eval_steps=12,
        extra={"callbacks": [Look()]},
    )  # fmt: skip
    run.train()
    expected = copy.deepcopy(model)
    update_bn((batch["input_ids"] for batch in Text(32).batches(4)), expected)
    for key, value in expected.state_dict().items():
        if "running" in key:
            torch.testing.assert_close(model.state_dict()[key], value, rtol=0, atol=1e-5)
    assert run.evaluate()["eval_loss"] == pytest.approx(during[0], abs=1e-6)
    raw = run.averaged_model(time_averaged=False)
    assert not torch.allclose(raw.norm.running_mean, model.norm.running_mean)
    with pytest.raises(ValueError, match="no BatchNorm layer that tracks"):
        trainer(tmp_path, gpt2(), LatePhaseConfig(num_members=1, batch_norm_statistics="recomputed"))


def test_a_callback_sees_whose_turn_it_is_not(tmp_path: Path) -> None:
    """Between steps the model is the average; a failing look leaves training as it is."""
    runs = []
    for looks in (False, True):
        model = stock("norm")
        run = late_phase_trainer(tmp_path, "norm", model)
        if looks:
            for step in range(1, 10):
                run.add_callback(At(step, lambda current, run=run: (logits(current), run.averaged_model())))
        run.train()
        runs.append(model)
    assert_same(weights_of(runs[0]), weights_of(runs[1]))
