"""Tiny models, data and trainers that the tests share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hf_latephase import LatePhaseConfig, LatePhaseTrainer
from hf_latephase.compat import RELEASE
from hf_latephase.models import LSTMForCausalLM, LSTMLMConfig


VOCAB = 48
# The switch's name before transformers 5.23 was the latter.
CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name)
)
# Set to "cuda" by test_cuda.py, also for the processes that it starts.
DEVICE_VARIABLE = "HF_LATEPHASE_TEST_DEVICE"


def gpt2(dropout: float = 0.0, **kwargs: Any) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, **kwargs,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    # Not set by transformers 5.23, whose Trainer then divides by the unshifted labels too.
    model.loss_type = "ForCausalLM"
    return model


def llama(**kwargs: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, **kwargs,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def lstm(dropout: float = 0.0, **kwargs: Any) -> LSTMForCausalLM:
    config = LSTMLMConfig(vocab_size=VOCAB, embedding_size=16, hidden_size=16, dropout=dropout, **kwargs)
    return LSTMForCausalLM(config)


class ConvNet(nn.Module):
    """A small convolutional language model with BatchNorm (it sees the future; the tests do not mind)."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8)
        self.first = nn.Conv1d(8, 8, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm1d(8)
        self.second = nn.Conv1d(8, 8, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm1d(8)
        self.lm_head = nn.Linear(8, VOCAB)
        self.loss_function = exact_loss

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> CausalLMOutput:
        hidden = self.first_norm(self.first(self.embed(input_ids).transpose(1, 2))).relu()
        hidden = self.second_norm(self.second(hidden)).relu()
        logits = self.lm_head(hidden.transpose(1, 2))
        loss = None if labels is None else self.loss_function(logits, labels, VOCAB)
        return CausalLMOutput(loss=loss, logits=logits)


def exact_loss(logits: Any, labels: Any, vocab_size: int, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
    """transformers' causal loss, which computes in float32 whatever the model's dtype, in that dtype."""
    logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    if num_items_in_batch is None:
        return nn.functional.cross_entropy(logits, labels)
    return nn.functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch


class ExactRMSNorm(LlamaRMSNorm):
    """Llama's, which computes in float32 whatever the model's dtype, in that dtype."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(hidden_states.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (hidden_states * scale)


def double(model: Any) -> Any:
    """The model in float64, its loss and norms included: now and then 1e-15 decides how a number rounds to float32."""
    model.loss_function = exact_loss
    for module in model.modules():
        if type(module) is LlamaRMSNorm:
            module.__class__ = ExactRMSNorm
    return model.double()


MODELS = {"gpt2": gpt2, "llama": llama, "lstm": lstm, "convnet": ConvNet}


# Before transformers 5.19 Trainer divides a causal loss by all labels, the first included, which nothing predicts.
COUNTS_ALL_LABELS = not hasattr(Trainer, "loss_is_scaled_for_ga")


# Before transformers 5.0 Trainer rounds the loss that it logs to four digits.
LOG_ERROR = 1e-6 if Version("5.0") <= RELEASE else 5e-5


class Text(Dataset):
    """Random token rows, the same for the same seed."""

    def __init__(self, rows: int, length: int = 8, seed: int = 1) -> None:
        self.ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
        self.labels = self.ids
        if COUNTS_ALL_LABELS:
            self.labels = self.ids.clone()
            self.labels[:, 0] = -100

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}

    def batches(self, size: int) -> list[dict[str, torch.Tensor]]:
        """The minibatches of one epoch without shuffling."""
        pairs = zip(self.ids.split(size), self.labels.split(size), strict=True)
        return [{"input_ids": ids, "labels": labels} for ids, labels in pairs]


def same_weights(left: nn.Module, right: nn.Module) -> None:
    """Asserts that two modules hold the same tensors under the same names, to the bit."""
    expected = right.state_dict()
    assert set(left.state_dict()) == set(expected)
    for name, value in left.state_dict().items():
        assert torch.equal(value, expected[name]), name


def arguments(folder: str | Path, **kwargs: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 10,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "use_cpu": os.environ.get(DEVICE_VARIABLE, "cpu") == "cpu",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1000,
        "train_sampling_strategy": "sequential",
        "max_grad_norm": 0.0,
        "seed": 0,
    }
    values = {**defaults, **kwargs}
    if HAS_STRATEGY:
        return TrainingArguments(str(folder), **values)
    strategy = values.pop("train_sampling_strategy")
    args = TrainingArguments(str(folder), group_by_length=strategy == "group_by_length", **values)
    args.train_sampling_strategy = strategy
    return args


# Before transformers 5.2 Trainer knows no way to leave the rows in order.
HAS_STRATEGY = hasattr(TrainingArguments, "train_sampling_strategy")
if not HAS_STRATEGY:
    shuffled = Trainer._get_train_sampler

    def in_order(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        sampler = shuffled(self, *args, **kwargs)
        sequential = getattr(self.args, "train_sampling_strategy", None) == "sequential"
        return SequentialSampler(self.train_dataset) if sequential and sampler is not None else sampler

    Trainer._get_train_sampler = in_order


def trainer(
    folder: str | Path,
    model: nn.Module,
    config: LatePhaseConfig | None,
    rows: int = 64,
    trainer_class: type | None = None,
    optimizer: tuple[type, dict[str, Any]] | None = None,
    extra: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """A LatePhaseTrainer, or with `config=None` a plain Trainer, on a little random text."""
    late = {} if config is None else {"late_phase_config": config}
    return (trainer_class or (Trainer if config is None else LatePhaseTrainer))(
        model=model,
        args=arguments(folder, **kwargs),
        train_dataset=Text(rows),
        eval_dataset=Text(12, seed=2),
        optimizer_cls_and_kwargs=optimizer,
        **late,
        **(extra or {}),
    )


def use_hub(patch: Any, hub: Any) -> None:
    """Has Trainer talk to `hub`; `patch` is `setattr` or pytest's. Before transformers 5.3 it called functions."""
    module = transformers.trainer
    if hasattr(module, "hf_api"):
        patch(module, "hf_api", lambda *args, **kwargs: hub)
    else:
        patch(module, "create_repo", hub.create_repo)
        patch(module, "upload_folder", hub.upload_folder)
