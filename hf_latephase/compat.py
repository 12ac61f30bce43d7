"""All that depends on a release of what we stand on. Each piece says with which floor it can go."""

from __future__ import annotations

import inspect
from dataclasses import fields

from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast


# What models call their memory of the text. transformers 5.24: `cache`; the older name can go then.
STATE_NAME = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


def state_name(model: nn.Module) -> str:
    """What a model calls its memory: as its release of transformers does, unless its code is older."""
    parameters = inspect.signature(model.forward).parameters
    return "past_key_values" if "past_key_values" in parameters and "cache" not in parameters else STATE_NAME
