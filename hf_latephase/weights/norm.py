"""Normalisation layers as late-phase weights: scale and shift replicated (paper section 3.2)."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .members import Members
from .replicated import Replicated


def is_norm_layer(module: nn.Module) -> bool:
    """
    Tells whether `module` is a normalisation layer: a leaf named like one with vectors as its only parameters.

    The name alone does not do: `RobertaPreLayerNormSelfAttention` holds whole sub-layers.
    """
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)):
        return True
    if isinstance(module, _BatchNorm) or next(module.children(), None) is not None:
        return False
    parameters = list(module.parameters(recurse=False))
    named_norm = re.search(r"norm", type(module).__name__, re.IGNORECASE) is not None
    return named_norm and bool(parameters) and all(p.ndim == 1 for p in parameters)


def eligible(module: nn.Module) -> list[str]:
    """Names the scale and shift of `module`, if it is a normalisation layer."""
    if not is_norm_layer(module):
        return []
    return [name for name, _ in module.named_parameters(recurse=False)]


def parametrization(members: Members, tensor: Tensor) -> nn.Module:
    """Returns the parametrization of one tensor."""
    return Replicated(members)


def sample_forward(module: nn.Module, rows: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """
    The layer's call for rows `[B, ...]` dealt out over the members.

    PyTorch's own layers normalise all rows at once, then scale and shift each member's block. Other classes multiply
    by `self.weight` with broadcasting, so they are called on `[K, B / K, ...]` with weights `[K, 1, ..., n]`.
    """
    parametrizations: Any = module.parametrizations
    members: Members = next(iter(parametrizations.values()))[0].members
    dealt = members.deal(rows)
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)):
        dim = 2 if isinstance(module, nn.GroupNorm) else -1
        outputs = members.deal(_normalised(module, rows))
        outputs = outputs * members.dealt_view(parametrizations.weight.original, outputs, dim)
        if "bias" in parametrizations:
            outputs = outputs + members.dealt_view(parametrizations.bias.original, outputs, dim)
        return outputs.flatten(0, 1)
    args = tuple(members.deal(a) if isinstance(a, Tensor) else a for a in args)
    kwargs = {k: members.deal(v) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    with members.viewing(dealt):
        return type(module).__bases__[0].forward(module, dealt, *args, **kwargs).flatten(0, 1)


def _normalised(module: nn.Module, rows: Tensor) -> Tensor:
    """Returns the rows normalised, neither scaled nor shifted."""
    if isinstance(module, nn.GroupNorm):
        return nn.functional.group_norm(rows, module.num_groups, eps=module.eps)
    if isinstance(module, nn.RMSNorm):
        return nn.functional.rms_norm(rows, list(module.normalized_shape), eps=module.eps)
    assert isinstance(module, nn.LayerNorm)
    return nn.functional.layer_norm(rows, list(module.normalized_shape), eps=module.eps)
