"""What differs once FSDP2 has made the parameters shards (`DTensor`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """
    Returns the parameters by name, sharded ones as shards.

    FSDP may leave the root module gathered after an evaluation, its parameters plain tensors until the next reshard.
    """
    if isinstance(model, FSDPModule):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
    return dict(model.named_parameters())


def gathered(tensor: Tensor) -> Tensor:
    """Returns the whole of a possibly sharded tensor; all processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def sharded_like(parameter: Tensor, value: Tensor) -> Tensor:
    """Returns a whole tensor on the device of a parameter, sharded as that is."""
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(value.contiguous(), parameter.device_mesh, parameter.placements)
    return value


def rows_like(stack: Tensor, values: list[float]) -> Tensor:
    """Returns one value a member as `[K, 1, ...]`, sharded like a stack `[K, ...]` so that the two broadcast."""
    rows = torch.tensor(values, dtype=stack.dtype, device=stack.device).view(-1, *[1] * (stack.ndim - 1))
    if isinstance(stack, DTensor):
        placements = [p if p.is_shard(0) else Replicate() for p in stack.placements]
        return distribute_tensor(rows, stack.device_mesh, placements)
    return rows
