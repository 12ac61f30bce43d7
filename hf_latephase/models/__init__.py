"""Models for the paper's experiments, known to the Auto classes once this package is imported."""

from transformers import AutoConfig, AutoModelForCausalLM

from .modeling_lstm_lm import LSTMForCausalLM, LSTMLMConfig


# exist_ok: reloading the package registers again.
AutoConfig.register("lstm_lm", LSTMLMConfig, exist_ok=True)
AutoModelForCausalLM.register(LSTMLMConfig, LSTMForCausalLM, exist_ok=True)
# save_pretrained then copies the modeling file into the folder and names it in `auto_map`.
LSTMLMConfig.register_for_auto_class()
LSTMForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["LSTMForCausalLM", "LSTMLMConfig"]
