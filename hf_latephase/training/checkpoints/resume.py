"""Saves what training needs to go on to the bit, and puts it back."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import Parameter

from ...core.averaging import TimeAverage
from ...core.cycle import Cycle
from ...core.late_phase import LatePhase
from ...core.sharding import gathered, named_parameters, sharded_like
from .checkpoint import check_trainers_files, damaged, is_of_engine, load_state, read_tensors, save_state


@dataclass
class Position:
    """
    Where training stands between two of its steps, beyond what Trainer's own files say.

    Args:
        cycle (`dict[str, int]`):
            The position inside the cycle.
        held (`dict[str, torch.Tensor]`):
            The gradients of an unfinished cycle, by parameter name.
        gradient_norms (`tuple[torch.Tensor, torch.Tensor, torch.Tensor]`, *optional*):
            Of all weights, of the base and of the members; they are logged again until the next cycle ends.
        losses (`torch.Tensor`):
            The sum of the losses since the last log, which Trainer forgets, the mean over the processes.
        member_losses (`torch.Tensor`, *optional*):
            The members' `[2, K]`: sums and counts.
        last_logged (`int`), last_averaged (`int`):
            The steps of the last log, and of the last sample of the average over time.
    """

    cycle: dict[str, int]
    held: dict[str, Tensor]
    gradient_norms: tuple[Tensor, Tensor, Tensor] | None
    losses: Tensor
    member_losses: Tensor | None
    last_logged: int
    last_averaged: int


@dataclass
class Saved:
    """What was read from a checkpoint and fits the model; `weights` are the model's tensors (not if sharded)."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]
    weights: dict[str, Tensor]


class StateKeeper:
    """
    Saves and restores late-phase state.

    A checkpoint's stock weights file holds the average. Beside it goes what that file does not hold to the bit: the
    members, the base weights below rank-1 factors, all current weights once an average over time is saved in their
    place, and those that transformers renames, splits or fuses on their way to the disk. Then the position inside the
    cycle, and the average over time.

    Args:
        late_phase (`LatePhase`):
            The members.
        is_sharded (`bool`):
            Whether FSDP or DeepSpeed saves and loads the weights, members included.
        has_engine (`bool`, defaults to `False`):
            Whether that is DeepSpeed.
    """

    def __init__(self, late_phase: LatePhase, is_sharded: bool, has_engine: bool = False) -> None:
        self._late_phase = late_phase
        self._is_sharded = is_sharded
        self._has_engine = has_engine
        self._checked: tuple[str, Saved] | None = None
        self._resumed: Saved | None = None

    @property
    def _identity(self) -> tuple[list[str], int]:
        late_phase = self._late_phase
        return [f"{target.family} {target.key}" for target in late_phase.targets], late_phase.num_members

    def save(self, folder: str, position: Position, average: TimeAverage | None, cycle: Cycle, writes: bool) -> None:
        """
        Writes the state into a checkpoint folder; every process must call it.

        Args:
            folder (`str`):
                The folder, in which the stock weights lie already.
            position (`Position`), average (`TimeAverage`, *optional*):
                What is saved beside the weights.
            cycle (`Cycle`):
                Says with how many steps and processes a position inside it fits.
            writes (`bool`):
                Whether this process is the one that writes.
        """
        tensors = {f"model.{name}": value for name, value in (self._unsaved_weights(folder) if writes else {}).items()}
        tensors |= {f"held.{name}": value for name, value in position.held.items()}
        if average is not None:
            tensors |= {f"average.{name}": value for name, value in average.values.items()}
        if position.gradient_norms is not None:
            tensors["log.gradient_norms"] = torch.stack(position.gradient_norms)
        tensors["log.loss"] = position.losses
        if position.member_losses is not None:
            tensors["log.member_losses"] = position.member_losses
        tensors = {name: gathered(value) for name, value in tensors.items()}
        targets, num_members = self._identity
        state = {
            "targets": targets,
            "num_members": num_members,
            "tensors": sorted(tensors),
            "released": self._late_phase.released,
            "cycle": position.cycle,
            "steps_per_cycle": cycle.steps_per_cycle,
            "num_processes": cycle.num_processes,
            "num_averaged": average.num_averaged - average.num_left_out if average is not None else 0,
            "average_age": average.age if average is not None else 0,
            "last_averaged": position.last_averaged,
            "last_logged": position.last_logged,
        }
        if writes:
            save_state(folder, tensors, state)

    def check(self, folder: str, cycle: Cycle) -> None:
        """Refuses a checkpoint from which training cannot go on in such a cycle, before anything is changed."""
        self._checked = (folder, self._read(folder, cycle))

    def read(self, folder: str, cycle: Cycle | None = None) -> Saved:
        """Reads a checkpoint, unless `check` just did, to train on in such a cycle, or not to; nothing is changed."""
        checked, self._checked = self._checked, None
        return checked[1] if checked is not None and checked[0] == folder else self._read(folder, cycle)

    def _read(self, folder: str, cycle: Cycle | None) -> Saved:
        tensors, state = load_state(folder, *self._identity)
        if is_of_engine(folder) != self._has_engine:
            written, now = ("with", "without") if is_of_engine(folder) else ("without", "with")
            raise ValueError(
                f"The checkpoint {folder!r} was written {written} DeepSpeed, this run is {now} it, and cannot read "
                f"those files. Resume {written} DeepSpeed, or start from the averaged weights with from_pretrained()."
            )
        own = self._model_tensors()
        for kind in ("model.", "held.", "average."):
            for name, value in _part(tensors, kind).items():
                if name not in own or value.shape != own[name].shape:
                    expected = list(own[name].shape) if name in own else "none of that name"
                    raise ValueError(
                        f"The checkpoint {folder!r} holds {name!r} of shape {list(value.shape)}, the model "
                        f"{expected}: it was written for another model. Resume with the model that it was written for."
                    )
        if cycle is not None:
            check_trainers_files(folder)
            _check_cycle(folder, state, cycle)
            if self._has_engine and state["num_processes"] != cycle.num_processes:
                raise ValueError(
                    f"The checkpoint {folder!r} holds DeepSpeed's parts of {state['num_processes']} processes, which "
                    f"{cycle.num_processes} cannot load. Resume on as many."
                )
        weights = {} if self._is_sharded else self._read_weights(folder, _part(tensors, "model."))
        return Saved(tensors, state, weights)

    @torch.no_grad()
    def load(self, saved: Saved, average: TimeAverage | None) -> None:
        """Puts weights and average back; the position waits for `resume`."""
        state = saved.state
        if not self._is_sharded:
            for name, tensor in self._model_tensors().items():
                tensor.copy_(saved.weights[name])
        self._late_phase.members.released = state["released"]
        if average is not None:
            own = average.tensors()
            average.load(
                {name: sharded_like(own[name], value) for name, value in _part(saved.tensors, "average.").items()},
                state["num_averaged"],
                # Older checkpoints: their average began with the first step.
                state.get("average_age", max(state["last_averaged"] - 1, 0)),
            )
        self._resumed = saved

    def resume(self, step: int, device: torch.device) -> Position | None:
        """
        Returns the position in training, if a checkpoint was loaded for one that begins at `step`.

        Kept until training ends: `auto_find_batch_size` may begin anew, at step 0 or again at the checkpoint's.
        """
        if self._resumed is None or step == 0:
            return None
        tensors, state = self._resumed.tensors, self._resumed.state
        parameters = named_parameters(self._late_phase.model)
        held = _part(tensors, "held.")
        norms = tensors.get("log.gradient_norms")
        return Position(
            cycle=state["cycle"],
            held={name: sharded_like(parameters[name], value).clone() for name, value in held.items()},
            gradient_norms=None if norms is None else norms.to(device).unbind(),  # type: ignore[arg-type]
            losses=tensors["log.loss"].to(device),
            member_losses=tensors.get("log.member_losses"),
            last_logged=state["last_logged"],
            last_averaged=state["last_averaged"],
        )

    def forget(self) -> None:
        """Drops what a checkpoint held: later training does not go on from it."""
        self._checked = self._resumed = None

    @torch.no_grad()
    def load_average(self, folder: str | None, load_otherwise: Callable[[str], None]) -> None:
        """
        Makes every member the averaged model of a folder that holds nothing else.

        Args:
            folder (`str`, *optional*):
                The folder.
            load_otherwise (`Callable[[str], None]`):
                Loads a folder whose files are not transformers' own into the model.

        Raises:
            `FileNotFoundError`: If there are no weights.
        """
        stock = _stock_weights(folder) if folder is not None else {}
        if not stock:
            raise FileNotFoundError(f"The best checkpoint {folder!r} is gone or holds no weights: nothing was loaded.")
        late_phase = self._late_phase
        if all(set(names) & set(stock) for names in self._aliases().values() if names):
            late_phase.load_averaged_state_dict(stock)
        elif hasattr(type(late_phase.model), "from_pretrained"):  # renamed, split or fused on the disk
            loaded = type(late_phase.model).from_pretrained(folder, dtype="auto")  # type: ignore[attr-defined]
            late_phase.load_averaged_state_dict(loaded.state_dict())
        else:
            assert folder is not None  # it has files
            load_otherwise(folder)

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
        plain_name = self._late_phase.plain_name
        return {names[0]: [plain for name in names if (plain := plain_name(name))] for names, _ in self._tied()}

    def _tied(self) -> list[tuple[list[str], Tensor]]:
        # A PEFT checkpoint leaves out the frozen model below the adapter, and so do we.
        adapter_only = hasattr(self._late_phase.model, "peft_config")
        tied: dict[int, tuple[list[str], Tensor]] = {}
        for name, tensor in self._late_phase.model.state_dict(keep_vars=True).items():
            frozen = isinstance(tensor, Parameter) and not tensor.requires_grad
            if isinstance(tensor, Tensor) and not (adapter_only and frozen):
                tied.setdefault(id(tensor), ([], tensor))[0].append(name)
        return list(tied.values())

    def _unsaved_weights(self, folder: str) -> dict[str, Tensor]:
        if self._is_sharded:
            return {}  # accelerate saves the sharded model with its members
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


def _check_cycle(folder: str, state: dict[str, Any], cycle: Cycle) -> None:
    saved, own = (state["steps_per_cycle"], state["num_processes"]), (cycle.steps_per_cycle, cycle.num_processes)
    if state["cycle"]["rounds"] and saved != own:
        raise ValueError(
            f"The checkpoint {folder!r} lies inside a cycle of {saved[0]} steps on {saved[1]} processes, but with "
            f"these arguments a cycle takes {own[0]} steps on {own[1]}. Resume with the same "
            "gradient_accumulation_steps, cycle_length and number of processes, or from a checkpoint at the end "
            "of a cycle."
        )


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
