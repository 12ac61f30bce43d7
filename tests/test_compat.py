"""What depends on the installed release."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from packaging.version import Version

from hf_latephase import LatePhaseConfig, compat
from hf_latephase.compat import FSDP2_TORCH, TESTED_TRANSFORMERS
from hf_latephase.training.adapter import TrainerAdapter
from hf_latephase.training.checkpoints.staging import sort_checkpoints
from hf_latephase.training.support import check_supported
from tiny import gpt2, trainer


CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"


@pytest.mark.parametrize(
    ("release", "warned"),
    [(TESTED_TRANSFORMERS + ".7", False), ("5.19.0", False), ("4.56.2", False), ("5.91.0", True)],
)
def test_an_untested_transformers_is_warned_of_once(tmp_path, monkeypatch, caplog, release: str, warned: bool) -> None:
    monkeypatch.setattr(compat, "RELEASE", Version(release))
    transformers.utils.logging.enable_propagation()
    transformers.utils.logging.warning_once.cache_clear()  # an earlier test's trainer may have said it
    with caplog.at_level(logging.WARNING, logger="hf_latephase"):
        for _ in range(2):
            trainer(tmp_path, gpt2(), LatePhaseConfig(num_members=2))
    messages = [record.getMessage() for record in caplog.records if "is newer than" in record.getMessage()]
    assert len(messages) == warned
    assert all(release in message and TESTED_TRANSFORMERS in message for message in messages)


def test_the_newest_tested_is_the_one_that_is_pinned() -> None:
    pins = dict(
        line.replace("===", "==").split("==")
        for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines()
        if "==" in line
    )
    assert Version(pins["transformers"]).release[:2] == Version(TESTED_TRANSFORMERS).release


def test_checkpoints_are_sorted_by_number_or_time(tmp_path) -> None:
    for seconds, name in enumerate(["checkpoint-10", "checkpoint-9", "checkpoint-100"]):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (1e9, 1e9 + 2 * seconds))
    (tmp_path / "checkpoint-7").touch()
    (tmp_path / "checkpoint-best").mkdir()
    found = [sort_checkpoints(str(tmp_path), use_mtime) for use_mtime in (False, True)]
    numbers = [[path.rpartition("-")[2] for path in paths] for paths in found]
    assert numbers == [["9", "10", "100"], ["10", "9", "100"]]


def test_fsdp2_is_refused_with_a_torch_whose_updates_differ(monkeypatch) -> None:
    plugin = SimpleNamespace(fsdp_version=2)
    sharded = SimpleNamespace(
        is_deepspeed_enabled=False, is_fsdp_enabled=True, args=SimpleNamespace(n_gpu=1, max_steps=-1),
        callback_handler=SimpleNamespace(callbacks=[]),
        accelerator=SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)),
    )  # fmt: skip
    for release in (FSDP2_TORCH + ".0+cpu", "3.0"):
        monkeypatch.setattr(torch, "__version__", release)
        check_supported(TrainerAdapter(sharded), LatePhaseConfig())
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    with pytest.raises(ValueError, match=r"FSDP2 .* needs torch 2\.13 or newer, this is 2\.9\.1.*or use DDP"):
        check_supported(TrainerAdapter(sharded), LatePhaseConfig())
