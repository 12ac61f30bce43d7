"""Puts parametrizations on a model's tensors and takes them off, leaving the plain model as it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from .members import Members, members_of, plain_forward
from .recurrent import RECURRENT_LAYERS, restore_cached_weights, use_effective_weights
from .recurrent import sample_forward as recurrent_sample_forward
from .targets import FAMILY_MODULES, Target


@dataclass
class Attachment:
    """
    One late-phase weight on a model.

    Attributes:
        target (`Target`): The tensor.
        parameter_order (`list[str]`): The module's parameter names before it was parametrized.
    """

    target: Target
    parameter_order: list[str]

    @property
    def prefix(self) -> str:
        """Where the tensors of this weight live in the parametrized state dict."""
        module = f"{self.target.module}." if self.target.module else ""
        return f"{module}parametrizations.{self.target.tensor}."


def attach(model: nn.Module, targets: list[Target], members: Members, by_sample: bool) -> list[Attachment]:
    """Makes each target a late-phase weight; `by_sample` adds the layers' calls for dealt rows."""
    attachments: list[Attachment] = []
    for target in targets:
        module = model.get_submodule(target.module)
        tensor = getattr(module, target.tensor)
        order = list(module._parameters)
        if parametrize.is_parametrized(module):
            order = next(a.parameter_order for a in attachments if a.target.module == target.module)
        family = FAMILY_MODULES[target.family]
        # unsafe: our shapes are right by construction, and the check would evaluate every layer once.
        parametrize.register_parametrization(
            module, target.tensor, family.parametrization(members, tensor), unsafe=True
        )
        attachments.append(Attachment(target, order))
        if isinstance(module, RECURRENT_LAYERS):
            use_effective_weights(module)
        if by_sample:
            recurrent = isinstance(module, RECURRENT_LAYERS)
            _deal_rows(module, recurrent_sample_forward if recurrent else family.sample_forward)
    return attachments


def detach(model: nn.Module, attachments: list[Attachment], values: dict[str, Tensor]) -> None:
    """
    Restores the plain modules in place, each target holding the value given under its plain key.

    The class, the order and the identity of the parameters are those from before `attach`. `parametrize`'s own
    removal is not used: it deletes from a class that a deep copy of the model shares.
    """
    for module_name in dict.fromkeys(attachment.target.module for attachment in attachments):
        module = model.get_submodule(module_name)
        parametrizations: Any = module.parametrizations
        own = [a for a in attachments if a.target.module == module_name]
        originals = {a.target.tensor: parametrizations[a.target.tensor].original for a in own}
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
        for attachment in own:
            parameter = originals[attachment.target.tensor]
            parameter.data = values[attachment.target.key]
            parameter.grad = None
            module.register_parameter(attachment.target.tensor, parameter)
        module._parameters = {name: module._parameters[name] for name in own[0].parameter_order}
        if isinstance(module, RECURRENT_LAYERS):
            restore_cached_weights(module)


def _deal_rows(module: nn.Module, sample_forward: Any) -> None:
    """Gives the class that `parametrize` made for this one module a call for dealt rows."""
    forward_before = plain_forward(module)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if members_of(self).mode != "sample":
            return forward_before(self, *args, **kwargs)
        return sample_forward(self, *args, **kwargs)

    type(module).forward = forward  # type: ignore[method-assign]
