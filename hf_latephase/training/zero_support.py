"""Which settings of DeepSpeed late-phase training cannot run with, refused when a trainer is constructed."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import transformers
from packaging.version import Version

from ..compat import DEEPSPEED, LOOP_HAS_HOOKS
from ..config import LatePhaseConfig
from .adapter import TrainerAdapter
from .stepping import make_cycle


def check_deepspeed(trainer: TrainerAdapter, config: LatePhaseConfig) -> None:
    """
    Refuses settings of DeepSpeed with which its engine cannot make a cycle of one step.

    Raises:
        `ValueError`: Names the cause and the alternative.
    """
    _check_releases()
    settings = trainer.deepspeed_config
    zero = settings.get("zero_optimization", {})
    _check_stage(zero.get("stage", 0))
    _check_cycle(trainer, config)
    if "optimizer" in settings:
        kind = settings["optimizer"].get("type", "")
        raise ValueError(
            f"The DeepSpeed config has an optimizer of its own ({kind}), which would put base and members into one "
            "group, or mix the elements of a tensor. Take `optimizer` out of it: TrainingArguments choose one "
            "(optim='adamw_torch_fused' by default), which the engine then steps."
        )
    _check_offload(zero.get("offload_optimizer") or {}, settings)
    if zero.get("round_robin_gradients"):
        raise ValueError(
            "With round_robin_gradients DeepSpeed (seen with 0.19.8) looks for a weight's float32 copy in the wrong "
            'place, so that members could not be released. Set `"round_robin_gradients": false` in its config.'
        )
    for name, values, key in (
        ("zenflow", zero, "zenflow"),
        ("compression_training", settings, "compression_training"),
        ("tensor parallelism", settings.get("tensor_parallel", {}), "autotp_size"),
    ):
        if values.get(key):
            raise ValueError(
                f"DeepSpeed's {name} was never tried with late-phase weights. Take {key!r} out of its config."
            )
    if trainer.args.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size begins anew with the weights that DeepSpeed's engine has taken apart. Set "
            "per_device_train_batch_size."
        )


def _check_releases() -> None:
    release = version("deepspeed")
    if Version(release) < Version(DEEPSPEED) or not LOOP_HAS_HOOKS:
        raise ValueError(
            f"DeepSpeed with late-phase weights needs deepspeed {DEEPSPEED} and transformers 5.3, or newer; these are "
            f"{release} and {transformers.__version__}. Install newer ones, or use DDP."
        )


def _check_stage(stage: int) -> None:
    if stage == 3:
        raise ValueError(
            "ZeRO-3 takes weights away from their layers, so that members can be neither used, released nor averaged "
            "there. Use ZeRO-2, or for sharded weights FSDP2 (`fsdp_version: 2` in the accelerate config)."
        )
    if stage not in (1, 2):
        raise ValueError(
            'DeepSpeed without ZeRO is DDP with an engine of its own. Use DDP, or ZeRO (`"zero_optimization": '
            '{"stage": 1}` or 2 in its config).'
        )


def _check_cycle(trainer: TrainerAdapter, config: LatePhaseConfig) -> None:
    cycle, steps = make_cycle(config, trainer), trainer.args.gradient_accumulation_steps
    if cycle.steps_per_cycle == 1:
        return
    raise ValueError(
        f"A cycle of {cycle.length} minibatches would span several steps with gradient_accumulation_steps={steps} on "
        f"{cycle.num_processes} processes, but DeepSpeed's engine steps at the end of each. Set "
        f"gradient_accumulation_steps={cycle.accumulation_for_one_step(steps)}, or use DDP."
    )


def _check_offload(offload: dict[str, Any], settings: dict[str, Any]) -> None:
    device = offload.get("device") or "none"
    if device not in ("none", "cpu"):
        raise ValueError(f"Offloading the optimizer to {device!r} was never tried with late-phase weights. Use 'cpu'.")
    if device == "cpu" and settings.get("zero_force_ds_cpu_optimizer", True):
        raise ValueError(
            "With offload_optimizer accelerate replaces the optimizer by DeepSpeed's own for CPUs, which cannot be "
            'tried out for whether it treats members as separate. Set `"zero_force_ds_cpu_optimizer": false` in the '
            "DeepSpeed config: torch's optimizer then steps on the CPU. In an accelerate config that takes "
            "`deepspeed_config_file`."
        )
