"""examples/accelerate_loop.py: a loop without Trainer trains the same model as LatePhaseTrainer."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, set_seed

from hf_latephase import LatePhaseConfig, LatePhaseTrainer
from tiny import COUNTS_ALL_LABELS, arguments


ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "accelerate_loop.py"


def launch(*options: str, cwd: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, str(SCRIPT), *options]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def example() -> Any:
    spec = importlib.util.spec_from_file_location("accelerate_loop", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_help(tmp_path: Path) -> None:
    assert "--num_members" in launch("--help", cwd=tmp_path)


@pytest.mark.parametrize(("K", "start"), [(4, 8), (3, 0)])
def test_the_loop_equals_the_trainer(tmp_path: Path, K: int, start: int) -> None:
    steps = 20
    output = launch(
        "--output_dir", "out", "--num_members", str(K), "--late_phase_start", str(start), "--max_steps", str(steps),
        "--learning_rate", "0.002", cwd=tmp_path,
    )  # fmt: skip
    assert output.count("late phase") == 2 and "Saved the average" in output
    loop = AutoModelForCausalLM.from_pretrained(tmp_path / "out")

    module = example()
    set_seed(0)
    model = module.tiny_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    run = LatePhaseTrainer(
        model=model,
        args=arguments(
            tmp_path / "trainer", max_steps=steps, gradient_accumulation_steps=K, learning_rate=0.002,
            optim="adamw_torch", dataloader_drop_last=True,
        ),
        late_phase_config=LatePhaseConfig(
            num_members=K, weights=["rank1", "norm"], late_phase_start=start, base_gradient_scale=1.0
        ),
        train_dataset=_endless(module.rows(), steps * K * 4),
    )  # fmt: skip
    run.train()
    assert run.late_phase.released and run.late_phase.distance_from_mean() > 1e-4
    averaged = run.late_phase.averaged_state_dict()
    assert list(averaged) == list(loop.state_dict())
    for key, value in loop.state_dict().items():
        assert torch.allclose(value, averaged[key], rtol=0, atol=1e-6), key
        assert not torch.allclose(value, before[key], rtol=0, atol=1e-3), key


def _endless(rows: torch.Tensor, count: int) -> list[dict[str, torch.Tensor]]:
    """The rows in the order in which the loop sees them: whole minibatches of four, again and again."""
    whole = rows[: len(rows) // 4 * 4]
    labels = whole.clone()
    if COUNTS_ALL_LABELS:
        labels[:, 0] = -100
    return [{"input_ids": whole[i % len(whole)], "labels": labels[i % len(whole)]} for i in range(count)]
