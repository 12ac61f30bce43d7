"""Command lines that may begin with a recipe: a YAML or JSON file of flags."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from hf_latephase import LatePhaseConfig
from hf_latephase.compat import WARMUP_SHARE


RECIPE_SUFFIXES = (".yaml", ".yml", ".json")


def parse_arguments(
    dataclass_types: Sequence[type], argv: Sequence[str] | None = None, description: str | None = None
) -> tuple[Any, ...]:
    """
    Parse a command line of the form `[recipe] [flags]` into dataclasses. Flags override the recipe.

    Args:
        dataclass_types (`Sequence[type]`):
            The dataclasses whose fields are the flags, and the keys of a recipe.
        argv (`Sequence[str]`, *optional*):
            The arguments. `None`: those of this process.
        description (`str`, *optional*):
            What `--help` says about the script.

    Returns:
        `tuple`: One instance of each dataclass.

    Raises:
        `FileNotFoundError`: If the recipe does not exist.
        `ValueError`: If the recipe is no mapping, or a key or a flag is unknown.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    known = [field.name for dataclass_type in dataclass_types for field in fields(dataclass_type) if field.init]
    if arguments and arguments[0].endswith(RECIPE_SUFFIXES):
        recipe = Path(arguments.pop(0))
        arguments = recipe_flags(read_recipe(recipe), known, recipe) + arguments
    # No abbreviations: a misspelt flag must not be read as the beginning of another.
    parser = HfArgumentParser(dataclass_types, allow_abbrev=False, description=description)
    *parsed, unknown = parser.parse_args_into_dataclasses(
        arguments, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        flag = unknown[0].partition("=")[0]
        hint = f" The nearest flag is --{_nearest(flag, known)}." if flag.startswith("--") else ""
        raise ValueError(f"Unknown argument {flag!r}.{hint} A recipe comes first; see --help for all flags.")
    return tuple(parsed)


def read_recipe(path: Path) -> dict[str, Any]:
    """
    Read a recipe.

    Args:
        path (`Path`):
            A YAML or JSON file that holds one mapping.

    Returns:
        `dict[str, Any]`: Its keys and values.

    Raises:
        `FileNotFoundError`: If the file does not exist.
        `ValueError`: If the file holds no mapping.
    """
    if not path.is_file():
        raise FileNotFoundError(f"The recipe {path} does not exist. Check the path given as first argument.")
    text = path.read_text(encoding="utf-8")
    try:
        recipe = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"The recipe {path} cannot be read: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"The recipe {path} must hold `key: value` pairs, but holds a {type(recipe).__name__}.")
    return recipe


def recipe_flags(recipe: dict[str, Any], known: Iterable[str], path: Path) -> list[str]:
    """
    The command line that a recipe stands for, so that a recipe and flags are read, converted and checked alike.

    Args:
        recipe (`dict[str, Any]`):
            Keys and values. `None` leaves a flag at its default.
        known (`Iterable[str]`):
            The keys that there are.
        path (`Path`):
            Where the recipe stands, for messages.

    Returns:
        `list[str]`: The flags.

    Raises:
        `ValueError`: If a key is unknown.
    """
    known = list(known)
    flags: list[str] = []
    for key, value in recipe.items():
        if key not in known:
            raise ValueError(f"Unknown key {key!r} in the recipe {path}. The nearest key is {_nearest(key, known)!r}.")
        if key == "warmup_steps" and isinstance(value, float):
            key = WARMUP_SHARE
        if isinstance(value, list):
            flags += [f"--{key}", *map(str, value)]
        elif isinstance(value, dict):
            flags.append(f"--{key}={json.dumps(value)}")
        elif value is not None:
            flags.append(f"--{key}={value}")
    return flags


def check_methods(methods: Iterable[str], known: Sequence[str]) -> None:
    """
    Refuses methods that there are not.

    Raises:
        `ValueError`: Names the nearest that there is.
    """
    for method in methods:
        if method not in known:
            raise ValueError(
                f"Unknown method {method!r}; did you mean {_nearest(method, known)!r}? Known: {', '.join(known)}."
            )


def name_base_gradient_scale(config: LatePhaseConfig, optim: str) -> LatePhaseConfig:
    """
    Names `base_gradient_scale` where it is left to the optimizer, so that controls with one member are scaled alike.

    Args:
        config (`LatePhaseConfig`):
            The settings.
        optim (`str`):
            The `optim` of `TrainingArguments`, of which SGD alone takes steps that grow with the gradients.

    Returns:
        `LatePhaseConfig`: The settings with the scale.
    """
    if config.base_gradient_scale is not None:
        return config
    return replace(config, base_gradient_scale=1.0 if optim == "sgd" else 1 / config.num_members)


def _nearest(name: str, known: Iterable[str]) -> str:
    return difflib.get_close_matches(str(name).lstrip("-").replace("-", "_"), list(known), n=1, cutoff=0.0)[0]
