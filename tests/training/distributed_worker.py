"""One process of the distributed tests: trains a tiny model as told by JSON and lets rank 0 write what came out."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from hf_latephase import LatePhaseConfig
from hf_latephase.core.sharding import gathered, named_parameters
from tiny import MODELS, double, trainer


class Traffic(TrainerCallback):
    """Counts what DDP all-reduces on CPUs in each of Trainer's steps, and which members this rank runs."""

    def __init__(self) -> None:
        self.steps: list[list[int]] = []
        self.members: list[int] = []
        self.calls = self.bytes = 0

    def on_train_begin(self, *args: Any, model: Any, **kwargs: Any) -> None:
        self.numbers = sum(p.numel() for p in model.parameters())
        wrapped = self.trainer.model_wrapped
        if isinstance(wrapped, DistributedDataParallel) and not next(wrapped.parameters()).is_cuda:
            wrapped.register_comm_hook(None, self.reduce)
        activate = self.trainer.late_phase.activate

        def watched(member: int | None) -> None:
            if member is not None:
                self.members.append(member)
            activate(member)

        self.trainer.late_phase.activate = watched

    def reduce(self, _: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        buffer = bucket.buffer()
        self.calls += 1
        self.bytes += buffer.numel() * buffer.element_size()
        work = dist.all_reduce(buffer.div_(dist.get_world_size()), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps.append([self.calls, self.bytes])
        self.calls = self.bytes = 0


def allow_fsdp_on_cpu() -> None:
    """accelerate turns FSDP on for accelerators only; FSDP2 itself runs on gloo and CPUs just as well."""
    original = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.fsdp_plugin = kwargs.get("fsdp_plugin") or getattr(self, "fsdp_plugin", None)
        if self.fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = init


def train(task: dict[str, Any]) -> None:
    """Trains, evaluates, saves, and writes the result if this is rank 0."""
    torch.manual_seed(0)
    if task.get("fsdp"):
        allow_fsdp_on_cpu()
    model = double(MODELS[task["model"]]())
    config = LatePhaseConfig(**task["config"])
    traffic = Traffic()
    optimizer = (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}) if task.get("sgd", True) else None
    run = trainer(
        task["folder"], model, config, rows=task.get("rows", 96), optimizer=optimizer,
        extra={"callbacks": [traffic]}, **task["arguments"],
    )  # fmt: skip
    traffic.trainer = run
    if "world_size" in task:
        assert run.args.world_size == run.accelerator.num_processes == task["world_size"]
    run.train(resume_from_checkpoint=task.get("resume"))
    if not task.get("fsdp"):
        assert list(run.model.state_dict()) == list(MODELS[task["model"]]().state_dict()), "the stock model again"
        assert run.model is model
    if task.get("again"):
        run.train()
    members = list(traffic.members)
    loss = run.evaluate()["eval_loss"]
    table = run.evaluate_members() if task.get("members") else None
    run.save_model(task["saved"])
    weights = {name: gathered(p).clone() for name, p in named_parameters(run.model).items()}
    # Members in place of their average, which of BatchNorm depends on the running statistics.
    averages = {target.key for target in run.late_phase.targets if target.family != "rank1"}
    weights = run.late_phase.averaged_state_dict(weights)  # FSDP's model stays attached
    weights = {name: value for name, value in weights.items() if value is not None and name not in averages}
    weights |= {name: gathered(stack).clone() for name, stack in run.late_phase.stacks().items()}
    dealt: list[Any] = [None] * run.args.world_size
    if run.args.world_size > 1:
        dist.all_gather_object(dealt, members)
    else:
        dealt = [members]
    if run.is_world_process_zero():
        result = {
            "weights": weights,
            "statistics": {name: s.clone() for name, s in run.late_phase.statistics().items()},
            "loss": loss,
            "logs": [{k: log[k] for k in ("loss", "grad_norm", "member_loss_mean", "member_loss_std") if k in log}
                     for log in run.state.log_history if "learning_rate" in log],
            "traffic": traffic.steps,
            "numbers": traffic.numbers,
            "members": dealt,
            "table": dict(table) if table else None,
            "class": type(run.model).__name__,
            "sharded": [n for n, p in named_parameters(run.model).items() if isinstance(p, DTensor)],
        }  # fmt: skip
        torch.save(result, task["result"])


def main() -> None:
    torch.set_num_threads(1)
    train(json.loads(Path(sys.argv[1]).read_text()))
    if dist.is_initialized():
        dist.barrier()
        # All work is done. Now and then gloo's threads wait for each other while the group is destroyed (torch 2.6) or
        # abort the interpreter while it shuts down (2.14).
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
