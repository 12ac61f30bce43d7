"""What a trainer evaluates and saves: the average over time, with BatchNorm statistics that fit it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor

from .averaging import TimeAverage
from .late_phase import LatePhase
from .running_statistics import forget_statistics, plain_layers, shown, statistics_of


class EvaluatedWeights:
    """
    Puts the averages that the config asks for in place of the weights that training goes on with.

    Args:
        late_phase (`LatePhase`):
            The members.
        average (`TimeAverage`, *optional*):
            Their average over time, if the config asks for one.
        measure (`Callable[[], dict[str, torch.Tensor]]`, *optional*):
            Measures BatchNorm statistics over the training set, if the config asks for it; see
            [`~running_statistics.measure_statistics`].
    """

    def __init__(
        self, late_phase: LatePhase, average: TimeAverage | None, measure: Callable[[], dict[str, Tensor]] | None
    ) -> None:
        self._late_phase = late_phase
        self.average = average
        self._measure = measure
        self._is_shown = False
        # Whether the statistics now measured belong to an average over time; `None` if none are.
        self._measured_over_time: bool | None = None
        # Those of the layers that are no late-phase weights.
        self._statistics: dict[str, Tensor] = {}
        self._is_settled = False
        # Once settled, the weights that training ended with, if an average over time took their place.
        self._raw: dict[str, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copies what it shows now; a copy of the model has no trainer to measure statistics with."""
        copied = type(self)(copy.deepcopy(self._late_phase, memo), copy.deepcopy(self.average, memo), None)
        copied._statistics = copy.deepcopy(self._statistics, memo)  # noqa: SLF001  # its own
        return copied

    @contextlib.contextmanager
    def applied(self, time_averaged: bool = True) -> Iterator[None]:
        """
        Context in which the model holds the averages; the weights come back to the bit.

        Args:
            time_averaged (`bool`, defaults to `True`):
                Whether to use the average over time too, if the config asks for one and there is one.
        """
        if self._is_shown or (self._is_settled and (time_averaged or not self._raw)):
            yield
            return
        self._is_shown = True
        try:
            if self._is_settled:
                assert self.average is not None  # whose place the raw weights had
                with self._late_phase.attached(), self.average.holding(self._raw), self._with_statistics(False):
                    yield
            else:
                over_time = time_averaged and self.has_average
                values = self.average.applied() if over_time and self.average else contextlib.nullcontext()
                with values, self._with_statistics(over_time):
                    yield
        finally:
            if self._is_settled:
                self._measured_over_time, self._statistics = None, {}
            self._is_shown = False

    def forget(self) -> None:
        """Drops measured statistics, which no longer fit once the weights change."""
        if self._measured_over_time is not None:
            forget_statistics(self._late_phase)
            self._measured_over_time, self._statistics = None, {}

    @torch.no_grad()
    def settle(self, measures: bool) -> None:
        """
        Makes the averages the weights that the model has from now on, as training is over.

        Args:
            measures (`bool`):
                Whether statistics may be measured once more, which takes time that an interrupted run has not.
        """
        if self.has_average and self.average is not None:
            # The average itself is not kept twice.
            self._raw, self.average.values = self.average.exchange(self.average.values), {}
        if measures:
            with self._with_statistics(bool(self._raw)):
                statistics = self._statistics
            for name, buffer in statistics_of(plain_layers(self._late_phase)).items():
                buffer.copy_(statistics.get(name, buffer))
            self._statistics = {}
        else:
            self.forget()
        self._is_settled = True

    @property
    def has_average(self) -> bool:
        """Whether there is an average over time."""
        return self.average is not None and self.average.num_averaged > 0

    @contextlib.contextmanager
    def _with_statistics(self, over_time: bool) -> Iterator[None]:
        # Before T0 the model is the plain one, with the statistics that it has.
        asked_for = self._measure is not None and (self._late_phase.released or over_time)
        if asked_for and self._measured_over_time != over_time:
            self.forget()
            self._statistics = self._measure()  # type: ignore[misc]
            self._measured_over_time = over_time
        with shown(self._late_phase, self._statistics):
            yield
