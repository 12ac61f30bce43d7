"""
Every private name of Trainer and accelerate that the package overrides or reads, with what would break without it.

A release that renames one fails here, with the name, before anything goes wrong in silence.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import transformers
from transformers import Trainer

import hf_latephase
from hf_latephase import LatePhaseConfig, LatePhaseTrainer
from hf_latephase.compat import LOOP_HAS_HOOKS
from tiny import gpt2, trainer, use_hub


# To add one: its name here, and a run below that comes by it.
OVERRIDDEN = {
    "_inner_training_loop": "the members would not be there when the optimizer is prepared",
    "_run_epoch": "a run that was killed after its last save would take a step too many",
    "_clip_grad_norm": "gradients would be clipped inside a cycle, each member's scaled by another norm",
    "_get_grad_norm": "without clipping no norm would be logged and members' gradients stay unweighed",
    "_get_output_dir": "checkpoints would be written in place, where a killed run leaves half of one",
    "_save_checkpoint": "as above; and the upload would come before the checkpoint is whole",
    "_save_optimizer_and_scheduler": "the members would be missing from checkpoints",
    "_save": "the members' parametrizations would be saved in place of a stock model",
    "_load_from_checkpoint": "a resumed run would begin with fresh members",
    "_load_optimizer_and_scheduler": "a run resumed with DeepSpeed would begin with fresh members",
    "_load_best_model": "the best model's members would not be loaded",
    "_finalize_training": "checkpoints that save_total_limit=1 leaves over would be deleted in place",
    "_push_from_checkpoint": "what is uploaded while training would lack the card and the model's code",
}  # fmt: skip
CALLED = {
    "_finish_current_push": "an upload that runs would lose the files it reads",
    "_prepare_inputs": "BatchNorm statistics would be measured on the wrong device",
}
SET = {
    "_tr_loss": "a resumed run would forget the losses since the last log",
    "_total_loss_scalar": "train_loss of a resumed run would count those losses twice",
    "_globalstep_last_logged": "a resumed run would average them over too few steps",
    "_train_batch_size": "member_assignment='sample' would be checked against the wrong batch size",
    "_loss_shifts_labels": "compute_loss_func would be told a number of targets that its loss does not have",
    "_created_lr_scheduler": "the schedule of a second train() would be that of the first",
}
ACCELERATES = {"_set_sync_gradients": "the optimizer would step, and DDP reduce, inside of a cycle"}
# What only compat.py touches, for older releases.
OLDER = {"_maybe_log_save_evaluate", "_sorted_checkpoints"}
# Absent from older releases, where compat.py stands in.
NEWER = {"_run_epoch", "_clip_grad_norm", "_get_grad_norm", "_finalize_training", "_tr_loss"}


def private_names(*modules: Any) -> set[str]:
    """The private attributes and methods that source files define or use of themselves."""
    text = "\n".join(Path(module.__file__).read_text(encoding="utf-8") for module in modules)
    return set(re.findall(r"(?:\bself\.|\bdef )(_[a-z]\w+)", text))


def used_names() -> Iterator[str]:
    for path in Path(hf_latephase.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                yield node.attr
            elif isinstance(node, ast.FunctionDef):
                yield node.name


def test_the_list_is_whole() -> None:
    theirs = private_names(transformers.trainer, accelerate.accelerator, accelerate.state, accelerate.optimizer)
    listed = OVERRIDDEN.keys() | CALLED.keys() | SET.keys() | ACCELERATES.keys() | OLDER
    assert set(used_names()) & theirs <= listed


class Hub:
    def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, **kwargs: Any) -> Future:
        done: Future = Future()
        done.set_result(None)
        return done


@pytest.fixture(scope="module")
def met(tmp_path_factory) -> set[str]:
    """The names that Trainer's own code called or set in a small training, its saving, uploading and resuming."""
    found: set[str] = set()

    def by_trainer() -> bool:
        return sys._getframe(2).f_code.co_filename == transformers.trainer.__file__

    class Watched(LatePhaseTrainer):
        def __setattr__(self, name: str, value: Any) -> None:
            if by_trainer():
                found.add(name)
            super().__setattr__(name, value)

    def watched(name: str) -> Any:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            if by_trainer():
                found.add(name)
            return getattr(super(Watched, self), name)(*args, **kwargs)

        return method

    set_sync_gradients = accelerate.state.GradientState._set_sync_gradients

    def watched_sync(self: Any, value: bool) -> None:
        if by_trainer():
            found.add("_set_sync_gradients")
        set_sync_gradients(self, value)

    for name in OVERRIDDEN.keys() | CALLED.keys():
        if hasattr(Trainer, name):
            setattr(Watched, name, watched(name))
    folder = tmp_path_factory.mktemp("met")

    def run(name: str) -> Any:
        return trainer(
            folder / name, gpt2(), LatePhaseConfig(num_members=2, late_phase_start=2), rows=32, max_steps=6,
            save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
            save_total_limit=1, logging_steps=1, max_grad_norm=1.0, push_to_hub=True, hub_always_push=True,
            trainer_class=Watched, extra={"compute_metrics": lambda prediction: {"score": next(scores)}},
            metric_for_best_model="score", greater_is_better=True,
        )  # fmt: skip

    with pytest.MonkeyPatch.context() as patch:
        use_hub(patch.setattr, Hub())
        patch.setattr(accelerate.state.GradientState, "_set_sync_gradients", watched_sync)
        scores = iter([2.0, 3.0, 1.0, 0.0])
        run("first").train()
        scores = iter([3.0, 1.0, 0.0])
        run("second").train(resume_from_checkpoint=str(folder / "first" / "checkpoint-4"))
    return found


LISTED = {**OVERRIDDEN, **CALLED, **SET, **ACCELERATES}


@pytest.mark.parametrize("name", sorted(LISTED))
def test_trainer_comes_by(met: set[str], name: str) -> None:
    if name in NEWER and not LOOP_HAS_HOOKS:
        pytest.skip("Before transformers 5.3 compat.py calls it.")
    if name == "_loss_shifts_labels" and not hasattr(Trainer, "loss_is_scaled_for_ga"):
        pytest.skip("Before transformers 5.19 Trainer counts all labels.")
    assert name in met, f"{name} is gone or renamed: {LISTED[name]}"
