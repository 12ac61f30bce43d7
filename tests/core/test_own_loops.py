"""What users put into Trainer themselves: their losses, their training steps, models that are not transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DataCollatorWithFlattening, Trainer, TrainerCallback

from hf_latephase import LatePhaseConfig
from hf_latephase.training.trainer import LatePhaseMixin
from tiny import VOCAB, Text, gpt2, llama, trainer


def late(K: int = 3, start: float = 0, **kwargs: Any) -> LatePhaseConfig:
    """The base sums its members' gradients, as in the paper."""
    settings = {"weights": ["norm"], "base_gradient_scale": 1.0, **kwargs}
    return LatePhaseConfig(num_members=K, late_phase_start=start, **settings)


def summed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


# ---- own trainers, below and above the mixin ----


class MeanLoss(Trainer):
    """Takes the mean over the minibatch, whatever it is told."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(input_ids=inputs["input_ids"])
        loss = summed(outputs.logits, inputs["labels"]) / inputs["labels"][:, 1:].ne(-100).sum()
        return (loss, outputs) if return_outputs else loss


class CountedLoss(Trainer):
    """Cannot do without the count of the targets."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(input_ids=inputs["input_ids"])
        loss = summed(outputs.logits, inputs["labels"]) / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


class ScaledLoss(CountedLoss):
    """Says that what it returns is on the scale of a whole step."""

    loss_is_scaled_for_ga = True


class DividedLoss(MeanLoss):
    """Divides by the minibatches of a step, as TRL's GRPO does."""

    loss_is_scaled_for_ga = True

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        steps = self.current_gradient_accumulation_steps if self.model.training else 1
        return (loss[0] / steps, loss[1]) if isinstance(loss, tuple) else loss / steps


class OwnStep(Trainer):
    """Runs both passes itself, as older Trainers did."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        model.train()
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            loss = model(**inputs).loss / self.args.gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()


class TwoBackwards(Trainer):
    """Runs the backward pass by halves."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        model.train()
        total = torch.zeros(())
        for _ in range(2):
            loss = model(**inputs).loss / 2 / self.current_gradient_accumulation_steps
            self.accelerator.backward(loss)
            total += loss.detach()
        return total


class BareBackward(Trainer):
    """Goes past accelerate."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = model(**inputs).loss / self.args.gradient_accumulation_steps
        loss.backward()
        return loss.detach()


def with_mixin(base: type, above: bool) -> Any:
    """The mixin over a trainer, or a trainer's methods over the mixin."""
    if not above:
        return type(f"Late{base.__name__}", (LatePhaseMixin, base), {})
    late_trainer = type("LateTrainer", (LatePhaseMixin, Trainer), {})
    members = {k: v for k, v in vars(base).items() if not k.startswith("__")}
    return type(f"Over{base.__name__}", (late_trainer,), members)


class Gradients(TrainerCallback):
    """Keeps what the optimizer sees."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def means(model: Any, batches: list[Any]) -> list[dict[str, torch.Tensor]]:
    """The gradient of each minibatch's mean loss, of a plain model."""
    found = []
    for batch in batches:
        model.zero_grad()
        logits = model(input_ids=batch["input_ids"]).logits
        (summed(logits, batch["labels"]) / batch["labels"][:, 1:].ne(-100).sum()).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    return found


class Ragged(Text):
    """Rows that hold unequal numbers of targets."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        labels = self.ids[index].clone()
        labels[: index % 5 + 1] = -100
        return {"input_ids": self.ids[index], "labels": labels}


def counted(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return summed(outputs.logits, labels) / num_items_in_batch


def uncounted(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return summed(outputs.logits, labels) / labels[:, 1:].ne(-100).sum()


OWN: dict[str, tuple[type, Any]] = {
    "mean": (MeanLoss, None), "counted": (CountedLoss, None), "scaled": (ScaledLoss, None),
    "divided": (DividedLoss, None), "own step": (OwnStep, None), "two backwards": (TwoBackwards, None),
    "compute_loss_func": (Trainer, counted), "uncounted compute_loss_func": (Trainer, uncounted),
}  # fmt: skip
# Not written in a class of its own, or one that calls its parent's.
BELOW_ONLY = ("scaled", "divided", "compute_loss_func", "uncounted compute_loss_func")
PLACES = [(name, above) for name in OWN for above in (False, True) if not (above and name in BELOW_ONLY)]


@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize(("name", "above"), PLACES, ids=lambda v: v if isinstance(v, str) else ("below", "above")[v])
def test_each_member_gets_the_gradient_of_its_own_mean(tmp_path, name: str, above: bool, accumulation: int) -> None:
    base, loss_func = OWN[name]
    gradients, rows = Gradients(), Ragged(24)
    torch.manual_seed(0)
    model = llama()

    def batch(i: int) -> dict[str, torch.Tensor]:
        part = [rows[j] for j in range(4 * i, 4 * i + 4)]
        return {key: torch.stack([row[key] for row in part]) for key in part[0]}

    count = 6 if accumulation == 2 else 3
    expected = means(llama_like(model), [batch(i) for i in range(count)])
    kind = with_mixin(base, above)

    class WithRows(kind):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs | {"train_dataset": rows})

    run = trainer(
        tmp_path, model, late(), trainer_class=WithRows, max_steps=count // accumulation, learning_rate=0.0,
        gradient_accumulation_steps=accumulation, logging_steps=1,
        extra={"callbacks": [gradients], "compute_loss_func": loss_func},
    )  # fmt: skip
    run.train()
    for key, value in gradients.seen.items():
        plain = key.replace("parametrizations.", "").replace(".original", "")
        per_member = [torch.stack([g[plain] for g in expected[k::3]]).mean(0) for k in range(3)]
        wanted = torch.stack(per_member) if key != plain else sum(per_member)
        assert torch.allclose(value, wanted, atol=1e-6), key
    # The logged loss is on Trainer's scale, and so is what evaluation makes of it.
    losses = [log["loss"] for log in run.state.log_history if "loss" in log]
    assert all(3 < loss < 5 for loss in losses)
    needs_count = issubclass(base, CountedLoss) or loss_func is counted
    # Before transformers 5.0 plain Trainer, too, does not count when it evaluates.
    if not needs_count or (hasattr(Trainer, "_get_num_items_in_batch") and counts_when_evaluating(run, base)):
        assert 3 < run.evaluate()["eval_loss"] < 5


def counts_when_evaluating(run: Any, base: type) -> bool:
    return base is not CountedLoss or run.model_accepts_loss_kwargs


def llama_like(model: Any) -> Any:
    other = llama()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("start", [0, 2])
def test_a_backward_pass_that_goes_past_accelerate_is_refused_before_the_first_update(tmp_path, start: int) -> None:
    model = llama()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    bare = with_mixin(BareBackward, False)
    run = trainer(tmp_path / "a", model, late(start=start), trainer_class=bare, gradient_accumulation_steps=3)
    with pytest.raises(ValueError, match=r"accelerator.backward"):
        run.train()
    assert all(torch.equal(value, before[key]) for key, value in run.model.state_dict().items())
    # Where nothing has to be weighed, it may.
    trainer(tmp_path / "b", llama(), late(start=start), trainer_class=bare, max_steps=6).train()


@pytest.mark.parametrize("name", OWN)
def test_one_member_is_trainer_to_the_bit(tmp_path, name: str) -> None:
    base, loss_func = OWN[name]
    weights = []
    for config, kind in ((None, base), (LatePhaseConfig(num_members=1, late_phase_start=0), with_mixin(base, False))):
        torch.manual_seed(0)
        run = trainer(
            tmp_path, llama(), config, trainer_class=kind, max_steps=4, gradient_accumulation_steps=2,
            extra={"compute_loss_func": loss_func},
        )  # fmt: skip
        run.train()
        weights.append(run.model.state_dict())
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


# ---- models that are not transformers' ----


class Plain(nn.Module):
    """A classifier of token rows that returns a tuple, a dictionary, or logits alone."""

    def __init__(self, returns: type) -> None:
        super().__init__()
        self.embed, self.norm, self.out = nn.Embedding(VOCAB, 8), nn.LayerNorm(8), nn.Linear(8, 4)
        self.returns = returns

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        logits = self.out(self.norm(self.embed(input_ids)).mean(1))
        if self.returns is torch.Tensor:
            return logits
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        if self.returns is tuple:
            return (logits,) if loss is None else (loss, logits)
        return {"logits": logits} if loss is None else {"loss": loss, "logits": logits}


class Labelled(Text):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index, 0] % 4}


class Images(Text):
    """Small pictures for timm, whose models take them as `x`."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        picture = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(index))
        return {"x": picture, "labels": self.ids[index, 0] % 4}


def of_logits(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    loss = nn.functional.cross_entropy(outputs, labels, reduction="sum")
    return loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def timm_model(name: str) -> nn.Module:
    timm = pytest.importorskip("timm")
    settings: dict[str, Any] = {"num_classes": 4}
    if name.startswith("vit"):
        settings |= {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return timm.create_model(name, **settings)


MODELS: dict[str, tuple[Any, type, Any]] = {
    "tuple": (lambda: Plain(tuple), Labelled, None),
    "dictionary": (lambda: Plain(dict), Labelled, None),
    "logits": (lambda: Plain(torch.Tensor), Labelled, of_logits),
    "vit": (lambda: timm_model("vit_tiny_patch16_224"), Images, of_logits),
    "resnet": (lambda: timm_model("test_resnet"), Images, of_logits),
}


def of_kind(folder: Path, kind: str, config: LatePhaseConfig | None, **kwargs: Any) -> Any:
    make, data, loss_func = MODELS[kind]
    late_trainer = type("LateTrainer", (LatePhaseMixin, Trainer), {})
    base: Any = Trainer if config is None else late_trainer

    class WithData(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **more | {"train_dataset": data(24), "eval_dataset": data(8, seed=2)})

    torch.manual_seed(0)
    run = trainer(
        folder, make(), config, trainer_class=WithData, extra={"compute_loss_func": loss_func},
        **{"max_steps": 6, "learning_rate": 0.01, "remove_unused_columns": False, "label_names": ["labels"], **kwargs},
    )  # fmt: skip
    torch.manual_seed(0)
    return run


@pytest.mark.parametrize("kind", MODELS)
def test_models_that_are_not_transformers(tmp_path, kind: str) -> None:
    run = of_kind(tmp_path / "a", kind, late(start=2, init_noise=0.1), save_strategy="steps", save_steps=4)
    run.train()
    assert run.late_phase.distance_from_mean() > 0
    expected = run.evaluate()["eval_loss"]
    run.save_model(tmp_path / "saved")
    stock = of_kind(tmp_path / "stock", kind, None)
    stock._load_from_checkpoint(str(tmp_path / "saved"))
    assert stock.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-6)
    resumed = of_kind(tmp_path / "b", kind, late(start=2, init_noise=0.1))
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    for (key, left), right in zip(run.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(left, right), key


@pytest.mark.parametrize("kind", MODELS)
def test_one_member_of_them_is_trainer_to_the_bit(tmp_path, kind: str) -> None:
    plain, run = (of_kind(tmp_path, kind, c) for c in (None, LatePhaseConfig(num_members=1, late_phase_start=0)))
    for each in (plain, run):
        torch.manual_seed(0)
        each.train()
    for (key, left), right in zip(run.model.state_dict().items(), plain.model.state_dict().values(), strict=True):
        assert torch.equal(left, right), key


# ---- rows that are flattened into one ----


@pytest.mark.parametrize("K", [1, 3])
def test_flattened_rows(tmp_path, K: int) -> None:
    """No padding: each batch is one long row, with positions that begin anew."""
    rows = [{"input_ids": ids[: 4 + n % 4].tolist()} for n, ids in enumerate(Text(24).ids)]
    weights = []
    for config in (None, LatePhaseConfig(num_members=K, weights=["norm"] if K > 1 else None, late_phase_start=0)):
        torch.manual_seed(0)
        kind = Trainer if config is None else type("LateTrainer", (LatePhaseMixin, Trainer), {})

        class WithRows(kind):  # type: ignore[misc, valid-type]
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs | {"train_dataset": rows, "eval_dataset": rows[:8]})

        run = trainer(
            tmp_path, gpt2(), config, trainer_class=WithRows, max_steps=4, per_device_train_batch_size=2,
            per_device_eval_batch_size=2, learning_rate=0.02, extra={"data_collator": DataCollatorWithFlattening()},
        )  # fmt: skip
        run.train()
        weights.append(run.model.state_dict())
        stock = trainer(
            tmp_path, type(run.model)(run.model.config), None, trainer_class=None, per_device_eval_batch_size=2,
            extra={"data_collator": DataCollatorWithFlattening()},
        )  # fmt: skip
        stock.model.loss_type = "ForCausalLM"
        run.save_model(tmp_path / "saved")
        stock.model.load_state_dict(type(run.model).from_pretrained(tmp_path / "saved").state_dict())
        assert run.evaluate()["eval_loss"] == pytest.approx(stock.evaluate(rows[:8])["eval_loss"], abs=1e-6)
    same = all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    assert same == (K == 1)
