"""
What late-phase training costs beside plain training: time, memory, checkpoints, attaching.

    python examples/benchmarks/speed.py                       # the rows that bear the goals
    python examples/benchmarks/speed.py --rows gpt2 lstm      # rows whose name contains one of these
    python examples/benchmarks/speed.py --all --device cuda

Both sides are real trainers, `Trainer` and `LatePhaseTrainer`, with the same model, data, batch and number of
minibatches. They run in one process and take turns: a block of one side, the same block of the other, the order
alternating, so that whatever else the machine does falls on both. The figure is the median over the pairs of the
plain block's time over the late-phase block's (1.00: as fast; above: faster), with the quartiles. Peak memory is
measured in a process of each side's own, above what the process held before the model was made.

Writes `speed.json` and `speed.md` beside this file and the table into the README.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from runs import environment, markdown, write_figures
from torch import nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from hf_latephase import LatePhase, LatePhaseConfig, LatePhaseTrainer
from hf_latephase.models import LSTMForCausalLM, LSTMLMConfig, WideResNetConfig, WideResNetForImageClassification


VOCAB = 259


def gpt2(layers: int, width: int, positions: int) -> nn.Module:
    """A GPT-2 over bytes."""
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=positions, n_embd=width, n_layer=layers, n_head=width // 64,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def llama(layers: int, width: int, positions: int) -> nn.Module:
    """A llama over bytes."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, max_position_embeddings=positions,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def lstm() -> nn.Module:
    """The paper's LSTM."""
    return LSTMForCausalLM(LSTMLMConfig())


def wide_resnet() -> nn.Module:
    """WRN 16-2."""
    config = WideResNetConfig(depth=16, widen_factor=2, num_labels=10)
    return WideResNetForImageClassification(config).to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Workload:
    """A model and the size of its minibatches: rows, and tokens a row (0: images)."""

    make: Callable[[], nn.Module]
    rows: int
    tokens: int


WORKLOADS = {
    "gpt2 4x256": Workload(lambda: gpt2(4, 256, 128), 8, 128),
    "gpt2 8x512": Workload(lambda: gpt2(8, 512, 256), 4, 256),
    "gpt2 2x128": Workload(lambda: gpt2(2, 128, 64), 4, 64),
    "llama 4x256": Workload(lambda: llama(4, 256, 128), 8, 128),
    "llama 8x512": Workload(lambda: llama(8, 512, 256), 4, 256),
    "lstm 500": Workload(lstm, 32, 100),
    "wrn 16-2": Workload(wide_resnet, 128, 0),
}


class Minibatches(Dataset):
    """Random rows of the shape that a workload asks for; a few, seen again and again."""

    def __init__(self, workload: Workload, rows: int, length: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._length = length
        if workload.tokens:
            ids = torch.randint(3, VOCAB, (4 * rows, workload.tokens), generator=generator)
            self._items = {"input_ids": ids, "labels": ids}
        else:
            images = torch.randn(rows, 3, 32, 32, generator=generator)
            labels = torch.randint(0, 10, (rows,), generator=generator)
            self._items = {"pixel_values": images, "labels": labels}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: items[index % len(items)] for name, items in self._items.items()}


@dataclass(frozen=True)
class Row:
    """
    One comparison.

    Attributes:
        workload (`str`): A name in `WORKLOADS`.
        weights (`tuple[str, ...]`): The families.
        num_members (`int`): K.
        one_step (`bool`): Whether a cycle is one optimizer step (both sides accumulate K) or K of Trainer's steps.
        by_sample (`bool`): Whether rows are dealt out; the batch is then K times as large.
        goal (`float`, *optional*): The ratio to reach.
    """

    workload: str
    weights: tuple[str, ...]
    num_members: int = 10
    one_step: bool = True
    by_sample: bool = False
    goal: float | None = None

    @property
    def name(self) -> str:
        """What the row is called."""
        mapping = "by sample" if self.by_sample else "one step" if self.one_step else "several steps"
        return f"{self.workload}, {'+'.join(self.weights)}, K={self.num_members}, {mapping}"


# The goals of the project, each by the smallest workload that shows it.
GOALS = [
    Row("gpt2 4x256", ("norm",), goal=1.0),
    Row("gpt2 4x256", ("norm",), one_step=False, goal=1.0),
    Row("gpt2 4x256", ("rank1",), goal=0.98),
    Row("gpt2 4x256", ("rank1",), one_step=False, goal=1.0),
    Row("llama 4x256", ("rank1",), goal=0.98),
    Row("lstm 500", ("rank1",), goal=0.98),
    Row("wrn 16-2", ("head", "norm"), goal=1.0),
    Row("wrn 16-2", ("head", "norm"), one_step=False, goal=1.0),
]
MORE = [
    Row("gpt2 8x512", ("rank1",), goal=0.98),
    Row("gpt2 8x512", ("norm",), goal=1.0),
    Row("llama 8x512", ("rank1",), goal=0.98),
    Row("llama 4x256", ("norm",), goal=1.0),
    Row("llama 4x256", ("rank1", "norm")),
    Row("gpt2 4x256", ("rank1", "norm")),
    Row("lstm 500", ("rank1",), one_step=False),
    *(Row("gpt2 2x128", ("rank1",), k, one_step) for k in (2, 10, 64) for one_step in (True, False)),
    Row("gpt2 2x128", ("rank1", "norm"), 8, by_sample=True),
    Row("wrn 16-2", ("rank1",)),
]


# ---- two trainers that take turns ----


class Turns(TrainerCallback):
    """Lets a trainer run one block at a time, when told to, and keeps the time of each block."""

    def __init__(self, steps_per_block: int, device: str) -> None:
        self._steps, self._device = steps_per_block, device
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._start = 0.0
        self.seconds: list[float] = []
        self.stopping = False

    def block(self) -> float:
        """Runs one block and returns its seconds."""
        self._go.release()
        self._done.acquire()
        return self.seconds[-1]

    def stop(self) -> None:
        """Lets the trainer end."""
        self.stopping = True
        self._go.release()

    def _now(self) -> float:
        if self._device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Waits for its turn where a block begins."""
        if state.global_step % self._steps == 0:
            self._go.acquire()
            self._start = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gives the turn back where a block ends."""
        if self.stopping:
            control.should_training_stop = True
        elif state.global_step % self._steps == 0:
            self.seconds.append(self._now() - self._start)
            self._done.release()


def make_trainer(row: Row, late: bool, folder: str, device: str, callbacks: list[TrainerCallback]) -> Trainer:
    """One side of a row."""
    workload = WORKLOADS[row.workload]
    accumulation = row.num_members if row.one_step and not row.by_sample else 1
    rows = workload.rows * (row.num_members if row.by_sample else 1)
    torch.manual_seed(0)
    args = TrainingArguments(
        folder, per_device_train_batch_size=rows, gradient_accumulation_steps=accumulation, max_steps=1_000_000,
        learning_rate=1e-5, lr_scheduler_type="constant", report_to=[], use_cpu=device == "cpu", disable_tqdm=True,
        save_strategy="no", logging_strategy="no", train_sampling_strategy="sequential",
        dataloader_pin_memory=device == "cuda",
    )  # fmt: skip
    config = LatePhaseConfig(
        num_members=row.num_members, weights=list(row.weights), late_phase_start=0,
        member_assignment="sample" if row.by_sample else "minibatch",
    )  # fmt: skip
    return (LatePhaseTrainer if late else Trainer)(
        model=workload.make(),
        args=args,
        train_dataset=Minibatches(workload, rows, 10**9),
        data_collator=default_data_collator,
        callbacks=callbacks,
        **({"late_phase_config": config} if late else {}),
    )


def measure(row: Row, pairs: int, device: str) -> dict[str, Any]:
    """The ratios plain time / late-phase time of some pairs of blocks of one cycle each."""
    # A cycle's minibatches: in one step, or in K.
    steps = 1 if row.one_step or row.by_sample else row.num_members
    sides = [Turns(steps, device), Turns(steps, device)]
    with tempfile.TemporaryDirectory() as folder:
        trainers = [make_trainer(row, bool(late), folder, device, [sides[late]]) for late in range(2)]
        threads = [threading.Thread(target=trainer.train, daemon=True) for trainer in trainers]
        for thread in threads:
            thread.start()
        for _ in range(2):  # warm-up
            for side in sides:
                side.block()
        ratios, seconds = [], []
        for pair in range(pairs):
            order = (0, 1) if pair % 2 == 0 else (1, 0)
            took = {late: sides[late].block() for late in order}
            ratios.append(took[0] / took[1])
            seconds.append(took[0] / row.num_members)
        for side, thread in zip(sides, threads, strict=True):
            side.stop()
            thread.join()
    gc.collect()
    lower, median, upper = statistics.quantiles(ratios, n=4)
    return {
        "row": row.name, "goal": row.goal, "throughput": median, "quartiles": [lower, upper], "pairs": pairs,
        "plain_ms_per_minibatch": 1000 * statistics.median(seconds),
    }  # fmt: skip


# ---- memory, in a process of its own ----


def peak_memory(row: Row, late: bool, device: str) -> int:
    """Peak bytes of two cycles above what the process held before."""
    command = [
        sys.executable,
        __file__,
        "--memory_of",
        json.dumps(dataclasses.asdict(row) | {"late": late, "device": device}),
    ]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_peak_memory(task: dict[str, Any]) -> None:
    """What the process of `peak_memory` does."""
    late, device = task.pop("late"), task.pop("device")
    row = Row(**{**task, "weights": tuple(task["weights"])})

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    # Import and the first allocations of threads are no part of the model's memory.
    torch.nn.functional.mse_loss(
        torch.randn(8, 8, requires_grad=True) @ torch.randn(8, 8), torch.zeros(8, 8)
    ).backward()
    before = status("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(row, late, folder, device, [])
        trainer.args.max_steps = 2 * (1 if row.one_step or row.by_sample else row.num_members)
        trainer.train()
    print(torch.cuda.max_memory_allocated() if device == "cuda" else status("VmHWM") - before)


# ---- other figures ----


def attaching(device: str) -> dict[str, float]:
    """Seconds to attach, release and average rank-1 members on GPT-2 of its smallest published size, K = 10."""
    model = GPT2LMHeadModel(GPT2Config()).to(device)
    seconds = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        value = call()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds[name] = time.perf_counter() - start
        return value

    late_phase = timed("attach", lambda: LatePhase(model, LatePhaseConfig(num_members=10, weights=["rank1", "norm"])))
    timed("release", late_phase.release)
    timed("average", late_phase.averaged_state_dict)
    timed("detach", late_phase.detach)
    return seconds


def sample_speedup(pairs: int, device: str) -> list[float]:
    """Time of 8 passes, one member each, over that of one pass that deals out the same rows (quartiles)."""
    workload = Workload(lambda: gpt2(4, 256, 64), 4, 64)
    model = workload.make().to(device)
    late_phase = LatePhase(model, LatePhaseConfig(num_members=8, weights=["norm"], member_assignment="sample"))
    late_phase.release()
    rows = torch.randint(3, VOCAB, (32, 64), device=device)

    def passes() -> None:
        for member, block in enumerate(rows.chunk(8)):
            late_phase.activate(member)
            model(input_ids=block, labels=block).loss.backward()

    def one_pass() -> None:
        late_phase.activate_by_sample()
        model(input_ids=rows, labels=rows).loss.backward()

    ratios = []
    for _ in range(pairs + 1):
        took = []
        for call in (passes, one_pass):
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            took.append(time.perf_counter() - start)
        ratios.append(took[0] / took[1])
    return statistics.quantiles(ratios[1:], n=4)


def checkpoint_sizes(device: str) -> dict[str, int]:
    """Bytes of a checkpoint of plain Trainer and of rank-1 members, K = 10, at the end of a cycle and inside one."""
    row = Row("gpt2 4x256", ("rank1",), one_step=False)
    sizes = {}
    for name, late, step in (("plain", False, 10), ("late-phase", True, 10), ("late-phase, inside a cycle", True, 5)):
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(row, late, folder, device, [])
            trainer.args.max_steps, trainer.args.save_strategy, trainer.args.save_steps = 12, "steps", step
            trainer.add_callback(_StopAt(step))
            trainer.train()
            saved = Path(folder) / f"checkpoint-{step}"
            sizes[name] = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
    return sizes


class _StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = control.should_training_stop = state.global_step == self._step


@dataclass
class SpeedArguments:
    """What is measured, and where."""

    rows: list[str] | None = field(default=None, metadata={"help": "Only rows whose name contains one of these."})
    all: bool = field(default=False, metadata={"help": "All rows, not only those that bear the goals."})
    pairs: int = field(default=20, metadata={"help": "Pairs of blocks a row, at least 20 for the record."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    threads: int = field(default=2, metadata={"help": "CPU threads."})
    write: bool = field(default=True, metadata={"help": "Whether to write the files and the README's table."})
    memory_of: str | None = field(default=None, metadata={"help": "Used by the script itself."})

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda, got {self.device!r}.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device=cuda, but torch sees no GPU. Use cpu.")
        if self.pairs < 2:
            raise ValueError(f"pairs must be at least 2, got {self.pairs}.")


def table(figures: dict[str, Any]) -> str:
    """The figures in Markdown."""
    lines = []
    for record in figures["rows"]:
        lower, upper = record["quartiles"]
        goal = "–" if record["goal"] is None else f"≥ {record['goal']:.2f}"
        memory = f"{record['memory']:.2f}" if "memory" in record else "–"
        figure = f"{record['throughput']:.3f} ({lower:.3f} to {upper:.3f})"
        lines.append([record["row"], figure, goal, memory, f"{record['plain_ms_per_minibatch']:.0f}"])
    header = ["late-phase over plain", "throughput (quartiles)", "goal", "peak memory", "plain, ms a minibatch"]
    text = markdown(header, 1, lines)
    sizes, seconds, speedup = figures["checkpoint_bytes"], figures["attaching_seconds"], figures["sample_speedup"]
    others = [
        *((f"checkpoint of {name} over plain", f"{size / sizes['plain']:.2f}")
          for name, size in sizes.items() if name != "plain"),
        *((f"{name}, gpt2 with 124 M parameters, K=10", f"{value:.2f} s") for name, value in seconds.items()),
        ("one pass by sample, 8 members × 4 rows × 64 tokens, over 8 passes",
         f"{speedup[1]:.2f} × faster ({speedup[0]:.2f} to {speedup[2]:.2f})"),
    ]  # fmt: skip
    return text + "\n" + markdown(["other figures", ""], 1, others)


def main() -> None:
    """Measures and writes."""
    (arguments,) = HfArgumentParser(SpeedArguments).parse_args_into_dataclasses()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    if arguments.memory_of is not None:
        print_peak_memory(json.loads(arguments.memory_of))
        return
    rows = GOALS + MORE if arguments.all or arguments.rows else GOALS
    if arguments.rows:
        rows = [row for row in rows if any(part in row.name for part in arguments.rows)]
    records = []
    for row in tqdm(rows, desc="Rows"):
        record = measure(row, arguments.pairs, arguments.device)
        record["memory"] = peak_memory(row, True, arguments.device) / peak_memory(row, False, arguments.device)
        records.append(record)
        tqdm.write(f"{row.name}: {record['throughput']:.3f} {record['quartiles']}, memory {record['memory']:.3f}")
    figures = {
        "command": " ".join(["python", *sys.argv]),
        "environment": environment() | {"threads per run": arguments.threads, "torch": torch.__version__,
                                        "transformers": transformers.__version__, "device": arguments.device},
        "rows": records,
        "attaching_seconds": attaching(arguments.device),
        "sample_speedup": sample_speedup(arguments.pairs, arguments.device),
        "checkpoint_bytes": checkpoint_sizes(arguments.device),
    }  # fmt: skip
    text = table(figures)
    if arguments.write:
        write_figures(__file__, figures, text)
    else:
        print(text)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
