"""The fused rank-1 kernels, without a GPU: run by Triton's interpreter, compiled for GPUs that need not be there."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from torch import nn

import traffic
from hf_latephase import LatePhase, LatePhaseConfig
from hf_latephase.core.weights import rank1_fused


ROOT = Path(__file__).parents[2]
KERNELS = "hf_latephase.core.weights.rank1_kernels"  # imports triton
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="PyTorch for CPUs comes without triton.")
# torch 2.7. With triton 3.2 the kernels were compiled by hand: for Ampere and Hopper all, for Turing those of float32.
needs_compiler = pytest.mark.skipif(
    not HAS_TRITON or Version(version("triton")) < Version("3.3"), reason="`traffic.compiled` needs triton 3.3."
)


def interpreted(*arguments: str) -> str:
    """Runs tests with the kernels in place of the eager formulas, in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "interpreted", *arguments]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_triton
@pytest.mark.slow
def test_kernels_are_the_formulas() -> None:
    assert "38 passed" in interpreted("tests/core/on_kernels.py")


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("tests", [
    ["tests/core/test_rank1_functions.py", *(f"--deselect=tests/core/test_rank1_functions.py::{name}" for name in (
        "test_kernels_launched",  # there are fewer
        "test_autocast_gives_what_the_formula_gives",  # the interpreter cuts bfloat16 off where GPUs round
    ))],
    ["tests/core/test_experts.py"],
    [f"tests/core/test_algorithm1.py::test_minibatch[{case}]" for case in ("1-gpt2-rank1-sgd", "3-lstm-rank1-sgd")],
], ids=["arithmetic", "experts", "algorithm"])  # fmt: skip
def test_what_holds_for_the_formulas_holds_for_the_kernels(tests: list[str]) -> None:
    """The same tests, the twin of Algorithm 1 to 1e-10 among them, in float64."""
    output = interpreted(*tests)
    assert "kernels launched" in output and "'gradients': 0" not in output


@needs_compiler
@pytest.mark.parametrize("capability", [75, 80, 90, 100])
@pytest.mark.parametrize("kernel", ["product_kernel", "gradients_kernel"])
def test_kernels_compile_for_gpus(kernel: str, capability: int) -> None:
    """To machine code, by the assembler that comes with triton; from Turing on."""
    for precision in traffic.PRECISIONS:
        assembly = traffic.compiled(kernel, precision, capability).asm
        assert assembly["cubin"]
        halves = precision == "bfloat16 weights" or (precision != "float32" and kernel == "product_kernel")
        if halves and capability >= 80:
            assert "cvt.rn.bf16" in assembly["ptx"]  # to the nearest


@needs_compiler
def test_bytes_a_weight_and_minibatch() -> None:
    """In autocast, at least: a read in 4 and a write in 2 for each product; 2, 4 and 4 for gradients. Then sums."""
    product, gradients = traffic.fused("bfloat16 autocast", 90)
    assert 6 <= product < 7 and 10 <= gradients < 12
    assert 2 * product + gradients <= 28
    assert traffic.eager("bfloat16 autocast") == (17, 60)


def test_no_kernels_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose layers do not even look for them."""
    monkeypatch.setattr(rank1_fused, "_working_kernels", None)
    model = nn.Sequential(nn.Linear(3, 4))
    LatePhase(model, LatePhaseConfig(num_members=2, weights=["rank1"], target_modules=["0"])).release()
    model(torch.ones(2, 3)).sum().backward()


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in (("0", False), ("1", True)):
        monkeypatch.setenv(rank1_fused.SWITCH, value)
        assert importlib.reload(rank1_fused).ENABLED is expected
    monkeypatch.delenv(rank1_fused.SWITCH)
    assert importlib.reload(rank1_fused).ENABLED


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels work there, and are what a layer uses."""
    device = torch.device("cuda", torch.cuda.current_device())
    for weight, other in itertools.product(rank1_fused.DTYPES, repeat=2):
        rank1_fused.check(importlib.import_module(KERNELS), device, weight, other)
    layer = nn.Linear(300, 70, device=device)
    model = nn.Sequential(layer)
    LatePhase(model, LatePhaseConfig(num_members=2, weights=["rank1"], target_modules=["0"])).release()
    original = model[0].parametrizations.weight.original
    factors = [stack[1] for stack in model[0].parametrizations.weight[0].parameters()]
    assert rank1_fused.kernels(original, *factors, torch.bfloat16) is not None
    results = []
    for enabled in (True, False):
        monkeypatch.setattr(rank1_fused, "ENABLED", enabled)
        with torch.autocast("cuda", torch.bfloat16):
            output = model(torch.linspace(-1, 1, 1200, device=device).view(4, 300))
        results.append([output, *torch.autograd.grad(output.float().sum(), list(model.parameters()))])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() <= 3 * torch.finfo(torch.bfloat16).eps * theirs.abs().max()
