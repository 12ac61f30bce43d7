"""
What late-phase training costs beside plain training: time, kernels, memory, checkpoints, attaching.

    python examples/benchmarks/speed/speed.py                       # everything, under ten minutes on two idle cores
    python examples/benchmarks/speed/speed.py --rows gpt2 lstm --write false
    python examples/benchmarks/speed/speed.py --device cuda         # other models, on a GPU of 80 GB
    HF_LATEPHASE_FUSED=0 python examples/benchmarks/speed/speed.py --device cuda --rows rank1 --write false    # eager

Both sides are real trainers with the same model, data, batch and number of minibatches. They run in one process and
take turns after every minibatch, so that whatever else the machine does falls on both. The figure is plain time over
late-phase time (1.00: as fast; above: faster) of a whole cycle, from the median ratio of the pairs inside cycles and
that of the pairs that end one, which step; its quartiles are those of 1000 resamplings of the pairs. The first
minibatches of a run are left out, and the C library is told to keep freed memory. The first row compares plain
training with itself: what it is off by, the others may be.

On a GPU a turn is a whole cycle: to wait for the GPU after every minibatch would show each minibatch's first kernels
being launched, which otherwise run ahead.

Writes `speed.json` and `speed.md` (`speed_cuda.*` of a GPU, where both sides train in bf16) beside this file and the
table into `docs/performance.md`.
"""

from __future__ import annotations

import gc
import math
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers import HfArgumentParser, TrainerCallback


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where `runs` is

from costs import attaching, checkpoint_sizes, count_kernels, peak_memory, sample_speedup
from runs import PERFORMANCE_PAGE, environment, markdown, write_figures
from workloads import Setting


# With the throughput to reach, where the project has set one.
ROWS: dict[str, list[tuple[Setting, float | None]]] = {
    "cpu": [
        (Setting("gpt2 4x256", ("norm",)), 1.0),
        (Setting("gpt2 4x256", ("norm",), one_step=False), 1.0),
        (Setting("gpt2 4x256", ("rank1",)), 0.98),
        (Setting("gpt2 4x256", ("rank1",), one_step=False), 1.0),
        (Setting("gpt2 4x256", ("rank1", "norm")), None),
        (Setting("gpt2 8x512", ("rank1",)), 0.98),
        (Setting("llama 4x256", ("rank1",)), 0.98),
        (Setting("llama 4x256", ("norm",)), 1.0),
        (Setting("lstm 500", ("rank1",)), 0.98),
        (Setting("lstm 500", ("rank1",), one_step=False), 0.98),
        (Setting("wrn 16-2", ("head", "norm")), 1.0),
        (Setting("wrn 16-2", ("head", "norm"), one_step=False), 1.0),
        (Setting("gpt2 2x128", ("rank1",), 2), None),
        (Setting("gpt2 2x128", ("rank1",), 10), None),
        (Setting("gpt2 2x128", ("rank1",), 64), None),
        (Setting("gpt2 2x128", ("rank1", "norm"), 8, by_sample=True), None),
    ],
    "cuda": [
        (Setting("gpt2 124 M", ("norm",)), 1.0),
        (Setting("gpt2 124 M", ("norm",), one_step=False), 1.0),
        (Setting("gpt2 124 M", ("rank1",)), 0.98),
        (Setting("gpt2 124 M", ("rank1",), one_step=False), 1.0),
        (Setting("llama 0.9 B", ("norm",)), 1.0),
        (Setting("llama 0.9 B", ("rank1",)), 0.96),
        (Setting("lstm 500, 128 rows", ("rank1",)), 0.98),
        (Setting("wrn 28-10", ("head", "norm")), 0.98),
        (Setting("wrn 28-10", ("head", "norm"), one_step=False), 0.98),
        (Setting("gpt2 4x256", ("norm",)), None),
    ],
}
MANY_MEMBERS = (Setting("gpt2 2x128", ("rank1",), 64), Setting("gpt2 2x128", ("rank1",), 2))
COUNTED = [
    Setting("gpt2 2x128", ("norm",)),
    Setting("gpt2 2x128", ("rank1",)),
    Setting("gpt2 2x128, twice the tokens", ("rank1",)),
    Setting("gpt2 2x256", ("rank1",)),
    Setting("gpt2 4x128", ("rank1",)),
    Setting("gpt2 2x128", ("rank1",), 64),
    Setting("gpt2 2x128", ("rank1",), one_step=False),
    Setting("wrn 16-2", ("head", "norm"), 2),
]
REMEMBERED = {
    device: [
        Setting(workload, ("norm",)), Setting(workload, ("rank1",)), Setting(workload, ("rank1",), one_step=False)
    ]
    for device, workload in (("cpu", "gpt2 4x256"), ("cuda", "gpt2 124 M"))
}  # fmt: skip
WITH_ITSELF = "plain training with itself"
CYCLES, WARM_UP = 2, 3
LEAST_PAIRS = {"cpu": 20, "cuda": 6}
# The C library gives freed memory back to the system, to fault it in again a moment later. PyTorch's allocator for
# GPUs keeps it; so do both sides here.
ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_MMAP_THRESHOLD_": str(2**30)}


# ---- two trainers that take turns ----


class Turns(TrainerCallback):
    """Lets a trainer run some minibatches at a time, when told to, and times them."""

    def __init__(self, device: str, length: int) -> None:
        self._device, self._length = device, length
        self._minibatches = 0
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._start = self._seconds = 0.0
        self._stopping = False

    def turn(self) -> float:
        """Runs the minibatches of one turn and returns their seconds."""
        self._go.release()
        self._done.acquire()
        return self._seconds

    def stop(self) -> None:
        """Lets the trainer end."""
        self._stopping = True
        self._go.release()

    def _now(self) -> float:
        if self._device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _begin(self) -> None:
        if self._minibatches % self._length:
            return
        if not self._stopping:
            self._go.acquire()
        self._start = self._now()

    def _end(self) -> None:
        self._minibatches += 1
        if self._minibatches % self._length:
            return
        self._seconds = self._now() - self._start
        self._done.release()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The first minibatch of a step begins."""
        self._begin()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A minibatch that only accumulates has ended, the next begins."""
        self._end()
        self._begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last minibatch of a step has ended."""
        self._end()
        control.should_training_stop = self._stopping


@dataclass(frozen=True)
class Side:
    """What takes part in a comparison."""

    setting: Setting
    late: bool

    def is_last(self, position: int) -> bool:
        """Whether the minibatch at a position in training ends a cycle, and so steps everything."""
        return (position + 1) % self.setting.minibatches == 0


def compare(first: Side, second: Side, device: str) -> dict[str, Any]:
    """The seconds of the first side over those of the second, per minibatch."""
    sides = (first, second)
    # What a pair is depends on who steps; how often each kind occurs, on the cycles.
    period = math.lcm(first.setting.minibatches, second.setting.minibatches)
    length = 1 if device == "cpu" else period
    turns = (Turns(device, length), Turns(device, length))
    pairs = LEAST_PAIRS[device] + WARM_UP
    if length == 1:
        pairs = max(pairs, *(CYCLES * side.setting.minibatches for side in sides))
    with tempfile.TemporaryDirectory() as folder:
        trainers = [s.setting.trainer(s.late, folder, device, [t]) for s, t in zip(sides, turns, strict=True)]
        threads = [threading.Thread(target=trainer.train, daemon=True) for trainer in trainers]
        for thread in threads:
            thread.start()
        times: list[tuple[float, float]] = []
        for pair in range(pairs):
            if pair % 2:
                later = turns[1].turn()
                times.append((turns[0].turn(), later))
            else:
                times.append((turns[0].turn(), turns[1].turn()))
        for turn, thread in zip(turns, threads, strict=True):
            turn.stop()
            thread.join()
    del trainers
    gc.collect()

    def kind(position: int) -> tuple[bool, bool]:
        last = (position + 1) * length - 1
        return first.is_last(last), second.is_last(last)

    kinds = range(period // length)
    shares = {alike: count / len(kinds) for alike, count in Counter(map(kind, kinds)).items()}

    def ratio(positions: list[int]) -> tuple[float, float]:
        """First over second, and the first's seconds a minibatch."""
        seconds, others = 0.0, 0.0
        for alike, share in shares.items():
            own = [times[p] for p in positions if kind(p) == alike]
            if not own:
                return math.nan, math.nan
            typical = share * statistics.median(time for time, _ in own)
            seconds += typical
            others += typical * statistics.median(other / time for time, other in own)
        return seconds / others, seconds

    measured = list(range(WARM_UP, pairs))
    generator = random.Random(0)
    drawn = [ratio(generator.choices(measured, k=len(measured)))[0] for _ in range(1000)]
    lower, _, upper = statistics.quantiles([value for value in drawn if not math.isnan(value)], n=4)
    value, seconds = ratio(measured)
    milliseconds = 1000 * seconds / length
    return {"ratio": value, "quartiles": [lower, upper], "pairs": len(measured), "milliseconds": milliseconds}


# ---- the report ----


@dataclass
class SpeedArguments:
    """What is measured, and where."""

    rows: list[str] | None = field(default=None, metadata={"help": "Only rows whose name contains one of these."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    threads: int = field(default=2, metadata={"help": "CPU threads."})
    write: bool = field(default=True, metadata={"help": "Whether to write the files and the documentation's table."})

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda, got {self.device!r}.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device=cuda, but torch sees no GPU. Use cpu.")
        if self.rows is not None and self.write:
            raise ValueError("A part of the rows is no record: add --write false.")


def measure_rows(arguments: SpeedArguments) -> list[dict[str, Any]]:
    """Plain over late-phase, row by row."""
    records = []
    if arguments.rows is None:
        plain = Side(ROWS[arguments.device][0][0], late=False)
        null = compare(plain, plain, arguments.device)
        records.append({"row": f"{WITH_ITSELF}, {plain.setting.workload}", "goal": None} | null)
    for setting, goal in tqdm(ROWS[arguments.device], desc="Rows"):
        if arguments.rows is None or any(part in setting.name for part in arguments.rows):
            figures = compare(Side(setting, late=False), Side(setting, late=True), arguments.device)
            records.append({"row": setting.name, "goal": goal} | figures)
            tqdm.write(f"{setting.name}: {figures['ratio']:.3f} {figures['quartiles']}")
    return records


def measure_costs(arguments: SpeedArguments) -> dict[str, Any]:
    """Everything but the rows."""
    device = arguments.device
    fewest, most = (Side(setting, late=True) for setting in reversed(MANY_MEMBERS))
    memory = {}
    for setting in tqdm(REMEMBERED[device], desc="Peak memory"):
        late, plain = (peak_memory(setting, side, device) for side in (True, False))
        memory[setting.name] = {"plain": plain, "late": late}
    figures = {
        "many_members": compare(most, fewest, device),
        "memory_bytes": memory,
        "attaching_seconds": attaching(device),
        "sample_speedup": sample_speedup(LEAST_PAIRS["cpu"], device),
    }
    if device == "cpu":  # elsewhere they would be the same
        figures["kernels"] = [count_kernels(setting) for setting in tqdm(COUNTED, desc="Kernels")]
        figures["checkpoint_bytes"] = checkpoint_sizes()
    return figures


def table(figures: dict[str, Any]) -> str:
    """The figures in Markdown."""
    lines = []
    for record in figures["rows"]:
        goal = "–" if record["goal"] is None else f"≥ {record['goal']:.2f}"
        # A run that was cut off had printed all but the times.
        milliseconds = f"{record['milliseconds']:.0f}" if "milliseconds" in record else "–"
        lines.append([record["row"], _ratio(record), goal, milliseconds])
    header = ["plain time over late-phase time", "ratio (quartiles)", "goal", "plain, ms a minibatch"]
    text = markdown(header, 1, lines)
    if "many_members" not in figures:
        return text
    speedup = figures["sample_speedup"]
    others = [["time a minibatch, K=64 over K=2 (gpt2 2x128, rank1)", _ratio(figures["many_members"]), "≤ 1.03"]]
    for name, memory in figures["memory_bytes"].items():
        goal = "≤ 1.02, and the gradients" if name.endswith("several steps") else "≤ 1.02"
        others.append([f"peak memory, {name}", f"{memory['late'] / memory['plain']:.3f}", goal])
    for name, what, goal in (
        ("late-phase", "by sample, 8 members", "≥ 1.5"),
        ("plain", "of the model without members", "–"),
    ):
        lower, value, upper = speedup[name]
        what = f"8 passes over one {what}, 8 × 4 rows × 64 tokens"
        others.append([what, f"{value:.2f} ({lower:.2f} to {upper:.2f})", goal])
    if sizes := figures.get("checkpoint_bytes"):
        for name in ("late-phase", "late-phase, inside a cycle"):
            others.append([f"checkpoint of {name}, rank1, K=10", f"{sizes[name] / sizes['plain']:.2f}", "≤ 1.6"])
    for name, seconds in figures["attaching_seconds"].items():
        others.append([f"{name}, gpt2 with 124 M parameters, K=10", f"{seconds:.2f} s", "< 1 s"])
    text += "\n" + markdown(["late-phase over plain", "", "goal"], 1, others)
    if "kernels" not in figures:
        return text
    counts = []
    for record in figures["kernels"]:
        plain, late = record["plain_kernels"], record["late_kernels"]
        traffic = f"{record['late_megabytes'] - record['plain_megabytes']:+.1f} of {record['plain_megabytes']:.0f}"
        extra = f"{(late - plain) / record['tensors']:.1f}"
        counts.append([record["setting"], str(record["tensors"]), f"{plain:.0f}", f"{late:.0f}", extra, traffic])
    header = ["kernels and traffic a minibatch", "late-phase tensors", "plain", "late-phase", "more a tensor", "MB"]
    return text + "\n" + markdown(header, 1, counts)


def _ratio(record: dict[str, Any]) -> str:
    lower, upper = record["quartiles"]
    return f"{record['ratio']:.3f} ({lower:.3f} to {upper:.3f})"


def main() -> None:
    """Measures and writes."""
    (arguments,) = HfArgumentParser(SpeedArguments).parse_args_into_dataclasses()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    versions = {module.__name__: module.__version__ for module in (torch, transformers)}
    figures = {
        "command": " ".join(["python", *sys.argv]),
        "environment": environment(arguments.device) | {"threads per run": arguments.threads} | versions,
        "rows": measure_rows(arguments),
    }
    if arguments.rows is None:
        figures |= measure_costs(arguments)
    if arguments.write:
        own = Path(__file__)
        path = own if arguments.device == "cpu" else own.with_stem("speed_cuda")
        write_figures(str(path), figures, table(figures), PERFORMANCE_PAGE)
    else:
        print(table(figures))


if __name__ == "__main__":
    if os.environ | ALLOCATOR != os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ALLOCATOR)  # read as a process starts
    main()
