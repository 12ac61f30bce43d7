"""LatePhaseMixin on every trainer of TRL's: trained past T0, evaluated, saved, reloaded with the stock class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from packaging.version import Version
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification

from hf_latephase import LatePhaseConfig
from hf_latephase.training.trainer import LatePhaseMixin
from test_other_trainers import CPU, WORDS, config, texts, tokenizer
from tiny import COUNTS_ALL_LABELS, HAS_STRATEGY, Text, llama, same_weights


trl = pytest.importorskip("trl")


def words(rows: int, seed: int) -> list[str]:
    return texts(rows, seed)["text"]


def pairs(rows: int, seed: int = 1) -> Dataset:
    """A prompt, and a chosen and a rejected answer to it."""
    return Dataset.from_dict({
        "prompt": [text[:5] for text in words(rows, seed)], "chosen": words(rows, seed + 10),
        "rejected": words(rows, seed + 20),
    })  # fmt: skip


def verdicts(rows: int, seed: int = 1) -> Dataset:
    """A prompt, an answer to it, and whether that is liked."""
    return Dataset.from_dict({
        "prompt": [text[:5] for text in words(rows, seed)], "completion": words(rows, seed + 10),
        "label": [index % 2 == 0 for index in range(rows)],
    })  # fmt: skip


def prompts(rows: int, seed: int = 1) -> Dataset:
    return Dataset.from_dict({"prompt": [text[:8] for text in words(rows, seed)]})


def reward(completions: list[str], **kwargs: Any) -> list[float]:
    """Likes words with high numbers."""
    values = {word: float(index) for index, word in enumerate(WORDS)}
    return [sum(values.get(word, 0.0) for word in completion.split()) / 40 for completion in completions]


def judge() -> Any:
    torch.manual_seed(0)
    model = llama(pad_token_id=0, eos_token_id=1, bos_token_id=1)
    settings = model.config.to_dict() | {"num_labels": 1, "id2label": {0: "reward"}, "label2id": {"reward": 0}}
    return LlamaForSequenceClassification(type(model.config)(**settings))


GENERATION: dict[str, Any] = {
    "max_completion_length": 6, "num_generations": 2, "bf16": False, "gradient_checkpointing": False, "beta": 0.1,
}  # fmt: skip
SHORT: dict[str, Any] = {"max_length": 16, "bf16": False, "gradient_checkpointing": False}
# By name: the trainer, its arguments, what they need, the data, what else the trainer needs.
KINDS: dict[str, tuple[str, str, dict[str, Any], Any, dict[str, Any]]] = {
    "sft": ("SFTTrainer", "SFTConfig", SHORT, texts, {}),
    "packing": ("SFTTrainer", "SFTConfig", SHORT | {"packing": True, "eval_packing": False}, texts, {}),
    "padding_free": ("SFTTrainer", "SFTConfig", SHORT | {"padding_free": True, "max_length": None}, texts, {}),
    "dpo": ("DPOTrainer", "DPOConfig", SHORT, pairs, {}),
    "kto": ("KTOTrainer", "KTOConfig", SHORT, verdicts, {}),
    "reward": ("RewardTrainer", "RewardConfig", SHORT, pairs, {}),
    "grpo": ("GRPOTrainer", "GRPOConfig", GENERATION, prompts, {"reward_funcs": reward}),
    "rloo": ("RLOOTrainer", "RLOOConfig", GENERATION, prompts, {"reward_funcs": reward}),
}


def make(folder: Path, kind: str, late: LatePhaseConfig | None = None, model: Any = None, **kwargs: Any) -> Any:
    """A trainer of one kind, of TRL's own class with `late=None`."""
    trainer_class, args_class, settings, data, more = KINDS[kind]
    stock: Any = getattr(trl, trainer_class)
    late_class: Any = type(f"LatePhase{trainer_class}", (LatePhaseMixin, stock), {})
    torch.manual_seed(0)
    if model is None:
        model = judge() if kind == "reward" else llama(pad_token_id=0, eos_token_id=1, bos_token_id=1)
        # Reference models are loaded from where the model comes from.
        model.save_pretrained(folder / "base")
        model = type(model).from_pretrained(folder / "base")
    extra = kwargs.pop("extra", {})
    values = {**CPU, "max_steps": 6, "save_strategy": "no", "lr_scheduler_type": "constant", **settings, **kwargs}
    usual = "sequential" if kind == "kto" else "random"  # TRL's own choice where Trainer knows the argument
    strategy = {} if HAS_STRATEGY else {"train_sampling_strategy": values.pop("train_sampling_strategy", usual)}
    args = getattr(trl, args_class)(str(folder), **values)
    vars(args).update(strategy)  # read by tiny's sampler
    own = {} if late is None else {"late_phase_config": late}
    return (stock if late is None else late_class)(
        model=model, args=args, train_dataset=data(24), eval_dataset=data(8, seed=2), processing_class=tokenizer(),
        **own, **more, **extra,
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_trains_past_t0_and_saves_a_stock_model(tmp_path, kind: str) -> None:
    late = config(3, ["rank1", "norm"], init_noise=0.1)
    run = make(tmp_path / "a", kind, late, save_strategy="steps", save_steps=4)
    run.train()
    logs = [log for log in run.state.log_history if "loss" in log]
    assert [log["late_phase"] for log in logs] == [0.0] * 2 + [1.0] * 4
    assert run.late_phase.distance_from_mean() > 0
    evaluated = run.evaluate()
    run.save_model(tmp_path / "saved")
    loaded = type(run.model).from_pretrained(tmp_path / "saved")
    same_weights(loaded, run.model)
    # The stock class scores what was saved alike; sampled answers differ from one call to the next.
    if kind not in ("grpo", "rloo"):
        stock = make(tmp_path / "stock", kind, model=loaded)
        if getattr(run, "ref_model", None) is not None:
            stock.ref_model = run.ref_model
        assert evaluated["eval_loss"] == pytest.approx(stock.evaluate()["eval_loss"], abs=1e-6)
    else:
        assert "eval_reward" in run.state.log_history[-1]  # before TRL 1 evaluate() returns less
    if kind == "packing" and Version(transformers.__version__) < Version("5"):
        return  # its few rows end an epoch before step 4, and there plain Trainer, too, goes on with other rows
    # Goes on inside a cycle, to the bit.
    resumed = make(tmp_path / "b", kind, late)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    same_weights(resumed.model, run.model)


@pytest.mark.parametrize("kind", KINDS)
def test_one_member_is_the_stock_trainer_to_the_bit(tmp_path, kind: str) -> None:
    plain = make(tmp_path, kind, gradient_accumulation_steps=2, max_steps=3)
    run = make(tmp_path, kind, LatePhaseConfig(num_members=1, late_phase_start=0), gradient_accumulation_steps=2,
               max_steps=3)  # fmt: skip
    for each in (plain, run):
        torch.manual_seed(0)  # answers are sampled
        each.train()
    same_weights(run.model, plain.model)
    losses = [[log["loss"] for log in each.state.log_history if "loss" in log] for each in (plain, run)]
    assert losses[0] == losses[1]


def gradients(run: Any) -> dict[str, torch.Tensor]:
    """What the optimizer of a run sees at its last step."""
    seen: dict[str, torch.Tensor] = {}
    names = {}

    class Watch(trl.trainer.callbacks.TrainerCallback):  # type: ignore[name-defined]
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            names.update({p: n for n, p in run.model.named_parameters()})
            seen.update({n: p.grad.clone() for p, n in names.items() if p.grad is not None})

    run.add_callback(Watch())
    torch.manual_seed(0)
    run.train()
    return seen


class Unlabelled:
    """Takes the label of each row's first token, which nothing predicts, from what a collator returns."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, rows: Any) -> Any:
        batch = self.collator(rows)
        batch["labels"][:, 0] = -100
        return batch


LOSSES = [
    ("sft", {}), ("dpo", {}), ("kto", {}), ("reward", {}), ("grpo", {}), ("grpo", {"loss_type": "grpo"}),
    ("rloo", {}),
]  # fmt: skip


@pytest.mark.parametrize("accumulation", [1, 3], ids=["over steps", "in one step"])
@pytest.mark.parametrize(("kind", "settings"), LOSSES, ids=lambda value: value if isinstance(value, str) else "")
def test_members_gradients_are_on_the_trainers_scale(tmp_path, kind: str, settings: Any, accumulation: int) -> None:
    """
    Equal members share the stock gradient of a window of as many minibatches: thrice its mean for the base, as
    γ_θ = 1. Generated answers are the same too, as all members are the same policy.
    """
    steady = {"learning_rate": 0.0, "max_grad_norm": 0.0, "weight_decay": 0.0, **settings}
    if kind in ("grpo", "rloo"):
        steady |= {"steps_per_generation": 3, "beta": 0.0, "shuffle_dataset": False}
    else:
        steady |= {"train_sampling_strategy": "sequential"}
    if kind == "sft":  # of equal length: Trainer weighs minibatches by their tokens
        steady |= {"packing": True, "packing_strategy": "wrapped", "per_device_train_batch_size": 2}
    late = config(3, ["norm"], late_phase_start=0, base_gradient_scale=1.0)
    run = make(tmp_path, kind, late, gradient_accumulation_steps=accumulation, max_steps=3 // accumulation, **steady)
    plain = make(tmp_path, kind, gradient_accumulation_steps=3, max_steps=1, **steady)
    if kind == "sft" and COUNTS_ALL_LABELS:
        for each in (run, plain):
            each.data_collator = Unlabelled(each.data_collator)
    ours, theirs = gradients(run), gradients(plain)
    assert any("parametrizations" in name for name in ours)
    if kind == "grpo" and settings == {} and accumulation == 1 and Version(trl.__version__) < Version("1"):
        # TRL divides this loss by the tokens of all answers that it generated at once, here those of three steps.
        ours = {name: value * 3 for name, value in ours.items()}
    for name, value in ours.items():
        stock = theirs[name.replace("parametrizations.", "").replace(".original", "")]
        mean = value.sum(0) / 3 if "parametrizations" in name else value / 3
        assert torch.allclose(mean, stock, atol=1e-6), name


def test_callbacks_that_go_through_the_weights(tmp_path) -> None:
    bema = {"callbacks": [trl.BEMACallback(update_freq=1)]}
    with pytest.raises(ValueError, match="BEMACallback"):
        make(tmp_path, "sft", config(2), extra=bema)
    run = make(tmp_path / "bema", "sft", LatePhaseConfig(num_members=1), extra=bema, max_steps=2)
    run.train()
    plain = make(tmp_path / "plain", "sft", extra={"callbacks": [trl.BEMACallback(update_freq=1)]}, max_steps=2)
    plain.train()
    same_weights(*(type(run.model).from_pretrained(tmp_path / name / "bema") for name in ("bema", "plain")))
    with pytest.raises(ValueError, match="SyncRefModelCallback"):
        make(tmp_path, "dpo", config(2), sync_ref_model=True, precompute_ref_log_probs=False)
    # Added later, but before the first step.
    run = make(tmp_path, "sft", config(2))
    run.add_callback(trl.BEMACallback(update_freq=1))
    with pytest.raises(ValueError, match="BEMACallback"):
        run.train()
    assert run.state.global_step == 0


def test_completions_come_from_the_averaged_model_when_evaluated(tmp_path) -> None:
    run = make(tmp_path, "grpo", config(2, ["rank1"], late_phase_start=0, init_noise=0.5), max_steps=2)
    run.train()
    ids = Text(2).ids
    torch.manual_seed(0)
    ours = run.model.generate(ids, do_sample=True, max_new_tokens=5)
    torch.manual_seed(0)
    assert torch.equal(ours, run.averaged_model().generate(ids, do_sample=True, max_new_tokens=5))


def test_reward_model_loads_as_users_load_it(tmp_path) -> None:
    run = make(tmp_path, "reward", config(2, ["norm"], late_phase_start=0), max_steps=2)
    run.train()
    run.save_model(tmp_path / "saved")
    same_weights(AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved"), run.model)
