"""What late-phase training cannot run with, refused when a trainer is constructed."""

from __future__ import annotations

from typing import Any

from .config import LatePhaseConfig


def check_supported(trainer: Any, config: LatePhaseConfig) -> None:
    """
    Refuses a trainer's backend or arguments if they cannot train late-phase weights.

    Raises:
        `ValueError`: Names the cause and the alternative.
    """
    args = trainer.args
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            "DeepSpeed steps its own copy of the weights inside its engine, where members cannot be held back until "
            "their cycle ends. Use DDP, or FSDP2 (`fsdp_version: 2` in the accelerate config) for sharding."
        )
    if trainer.is_fsdp_enabled and getattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2:
        raise ValueError(
            "FSDP1 flattens parameters, which hides the stacked members. Use FSDP2: `fsdp_version: 2` in the "
            "accelerate config."
        )
    if args.n_gpu > 1:
        raise ValueError(
            "nn.DataParallel would run one member on all GPUs of this process. Launch one process a GPU with "
            "`accelerate launch` or torchrun, or set CUDA_VISIBLE_DEVICES to one GPU."
        )
    if trainer.optimizer is not None:
        raise ValueError(
            "`optimizers` holds an optimizer that was built before the members existed, so it would not train them. "
            "Pass `optimizer_cls_and_kwargs`, or choose one by `optim` in TrainingArguments."
        )
    if config.member_assignment == "sample":
        _check_rows(trainer, config.num_members)


def _check_rows(trainer: Any, num_members: int) -> None:
    batch_size = trainer._train_batch_size
    remedy = "Choose a batch size that num_members divides, or member_assignment='minibatch'."
    if batch_size % num_members:
        raise ValueError(
            f"member_assignment='sample' deals out the rows of each batch, but per_device_train_batch_size="
            f"{batch_size} cannot be shared equally by num_members={num_members}. {remedy}"
        )
    dataset = trainer.train_dataset
    if dataset is None or not hasattr(dataset, "__len__") or trainer.args.dataloader_drop_last:
        return
    last = len(dataset) % (batch_size * trainer.args.world_size)
    # accelerate fills up uneven last batches across several processes.
    if trainer.args.world_size == 1 and last % num_members:
        raise ValueError(
            f"member_assignment='sample': the last batch of an epoch has {last} of {batch_size} rows, which "
            f"num_members={num_members} members cannot share equally. Set dataloader_drop_last=True. {remedy}"
        )
