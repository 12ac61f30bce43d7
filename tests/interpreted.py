"""
A plugin for pytest (`-p interpreted`): rank-1 arithmetic runs on the fused kernels, here, without a GPU.

Triton's interpreter runs the same source on the CPU. It has to be asked for before triton is imported, so
`tests/core/test_rank1_kernels.py` starts a process of its own. Float64 is let in, for comparisons to 1e-10.
"""

from __future__ import annotations

import itertools
import os
from types import ModuleType
from typing import Any

import torch


# Filled by the plugin: how often each kernel was launched.
launched = {"product": 0, "gradients": 0}


def pytest_configure(config: Any) -> None:
    assert os.environ.get("TRITON_INTERPRET") == "1", "TRITON_INTERPRET=1 must be set before triton is imported"
    from hf_latephase.core.weights import rank1_fused, rank1_kernels

    rank1_fused.is_supported_device = lambda tensor: not tensor.is_meta
    dtypes = [*itertools.product(rank1_fused.DTYPES, repeat=2), (torch.float64, torch.float64)]
    rank1_fused.DTYPES = (*rank1_fused.DTYPES, torch.float64)
    for weight, other in dtypes:
        # Beforehand, so that launches of the first comparison do not count.
        rank1_fused.check(rank1_kernels, torch.device("cpu"), weight, other)
        assert rank1_fused._working_kernels(torch.device("cpu"), weight, other) is rank1_kernels
    for name in launched:
        setattr(rank1_kernels, name, _counting(rank1_kernels, name))


def _counting(kernels: ModuleType, name: str) -> Any:
    launch = getattr(kernels, name)

    def count(*args: Any, **kwargs: Any) -> Any:
        launched[name] += 1
        return launch(*args, **kwargs)

    return count


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"kernels launched: {launched}")
