"""LatePhaseMixin on trainers that are not Trainer, and on models that are adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_latephase import LatePhaseConfig
from hf_latephase.training.trainer import LatePhaseMixin
from tiny import VOCAB, Text, llama, trainer


CPU: dict[str, Any] = {
    "report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "seed": 0, "learning_rate": 0.02,
    "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4,
}  # fmt: skip


def config(K: int = 3, weights: Any = ("norm",), **kwargs: Any) -> LatePhaseConfig:
    return LatePhaseConfig(num_members=K, weights=list(weights), **{"late_phase_start": 2, **kwargs})


# ---- Seq2SeqTrainer ----


class LatePhaseSeq2SeqTrainer(LatePhaseMixin, Seq2SeqTrainer):
    pass


def t5() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(T5Config(
        vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=1, dropout_rate=0.0, tie_word_embeddings=False,
    ))  # fmt: skip


def seq2seq(folder: Path, model: Any = None, late: LatePhaseConfig | None = None, **kwargs: Any) -> Any:
    args = Seq2SeqTrainingArguments(str(folder), **{
        **CPU, "max_steps": 8, "save_strategy": "no", "predict_with_generate": True, "generation_max_length": 6,
        **kwargs,
    })  # fmt: skip
    torch.manual_seed(0)
    own = {} if late is None else {"late_phase_config": late}
    return (Seq2SeqTrainer if late is None else LatePhaseSeq2SeqTrainer)(
        model=model or t5(), args=args, train_dataset=Text(24), eval_dataset=Text(8, seed=2), **own
    )


@pytest.mark.parametrize("weights", [["rank1"], ["rank1", "norm"]], ids="+".join)
def test_seq2seq(tmp_path, weights: list[str]) -> None:
    late = config(weights=weights, init_noise=0.3)
    run = seq2seq(tmp_path / "a", late=late, save_strategy="steps", save_steps=4)
    run.train()
    assert run.late_phase.distance_from_mean() > 0
    # Generates and evaluates with the averaged model.
    stock = seq2seq(tmp_path / "stock", run.averaged_model())
    ours, theirs = run.predict(Text(8, seed=2)), stock.predict(Text(8, seed=2))
    assert ours.predictions.tolist() == theirs.predictions.tolist()
    assert len(ours.predictions) == 8 and len(set(ours.predictions[:, :6].flatten().tolist())) > 2
    assert ours.metrics["test_loss"] == pytest.approx(theirs.metrics["test_loss"], abs=1e-6)
    assert run.evaluate()["eval_loss"] == pytest.approx(ours.metrics["test_loss"], abs=1e-6)
    # Saves a stock model.
    run.save_model(tmp_path / "saved")
    loaded = T5ForConditionalGeneration.from_pretrained(tmp_path / "saved")
    for key, value in run.late_phase.averaged_state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    # Resumes to the bit, inside a cycle.
    resumed = seq2seq(tmp_path / "b", late=late)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    for (name, left), right in zip(run.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(left, right), name


def test_seq2seq_with_one_member_is_seq2seq_to_the_bit(tmp_path) -> None:
    plain, late = seq2seq(tmp_path), seq2seq(tmp_path, late=config(1, late_phase_start=0))
    plain.train()
    late.train()
    for key, value in late.late_phase.averaged_state_dict().items():
        assert torch.equal(value, plain.model.state_dict()[key]), key


# ---- TRL ----


WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(VOCAB - 3))]


def tokenizer() -> PreTrainedTokenizerFast:
    bare = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    bare.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def texts(rows: int, seed: int = 1) -> Dataset:
    """Sentences of four to eight words."""
    ids = Text(rows, seed=seed).ids.tolist()
    return Dataset.from_dict({"text": [" ".join(WORDS[i] for i in row[: 4 + n % 5]) for n, row in enumerate(ids)]})


def sft(folder: Path, model: Any = None, late: LatePhaseConfig | None = None, extra: Any = None, **kwargs: Any) -> Any:
    trl = pytest.importorskip("trl")

    class LatePhaseSFTTrainer(LatePhaseMixin, trl.SFTTrainer):
        pass

    torch.manual_seed(0)
    model = model or llama(pad_token_id=0, eos_token_id=1, bos_token_id=1)
    args = trl.SFTConfig(str(folder), **{
        **CPU, "max_steps": 8, "save_strategy": "no", "max_length": 16, "bf16": False, "gradient_checkpointing": False,
        **kwargs,
    })  # fmt: skip
    own = {} if late is None else {"late_phase_config": late}
    return (trl.SFTTrainer if late is None else LatePhaseSFTTrainer)(
        model=model, args=args, train_dataset=texts(24), eval_dataset=texts(8, seed=2), processing_class=tokenizer(),
        **own, **(extra or {}),
    )  # fmt: skip


@pytest.mark.parametrize("weights", [["norm"], ["rank1", "norm"]], ids="+".join)
def test_sft(tmp_path, weights: list[str]) -> None:
    late = config(weights=weights, init_noise=0.3)
    run = sft(tmp_path / "a", late=late, save_strategy="steps", save_steps=4)
    run.train()
    logs = [log for log in run.state.log_history if "loss" in log]
    assert len(logs) == 8 and all("mean_token_accuracy" in log for log in logs)
    assert [log["late_phase"] for log in logs] == [0.0] * 2 + [1.0] * 6
    assert run.late_phase.distance_from_mean() > 0
    stock = sft(tmp_path / "stock", run.averaged_model())
    assert run.evaluate()["eval_loss"] == pytest.approx(stock.evaluate()["eval_loss"], abs=1e-6)
    run.save_model(tmp_path / "saved")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    for key, value in run.late_phase.averaged_state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    resumed = sft(tmp_path / "b", late=late)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    for (name, left), right in zip(run.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(left, right), name


def test_sft_with_one_member_is_sft_to_the_bit(tmp_path) -> None:
    plain, late = sft(tmp_path), sft(tmp_path, late=config(1, late_phase_start=0))
    plain.train()
    late.train()
    for key, value in late.late_phase.averaged_state_dict().items():
        assert torch.equal(value, plain.model.state_dict()[key]), key


# ---- PEFT ----


def lora(**kwargs: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = llama()
    base.save_pretrained(kwargs.pop("base")) if "base" in kwargs else None
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0, "init_lora_weights": False}
    return peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **{**settings, **kwargs}))


ADAPTER = ["lora_A.default", "lora_B.default"]


@pytest.mark.parametrize("weights", [["full"], ["rank1"]], ids="+".join)
def test_lora_adapter(tmp_path, weights: list[str]) -> None:
    """Members of the adapter; its average is saved under PEFT's own keys and loads with PEFT alone."""
    peft = pytest.importorskip("peft")
    late = config(weights=weights, target_modules=ADAPTER, init_noise=0.3)
    model = lora(base=tmp_path / "base")
    expected_keys = set(peft.get_peft_model_state_dict(model))
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    settings: dict[str, Any] = {"max_steps": 8, "learning_rate": 0.02}
    run = trainer(tmp_path / "a", model, late, save_strategy="steps", save_steps=4, **settings)
    assert {target.module.rpartition(".lora_")[2] for target in run.late_phase.targets} == {"A.default", "B.default"}
    run.train()
    assert run.late_phase.distance_from_mean() > 0
    assert all(torch.equal(dict(run.model.named_parameters())[n], value) for n, value in frozen.items())
    run.save_model(tmp_path / "saved")
    assert set(load_file(tmp_path / "saved" / "adapter_model.safetensors")) == expected_keys
    loaded = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "saved")
    ids = Text(3).ids
    with torch.no_grad():
        assert torch.allclose(loaded.eval()(ids).logits, run.model.eval()(ids).logits, atol=1e-6)
    # A checkpoint is such a folder too, and training goes on from it to the bit.
    assert (tmp_path / "a" / "checkpoint-4" / "adapter_model.safetensors").exists()
    resumed = trainer(tmp_path / "b", lora(), late, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    for (name, left), right in zip(run.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(left, right), name


def test_lora_with_one_member_is_trainer_to_the_bit(tmp_path) -> None:
    late = config(1, ["full"], target_modules=ADAPTER, late_phase_start=0)
    plain, run = trainer(tmp_path, lora(), None), trainer(tmp_path, lora(), late)
    plain.train()
    run.train()
    for key, value in run.late_phase.averaged_state_dict().items():
        assert torch.equal(value, plain.model.state_dict()[key]), key


def test_lora_best_model(tmp_path) -> None:
    peft = pytest.importorskip("peft")
    late = config(weights=["full"], target_modules=ADAPTER)
    run = trainer(
        tmp_path / "a", lora(base=tmp_path / "base"), late, eval_strategy="steps", eval_steps=3, save_strategy="steps",
        save_steps=3, load_best_model_at_end=True, max_steps=9,
    )  # fmt: skip
    run.train()
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    best = peft.PeftModel.from_pretrained(base, run.state.best_model_checkpoint)
    ids = Text(3).ids
    with torch.no_grad():
        assert torch.allclose(best.eval()(ids).logits, run.model.eval()(ids).logits, atol=1e-6)


def test_late_phase_weights_outside_the_adapter_are_refused(tmp_path) -> None:
    """An adapter's file has no room for the base model's norms: their average would be lost on saving."""
    with pytest.raises(ValueError, match="adapter"):
        trainer(tmp_path, lora(), config(weights=["rank1"], target_modules=["q_proj.base_layer"]))
    # By default frozen layers are left alone, so that the adapter's own remain.
    run = trainer(tmp_path, lora(), config(weights=["rank1"]))
    assert {target.module.rpartition(".lora_")[2] for target in run.late_phase.targets} == {"A.default", "B.default"}
    assert "left out, as they are frozen" in run.late_phase.summary()


def test_frozen_norms_under_an_adapter_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        trainer(tmp_path, lora(), config(weights=["norm"]))


def test_whole_layers_beside_an_adapter_are_refused(tmp_path) -> None:
    """PEFT saves what `modules_to_save` names by looking up parameter names, which members change."""
    model = lora(modules_to_save=["norm"])
    late = config(weights=["norm"], target_modules=[r".*\.norm\.modules_to_save\.default"])
    with pytest.raises(ValueError, match="adapter"):
        trainer(tmp_path, model, late)


def test_an_adapter_that_saves_whole_layers_too(tmp_path) -> None:
    """They stay base weights, trained and saved with the averaged adapter."""
    peft = pytest.importorskip("peft")
    model = lora(base=tmp_path / "base", modules_to_save=["norm"])
    late = config(weights=["full"], target_modules=ADAPTER, init_noise=0.3)
    run = trainer(tmp_path / "a", model, late, max_steps=8)
    run.train()
    run.save_model(tmp_path / "saved")
    loaded = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "saved")
    ids = Text(3).ids
    with torch.no_grad():
        assert torch.allclose(loaded.eval()(ids).logits, run.model.eval()(ids).logits, atol=1e-6)
        assert not torch.equal(run.model.get_base_model().model.norm.modules_to_save.default.weight, torch.ones(16))


@pytest.mark.parametrize(("late", "settings", "reason"), [
    ({"member_assignment": "sample"}, {}, "bare weights"),
    ({}, {"load_best_model_at_end": True, "save_only_model": True}, "save_only_model"),
], ids=["sample", "save_only_model"])  # fmt: skip
def test_what_an_adapter_cannot_do_is_refused(tmp_path, late: Any, settings: Any, reason: str) -> None:
    if settings:
        settings |= {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    late = config(4, ["rank1"], target_modules=ADAPTER, **late)
    with pytest.raises(ValueError, match=reason):
        trainer(tmp_path, lora(), late, **settings)


def test_sft_with_lora(tmp_path) -> None:
    peft = pytest.importorskip("peft")
    late = config(weights=["full"], target_modules=ADAPTER, init_noise=0.3)
    adapter = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    run = sft(tmp_path, late=late, extra={"peft_config": adapter})
    run.train()
    run.save_model(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert len(saved) == 8 and run.late_phase.distance_from_mean() > 0
    stock = peft.get_peft_model_state_dict(run.model, state_dict=run.late_phase.averaged_state_dict())
    assert all(torch.equal(value, stock[key]) for key, value in saved.items())
