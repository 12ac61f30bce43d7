"""What differs once parameters are shards: FSDP2's (`DTensor`), or those of an engine with weights of its own."""

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


class Storage:
    """Where the weights are that training goes on with: in the model's own tensors."""

    def trained(self, tensor: Tensor) -> Tensor:
        """Returns a tensor as it is trained, a shard as a shard; all processes must call it."""
        return tensor.detach()

    def read(self, tensor: Tensor) -> Tensor:
        """Returns the whole of a tensor as it is trained; all processes must call it."""
        return gathered(self.trained(tensor))

    def write(self, tensor: Tensor, value: Tensor) -> None:
        """Gives a tensor another whole value, from which training goes on; all processes must call it."""
        tensor.copy_(sharded_like(tensor, value))


def rows_like(stack: Tensor, values: list[float]) -> Tensor:
    """Returns one value a member as `[K, 1, ...]`, sharded like a stack `[K, ...]` so that the two broadcast."""
    rows = torch.tensor(values, dtype=stack.dtype, device=stack.device).view(-1, *[1] * (stack.ndim - 1))
    if isinstance(stack, DTensor):
        placements = [p if p.is_shard(0) else Replicate() for p in stack.placements]
        return distribute_tensor(rows, stack.device_mesh, placements)
    return rows
