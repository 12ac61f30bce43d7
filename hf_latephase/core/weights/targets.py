"""Which tensors of a model become late-phase weights."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections import defaultdict
from dataclasses import dataclass, field
from types import ModuleType

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from ...config import LatePhaseConfig
from . import batch_norm, experts, hypernet, norm, rank1, replicated


FAMILY_MODULES: dict[str, ModuleType] = {
    "rank1": rank1,
    "norm": norm,
    "head": replicated,
    "hypernet": hypernet,
    "full": replicated,
}


# They multiply or mix the model's weights; the others copy them.
ADDING_FAMILIES = ("rank1", "hypernet")


def family_module(family: str, module: nn.Module) -> ModuleType:
    """Returns the file that knows how a family replicates a module: BatchNorm and experts have one of their own."""
    if isinstance(module, _BatchNorm) and family in ("norm", "full"):
        return batch_norm
    if family == "rank1" and experts.eligible(module):
        return experts
    return FAMILY_MODULES[family]


@dataclass(frozen=True)
class Target:
    """
    One tensor that becomes a late-phase weight.

    Attributes:
        module (`str`): Name of the module in the model.
        tensor (`str`): Name of the tensor in the module.
        family (`str`): Family that replicates it.
        rule (`str`): The pattern, or default, that chose it.
    """

    module: str
    tensor: str
    family: str
    rule: str

    @property
    def key(self) -> str:
        """The tensor's name in the plain state dict."""
        return f"{self.module}.{self.tensor}" if self.module else self.tensor


@dataclass(frozen=True)
class Found:
    """
    What a config makes of a model.

    Attributes:
        targets (`list[Target]`): The tensors that become late-phase weights.
        frozen (`list[Target]`): Those that a default would have chosen, had they not `requires_grad=False`.
        copied (`list[Target]`): With one member, those that more would copy. They stay the model's own.
    """

    targets: list[Target]
    frozen: list[Target]
    copied: list[Target] = field(default_factory=list)


def find_targets(model: nn.Module, config: LatePhaseConfig) -> Found:
    """
    Finds the tensors that a config makes late-phase weights, and refuses what cannot work, changing nothing.

    With one member nothing is replicated: only rank-1 factors and embeddings, which the stock model has not, are put
    on it. Frozen weights are left alone unless `target_modules` names their layers.

    Raises:
        `ValueError`: If a family finds no layer, a pattern matches nothing, a target is tied, frozen or already
            parametrized; the message names the cause and the remedy.
    """
    if config.batch_norm_statistics != "running" and not tracking_layers(model):
        raise ValueError(
            f"batch_norm_statistics={config.batch_norm_statistics!r}: the model has no BatchNorm layer that tracks "
            "statistics. Keep 'running'."
        )
    families = attached_families(config)
    if config.num_members > 1:
        return _find(model, config, families)
    try:
        found = _find(model, config, config.weights)
    except ValueError:
        # What cannot be copied matters to more members only.
        return _find(model, config, families)
    return Found(
        [target for target in found.targets if target.family in families],
        [target for target in found.frozen if target.family in families],
        [target for target in found.targets if target.family not in families],
    )


def _find(model: nn.Module, config: LatePhaseConfig, families: list[str]) -> Found:
    if not families:
        return Found([], [])
    modules = dict(model.named_modules())
    tied = _tied_keys(model)
    output_layer = find_output_layer(model)
    patterns = _patterns(config)
    for family in families:
        _refuse_parametrized(family, modules, patterns, config.exclude_modules or [], output_layer)
    candidates = {
        family: _drop_excluded(_candidates(family, modules, output_layer), config, modules) for family in families
    }
    unmatched = [p for p in patterns if not any(_matches(p, name) for names in candidates.values() for name in names)]
    if unmatched:
        _refuse_pattern("target_modules", unmatched[0], candidates, modules)

    targets: list[Target] = []
    frozen: list[Target] = []
    for family, names in candidates.items():
        chosen = _choose(family, names, patterns, output_layer)
        found = [
            Target(name, tensor, family, rule)
            for name, rule in chosen.items()
            for tensor in family_module(family, modules[name]).eligible(modules[name])
        ]
        usable = _usable(family, found, modules, tied, explicit=bool(patterns))
        taken = {target.key for target in usable}
        frozen.extend(target for target in found if _is_frozen(target, modules) and target.key not in taken)
        targets.extend(_drop_single(usable, modules) if family == "hypernet" else usable)
    _refuse_overlap(targets)
    if (
        config.num_members > 1
        and config.batch_norm_statistics != "running"
        and not any(t.tensor == "running_mean" for t in targets)
    ):
        raise ValueError(
            f"batch_norm_statistics={config.batch_norm_statistics!r}: no BatchNorm layer that tracks statistics "
            "becomes a late-phase weight. Keep 'running', or check target_modules and exclude_modules."
        )
    return Found(targets, frozen)


def tracking_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """Returns the BatchNorm layers that keep running statistics, by name."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    return {name: layer for name, layer in layers.items() if layer.running_mean is not None}


def attached_families(config: LatePhaseConfig) -> list[str]:
    """Names the families that put anything on a model: with one member, those that add parameters."""
    return [family for family in config.weights if config.num_members > 1 or family in ADDING_FAMILIES]


def find_output_layer(model: nn.Module) -> str | None:
    """Names the output layer: what transformers calls the output embeddings, else the last linear layer."""
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    embeddings = get_output_embeddings() if callable(get_output_embeddings) else None
    linear: str | None = None
    for name, module in model.named_modules():
        if embeddings is not None and module is embeddings:
            return str(name)
        if isinstance(module, (nn.Linear, Conv1D)):
            linear = name
    return linear


def _is_output(name: str, output_layer: str | None) -> bool:
    return output_layer is not None and (name == output_layer or name.startswith(f"{output_layer}."))


def _patterns(config: LatePhaseConfig) -> list[str]:
    if config.target_modules in (None, ["all-linear"]):
        return []
    return list(config.target_modules or [])


def _matches(pattern: str, name: str) -> bool:
    """PEFT's conventions: the full name, a suffix of it after a dot, or a regular expression for all of it."""
    if name == pattern or name.endswith(f".{pattern}"):
        return True
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ValueError(
            f"target_modules or exclude_modules: {pattern!r} is neither a module name nor a regular expression "
            f"({error}). Escape its special characters."
        ) from None


def _candidates(family: str, modules: dict[str, nn.Module], output_layer: str | None) -> list[str]:
    if family == "head":
        # Some models have one output layer a codebook, in a list.
        return [name for name, m in modules.items() if _is_output(name, output_layer) and replicated.eligible(m)]
    return [name for name, module in modules.items() if family_module(family, module).eligible(module)]


def _choose(family: str, names: list[str], patterns: list[str], output_layer: str | None) -> dict[str, str]:
    """Returns the chosen modules of a family, each with the rule that chose it."""
    by_pattern = {name: p for p in reversed(patterns) for name in names if _matches(p, name)}
    if by_pattern:
        return {name: f"target_modules {by_pattern[name]!r}" for name in names if name in by_pattern}
    if family in ("rank1", "hypernet"):
        rule = "all linear-like layers but the output layer"
        return {name: rule for name in names if not _is_output(name, output_layer)}
    return dict.fromkeys(names, f"every {family} layer" if family != "head" else "output layer")


def _drop_excluded(names: list[str], config: LatePhaseConfig, modules: dict[str, nn.Module]) -> list[str]:
    excluded = config.exclude_modules or []
    for pattern in excluded:
        if not any(_matches(pattern, name) for name in modules):
            _refuse_pattern("exclude_modules", pattern, {"any": list(modules)}, modules)
    return [name for name in names if not any(_matches(pattern, name) for pattern in excluded)]


def _refuse_parametrized(
    family: str, modules: dict[str, nn.Module], patterns: list[str], excluded: list[str], output_layer: str | None
) -> None:
    """Refuses layers asked for whose weights something else computes: they hold no parameter to replicate."""
    for name, module in modules.items():
        if not parametrize.is_parametrized(module) or any(_matches(pattern, name) for pattern in excluded):
            continue
        ours = any(hasattr(p, "members") for p in module.modules())
        if family == "head":
            candidate = name == output_layer
        else:
            kinds: dict[str, tuple[type[nn.Module], ...]] = {
                "rank1": rank1.LAYERS,
                "norm": norm.KINDS,
                "hypernet": hypernet.LAYERS,
                "full": (nn.Module,),
            }
            # A default leaves such a layer out, as it does tied ones.
            chosen = any(_matches(pattern, name) for pattern in patterns)
            candidate = isinstance(module, kinds[family]) and (chosen or family == "full")
        if ours or candidate:
            raise ValueError(
                f"{name!r} is parametrized already (by an attached LatePhase, weight_norm or the like). Detach that "
                "first, or name the module in exclude_modules."
            )


def _usable(
    family: str, found: list[Target], modules: dict[str, nn.Module], tied: dict[str, list[str]], explicit: bool
) -> list[Target]:
    """Drops tied and frozen tensors that a default chose, and refuses those that the user asked for."""
    if not found:
        if family == "norm":
            _refuse_norms_without_weights(modules)
        raise ValueError(
            f"weights={family!r}: the model has no layer of this family to replicate ({_what(family)}). "
            "Choose another family in `weights`, or check target_modules and exclude_modules."
        )
    usable = []
    reasons = []
    for target in found:
        if target.key in tied:
            reason = f"{target.key!r} is tied to {[k for k in tied[target.key] if k != target.key]}"
            asked_for = target.rule.startswith("target_modules") or family == "head"
            if asked_for:
                raise ValueError(
                    f"{reason}: replicating one side of a tied weight would untie the model. Untie it "
                    "(config.tie_word_embeddings=False), or leave it out of "
                    f"{'weights' if not explicit else 'target_modules'}."
                )
            reasons.append(reason)
        elif not _is_frozen(target, modules):
            usable.append(target)
        elif family in ADDING_FAMILIES and target.rule.startswith("target_modules"):
            # The factors are trained, the weight below them is not.
            usable.append(dataclasses.replace(target, rule=f"{target.rule}, frozen but for what is added"))
        else:
            reasons.append(f"{target.key!r} is frozen (requires_grad=False)")
    if not usable:
        raise ValueError(
            f"weights={family!r}: no tensor can be replicated: {reasons[0]}. Change that, or choose "
            "another family in `weights`."
        )
    if family == "full" and any("tied" in reason for reason in reasons):
        raise ValueError(f"weights=['full']: {reasons[0]}. Untie the model first (config.tie_word_embeddings=False).")
    return usable


def _refuse_norms_without_weights(modules: dict[str, nn.Module]) -> None:
    bare = sorted({type(module).__name__ for module in modules.values() if norm.has_no_weights(module)})
    if bare and not any(norm.eligible(module) for module in modules.values()):
        raise ValueError(
            f"weights='norm': the model's normalisation layers ({', '.join(bare)}) have no weights to replicate. Use "
            "weights=['rank1'], or another family."
        )


def _is_frozen(target: Target, modules: dict[str, nn.Module]) -> bool:
    module = modules[target.module]
    # The tensors of a BatchNorm layer belong together: it is eligible if one of them is trained.
    return not isinstance(module, _BatchNorm) and not getattr(module, target.tensor).requires_grad


def _drop_single(found: list[Target], modules: dict[str, nn.Module]) -> list[Target]:
    """Drops layers that have no other to share templates with."""
    weights = {t.key: (modules[t.module], getattr(modules[t.module], t.tensor)) for t in found}
    shared = {key for group in hypernet.groups(weights) if len(group) > 1 for key in group}
    if found and not shared:
        raise ValueError(
            "weights=['hypernet'] shares weight templates between layers whose weights have one shape, but no two of "
            f"the {len(found)} layers chosen do. Choose other target_modules, or another family in `weights`."
        )
    return [t for t in found if t.key in shared]


def _what(family: str) -> str:
    return {
        "rank1": "nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.LSTM, nn.GRU, experts, but for the output layer",
        "norm": "LayerNorm, RMSNorm, GroupNorm, BatchNorm",
        "hypernet": "nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, but for the output layer",
        "head": "an output layer",
        "full": "any parameter",
    }[family]


def _tied_keys(model: nn.Module) -> dict[str, list[str]]:
    """Maps each parameter name that shares its tensor with others to all of their names."""
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    modules = dict(model.named_modules(remove_duplicate=False))
    tied = {}
    for group in names.values():
        # One module registered under two names is shared, not tied: it is replicated once for both.
        owners = {(id(modules[name.rpartition(".")[0]]), name.rpartition(".")[2]) for name in group}
        if len(owners) > 1:
            tied.update(dict.fromkeys(group, group))
    return tied


def _refuse_pattern(field: str, pattern: str, candidates: dict[str, list[str]], modules: dict[str, nn.Module]) -> None:
    eligible = sorted({name for names in candidates.values() for name in names})
    if any(_matches(pattern, name) for name in modules):
        raise ValueError(
            f"{field}: {pattern!r} matches only modules that no family in weights={list(candidates)} can replicate. "
            f"Modules that it could name: {eligible[:8]}."
        )
    suffixes = sorted({name.rpartition(".")[2] for name in eligible} | set(eligible))
    nearest = difflib.get_close_matches(pattern, suffixes, n=5, cutoff=0.3) or suffixes[:5]
    raise ValueError(
        f"{field}: {pattern!r} matches no module. The nearest modules are {nearest}: name one of "
        f"those, or leave {field} out."
    )


def _refuse_overlap(targets: list[Target]) -> None:
    seen: dict[str, str] = {}
    for target in targets:
        if target.key in seen:
            raise ValueError(
                f"{target.key!r} would be replicated by both {seen[target.key]!r} and {target.family!r}. Narrow "
                "target_modules, or drop a family from weights."
            )
        seen[target.key] = target.family
