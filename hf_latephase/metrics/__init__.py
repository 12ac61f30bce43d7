from hf_latephase.metrics.bits_per_character import BitsPerCharacter
from hf_latephase.metrics.calibration import Calibration
from hf_latephase.metrics.ood_auroc import OODAUROC


__all__ = ["OODAUROC", "BitsPerCharacter", "Calibration"]
