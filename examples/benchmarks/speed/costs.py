"""What late-phase training costs besides time: kernels, memory traffic, peak memory, attaching, checkpoints."""

from __future__ import annotations

import gc
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback

from hf_latephase import LatePhase, LatePhaseConfig
from workloads import VOCAB, Setting, gpt2


def timed(call: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Returns the seconds that a call takes, and its value."""
    start = time.perf_counter()
    value = call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, value


# ---- kernels and traffic ----


class Kernels(TorchDispatchMode):
    """
    Counts the operations that compute something, not those that make views: on a GPU, about the kernels launched.

    Attributes:
        count (`int`): The operations.
        bytes (`int`): The sizes of the tensors that they read and write.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not func.is_view and func.name() not in ("aten::detach", "aten::_unsafe_view"):
            self.count += 2 if func.name() == "aten::select_backward" else 1  # fills with zeros, copies
            tensors = tree_leaves((args, kwargs, output))
            self.bytes += sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
        return output


class _CountedCycle(TrainerCallback):
    """Counts the third cycle of a training run, then ends it."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self.kernels = Kernels()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2 * self._steps:
            self.kernels.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3 * self._steps:
            self.kernels.__exit__(None, None, None)
            control.should_training_stop = True


def count_kernels(setting: Setting) -> dict[str, Any]:
    """Kernels and megabytes a minibatch, of plain and of late-phase training, optimizer steps included."""
    figures: dict[str, Any] = {"setting": setting.name}
    for name, late in (("plain", False), ("late", True)):
        cycle = _CountedCycle(setting.steps)
        with tempfile.TemporaryDirectory() as folder:
            trainer = setting.trainer(late, folder, "cpu", [cycle])
            trainer.train()
        figures[f"{name}_kernels"] = cycle.kernels.count / setting.minibatches
        figures[f"{name}_megabytes"] = cycle.kernels.bytes / setting.minibatches / 1e6
        if late:
            figures["tensors"] = len(trainer.late_phase.targets)
    return figures


# ---- memory ----


def peak_memory(setting: Setting, late: bool, device: str) -> int:
    """
    Returns the most bytes that tensors held at once in two cycles, model and optimizer included.

    On CPUs they are counted from the allocator's own events: a process's resident memory also has what the C library
    keeps for later, which differs by more than what is looked for.
    """
    gc.collect()  # what is left of other trainers must not be freed while this one is watched
    with tempfile.TemporaryDirectory() as folder:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            _train_two_cycles(setting, late, folder, device)
            return torch.cuda.max_memory_allocated() - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            _train_two_cycles(setting, late, folder, device)
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    return max(itertools.accumulate(event["args"]["Bytes"] for event in events))


def _train_two_cycles(setting: Setting, late: bool, folder: str, device: str) -> None:
    trainer = setting.trainer(late, folder, device, [])
    trainer.args.max_steps = 2 * setting.steps
    trainer.train()


# ---- attaching, dealing out rows, saving ----


def attaching(device: str) -> dict[str, float]:
    """Seconds to attach, release, average and detach rank-1 and norm members on the smallest GPT-2, K = 10."""
    model = GPT2LMHeadModel(GPT2Config()).to(device)
    config = LatePhaseConfig(num_members=10, weights=["rank1", "norm"])
    seconds = {}
    seconds["attach"], late_phase = timed(lambda: LatePhase(model, config), device)
    for name in ("release", "averaged_state_dict", "detach"):
        seconds[name], _ = timed(getattr(late_phase, name), device)
    return seconds


def sample_speedup(pairs: int, device: str) -> dict[str, list[float]]:
    """
    Time of 8 passes, one member each, over that of one pass that deals out the same rows (quartiles).

    Beside it the same of the model without members: what a larger batch alone gains, and so the most there is.
    """
    plain, model = gpt2(4, 256, 64).to(device), gpt2(4, 256, 64).to(device)
    late_phase = LatePhase(model, LatePhaseConfig(num_members=8, weights=["norm"], member_assignment="sample"))
    late_phase.release()
    rows = torch.randint(3, VOCAB, (32, 64), device=device)

    def run(of: nn.Module, batch: Tensor) -> None:
        of(input_ids=batch, labels=batch).loss.backward()

    def passes() -> None:
        for member, block in enumerate(rows.chunk(8)):
            late_phase.activate(member)
            run(model, block)

    def one_pass() -> None:
        late_phase.activate_by_sample()
        run(model, rows)

    def plain_passes() -> None:
        for block in rows.chunk(8):
            run(plain, block)

    def plain_pass() -> None:
        run(plain, rows)

    sides = {"late-phase": (passes, one_pass), "plain": (plain_passes, plain_pass)}
    ratios: dict[str, list[float]] = {name: [] for name in sides}
    for _, (name, (many, one)) in itertools.product(range(pairs + 1), sides.items()):
        ratios[name].append(timed(many, device)[0] / timed(one, device)[0])
    return {name: statistics.quantiles(values[1:], n=4) for name, values in ratios.items()}


def checkpoint_sizes() -> dict[str, int]:
    """Bytes of a checkpoint of plain Trainer and of rank-1 members, K = 10, at the end of a cycle and inside one."""
    setting = Setting("gpt2 4x256", ("rank1",), one_step=False)
    sizes = {}
    # Not before the first cycle has ended: until then there is no optimizer state to save.
    for name, late, step in (("plain", False, 10), ("late-phase", True, 10), ("late-phase, inside a cycle", True, 15)):
        with tempfile.TemporaryDirectory() as folder:
            trainer: Trainer = setting.trainer(late, folder, "cpu", [_SaveAndStop(step)])
            trainer.train()
            saved = Path(folder) / f"checkpoint-{step}"
            sizes[name] = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
    return sizes


class _SaveAndStop(TrainerCallback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = control.should_training_stop = state.global_step == self._step
