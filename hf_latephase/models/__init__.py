"""Models for the paper's experiments, known to the Auto classes once this package is imported."""

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification

from .modeling_lstm_lm import LSTMForCausalLM, LSTMLMConfig
from .modeling_pyramidnet import PyramidNetConfig, PyramidNetForImageClassification
from .modeling_wide_resnet import WideResNetConfig, WideResNetForImageClassification


# exist_ok: reloading the package registers again.
AutoConfig.register("lstm_lm", LSTMLMConfig, exist_ok=True)
AutoConfig.register("pyramidnet", PyramidNetConfig, exist_ok=True)
AutoConfig.register("wide_resnet", WideResNetConfig, exist_ok=True)
AutoModelForCausalLM.register(LSTMLMConfig, LSTMForCausalLM, exist_ok=True)
AutoModelForImageClassification.register(PyramidNetConfig, PyramidNetForImageClassification, exist_ok=True)
AutoModelForImageClassification.register(WideResNetConfig, WideResNetForImageClassification, exist_ok=True)
# save_pretrained then copies the modeling file into the folder and names it in `auto_map`.
LSTMLMConfig.register_for_auto_class()
LSTMForCausalLM.register_for_auto_class("AutoModelForCausalLM")
PyramidNetConfig.register_for_auto_class()
PyramidNetForImageClassification.register_for_auto_class("AutoModelForImageClassification")
WideResNetConfig.register_for_auto_class()
WideResNetForImageClassification.register_for_auto_class("AutoModelForImageClassification")

__all__ = [
    "LSTMForCausalLM",
    "LSTMLMConfig",
    "PyramidNetConfig",
    "PyramidNetForImageClassification",
    "WideResNetConfig",
    "WideResNetForImageClassification",
]
