"""
Kills training runs at random times, lets them go on, and compares them with a run that nobody disturbed.

    python tests/training/killed_run.py --kills 20

Every run is a child process that gets SIGKILL. Nine of ten kills wait for the run to save, delete or upload, or for
its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from hf_latephase import LatePhaseConfig
from hf_latephase.training.checkpoints.staging import STAGING_NAME
from tiny import gpt2, trainer, use_hub


STEPS = 24
# Before transformers 5.0 plain Trainer, too, goes on in a later epoch with other rows: one epoch there.
ROWS = 36 if Version(transformers.__version__) >= Version("5") else 4 * STEPS
KINDS = ("save", "end", "delete", "save", "upload", "save", "any", "delete", "save", "upload")


class SlowHub:
    """Stands for the Hub: what is uploaded takes its time and is there when it is complete."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, folder_path: str, **kwargs: Any) -> Future:
        self._folder.mkdir(exist_ok=True)
        (self._folder / "uploading").touch()
        time.sleep(0.02)
        (self._folder / "uploading").unlink()
        done: Future = Future()
        done.set_result(None)
        return done


def train(folder: Path, save_total_limit: int | None = 2) -> None:
    """Trains from the last checkpoint in `folder`, if there is one, and writes down what came of it."""
    logging.set_verbosity_error()
    hub = SlowHub(folder / "hub")
    use_hub(setattr, hub)
    torch.manual_seed(0)
    config = LatePhaseConfig(num_members=3, weights=["rank1", "norm"], late_phase_start=5, swa_start=11)
    run = trainer(
        folder / "run", gpt2(dropout=0.1), config, rows=ROWS, max_steps=STEPS, save_strategy="steps", save_steps=1,
        save_total_limit=save_total_limit, logging_steps=2, train_sampling_strategy="random", max_grad_norm=1.0,
        eval_strategy="steps", eval_steps=4, lr_scheduler_type="linear", weight_decay=0.1, push_to_hub=True,
        hub_strategy="all_checkpoints", hub_always_push=True,
    )  # fmt: skip
    run.train(resume_from_checkpoint=get_last_checkpoint(folder / "run"))
    tensors = {f"model.{name}": t for name, t in run.late_phase.model.state_dict().items() if "lm_head" not in name}
    tensors |= {f"average.{name}": t for name, t in run.time_average.values.items()}
    for index, state in run.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": t for name, t in state.items()}
    save_file(tensors, folder / "final.safetensors")
    timed = ("runtime", "per_second")
    # The last log is about this call of train() only.
    logs = [{k: v for k, v in log.items() if not k.endswith(timed)} for log in run.state.log_history[:-1]]
    (folder / "logs.json").write_text(json.dumps([*logs, run.evaluate()["eval_loss"]]))


def start(folder: Path) -> int:
    """Trains in a child process, which starts with everything imported."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            train(folder)
            status = 0
        finally:
            sys.stdout.flush()
            os._exit(status)
    return child


def _any(folder: Path, pattern: str) -> bool:
    try:
        return any(folder.glob(pattern))
    except FileNotFoundError:  # a folder went away while it was read
        return False


def wait_for_moment(run: Path, dice: random.Random, kind: str, duration: float) -> None:
    """Returns at the moment to kill: any, while a step is saved, an old one deleted or a new one uploaded, the end."""
    if kind == "any":
        time.sleep(dice.uniform(0.05, duration))
        return
    signs = {
        "save": f"run/{STAGING_NAME}/checkpoint-*",
        "delete": f"run/{STAGING_NAME}/deleted-*",
        "upload": "hub/uploading",
        "end": f"run/checkpoint-{STEPS}",
    }
    step, deadline = dice.randrange(3, STEPS), time.monotonic() + 60
    while time.monotonic() < deadline:
        last = get_last_checkpoint(run) if run.is_dir() else None
        if last is not None and int(last.rpartition("-")[2]) >= step - 1 and _any(run.parent, signs[kind]):
            break
    # A save takes some hundredths of a second, of which every part should be hit.
    time.sleep(dice.uniform(0, 0.02) if kind == "save" else 0)


def check_whole(run: Path, reference: Path) -> int:
    """Checks every folder that looks like a checkpoint, file by file, and returns how many there are."""
    folders = [path for path in run.iterdir() if path.name.startswith("checkpoint")] if run.is_dir() else []
    for folder in folders:
        expected = reference / folder.name
        assert sorted(os.listdir(folder)) == sorted(os.listdir(expected)), folder
        for path in folder.iterdir():
            if path.suffix == ".safetensors":
                assert path.read_bytes() == (expected / path.name).read_bytes(), path
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix in (".pt", ".pth"):
                torch.load(path, weights_only=path.name != "rng_state.pth")
        AutoModelForCausalLM.from_pretrained(folder)
    return len(folders)


def is_identical(folder: Path, reference: Path) -> bool:
    """Whether weights, averages, optimizer, logs and evaluation are those of the reference, to the bit."""
    ours, theirs = (load_file(path / "final.safetensors") for path in (folder, reference))
    assert list(ours) == list(theirs) and any(name.startswith("optimizer.") for name in ours)
    return all(torch.equal(ours[name], theirs[name]) for name in ours) and (
        json.loads((folder / "logs.json").read_text()) == json.loads((reference / "logs.json").read_text())
    )


def kill_and_resume(folder: Path, kills: int, seed: int = 0) -> dict[str, int]:
    """Kills one run after another and lets each go on to its end."""
    dice = random.Random(seed)
    reference = folder / "reference"
    begin = time.monotonic()
    train(reference, save_total_limit=None)
    duration = time.monotonic() - begin
    figures = {"kills": 0, "while_saving": 0, "while_deleting": 0, "while_uploading": 0, "resumed": 0, "identical": 0}
    while figures["kills"] < kills:
        trial = folder / "trial"
        shutil.rmtree(trial, ignore_errors=True)
        child = start(trial)
        wait_for_moment(trial / "run", dice, KINDS[figures["kills"] % len(KINDS)], duration)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            continue  # it was quicker, so there was no kill
        staging = trial / "run" / STAGING_NAME
        left = os.listdir(staging) if staging.is_dir() else []
        figures["kills"] += 1
        figures["while_uploading"] += (trial / "hub" / "uploading").exists()
        figures["while_deleting"] += any(name.startswith("deleted") for name in left)
        figures["while_saving"] += any(name.startswith("checkpoint") for name in left)
        figures["resumed"] += check_whole(trial / "run", reference / "run") > 0
        _, status = os.waitpid(start(trial), 0)
        assert status == 0, "the resumed run failed"
        assert not staging.exists()
        figures["identical"] += is_identical(trial, reference)
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(kill_and_resume(Path(scratch), arguments.kills, arguments.seed)))
