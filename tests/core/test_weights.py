"""The families on every supported layer, beside the plain layer that holds a member's weights worked out by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from hf_latephase import LatePhase, LatePhaseConfig
from tiny import Text, gpt2, llama


K = 3


# ---- what is tried: a layer, its inputs, and which dimension of each input and output counts the rows ----


@dataclass(frozen=True)
class Case:
    name: str
    family: str
    layer: Callable[[], nn.Module]
    inputs: Callable[[int], list[Tensor]]
    input_dims: tuple[int, ...] = (0,)
    output_dims: tuple[int, ...] = (0,)

    def model(self) -> Holder:
        torch.manual_seed(0)
        model = Holder(self.layer())
        with torch.no_grad():
            for parameter in model.parameters():  # norms start at one and zero, which would hide a mistake
                parameter.add_(torch.randn_like(parameter) * 0.3)
        return model.double()

    def rows(self, count: int = 2 * K) -> list[Tensor]:
        torch.manual_seed(1)
        return [t.double().requires_grad_() for t in self.inputs(count)]

    def blocks(self, tensors: list[Tensor], dims: tuple[int, ...]) -> list[list[Tensor]]:
        split = [t.chunk(K, dim) for t, dim in zip(tensors, dims, strict=True)]
        return [list(block) for block in zip(*split, strict=True)]


class Holder(nn.Module):
    """A model of one layer; returns its outputs as a flat list."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, rows: Tensor, *state: Tensor) -> list[Tensor]:
        if isinstance(self.layer, nn.LSTM):
            output, (h, c) = self.layer(rows, state or None)
            return [output, h, c]
        if isinstance(self.layer, nn.GRU):
            return list(self.layer(rows, *state))
        return [self.layer(rows)]


class SineLinear(nn.Linear):
    def forward(self, rows: Tensor) -> Tensor:
        return super().forward(rows).sin()


class SineLayerNorm(nn.LayerNorm):
    def forward(self, rows: Tensor) -> Tensor:
        return super().forward(rows).sin()


def frozen(layer: nn.Module, name: str) -> nn.Module:
    getattr(layer, name).requires_grad_(False)
    return layer


def vectors(*shape: int) -> Callable[[int], list[Tensor]]:
    return lambda count: [torch.randn(count, *shape)]


def recurrent(kind: type, layers: int, both: bool, proj: int, batch_first: bool, stateful: bool) -> Case:
    hidden, width, directions = 4, 5, 2 if both else 1
    options = {"proj_size": proj} if proj else {}

    def inputs(count: int) -> list[Tensor]:
        rows = torch.randn((count, 6, width) if batch_first else (6, count, width))
        sizes = [proj or hidden] + ([hidden] if kind is nn.LSTM else [])
        return [rows] + ([torch.randn(layers * directions, count, size) for size in sizes] if stateful else [])

    parts = {"layers": layers - 1, "both": both, "proj": proj, "batch_first": batch_first, "state": stateful}
    name = "-".join([kind.__name__, *(f"{k}{int(v) + (k == 'layers')}" for k, v in parts.items() if v)])
    states = 2 if kind is nn.LSTM else 1
    rows_dim = 0 if batch_first else 1
    return Case(
        name, "rank1",
        lambda: kind(width, hidden, layers, bidirectional=both, batch_first=batch_first, **options),
        inputs, (rows_dim, *[1] * (states * stateful)), (rows_dim, *[1] * states),
    )  # fmt: skip


RECURRENT = [
    recurrent(kind, layers, both, proj, batch_first, stateful)
    for kind in (nn.LSTM, nn.GRU)
    for layers in (1, 2)
    for both in (False, True)
    for proj in ((0, 3) if kind is nn.LSTM else (0,))
    for batch_first in (False, True)
    for stateful in (False, True)
]

LAYERS = [
    # Rows, and as many or as few of them as there are positions: factors must not broadcast over time instead.
    Case("linear", "rank1", lambda: nn.Linear(5, 4), vectors(5)),
    Case("linear-no-bias", "rank1", lambda: nn.Linear(5, 4, bias=False), vectors(5)),
    Case("linear-time=rows", "rank1", lambda: nn.Linear(5, 4), vectors(2 * K, 5)),
    Case("linear-time=members", "rank1", lambda: nn.Linear(5, 4), vectors(K, 5)),
    Case("linear-time=block", "rank1", lambda: nn.Linear(5, 4), vectors(2, 5)),
    Case("linear-square", "rank1", lambda: nn.Linear(6, 6), vectors(6, 6)),
    Case("linear-4d", "rank1", lambda: nn.Linear(5, 4), vectors(2, 3, 5)),
    Case("Conv1D", "rank1", lambda: Conv1D(7, 5), vectors(2 * K, 5)),
    Case("Conv1D-square", "rank1", lambda: Conv1D(5, 5), vectors(5, 5)),
    Case("conv1d", "rank1", lambda: nn.Conv1d(4, 6, 3), vectors(4, 6)),
    Case("conv1d-stride-padding", "rank1", lambda: nn.Conv1d(4, 6, 3, 2, 1, bias=False), vectors(4, 7)),
    Case("conv1d-groups", "rank1", lambda: nn.Conv1d(4, 6, 3, groups=2), vectors(4, 6)),
    Case("conv1d-depthwise", "rank1", lambda: nn.Conv1d(4, 8, 3, groups=4), vectors(4, 6)),
    Case("conv1d-reflect", "rank1", lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="reflect"), vectors(4, 6)),
    Case("conv2d", "rank1", lambda: nn.Conv2d(4, 6, 3), vectors(4, 6, 6)),
    Case("conv2d-stride", "rank1", lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1)), vectors(4, 6, 5)),
    Case("conv2d-padding", "rank1", lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2), vectors(4, 6, 5)),
    Case("conv2d-circular", "rank1", lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), vectors(4, 5, 5)),
    Case("conv2d-groups", "rank1", lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), vectors(4, 4, 4)),
    Case("conv2d-depthwise", "rank1", lambda: nn.Conv2d(4, 4, 3, groups=4), vectors(4, 4, 4)),
    Case("layernorm", "norm", lambda: nn.LayerNorm(6), vectors(6, 6)),
    Case("layernorm-rows", "norm", lambda: nn.LayerNorm(6), vectors(6)),
    Case("layernorm-no-bias", "norm", lambda: nn.LayerNorm(5, bias=False), vectors(K, 5)),
    Case("layernorm-2d", "norm", lambda: nn.LayerNorm((3, 5)), vectors(4, 3, 5)),
    Case("layernorm-2d-no-bias", "norm", lambda: nn.LayerNorm((3, 5), bias=False), vectors(3, 5)),
    Case("rmsnorm", "norm", lambda: nn.RMSNorm(6), vectors(6, 6)),
    Case("rmsnorm-2d", "norm", lambda: nn.RMSNorm((3, 5)), vectors(2, 3, 5)),
    Case("groupnorm", "norm", lambda: nn.GroupNorm(2, 6), vectors(6, 5, 5)),
    Case("groupnorm-rows", "norm", lambda: nn.GroupNorm(3, 6), vectors(6)),
    Case("layernorm-frozen-bias", "norm", lambda: frozen(nn.LayerNorm(6), "bias"), vectors(6, 6)),
    Case("layernorm-frozen-weight", "norm", lambda: frozen(nn.LayerNorm(6), "weight"), vectors(6, 6)),
    Case("groupnorm-frozen-bias", "norm", lambda: frozen(nn.GroupNorm(3, 6), "bias"), vectors(6, 4)),
    Case("head-frozen-weight", "head", lambda: frozen(nn.Linear(5, 4), "weight"), vectors(5)),
    Case("head-frozen-bias", "head", lambda: frozen(nn.Linear(5, 4), "bias"), vectors(5)),
    # Subclasses with a forward of their own.
    Case("linear-subclass", "rank1", lambda: SineLinear(5, 4), vectors(5)),
    Case("layernorm-subclass", "norm", lambda: SineLayerNorm(6), vectors(6, 6)),
    Case("head-subclass", "head", lambda: SineLinear(5, 4), vectors(5)),
    Case("head-Conv1D-square", "head", lambda: Conv1D(5, 5), vectors(4, 5)),
    Case("head", "head", lambda: nn.Linear(5, 4), vectors(2 * K, 5)),
    Case("head-rows", "head", lambda: nn.Linear(5, 4), vectors(5)),
    Case("head-no-bias", "head", lambda: nn.Linear(5, 4, bias=False), vectors(K, 5)),
    Case("head-Conv1D", "head", lambda: Conv1D(7, 5), vectors(2 * K, 5)),
]
# Each way of calling a recurrent layer is tried where its weights and rows are; elsewhere a few suffice.
SOME_RECURRENT = [c for c in RECURRENT if c.name in ("LSTM", "LSTM-layers2-both1-proj3-state1", "GRU-layers2-state1")]
CASES = [*LAYERS, *SOME_RECURRENT]
FULL = [
    Case("full-linear", "full", lambda: nn.Linear(5, 4), vectors(5)),
    Case("full-Conv1D", "full", lambda: Conv1D(7, 5), vectors(3, 5)),
    Case("full-conv2d", "full", lambda: nn.Conv2d(4, 6, 3, groups=2), vectors(4, 4, 4)),
    Case("full-layernorm", "full", lambda: nn.LayerNorm((3, 5)), vectors(3, 5)),
    *(Case(f"full-{c.name}", "full", c.layer, c.inputs, c.input_dims, c.output_dims) for c in SOME_RECURRENT),
]


def every(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def attached(model: nn.Module, family: str, noise: float = 0.5, **kwargs: Any) -> LatePhase:
    config = LatePhaseConfig(
        num_members=K, weights=[family], init_noise=noise, target_modules=["layer"] if family == "rank1" else None,
        **kwargs,
    )  # fmt: skip
    return LatePhase(model, config)


def released(model: nn.Module, family: str, noise: float = 0.5, **kwargs: Any) -> LatePhase:
    late_phase = attached(model, family, noise, **kwargs)
    late_phase.release(torch.Generator().manual_seed(3))
    return late_phase


# ---- the same by hand ----


def outer(u: Tensor, v: Tensor, like: Tensor) -> Tensor:
    """u vᵀ, with the dimensions of a kernel added."""
    return (u[:, None] * v[None, :]).reshape(len(u), len(v), *[1] * (like.ndim - 2))


def stack_names(key: str, rank1: bool) -> tuple[str, ...]:
    module, _, tensor = key.rpartition(".")
    prefix = f"{module}.parametrizations.{tensor}."
    return (f"{prefix}original", f"{prefix}0.left", f"{prefix}0.right") if rank1 else (f"{prefix}original",)


def weights_by_hand(late_phase: LatePhase, pick: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The plain weights, stacks being read by `pick`."""
    own = dict(late_phase.model.named_parameters())
    weights = {}
    for target in late_phase.targets:
        names = stack_names(target.key, target.family == "rank1")
        first, *factors = (own.pop(name).detach() for name in names)
        weights[target.key] = first * outer(*map(pick, factors), first) if factors else pick(first)
    return {**weights, **{name: p.detach() for name, p in own.items()}}


def plain_with(plain: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    model = copy.deepcopy(plain)
    parameters = dict(model.named_parameters())
    assert parameters.keys() == weights.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    return model


def gradients_by_hand(late_phase: LatePhase, plain: nn.Module, k: int) -> dict[str, Tensor]:
    """The chain rule from the plain layer's gradients to those of member k; the other members' rows are zero."""
    grads = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    own = {name: p.detach() for name, p in late_phase.model.named_parameters()}
    result = {}
    for target in late_phase.targets:
        grad = grads.pop(target.key)
        rank1 = target.family == "rank1"
        names = stack_names(target.key, rank1)
        if rank1:
            W, u, v = own[names[0]], own[names[1]][k], own[names[2]][k]
            product = (grad * W).flatten(2).sum(-1) if W.ndim > 2 else grad * W
            result[names[0]] = grad * outer(u, v, W)
            result[names[1]] = torch.zeros_like(own[names[1]])
            result[names[1]][k] = (product * v[None, :]).sum(1)
            result[names[2]] = torch.zeros_like(own[names[2]])
            result[names[2]][k] = (product * u[:, None]).sum(0)
        else:
            result[names[0]] = torch.zeros_like(own[names[0]])
            result[names[0]][k] = grad
    return {**result, **grads}


def backward(outputs: list[Tensor], seed: int = 5) -> None:
    torch.autograd.backward(outputs, cotangents(outputs, seed))


def cotangents(outputs: list[Tensor], seed: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        scale = expected.abs().max().clamp_min(1e-6)
        assert ours[name].shape == expected.shape, name
        assert ((ours[name] - expected).abs().max() / scale).item() < 1e-12, name


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert list(ours) == list(theirs)
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype and torch.equal(ours[name], expected), name


def named(tensors: list[Tensor]) -> dict[str, Tensor]:
    return {str(i): t.detach() for i, t in enumerate(tensors)}


# ---- every layer ----


@every(CASES + FULL)
def test_attaching_changes_no_output(case: Case) -> None:
    model, rows = case.model(), case.rows()
    before = named(model(*rows))
    late_phase = attached(model, case.family)
    assert_same(named(model(*rows)), before)
    late_phase.activate(None)
    assert_same(named(model(*rows)), before)
    late_phase = released(late_phase.detach(), case.family, noise=0.0)
    for k in range(K):
        late_phase.activate(k)
        assert_same(named(model(*rows)), before)


@every(LAYERS + RECURRENT + FULL)
def test_a_member_is_the_plain_layer_with_its_weights(case: Case) -> None:
    model, rows = case.model(), case.rows()
    plain = copy.deepcopy(model)
    late_phase = released(model, case.family)
    seen = []
    for k in range(K):
        late_phase.activate(k)
        model.zero_grad()
        rows_of_member = [r.detach().clone().requires_grad_() for r in rows]
        outputs = model(*rows_of_member)
        backward(outputs)

        explicit = plain_with(plain, weights_by_hand(late_phase, lambda stack, k=k: stack[k]))
        plain_rows = [r.detach().clone().requires_grad_() for r in rows]
        expected = explicit(*plain_rows)
        backward(expected)
        assert_close(named(outputs), named(expected))
        assert_close(gradients(model), gradients_by_hand(late_phase, explicit, k))
        assert_close(named([r.grad for r in rows_of_member]), named([r.grad for r in plain_rows]))
        seen.append(outputs[0].detach())
    assert not torch.allclose(seen[0], seen[1]) and not torch.allclose(seen[1], seen[2])


@every(CASES + FULL)
def test_folding(case: Case) -> None:
    model, rows = case.model(), case.rows()
    plain = copy.deepcopy(model)
    late_phase = released(model, case.family)
    by_hand = weights_by_hand(late_phase, lambda stack: stack.mean(0))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folded = late_phase.averaged_state_dict()
    assert list(folded) == list(plain.state_dict())
    assert_close({name: folded[name] for name in by_hand}, by_hand)

    averaged = late_phase.averaged_model()
    assert [type(m) for m in averaged.modules()] == [type(m) for m in plain.modules()]
    assert_same(dict(averaged.state_dict()), folded)
    expected = named(plain_with(plain, by_hand)(*rows))
    assert_close(named(averaged(*rows)), expected)
    late_phase.activate(None)
    assert_close(named(model(*rows)), expected)
    # The original is as it was, whatever becomes of the new model.
    with torch.no_grad():
        for parameter in averaged.parameters():
            parameter.zero_()
    assert_same(
        {k: v for k, v in model.state_dict().items() if "num_batches" not in k and "running" not in k},
        {k: v for k, v in state.items() if "num_batches" not in k and "running" not in k},
    )
    assert_close(named(model(*rows)), expected)


@every(LAYERS + RECURRENT)
def test_rows_dealt_out_are_one_pass_per_member(case: Case) -> None:
    model, rows = case.model(), case.rows()
    late_phase = released(model, case.family, member_assignment="sample")
    late_phase.activate_by_sample()
    outputs = model(*rows)
    backward(outputs)
    together = gradients(model)
    row_gradients = named([r.grad for r in rows])
    model.zero_grad()

    cotangent_blocks = case.blocks(cotangents(outputs), case.output_dims)
    apart, separate = [], case.rows()
    for k, block in enumerate(case.blocks(separate, case.input_dims)):
        late_phase.activate(k)
        apart.append(model(*[t.contiguous() for t in block]))
        torch.autograd.backward(apart[-1], cotangent_blocks[k])
    joined = [torch.cat(parts, dim) for parts, dim in zip(zip(*apart, strict=True), case.output_dims, strict=True)]
    assert_close(named(outputs), named(joined))
    assert_close(together, gradients(model))
    assert_close(row_gradients, named([r.grad for r in separate]))


@every(CASES)
def test_rows_that_do_not_divide_are_refused(case: Case) -> None:
    model = case.model()
    late_phase = released(model, case.family, member_assignment="sample")
    late_phase.activate_by_sample()
    with pytest.raises(ValueError, match=r"num_members=3.*7 rows.*Choose a batch size"):
        model(*case.rows(7))
    assert_close(named(model(*case.rows(6))), named(model(*case.rows(6))))


@every(CASES + FULL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_detaching_restores_the_plain_model(case: Case, dtype: torch.dtype) -> None:
    model = case.model().to(dtype)
    plain = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    late_phase = released(model, case.family, noise=0.0)
    assert type(model.layer) is not type(plain.layer)
    assert late_phase.detach() is model
    assert_same(dict(model.state_dict()), dict(plain.state_dict()))
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert vars(model.layer).keys() == vars(plain.layer).keys()
    assert all(p.is_leaf and p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in plain.parameters()]
    rows = [r.detach().to(dtype) for r in case.rows()]
    assert_same(named(model(*rows)), named(plain(*rows)))
    # And it can be attached and trained again.
    again = released(model, case.family, member_assignment="minibatch" if case.family == "full" else "sample")
    again.activate(1)
    backward(model(*rows))
    assert all(p.grad is not None for p in again.stacks().values())


@every(CASES + FULL)
def test_a_deep_copy_lives_its_own_life(case: Case) -> None:
    model, rows = case.model(), case.rows()
    late_phase = released(model, case.family)
    late_phase.activate(1)
    before = named(model(*rows))
    twin = copy.deepcopy(late_phase)
    assert twin.model is not model and twin.members is not late_phase.members
    optimizer = torch.optim.SGD(twin.model.parameters(), lr=0.1)
    for k in range(K):
        twin.activate(k)
        backward(twin.model(*rows))
    optimizer.step()
    assert not torch.allclose(twin.model(*rows)[0], before["0"])
    twin.activate(2)
    twin.detach()
    twin.model(*rows)
    assert_same(named(model(*rows)), before)
    assert all(p.grad is None for p in model.parameters())
    backward(model(*rows))
    late_phase.activate(0)
    assert not torch.allclose(model(*rows)[0], before["0"])


# ---- attaching to whole models ----


class Shared(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.norm = nn.LayerNorm(4)
        self.out = nn.Linear(4, 2)

    def forward(self, rows: Tensor) -> Tensor:
        return self.out(self.norm(self.second(self.first(rows))))


def test_a_shared_layer_is_replicated_once() -> None:
    model = Shared().double()
    plain = copy.deepcopy(model)
    keys = list(model.state_dict())
    late_phase = LatePhase(model, LatePhaseConfig(num_members=K, weights=["rank1", "norm"], init_noise=0.5))
    assert [target.key for target in late_phase.targets] == ["first.weight", "norm.weight", "norm.bias"]
    assert len(late_phase.stacks()) == 4
    late_phase.release()
    late_phase.activate(1)
    rows = torch.randn(5, 4, dtype=torch.float64)
    outputs = model(rows)
    outputs.sum().backward()
    explicit = plain_with(plain, weights_by_hand(late_phase, lambda stack: stack[1]))
    expected = explicit(rows)
    expected.sum().backward()
    assert_close({"out": outputs}, {"out": expected})
    assert_close(gradients(model), gradients_by_hand(late_phase, explicit, 1))
    folded = late_phase.averaged_state_dict()
    assert list(folded) == keys
    assert torch.equal(folded["first.weight"], folded["second.weight"])
    averaged = late_phase.averaged_model()
    assert averaged.first is averaged.second and type(averaged.first) is nn.Linear
    late_phase.detach()
    assert model.first is model.second and list(model.state_dict()) == keys


def test_targets_say_which_rule_chose_them() -> None:
    model = gpt2()
    config = LatePhaseConfig(weights=["rank1", "norm"], target_modules=["c_attn", r".*\.h\.1\.mlp\.c_\w+"])
    rules = {(t.module, t.tensor, t.family): t.rule for t in LatePhase(model, config).targets}
    expected: dict[tuple[str, str, str], str] = {}
    for layer in (0, 1):
        expected[f"transformer.h.{layer}.attn.c_attn", "weight", "rank1"] = "target_modules 'c_attn'"
        for norm in ("ln_1", "ln_2"):
            for tensor in ("weight", "bias"):
                expected[f"transformer.h.{layer}.{norm}", tensor, "norm"] = "every norm layer"
    for name in ("c_fc", "c_proj"):
        rule = r"target_modules '.*\\.h\\.1\\.mlp\\.c_\\w+'"
        expected[f"transformer.h.1.mlp.{name}", "weight", "rank1"] = rule
    for tensor in ("weight", "bias"):
        expected["transformer.ln_f", tensor, "norm"] = "every norm layer"
    assert rules == expected


def test_defaults_leave_out_embeddings_and_the_output_layer() -> None:
    for model in (gpt2(), llama()):
        names = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and n != "lm_head"}
        late_phase = LatePhase(model, LatePhaseConfig(weights=["rank1"]))
        assert {target.module for target in late_phase.targets} == names and names
        assert {target.rule for target in late_phase.targets} == {"all linear-like layers but the output layer"}
    (head,) = LatePhase(llama(), LatePhaseConfig(weights=["head"])).targets
    assert (head.key, head.family, head.rule) == ("lm_head.weight", "head", "output layer")
    model = llama()
    keys = [name for name, _ in model.named_parameters()]
    assert sorted(t.key for t in LatePhase(model, LatePhaseConfig(weights=["full"])).targets) == sorted(keys)
    names = {t.module for t in LatePhase(gpt2(), LatePhaseConfig(target_modules=["c_fc"])).targets}
    assert names == {"transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc"}
    config = LatePhaseConfig(target_modules=["all-linear"], exclude_modules=["c_attn", r"transformer\.h\.0\..*"])
    names = {t.module for t in LatePhase(gpt2(), config).targets}
    assert names == {f"transformer.h.1.{name}" for name in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj")}


@pytest.mark.parametrize(("weights", "stacked"), [
    # Per layer: c_attn 16 + 48, c_proj 16 + 16, c_fc 16 + 64, mlp.c_proj 64 + 16.
    (["rank1"], 2 * (64 + 32 + 80 + 80)),
    (["norm"], 2 * (2 * 32) + 32),
    (["rank1", "norm"], 2 * (64 + 32 + 80 + 80 + 2 * 32) + 32),
], ids=["rank1", "norm", "rank1+norm"])  # fmt: skip
def test_how_many_parameters_are_replicated(weights: list[str], stacked: int) -> None:
    model = gpt2()
    before = sum(p.numel() for p in model.parameters())
    late_phase = LatePhase(model, LatePhaseConfig(num_members=4, weights=weights))
    stacks, base = late_phase.stacks(), late_phase.base_parameters()
    assert sum(p.numel() for p in stacks.values()) == 4 * stacked
    replaced = stacked if weights == ["norm"] else 160 if "norm" in weights else 0
    assert sum(p.numel() for p in base.values()) == before - replaced
    assert {*stacks, *base} == {name for name, _ in model.named_parameters()} and not stacks.keys() & base.keys()
    assert all(late_phase.is_late_phase(name) for name in stacks)
    assert not any(late_phase.is_late_phase(name) for name in base)
    plain = {late_phase.plain_name(name) for name in model.state_dict()} - {None}
    assert plain == set(late_phase.averaged_state_dict())


def test_a_full_ensemble_has_k_models() -> None:
    model = llama()
    before = sum(p.numel() for p in model.parameters())
    late_phase = LatePhase(model, LatePhaseConfig(num_members=4, weights=["full"]))
    assert late_phase.base_parameters() == {}
    assert sum(p.numel() for p in model.parameters()) == 4 * before


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("linear", "conv2d", "layernorm", "head", "LSTM")],
                         ids=lambda case: case.name)  # fmt: skip
@pytest.mark.parametrize("when", ["attached", "released"])
def test_moving_an_attached_model(case: Case, when: str) -> None:
    model = case.model()
    late_phase = attached(model, case.family) if when == "attached" else released(model, case.family)
    model.to(torch.float32)
    if when == "attached":
        late_phase.release(torch.Generator().manual_seed(3))
    late_phase.activate(1)
    rows = [r.detach().float() for r in case.rows()]
    outputs = model(*rows)
    backward(outputs)
    assert {o.dtype for o in outputs} == {torch.float32} == {p.grad.dtype for p in model.parameters()}
    plain = plain_with(Holder(case.layer()), weights_by_hand(late_phase, lambda stack: stack[1]))
    assert torch.allclose(outputs[0], plain(*rows)[0], atol=1e-5)
    assert {t.dtype for t in late_phase.averaged_state_dict().values()} == {torch.float32}
    model.zero_grad()
    model.to("meta")
    late_phase.activate(2)
    assert late_phase.members.index.device.type == "meta"
    for output, moved in zip(outputs, model(*[r.to("meta") for r in rows]), strict=True):
        assert moved.device.type == "meta" and moved.shape == output.shape


@pytest.mark.parametrize("assignment", ["minibatch", "sample"])
def test_bfloat16_models_train(assignment: str) -> None:
    model = gpt2().to(torch.bfloat16)
    config = LatePhaseConfig(num_members=2, weights=["rank1", "norm"], init_noise=0.1, member_assignment=assignment)
    late_phase = LatePhase(model, config)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    late_phase.release()
    ids = Text(4).ids
    for k in range(2):
        late_phase.activate(k) if assignment == "minibatch" else late_phase.activate_by_sample()
        model(ids, labels=ids).loss.backward()
    for name, stack in late_phase.stacks().items():
        assert stack.grad.dtype == torch.bfloat16 and bool((stack.grad.flatten(1) != 0).any(1).all()), name


AUTOCAST = [
    c for c in CASES
    if c.name in ("linear", "linear-time=rows", "Conv1D", "conv1d", "conv2d", "conv2d-depthwise", "layernorm",
                  "rmsnorm", "groupnorm", "head", "head-Conv1D")
]  # fmt: skip


@every(AUTOCAST)
@pytest.mark.parametrize("assignment", ["minibatch", "sample"])
def test_backward_under_autocast(case: Case, assignment: str) -> None:
    model = case.model().float()
    plain = copy.deepcopy(model)
    late_phase = released(model, case.family, member_assignment=assignment)
    rows = [r.detach().float() for r in case.rows()]
    blocks = case.blocks(rows, case.input_dims) if assignment == "sample" else [rows] * K
    expected, results = [], []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for k in range(K):
            explicit = plain_with(plain, weights_by_hand(late_phase, lambda stack, k=k: stack[k]))
            (output,) = explicit(*blocks[k])
            output.float().square().sum().backward()
            expected.append((output, gradients_by_hand(late_phase, explicit, k)))
        if assignment == "sample":
            late_phase.activate_by_sample()
            (output,) = model(*rows)
            output.float().square().sum().backward()
            results = list(output.chunk(K))
        else:
            for k in range(K):
                late_phase.activate(k)
                (output,) = model(*rows)
                output.float().square().sum().backward()
                results.append(output)
    for result, (output, _) in zip(results, expected, strict=True):
        assert torch.allclose(result.float(), output.float(), atol=0.05 * output.abs().max().item())
    for name, gradient in gradients(model).items():
        total = sum(by_hand[name] for _, by_hand in expected)
        assert gradient.dtype == torch.float32
        assert (gradient - total).abs().max() < 0.05 * total.abs().max(), name


# ---- no wait for the device ----


class RefuseSync(TorchDispatchMode):
    """Fails on operators that make the host wait for the device to read a value or a shape."""

    SYNCS = ("_local_scalar_dense", "nonzero", "nonzero_static", "equal", "is_nonzero", "masked_select", "_unique2")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        assert name not in self.SYNCS and not by_mask, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@every(CASES + FULL)
@pytest.mark.parametrize("assignment", ["minibatch", "sample"])
def test_a_late_phase_pass_never_waits_for_the_device(case: Case, assignment: str) -> None:
    if case.family == "full":
        assignment = "minibatch"
    model, rows = case.model(), case.rows()
    late_phase = released(model, case.family, member_assignment=assignment)
    outputs = model(*rows)
    cotangent = cotangents(outputs)
    with RefuseSync():
        for k in range(K):
            late_phase.activate(k) if assignment == "minibatch" else late_phase.activate_by_sample()
            torch.autograd.backward(model(*rows), cotangent)
        late_phase.activate(None)
        model(*rows)


def test_the_sync_guard_notices() -> None:
    with pytest.raises(AssertionError, match="waits for the device"), RefuseSync():
        torch.ones(1).item()
    with pytest.raises(AssertionError, match="waits for the device"), RefuseSync():
        torch.ones(3)[torch.ones(3) > 0]


@pytest.mark.parametrize("family", ["norm", "full"])
def test_a_parametrization_on_top_is_not_passed_over(family: str) -> None:
    """Late-phase weights are read past `parametrize`'s own calls, as long as they are alone."""

    class Doubled(torch.nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    model = torch.nn.Sequential(torch.nn.LayerNorm(4) if family == "norm" else torch.nn.Linear(4, 4))
    late_phase = LatePhase(model, LatePhaseConfig(num_members=3, weights=[family], init_noise=0.5))
    late_phase.release()
    late_phase.activate(1)
    alone = model[0].weight.clone()
    torch.nn.utils.parametrize.register_parametrization(model[0], "weight", Doubled())
    assert torch.equal(model[0].weight, 2 * alone)


@pytest.mark.parametrize("kind", [torch.nn.LSTM, torch.nn.GRU])
def test_a_recurrent_layer_computes_its_weights_once_a_call(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own call reads its list of weights twice."""
    from hf_latephase.core.weights import recurrent

    counted: list[int] = []
    products = recurrent.rank1_products
    monkeypatch.setattr(recurrent, "rank1_products", lambda given: counted.append(len(given)) or products(given))
    model = torch.nn.Sequential(kind(3, 4, num_layers=2))
    late_phase = LatePhase(model, LatePhaseConfig(num_members=2, weights=["rank1"], target_modules=["0"]))
    late_phase.activate(1)
    model(torch.ones(5, 2, 3))
    assert counted == [4]
    assert len(model[0]._flat_weights) == 8 and counted == [4, 4]  # whoever else reads them gets them anew
    late_phase.detach()
    assert not [name for name in vars(model[0]) if name.startswith("_latephase")]


def test_detached_stacks_come_in_the_order_of_attached_ones() -> None:
    """Who joins them to one vector, as the notebook does, must get the same one."""
    late_phase = LatePhase(gpt2(), LatePhaseConfig(num_members=2, weights=["norm", "rank1"]))
    late_phase.release()
    attached = list(late_phase.stacks())
    late_phase.detach()
    assert list(late_phase.stacks()) == attached
    with late_phase.attached():
        assert list(late_phase.stacks()) == attached
