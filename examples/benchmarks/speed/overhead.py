"""
What a late-phase layer's Python costs: microseconds a call, forward and backward, beyond the plain layer's.

    python examples/benchmarks/speed/overhead.py
    PYTHONPATH=<another checkout> python examples/benchmarks/speed/overhead.py    # before a change

Layers are so small that their arithmetic hardly counts. What is left is what a GPU waits for in short minibatches:
Python, and launching kernels. Both sides take turns in blocks of calls. The figure is the median of the differences
within a pair of blocks; its quartiles show how far the machine's other work reaches. On a CPU the time is this
process's own, so that waiting for a core does not count.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import HfArgumentParser
from transformers.pytorch_utils import Conv1D

from hf_latephase import LatePhase, LatePhaseConfig


WIDTH, ROWS = 8, 4
# The family that each kind of layer is made for.
LAYERS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "Linear": ("rank1", lambda: nn.Linear(WIDTH, WIDTH)),
    "Conv1D": ("rank1", lambda: Conv1D(WIDTH, WIDTH)),
    "LSTM": ("rank1", lambda: nn.LSTM(WIDTH, WIDTH)),
    "BatchNorm2d": ("norm", lambda: nn.BatchNorm2d(WIDTH)),
    "LayerNorm": ("norm", lambda: nn.LayerNorm(WIDTH)),
}


@dataclass
class OverheadArguments:
    """How much is measured."""

    layers: list[str] | None = field(default=None, metadata={"help": f"Of {', '.join(LAYERS)}; all by default."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    pairs: int = field(default=200, metadata={"help": "Pairs of blocks, plain and late-phase."})
    calls: int = field(default=50, metadata={"help": "Calls in a block."})


def late_phase(plain: nn.Module, family: str) -> nn.Module:
    """A copy of a layer, in a model of its own, that has ten members, of which the fourth is active."""
    model = nn.Sequential(copy.deepcopy(plain))
    targets = ["0"] if family == "rank1" else None
    members = LatePhase(model, LatePhaseConfig(num_members=10, weights=[family], target_modules=targets))
    members.release()
    members.activate(3)
    return model[0]


def inputs(name: str, device: str) -> Tensor:
    """Activations of the shape that a layer takes; their gradient is asked for, as it is inside a model."""
    shape = {"LSTM": (1, ROWS, WIDTH), "BatchNorm2d": (ROWS, WIDTH, 2, 2)}.get(name, (ROWS, WIDTH))
    return torch.randn(shape, device=device, requires_grad=True)


def block(layer: nn.Module, rows: Tensor, calls: int, backward: bool) -> float:
    """Microseconds a call."""
    clock = time.perf_counter if rows.is_cuda else time.process_time
    start = clock()
    for _ in range(calls):
        outputs = layer(rows)
        if backward:
            outputs = outputs[0] if isinstance(outputs, tuple) else outputs
            outputs.backward(outputs.detach())
    if rows.is_cuda:
        torch.cuda.synchronize()
    return 1e6 * (clock() - start) / calls


def beyond(name: str, arguments: OverheadArguments, backward: bool) -> list[float]:
    """Quartiles of the microseconds that a late-phase layer takes beyond the plain one, a call."""
    torch.manual_seed(0)
    family, make = LAYERS[name]
    plain = make().to(arguments.device)
    sides = (plain, late_phase(plain, family))
    rows = inputs(name, arguments.device)
    differences = []
    for pair in range(arguments.pairs + 2):
        order = sides if pair % 2 else sides[::-1]
        taken = {id(side): block(side, rows, arguments.calls, backward) for side in order}
        differences.append(taken[id(sides[1])] - taken[id(sides[0])])
    return statistics.quantiles(differences[2:], n=4)


def main() -> None:
    """Measures and prints a table."""
    (arguments,) = HfArgumentParser(OverheadArguments).parse_args_into_dataclasses()
    torch.set_num_threads(1)
    print("| µs a call beyond plain (quartiles) | forward | forward and backward |\n| --- | ---: | ---: |")
    for name in arguments.layers or LAYERS:
        cells = []
        for backward in (False, True):
            lower, value, upper = beyond(name, arguments, backward)
            cells.append(f"{value:.1f} ({lower:.1f} to {upper:.1f})")
        print(f"| {name} ({LAYERS[name][0]}) | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
