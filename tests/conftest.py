"""Keeps tests off the network, quiet and reproducible."""

import os
from collections.abc import Iterator


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # on a GPU, for results that repeat themselves

import pytest
import torch


# Tiny models: a second thread costs more than it gives, all the more when tests run side by side.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_settings() -> Iterator[None]:
    """Older releases of Trainer write torch_compile and bf16 into variables, which the next trainer reads, too."""
    before = {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}
    yield
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    os.environ.update(before)
