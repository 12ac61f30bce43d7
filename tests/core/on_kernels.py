"""
The fused kernels against the eager formulas: run by `test_rank1_kernels.py` in Triton's interpreter.

    TRITON_INTERPRET=1 python -m pytest -n 0 -p interpreted tests/core/on_kernels.py
"""

from __future__ import annotations

import copy
import socket
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from hf_latephase import LatePhase, LatePhaseConfig
from hf_latephase.core.weights import rank1_fused
from hf_latephase.core.weights.rank1_functions import rank1_linear, rank1_product
from interpreted import launched


# Larger than a block of 32 × 128, no multiple of one; one block; less than one.
SHAPES = [(70, 300), (32, 128), (3, 5)]
EPSILON = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.bfloat16, torch.float16)}


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls a function without the kernels."""

    def call(function: Any) -> Any:
        with monkeypatch.context() as patched:
            patched.setattr(rank1_fused, "ENABLED", False)
            before = dict(launched)
            value = function()
            assert launched == before
        return value

    return call


def fused(function: Any, products: int, gradients: int) -> Any:
    """Calls a function that must launch so many kernels."""
    before = dict(launched)
    value = function()
    assert {name: launched[name] - before[name] for name in launched} == {"product": products, "gradients": gradients}
    return value


def tensors(n: int, m: int, dtype: torch.dtype, batch: tuple[int, ...] = ()) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, m), (*batch, n, m), (*batch, n), (*batch, m), (n,)]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [t.to(dtype).requires_grad_() for t in made]


def with_gradients(call: Any, given: list[Tensor]) -> list[Tensor]:
    output = call(*given)
    direction = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output).to(output.dtype)
    return [output, *torch.autograd.grad(output, given, direction)]


def farthest(values: list[Tensor], exact: list[Tensor]) -> list[float]:
    """The largest errors, relative to the largest element."""
    return [((v.double() - e.double()).abs().max() / e.abs().max()).item() for v, e in zip(values, exact, strict=True)]


@pytest.mark.parametrize("batch", [(), (3,)], ids=["matrix", "experts"])
@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_product_in_float64(n: int, m: int, batch: tuple[int, ...], eager: Any) -> None:
    given = tensors(n, m, torch.float64, batch)[1:4]
    ours = fused(lambda: with_gradients(rank1_product, given), 1, 1)
    torch.testing.assert_close(ours, eager(lambda: with_gradients(rank1_product, given)), atol=1e-11, rtol=0)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_linear_in_float64(n: int, m: int, transposed: bool, eager: Any) -> None:
    rows, weight, left, right, _ = tensors(n, m, torch.float64)
    bias = torch.ones(m if transposed else n, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(6, n if transposed else m, dtype=torch.float64, requires_grad=True)
    given = [rows, weight, left, right, bias]

    def run() -> list[Tensor]:
        return with_gradients(lambda *tensors: rank1_linear(*tensors, transposed=transposed), given)

    torch.testing.assert_close(fused(run, 2, 1), eager(run), atol=1e-11, rtol=0)


@pytest.mark.parametrize("dtype", EPSILON, ids=str)
@pytest.mark.parametrize("call", [rank1_product, rank1_linear], ids=["product", "linear"])
def test_no_farther_from_exact_than_eager_is(dtype: torch.dtype, call: Any, eager: Any) -> None:
    """The kernels round once where the eager formulas round after every multiplication."""
    given = tensors(70, 300, dtype)
    given = given[1:4] if call is rank1_product else given[:4]
    exact = eager(lambda: with_gradients(call, [t.detach().double().requires_grad_() for t in given]))
    ours = fused(lambda: with_gradients(call, given), 1 if call is rank1_product else 2, 1)
    theirs = eager(lambda: with_gradients(call, given))
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    for error, bound in zip(farthest(ours, exact), farthest(theirs, exact), strict=True):
        assert error <= bound + EPSILON[dtype]
    if call is rank1_product:
        assert farthest(ours, exact)[0] <= EPSILON[dtype]


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast(weights: torch.dtype, eager: Any) -> None:
    """Gradients of weights have the weights' dtype, from gradients of products in autocast's."""
    given = tensors(70, 300, weights)

    def run() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            output = rank1_linear(*given)
        assert output.dtype == torch.bfloat16
        return [output, *torch.autograd.grad(output.float().square().sum(), given)]

    ours, theirs = fused(run, 2, 1), eager(run)
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    assert max(farthest(ours, theirs)) <= 3 * EPSILON[torch.bfloat16]


@pytest.mark.parametrize("wanted", [[0], [1], [2], [1, 2], [0, 1, 2]], ids=str)
def test_what_is_frozen_gets_no_gradient(wanted: list[int], eager: Any) -> None:
    given = [t.detach() for t in tensors(70, 300, torch.float64)[:4]]
    trained = [given[1 + index].requires_grad_() for index in wanted]

    def run() -> Any:
        return torch.autograd.grad(rank1_linear(*given).square().sum(), trained)

    # Where only the weight is trained there is nothing to sum up.
    ours = fused(run, 1, int(wanted != [0]))
    torch.testing.assert_close(ours, eager(run), atol=1e-10, rtol=1e-12)


def test_the_gradient_given_is_not_written_over(eager: Any) -> None:
    given = tensors(70, 300, torch.float64)[1:4]
    direction = torch.ones(70, 300, dtype=torch.float64)
    torch.autograd.grad(rank1_product(*given), given, direction)
    assert (direction == 1).all()
    # One that is expanded, as of a sum, or transposed.
    for backward in (torch.sum, lambda p: (p.T @ torch.arange(70, dtype=torch.float64)).sum()):
        ours, theirs = (
            f(lambda backward=backward: torch.autograd.grad(backward(rank1_product(*given)), given))
            for f in (lambda run: run(), eager)
        )
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-12)


# ---- models ----


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 40), nn.Tanh(), Conv1D(5, 40), nn.Conv1d(3, 4, 1), nn.Flatten(), nn.Linear(20, 2)
    )


def released(plain: nn.Module) -> LatePhase:
    config = LatePhaseConfig(num_members=3, weights=["rank1"], target_modules=["0", "2", "3"], init_noise=0.5)
    late_phase = LatePhase(plain, config)
    late_phase.release(torch.Generator().manual_seed(1))
    late_phase.activate(1)
    return late_phase


def losses(call: Any, trained: nn.Module, steps: int = 4) -> list[float]:
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    rows, taken = torch.linspace(-1, 1, 36).view(2, 3, 6), []
    for _ in range(steps):
        loss = call(rows).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        taken.append(loss.item())
    return taken


@pytest.fixture
def eager_losses(eager: Any) -> list[float]:
    trained = released(model()).model
    return eager(lambda: losses(trained, trained))


def test_convolutions_are_eager(eager_losses: list[float]) -> None:
    trained = released(model()).model
    ours = fused(
        lambda: losses(trained, trained), 4 * 2 * 2 - 4, 4 * 2
    )  # the rows of the first layer need no gradient
    assert ours == pytest.approx(eager_losses, rel=1e-6)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant: bool, eager_losses: list[float]) -> None:
    trained = released(model()).model

    def call(rows: Tensor) -> Tensor:
        return checkpoint(trained, rows.requires_grad_(), use_reentrant=use_reentrant)

    assert fused(lambda: losses(call, trained), 4 * 2 * 3, 4 * 2) and trained.training
    trained = released(model()).model
    assert losses(call, trained) == pytest.approx(eager_losses, rel=1e-6)


def test_a_compiled_model_is_eager_and_one_graph(eager_losses: list[float]) -> None:
    """The compiler fuses the formulas itself."""
    trained = released(model()).model
    compiled = torch.compile(trained, backend="aot_eager", fullgraph=True)
    assert fused(lambda: losses(compiled, trained), 0, 0) == pytest.approx(eager_losses, rel=1e-6)


@pytest.fixture
def one_process() -> Any:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"tcp://localhost:{free.getsockname()[1]}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_ddp(one_process: None, eager_losses: list[float]) -> None:
    trained = released(model()).model
    wrapped = DistributedDataParallel(trained)
    assert fused(lambda: losses(wrapped, trained), 4 * 2 * 2 - 4, 4 * 2) == pytest.approx(eager_losses, rel=1e-6)


def test_fsdp2(one_process: None, eager_losses: list[float]) -> None:
    """Inside a layer's call its weights are whole; what is shared out, as a DTensor, is left alone."""
    trained = released(model()).model
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for layer in (trained[0], trained[2], trained):
        fully_shard(layer, mesh=mesh)
    assert fused(lambda: losses(trained, trained), 4 * 2 * 2 - 4, 4 * 2) == pytest.approx(eager_losses, rel=1e-6)
    sharded = trained[0].parametrizations.weight
    fused(lambda: rank1_product(sharded.original, sharded[0].left[0], sharded[0].right[0]), 0, 0)


# ---- where they do not work ----


def test_what_they_leave_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, left, right = (t.detach() for t in tensors(6, 8, torch.float32)[1:4])
    assert rank1_fused.kernels(weight, left, right, torch.float32) is not None
    for others in (
        (weight.T.contiguous().T, left, right),
        (weight.double(), left, right),
        (weight[:0], left[:0], right),
        (weight.view(6, 4, 2), left, right[:4]),  # a convolution's
        (weight, left.repeat_interleave(2)[::2], right),
    ):
        assert rank1_fused.kernels(*others, torch.float32) is None
    assert rank1_fused.kernels(weight, left, right, torch.complex64) is None
    monkeypatch.setattr(rank1_fused, "ENABLED", False)
    assert rank1_fused.kernels(weight, left, right, torch.float32) is None


@pytest.mark.parametrize("broken", ["product", "gradients"])
@pytest.mark.parametrize("how", ["raises", "is wrong"])
def test_a_kernel_that_fails_is_warned_of_once_and_not_used(
    broken: str, how: str, monkeypatch: pytest.MonkeyPatch, eager_losses: list[float]
) -> None:
    from hf_latephase.core.weights import rank1_kernels

    warnings: list[str] = []
    monkeypatch.setattr(rank1_fused.logger, "warning_once", warnings.append)
    launch = getattr(rank1_kernels, broken)

    def fail(*args: Any) -> Any:
        if how == "raises":
            raise RuntimeError("no C compiler")
        wrong = launch(*args)
        (wrong if broken == "product" else wrong[1]).mul_(1.01)
        return wrong

    monkeypatch.setattr(rank1_kernels, broken, fail)
    rank1_fused._working_kernels.cache_clear()
    try:
        trained = released(copy.deepcopy(model())).model
        assert losses(trained, trained) == pytest.approx(eager_losses, rel=1e-7)
        assert len(warnings) == 1 and rank1_fused.SWITCH in warnings[0]
    finally:
        rank1_fused._working_kernels.cache_clear()
