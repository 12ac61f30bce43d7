"""What a checkpoint holds beyond Trainer's own files, and whether a folder is one that training can go on from."""

from __future__ import annotations

import glob
import json
import os
import zipfile
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from .staging import sort_checkpoints


logger = logging.get_logger(__name__)

TENSORS_NAME = "late_phase.safetensors"
STATE_NAME = "late_phase_state.json"

# Trainer goes on without those that are missing, and then not to the bit. FSDP's optimizer is a folder or .bin file,
# and several processes have a generators' file each.
_TRAINERS_FILES = {
    "optimizer": "the optimizer's state",
    "scheduler": "the learning-rate schedule's state",
    "rng_state": "the random generators' state",
    TRAINER_STATE_NAME: "the trainer's state",
}
# DeepSpeed's engine has a folder of its own for weights, optimizer and, if it steps it, schedule; this file names it.
_ENGINES_FILE = "latest"
_REMEDY = "Use another checkpoint, or start from its weights alone with from_pretrained()."


def save_state(folder: str, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Writes tensors and state into a checkpoint folder."""
    os.makedirs(folder, exist_ok=True)
    # Members may be views into one buffer, which safetensors refuses.
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, os.path.join(folder, TENSORS_NAME))
    with open(os.path.join(folder, STATE_NAME), "w", encoding="utf-8") as file:
        json.dump(state, file, indent=2, sort_keys=True)
        file.write("\n")


def has_state(folder: str) -> bool:
    """Whether a folder holds a late-phase state."""
    return os.path.isfile(os.path.join(folder, STATE_NAME))


def last_whole_checkpoint(run_dir: str) -> str:
    """
    Returns the last checkpoint of a run that lacks nothing, and warns of later ones that do.

    Raises:
        `ValueError`: If there is none.
    """
    folders = [folder for folder in sort_checkpoints(run_dir) if folder.rpartition("-")[2].isdecimal()]
    for folder in reversed(folders):
        missing = _missing(folder)
        if not missing:
            return folder
        logger.warning(f"Ignoring the checkpoint {folder}, which lacks {', '.join(missing)}.")
    broken = f", only broken ones: {[os.path.basename(folder) for folder in folders]}" if folders else ""
    raise ValueError(  # begins as Trainer's own message does
        f"No valid checkpoint found in output directory ({run_dir}){broken}. Train without resume_from_checkpoint, or "
        "name a checkpoint of another run."
    )


def check_trainers_files(folder: str) -> None:
    """
    Checks what Trainer itself will load, which it does after the weights are changed.

    Raises:
        `FileNotFoundError`: If a file is missing.
        `ValueError`: If one is damaged.
    """
    missing = _missing(folder)
    if missing:
        raise FileNotFoundError(f"The checkpoint {folder!r} lacks {', '.join(missing)}. {_REMEDY}")
    for path in glob.glob(os.path.join(glob.escape(folder), "**", "*.pt*"), recursive=True):
        if not zipfile.is_zipfile(path):  # the directory of these archives is at their end
            raise damaged(folder, f"{os.path.relpath(path, folder)} is cut off or no file of torch.save")
    if not isinstance(_read_json(folder, TRAINER_STATE_NAME).get("global_step"), int):
        raise damaged(folder, f"{TRAINER_STATE_NAME} names no global_step")


def load_state(folder: str, targets: list[str], num_members: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """
    Reads a state and checks that it belongs to these members.

    Raises:
        `FileNotFoundError`: If there is no such folder, or none with a late-phase state.
        `ValueError`: If it is damaged, or of another K or other targets.
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"There is no checkpoint {folder!r}. Its name must be that of a local folder.")
    if not has_state(folder):
        raise FileNotFoundError(
            f"{folder!r} holds no {STATE_NAME}: LatePhaseTrainer did not write it, or with save_only_model. Choose "
            "another checkpoint; to start from its weights alone, load them into the model with from_pretrained()."
        )
    state = _read_json(folder, STATE_NAME)
    absent = sorted({"num_members", "targets", "tensors", "cycle", "released"} - set(state))
    if absent:
        raise damaged(folder, f"{STATE_NAME} lacks {absent}")
    if state["num_members"] != num_members:
        raise ValueError(
            f"The checkpoint {folder!r} has num_members={state['num_members']}, the config {num_members}. Resume with "
            "the same LatePhaseConfig (the folder's late_phase_config.json)."
        )
    if state["targets"] != targets:
        different = sorted(set(state["targets"]) ^ set(targets))
        raise ValueError(
            f"The checkpoint {folder!r} replicates other weights than the config does; they differ in "
            f"{different[:5]}. Resume with the same LatePhaseConfig (the folder's late_phase_config.json)."
        )
    tensors = read_tensors(folder, TENSORS_NAME)
    missing = sorted(set(state["tensors"]) ^ set(tensors))
    if missing:
        raise damaged(folder, f"{TENSORS_NAME} and the list in {STATE_NAME} differ in {missing[:5]}")
    return tensors, state


def read_tensors(folder: str, name: str) -> dict[str, Tensor]:
    """Reads a safetensors file of a checkpoint."""
    try:
        return load_file(os.path.join(folder, name))
    except Exception as error:
        raise damaged(folder, f"{name} cannot be read, {error}") from error


def _missing_of_engine(folder: str, num_processes: int) -> list[str]:
    with open(os.path.join(folder, _ENGINES_FILE), encoding="utf-8") as file:
        name = file.read().strip()
    path = os.path.join(folder, name)
    files = os.listdir(path) if os.path.isdir(path) else []
    endings = ["_model_states.pt", *(f"zero_pp_rank_{i}_mp_rank_00_optim_states.pt" for i in range(num_processes))]
    return [f"{name}/*{ending}" for ending in endings if not any(file.endswith(ending) for file in files)]


def damaged(folder: str, cause: str) -> ValueError:
    """Returns the error that says that a checkpoint is damaged."""
    return ValueError(f"The checkpoint {folder!r} is damaged: {cause}. {_REMEDY}")


def _read_json(folder: str, name: str) -> dict[str, Any]:
    try:
        with open(os.path.join(folder, name), encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError) as error:
        raise damaged(folder, f"{name} cannot be read, {error}") from error
    return content if isinstance(content, dict) else {}


def is_of_engine(folder: str) -> bool:
    """Whether DeepSpeed's engine wrote a checkpoint's weights and optimizer."""
    return os.path.isfile(os.path.join(folder, _ENGINES_FILE))


def _missing(folder: str) -> list[str]:
    names = os.listdir(folder)
    by_engine = ("optimizer", "scheduler") if is_of_engine(folder) else ()
    missing = [
        f"{prefix} ({what})"
        for prefix, what in _TRAINERS_FILES.items()
        if prefix not in by_engine and not any(name.startswith(prefix) for name in names)
    ]
    if by_engine and STATE_NAME in names:
        missing += _missing_of_engine(folder, _read_json(folder, STATE_NAME).get("num_processes", 1))
    return missing + [name for name in (TENSORS_NAME, STATE_NAME) if name not in names]
