"""Precision, speed and data switches of TrainingArguments: what they do to late-phase training."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch._dynamo.utils import counters
from transformers import Trainer, TrainerCallback

from hf_latephase import LatePhaseConfig, LatePhaseTrainer
from hf_latephase.compat import LOOP_HAS_HOOKS
from test_trainer_behaviours import OutOfMemory, Ragged, Stream, pad
from tiny import CHECKPOINTING, MODELS, Text, gpt2, llama, trainer


WEIGHTS = {"gpt2": ["rank1", "norm"], "llama": ["rank1", "norm", "head"]}


def config(K: int = 3, weights: Any = ("rank1", "norm"), **kwargs: Any) -> LatePhaseConfig:
    return LatePhaseConfig(num_members=K, weights=list(weights), **{"late_phase_start": 0, **kwargs})


def with_dataset(train_dataset: Any, collator: Any = None) -> type:
    """LatePhaseTrainer on other data than `tiny.trainer` gives it."""

    class Own(LatePhaseTrainer):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**{**kwargs, "train_dataset": train_dataset, "data_collator": collator})

    return Own


def trained(folder: Any, name: str = "gpt2", late: Any = None, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    run = trainer(folder, MODELS[name](), late or config(weights=WEIGHTS[name]), logging_steps=1, **kwargs)
    run.train()
    return run


def losses(run: Any) -> list[float]:
    return [log["loss"] for log in run.state.log_history if "loss" in log]


def weights_of(run: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.late_phase.model.named_parameters()}


def assert_close(left: Any, right: Any, atol: float) -> None:
    left, right = weights_of(left), weights_of(right)
    assert list(left) == list(right)
    for name, value in left.items():
        assert torch.allclose(value, right[name], rtol=0, atol=atol), name


class Gradients(TrainerCallback):
    """Keeps the gradients that the optimizer is about to use, and changes no weight."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self.seen.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


# ---- precision ----


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("assignment", ["minibatch", "sample"])
def test_bf16_autocast(tmp_path, name: str, assignment: str) -> None:
    late = config(4, WEIGHTS[name], member_assignment=assignment)
    settings = {"max_steps": 12, "learning_rate": 5e-3, "save_strategy": "steps", "save_steps": 6}
    exact = trained(tmp_path / "float32", name, late, **settings)
    dtypes = []
    hooked = MODELS[name]()
    hooked.get_output_embeddings().register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    torch.manual_seed(0)
    half = trained(tmp_path / "bf16", name, late, bf16=True, **settings)
    probe = trainer(tmp_path / "probe", hooked, late, bf16=True, max_steps=1)
    probe.train()
    assert set(dtypes) == {torch.bfloat16}
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    # The averaged model is a stock model, which computes in the dtype of its weights.
    stock, ids = half.averaged_model().eval(), Text(4).ids
    reloaded = type(stock)(stock.config).eval()
    reloaded.load_state_dict(stock.state_dict())
    assert torch.equal(stock(ids).logits, reloaded(ids).logits)
    assert losses(half) == pytest.approx(losses(exact), rel=0.02)
    assert any(not torch.equal(value, weights_of(exact)[key]) for key, value in weights_of(half).items())
    torch.manual_seed(1)
    resumed = trainer(tmp_path / "resumed", MODELS[name](), late, bf16=True, logging_steps=1, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "bf16" / "checkpoint-6"))
    assert_close(half, resumed, 0.0)
    assert losses(half) == losses(resumed)


def test_fp16_is_refused_on_a_cpu_alike(tmp_path) -> None:
    """What Trainer says of fp16 without a GPU, LatePhaseTrainer says too."""
    messages = []
    for late in (None, config()):
        try:
            trainer(tmp_path, gpt2(), late, fp16=True, max_steps=2).train()
            messages.append("")
        except (ValueError, RuntimeError) as error:
            messages.append(str(error))
    assert messages[0] == messages[1]


class Half(Accelerator):
    """Says that it trains in fp16."""

    mixed_precision = "fp16"


class Overflowing(LatePhaseTrainer):
    """Its step number `overflow_at` finds an infinity."""

    overflow_at: int | None = None

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        if self.overflow_at == self.state.global_step:
            next(p for p in self.model.parameters() if p.grad is not None).grad.fill_(float("inf"))
        return loss


class Changes(TrainerCallback):
    """Tells in which of Trainer's steps, after the first, a parameter changed."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self.seen.append({n: p.detach().clone() for n, p in model.named_parameters()})

    def steps(self) -> list[bool]:
        return [any(not torch.equal(a[n], b[n]) for n in a) for a, b in itertools.pairwise(self.seen)]


class Scaled(Overflowing):
    """Trains with a gradient scaler, as fp16 on a GPU does."""

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
        return super()._inner_training_loop(*args, **kwargs)

    def _begin_training(self) -> None:
        # After the model was prepared, so that it goes on computing in float32.
        self.accelerator.__class__ = Half
        self.accelerator.native_amp = True
        super()._begin_training()


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.1])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("start", [0, 4])
def test_a_gradient_scaler_changes_nothing(tmp_path, max_grad_norm: float, accumulation: int, start: int) -> None:
    """Scaled by a power of two: gradients held over several steps are unscaled once."""
    settings = {
        "max_steps": 10, "max_grad_norm": max_grad_norm, "gradient_accumulation_steps": accumulation, "optim": "sgd",
    }  # fmt: skip
    late = config(late_phase_start=start)
    plain = trained(tmp_path / "plain", late=late, **settings)
    scaled = trained(tmp_path / "scaled", late=late, trainer_class=Scaled, **settings)
    assert scaled.accelerator.scaler.get_scale() == 1024.0
    assert_close(plain, scaled, 1e-6)
    assert losses(plain) == pytest.approx(losses(scaled), abs=1e-6)
    norms = [[log["grad_norm"] for log in run.state.log_history if "grad_norm" in log] for run in (plain, scaled)]
    assert norms[0] == pytest.approx(norms[1], abs=1e-5)
    assert bool(norms[0]) == bool(max_grad_norm or LOOP_HAS_HOOKS)  # else Trainer logs none


def test_an_overflow_skips_the_whole_cycle(tmp_path) -> None:
    class AtFive(Scaled):
        overflow_at = 5

    changes = Changes()
    late = config(late_phase_start=0)
    run = trained(tmp_path, late=late, trainer_class=AtFive, max_steps=9, extra={"callbacks": [changes]})
    # Cycles end at steps 3, 6 and 9; the one that ends at 6 is dropped and halves the scale.
    assert changes.steps() == [False, True, False, False, False, False, False, True]
    assert run.accelerator.scaler.get_scale() == 512.0
    assert run.cycle.rounds == 0 and run.cycle.step == 0


# ---- memory and speed ----


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("assignment", ["minibatch", "sample"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(tmp_path, name: str, assignment: str, reentrant: bool) -> None:
    late = config(4, WEIGHTS[name], member_assignment=assignment, init_noise=0.3)
    found = []
    for settings in ({}, {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": reentrant}}):
        gradients = Gradients()
        run = trained(
            tmp_path, name, late, max_steps=4, learning_rate=0.0, extra={"callbacks": [gradients]}, **settings
        )
        assert getattr(run.model, f"is_{CHECKPOINTING}") == bool(settings)
        found.append(gradients.seen[-1])
    assert list(found[0]) == list(found[1])
    for key, value in found[0].items():
        assert torch.allclose(value, found[1][key], rtol=0, atol=1e-6), key
    stacks = [value for key, value in found[0].items() if run.late_phase.is_late_phase(key)]
    assert all(row.abs().max() > 0 for stack in stacks for row in stack)


def compiled(folder: Any, late: Any, name: str = "gpt2", **kwargs: Any) -> tuple[Any, dict[str, int]]:
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    kwargs = {"logging_steps": 1, "torch_compile": True, "torch_compile_backend": "aot_eager", **kwargs}
    run = trainer(folder, MODELS[name](), late, **kwargs)
    run.train()
    counts = {
        "frames": counters["frames"]["ok"],
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
        "recompiles": sum(counters["recompiles"].values()) if "recompiles" in counters else 0,
    }
    return run, counts


@pytest.mark.parametrize("name", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_compiled_members_share_one_graph(tmp_path, name: str) -> None:
    """Two or eight members compile as often as the plain model, whose graph is no more broken."""
    _, plain = compiled(tmp_path, None, name, max_steps=9)
    counts = {K: compiled(tmp_path, config(K, WEIGHTS[name]), name, max_steps=9)[1] for K in (2, 8)}
    assert plain["graphs"] > 0
    assert counts[2] == counts[8]
    assert counts[8]["graphs"] == plain["graphs"] and counts[8]["breaks"] == plain["breaks"]


def test_compiled_equals_eager(tmp_path) -> None:
    settings = {"max_steps": 8, "learning_rate": 1e-3, "eval_strategy": "steps", "eval_steps": 4}
    eager = trained(tmp_path, **settings)
    run, _ = compiled(tmp_path, config(), **settings)
    assert run.model_wrapped is not run.model
    assert losses(run) == pytest.approx(losses(eager), abs=1e-6)
    assert_close(run, eager, 1e-5)
    assert run.evaluate()["eval_loss"] == pytest.approx(eager.evaluate()["eval_loss"], abs=1e-6)


@pytest.mark.slow
def test_compiled_evaluation_adds_its_own_graph_once(tmp_path) -> None:
    settings = {"max_steps": 6, "eval_strategy": "steps"}
    _, plain_once = compiled(tmp_path, None, eval_steps=3, **settings)
    _, once = compiled(tmp_path, config(), eval_steps=3, **settings)
    _, often = compiled(tmp_path, config(), eval_steps=1, **settings)
    assert once == often
    assert once["graphs"] <= plain_once["graphs"] + 1


@pytest.mark.slow
def test_t0_compiles_once_again(tmp_path) -> None:
    """From T0 on the model averages its loss itself: Trainer's `num_items_in_batch` is no input any more."""
    _, from_start = compiled(tmp_path, config(), max_steps=8)
    _, later = compiled(tmp_path, config(late_phase_start=4), max_steps=8)
    assert later["graphs"] == from_start["graphs"] + 1
    assert later["breaks"] == from_start["breaks"]


def test_explained_graph_breaks(tmp_path) -> None:
    ids = Text(2).ids
    counts = []
    for late in (None, config()):
        run = trainer(tmp_path, gpt2(), late)
        if late is not None:
            run.late_phase.attach()
            run.late_phase.activate(1)
        torch._dynamo.reset()
        explained = torch._dynamo.explain(run.model)(input_ids=ids, labels=ids)
        counts.append((explained.graph_break_count, explained.graph_count))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("step", [2, 9])
def test_auto_find_batch_size_releases_once(tmp_path, step: int) -> None:
    """Out of memory before or after T0: training starts over with smaller batches, from the shared values."""
    failing = OutOfMemory(step)
    released: list[int] = []

    class Counting(LatePhaseTrainer):
        def _begin_step(self) -> None:
            before = self.late_phase.released
            super()._begin_step()
            if self.late_phase.released and not before:
                released.append(self.state.global_step)

    run = trained(
        tmp_path, late=config(4, late_phase_start=6), trainer_class=Counting, max_steps=12, rows=24,
        per_device_train_batch_size=8, auto_find_batch_size=True, extra={"callbacks": [failing]},
    )  # fmt: skip
    assert len(failing.batch_sizes) == 2 and failing.batch_sizes[1] < 8
    assert released == ([6] if step < 6 else [6, 6])
    assert run.state.global_step == 12 and run.cycle.rounds == 0
    assert run.late_phase.distance_from_mean() > 0 and math.isfinite(losses(run)[-1])


def test_auto_find_batch_size_keeps_a_resumed_run(tmp_path) -> None:
    """Out of memory in the first step after resuming inside the late phase: the members must not become one."""
    settings: dict[str, Any] = {"max_steps": 12, "save_strategy": "steps", "save_steps": 6, "rows": 96}
    late = config(3, late_phase_start=0)
    first = trained(tmp_path, late=late, auto_find_batch_size=True, **settings)
    assert first.state.global_step == 12
    distances: list[float] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            distances.append(run.late_phase.distance_from_mean().item())

    run = trainer(
        tmp_path, gpt2(), late, auto_find_batch_size=True, extra={"callbacks": [Watch(), OutOfMemory(6)]}, **settings
    )
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert run.state.global_step == 12 and run._train_batch_size < 4
    assert min(distances) > 0


# ---- losses and data ----


def _explicit(
    model: Any, batches: list[Any], late: LatePhaseConfig, smoothing: float = 0.0
) -> dict[str, torch.Tensor]:
    """Algorithm 1's gradients of one cycle, computed by hand: member k on minibatch k, base gradients summed."""
    torch.manual_seed(0)
    run = LatePhaseTrainer(model=model, args=trainer("unused", gpt2(), None).args, late_phase_config=late)
    run.late_phase.attach()
    run.late_phase.release()
    run.model.train()
    for k, batch in enumerate(batches):
        run.late_phase.activate(k % late.num_members)
        logits = run.model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
        share = len(batches) // late.num_members
        loss = nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), label_smoothing=smoothing)
        (loss / share).backward()
    return {n: p.grad for n, p in run.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("accumulation", [1, 3, 6])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("model", [gpt2, llama])
def test_each_member_sees_the_mean_loss_of_its_own_minibatch(
    tmp_path, monkeypatch: pytest.MonkeyPatch, accumulation: int, smoothing: float, model: Any
) -> None:
    """Minibatches hold unequal numbers of targets; `num_items_in_batch` would weigh them by those."""
    monkeypatch.chdir(tmp_path)
    rows = Ragged(24)
    late = config(3, ["norm"], init_noise=0.0, base_gradient_scale=1.0)
    batches = [pad([rows[i] for i in range(4 * b, 4 * b + 4)]) for b in range(max(3, accumulation))]
    targets = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    assert len(set(targets)) > 1
    torch.manual_seed(0)
    expected = _explicit(model(), batches, late, smoothing)
    gradients = Gradients()
    torch.manual_seed(0)
    run = trainer(
        tmp_path, model(), late, trainer_class=with_dataset(rows, pad), max_steps=max(1, 3 // accumulation),
        gradient_accumulation_steps=accumulation, label_smoothing_factor=smoothing, learning_rate=0.0,
        extra={"callbacks": [gradients]},
    )  # fmt: skip
    run.train()
    assert list(gradients.seen[-1]) == list(expected)
    for name, value in gradients.seen[-1].items():
        assert torch.allclose(value, expected[name], atol=1e-6), name


def test_iterable_dataset_cycles_cross_its_end(tmp_path) -> None:
    """Ten rows are three minibatches, the last one short: cycles of four steps go on over the epochs' ends."""
    changed: list[int] = []
    before: dict[str, torch.Tensor] = {}

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            now = {n: p.detach().clone() for n, p in model.named_parameters()}
            if before and any(not torch.equal(now[n], before[n]) for n in now):
                changed.append(state.global_step)
            before.update(now)

    trained(
        tmp_path, late=config(4), trainer_class=with_dataset(Stream()), max_steps=10, extra={"callbacks": [Watch()]}
    )
    assert changed == [4, 8, 10]


def test_neftune_noise_is_trainers(tmp_path) -> None:
    """The same draws as Trainer's, in training only; the hook goes with training."""
    runs = []
    for late in (None, config(1, ["norm"]), config(3, ["norm"])):
        torch.manual_seed(0)
        run = trainer(tmp_path, gpt2(), late, max_steps=3, logging_steps=1, neftune_noise_alpha=5.0, learning_rate=0.0)
        quiet = run.evaluate()["eval_loss"]
        run.train()
        assert run.evaluate()["eval_loss"] == quiet
        assert not run.model.get_input_embeddings()._forward_hooks
        runs.append(losses(run))
    assert runs[0] == runs[1]
    assert runs[2] == pytest.approx(runs[0], abs=1e-5)
    without = trained(tmp_path, late=config(3, ["norm"]), max_steps=3, learning_rate=0.0)
    assert runs[2] != pytest.approx(losses(without), abs=1e-5)


def test_label_smoothing_in_evaluation_is_trainers(tmp_path) -> None:
    run = trained(tmp_path, max_steps=3, label_smoothing_factor=0.2)
    stock = trainer(tmp_path, run.averaged_model(), None, label_smoothing_factor=0.2)
    assert isinstance(stock, Trainer)
    assert run.evaluate()["eval_loss"] == pytest.approx(stock.evaluate()["eval_loss"], abs=1e-6)
