"""Checkpoint folders that appear when they are whole, and disappear at once."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


# Not taken for a checkpoint by transformers, and left out of uploads, which ignore names with an underscore in front.
STAGING_NAME = "_unfinished"


class Staging:
    """
    Has a trainer write its checkpoints next to where they belong, and moves them there when they are whole.

    Trainer writes straight into `checkpoint-N` and deletes in place, so that a killed process leaves a folder that is
    taken for a checkpoint and is none. Renaming a folder happens at once: whatever bears the name is whole.

    Attributes:
        is_writing (`bool`):
            Whether a checkpoint is being written, which does not lie where it belongs.
    """

    def __init__(self) -> None:
        self.is_writing = False

    @contextlib.contextmanager
    def checkpoint(
        self, run_dir: str, state: TrainerState, args: TrainingArguments, accelerator: Accelerator
    ) -> Iterator[str]:
        """
        Context in which the parent writes one checkpoint, its run folder being `staging_folder(run_dir)`.

        Then the checkpoint takes its place, and older ones go. Yields the place.

        Args:
            run_dir (`str`):
                The run's folder.
            state (`transformers.TrainerState`), args (`transformers.TrainingArguments`):
                The trainer's.
            accelerator (`accelerate.Accelerator`):
                Connects the processes.
        """
        name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        staged, folder = os.path.join(staging_folder(run_dir), name), os.path.join(run_dir, name)
        best = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}")
        if state.best_global_step and state.best_global_step != state.global_step and os.path.isdir(best):
            # The parent looks for it in the staging folder. It matters if the run's folder was moved.
            state.best_model_checkpoint = best
        clear(run_dir, args)
        accelerator.wait_for_everyone()
        self.is_writing = True
        try:
            yield folder
        finally:
            self.is_writing = False
        if state.best_model_checkpoint == staged:
            state.best_model_checkpoint = folder
            if args.should_save:
                state.save_to_json(os.path.join(staged, TRAINER_STATE_NAME))
        _publish_together(staged, folder, args, accelerator)
        if args.should_save:
            rotate(run_dir, args.save_total_limit, state.best_model_checkpoint)
        clear(run_dir, args)


def clear(run_dir: str, args: TrainingArguments) -> None:
    """Removes what a killed run left."""
    if args.local_process_index == 0:
        shutil.rmtree(staging_folder(run_dir), ignore_errors=True)


def _publish_together(staged: str, folder: str, args: TrainingArguments, accelerator: Accelerator) -> None:
    accelerator.wait_for_everyone()
    if args.should_save:
        publish(staged, folder)
    accelerator.wait_for_everyone()
    # Machines that share no disk and do not save keep their generators' state.
    if not args.should_save and args.local_process_index == 0 and os.path.isdir(staged):
        publish(staged, folder)
    accelerator.wait_for_everyone()


def sort_checkpoints(run_dir: str, use_mtime: bool = False) -> list[str]:
    """The checkpoints of a run, the oldest first."""
    folders = [path for path in Path(run_dir).glob("checkpoint-*") if path.is_dir() and path.name[11:].isdecimal()]
    folders.sort(key=lambda path: int(path.name[11:]))
    times = {path: path.stat().st_mtime for path in folders}
    if use_mtime and folders and max(times.values()) - min(times.values()) >= 1:  # else the disk keeps none
        folders.sort(key=times.__getitem__)
    return [str(path) for path in folders]


def staging_folder(run_dir: str) -> str:
    """Where checkpoints of `run_dir` lie until they are whole, on the same disk."""
    return os.path.join(run_dir, STAGING_NAME)


def publish(staged: str, folder: str) -> None:
    """Moves a finished folder to its place, on the disk before it is seen there."""
    for path, _, names in os.walk(staged):
        for name in names:
            with open(os.path.join(path, name), "rb+") as file:
                os.fsync(file.fileno())
        _flush_folder(path)
    if os.path.isdir(folder):
        discard(folder)
    os.rename(staged, folder)
    _flush_folder(os.path.dirname(folder))


def discard(folder: str) -> None:
    """Deletes a checkpoint; its name is gone before the first of its files is."""
    staging = staging_folder(os.path.dirname(folder))
    os.makedirs(staging, exist_ok=True)
    doomed = os.path.join(staging, f"deleted-{os.path.basename(folder)}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def rotate(run_dir: str, save_total_limit: int | None, best: str | None) -> None:
    """Discards the oldest checkpoints beyond the limit, but neither the last nor the best, as Trainer does."""
    if not save_total_limit or save_total_limit < 0:
        return
    folders = sort_checkpoints(run_dir, use_mtime=True)
    kept = {*folders[-1:], *([str(Path(best))] if best is not None else [])}
    surplus = len(folders) - max(save_total_limit, len(kept))
    for folder in [folder for folder in folders if folder not in kept][: max(surplus, 0)]:
        discard(folder)


def keep_only(run_dir: str, best: str) -> None:
    """Discards all checkpoints but the best."""
    for folder in sort_checkpoints(run_dir):
        if not os.path.samefile(folder, best):
            discard(folder)


def _flush_folder(folder: str) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
