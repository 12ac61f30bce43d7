"""Who sees which minibatch, and when base and members step (Algorithm 1 as a gradient accumulation)."""

from __future__ import annotations

import math
from typing import Any


class Cycle:
    """
    Deals minibatches out to members and says when a cycle is complete.

    θ is constant inside a cycle and every φ_k is used in its own minibatches only, so Algorithm 1 is a gradient
    accumulation: minibatch i runs with member k(i) and weighs 1/m, m being the minibatches of each member in a whole
    cycle. Then the base has collected Σ_k Δθ_k and row k of every stack the gradient of member k's mean loss.

    A cycle spans the fewest of Trainer's steps that give every member equally many minibatches: one, if
    `accumulation_steps * num_processes` is a multiple of the length, more otherwise. A window that the end of an epoch
    cuts short counts as a whole step; a minibatch keeps its weight 1/m, and members that saw none do not step.

    Args:
        num_members (`int`):
            K.
        length (`int`, *optional*):
            Minibatches to a cycle over all processes, a multiple of K. `None`: K, or 1 if dealt out by sample.
        accumulation_steps (`int`):
            Minibatches of this process to one of Trainer's steps.
        num_processes (`int`), process_index (`int`):
            The processes that train together, each on its own member.
        by_sample (`bool`):
            Whether every minibatch holds rows of all members.
    """

    def __init__(
        self,
        num_members: int,
        length: int | None = None,
        accumulation_steps: int = 1,
        num_processes: int = 1,
        process_index: int = 0,
        by_sample: bool = False,
    ) -> None:
        self.num_members = num_members
        self.num_processes = num_processes
        self.process_index = process_index
        self.by_sample = by_sample
        self.length = length = length or (1 if by_sample else num_members)
        minibatches_per_step = accumulation_steps * num_processes
        self.steps_per_cycle = length // math.gcd(length, minibatches_per_step)
        # Divides a minibatch's mean loss so that it weighs 1/m after the processes' gradients were averaged.
        self.loss_divisor = self.steps_per_cycle * accumulation_steps / num_members
        # m: by sample, every minibatch is one of each member.
        self._minibatches_per_member = self.steps_per_cycle * minibatches_per_step / (1 if by_sample else num_members)
        self.reset()

    def reset(self) -> None:
        """Starts a new cycle."""
        self.rounds = 0
        self.step = 0

    @property
    def is_plain(self) -> bool:
        """Whether a cycle is just what Trainer does in one step."""
        return self.num_members == 1 and self.steps_per_cycle == 1

    def accumulation_for_one_step(self, accumulation_steps: int) -> int:
        """Returns the fewest minibatches to a step, from `accumulation_steps` on, that make a cycle one step."""
        whole = self.length // math.gcd(self.length, self.num_processes)
        return whole * math.ceil(accumulation_steps / whole)

    def next_member(self) -> int:
        """Counts one minibatch of each process and returns the member that this process runs it with."""
        member = (self.rounds * self.num_processes + self.process_index) % self.num_members
        self.rounds += 1
        return member

    def completes_at_next_step(self, is_last_step: bool) -> bool:
        """Whether Trainer's current step ends the cycle; the last step of training ends it with the members it has."""
        return is_last_step or self.step + 1 >= self.steps_per_cycle

    def minibatches(self, rounds: int | None = None) -> list[int]:
        """Returns how many minibatches each member has seen in this cycle, or will have after some rounds of it."""
        total = (self.rounds if rounds is None else rounds) * self.num_processes
        if self.by_sample:
            return [total] * self.num_members
        whole, rest = divmod(total, self.num_members)
        return [whole + (member < rest) for member in range(self.num_members)]

    def absent(self) -> list[int]:
        """Returns the members that saw no minibatch."""
        return [member for member, count in enumerate(self.minibatches()) if count == 0]

    def member_factors(self, rounds: int | None = None) -> list[float] | None:
        """Returns what makes each row of a stack's gradient a mean over minibatches; `None` if it is one already."""
        nominal = self._minibatches_per_member
        factors = [nominal / count if count else 0.0 for count in self.minibatches(rounds)]
        return None if all(factor == 1 for factor in factors) else factors

    def state_dict(self) -> dict[str, Any]:
        """Returns the position inside the cycle."""
        return {"rounds": self.rounds, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a position."""
        self.rounds, self.step = state["rounds"], state["step"]
