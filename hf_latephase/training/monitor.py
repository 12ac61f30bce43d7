"""What is logged of the members while they train."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.late_phase import LatePhase
from .adapter import TrainerAdapter


class MemberMonitor:
    """
    Collects the members' losses on the device between two logs; only [`~MemberMonitor.summary`] reads them.

    Args:
        late_phase (`LatePhase`):
            The members.
        trainer (`TrainerAdapter`):
            What trains them.
        by_sample (`bool`):
            Whether every minibatch holds rows of all members, so that none has a loss of its own.
    """

    def __init__(self, late_phase: LatePhase, trainer: TrainerAdapter, by_sample: bool) -> None:
        self._late_phase = late_phase
        self._trainer = trainer
        self._by_sample = by_sample
        self.gradient_norms: tuple[Tensor, Tensor] | None = None
        self.reset()

    def reset(self) -> None:
        """Forgets the losses collected so far."""
        self._sums: Tensor | None = None
        self._counts = [0] * self._late_phase.num_members

    def add(self, member: int, loss: Tensor, factor: float) -> None:
        """Takes in `loss * factor`, the mean loss of one minibatch of a member."""
        if self._sums is None:
            self._sums = torch.zeros(len(self._counts), dtype=torch.float32, device=loss.device)
        self._sums[member].add_(loss, alpha=factor)
        self._counts[member] += 1

    def collected(self) -> Tensor | None:
        """Returns the sums and counts `[2, K]` since the last log over all processes, `None` without any."""
        if self._sums is None:
            return None
        counts = torch.tensor(self._counts, dtype=self._sums.dtype, device=self._sums.device)
        return self._trainer.accelerator.reduce(torch.stack([self._sums, counts]), "sum")

    def restore(self, collected: Tensor | None) -> None:
        """Goes on from what a checkpoint's run had collected; one process takes it over for all."""
        if collected is not None:
            sums, counts = collected if self._trainer.args.process_index == 0 else torch.zeros_like(collected)
            self._sums, self._counts = sums.to(self._trainer.args.device), counts.int().tolist()

    def summary(self) -> dict[str, float]:
        """Returns the figures to log, over all processes, and starts anew."""
        late_phase = self._late_phase
        figures = {"late_phase": float(late_phase.released)}
        if not late_phase.released:
            return figures
        totals = self.collected()
        if totals is not None and not self._by_sample:
            seen = totals[1] > 0
            losses = totals[0][seen] / totals[1][seen]
            figures["member_loss_mean"] = losses.mean().item()
            figures["member_loss_std"] = losses.std(correction=0).item()
        if late_phase.num_members > 1:
            figures["member_distance"] = late_phase.distance_from_mean().item()
        if self.gradient_norms is not None:
            figures["base_grad_norm"], figures["member_grad_norm"] = (n.item() for n in self.gradient_norms)
        self.reset()
        return figures
