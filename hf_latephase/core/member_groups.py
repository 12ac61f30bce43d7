"""The members' places in an optimizer whose groups were made on the stock model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .late_phase import LatePhase
from .optimizers import group_apart


# What schedulers keep for each group of parameters.
_BY_GROUP = ("base_lrs", "lr_lambdas", "_last_lr", "min_lrs")


class MemberGroups:
    """
    Puts members into an optimizer's groups, and takes them out again before the model is the stock model.

    A stack stands where its weight stood: it is the same parameter. Rank-1 factors and embeddings join their weight's
    group, or one beside it with the same settings if weights decay there. State that the optimizer has already goes to
    every member, and comes back as the members' mean.

    Args:
        optimizer (`torch.optim.Optimizer`):
            The optimizer.
        scheduler (`Any`, *optional*):
            A learning-rate schedule that was built for its groups.
        late_phase (`LatePhase`):
            The members, attached.
        apart (`bool`, defaults to `False`):
            Whether all late-phase weights get groups of their own.

    Raises:
        `ValueError`: If the optimizer does not hold a weight that has members; nothing is changed then.
    """

    def __init__(self, optimizer: Optimizer, scheduler: Any, late_phase: LatePhase, apart: bool = False) -> None:
        groups = optimizer.param_groups
        places = {id(p): index for index, group in enumerate(groups) for p in group["params"]}
        own = dict(late_phase.model.named_parameters(remove_duplicate=False))  # layers share templates
        added: dict[int, dict[str, nn.Parameter]] = {}
        self._stacks: list[nn.Parameter] = []
        self._templates: dict[nn.Parameter, list[nn.Parameter]] = {}
        for attachment in late_phase.attachments:
            plain = attachment.plain
            if not isinstance(plain, nn.Parameter):
                continue  # statistics
            if id(plain) not in places and plain.requires_grad:
                raise ValueError(
                    f"The optimizer does not hold {attachment.target.key!r}, so its members would never be trained. "
                    "Build it from all of model.parameters(), or leave the layer out by exclude_modules."
                )
            if attachment.stacks == ["original"]:
                self._stacks.append(plain)
                continue
            names = [attachment.prefix + name for name in attachment.stacks]
            # Factors of a frozen weight, which is in no group, learn as the first group does.
            added.setdefault(places.get(id(plain), 0), {}).update({name: own[name] for name in names})
            carrier = own.get(f"{attachment.prefix}original")
            if carrier is not None and carrier is not plain:
                self._templates.setdefault(carrier, []).append(plain)
        self._optimizer = optimizer
        self._schedules = list(_nested(scheduler))
        self._settings = [dict(group) for group in groups]
        for templates, plains in self._templates.items():
            self._share(templates, plains)
        sources = [place for place, factors in added.items() if self._add(groups[place], factors)]
        if apart:
            before = [*range(len(self._settings)), *sources]
            sources += [before[index] for index in group_apart(optimizer, late_phase.late_parameters().values())]
        self._num_added = len(sources)
        self._follow(sources)
        for stack in self._stacks:
            _change_state(optimizer, stack, stack.shape[1:], lambda value, k=stack.shape[0]: _repeated(value, k))

    @torch.no_grad()
    def leave(self) -> None:
        """Takes the members out; the groups are those from before, but for what others have added since."""
        groups, state = self._optimizer.param_groups, self._optimizer.state
        before = len(self._settings)
        members = {id(p) for group in groups[: before + self._num_added] for p in group["params"]}
        for group, settings in zip(groups, self._settings, strict=False):
            group["params"] = list(settings["params"])
            for name in ("weight_decay", "param_names"):
                if name in settings:
                    group[name] = settings[name]
        del groups[before : before + self._num_added]
        for scheduler in self._schedules:
            for name in _BY_GROUP:
                if len(values := vars(scheduler).get(name, [])) >= before + self._num_added:
                    del values[before : before + self._num_added]
        for stack in self._stacks:
            _change_state(self._optimizer, stack, stack.shape, lambda value: value.mean(0))
        for templates, plains in self._templates.items():
            for position, plain in enumerate(plains):
                if templates in state:
                    state[plain] = dict(state[templates])
                    _change_state(self._optimizer, plain, templates.shape, lambda value, i=position: value[i].clone())
        kept = {id(p) for group in groups for p in group["params"]}
        for parameter in [p for p in state if id(p) in members and id(p) not in kept]:
            del state[parameter]

    def _share(self, templates: nn.Parameter, plains: list[nn.Parameter]) -> None:
        """Puts the templates of a group of layers in the place of the first of its weights."""
        ids = {id(p) for p in plains}
        placed = False
        for group in self._optimizer.param_groups:
            params = []
            for parameter in group["params"]:
                if id(parameter) not in ids:
                    params.append(parameter)
                elif not placed:
                    params.append(templates)
                    placed = True
            group["params"] = params
        states = [self._optimizer.state.pop(plain, {}) for plain in plains]
        if all(states):
            shape = templates.shape[1:]
            self._optimizer.state[templates] = {
                name: torch.stack([s[name] for s in states]) if _is_like(name, value, shape) else value
                for name, value in states[0].items()
            }

    def _add(self, group: dict[str, Any], factors: dict[str, nn.Parameter]) -> bool:
        """Adds factors to the group of their weight, or beside it; returns whether it is one of their own."""
        named = "param_names" in group
        if not group.get("weight_decay"):
            group["params"] = [*group["params"], *factors.values()]
            if named:
                group["param_names"] = [*group["param_names"], *factors]
            return False
        settings = {name: value for name, value in group.items() if name not in ("params", "param_names")}
        params: Any = list(factors.items()) if named else list(factors.values())
        self._optimizer.add_param_group({**settings, "params": params, "weight_decay": 0.0})
        return True

    def _follow(self, sources: list[int]) -> None:
        """Gives a schedule, for each group that was added, what it has for the one that it was made from."""
        for scheduler in self._schedules:
            for name in _BY_GROUP:
                values = vars(scheduler).get(name)
                if isinstance(values, list) and len(values) == len(self._settings):
                    values.extend([values[source] for source in sources])


def _nested(scheduler: Any) -> Iterator[Any]:
    """A schedule and those that it is made of."""
    if scheduler is not None:
        scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate's wrapper
        yield scheduler
        for inner in getattr(scheduler, "_schedulers", []):
            yield from _nested(inner)


def _change_state(optimizer: Optimizer, parameter: nn.Parameter, shape: torch.Size, change: Any) -> None:
    """Changes what an optimizer keeps for each element of a parameter, known by its shape."""
    state = optimizer.state.get(parameter)
    if state:
        optimizer.state[parameter] = {n: change(v) if _is_like(n, v, shape) else v for n, v in state.items()}


def _is_like(name: str, value: Any, shape: torch.Size) -> bool:
    return isinstance(value, Tensor) and value.shape == shape and name != "step"


def _repeated(value: Tensor, num_members: int) -> Tensor:
    return value.repeat(num_members, *[1] * value.ndim)
