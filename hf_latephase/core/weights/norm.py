"""Normalisation layers as late-phase weights: scale and shift replicated (paper section 3.2)."""

from __future__ import annotations

import functools
import re
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .members import Members, members_of, plain_forward
from .replicated import Replicated


# BatchNorm, whose members differ in their running statistics too: batch_norm.py.
KINDS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _BatchNorm)
PLAIN_FORWARDS = (nn.LayerNorm.forward, nn.RMSNorm.forward, nn.GroupNorm.forward)


def is_norm_layer(module: nn.Module) -> bool:
    """
    Tells whether `module` is a normalisation layer: a leaf named like one with vectors as its only parameters.

    The name alone does not do: `RobertaPreLayerNormSelfAttention` holds whole sub-layers.
    """
    if isinstance(module, KINDS):
        return True
    parameters = list(module.parameters(recurse=False))
    return _is_leaf_named_norm(module) and bool(parameters) and all(p.ndim == 1 for p in parameters)


def has_no_weights(module: nn.Module) -> bool:
    """Tells whether `module` normalises and neither scales nor shifts, as in OLMo and nanochat."""
    parameters = next(module.parameters(), None)
    return parameters is None and (isinstance(module, KINDS) or _is_leaf_named_norm(module))


def _is_leaf_named_norm(module: nn.Module) -> bool:
    named_norm = re.search(r"norm", type(module).__name__, re.IGNORECASE) is not None
    return named_norm and next(module.children(), None) is None


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

    PyTorch's own layers normalise all rows at once, then scale and shift each member's block. What another class
    does with its weights (subclasses of PyTorch's included) is its own affair, so it is called for each member.
    """
    parametrizations: Any = module.parametrizations
    members, forward = members_of(module), plain_forward(module)
    if forward not in PLAIN_FORWARDS:
        each: Tensor = members.run_each(functools.partial(forward, module), rows, *args, **kwargs)
        return each
    dim = 2 if isinstance(module, nn.GroupNorm) else None
    outputs = members.deal(_normalised(module, rows))
    for name in ("weight", "bias"):
        if name in parametrizations:
            tensor = members.dealt_view(parametrizations[name].original, outputs, dim)
        elif getattr(module, name, None) is not None:  # frozen, so not replicated
            tensor = members.dealt_view(getattr(module, name).unsqueeze(0), outputs, dim)
        else:
            continue
        outputs = outputs * tensor if name == "weight" else outputs + tensor
    return outputs.flatten(0, 1)


def _normalised(module: nn.Module, rows: Tensor) -> Tensor:
    """Returns the rows normalised, neither scaled nor shifted."""
    if isinstance(module, nn.GroupNorm):
        return nn.functional.group_norm(rows, module.num_groups, eps=module.eps)
    if isinstance(module, nn.RMSNorm):
        return nn.functional.rms_norm(rows, list(module.normalized_shape), eps=module.eps)
    assert isinstance(module, nn.LayerNorm)
    return nn.functional.layer_norm(rows, list(module.normalized_shape), eps=module.eps)
