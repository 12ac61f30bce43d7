"""Checks of saving and loading that every image classifier of this package must pass, and images for them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageClassification


LOAD_WITHOUT_THE_LIBRARY = """
import sys
sys.modules["hf_latephase"] = None  # importing it raises
import torch
from transformers import AutoModelForImageClassification

model, info = AutoModelForImageClassification.from_pretrained(
    "model", dtype="auto", trust_remote_code=True, output_loading_info=True
)
assert not any(info.values()), info
assert type(model).__module__.startswith("transformers_modules."), type(model)
torch.save(model(torch.load("images.pt")).logits, "logits.pt")
"""


def random_images(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check_reload_is_exact(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    again, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert type(again) is type(model)
    assert {name: list(keys) for name, keys in info.items() if keys} == {}
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    images = random_images(2, 3, 8, 8)
    assert torch.equal(again(images).logits, model(images).logits)


def check_missing_weights(model: Any, folder: Path, scale: str, convolution: str) -> None:
    """A missing scale of a BatchNorm, a convolution and statistics are initialised, their neighbours kept."""
    missing = {scale, "bn.running_mean", "bn.running_var", convolution}
    state_dict = {name: value for name, value in model.state_dict().items() if name not in missing}
    model.save_pretrained(folder, state_dict=dict(state_dict))  # a copy, for it is emptied
    again, info = type(model).from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert set(info["missing_keys"]) == missing
    found = again.state_dict()
    assert (found[scale] == 1).all() and (found["bn.running_var"] == 1).all()
    assert (found["bn.running_mean"] == 0).all()
    fan_out = found[convolution].shape[0] * 9
    assert found[convolution].std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
    for name, value in state_dict.items():
        assert torch.equal(found[name], value), name


def check_new_output_layer(model: Any, folder: Path, features: int) -> None:
    """Another number of classes makes a new output layer, over so many features, and nothing else."""
    model.save_pretrained(folder)
    again = AutoModelForImageClassification.from_pretrained(
        folder, dtype="auto", num_labels=7, ignore_mismatched_sizes=True
    )
    assert again(random_images(2, 3, 8, 8)).logits.shape == (2, 7)
    bound = features**-0.5
    assert 0.9 * bound < again.classifier.weight.abs().max() <= bound and (again.classifier.bias == 0).all()
    for name, value in model.state_dict().items():
        if not name.startswith("classifier"):
            assert torch.equal(again.state_dict()[name], value), name


def check_loads_without_the_library(model: Any, folder: Path, file: str) -> None:
    """A fresh process that cannot import hf_latephase loads the folder, with its modeling file."""
    images = random_images(2, 3, 8, 8)
    torch.save(images, folder / "images.pt")
    model.save_pretrained(folder / "model")
    assert (folder / "model" / file).is_file()

    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_MODULES_CACHE")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    command = [sys.executable, "-I", "-c", LOAD_WITHOUT_THE_LIBRARY]
    finished = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    torch.testing.assert_close(torch.load(folder / "logits.pt"), model(images).logits, rtol=0, atol=1e-12)
