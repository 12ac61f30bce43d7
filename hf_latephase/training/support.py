"""What late-phase training cannot run with, refused when a trainer is constructed."""

from __future__ import annotations

import torch
from packaging.version import Version
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import TrainerCallback, TrainingArguments
from transformers.utils import is_peft_available

from ..compat import FSDP2_TORCH
from ..config import LatePhaseConfig
from ..core.points import resolve_points
from ..core.weights import find_targets
from ..core.weights.targets import attached_families
from .adapter import TrainerAdapter
from .zero_support import check_deepspeed


# Callbacks that go through the model's parameters one by one.
_PLAIN_WEIGHTS = {
    "BEMACallback": ("keeps an average of", "Use ema_decay of LatePhaseConfig, or"),
    "SyncRefModelCallback": ("mixes the reference model with", "Set sync_ref_model=False, or"),
}


def check_supported(trainer: TrainerAdapter, config: LatePhaseConfig) -> None:
    """
    Refuses a trainer's backend or arguments if they cannot train late-phase weights.

    Raises:
        `ValueError`: Names the cause and the alternative.
    """
    args = trainer.args
    if trainer.is_deepspeed_enabled:
        check_deepspeed(trainer, config)
    if trainer.is_fsdp_enabled and getattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2:
        raise ValueError(_fsdp1_refusal(trainer))
    if trainer.is_fsdp_enabled and Version(torch.__version__).release < Version(FSDP2_TORCH).release:
        raise ValueError(
            f"FSDP2 with late-phase weights needs torch {FSDP2_TORCH} or newer, this is {torch.__version__}, whose "
            "updates are not those of one process. Install a newer one, or use DDP."
        )
    if trainer.is_fsdp_enabled and "hypernet" in config.weights:
        raise ValueError(
            "FSDP gathers a layer's weights only while that layer runs, but with weights=['hypernet'] layers share "
            "their weight templates. Use DDP, or another family in `weights`."
        )
    if trainer.is_fsdp_enabled and config.average_device is not None:
        raise ValueError(
            f"average_device={config.average_device!r}: with FSDP the average over time is sharded like the weights, "
            "on their device. Leave average_device out."
        )
    if args.n_gpu > 1:
        raise ValueError(
            "nn.DataParallel would run one member on all GPUs of this process. Launch one process a GPU with "
            "`accelerate launch` or torchrun, or set CUDA_VISIBLE_DEVICES to one GPU."
        )
    if args.max_steps > 0:
        resolve_points(config, args.max_steps)
    check_callbacks(trainer.callbacks, config)
    if config.member_assignment == "sample":
        _check_rows(trainer, config)


def _fsdp1_refusal(trainer: TrainerAdapter) -> str:
    strategy = str(getattr(trainer.accelerator.state.fsdp_plugin, "sharding_strategy", ""))
    reshards = "false" if "SHARD_GRAD_OP" in strategy or "ZERO2" in strategy or "NO_SHARD" in strategy else "true"
    return (
        "FSDP1 flattens parameters, which hides the stacked members. Use FSDP2. In the accelerate config, under "
        "`fsdp_config`, add or change\n"
        "  fsdp_version: 2\n"
        f"  fsdp_reshard_after_forward: {reshards}\n"
        "and take out\n"
        "  fsdp_sharding_strategy, fsdp_use_orig_params, fsdp_sync_module_states, fsdp_backward_prefetch, "
        "fsdp_forward_prefetch\n"
        "which FSDP2 does not have. `accelerate to-fsdp2 --config_file old.yaml --output_file new.yaml` does the same."
    )


def check_callbacks(callbacks: list[TrainerCallback], config: LatePhaseConfig) -> None:
    """
    Refuses callbacks that keep a copy of the model's weights by name, which members change.

    Raises:
        `ValueError`: Names the callback.
    """
    for callback in callbacks:
        name = next((base.__name__ for base in type(callback).__mro__ if base.__name__ in _PLAIN_WEIGHTS), None)
        if name is not None and attached_families(config):
            does, remedy = _PLAIN_WEIGHTS[name]
            raise ValueError(
                f"TRL's {name} {does} the plain model's weights, which the model has not while it is trained with "
                f"num_members={config.num_members} and weights={config.weights}. {remedy} num_members=1 with "
                "weights=[]."
            )


def check_adapter(model: nn.Module, config: LatePhaseConfig, args: TrainingArguments) -> None:
    """
    Refuses late-phase weights on a PEFT model that its adapter's file would lose.

    Raises:
        `ValueError`: Names the cause and the alternative.
    """
    if not is_peft_available():
        return
    from peft import PeftModel, get_peft_model_state_dict

    if not isinstance(model, PeftModel):
        return
    # Adapters read the dtype of their weights outside of the layers' own calls.
    if config.member_assignment == "sample":
        raise ValueError(
            "member_assignment='sample' needs layers that are called with the batch alone, but a PEFT adapter also "
            "reads their bare weights. Use member_assignment='minibatch'."
        )
    if args.load_best_model_at_end and args.save_only_model:
        raise ValueError(
            "load_best_model_at_end with save_only_model would leave only the averaged adapter, from which members "
            "cannot be restored. Set save_only_model=False."
        )
    saved = {tensor.data_ptr() for tensor in get_peft_model_state_dict(model, save_embedding_layers=False).values()}
    for target in find_targets(model, config).targets:
        tensor = getattr(model.get_submodule(target.module), target.tensor)
        # PEFT looks up its copies of whole layers by their parameters' names, which members change.
        if tensor.data_ptr() not in saved or ".modules_to_save." in target.key:
            raise ValueError(
                f"{target.key!r} is no weight of the PEFT adapter's own, and PEFT saves no others that have members. "
                "Choose the adapter's layers, say weights=['full'] with target_modules=['lora_A.default', "
                "'lora_B.default'], or train the model without an adapter."
            )


def _check_rows(trainer: TrainerAdapter, config: LatePhaseConfig) -> None:
    num_members = config.num_members
    batch_size = trainer.train_batch_size
    remedy = "Choose a batch size that num_members divides, or member_assignment='minibatch'."
    if batch_size % num_members:
        raise ValueError(
            f"member_assignment='sample' deals out the rows of each batch, but per_device_train_batch_size="
            f"{batch_size} cannot be shared equally by num_members={num_members}. {remedy}"
        )
    models = [] if trainer.model is None else [trainer.model]
    has_batch_norm = any(isinstance(module, _BatchNorm) for model in models for module in model.modules())
    if batch_size == num_members > 1 and has_batch_norm and {"norm", "full"} & set(config.weights):
        raise ValueError(
            f"member_assignment='sample': per_device_train_batch_size={batch_size} leaves each of num_members="
            f"{num_members} members one row, too few for the batch statistics of its own BatchNorm layers. Choose a "
            "larger batch, or member_assignment='minibatch'."
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
