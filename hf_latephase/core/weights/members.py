"""Which member the late-phase weights of a model yield, and how members are averaged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten


T = TypeVar("T")


class Members:
    """
    The state that all late-phase weights of one model share.

    Modes: `"member"` (one member, the same for the whole pass), `"average"` (the mean of the members) and `"sample"`
    (the rows of the batch are dealt out over the members in contiguous blocks).

    Args:
        num_members (`int`):
            Number K of members.
    """

    def __init__(self, num_members: int) -> None:
        self.num_members = num_members
        self.mode = "member"
        # Before T0 only member 0 lives.
        self.released = False
        self.indices = torch.arange(num_members)
        # Between two steps, when user code may reach for a weight and must not write into a computed one.
        self.at_rest = False
        # The active member twice: a number for views, a tensor where a number would make a graph of its own for each.
        self.member: int | None = 0
        self.index = self.indices[:1]

    def activate(self, member: int | None) -> None:
        """Selects the member that later passes use; `None` selects the average. Launches no kernel."""
        self.at_rest = False
        if member is None:
            self.mode = "average"
        elif 0 <= member < self.num_members:
            self.mode = "member"
            self.member = member
            self.index = self.indices[member : member + 1]
        else:
            raise ValueError(f"There is no member {member}: num_members={self.num_members}, counted from 0.")

    def to(self, device: torch.device) -> None:
        """Moves the indices to the device of the weights, so that selecting never copies."""
        if self.indices.device != device:
            member = self.index.storage_offset()
            self.indices = self.indices.to(device)
            self.index = self.indices[member : member + 1]

    def select(self, stack: Tensor) -> Tensor:
        """Returns the value that the current mode asks for, `[...]`, of a stack `[K, ...]`."""
        if self.mode == "average":
            return self.average(stack)
        if self.mode == "sample":
            raise RuntimeError(
                "A late-phase weight was read outside its layer's own call while member_assignment='sample' deals out "
                "rows: this model computes with the bare weight. Use member_assignment='minibatch', or name the layer "
                "in exclude_modules."
            )
        if self.num_members == 1:
            return stack.squeeze(0)
        if self.yields_views:
            return stack.select(0, self.member)  # type: ignore[arg-type]
        return stack.index_select(0, self.index.to(stack.device)).squeeze(0)

    @property
    def yields_views(self) -> bool:
        """
        Whether a member's value is a view of its row, which launches no kernel and can be updated in place.

        Not in compiled and in batched calls (`run_each`), whose graph is one for all members.
        """
        return self.num_members == 1 or not (torch.compiler.is_compiling() or self.member is None)

    def average(self, stack: Tensor) -> Tensor:
        """Returns the mean of the members, exact to the bit where they are equal; before T0 the shared value."""
        first = stack[0]
        if not self.released or self.num_members == 1:
            return first
        if not stack.is_floating_point():  # minibatches tracked
            return stack.amax(0)
        return first + (stack - first).mean(0)

    def deal(self, rows: Tensor) -> Tensor:
        """
        Views `[B, ...]` as `[K, B / K, ...]`: row block k belongs to member k.

        Leading dimensions flattened row by row (`[B * T, ...]`) are dealt out correctly too.

        Raises:
            `ValueError`: If the rows cannot be shared out equally.
        """
        if rows.shape[0] % self.num_members:
            raise ValueError(
                f"member_assignment='sample' deals out the rows of each batch over num_members={self.num_members} "
                f"members, but a layer was called with {rows.shape[0]} rows. Choose a batch size that num_members "
                "divides, or member_assignment='minibatch'."
            )
        return torch.unflatten(rows, 0, (self.num_members, -1))

    def run_each(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """
        Calls a layer once for every member, on its block of the rows of all tensors given, as one batched call (vmap).

        Slower than a formula that knows the layer, and right for every layer: within the call a weight has its plain
        shape.
        """
        leaves, structure = tree_flatten((args, kwargs))
        dealt = [self.deal(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        dims = tuple(0 if isinstance(leaf, Tensor) else None for leaf in leaves)
        mode, active, index = self.mode, self.member, self.index

        def one(member: Tensor, *leaves: Any) -> Any:
            self.index = member.unsqueeze(0)
            args, kwargs = tree_unflatten(list(leaves), structure)
            return call(*args, **kwargs)

        self.mode, self.member = "member", None
        try:
            outputs = torch.vmap(one, in_dims=(0, *dims), randomness="different")(self.indices, *dealt)
        finally:
            self.mode, self.member, self.index = mode, active, index
        return tree_map(lambda output: output.flatten(0, 1), outputs)

    def dealt_view(self, stack: Tensor, rows: Tensor, dim: int | None = None) -> Tensor:
        """
        Views a stack `[K, n, ...]` so that it broadcasts over dealt rows `[K, B / K, ..., n, ...]`.

        Args:
            dim (`int`, *optional*):
                Where n lies in the rows. `None`: the last dimensions are the stack's.
        """
        sizes = stack.shape[1:]
        start = rows.ndim - len(sizes) if dim is None else dim
        shape = [1] * rows.ndim
        shape[0], shape[start : start + len(sizes)] = stack.shape[0], sizes
        return stack.view(shape)


def members_of(module: nn.Module) -> Members:
    """Returns the state that the late-phase weights of a module share (its own copy's, after a deep copy)."""
    members: Members = next(iter(own_parametrizations(module).values())).members
    return members


def own_parametrizations(module: nn.Module) -> dict[str, Any]:
    """Returns the late-phase weights of a module itself by tensor; past the lookups of its containers, for speed."""
    lists: Any = module._modules["parametrizations"]._modules  # type: ignore[union-attr]
    return {name: own._modules["0"] for name, own in lists.items()}


def plain_forward(module: nn.Module) -> Callable[..., Any]:
    """Returns the call of the class that a module had before `parametrize` gave it one of its own."""
    plain_class: Any = type(module).__bases__[0]
    forward: Callable[..., Any] = plain_class.forward
    return forward


class Fixed(Generic[T]):
    """
    A place for what a weight is while its layer's own call runs, however often the call reads it.

    No attribute of the parametrization itself: those of modules take long to set, and layers are called often.
    """

    value: T | None = None


def call_with(layer: nn.Module, forward: Callable[..., Any], values: dict[str, Tensor], args: Any, kwargs: Any) -> Any:
    """
    Calls a layer while some of its parametrized tensors are fixed values, however often the call reads them.

    Their parametrizations must yield the value of their attribute `fixed` if that is not `None`.
    """
    own = own_parametrizations(layer)
    try:
        for name, value in values.items():
            own[name].fixed.value = value
        return forward(layer, *args, **kwargs)
    finally:
        for name in values:
            own[name].fixed.value = None


def call_each(
    layer: nn.Module, member_forward: Callable[..., Tensor], members: Members, args: Any, kwargs: Any
) -> Tensor:
    """Calls a layer that computes in its own way once a member, on its block of the rows of all tensors given."""
    blocks, structure = tree_flatten((args, kwargs))
    dealt = [members.deal(block) if isinstance(block, Tensor) else [block] * members.num_members for block in blocks]
    outputs = []
    try:
        for member in range(members.num_members):
            members.activate(member)
            own_args, own_kwargs = tree_unflatten([block[member] for block in dealt], structure)
            outputs.append(member_forward(layer, *own_args, **own_kwargs))
    finally:
        members.mode = "sample"
    return torch.cat(outputs)
