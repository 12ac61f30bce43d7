"""One of two processes that train tiny models as told by JSON, with DeepSpeed or DDP, and write what came of each."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback
from transformers.utils import logging

from hf_latephase import LatePhaseConfig
from tiny import MODELS, trainer, use_hub


class Traffic(TrainerCallback):
    """Counts the bytes that DeepSpeed reduces (not its scalars) and gathers in each of Trainer's steps."""

    def __init__(self) -> None:
        self.steps: list[dict[str, int]] = []
        self.bytes = {"reduced": 0, "gathered": 0}
        self.numbers = 0

    def on_train_begin(self, *args: Any, model: Any, **kwargs: Any) -> None:
        self.numbers = sum(parameter.numel() for parameter in model.parameters())

    def watch(self) -> None:
        from deepspeed.comm.torch import TorchBackend

        for kind, names in {
            "reduced": ("all_reduce", "reduce", "reduce_scatter_tensor"),
            "gathered": ("all_gather_into_tensor",),
        }.items():
            for name in names:
                setattr(TorchBackend, name, self._counted(getattr(TorchBackend, name), kind))

    def _counted(self, function: Any, kind: str) -> Any:
        def call(backend: Any, first: Any = None, *args: Any, **kwargs: Any) -> Any:
            tensor = first if first is not None else kwargs.get("tensor", kwargs.get("output_tensor"))
            if tensor.numel() > 1:
                self.bytes[kind] += tensor.numel() * tensor.element_size()
            return function(backend, *(() if first is None else (first,)), *args, **kwargs)

        return call

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps.append(dict(self.bytes))
        self.bytes.update(dict.fromkeys(self.bytes, 0))


class Masters(TrainerCallback):
    """Looks at DeepSpeed's float32 copies before and after T0, and at what an average over time takes of them."""

    def __init__(self) -> None:
        self.found: dict[str, list[float]] = {"before": [], "spread": [], "rounded": [], "average": []}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from deepspeed.utils import safe_get_full_fp32_param

        late_phase = self.trainer.late_phase
        if late_phase.released and not self.found["before"]:  # this is T0
            for name, stack in late_phase.stacks().items():
                master = safe_get_full_fp32_param(stack)
                self.found["before"].append((master[0] - self.rows[name]).abs().max().item())
                self.found["spread"].append((master - master[:1]).abs().max().item())
                self.found["rounded"].append((master - stack).abs().max().item())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from deepspeed.utils import safe_get_full_fp32_param

        stacks = self.trainer.late_phase.stacks()
        self.rows = {name: safe_get_full_fp32_param(stack)[0] for name, stack in stacks.items()}
        average = self.trainer.time_average
        if average is not None and average.num_averaged == 1:  # a copy
            for name, parameter in self.trainer.model.named_parameters():
                difference = average.values[name] - safe_get_full_fp32_param(parameter)
                self.found["average"].append(difference.abs().max().item())


class Hub:
    """Stands for the Hub: keeps a copy of what is uploaded."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, folder_path: str, **kwargs: Any) -> Any:
        ignored = shutil.ignore_patterns("checkpoint-*", "_*")
        shutil.copytree(folder_path, self._folder, dirs_exist_ok=True, ignore=ignored)
        return SimpleNamespace(commit_url="", done=lambda: True, result=lambda: None)


def train(task: dict[str, Any]) -> dict[str, Any]:
    """Trains, evaluates, saves, and returns what came of it."""
    if not task.get("launched"):  # accelerate leaves it behind; its own launcher sets it
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    torch.manual_seed(0)
    folder = task["folder"]
    use_hub(setattr, Hub(f"{folder}-hub"))
    optimizer = (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}) if task.get("sgd") else None
    arguments = {"max_steps": 30, "logging_steps": 5, "weight_decay": 0.1, "learning_rate": 1e-3, "adam_epsilon": 1e-4}
    if "zero" in task:
        arguments["deepspeed"] = task["zero"]
    model = MODELS[task.get("model", "gpt2")](**task.get("model_arguments", {}))
    if "weights" in task:
        found = torch.load(task["weights"], weights_only=True)["weights"]
        model.load_state_dict({name: found[f"model.{name}"] for name in model.state_dict()})
    run = trainer(
        folder, model, LatePhaseConfig(**task["config"]), rows=task.get("rows", 500), optimizer=optimizer,
        **{**arguments, **task.get("arguments", {})},
    )  # fmt: skip
    names = list(model.state_dict())
    with_deepspeed = "zero" in task or task.get("launched", False)
    assert run.args.world_size == run.accelerator.num_processes == 2
    assert run.is_deepspeed_enabled == with_deepspeed
    watches: dict[str, Any] = {"traffic": Traffic(), "masters": Masters()}
    for name in task.get("watch", []):
        watches[name].trainer = run
        run.add_callback(watches[name])
    if "traffic" in task.get("watch", []):
        watches["traffic"].watch()
    run.train(resume_from_checkpoint=task.get("resume"))
    if task.get("again"):
        run.train()
    assert run.model is model and list(model.state_dict()) == names, "the stock model again"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    if "saved" in task:
        run.save_model(task["saved"])
    if task.get("push"):
        run.push_to_hub()
    weights = {f"model.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    weights |= {f"members.{name}": stack.clone() for name, stack in run.late_phase.stacks().items()}
    digests: list[Any] = [None, None]
    dist.all_gather_object(digests, [tensor.double().sum().item() for tensor in weights.values()])
    keys = ("loss", "grad_norm", "base_grad_norm", "member_grad_norm", "member_loss_mean", "member_distance")
    return {
        "weights": weights,
        "loss": run.evaluate()["eval_loss"],
        "table": {row: dict(m) for row, m in run.evaluate_members().items()} if task.get("members") else None,
        "logs": [{k: log[k] for k in keys if k in log} for log in run.state.log_history if "learning_rate" in log],
        "best": [run.state.best_model_checkpoint, run.state.best_metric],
        "is_same_on_all": digests[0] == digests[1],
        "traffic": watches["traffic"].steps,
        "numbers": watches["traffic"].numbers,
        "masters": watches["masters"].found,
        "stage": run.deepspeed.zero_optimization_stage() if with_deepspeed else None,
        "dtype": str(model.dtype) if hasattr(model, "dtype") else None,
    }


def main() -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    tasks = json.loads(Path(sys.argv[1]).read_text())
    for name, task in tasks["runs"].items():
        result = {}
        try:
            result = train(task)
        except ValueError as error:
            if not task.get("is_refused"):
                raise
            result = {"error": str(error)}
        if dist.get_rank() == 0:
            torch.save(result, f"{tasks['results']}/{name}.pt")
        dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # see distributed_worker.py


if __name__ == "__main__":
    main()
