"""The hypernet family: templates shared in groups, embeddings late-phase."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_latephase import LatePhase, LatePhaseConfig
from test_trainer import assert_same, weights_of
from tiny import llama


K = 3


class Net(nn.Module):
    """Two convolutions of one shape, three linear layers of another, and some that stand alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1, stride=1 + i) for i in range(2))
        self.linears = nn.ModuleList(nn.Linear(4, 4, bias=i > 0) for i in range(3))
        self.head = nn.Linear(4, 4)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.stem(images)
        for conv in self.convs:
            hidden = conv(hidden).sin()
        hidden = hidden.mean((2, 3))
        for linear in self.linears:
            hidden = linear(hidden).sin()
        return self.head(hidden)


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def images(rows: int = 6) -> Tensor:
    return torch.randn(rows, 3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def config(**kwargs: Any) -> LatePhaseConfig:
    return LatePhaseConfig(**{"num_members": K, "weights": ["hypernet"], **kwargs})


def released(model: nn.Module, **kwargs: Any) -> LatePhase:
    late_phase = LatePhase(model, config(init_noise=0.5, **kwargs))
    late_phase.release(torch.Generator().manual_seed(3))
    return late_phase


def by_hand(late_phase: LatePhase, plain: nn.Module, k: int | None) -> nn.Module:
    """The plain model with Σ_t e_t · template_t, of member k or of the mean embedding."""
    model, own = copy.deepcopy(plain), late_phase.model.state_dict()
    with torch.no_grad():
        for target in late_phase.targets:
            prefix = f"{target.module}.parametrizations.weight."
            embeddings, templates = own[f"{prefix}0.embedding"], own[f"{prefix}original"]
            e = embeddings.mean(0) if k is None else embeddings[k]
            model.get_parameter(target.key).copy_(sum(e[t] * templates[t] for t in range(len(e))))
    return model


def test_groups_go_by_kind_and_shape() -> None:
    model = net()
    count = sum(p.numel() for p in model.parameters())
    late_phase = LatePhase(model, config())
    assert [target.module for target in late_phase.targets] == [
        "convs.0", "convs.1", "linears.0", "linears.1", "linears.2"
    ]  # fmt: skip
    convs = {id(m.parametrizations.weight.original) for m in model.convs}
    linears = {id(m.parametrizations.weight.original) for m in model.linears}
    assert len(convs) == len(linears) == 1 and convs != linears
    # The templates are the weights, no more; embeddings: 2 of 2 and 3 of 3, K times.
    assert sum(p.numel() for p in model.parameters()) == count + K * (2 * 2 + 3 * 3)
    assert [len(stack.shape) for stack in late_phase.stacks().values()] == [2] * 5
    assert {len(p.shape) for n, p in late_phase.base_parameters().items() if n.endswith("original")} == {5, 3}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_starts_from_and_goes_back_to_the_plain_model_to_the_bit(dtype: torch.dtype) -> None:
    model = net().to(dtype)
    before, order = weights_of(model), [n for n, _ in model.named_parameters()]
    late_phase = LatePhase(model, config())
    assert_same(late_phase.averaged_state_dict(), before)
    late_phase.release()
    assert_same(late_phase.averaged_state_dict(), before)
    assert_same(weights_of(late_phase.averaged_model()), before)
    late_phase.detach()
    assert_same(weights_of(model), before)
    assert [n for n, _ in model.named_parameters()] == order
    assert len({id(p) for p in model.parameters()}) == len(order)
    assert all(type(m) in (nn.Linear, nn.Conv2d) for m in (*model.convs, *model.linears))


@pytest.mark.parametrize("assignment", ["minibatch", "sample"])
def test_members_compute_with_their_mixtures(assignment: str) -> None:
    plain = net()
    late_phase = released(copy.deepcopy(plain), member_assignment=assignment)
    members = [by_hand(late_phase, plain, k) for k in range(K)]
    if assignment == "sample":
        late_phase.activate_by_sample()
        outputs = late_phase.model(images())
        expected = torch.cat([m(rows) for m, rows in zip(members, images().chunk(K), strict=True)])
        torch.testing.assert_close(outputs, expected)
    else:
        for k, member in enumerate(members):
            late_phase.activate(k)
            torch.testing.assert_close(late_phase.model(images()), member(images()))
    late_phase.activate(None)
    expected = by_hand(late_phase, plain, None)(images())
    torch.testing.assert_close(late_phase.model(images()), expected)
    torch.testing.assert_close(late_phase.averaged_model()(images()), expected)
    stock = net()
    stock.load_state_dict(late_phase.averaged_state_dict())
    torch.testing.assert_close(stock(images()), expected)


def test_loading_a_plain_model_makes_all_members_it() -> None:
    late_phase, other = released(net()), Net().double()
    late_phase.load_averaged_state_dict(other.state_dict())
    assert_same(late_phase.averaged_state_dict(), weights_of(other))
    for k in range(K):
        late_phase.activate(k)
        torch.testing.assert_close(late_phase.model(images()), other(images()), rtol=0, atol=0)


def test_a_copy_shares_no_templates_with_the_model() -> None:
    late_phase = released(net())
    twin = copy.deepcopy(late_phase)
    before = weights_of(late_phase.averaged_model())
    with torch.no_grad():
        for p in twin.model.parameters():
            p.add_(1)
    assert_same(weights_of(late_phase.averaged_model()), before)
    shared = {id(m.parametrizations.weight.original) for m in twin.model.linears}
    assert len(shared) == 1


def test_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2))
    before = weights_of(model)
    with pytest.raises(ValueError, match="no two of the 2 layers chosen do. Choose other target_modules"):
        LatePhase(model, config())
    assert_same(weights_of(model), before)
    with pytest.raises(ValueError, match="replicated by both 'rank1' and 'hypernet'"):
        LatePhase(llama(), config(weights=["rank1", "hypernet"]))
