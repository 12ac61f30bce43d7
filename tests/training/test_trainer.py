"""LatePhaseTrainer beside Trainer: what must be equal to the bit, and what is saved, logged and evaluated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from hf_latephase import LatePhaseConfig, LatePhaseTrainer
from hf_latephase.analysis import MemberTable
from tiny import LOG_ERROR, MODELS, Text, gpt2, trainer


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert list(left) == list(right)
    for key, value in left.items():
        assert torch.equal(value, right[key]), key


def training_logs(run: Any) -> list[dict[str, Any]]:
    keep = ("loss", "grad_norm", "learning_rate", "eval_loss", "train_loss")
    return [{k: log[k] for k in keep if k in log} for log in run.state.log_history]


# ---- equal to the bit ----


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("settings", [
    {},
    {"gradient_accumulation_steps": 3, "max_grad_norm": 0.1, "weight_decay": 0.1},
    {"optim": "sgd", "lr_scheduler_type": "linear", "max_grad_norm": 1.0},
    {"label_smoothing_factor": 0.1, "neftune_noise_alpha": 5.0},
], ids=["plain", "accumulation", "sgd", "smoothing"])  # fmt: skip
def test_one_member_from_step_0_is_trainer_to_the_bit(tmp_path, name: str, settings: dict[str, Any]) -> None:
    runs = []
    for config in (None, LatePhaseConfig(num_members=1, weights=["norm"], late_phase_start=0)):
        torch.manual_seed(0)
        model = MODELS[name](**({"dropout": 0.1} if name == "gpt2" else {}))
        run = trainer(tmp_path, model, config, logging_steps=1, eval_strategy="steps", eval_steps=4, **settings)
        run.train()
        runs.append(run)
    plain, late = runs
    assert_same(weights_of(plain.model), late.late_phase.averaged_state_dict())
    assert training_logs(plain) == training_logs(late)


@pytest.mark.parametrize("weights", [["rank1"], ["norm"], ["rank1", "norm"]], ids="+".join)
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
def test_before_t0_a_run_is_that_with_one_member(tmp_path, weights: list[str], max_grad_norm: float) -> None:
    runs = []
    for K in (1, 5):
        torch.manual_seed(0)
        config = LatePhaseConfig(num_members=K, weights=weights, late_phase_start=11)
        run = trainer(
            tmp_path, gpt2(dropout=0.1), config, max_steps=12, logging_steps=1, max_grad_norm=max_grad_norm,
            weight_decay=0.1, gradient_accumulation_steps=2, extra={"callbacks": [StopAt(11)]},
        )  # fmt: skip
        run.train()
        runs.append(run)
    one, five = runs
    assert_same(one.late_phase.averaged_state_dict(), five.late_phase.averaged_state_dict())
    assert training_logs(one) == training_logs(five)


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def test_decay_goes_by_the_plain_names(tmp_path) -> None:
    model = gpt2()
    plain = set(Trainer.get_decay_parameter_names(trainer(tmp_path, model, None), model))
    plain &= {name for name, _ in model.named_parameters()}  # tied weights once
    decaying: set[str] = set()

    class Watch(TrainerCallback):
        def on_train_begin(
            self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **kwargs: Any
        ) -> None:
            names = {id(p): name for name, p in model.named_parameters()}
            for group in optimizer.param_groups:
                decaying.update(names[id(p)] for p in group["params"] if group["weight_decay"] == 0.1)

    config = LatePhaseConfig(num_members=2, weights=["rank1", "norm"], late_phase_start=0)
    run = trainer(tmp_path, model, config, weight_decay=0.1, max_steps=1, extra={"callbacks": [Watch()]})
    run.train()
    assert {run.late_phase.plain_name(name) for name in decaying} == plain
    assert any("ln_1" in name for name, _ in model.named_parameters())
    assert not any("ln_" in name or name.endswith(("left", "right")) for name in decaying)


# ---- T0 ----


def test_release_adds_noise_relative_to_the_rms(tmp_path) -> None:
    config = LatePhaseConfig(num_members=400, weights=["head"], init_noise=0.5)
    run = trainer(tmp_path, MODELS["llama"](), config)
    run.late_phase.attach()
    (stack,) = run.late_phase.stacks().values()
    shared = stack[0].detach().clone()
    run.late_phase.release(torch.Generator().manual_seed(3))
    noise = (stack.detach() - shared) / shared.square().mean().sqrt()
    assert noise.std().item() == pytest.approx(0.5, rel=0.01)
    assert noise.mean().item() == pytest.approx(0.0, abs=0.005)
    again = trainer(tmp_path, MODELS["llama"](), config)
    again.late_phase.attach()
    (other,) = again.late_phase.stacks().values()
    with torch.no_grad():
        other[0] = shared
    again.late_phase.release(torch.Generator().manual_seed(3))
    assert torch.equal(other, stack)


def test_members_part_at_t0_and_not_before(tmp_path) -> None:
    distances: list[float] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            distances.append(run.late_phase.distance_from_mean().item() if run.late_phase.released else 0.0)

    config = LatePhaseConfig(num_members=3, weights=["norm"], late_phase_start=0.45)
    run = trainer(tmp_path, gpt2(), config, max_steps=11, extra={"callbacks": [Watch()]})
    run.train()
    # ceil(0.45 * 11) = 5 plain steps, then cycles of 3 steps; the last one is applied at step 11.
    assert [d > 0 for d in distances] == [False] * 7 + [True] * 4


# ---- SWA and EMA ----


@pytest.mark.parametrize("kind", ["swa", "ema"])
def test_one_member_average_is_torchs(tmp_path, kind: str) -> None:
    """With one member this is plain SWA or EMA for a Trainer user, as torch's AveragedModel computes it."""
    torch.manual_seed(0)
    model = gpt2()
    settings = {"swa_start": 4, "swa_every": 2} if kind == "swa" else {"ema_decay": 0.7, "ema_start": 0}
    expected = AveragedModel(gpt2(), multi_avg_fn=get_swa_multi_avg_fn())

    class Average(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            if kind == "ema":
                n = state.global_step - 1
                expected.multi_avg_fn = get_ema_multi_avg_fn(min(0.7, (1 + n) / (10 + n)))
            if kind == "ema" or (state.global_step >= 4 and state.global_step % 2 == 0):
                expected.update_parameters(model)

    torch.manual_seed(0)
    plain = trainer(tmp_path, gpt2(), None, extra={"callbacks": [Average()]})
    plain.train()
    run = trainer(tmp_path, model, LatePhaseConfig(num_members=1, weights=["norm"], **settings))
    run.train()
    assert_same(weights_of(plain.model), weights_of(run.averaged_model(time_averaged=False)))
    assert_same(weights_of(run.averaged_model()), weights_of(model))
    for name, value in weights_of(expected.module).items():  # another kernel rounds otherwise
        assert torch.allclose(value, weights_of(model)[name], rtol=1e-6, atol=1e-7), name
    # Evaluated and saved, too.
    expected_loss = trainer(tmp_path, run.averaged_model(), None).evaluate()["eval_loss"]
    assert run.evaluate()["eval_loss"] == expected_loss
    run.save_model(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert_same(weights_of(run.averaged_model()), weights_of(saved))


def test_swa_averages_base_and_members_once_a_cycle(tmp_path) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            if state.global_step >= 6 and state.global_step % 3 == 0:
                seen.append({n: p.detach().clone() for n, p in model.named_parameters()})

    config = LatePhaseConfig(num_members=3, weights=["rank1", "norm"], late_phase_start=0, swa_start=6)
    run = trainer(tmp_path, gpt2(), config, max_steps=15, extra={"callbacks": [Watch()]})
    run.train()
    assert len(seen) == run.time_average.num_averaged == 4
    stacks = run.late_phase.stacks()
    assert any(name.endswith("left") for name in stacks) and any("ln_f" in name for name in stacks)
    for name, value in stacks.items():
        assert torch.allclose(value, torch.stack([s[name] for s in seen]).mean(0), atol=1e-6), name
    for name in ("transformer.wte.weight", "transformer.h.0.attn.c_attn.bias"):
        assert torch.allclose(run.model.state_dict()[name], torch.stack([s[name] for s in seen]).mean(0), atol=1e-6)


def test_ema_counts_training_steps_and_restarts_members_at_t0(tmp_path) -> None:
    config = LatePhaseConfig(num_members=3, weights=["norm"], late_phase_start=4, ema_decay=0.8, ema_start=0)
    run = trainer(tmp_path, gpt2(), config, max_steps=10)
    run.train()
    assert run.time_average.num_averaged == 4 + 2
    stack = run.late_phase.stacks()["transformer.ln_f.parametrizations.weight.original"]
    # All members averaged over the same history, none over its idle one.
    assert (stack[1] - 1).abs().max() > 0.2 * (stack[0] - 1).abs().max()
    assert not torch.equal(stack[0], stack[1])


# ---- evaluating ----


def test_evaluate_is_the_averaged_model_and_leaves_training_alone(tmp_path) -> None:
    results = []
    for evaluates in (False, True):
        torch.manual_seed(0)
        config = LatePhaseConfig(num_members=3, weights=["rank1", "norm"], late_phase_start=2, swa_start=5)
        run = trainer(tmp_path, gpt2(), config, eval_strategy="steps" if evaluates else "no", eval_steps=1)
        run.train()
        results.append(run)
    assert_same(results[0].late_phase.averaged_state_dict(), results[1].late_phase.averaged_state_dict())
    run = results[1]
    stock = trainer(tmp_path, run.averaged_model(), None)
    assert run.evaluate()["eval_loss"] == pytest.approx(stock.evaluate()["eval_loss"], abs=1e-6)


def test_outside_of_a_step_the_model_is_the_average(tmp_path) -> None:
    ids = Text(2).ids
    steps: list[int] = []

    class Look(TrainerCallback):
        @torch.no_grad()
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            steps.append(state.global_step)
            expected = run.averaged_model()(ids).logits
            assert torch.equal(model(ids).logits, expected)
            if state.global_step >= 3:
                run.late_phase.activate(0)
                assert not torch.equal(model(ids).logits, expected)

    config = LatePhaseConfig(num_members=3, weights=["norm"], late_phase_start=0)
    run = trainer(tmp_path, gpt2(), config, max_steps=6, extra={"callbacks": [Look()]})
    run.train()
    assert steps == [1, 2, 3, 4, 5, 6]


def test_evaluate_members_before_T0(tmp_path) -> None:
    """There is one member; the rows of the others still hold what training began with."""
    run = trainer(tmp_path, gpt2(), LatePhaseConfig(num_members=3, weights=["norm"]), max_steps=6)
    table = run.evaluate_members()
    assert list(table) == ["member_0", "average", "ensemble"]
    assert table["member_0"]["loss"] == pytest.approx(table["ensemble"]["loss"], abs=1e-6)


def test_evaluate_members(tmp_path) -> None:
    def accuracy(prediction: Any) -> dict[str, float]:
        return {"accuracy": float((prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]).mean())}

    config = LatePhaseConfig(num_members=3, weights=["norm"], late_phase_start=0, init_noise=0.5)
    run = trainer(tmp_path, gpt2(), config, max_steps=6, extra={"compute_metrics": accuracy})
    run.train()
    table = run.evaluate_members()
    assert isinstance(table, MemberTable)
    assert list(table) == ["member_0", "member_1", "member_2", "average", "ensemble"]
    ids = Text(12, seed=2).ids
    labels = ids[:, 1:].flatten()
    probabilities = []
    run.model.eval()
    with torch.no_grad(), run.late_phase.attached():
        for k in range(3):
            run.late_phase.activate(k)
            logits = run.model(ids).logits[:, :-1].flatten(0, 1)
            probabilities.append(logits.softmax(-1))
            loss = torch.nn.functional.cross_entropy(logits, labels).item()
            assert table[f"member_{k}"]["loss"] == pytest.approx(loss, abs=1e-5)
            accuracy = (logits.argmax(-1) == labels).float().mean().item()
            assert table[f"member_{k}"]["accuracy"] == pytest.approx(accuracy)
        mean = torch.stack(probabilities).mean(0)
    nll = -mean[torch.arange(len(labels)), labels].log().mean().item()
    assert table["ensemble"]["loss"] == pytest.approx(nll, abs=1e-5)
    assert table["ensemble"]["accuracy"] == pytest.approx((mean.argmax(-1) == labels).float().mean().item())
    assert len({round(row["loss"], 7) for row in table.values()}) == 5
    assert len(str(table).splitlines()) == 6 and "accuracy" in str(table)
    assert "eval_ensemble_loss" in run.state.log_history[-1]


def test_evaluate_members_of_a_class_whose_loss_type_is_not_set(tmp_path) -> None:
    model = gpt2()
    model.loss_type = None  # as transformers makes it
    run = trainer(tmp_path, model, LatePhaseConfig(num_members=2, weights=["norm"]))
    assert not run._loss_shifts_labels
    ids = Text(12, seed=2).ids
    with torch.no_grad():
        logits = run.model(ids).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
    assert run.evaluate_members()["average"]["loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("weights", [["rank1"], ["norm"], ["full"]], ids="+".join)
def test_floating_point_operations_are_those_of_the_plain_model(tmp_path, weights: list[str]) -> None:
    late = LatePhaseConfig(num_members=3, weights=weights)
    runs = [trainer(tmp_path, MODELS["llama"](), config) for config in (None, late)]
    for run in runs:
        run.train()
    assert runs[0].state.total_flos == runs[1].state.total_flos > 0


def test_logs_say_what_the_members_do(tmp_path) -> None:
    config = LatePhaseConfig(num_members=3, weights=["norm"], late_phase_start=3)
    run = trainer(tmp_path, gpt2(), config, max_steps=12, logging_steps=3, max_grad_norm=1.0)
    run.train()
    logs = [log for log in run.state.log_history if "learning_rate" in log]
    assert [log["late_phase"] for log in logs] == [0.0, 1.0, 1.0, 1.0]
    assert "member_loss_mean" not in logs[0]
    for log in logs[1:]:
        assert log["member_loss_mean"] == pytest.approx(log["loss"], abs=max(LOG_ERROR, 4e-5))
        assert log["member_loss_std"] > 0 and log["member_distance"] > 0
        norms = log["base_grad_norm"] ** 2 + log["member_grad_norm"] ** 2
        assert norms**0.5 == pytest.approx(log["grad_norm"], rel=1e-5)


# ---- saving ----


RELOAD = """
import json, sys
sys.modules["hf_latephase"] = None  # importing it raises
import torch
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], trust_remote_code=True, output_loading_info=True, dtype="auto"
)
ids = torch.tensor(json.loads(sys.argv[2]))
with torch.no_grad():
    logits = model.eval()(ids).logits
problems = {k: sorted(map(str, v)) for k, v in info.items() if v}
torch.save({"logits": logits, "problems": problems, "class": type(model).__name__}, sys.argv[3])
"""


@pytest.mark.parametrize(("name", "weights"), [
    ("gpt2", ["rank1", "norm"]), ("llama", ["rank1", "norm", "head"]), ("lstm", ["rank1", "head"]),
    ("llama", ["full"]),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("swa_start", [None, 4], ids=["plain", "swa"])
def test_saved_model_is_stock(tmp_path, name: str, weights: list[str], swa_start: int | None) -> None:
    model = MODELS[name]()
    config = LatePhaseConfig(num_members=3, weights=weights, late_phase_start=2, swa_start=swa_start)
    run = trainer(tmp_path / "run", model, config, max_steps=8)
    run.train()
    run.save_model(tmp_path / "saved")
    ids = Text(3).ids
    model.eval()
    with run._evaluated.applied(), run.late_phase.averaged(), torch.no_grad():
        expected = model(ids).logits
    (tmp_path / "reload.py").write_text(textwrap.dedent(RELOAD))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "reload.py", str(tmp_path / "saved"), json.dumps(ids.tolist()), "result.pt"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    assert result["problems"] == {}
    assert result["class"] == type(model).__name__
    assert (result["logits"] - expected).abs().max() < 1e-6
    assert LatePhaseConfig.from_pretrained(tmp_path / "saved") == config


def test_a_model_init_trainer_attaches_each_model(tmp_path) -> None:
    config = LatePhaseConfig(num_members=2, weights=["norm"], late_phase_start=2)
    run = LatePhaseTrainer(
        model_init=lambda: gpt2(), args=trainer(tmp_path, gpt2(), None, max_steps=4).args, late_phase_config=config,
        train_dataset=Text(16),
    )  # fmt: skip
    run.train()
    first = run.model
    run.train()
    assert run.model is not first and run.late_phase.model is run.model and run.late_phase.released


def test_training_again_goes_on_from_the_average(tmp_path) -> None:
    config = LatePhaseConfig(num_members=3, weights=["norm"], late_phase_start=0.5)
    run = trainer(tmp_path, gpt2(), config, max_steps=8)
    run.train()
    before = run.late_phase.averaged_state_dict()
    run._begin_training()
    assert not run.late_phase.released
    assert_same({k: v.clone() for k, v in before.items()}, run.late_phase.averaged_state_dict())
    run.train()
    assert run.late_phase.released


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("save_only_model", [False, True])
def test_best_model(tmp_path, K: int, save_only_model: bool) -> None:
    scores = iter([3.0, 1.0, 2.0, 4.0])

    config = LatePhaseConfig(num_members=K, weights=["rank1", "norm"], late_phase_start=2)
    run = trainer(
        tmp_path, gpt2(), config, max_steps=12, eval_strategy="steps", eval_steps=3, save_strategy="steps",
        save_steps=3, load_best_model_at_end=True, save_total_limit=1, save_only_model=save_only_model,
        metric_for_best_model="score", greater_is_better=False,
        extra={"compute_metrics": lambda prediction: {"score": next(scores, 9.0)}},
    )  # fmt: skip
    run.train()
    losses = {log["step"]: log["eval_loss"] for log in run.state.log_history if "eval_loss" in log}
    assert run.state.best_global_step == 6 and losses[6] != losses[12]
    assert run.evaluate()["eval_loss"] == pytest.approx(losses[6], abs=1e-6)
    reloaded = AutoModelForCausalLM.from_pretrained(run.state.best_model_checkpoint)
    for key, value in run.late_phase.averaged_state_dict().items():
        assert torch.allclose(value, reloaded.state_dict()[key], atol=1e-7), key
    assert len([f for f in os.listdir(tmp_path) if f.startswith("checkpoint")]) == 1
    run.train()
