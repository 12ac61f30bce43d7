"""
What only a GPU shows (`make test-gpu`; skipped where there is none).

One GPU has to do: FSDP2 runs with one process, by NCCL.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import TrainerCallback

from costs import peak_memory
from hf_latephase import LatePhaseConfig
from hf_latephase.models import WideResNetConfig, WideResNetForImageClassification
from test_algorithm1 import follow
from test_distributed import SHARDED, SHARDED_ARGUMENTS, accelerate, launch
from test_distributed import assert_close as assert_weights_close
from test_resume import check_resume
from test_switches import Changes, Overflowing, losses
from tiny import DEVICE_VARIABLE, MODELS, gpt2, lstm, trainer
from workloads import Setting


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def _on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEVICE_VARIABLE, "cuda")


def config(num_members: int = 3, weights: list[str] | None = None, **kwargs: Any) -> LatePhaseConfig:
    settings = {"late_phase_start": 2, **kwargs}
    return LatePhaseConfig(num_members=num_members, weights=weights or ["rank1", "norm"], **settings)


def trained(folder: Any, model: Any, late: LatePhaseConfig | None, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    run = trainer(folder, model(), late, **{"logging_steps": 1, "learning_rate": 5e-3, **kwargs})
    run.train()
    return run


# ---- the algorithm ----


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("name", "weights"), [
    ("gpt2", ["rank1", "norm"]), ("lstm", ["rank1", "head"]), ("convnet", ["hypernet", "norm"]),
    ("convnet", ["norm", "head"]),
], ids=["gpt2", "lstm", "hypernet", "batch norm"])  # fmt: skip
def test_a_gpu_follows_the_reference_on_a_cpu(tmp_path, name: str, weights: list[str], fused: bool) -> None:
    """cuBLAS, cuDNN and the fused AdamW, in float64."""
    optimizer = (torch.optim.AdamW, {"lr": 1e-3, "betas": (0.9, 0.95), "fused": fused})
    follow(tmp_path, name, weights, accumulation=1, optimizer=optimizer, cycles=20)


# ---- what training costs ----


class Waits(TrainerCallback):
    """Counts the operations that wait for the GPU in each of Trainer's steps, but for the first few."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= 4:
            self._caught = warnings.catch_warnings(record=True)
            self._messages = self._caught.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > 4:
            torch.cuda.set_sync_debug_mode("default")
            self._caught.__exit__(None, None, None)
            self.counts.append(sum("synchronizing CUDA operation" in str(m.message) for m in self._messages))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("averaged", [{}, {"swa_start": 2}, {"ema_decay": 0.9}], ids=["no average", "swa", "ema"])
def test_no_step_waits_for_the_gpu_where_trainer_does_not(
    tmp_path, name: str, accumulation: int, averaged: Any
) -> None:
    weights = ["norm", "head"] if name == "convnet" else ["rank1", "norm"] if name != "lstm" else ["rank1"]
    counts = []
    for late in (None, config(weights=weights, **averaged)):
        waits = Waits()
        trained(
            tmp_path, MODELS[name], late, max_steps=11, gradient_accumulation_steps=accumulation, rows=240,
            max_grad_norm=1.0, logging_steps=100, extra={"callbacks": [waits]}, logging_nan_inf_filter=False,
        )  # fmt: skip
        counts.append(waits.counts)
    plain, late = counts
    assert len(late) == 7
    assert late == plain


@pytest.mark.parametrize("one_step", [True, False])
def test_peak_memory_is_that_of_plain_training(one_step: bool) -> None:
    """Inside a cycle of several steps the gradients stay."""
    setting = Setting("gpt2 4x256", ("norm",), one_step=one_step)
    peak_memory(setting, False, "cuda")  # cuBLAS's workspace, once
    plain, late = (peak_memory(setting, side, "cuda") for side in (False, True))
    assert late / plain < (1.02 if one_step else 1.25)


# ---- precision ----


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["gpt2", "lstm"])
def test_mixed_precision(tmp_path, name: str, precision: str) -> None:
    late = config(weights=["rank1"])
    exact = trained(tmp_path / "float32", MODELS[name], late)
    mixed = trained(tmp_path / precision, MODELS[name], late, **{precision: True})
    assert losses(mixed) == pytest.approx(losses(exact), rel=0.02)
    assert losses(mixed) != losses(exact)
    assert {p.dtype for p in mixed.model.parameters()} == {torch.float32}
    assert mixed.evaluate()["eval_loss"] == pytest.approx(exact.evaluate()["eval_loss"], rel=0.02)


def test_an_overflow_in_fp16_skips_the_whole_cycle(tmp_path) -> None:
    class AtFive(Overflowing):
        overflow_at = 5

    changes = Changes()
    run = trained(
        tmp_path, gpt2, config(late_phase_start=0), trainer_class=AtFive, max_steps=9, fp16=True,
        extra={"callbacks": [changes]},
    )  # fmt: skip
    # Cycles end at steps 3, 6 and 9; the one that ends at 6 is dropped and halves the scale.
    assert changes.steps() == [False, True, False, False, False, False, False, True]
    assert run.accelerator.scaler.get_scale() == 2.0**15


@pytest.mark.parametrize("precision", [{"bf16": True}, {"fp16": True}], ids=["bf16", "fp16"])
@pytest.mark.parametrize("save_at", [3, 7])
@pytest.mark.parametrize("model", [gpt2, lstm], ids=["gpt2", "lstm"])
def test_a_run_in_mixed_precision_resumes_to_the_bit(tmp_path, model: Any, precision: Any, save_at: int) -> None:
    """With dropout, whose masks the GPU draws; inside a cycle the gradients that are held are still scaled."""
    late = config(4, ["rank1"], late_phase_start=5)
    check_resume(tmp_path, model, late, save_at, learning_rate=5e-3, **precision)


# ---- torch.compile ----


def test_compiled_by_inductor(tmp_path) -> None:
    """One graph for all members."""
    # With T0 later Trainer counts targets before it, which is a graph of its own.
    settings = {"max_steps": 6, "optim": "sgd", "learning_rate": 0.05}
    graphs = []
    for members in (3, 6):
        late = config(members, init_noise=0.3, late_phase_start=0)
        eager = trained(tmp_path / "eager", gpt2, late, **settings)
        torch._dynamo.reset()
        counters.clear()
        run = trained(tmp_path / "compiled", gpt2, late, torch_compile=True, **settings)
        graphs.append(counters["stats"]["unique_graphs"])
        assert losses(run) == pytest.approx(losses(eager), abs=1e-5)
        expected = eager.late_phase.averaged_state_dict()
        for key, value in run.late_phase.averaged_state_dict().items():
            assert torch.allclose(value, expected[key], rtol=0, atol=1e-5), key
    assert graphs[0] == graphs[1] > 0


@pytest.mark.parametrize("accumulation", [1, 3])
def test_cuda_graphs_do_not_overwrite_the_gradients_of_a_cycle(tmp_path, accumulation: int) -> None:
    """Where plain Trainer accumulates, it ends in an error (torch 2.11)."""
    settings = {"max_steps": 12, "optim": "sgd", "gradient_accumulation_steps": accumulation, "rows": 240}
    late = config(late_phase_start=0)
    eager = trained(tmp_path, gpt2, late, **settings)
    torch._dynamo.reset()
    replayed = trained(tmp_path, gpt2, late, torch_compile=True, torch_compile_mode="reduce-overhead", **settings)
    assert losses(replayed) == pytest.approx(losses(eager), abs=1e-4)


# ---- images ----


class Images(torch.utils.data.Dataset):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randn(64, 3, 32, 32, generator=generator)
        self.labels = torch.randint(0, 10, (64,), generator=generator)

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


@pytest.mark.parametrize("statistics", ["running", "recomputed"])
@pytest.mark.parametrize("assignment", ["minibatch", "sample"])
def test_wide_resnet_in_bf16_and_channels_last(tmp_path, assignment: str, statistics: str) -> None:
    def model() -> Any:
        made = WideResNetForImageClassification(WideResNetConfig(depth=10, widen_factor=1, num_labels=10))
        return made.to(memory_format=torch.channels_last)

    late = config(4, ["norm", "head"], member_assignment=assignment, batch_norm_statistics=statistics, swa_start=4)
    runs = []
    for precision in ({}, {"bf16": True}):
        torch.manual_seed(0)
        settings = {"per_device_train_batch_size": 16, "logging_steps": 1, "learning_rate": 5e-3, **precision}
        run = trainer(tmp_path, model(), late, **settings)
        run.train_dataset = run.eval_dataset = Images()
        run.train()
        runs.append(run)
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=0.05)
    run = runs[1]
    table = run.evaluate_members()
    assert table["average"]["loss"] == pytest.approx(run.evaluate()["eval_loss"], rel=1e-3)
    run.save_model(str(tmp_path / "saved"))
    stock = WideResNetForImageClassification.from_pretrained(tmp_path / "saved").eval()
    pixels = Images().pixels
    with torch.no_grad():
        ours, theirs = run.averaged_model().eval()(pixels.cuda()).logits, stock(pixels).logits
    assert torch.allclose(ours.cpu(), theirs, atol=1e-3)


# ---- sharding ----


def test_fsdp2_on_nccl(tmp_path) -> None:
    """One process, whose shards are whole."""
    task = SHARDED | {"arguments": SHARDED_ARGUMENTS}
    alone = launch(tmp_path, "alone", None, **task)
    sharded = launch(tmp_path, "sharded", [*accelerate("fsdp2.yaml"), "--num_processes=1"], **task, world_size=1)
    assert sharded["sharded"]
    assert_weights_close(sharded["weights"], alone["weights"], 1e-10)
    assert sharded["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    for ours, theirs in zip(sharded["logs"], alone["logs"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
