"""The rank-1 arithmetic against its formula, and what it keeps and launches."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from costs import Kernels
from hf_latephase import LatePhase, LatePhaseConfig
from hf_latephase.core.weights.rank1_functions import rank1_linear, rank1_product


N, M = 5, 7


def inputs(transposed: bool = False, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    stored = (M, N) if transposed else (N, M)
    shapes = [(3, 4, M), stored, stored[:1], stored[1:], (N,)]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def formula(
    rows: Tensor,
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    bias: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    product = weight * left.unsqueeze(1) * right
    return F.linear(rows, product.T if transposed else product, bias)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
def test_linear_is_the_formula(transposed: bool, with_bias: bool) -> None:
    given = inputs(transposed) if with_bias else [*inputs(transposed)[:-1], None]
    expected = formula(*given, transposed=transposed)
    torch.testing.assert_close(rank1_linear(*given, transposed=transposed), expected, atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(lambda *given: rank1_linear(*given, transposed=transposed), given)


@pytest.mark.parametrize("layer", [nn.Linear(M, N), nn.Linear(M, N, bias=False), Conv1D(N, M)], ids=str)
def test_a_call_is_that_of_the_folded_layer_to_the_bit(layer: nn.Module) -> None:
    model = nn.Sequential(copy.deepcopy(layer))
    late_phase = LatePhase(
        model, LatePhaseConfig(num_members=3, weights=["rank1"], target_modules=["0"], init_noise=0.5)
    )
    late_phase.release()
    rows = torch.randn(4, 6, M)
    late_phase.activate(None)
    assert torch.equal(model(rows), late_phase.averaged_model()(rows))


def test_what_a_layer_returns_can_be_changed_in_place() -> None:
    """Some models mask hidden states that way."""
    model = nn.Sequential(nn.Linear(M, N))
    LatePhase(model, LatePhaseConfig(num_members=3, weights=["rank1"], target_modules=["0"]))
    outputs = model(torch.randn(2, 3, M))
    outputs[0] = 0
    outputs.sum().backward()


def test_linear_takes_one_row_and_no_bias() -> None:
    rows, *others, _ = inputs()
    torch.testing.assert_close(rank1_linear(rows[0, 0], *others), formula(rows[0, 0], *others), atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(rank1_linear, [rows[0, 0].detach().requires_grad_(), *others])


@pytest.mark.parametrize("frozen", range(5))
def test_frozen_inputs_get_no_gradient(frozen: int) -> None:
    given = inputs()
    given[frozen].requires_grad_(False)
    wanted = [tensor for tensor in given if tensor.requires_grad]
    gradients = torch.autograd.grad(rank1_linear(*given).square().sum(), wanted)
    expected = torch.autograd.grad(formula(*given).square().sum(), wanted)
    torch.testing.assert_close(gradients, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_under_bfloat16_autocast(dtype: torch.dtype) -> None:
    """As TRL's trainers run a model that was loaded in half precision."""
    inputs = [torch.randn(shape, dtype=dtype).requires_grad_() for shape in ((5, 4), (3, 4), (3,), (4,))]
    with torch.autocast("cpu", torch.bfloat16):
        output = rank1_linear(*inputs, None)
        twins = [value.detach().requires_grad_() for value in inputs]
        expected = formula(*twins)
    output.square().sum().backward()
    expected.square().sum().backward()
    for value, twin in zip(inputs, twins, strict=True):
        assert value.grad is not None and twin.grad is not None and value.grad.dtype == dtype
        assert torch.allclose(value.grad.float(), twin.grad.float(), rtol=0.05, atol=0.05 * twin.grad.abs().max())


def test_autocast_gives_what_the_formula_gives() -> None:
    given = inputs(dtype=torch.float32)
    results = []
    for call in (rank1_linear, formula):
        with torch.autocast("cpu", torch.bfloat16):
            output = call(*given)
        assert output.dtype == torch.bfloat16
        results.append((output, *torch.autograd.grad(output.float().square().sum(), given)))
    assert [t.dtype for t in results[0]] == [t.dtype for t in results[1]]
    torch.testing.assert_close(results[0], results[1], atol=0.02, rtol=0.02)


@pytest.mark.parametrize("layer", [nn.Linear(M, N), Conv1D(N, M)], ids=["Linear", "Conv1D"])
def test_no_product_is_kept_for_the_backward_pass(layer: nn.Module) -> None:
    kept: list[Tensor] = []
    model = nn.Sequential(copy.deepcopy(layer))
    late_phase = LatePhase(model, LatePhaseConfig(num_members=3, weights=["rank1"], target_modules=["0"]))
    late_phase.release()
    rows = torch.randn(2, M, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(rows)
    weight = model[0].parametrizations.weight.original
    sized = [tensor for tensor in kept if tensor.numel() == weight.numel()]
    assert [tensor.data_ptr() for tensor in sized] == [weight.data_ptr()]


def extra_kernels(family: str, layer: nn.Module) -> float:
    """Kernels of one minibatch beyond the plain layer's, by late-phase tensor, once gradients are there."""
    counts = []
    for late in (False, True):
        model = nn.Sequential(copy.deepcopy(layer))
        tensors = 1
        if late:
            config = LatePhaseConfig(
                num_members=3, weights=[family], target_modules=["0"] * (family == "rank1") or None
            )
            late_phase = LatePhase(model, config)
            late_phase.release()
            late_phase.activate(1)
            tensors = len(late_phase.targets)
        for _ in range(2):
            with Kernels() as kernels:
                model(torch.ones(2, M, requires_grad=True)).sum().backward()
        counts.append(kernels.count)
    return (counts[1] - counts[0]) / tensors


def test_kernels_launched() -> None:
    # A member's gradient goes into its row of a stack: two. Reading a member is a view: none.
    assert extra_kernels("norm", nn.LayerNorm(M)) == 2
    # Statistics are views too: two for scale and shift, none for the three statistics.
    assert extra_kernels("norm", nn.BatchNorm1d(M)) == pytest.approx(4 / 5)
    # The product, twice: 4. What it makes of the weight's gradient: 5. Two stacks: 3 each, accumulation included.
    assert extra_kernels("rank1", nn.Linear(M, N)) == 15


def test_product_has_a_batch_of_experts() -> None:
    weight, left, right = (
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, N, M), (2, N), (2, M))
    )
    assert torch.autograd.gradcheck(rank1_product, (weight, left, right))
