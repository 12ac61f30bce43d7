"""A model's configuration as a script takes it: a type of transformers, and what differs from its defaults."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, field
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig

from hf_latephase.compat import PreTrainedConfig


@dataclass
class ModelArguments:
    """The model, built from a config with fresh weights."""

    model_type: str = field(
        default="wide_resnet",
        metadata={"help": "wide_resnet, pyramidnet, or any image classifier of transformers: resnet, ..."},
    )
    model_config: dict | str | None = field(
        default=None,
        metadata={"help": "JSON of what differs from the config's defaults, e.g. '{\"depth\": 16}'."},
    )

    def __post_init__(self) -> None:
        self.model_config = parse_config(self.model_config)


def parse_config(value: dict | str | None) -> dict[str, Any] | None:
    """
    The config fields that a recipe (a mapping) or a flag (JSON) gives.

    Raises:
        `ValueError`: If it is no mapping.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"model_config is no JSON ({error}): {value}") from error
    if not isinstance(value, dict | None):
        raise ValueError(f"model_config must be a mapping of config fields to values, got {value!r}.")
    return value


def check_config(model_type: str, chosen: dict[str, Any]) -> PreTrainedConfig:
    """
    Checks that a config can be built.

    Args:
        model_type (`str`):
            A type that transformers knows.
        chosen (`dict[str, Any]`):
            What differs from its defaults.

    Returns:
        `PreTrainedConfig`: The defaults.

    Raises:
        `ValueError`: If the type or a field is unknown.
    """
    if model_type not in CONFIG_MAPPING:
        nearest = difflib.get_close_matches(model_type, CONFIG_MAPPING.keys(), n=3, cutoff=0.0)
        raise ValueError(f"Unknown model_type {model_type!r}. The nearest types of transformers are {nearest}.")
    defaults = AutoConfig.for_model(model_type)
    for key in chosen:
        # transformers keeps any key, so a misspelt one would go unnoticed.
        if not hasattr(defaults, key):
            nearest = difflib.get_close_matches(key, defaults.to_dict(), n=3, cutoff=0.0)
            raise ValueError(f"{type(defaults).__name__} has no field {key!r}. The nearest are {nearest}.")
    return defaults


def build_config(model_type: str, chosen: dict[str, Any], class_names: list[str]) -> PreTrainedConfig:
    """
    The config of an image classifier.

    Args:
        model_type (`str`):
            A type that transformers knows.
        chosen (`dict[str, Any]`):
            What differs from its defaults.
        class_names (`list[str]`):
            Names of the classes of the data.

    Returns:
        `PreTrainedConfig`: The config, with the classes' names.

    Raises:
        `ValueError`: If the type or a field is unknown, or the number of classes is not that of the data.
    """
    check_config(model_type, chosen)
    if chosen.get("num_labels", len(class_names)) != len(class_names):
        raise ValueError(
            f"model_config asks for num_labels={chosen['num_labels']}, but the data have {len(class_names)} classes. "
            "Leave num_labels out: the data set it."
        )
    names = dict(enumerate(class_names))
    settings = {"id2label": names, "label2id": {name: label for label, name in names.items()}}
    return AutoConfig.for_model(
        model_type, **({key: value for key, value in chosen.items() if key != "num_labels"} | settings)
    )
