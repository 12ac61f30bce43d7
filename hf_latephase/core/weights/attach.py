"""Puts parametrizations on a model's tensors and takes them off, leaving the plain model as it was."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from . import batch_norm, hypernet, rank1
from .guard import guarded
from .members import Members, members_of, plain_forward
from .recurrent import RECURRENT_LAYERS, restore_cached_weights, use_effective_weights
from .recurrent import member_forward as recurrent_member_forward
from .recurrent import sample_forward as recurrent_sample_forward
from .targets import Target, family_module


PARAMETRIZATIONS = "parametrizations."


class Parametrizations(nn.ModuleDict):
    """The late-phase weights of one layer, which know no modes and so take one quickly: trainers set it each step."""

    def train(self, mode: bool = True) -> Self:
        """Sets `training` of all modules, without the checks that setting a module's attribute makes."""
        self.__dict__["training"] = mode
        for own in filter(None, self._modules.values()):
            own.__dict__["training"] = mode
            for parametrization in filter(None, own._modules.values()):
                if parametrization._modules:  # someone's own, put on top
                    parametrization.train(mode)
                else:
                    parametrization.__dict__["training"] = mode
        return self


@dataclass
class Attachment:
    """
    One late-phase weight on a model.

    Attributes:
        target (`Target`): The tensor.
        plain (`torch.Tensor`): The stock model's own parameter or buffer, which it gets back.
        order (`list[str]`): The names of the module's parameters and buffers before it was parametrized.
        stacks (`list[str]`): Which of the parametrized tensors are stacked `[K, ...]`, as named below `prefix`.
    """

    target: Target
    plain: Tensor
    order: list[str]
    stacks: list[str]

    @property
    def prefix(self) -> str:
        """Where the tensors of this weight live in the parametrized state dict."""
        module = f"{self.target.module}." if self.target.module else ""
        return f"{module}{PARAMETRIZATIONS}{self.target.tensor}."


def attach(model: nn.Module, targets: list[Target], members: Members, by_sample: bool) -> list[Attachment]:
    """Makes each target a late-phase weight; `by_sample` adds the layers' calls for dealt rows."""
    attachments: list[Attachment] = []
    orders: dict[str, list[str]] = {}
    templates = _template_groups(model, targets)
    groups = {key: group for group in templates for key in group}
    for target in targets:
        module = model.get_submodule(target.module)
        tensor = getattr(module, target.tensor)
        order = orders.setdefault(target.module, [*module._parameters, *module._buffers])
        family = family_module(target.family, module)
        if family is hypernet:
            group = groups[target.key]
            parametrization: Any = hypernet.Hypernet(members, group.index(target.key), len(group), tensor)
        else:
            parametrization = family.parametrization(members, tensor)
        # unsafe: our shapes are right by construction, and the check would evaluate every layer once.
        parametrize.register_parametrization(module, target.tensor, parametrization, unsafe=True)
        _read_directly(module, target.tensor)
        _load_plain_values(module)
        own = [f"0.{name}" for name, _ in parametrization.named_parameters()]
        attachments.append(Attachment(target, tensor, order, own or ["original"]))
        if hasattr(family, "member_forward"):
            type(module).forward = family.member_forward
            continue
        forward = plain_forward(module)
        if isinstance(module, RECURRENT_LAYERS):
            use_effective_weights(module)
            forward = type(module).forward = recurrent_member_forward(forward)  # type: ignore[method-assign]
        if family is rank1 and rank1.has_fused_call(module):
            forward = type(module).forward = rank1.fused_forward
        if by_sample:
            recurrent = isinstance(module, RECURRENT_LAYERS)
            _deal_rows(module, forward, recurrent_sample_forward if recurrent else family.sample_forward)
    for group in templates:
        layers = [attachment for attachment in attachments if attachment.target.key in group]
        shared = hypernet.share_templates([_parametrized(model, layer.target) for layer in layers])
        for position, layer in enumerate(layers):
            layer.plain.data = shared.data[position]  # a view: its own memory is free
    return attachments


def fold(model: nn.Module, attachments: list[Attachment], state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the averages of all targets by plain key, from a full state dict of the parametrized model."""
    tensors: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in state_dict.items():
        module, found, rest = key.partition(PARAMETRIZATIONS)
        if found:
            tensor, _, name = rest.partition(".")
            tensors[f"{module}{found}{tensor}."][name] = value
    by_module: dict[str, list[Attachment]] = defaultdict(list)
    for attachment in attachments:
        by_module[attachment.target.module].append(attachment)
    folded: dict[str, Tensor] = {}
    for own in by_module.values():
        layer = model.get_submodule(own[0].target.module)
        if isinstance(layer, _BatchNorm):
            stacks = {a.target.tensor: tensors[a.prefix]["original"].detach() for a in own}
            values = batch_norm.fold(layer, stacks)
            folded |= {a.target.key: values[a.target.tensor] for a in own}
        else:
            for a in own:
                folded[a.target.key] = _parametrized(model, a.target)[0].fold(tensors[a.prefix]).detach()
    return folded


@torch.no_grad()
def write(model: nn.Module, attachments: list[Attachment], values: dict[str, Tensor]) -> None:
    """Makes every member of each target the one value given under its plain key."""
    for attachment in attachments:
        if (value := values.get(attachment.target.key)) is not None:
            parametrized = _parametrized(model, attachment.target)
            tensors = parametrized.state_dict()
            parametrized[0].write(tensors, value.to(tensors["original"]))


@torch.no_grad()
def keep(model: nn.Module, attachments: list[Attachment]) -> dict[str, Tensor]:
    """Returns, by name and without copying, what brings the members back once they are detached; see `restore`."""
    kept: dict[str, Tensor] = {}
    for attachment in attachments:
        parametrized = _parametrized(model, attachment.target)
        # Templates cannot be had from the weights that they make.
        names = ["original", *attachment.stacks] if attachment.target.family == "hypernet" else attachment.stacks
        own = parametrized.state_dict()
        kept |= {attachment.prefix + name: own[name].detach() for name in dict.fromkeys(names)}
        measured = getattr(parametrized[0], "measured", None)
        if measured is not None and measured.shape == parametrized.original.shape:
            kept[f"{attachment.prefix}original"] = measured
    return kept


@torch.no_grad()
def restore(model: nn.Module, attachments: list[Attachment], kept: dict[str, Tensor]) -> None:
    """
    Puts members that were kept back on a model that holds their average.

    The weights below rank-1 factors are not kept. There each member's factors are taken relative to their average,
    which is in the weight.

    Raises:
        `ValueError`: If a weight has another shape than its members.
    """
    for attachment in attachments:
        tensors = _parametrized(model, attachment.target).state_dict()
        for name, tensor in tensors.items():
            value = kept.get(attachment.prefix + name)
            if value is None:
                continue
            if value.shape != tensor.shape:
                raise ValueError(
                    f"{attachment.target.key!r} has another shape than the members that were trained: the model was "
                    "changed since. Look at members before you change it."
                )
            if attachment.target.family == "rank1":
                average = value.double().mean(0)
                value = torch.where(average == 0, 1.0, value.double() / average)
            tensor.copy_(value)


def detach(model: nn.Module, attachments: list[Attachment], values: dict[str, Tensor], copied: bool = False) -> None:
    """
    Restores the plain modules in place, each target holding the value given under its plain key.

    The class, the order and the identity of parameters and buffers are those from before `attach`. `parametrize`'s own
    removal is not used: it deletes from a class that a deep copy of the model shares.

    Args:
        copied (`bool`, defaults to `False`):
            Whether `model` is a deep copy of the one that was attached to, and so has parameters of its own.
    """
    for module_name in dict.fromkeys(attachment.target.module for attachment in attachments):
        module = model.get_submodule(module_name)
        parametrizations: Any = module.parametrizations
        own = [a for a in attachments if a.target.module == module_name]
        originals = {a.target.tensor: parametrizations[a.target.tensor].original for a in own}
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
        for attachment in own:
            name, value = attachment.target.tensor, values[attachment.target.key]
            tensor = originals[name] if copied else attachment.plain
            if copied and attachment.target.family == "hypernet":  # the templates that layers share
                tensor = nn.Parameter(value, requires_grad=tensor.requires_grad)
            tensor.data = value
            tensor.grad = None
            if isinstance(tensor, nn.Parameter):
                module.register_parameter(name, tensor)
            else:
                module.register_buffer(name, tensor)
        held: Any
        for held in (module._parameters, module._buffers):
            for name in own[0].order:
                if name in held:
                    held[name] = held.pop(name)
        if isinstance(module, RECURRENT_LAYERS):
            restore_cached_weights(module)


def _read_directly(module: nn.Module, tensor_name: str) -> None:
    """
    Has the class that `parametrize` made for this one module read a late-phase weight without three modules' calls.

    Those take longer than a norm layer's kernel, of which there are many to a minibatch.
    """
    parametrizations: Any = module.parametrizations
    parametrizations.__class__ = Parametrizations
    parametrized: Any = getattr(type(module), tensor_name)

    def read(self: nn.Module) -> Any:
        own: Any = self._modules["parametrizations"]._modules[tensor_name]  # type: ignore[union-attr]
        if len(own._modules) > 1:  # someone has put another parametrization on top
            return parametrized.fget(self)
        original = own._parameters.get("original")
        parametrization = own._modules["0"]
        value = parametrization.forward(own._buffers["original"] if original is None else original)
        return guarded(value) if parametrization.members.at_rest else value

    setattr(type(module), tensor_name, property(read, parametrized.fset))


def _load_plain_values(module: nn.Module) -> None:
    """Has the class that `parametrize` made for this one module load the plain model's tensors, too."""
    plain_class: Any = type(module).__bases__[0]

    def load(self: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], *args: Any) -> None:
        lists: Any = self._modules["parametrizations"]._modules  # type: ignore[union-attr]
        for name, parametrized in lists.items():
            value = state_dict.pop(f"{prefix}{name}", None)
            if value is not None:
                tensors = {key: tensor.detach().clone() for key, tensor in parametrized.state_dict().items()}
                parametrized[0].write(tensors, value.to(tensors["original"]))
                state_dict |= {f"{prefix}{PARAMETRIZATIONS}{name}.{key}": t for key, t in tensors.items()}
        if isinstance(self, _BatchNorm):
            metadata = {**metadata, "version": plain_class._version}  # else it adds what it takes for missing
        plain_class._load_from_state_dict(self, state_dict, prefix, metadata, *args)

    type(module)._load_from_state_dict = load  # type: ignore[assignment, method-assign]


def _parametrized(model: nn.Module, target: Target) -> Any:
    parametrizations: Any = model.get_submodule(target.module).parametrizations
    return parametrizations[target.tensor]


def _template_groups(model: nn.Module, targets: list[Target]) -> list[list[str]]:
    """The keys of weights that share templates."""
    weights = {}
    for target in targets:
        if target.family == "hypernet":
            module = model.get_submodule(target.module)
            weights[target.key] = (module, getattr(module, target.tensor))
    return hypernet.groups(weights)


def _deal_rows(module: nn.Module, member_forward: Callable[..., Any], sample_forward: Callable[..., Any]) -> None:
    """Gives the class that `parametrize` made for this one module a call for dealt rows beside that for a member."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if members_of(self).mode != "sample":
            return member_forward(self, *args, **kwargs)
        return sample_forward(self, *args, **kwargs)

    type(module).forward = forward
