"""What `nn.LSTM` and `nn.GRU` need beyond a parametrization: they cache weights and mix a batch's rows in time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .members import Fixed, Members, members_of, plain_forward
from .rank1 import Rank1
from .rank1_functions import rank1_products


RECURRENT_LAYERS = (nn.LSTM, nn.GRU)
# Where a module keeps its effective weights while its call runs.
FIXED = "_latephase_fixed"


def use_effective_weights(module: nn.Module) -> None:
    """
    Makes a parametrized recurrent layer read its effective weights in every call.

    PyTorch's layer computes with the cached list `_flat_weights`; the class that `parametrize` gave this module
    gets a property in its place.
    """
    layer_class: Any = type(module)
    module.__dict__.pop("_flat_weights", None)
    module.__dict__[FIXED] = Fixed()
    layer_class._flat_weights = property(_read_weights, _keep_weights)
    for method in ("flatten_parameters", "_init_flat_weights", "_update_flat_weights"):
        setattr(layer_class, method, _nothing)


def restore_cached_weights(module: nn.Module) -> None:
    """Rebuilds PyTorch's cache once the module has its plain class and parameters again."""
    module.__dict__.pop(FIXED, None)
    module._init_flat_weights()  # type: ignore[operator]


def member_forward(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a layer's call that computes the effective weights once, though PyTorch's own call reads them twice."""

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        fixed = module.__dict__[FIXED]
        fixed.value = _effective_weights(module)
        try:
            return forward(module, *args, **kwargs)
        finally:
            fixed.value = None

    return call


def sample_forward(module: nn.Module, rows: Any, state: Any = None) -> Any:
    """The layer's call for rows dealt out over the members: one call a member, on its block of rows."""
    if not isinstance(rows, Tensor) or rows.ndim != 3:
        raise ValueError(
            "member_assignment='sample' runs recurrent layers on batched, padded tensors only (no PackedSequence). "
            "Use member_assignment='minibatch'."
        )
    members, forward = members_of(module), member_forward(plain_forward(module))
    batch_dim = 0 if module.batch_first else 1
    blocks = rows.chunk(members.num_members, batch_dim)
    if len({block.shape[batch_dim] for block in blocks}) != 1 or len(blocks) != members.num_members:
        members.deal(rows.transpose(0, batch_dim))  # raises with the remedy
    outputs, states = [], []
    for member, block in enumerate(blocks):
        members.activate(member)
        output, new_state = forward(module, block, _block_of(state, member, members))
        outputs.append(output)
        states.append(new_state)
    members.mode = "sample"
    return torch.cat(outputs, batch_dim), _join(states)


def _block_of(state: Any, member: int, members: Members) -> Any:
    if state is None:
        return None
    if isinstance(state, tuple):
        return tuple(_block_of(part, member, members) for part in state)
    return state.chunk(members.num_members, 1)[member].contiguous()


def _join(states: list[Any]) -> Any:
    if isinstance(states[0], tuple):
        return tuple(torch.cat(parts, 1) for parts in zip(*states, strict=True))
    return torch.cat(states, 1)


def _read_weights(module: nn.Module) -> list[Tensor]:
    fixed: list[Tensor] | None = module.__dict__[FIXED].value
    return _effective_weights(module) if fixed is None else fixed


def _effective_weights(module: nn.Module) -> list[Tensor]:
    lists: Any = module._modules["parametrizations"]._modules  # type: ignore[union-attr]
    factors = {}
    for name, own in lists.items():
        parametrization = own._modules["0"]
        # Not where someone has put another parametrization on top.
        if type(parametrization) is Rank1 and len(own._modules) == 1:
            factors[name] = (own._parameters["original"], *parametrization.factors())
    values = dict(zip(factors, rank1_products(list(factors.values())), strict=True)) if factors else {}
    names: Any = module._flat_weights_names
    return [values[name] if name in values else getattr(module, name) for name in names]


def _keep_weights(module: nn.Module, weights: list[Tensor]) -> None:
    """PyTorch assigns its cache here; the effective weights are computed instead."""


def _nothing(module: nn.Module, *args: Any) -> None:
    """Stands in for the methods that maintain PyTorch's cache."""
