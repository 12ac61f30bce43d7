"""Gathers what a trainer must save to go on to the bit, and puts it back."""

from __future__ import annotations

import glob
import os
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from .checkpoint import load_state, save_state
from .late_phase import stack_of


class StateKeeper:
    """
    Saves and restores a trainer's late-phase state.

    A checkpoint's stock weights file holds the average. Beside it goes what that file does not tell: the members, the
    base weights below rank-1 factors, all current weights once an average over time is saved in their place, the
    gradients of an unfinished cycle, and the averages.

    Args:
        trainer (`LatePhaseMixin`):
            The trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._resumed: tuple[dict[str, Tensor], dict[str, Any]] | None = None

    @property
    def _identity(self) -> tuple[list[str], int]:
        late_phase = self._trainer.late_phase
        return [f"{target.family} {target.key}" for target in late_phase.targets], late_phase.num_members

    def save(self, folder: str) -> None:
        """Writes the state into a checkpoint folder; every process must call it, one writes."""
        trainer = self._trainer
        average = trainer.weight_average
        tensors = {f"model.{name}": value for name, value in self._unsaved_weights(folder).items()}
        tensors |= {f"held.{name}": value for name, value in trainer._held.items()}
        if average is not None:
            tensors |= {f"average.{name}": value for name, value in average.values.items()}
        if trainer._grad_norm is not None and trainer._monitor.gradient_norms is not None:
            # Logged again until the next cycle ends.
            tensors["log.gradient_norms"] = torch.stack([trainer._grad_norm, *trainer._monitor.gradient_norms])
        tensors = {name: stack_of(value) for name, value in tensors.items()}
        targets, num_members = self._identity
        state = {
            "targets": targets,
            "num_members": num_members,
            "tensors": sorted(tensors),
            "released": trainer.late_phase.released,
            "cycle": trainer.cycle.state_dict(),
            "steps_per_cycle": trainer.cycle.steps_per_cycle,
            "num_averaged": average.num_averaged if average is not None else 0,
            "last_averaged": trainer._last_averaged,
        }
        if trainer.args.should_save:
            save_state(folder, tensors, state)

    def read(self, folder: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Reads and checks a checkpoint's state; nothing is changed yet."""
        tensors, state = load_state(folder, *self._identity)
        for name, tensor in self._model_tensors().items():
            saved = tensors.get(f"model.{name}")
            if saved is not None and saved.shape != tensor.shape:
                raise ValueError(
                    f"The checkpoint {folder!r} holds {name!r} of shape {list(saved.shape)}, the model of shape "
                    f"{list(tensor.shape)}: it was written for another model."
                )
        return tensors, state

    def load(self, folder: str, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Puts weights and averages back; held gradients and the position wait for `resume`."""
        trainer = self._trainer
        if not trainer.is_fsdp_enabled:
            self._load_weights(folder, tensors)
        trainer.late_phase.members.released = state["released"]
        if trainer.weight_average is not None:
            parameters = dict(trainer.late_phase.model.named_parameters())
            trainer.weight_average.num_averaged = state["num_averaged"]
            trainer.weight_average.values = {
                name: _like(parameters[name], value) for name, value in _part(tensors, "average.").items()
            }
        self._resumed = (tensors, state)

    def resume(self) -> bool:
        """Puts back held gradients and the position in the cycle, if a checkpoint was loaded for this training."""
        if self._resumed is None:
            return False
        (tensors, state), self._resumed = self._resumed, None
        trainer = self._trainer
        if trainer.state.global_step == 0:
            return False
        if state["cycle"]["rounds"] and state["steps_per_cycle"] != trainer.cycle.steps_per_cycle:
            raise ValueError(
                f"The checkpoint lies inside a cycle of {state['steps_per_cycle']} steps, but with these arguments a "
                f"cycle takes {trainer.cycle.steps_per_cycle}. Resume with the same gradient_accumulation_steps, "
                "cycle_length and number of processes, or from a checkpoint at the end of a cycle."
            )
        parameters = dict(trainer.late_phase.model.named_parameters())
        trainer._held = {name: _like(parameters[name], value) for name, value in _part(tensors, "held.").items()}
        if "log.gradient_norms" in tensors:
            norms = tensors["log.gradient_norms"].to(trainer.args.device)
            trainer._grad_norm, trainer._monitor.gradient_norms = norms[0], (norms[1], norms[2])
        trainer.cycle.load_state_dict(state["cycle"])
        trainer._last_averaged = state["last_averaged"]
        return True

    @torch.no_grad()
    def load_average(self, folder: str | None) -> None:
        """Makes every member the averaged model of a folder that holds nothing else."""
        stock = _stock_weights(folder) if folder is not None else {}
        if not stock:
            raise FileNotFoundError(f"The best checkpoint {folder!r} is gone or holds no weights: nothing was loaded.")
        self._trainer.late_phase.load_averaged_state_dict(stock)
        if self._trainer.weight_average is not None:
            self._trainer.weight_average.num_averaged = 0

    @torch.no_grad()
    def _load_weights(self, folder: str, tensors: dict[str, Tensor]) -> None:
        stock = _stock_weights(folder)
        saved = _part(tensors, "model.")
        own = self._model_tensors()
        values = {}
        for name, tensor in own.items():
            value = saved.get(name, stock.get(self._trainer.late_phase.plain_name(name) or name))
            if value is None or value.shape != tensor.shape:
                raise ValueError(f"The checkpoint {folder!r} is damaged: {name!r} is missing or of another shape.")
            values[name] = value
        for name, tensor in own.items():
            tensor.copy_(values[name])

    def _model_tensors(self) -> dict[str, Tensor]:
        """The model's parameters and persistent buffers, each tied one once."""
        model = self._trainer.late_phase.model
        seen: set[int] = set()
        tensors = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if isinstance(tensor, Tensor) and id(tensor) not in seen:
                seen.add(id(tensor))
                tensors[name] = tensor
        return tensors

    def _unsaved_weights(self, folder: str) -> dict[str, Tensor]:
        late_phase, average = self._trainer.late_phase, self._trainer.weight_average
        if self._trainer.is_fsdp_enabled:
            return {}  # accelerate saves the sharded model with its members
        replaced = {target.key for target in late_phase.targets}
        stock = _stock_names(folder)
        averaged = average.values if average is not None and average.num_averaged else {}
        return {
            name: tensor.detach()
            for name, tensor in self._model_tensors().items()
            if (plain := late_phase.plain_name(name)) is None
            or plain in replaced
            or plain not in stock
            or name in averaged
        }


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """Moves a loaded tensor to where a parameter lives, sharded as it is."""
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _stock_files(folder: str) -> list[str]:
    return sorted(glob.glob(os.path.join(glob.escape(folder), "model*.safetensors")))


def _stock_names(folder: str) -> set[str]:
    names: set[str] = set()
    for path in _stock_files(folder):
        with safe_open(path, framework="pt") as file:
            names.update(file.keys())
    return names


def _stock_weights(folder: str) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for path in _stock_files(folder):
        weights |= load_file(path)
    return weights
