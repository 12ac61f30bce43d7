"""Late-phase weights for the Hugging Face ecosystem: a better model out of the same training run."""

from .config import LatePhaseConfig
from .core.late_phase import LatePhase
from .training.trainer import LatePhaseMixin, LatePhaseTrainer


__all__ = ["LatePhase", "LatePhaseConfig", "LatePhaseMixin", "LatePhaseTrainer"]
