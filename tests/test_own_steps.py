"""Trainers and models of users' own: training steps, losses, collators, timm's models, plain modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_other_trainers import config
from tiny import VOCAB, Text, arguments, llama, trainer
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import DataCollatorWithFlattening, LlamaForCausalLM, Trainer

from hf_latephase import LatePhaseConfig
from hf_latephase.trainer import LatePhaseMixin


class OwnStep(Trainer):
    """Computes its loss and backpropagates by itself, as trainers with two losses or adversarial steps do."""

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        model.train()
        inputs = self._prepare_inputs(inputs)
        loss = model(**inputs).loss / self.current_gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()


class OwnLoss(Trainer):
    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(input_ids=inputs["input_ids"])
        loss = nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
        return (loss, outputs) if return_outputs else loss


def own_function(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    targets = labels[:, 1:].flatten()
    total = nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), targets, reduction="sum")
    return total / (len(targets) if num_items_in_batch is None else num_items_in_batch)


TRAINERS: dict[str, tuple[type[Trainer], dict[str, Any]]] = {
    "training_step": (OwnStep, {}),
    "compute_loss": (OwnLoss, {}),
    "compute_loss_func": (Trainer, {"compute_loss_func": own_function}),
    "flattening": (Trainer, {"data_collator": DataCollatorWithFlattening()}),
}


class Rows(Text):
    """Rows as lists, which collators join."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.ids[index].tolist(), "labels": self.ids[index].tolist()}


def build(kind: str, folder: Path, late: LatePhaseConfig | None, model: Any = None, **kwargs: Any) -> Any:
    stock, extra = TRAINERS[kind]
    torch.manual_seed(0)
    data = Rows if kind == "flattening" else Text
    own = {} if late is None else {"late_phase_config": late}
    return (stock if late is None else type("Own", (LatePhaseMixin, stock), {}))(
        model=model or llama(attn_implementation="eager" if kind != "flattening" else "sdpa"),
        args=arguments(folder, **{"max_steps": 6, "learning_rate": 0.02, "logging_steps": 1, **kwargs}),
        train_dataset=data(24), eval_dataset=data(8, seed=2), **extra, **own,
    )  # fmt: skip


@pytest.mark.parametrize("steps", [1, 3], ids=["several_steps", "one_step"])
@pytest.mark.parametrize("kind", TRAINERS)
def test_members(tmp_path, kind: str, steps: int) -> None:
    late = config(3, ["norm", "rank1"], init_noise=0.3)
    run = build(kind, tmp_path / "a", late, gradient_accumulation_steps=steps)
    run.train()
    assert run.late_phase.distance_from_mean() > 0
    run.save_model(tmp_path / "saved")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    stock = build(kind, tmp_path / "b", None, loaded)
    assert run.evaluate()["eval_loss"] == pytest.approx(stock.evaluate()["eval_loss"], abs=1e-6)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind", TRAINERS)
def test_one_member_is_the_stock_trainer_to_the_bit(tmp_path, kind: str, steps: int) -> None:
    plain = build(kind, tmp_path, None, gradient_accumulation_steps=steps)
    late = build(kind, tmp_path, config(1, late_phase_start=0), gradient_accumulation_steps=steps)
    plain.train()
    late.train()
    averaged = late.late_phase.averaged_state_dict()
    assert all(torch.equal(averaged[key], value) for key, value in plain.model.state_dict().items())


@pytest.mark.parametrize("kind", TRAINERS)
def test_three_steps_are_the_cycle_that_one_step_of_three_is(tmp_path, kind: str) -> None:
    """However the loss was computed, a minibatch weighs as much."""
    ends = []
    for steps in (1, 3):
        run = build(
            kind, tmp_path, config(3, ["norm"], late_phase_start=0), gradient_accumulation_steps=steps,
            max_steps=6 // steps, optim="sgd",
        )  # fmt: skip
        run.train()
        ends.append(run.late_phase.averaged_state_dict())
    for key, value in ends[0].items():
        assert torch.allclose(value, ends[1][key], rtol=1e-5, atol=1e-7), key


# ---- models that know nothing of transformers ----


class Named(nn.Module):
    """Returns a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(VOCAB, 16), nn.LayerNorm(16), nn.Linear(16, VOCAB)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(self.norm(self.embed(input_ids)))
        if labels is None:
            return {"logits": logits}
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


class Paired(Named):
    """Returns a tuple."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        return tuple(super().forward(input_ids, labels).values())


@pytest.mark.parametrize("model", [Named, Paired])
@pytest.mark.parametrize("steps", [1, 3], ids=["several_steps", "one_step"])
def test_a_plain_module(tmp_path, model: type[nn.Module], steps: int) -> None:
    torch.manual_seed(0)
    late = config(3, ["norm"], init_noise=0.3)
    run = trainer(tmp_path, model(), late, max_steps=6, gradient_accumulation_steps=steps)
    run.train()
    assert run.late_phase.distance_from_mean() > 0
    run.save_model(tmp_path / "saved")
    loaded = model()
    loaded.load_state_dict(load_file(tmp_path / "saved" / "model.safetensors"))
    stock = trainer(tmp_path, loaded, None)
    assert run.evaluate()["eval_loss"] == pytest.approx(stock.evaluate()["eval_loss"], abs=1e-6)


@pytest.mark.parametrize("model", [Named, Paired])
def test_a_plain_module_with_one_member_is_trained_to_the_bit(tmp_path, model: type[nn.Module]) -> None:
    ends = []
    for late in (None, config(1, late_phase_start=0)):
        torch.manual_seed(0)
        run = trainer(tmp_path, model(), late, max_steps=6)
        run.train()
        ends.append(run.model.state_dict() if late is None else run.late_phase.averaged_state_dict())
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


# ---- timm ----


class Images(Dataset):
    def __init__(self, rows: int, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.pixels = torch.randn(rows, 3, 32, 32, generator=generator)
        self.labels = torch.randint(0, 4, (rows,), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.pixels[index], "labels": self.labels[index]}


def logits_loss(logits: Tensor, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return nn.functional.cross_entropy(logits, labels)


def timm_model() -> nn.Module:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, num_classes=4, depth=2, embed_dim=24, num_heads=2
    )  # fmt: skip


class TimmTrainer(Trainer):
    """timm's models take images and return logits."""

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        logits = model(inputs["x"])
        loss = logits_loss(logits, inputs["labels"])
        return (loss, {"logits": logits}) if return_outputs else loss


def timm_run(folder: Path, late: LatePhaseConfig | None, model: nn.Module | None = None, **kwargs: Any) -> Any:
    own = {} if late is None else {"late_phase_config": late}
    args = arguments(
        folder, max_steps=6, learning_rate=0.01, remove_unused_columns=False, label_names=["labels"], **kwargs
    )
    return (TimmTrainer if late is None else type("LateTimm", (LatePhaseMixin, TimmTrainer), {}))(
        model=model or timm_model(), args=args, train_dataset=Images(24),
        eval_dataset=Images(8, seed=2), **own,
    )  # fmt: skip


@pytest.mark.parametrize("steps", [1, 3], ids=["several_steps", "one_step"])
def test_timm(tmp_path, steps: int) -> None:
    run = timm_run(tmp_path, config(3, ["norm", "rank1"], init_noise=0.3), gradient_accumulation_steps=steps)
    run.train()
    assert run.late_phase.distance_from_mean() > 0
    run.save_model(tmp_path / "saved")
    loaded = timm_model()
    loaded.load_state_dict(load_file(tmp_path / "saved" / "model.safetensors"))
    stock = timm_run(tmp_path, None, loaded)
    assert run.evaluate()["eval_loss"] == pytest.approx(stock.evaluate()["eval_loss"], abs=1e-6)


def test_timm_with_one_member_is_trained_to_the_bit(tmp_path) -> None:
    plain, late = timm_run(tmp_path, None), timm_run(tmp_path, config(1, late_phase_start=0))
    plain.train()
    late.train()
    averaged = late.late_phase.averaged_state_dict()
    assert all(torch.equal(averaged[key], value) for key, value in plain.model.state_dict().items())
