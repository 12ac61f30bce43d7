"""What a checkpoint holds beyond Trainer's own files: members, held gradients, averages and the cycle's position."""

from __future__ import annotations

import json
import os
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor


TENSORS_NAME = "late_phase.safetensors"
STATE_NAME = "late_phase_state.json"


def save_state(folder: str, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Writes tensors and state into a checkpoint folder, each whole or not at all, the state last."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, TENSORS_NAME)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, f"{path}.partial")
    os.replace(f"{path}.partial", path)
    path = os.path.join(folder, STATE_NAME)
    with open(f"{path}.partial", "w", encoding="utf-8") as file:
        json.dump(state, file, indent=2, sort_keys=True)
    os.replace(f"{path}.partial", path)


def has_state(folder: str) -> bool:
    """Whether a folder holds a late-phase state."""
    return os.path.isfile(os.path.join(folder, STATE_NAME))


def load_state(folder: str, targets: list[str], num_members: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """
    Reads a state and checks that it belongs to these members.

    Raises:
        `FileNotFoundError`: If the folder holds no late-phase state.
        `ValueError`: If it is damaged, or of another K or other targets.
    """
    if not has_state(folder):
        raise FileNotFoundError(
            f"{folder!r} holds no {STATE_NAME}: it was not written by LatePhaseTrainer, or not to its end. Choose "
            "another checkpoint; to start from its weights alone, load them into the model with from_pretrained()."
        )
    try:
        with open(os.path.join(folder, STATE_NAME), encoding="utf-8") as file:
            state = json.load(file)
        tensors = load_file(os.path.join(folder, TENSORS_NAME))
    except Exception as error:
        raise ValueError(f"The late-phase state in {folder!r} is damaged ({error}). Use another checkpoint.") from error
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
    missing = sorted(set(state["tensors"]) ^ set(tensors))
    if missing:
        raise ValueError(f"The late-phase state in {folder!r} is damaged: tensors {missing[:5]} do not match its list.")
    return tensors, state
