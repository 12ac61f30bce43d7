"""Hypernetwork weight embeddings: W = Σ_t e_t · template_t, e late-phase (paper; Savarese & Maire, ICLR 2019)."""

from __future__ import annotations

import functools
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .members import Members, members_of, plain_forward


LAYERS = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d)


class Hypernet(nn.Module):
    """
    Parametrization that mixes the templates of a layer's group by the active member's embedding.

    Layers with weights of one shape form a group. It has one template for each of its layers, stacked
    `[T, ...]` in one base parameter that all of them share, and starts from the plain model to the bit: template t is
    the weight of layer t, whose embedding is the t-th unit vector.

    Args:
        members (`Members`):
            The shared state.
        position (`int`):
            The layer's place t in its group.
        group_size (`int`):
            T.
        weight (`torch.Tensor`):
            The layer's weight, for its dtype and device.

    The embeddings are `embedding` `[K, T]`.
    """

    def __init__(self, members: Members, position: int, group_size: int, weight: Tensor) -> None:
        super().__init__()
        self.members = members
        self.position = position
        self.embedding = nn.Parameter(weight.new_zeros(members.num_members, group_size))
        self.reset(self.embedding)

    def forward(self, templates: Tensor) -> Tensor:
        """Returns the active member's mixture of the templates."""
        return mixture(templates, self.members.select(self.embedding))

    def fold(self, tensors: dict[str, Tensor]) -> Tensor:
        """Returns the mean of the members' mixtures from the tensors `original` and `0.embedding`."""
        return mixture(tensors["original"], self.members.average(tensors["0.embedding"]))

    def write(self, tensors: dict[str, Tensor], value: Tensor) -> None:
        """Makes the layer's template `value`, and all its embeddings the one that selects that."""
        tensors["original"][self.position] = value
        self.reset(tensors["0.embedding"])

    @torch.no_grad()
    def reset(self, embedding: Tensor) -> None:
        """Makes the embeddings `[K, T]` select the layer's own template."""
        embedding.zero_()
        embedding[:, self.position] = 1


def mixture(templates: Tensor, embedding: Tensor) -> Tensor:
    """Returns Σ_t e_t · template_t, of templates `[T, ...]` and an embedding `[T]`."""
    return (embedding @ templates.flatten(1)).view(templates.shape[1:])


def eligible(module: nn.Module) -> list[str]:
    """Names the tensors of `module` that a mixture can make."""
    return ["weight"] if isinstance(module, LAYERS) else []


def groups(weights: dict[str, tuple[nn.Module, Tensor]]) -> list[list[str]]:
    """
    Groups weights that can share templates: same kind of layer, shape, dtype and device.

    Args:
        weights (`dict[str, tuple[torch.nn.Module, torch.Tensor]]`):
            Layer and weight by key.

    Returns:
        `list[list[str]]`: The keys of each group, those of one weight included.
    """
    alike = defaultdict(list)
    for key, (module, weight) in weights.items():
        kind = next(kind for kind in LAYERS if isinstance(module, kind))
        alike[kind, weight.shape, weight.dtype, weight.device].append(key)
    return list(alike.values())


def share_templates(parametrized: list[Any]) -> nn.Parameter:
    """Stacks the weights of a group as its templates, makes all its layers hold those, and returns them."""
    templates = nn.Parameter(torch.stack([layer.original.detach() for layer in parametrized]))
    for layer in parametrized:
        layer.original = templates
    return templates


def sample_forward(module: nn.Module, rows: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The layer's call for rows `[B, ...]` dealt out over the members, batched."""
    return members_of(module).run_each(functools.partial(plain_forward(module), module), rows, *args, **kwargs)
