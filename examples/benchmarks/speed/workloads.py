"""The models, minibatches and trainers that the speed benchmark compares."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from hf_latephase import LatePhaseConfig, LatePhaseTrainer
from hf_latephase.models import LSTMForCausalLM, LSTMLMConfig, WideResNetConfig, WideResNetForImageClassification


VOCAB = 259
# GPU rows have the vocabularies that models of their size have.
GPT2_VOCAB, LLAMA_VOCAB = 50257, 32000


def gpt2(layers: int, width: int, tokens: int, vocab: int = VOCAB) -> nn.Module:
    """A GPT-2, over bytes unless told otherwise, without dropout."""
    config = GPT2Config(
        vocab_size=vocab, n_positions=tokens, n_embd=width, n_layer=layers, n_head=width // 64,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def llama(layers: int, width: int, tokens: int, vocab: int = VOCAB) -> nn.Module:
    """A llama, over bytes unless told otherwise."""
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, max_position_embeddings=tokens,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def lstm() -> nn.Module:
    """The paper's LSTM."""
    return LSTMForCausalLM(LSTMLMConfig())


def wide_resnet(depth: int, widen_factor: int) -> nn.Module:
    """A WRN, in the layout that convolutions are fastest with."""
    config = WideResNetConfig(depth=depth, widen_factor=widen_factor, num_labels=10)
    return WideResNetForImageClassification(config).to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Workload:
    """A model and its minibatches: rows, and tokens a row (0: images of 3 × 32 × 32)."""

    make: Callable[[], nn.Module]
    rows: int
    tokens: int

    @classmethod
    def transformer(
        cls, kind: Callable[..., nn.Module], layers: int, width: int, rows: int, tokens: int, vocab: int = VOCAB
    ) -> Workload:
        """A transformer with as many positions as a row has tokens."""
        return cls(lambda: kind(layers, width, tokens, vocab), rows, tokens)


WORKLOADS = {
    "gpt2 4x256": Workload.transformer(gpt2, 4, 256, 8, 128),
    "gpt2 8x512": Workload.transformer(gpt2, 8, 512, 4, 256),
    "llama 4x256": Workload.transformer(llama, 4, 256, 8, 128),
    "llama 8x512": Workload.transformer(llama, 8, 512, 4, 256),
    "lstm 500": Workload(lstm, 32, 100),
    "wrn 16-2": Workload(functools.partial(wide_resnet, 16, 2), 128, 0),
    # What a GPU is for: GPT-2's smallest, a llama of 0.9 billion, the paper's LSTM and WRN in larger minibatches.
    "gpt2 124 M": Workload.transformer(gpt2, 12, 768, 8, 1024, GPT2_VOCAB),
    "llama 0.9 B": Workload.transformer(llama, 16, 2048, 2, 2048, LLAMA_VOCAB),
    "lstm 500, 128 rows": Workload(lstm, 128, 200),
    "wrn 28-10": Workload(functools.partial(wide_resnet, 28, 10), 128, 0),
    # Small ones, to see how the cost grows.
    "gpt2 2x128": Workload.transformer(gpt2, 2, 128, 4, 64),
    "gpt2 2x128, twice the tokens": Workload.transformer(gpt2, 2, 128, 4, 128),
    "gpt2 2x256": Workload.transformer(gpt2, 2, 256, 4, 64),
    "gpt2 4x128": Workload.transformer(gpt2, 4, 128, 4, 64),
}


class Minibatches(Dataset):
    """
    Random rows of the shape that a workload asks for; a few, seen again and again.

    Args:
        workload (`Workload`):
            What a row is.
        rows (`int`):
            Rows in a minibatch.
    """

    def __init__(self, workload: Workload, rows: int) -> None:
        generator = torch.Generator().manual_seed(0)
        if workload.tokens:
            ids = torch.randint(3, VOCAB, (4 * rows, workload.tokens), generator=generator)
            self._items = {"input_ids": ids, "labels": ids}
        else:
            images = torch.randn(rows, 3, 32, 32, generator=generator)
            self._items = {"pixel_values": images, "labels": torch.randint(0, 10, (rows,), generator=generator)}

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: items[index % len(items)] for name, items in self._items.items()}


@dataclass(frozen=True)
class Setting:
    """
    How a workload is trained.

    Attributes:
        workload (`str`): A name in `WORKLOADS`.
        weights (`tuple[str, ...]`): The families.
        num_members (`int`): K, also the minibatches in a cycle.
        one_step (`bool`): Whether a cycle is one step that accumulates K minibatches, or K of Trainer's steps.
        by_sample (`bool`): Whether rows are dealt out; a minibatch is then K times as large, and a cycle.
    """

    workload: str
    weights: tuple[str, ...]
    num_members: int = 10
    one_step: bool = True
    by_sample: bool = False

    @property
    def name(self) -> str:
        """What the setting is called."""
        mapping = "by sample" if self.by_sample else "one step" if self.one_step else "several steps"
        return f"{self.workload}, {'+'.join(self.weights)}, K={self.num_members}, {mapping}"

    @property
    def minibatches(self) -> int:
        """Minibatches in a cycle."""
        return 1 if self.by_sample else self.num_members

    @property
    def steps(self) -> int:
        """Trainer's steps in a cycle."""
        return 1 if self.one_step or self.by_sample else self.num_members

    def trainer(self, late: bool, folder: str, device: str, callbacks: list[TrainerCallback]) -> Trainer:
        """Makes plain Trainer, or the same with late-phase weights from the first step; in bf16 on a GPU."""
        workload = WORKLOADS[self.workload]
        rows = workload.rows * (self.num_members if self.by_sample else 1)
        torch.manual_seed(0)
        args = TrainingArguments(
            folder, per_device_train_batch_size=rows, gradient_accumulation_steps=self.minibatches // self.steps,
            max_steps=1_000_000, learning_rate=1e-5, lr_scheduler_type="constant", report_to=[],
            use_cpu=device == "cpu", disable_tqdm=True, save_strategy="no", logging_strategy="no",
            train_sampling_strategy="sequential", dataloader_pin_memory=device == "cuda", bf16=device == "cuda",
        )  # fmt: skip
        config = LatePhaseConfig(
            num_members=self.num_members, weights=list(self.weights), late_phase_start=0, base_gradient_scale=1.0,
            member_assignment="sample" if self.by_sample else "minibatch",
        )  # fmt: skip
        return (LatePhaseTrainer if late else Trainer)(
            model=workload.make(),
            args=args,
            train_dataset=Minibatches(workload, rows),
            data_collator=default_data_collator,
            callbacks=callbacks,
            **({"late_phase_config": config} if late else {}),
        )
