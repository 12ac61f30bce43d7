"""Has a model save the stock model that its members average to, while they are attached."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .weights import PARAMETRIZATIONS


if TYPE_CHECKING:
    from .late_phase import LatePhase


METHOD = "save_pretrained"


class StockSaving:
    """
    Stands in for the `save_pretrained` of a model, or of a model inside it, while members are attached.

    Whatever calls it (`push_to_hub`, a callback, a deep copy) writes the averaged stock model: with the keys of the
    attached one, `from_pretrained` would leave the replicated weights at random values.

    Args:
        late_phase (`LatePhase`):
            The members.
        name (`str`):
            Name of the module that saves, empty for the whole model.
    """

    def __init__(self, late_phase: LatePhase, name: str) -> None:
        self._late_phase = late_phase
        self._name = name
        self.before = vars(late_phase.model.get_submodule(name)).get(METHOD)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Saves as the module's own method does, with the averaged weights."""
        module = self._late_phase.model.get_submodule(self._name)
        save: Callable[..., Any] = self.before or getattr(type(module), METHOD).__get__(module)
        parameters = inspect.signature(save).parameters
        given = dict(zip(parameters, args, strict=False)) | kwargs
        state_dict = given.get("state_dict")
        if state_dict is not None and not any(PARAMETRIZATIONS in key for key in state_dict):
            return save(*args, **kwargs)  # the averaged weights already
        with self._late_phase.view():
            # PEFT takes the argument among others that it does not name.
            if "state_dict" in parameters or hasattr(module, "peft_config"):
                return save(**given | {"state_dict": self._averaged(state_dict)})
            return getattr(self._late_phase.averaged_model().get_submodule(self._name), METHOD)(*args, **kwargs)

    def _averaged(self, state_dict: dict[str, Tensor] | None) -> dict[str, Tensor]:
        prefix = f"{self._name}." if self._name else ""
        source = None if state_dict is None else {f"{prefix}{key}": value for key, value in state_dict.items()}
        averaged = self._late_phase.averaged_state_dict(source)
        return {key.removeprefix(prefix): value for key, value in averaged.items() if key.startswith(prefix)}


def save_stock_models(late_phase: LatePhase) -> None:
    """Replaces the `save_pretrained` of all modules that have one."""
    for name, module in late_phase.model.named_modules():
        if callable(getattr(module, METHOD, None)):
            object.__setattr__(module, METHOD, StockSaving(late_phase, name))


def save_as_before(model: nn.Module) -> None:
    """Gives all modules back their own `save_pretrained`."""
    for module in model.modules():
        saving = vars(module).get(METHOD)
        if isinstance(saving, StockSaving):
            del vars(module)[METHOD]
            if saving.before is not None:
                object.__setattr__(module, METHOD, saving.before)
