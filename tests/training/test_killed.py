"""A run that is killed at any moment ends the same, and leaves no folder that only looks like a checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).with_name("killed_run.py")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_run_ends_as_if_nothing_had_been(kills: int) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*map(str, SCRIPT.parents[1:3]), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, str(SCRIPT), "--kills", str(kills)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    figures = json.loads(result.stdout.splitlines()[-1])
    print(figures)
    assert figures["kills"] == figures["identical"] == kills
    if kills == 20:
        assert figures["while_saving"] + figures["while_deleting"] >= 20 / 3
        assert figures["resumed"] >= 10 and figures["while_uploading"] >= 1
