"""Keeps the members' BatchNorm statistics the same on all processes, each of which runs other members."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from ..core.late_phase import LatePhase


class ProcessStatistics:
    """
    Gives every process the statistics of a member from the processes that ran it.

    At the end of each of Trainer's steps a member that one process ran has that one's statistics (so that several
    processes equal one), a member that several ran their mean, by minibatches. DDP, which before the next forward pass
    writes those of process 0 over all others, then finds them equal.

    Args:
        late_phase (`LatePhase`):
            The members.
        accelerator (`accelerate.Accelerator`):
            Connects the processes.
    """

    def __init__(self, late_phase: LatePhase, accelerator: Accelerator) -> None:
        self._late_phase = late_phase
        self._accelerator = accelerator
        self._counts = [0] * late_phase.num_members
        self._is_needed = bool(late_phase.statistics()) and accelerator.num_processes > 1

    def broadcast(self) -> None:
        """Gives all processes the statistics of process 0, as DDP does with each forward pass before T0."""
        if self._is_needed:
            broadcast(list(self._late_phase.statistics().values()))

    def count(self, member: int | None) -> None:
        """Takes note of a minibatch with a member, or with rows of each (`None`)."""
        for index in range(len(self._counts)) if member is None else [member]:
            self._counts[index] += 1

    @torch.no_grad()
    def synchronise(self) -> None:
        """Exchanges what the members' statistics became since the last time."""
        if not self._is_needed:
            return
        reduce = self._accelerator.reduce
        stacks = list(self._late_phase.statistics().values())
        own = torch.tensor(self._counts, device=stacks[0].device)
        total = reduce(own)
        # One exchange for all layers: [K, features of all].
        values = [stack for stack in stacks if stack.is_floating_point()]
        flat = torch.cat(values, 1)
        # Not the mean of products with zero, which would make NaN of an infinity elsewhere.
        flat = torch.where(own.unsqueeze(1) > 0, flat, 0) * own.unsqueeze(1)
        flat = reduce(flat) / total.clamp(min=1).unsqueeze(1)
        for value, new in zip(values, flat.split([value.shape[1] for value in values], 1), strict=True):
            value.copy_(torch.where(total.unsqueeze(1) > 0, new, value))
        for stack in stacks:
            if not stack.is_floating_point():  # minibatches tracked
                stack.add_(total - own)
        self._counts = [0] * len(self._counts)
