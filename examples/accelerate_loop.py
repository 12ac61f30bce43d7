"""
Late-phase weights in a plain Accelerate loop, without Trainer.

    python examples/accelerate_loop.py --output_dir out
    accelerate launch examples/accelerate_loop.py --output_dir out

Trains a tiny byte-level language model on the text below in a few seconds and saves the averaged model, which
`AutoModelForCausalLM.from_pretrained("out")` loads without hf_latephase. On several processes each minibatch of a
member is spread over all of them.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

from hf_latephase import LatePhase, LatePhaseConfig


TEXT = """
Train one model for most of the time. Then let a few of its weights become several, each with a history of its own:
every member sees its own minibatches, and all of them share the weights that are left. In the end the members are
averaged, and what remains is one model again. It costs no more to use than before, and it has heard many opinions.
The members differ little, so their average is a good one. Had they been apart from the very first step, they would
have gone to places that cannot be averaged; had they never parted, there would be nothing to average at all.
"""


def rows(length: int = 24) -> torch.Tensor:
    """Returns the text as windows of bytes, `[rows, length]`."""
    data = torch.tensor(list(TEXT.encode()))
    return data[: len(data) // length * length].view(-1, length)


def tiny_model() -> LlamaForCausalLM:
    """Returns a model for bytes."""
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    ))  # fmt: skip


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Late-phase weights in a plain Accelerate loop.")
    parser.add_argument("--output_dir", required=True, help="Where the averaged model is saved.")
    parser.add_argument("--num_members", type=int, default=4, help="K.")
    parser.add_argument("--late_phase_start", type=int, default=20, help="T0, in optimizer steps.")
    parser.add_argument("--max_steps", type=int, default=60, help="Optimizer steps, each of K minibatches.")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Trains and saves."""
    args = parse_args()
    set_seed(args.seed)
    accelerator = Accelerator()
    K = args.num_members

    # The members must exist before the optimizer, which is to train them. Use an elementwise one: SGD, Adam, AdamW.
    model: Any = tiny_model()
    late_phase = LatePhase(model, LatePhaseConfig(num_members=K, weights=["rank1", "norm"]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    dataloader: Any = DataLoader(TensorDataset(rows()), batch_size=args.batch_size, drop_last=True)
    model, optimizer, dataloader = accelerator.prepare(model, optimizer, dataloader)

    def forever() -> Iterator[list[torch.Tensor]]:
        while True:
            yield from dataloader

    minibatches = forever()
    model.train()
    for step in range(args.max_steps):
        if step == args.late_phase_start:
            # T0: K equal members. Their optimizer states start fresh, as in the paper's code.
            late_phase.release()
            for stack in late_phase.stacks().values():
                optimizer.state.pop(stack, None)

        # One cycle: every member sees one minibatch, then base and members step once.
        total = 0.0
        for k in range(K):
            # Before T0 only member 0 is trained, by plain gradient accumulation.
            late_phase.activate(k if late_phase.released else 0)
            (ids,) = next(minibatches)
            # Several processes exchange gradients once a cycle.
            with accelerator.no_sync(model) if k < K - 1 else contextlib.nullcontext():
                loss = model(input_ids=ids, labels=ids).loss
                # After T0 every member gets the gradient of its own loss, the base their sum.
                accelerator.backward(loss if late_phase.released else loss / K)
            total += loss.item() / K
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 10 == 0:
            phase = "late phase" if late_phase.released else "one model"
            accelerator.print(f"step {step + 1:3d}  {phase}  loss {total:.3f}")

    if accelerator.is_main_process:
        averaged: Any = late_phase.averaged_model()
        averaged.save_pretrained(args.output_dir)
        print(f"Saved the average of {K} members to {args.output_dir}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
