"""Two gloo processes against one, launched by torchrun and by accelerate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from transformers import AutoModelForCausalLM

from distributed_worker import train
from hf_latephase.compat import FSDP2_TORCH, LOOP_HAS_HOOKS


WORKER = Path(__file__).with_name("distributed_worker.py")
CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate_configs"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def launch(tmp_path: Path, name: str, launcher: list[str] | None, **task: Any) -> dict[str, Any]:
    """Runs the worker, in this process if there is no launcher, and returns what rank 0 wrote."""
    folder = tmp_path / name
    folder.mkdir()
    task = {"folder": str(folder / "run"), "saved": str(folder / "saved"), "result": str(folder / "result.pt")} | task
    if launcher is None:
        train(task)
        return torch.load(task["result"], weights_only=True)
    (folder / "task.json").write_text(json.dumps(task))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    paths = [*map(str, (WORKER.parent, *WORKER.parents[1:3])), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = [*launcher, str(WORKER), str(folder / "task.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, _complaint(done.stderr)
    return torch.load(task["result"], weights_only=True)


def accelerate(config: str) -> list[str]:
    """accelerate's launcher with one of our recipes."""
    return [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", f"--config_file={CONFIGS / config}"]


def _complaint(stderr: str) -> str:
    """The workers' own words, without those of the launcher."""
    return stderr.partition("torch.distributed.elastic.multiprocessing.errors")[0][-4000:]


def assert_close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], tolerance: float) -> None:
    assert left.keys() == right.keys()
    for key, value in left.items():
        error = (value - right[key]).abs().max() / right[key].abs().max().clamp_min(1e-3)
        assert error < tolerance, f"{key} differs by {error:.1e}"


CASES = {
    # name: model, families, K, accumulation on 2 ranks, assignment
    "one step": ("gpt2", ["rank1", "norm"], 4, 2, "minibatch"),
    "several steps": ("gpt2", ["rank1", "norm"], 4, 1, "minibatch"),
    "several accumulated steps": ("lstm", ["rank1", "head"], 3, 2, "minibatch"),
    "sample": ("llama", ["norm", "head"], 2, 1, "sample"),
    "full": ("llama", ["full"], 2, 1, "minibatch"),
}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one_that_accumulates(tmp_path, case: str) -> None:
    model, weights, K, accumulation, assignment = CASES[case]
    config = {"num_members": K, "weights": weights, "late_phase_start": 3, "member_assignment": assignment}
    shared = {"max_steps": 15, "logging_steps": 3, "max_grad_norm": 0.1, "weight_decay": 0.1}
    one = launch(
        tmp_path, "one", None, model=model, config=config,
        arguments=shared | {"gradient_accumulation_steps": 2 * accumulation}, world_size=1, members=True,
    )  # fmt: skip
    two = launch(
        tmp_path, "two", TORCHRUN, model=model, config=config, world_size=2, members=True,
        arguments=shared | {"gradient_accumulation_steps": accumulation, "ddp_find_unused_parameters": False},
    )  # fmt: skip
    assert_close(two["weights"], one["weights"], 1e-10)
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
    for ours, theirs in zip(two["logs"], one["logs"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    for row, metrics in one["table"].items():
        assert two["table"][row]["loss"] == pytest.approx(metrics["loss"], rel=1e-6)
    if assignment == "minibatch":
        late = [members[3 * accumulation :] for members in two["members"]]
        for left, right in zip(*late, strict=True):
            assert left != right, "both processes ran the same member"
        assert set(late[0]) | set(late[1]) == set(range(K))
    # One reduction of every gradient a cycle, none inside it.
    numbers = two["numbers"]
    cycle = {"several steps": 2, "several accumulated steps": 3}.get(case, 1)
    for step, (calls, size) in enumerate(two["traffic"][3:]):
        ends_cycle = (step + 1) % cycle == 0
        assert size == (8 * numbers if ends_cycle else 0)
        assert (calls > 0) == ends_cycle
    assert two["traffic"][0] == two["traffic"][2 + cycle], "a cycle reduces as often as one plain step"
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "saved", dtype="auto")
    assert type(reloaded).__name__ == two["class"]


def test_a_second_training_on_two_processes(tmp_path) -> None:
    """DDP wraps a model anew whose parameters have had other shapes meanwhile."""
    task: dict[str, Any] = {"model": "gpt2", "config": {"num_members": 2, "weights": ["rank1", "norm"]}, "again": True}
    shared = {"max_steps": 6, "logging_steps": 3}
    one = launch(tmp_path, "one", None, **task, world_size=1, arguments=shared | {"gradient_accumulation_steps": 2})
    two = launch(tmp_path, "two", TORCHRUN, **task, world_size=2, arguments=shared)
    assert_close(two["weights"], one["weights"], 1e-10)


@pytest.mark.parametrize("settings", [
    {"num_members": 4, "weights": ["norm", "head"]},
    {"num_members": 2, "weights": ["norm"], "member_assignment": "sample"},
    {"num_members": 4, "weights": ["norm"], "swa_start": 4, "batch_norm_statistics": "recomputed_members"},
], ids=["running", "sample", "recomputed"])  # fmt: skip
def test_members_keep_their_batch_norm_statistics_on_two_processes(tmp_path, settings: dict[str, Any]) -> None:
    """Each member runs on one process (or on both, by sample); evaluation comes inside of cycles, too."""
    steps = 2 if settings["num_members"] == 4 else 1
    task = {"model": "convnet", "config": settings | {"late_phase_start": 0}, "members": True}
    shared = {"max_steps": 9, "logging_steps": 3, "eval_strategy": "steps", "eval_steps": 1}
    accumulation = {"gradient_accumulation_steps": steps}
    two = launch(tmp_path, "two", TORCHRUN, **task, world_size=2, arguments=shared | accumulation)
    one = launch(tmp_path, "one", None, **task, arguments=shared | {"gradient_accumulation_steps": 2 * steps})
    if settings.get("member_assignment") == "sample":
        # Members see two minibatches a cycle: one after the other, or side by side and then their mean.
        assert_close(two["weights"], one["weights"], 1e-10)
        return
    for part in ("weights", "statistics"):
        assert_close(two[part], one[part], 1e-10)
    for row, metrics in one["table"].items():
        assert two["table"][row]["loss"] == pytest.approx(metrics["loss"], rel=1e-6)


SHARDED = {
    "model": "gpt2",
    "config": {"num_members": 4, "weights": ["rank1", "norm"], "late_phase_start": 3, "swa_start": 5},
    "members": True,
}
SHARDED_ARGUMENTS = {"max_steps": 12, "logging_steps": 4, "max_grad_norm": 0.1, "weight_decay": 0.1}
# Evaluation, with the average over time in place of the weights, comes between steps.
SHARDED_ARGUMENTS |= {"eval_strategy": "steps", "eval_steps": 4}


SHARDED_RUN = SHARDED | {
    "fsdp": True,
    "world_size": 2,
    "arguments": SHARDED_ARGUMENTS | {"save_strategy": "steps", "save_steps": 10},
}


needs_fsdp2 = pytest.mark.skipif(
    Version(torch.__version__).release < Version(FSDP2_TORCH).release,
    reason=f"FSDP2 is refused before torch {FSDP2_TORCH} (test_compat.py).",
)


@pytest.fixture(scope="module")
def sharded_run(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A run by the FSDP2 recipe, with a checkpoint inside a cycle."""
    folder = tmp_path_factory.mktemp("fsdp2")
    return folder / "two", launch(folder, "two", accelerate("fsdp2.yaml"), **SHARDED_RUN)


@needs_fsdp2
def test_fsdp2_equals_one_process_and_saves_a_stock_model(tmp_path, sharded_run) -> None:
    folder, two = sharded_run
    one = launch(tmp_path, "one", None, **SHARDED, arguments=SHARDED_ARGUMENTS | {"gradient_accumulation_steps": 2})
    assert two["class"] == "FSDPGPT2LMHeadModel" and len(two["sharded"]) == len(two["weights"])
    assert_close(two["weights"], one["weights"], 1e-10)
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
    for ours, theirs in zip(two["logs"], one["logs"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    for row, metrics in one["table"].items():
        assert two["table"][row]["loss"] == pytest.approx(metrics["loss"], rel=1e-6)
    saved = [AutoModelForCausalLM.from_pretrained(f / "saved", dtype="auto") for f in (tmp_path / "one", folder)]
    assert type(saved[1]) is type(saved[0])
    assert_close(saved[1].state_dict(), saved[0].state_dict(), 1e-10)


@needs_fsdp2
def test_fsdp2_resumes_to_the_bit(tmp_path, sharded_run) -> None:
    folder, two = sharded_run
    checkpoint = str(folder / "run" / "checkpoint-10")
    resumed = launch(tmp_path, "resumed", accelerate("fsdp2.yaml"), **SHARDED_RUN, resume=checkpoint)
    for name, weight in resumed["weights"].items():
        assert torch.equal(weight, two["weights"][name]), name
    assert resumed["loss"] == two["loss"]


def test_ddp_recipe_resumes(tmp_path) -> None:
    """Inside a cycle, on as many processes: to the bit. At the end of one, on another number; inside it, refused."""
    task = SHARDED | {"world_size": 2}
    saving = SHARDED_ARGUMENTS | {"save_strategy": "steps", "save_steps": 3}
    whole = launch(tmp_path, "whole", accelerate("ddp.yaml"), **task, arguments=saving)
    # Cycles of two steps from step 3 on: 6 lies inside one, 9 at the end of one.
    inside, at_end = (str(tmp_path / "whole" / "run" / f"checkpoint-{step}") for step in (6, 9))
    if LOOP_HAS_HOOKS:  # before transformers 5.3 plain Trainer cannot resume on several processes without GPUs, either
        resumed = launch(tmp_path, "resumed", accelerate("ddp.yaml"), **task, arguments=saving, resume=inside)
        for name, weight in resumed["weights"].items():
            assert torch.equal(weight, whole["weights"][name]), name
        assert resumed["loss"] == whole["loss"]
    alone = {"arguments": SHARDED_ARGUMENTS | {"gradient_accumulation_steps": 2}}
    with pytest.raises(ValueError, match="lies inside a cycle of 2 steps on 2 processes"):
        launch(tmp_path, "refused", None, **SHARDED, **alone, resume=inside)
    one = launch(tmp_path, "alone", None, **SHARDED, **alone, resume=at_end)
    assert_close(one["weights"], whole["weights"], 1e-10)
