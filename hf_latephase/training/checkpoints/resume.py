"""Gathers what a trainer must save to go on to the bit, and puts it back."""

from __future__ import annotations

import glob
import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from ...core.sharding import gathered, named_parameters, sharded_like
from .checkpoint import check_trainers_files, damaged, load_state, read_tensors, save_state


@dataclass
class Saved:
    """What was read from a checkpoint and fits the trainer; `weights` are the model's tensors (not with FSDP)."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]
    weights: dict[str, Tensor]


class StateKeeper:
    """
    Saves and restores a trainer's late-phase state.

    A checkpoint's stock weights file holds the average. Beside it goes what that file does not hold to the bit: the
    members, the base weights below rank-1 factors, all current weights once an average over time is saved in their
    place, and those that transformers renames, splits or fuses on their way to the disk. Then the gradients of an
    unfinished cycle, the averages, and the losses not yet logged.

    Args:
        trainer (`LatePhaseMixin`):
            The trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._checked: tuple[str, Saved] | None = None
        self._resumed: Saved | None = None

    @property
    def _identity(self) -> tuple[list[str], int]:
        late_phase = self._trainer.late_phase
        return [f"{target.family} {target.key}" for target in late_phase.targets], late_phase.num_members

    def save(self, folder: str) -> None:
        """Writes the state into a checkpoint folder; every process must call it, one writes."""
        trainer = self._trainer
        average = trainer.weight_average
        tensors = {f"model.{name}": value for name, value in self._unsaved_weights(folder).items()}
        self._average_held()
        tensors |= {f"held.{name}": value for name, value in trainer._stepping.held.items()}
        if average is not None:
            tensors |= {f"average.{name}": value for name, value in average.values.items()}
        grad_norm, parts = trainer._stepping.grad_norm, trainer._monitor.gradient_norms
        if grad_norm is not None and parts is not None:
            # Logged again until the next cycle ends.
            tensors["log.gradient_norms"] = torch.stack([grad_norm, *parts])
        # Trainer forgets the losses since the last log.
        tensors["log.loss"] = trainer.accelerator.reduce(trainer._tr_loss.detach().clone(), "mean")
        if (losses := trainer._monitor.collected()) is not None:
            tensors["log.member_losses"] = losses
        tensors = {name: gathered(value) for name, value in tensors.items()}
        targets, num_members = self._identity
        state = {
            "targets": targets,
            "num_members": num_members,
            "tensors": sorted(tensors),
            "released": trainer.late_phase.released,
            "cycle": trainer.cycle.state_dict(),
            "steps_per_cycle": trainer.cycle.steps_per_cycle,
            "num_processes": trainer.cycle.num_processes,
            "num_averaged": average.num_averaged - average.num_left_out if average is not None else 0,
            "average_age": average.age if average is not None else 0,
            "last_averaged": trainer._average_schedule.last_step,
            "last_logged": trainer._globalstep_last_logged,
        }
        if trainer.args.should_save:
            save_state(folder, tensors, state)

    def _average_held(self) -> None:
        """
        Averages the held gradients over processes, which inside a cycle have kept their own.

        The running processes go on with the average too, so that they and a resumed run are the same to the bit.
        """
        if self._trainer.cycle.num_processes > 1:
            for gradient in self._trainer._stepping.held.values():
                if not isinstance(gradient, DTensor):
                    gradient.copy_(self._trainer.accelerator.reduce(gradient, "mean"))

    def check(self, folder: str) -> None:
        """Refuses a checkpoint that training cannot go on from, before anything is changed."""
        self._checked = (folder, self._read(folder, to_train=True))

    def read(self, folder: str, to_train: bool = True) -> Saved:
        """Reads a checkpoint, unless `check` just did; nothing is changed yet."""
        checked, self._checked = self._checked, None
        return checked[1] if checked is not None and checked[0] == folder else self._read(folder, to_train)

    def _read(self, folder: str, to_train: bool) -> Saved:
        tensors, state = load_state(folder, *self._identity)
        own = self._model_tensors()
        for kind in ("model.", "held.", "average."):
            for name, value in _part(tensors, kind).items():
                if name not in own or value.shape != own[name].shape:
                    expected = list(own[name].shape) if name in own else "none of that name"
                    raise ValueError(
                        f"The checkpoint {folder!r} holds {name!r} of shape {list(value.shape)}, the model "
                        f"{expected}: it was written for another model. Resume with the model that it was written for."
                    )
        if to_train:
            check_trainers_files(folder)
            self._check_cycle(folder, state)
        weights = {} if self._trainer.is_fsdp_enabled else self._read_weights(folder, _part(tensors, "model."))
        return Saved(tensors, state, weights)

    def _check_cycle(self, folder: str, state: dict[str, Any]) -> None:
        cycle = self._trainer._stepping.new_cycle()
        saved, own = (state["steps_per_cycle"], state["num_processes"]), (cycle.steps_per_cycle, cycle.num_processes)
        if state["cycle"]["rounds"] and saved != own:
            raise ValueError(
                f"The checkpoint {folder!r} lies inside a cycle of {saved[0]} steps on {saved[1]} processes, but with "
                f"these arguments a cycle takes {own[0]} steps on {own[1]}. Resume with the same "
                "gradient_accumulation_steps, cycle_length and number of processes, or from a checkpoint at the end "
                "of a cycle."
            )

    @torch.no_grad()
    def load(self, saved: Saved) -> None:
        """Puts weights and averages back; held gradients and the position wait for `resume`."""
        trainer, state = self._trainer, saved.state
        if not trainer.is_fsdp_enabled:
            for name, tensor in self._model_tensors().items():
                tensor.copy_(saved.weights[name])
        trainer.late_phase.members.released = state["released"]
        if trainer.weight_average is not None:
            own = trainer.weight_average.tensors()
            trainer.weight_average.load(
                {name: sharded_like(own[name], value) for name, value in _part(saved.tensors, "average.").items()},
                state["num_averaged"],
                # Older checkpoints: their average began with the first step.
                state.get("average_age", max(state["last_averaged"] - 1, 0)),
            )
        self._resumed = saved

    def resume(self) -> bool:
        """Puts back held gradients and the position in the cycle, if a checkpoint was loaded for this training."""
        if self._resumed is None:
            return False
        # Kept until training ends: `auto_find_batch_size` may begin anew.
        trainer, tensors, state = self._trainer, self._resumed.tensors, self._resumed.state
        if trainer.state.global_step == 0:
            return False
        parameters = named_parameters(trainer.late_phase.model)
        held = _part(tensors, "held.")
        trainer._stepping.held = {name: sharded_like(parameters[name], value).clone() for name, value in held.items()}
        if "log.gradient_norms" in tensors:
            norms = tensors["log.gradient_norms"].to(trainer.args.device)
            trainer._stepping.grad_norm, trainer._monitor.gradient_norms = norms[0], (norms[1], norms[2])
        trainer.cycle.load_state_dict(state["cycle"])
        trainer._average_schedule.last_step = state["last_averaged"]
        trainer._globalstep_last_logged = state["last_logged"]
        trainer._tr_loss = tensors["log.loss"].to(trainer.args.device)
        # The mean over this call of train(), which Trainer returns, leaves earlier steps out.
        trainer._total_loss_scalar = -trainer._tr_loss.item()
        trainer._monitor.restore(tensors.get("log.member_losses"))
        return True

    def forget(self) -> None:
        """Drops what a checkpoint held: later training does not go on from it."""
        self._checked = self._resumed = None

    @torch.no_grad()
    def load_average(self, folder: str | None) -> None:
        """Makes every member the averaged model of a folder that holds nothing else."""
        stock = _stock_weights(folder) if folder is not None else {}
        if not stock:
            raise FileNotFoundError(f"The best checkpoint {folder!r} is gone or holds no weights: nothing was loaded.")
        late_phase = self._trainer.late_phase
        if all(set(names) & set(stock) for names in self._aliases().values() if names):
            late_phase.load_averaged_state_dict(stock)
        elif hasattr(type(late_phase.model), "from_pretrained"):  # renamed, split or fused on the disk
            loaded = type(late_phase.model).from_pretrained(folder, dtype="auto")  # type: ignore[operator]
            late_phase.load_averaged_state_dict(loaded.state_dict())
        else:
            self._trainer._load_as_parent(folder)
        if self._trainer.weight_average is not None:
            self._trainer.weight_average.num_averaged = 0

    def _read_weights(self, folder: str, saved: dict[str, Tensor]) -> dict[str, Tensor]:
        stock, aliases = _stock_weights(folder), self._aliases()
        weights = {}
        for name, tensor in self._model_tensors().items():
            value = saved.get(name, stock.get(_first(aliases[name], stock)))
            if value is None or value.shape != tensor.shape:
                raise damaged(folder, f"no weights file holds {name!r} of shape {list(tensor.shape)}")
            weights[name] = value
        return weights

    def _model_tensors(self) -> dict[str, Tensor]:
        """The model's parameters and persistent buffers, each tied one once, by the first of its names."""
        return {names[0]: tensor for names, tensor in self._tied()}

    def _aliases(self) -> dict[str, list[str]]:
        """The plain names that each of the model's tensors may have in the stock file."""
        plain_name = self._trainer.late_phase.plain_name
        return {names[0]: [plain for name in names if (plain := plain_name(name))] for names, _ in self._tied()}

    def _tied(self) -> list[tuple[list[str], Tensor]]:
        # A PEFT checkpoint leaves out the frozen model below the adapter, and so do we.
        adapter_only = hasattr(self._trainer.late_phase.model, "peft_config")
        tied: dict[int, tuple[list[str], Tensor]] = {}
        for name, tensor in self._trainer.late_phase.model.state_dict(keep_vars=True).items():
            frozen = isinstance(tensor, Parameter) and not tensor.requires_grad
            if isinstance(tensor, Tensor) and not (adapter_only and frozen):
                tied.setdefault(id(tensor), ([], tensor))[0].append(name)
        return list(tied.values())

    def _unsaved_weights(self, folder: str) -> dict[str, Tensor]:
        if self._trainer.is_fsdp_enabled:
            return {}  # accelerate saves the sharded model with its members
        if not self._trainer.args.should_save:
            return {}
        paths: dict[str, str] = {}
        for path in _stock_files(folder):
            with safe_open(path, framework="pt") as file:
                paths |= dict.fromkeys(file.keys(), path)
        unsaved, aliases = {}, self._aliases()
        for name, tensor in self._model_tensors().items():
            key = _first(aliases[name], paths)
            # Compared, since a key may stand for something else on the disk than in the model.
            if not key or not _same_bits(_stock_tensor(paths[key], key), tensor):
                unsaved[name] = tensor.detach()
        return unsaved


def _first(names: list[str], known: Collection[str]) -> str:
    """Returns the first name that is known, the empty one if none is."""
    return next((name for name in names if name in known), "")


def _same_bits(left: Tensor, right: Tensor) -> bool:
    left, right = left.detach(), right.detach().to(left.device)
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    # As bytes: -0.0 and 0.0 are equal, but not the same.
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _stock_files(folder: str) -> list[str]:
    return sorted(glob.glob(os.path.join(glob.escape(folder), "model*.safetensors")))


def _stock_tensor(path: str, key: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(key)


def _stock_weights(folder: str) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for path in _stock_files(folder):
        weights |= read_tensors(folder, os.path.basename(path))
    return weights
