"""BatchNorm as late-phase weights: scale, shift and running statistics replicated (paper section 3.2)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .members import Fixed, Members, call_each, call_with, members_of, plain_forward
from .replicated import Replicated


AFFINE = ("weight", "bias")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
# What `_sample_forward` computes; a subclass may compute something else.
PLAIN_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)


class BatchNormTensor(Replicated):
    """
    Parametrization of one tensor of a BatchNorm layer, stacked `[K, ...]`.

    Attributes:
        fixed (`Fixed`):
            What the tensor is while the layer's own call runs. PyTorch updates running statistics in place, which
            would be lost on a value computed anew for each reader.
        measured (`torch.Tensor`, *optional*):
            Statistics measured over a training set, `[K, ...]` of each member or `[1, ...]` of the averaged weights,
            which stand in for the running ones of the stack in evaluations and in the average.
    """

    def __init__(self, members: Members) -> None:
        super().__init__(members)
        self.fixed: Fixed[Tensor] = Fixed()
        self.measured: Tensor | None = None

    def forward(self, stack: Tensor) -> Tensor:
        """Returns the tensor of the active member, or of the running call."""
        return self.members.select(stack) if self.fixed.value is None else self.fixed.value


def eligible(module: nn.Module) -> list[str]:
    """
    Names all tensors of a BatchNorm layer, if its scale or shift is trained; running statistics are among them.

    A frozen scale or shift is named too: the average of the members may need another one.
    """
    if not any(p.requires_grad for p in module.parameters(recurse=False)):
        return []
    return [name for name in AFFINE + STATISTICS if isinstance(getattr(module, name, None), Tensor)]


def parametrization(members: Members, tensor: Tensor) -> nn.Module:
    """Returns the parametrization of one tensor."""
    return BatchNormTensor(members)


def member_forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """
    The call of the layer, of whatever subclass, with the tensors of the active member or of the average.

    In training mode the active member's statistics are updated, and no other's. The average has none of its own to
    update, unless they are being measured.
    """
    tensors = _tensors(layer)
    members: Members = next(iter(tensors.values()))._modules["0"].members
    if members.mode == "sample":
        return _sample_forward(layer, *args, **kwargs)
    if members.mode == "average":
        return call_with(layer, plain_forward(layer), _averaged(layer), args, kwargs)
    if len(args) == 1 and not kwargs and _is_plain(layer, tensors, members):
        return _plain_call(layer, tensors, members, *args)
    stacks = {name: _member_statistics(tensors[name]) for name in STATISTICS if name in tensors}
    values = {name: members.select(stack) for name, stack in stacks.items()}
    forward = plain_forward(layer)
    if isinstance(layer, nn.SyncBatchNorm) and members.released and members.num_members > 1:
        # The processes run different members: each normalises by its own minibatch.
        forward = _BatchNorm.forward
    output = call_with(layer, forward, values, args, kwargs)
    if layer.training and not members.yields_views:
        for name, stack in stacks.items():
            stack.index_copy_(0, members.index, values[name].unsqueeze(0))
    return output


def _is_plain(layer: Any, tensors: dict[str, Any], members: Members) -> bool:
    """Whether `_plain_call` computes what the layer does."""
    return (
        members.yields_views
        and plain_forward(layer) is _BatchNorm.forward
        and layer.momentum is not None  # else it depends on the minibatches tracked
        and layer.track_running_stats == ("running_mean" in tensors)
        and not any(len(own._modules) > 1 for own in tensors.values())  # someone has put another on top
    )


def _plain_call(layer: Any, tensors: dict[str, Any], members: Members, rows: Tensor) -> Tensor:
    """
    What `_BatchNorm.forward` computes, with views of the active member's rows, which it updates.

    That method reads each tensor several times, through modules' lookups that take longer than a GPU's kernels.
    """
    layer._check_input_dim(rows)
    training, select, values = layer.training, members.select, {}
    for name, own in tensors.items():
        stack = _member_statistics(own) if name in STATISTICS else own._parameters["original"]
        values[name] = select(stack)
    if training and "num_batches_tracked" in values:
        values["num_batches_tracked"].add_(1)
    mean, variance = values.get("running_mean"), values.get("running_var")
    return F.batch_norm(
        rows, mean, variance, values.get("weight"), values.get("bias"), training or mean is None, layer.momentum,
        layer.eps,
    )  # fmt: skip


def fold(layer: Any, stacks: dict[str, Tensor]) -> dict[str, Tensor]:
    """
    Returns the one BatchNorm whose output in evaluation mode is the mean of the members' outputs.

    Members are affine maps x ↦ γ_k (x − μ_k) / s_k + β_k with s_k = √(σ²_k + ε). Their mean has the scale
    mean_k(γ_k / s_k) and the shift mean_k(β_k − γ_k μ_k / s_k), written as a layer with the mean statistics. Members
    that are equal come out to the bit. With statistics of the averaged weights, this is the average of γ and β.

    Args:
        layer (`torch.nn.Module`):
            The layer, for its ε and its measured statistics, which take the place of the running ones.
        stacks (`dict[str, torch.Tensor]`):
            The layer's tensors `[K, ...]` by plain name.

    Returns:
        `dict[str, torch.Tensor]`: The tensors of the same names, without the first dimension.
    """
    members = members_of(layer)
    stacks = stacks | {name: m.to(stacks[name].device).expand_as(stacks[name]) for name, m in measured(layer).items()}
    if not members.released or members.num_members == 1:
        return {name: stack[0] for name, stack in stacks.items()}
    folded = {name: members.average(stack) for name, stack in stacks.items() if stack.is_floating_point()}
    if "running_var" not in stacks:
        return folded
    folded["num_batches_tracked"] = stacks["num_batches_tracked"].amax(0)
    rms, rms_k = ((variance + layer.eps).sqrt() for variance in (folded["running_var"], stacks["running_var"]))
    # As corrections that vanish where members agree.
    folded["weight"] = members.average(stacks["weight"] * (rms / rms_k))
    if "bias" in stacks:
        shift = stacks["weight"] / rms_k * (folded["running_mean"] - stacks["running_mean"])
        folded["bias"] = members.average(stacks["bias"] + shift)
    return folded


def measured(layer: nn.Module) -> dict[str, Tensor]:
    """Returns the statistics of a layer that were measured over a training set, by plain name; none is the rule."""
    return {name: t[0].measured for name, t in _tensors(layer).items() if t[0].measured is not None}


def measure(layer: nn.Module, rows: int | None) -> None:
    """
    Gives a layer statistics to be measured, as those of a new layer.

    Args:
        rows (`int`, *optional*):
            K for those of each member, 1 for those of the averaged weights, `None` to go back to running statistics.
    """
    for name, tensor in _tensors(layer).items():
        if name in STATISTICS:
            fill = torch.ones_like if name == "running_var" else torch.zeros_like
            tensor[0].measured = None if rows is None else fill(tensor.original[:rows])


def _tensors(layer: nn.Module) -> Any:
    """The layer's parametrizations by plain name: the stack is `original`, the parametrization item 0."""
    return layer._modules["parametrizations"]._modules  # type: ignore[union-attr]


def _member_statistics(tensor: Any) -> Tensor:
    """The stack that members read and update."""
    stack: Tensor = tensor._buffers["original"]
    own: Tensor | None = tensor._modules["0"].measured
    return stack if own is None or own.shape != stack.shape else own


def _averaged(layer: nn.Module) -> dict[str, Tensor]:
    stacks = {name: tensor.original for name, tensor in _tensors(layer).items()}
    # Views of what is measured, so that measuring updates it in place.
    return fold(layer, stacks) | {name: m[0] for name, m in measured(layer).items() if m.shape[0] == 1}


def _sample_forward(layer: Any, rows: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The call for rows `[B, C, ...]` dealt out over the members: each normalises its own block of rows."""
    members = members_of(layer)
    if plain_forward(layer) not in PLAIN_FORWARDS or layer.momentum is None:
        return call_each(layer, member_forward, members, (rows, *args), kwargs)
    layer._check_input_dim(rows)
    # Members side by side, as channels [B / K, K * C, ...] of one layer.
    dealt = members.deal(rows)
    channels = dealt.transpose(0, 1).flatten(1, 2)
    stacks = {name: tensor.original.flatten() for name, tensor in _tensors(layer).items()}
    if layer.training and "num_batches_tracked" in stacks:
        stacks["num_batches_tracked"].add_(1)
    outputs = F.batch_norm(
        channels,
        stacks.get("running_mean"),
        stacks.get("running_var"),
        stacks.get("weight"),
        stacks.get("bias"),
        training=layer.training or "running_mean" not in stacks,
        momentum=layer.momentum,
        eps=layer.eps,
    )
    return torch.unflatten(outputs, 1, (members.num_members, -1)).transpose(0, 1).flatten(0, 1)
