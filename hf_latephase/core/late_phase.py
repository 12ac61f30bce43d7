"""Late-phase weights on a model, without any trainer (paper section 2, Algorithm 1)."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..config import LatePhaseConfig
from .saving import METHOD, save_as_before, save_stock_models
from .sharding import Storage, named_parameters
from .summary import summarise
from .weights import PARAMETRIZATIONS, Attachment, Members, Target, attach, detach, find_targets, fold, write
from .weights.attach import keep, restore
from .weights.batch_norm import STATISTICS


class LatePhase:
    """
    Attaches late-phase weights to a model and manages their K members.

    Each late-phase weight becomes a parametrization whose parameters are stacked `[K, ...]`, so that one elementwise
    optimizer (SGD, Adam, AdamW) over `model.parameters()` acts as K separate ones, provided that it steps once a
    cycle. Until [`~LatePhase.release`] only member 0 is used.

    The model is the stock model again after [`~LatePhase.detach`], or at the end of a `with` block: same object, same
    parameters, the members averaged. While members are attached, `model.save_pretrained` and `model.push_to_hub` write
    that stock model, and `model.load_state_dict` takes its keys; `model.state_dict()` has keys of its own.

    Args:
        model (`torch.nn.Module`):
            The model, changed in place. The parameters keep their dtype and device.
        config (`LatePhaseConfig`):
            Which weights, how many members. With one member only rank-1 factors and embeddings are attached.
        attach (`bool`, defaults to `True`):
            Whether to attach at once. Otherwise the model is only checked, and [`~LatePhase.attach`] does it.

    Raises:
        `ValueError`: If the model and the config do not fit; the model is then unchanged.

    Example (one cycle of Algorithm 1; `γ_θ = 1`):

    ```python
    >>> import torch
    >>> from hf_latephase import LatePhase, LatePhaseConfig

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2))
    >>> with LatePhase(model, LatePhaseConfig(num_members=3, weights=["rank1", "norm"])) as late_phase:
    ...     optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ...     late_phase.release()
    ...     for k in range(3):
    ...         late_phase.activate(k)
    ...         model(torch.randn(5, 4)).square().mean().backward()
    ...     optimizer.step()
    >>> sorted(model.state_dict())
    ['0.bias', '0.weight', '1.bias', '1.weight', '2.bias', '2.weight']

    ```
    """

    def __init__(self, model: nn.Module, config: LatePhaseConfig, attach: bool = True) -> None:
        self.model = model
        self.config = config
        self.members = Members(config.num_members)
        self.is_attached = False
        # What saving shows of the model besides the members' average; a trainer sets the average over time.
        self.view: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        # Where the weights are that training goes on with; a trainer may keep others than the model's.
        self.storage = Storage()
        # What a trainer does with the members, in one line, once it has begun.
        self.plan: str | None = None
        self._found = find_targets(model, config)
        self._attachments: list[Attachment] = []
        # The members of a detached model, by their names in the attached one.
        self._kept: dict[str, Tensor] = {}
        if attach:
            self.attach()

    def __enter__(self) -> Self:
        if not self.is_attached:
            self.attach()
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def attach(self) -> None:
        """
        Attaches late-phase weights to the model as it is now; every member equals it.

        Raises:
            `ValueError`: If the model and the config do not fit (any more); the model is then unchanged.
        """
        if self.is_attached:
            raise ValueError("The members are attached already. Call detach() first.")
        self._found = find_targets(self.model, self.config)
        self.members.released = False
        self._kept = {}
        self._put_on()

    def detach(self) -> nn.Module:
        """
        Makes the model the stock model again, in place, with the averaged weights, and returns it.

        It is the same object with the same parameters. [`~LatePhase.stacks`] and [`~LatePhase.attached`] still know
        the members.
        """
        if self.is_attached:
            kept = keep(self.model, self._attachments) if self.num_members > 1 and self.released else {}
            # In the model's order, as `stacks` gives them before and after.
            kept = {name: kept[name] for name in self.model.state_dict() if name in kept}
            self._take_off(self._averaged_targets())
            self._kept = kept
        return self.model

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """
        Context in which the members are in the model, to look at; after it the model is as before, to the bit.

        Members of a detached model come back from their average, rank-1 ones up to rounding. Changes inside are lost.

        Raises:
            `ValueError`: If the model was changed so much that the members do not fit it.
        """
        if self.is_attached:
            yield
            return
        plain = self.model.state_dict()
        stock = {target.key: plain[target.key].detach() for target in self.targets}
        self._put_on()
        try:
            restore(self.model, self._attachments, self._kept)
            yield
        finally:
            self._take_off(stock)

    def _put_on(self) -> None:
        self._plain_keys = list(self.model.state_dict())
        self._aliases = _aliases(self.model)
        by_sample = self.config.member_assignment == "sample"
        self._attachments = attach(self.model, self.targets, self.members, by_sample)
        for name in ("_stack_names", "_by_prefix"):
            self.__dict__.pop(name, None)
        save_stock_models(self)
        self.is_attached = True
        self._move_members()

    def _take_off(self, values: dict[str, Tensor]) -> None:
        save_as_before(self.model)
        detach(self.model, self._attachments, values)
        self.is_attached = False

    @property
    def num_members(self) -> int:
        """K."""
        return self.config.num_members

    @property
    def targets(self) -> list[Target]:
        """The tensors that are late-phase weights while members are attached, each with the rule that chose it."""
        return self._found.targets

    @property
    def attachments(self) -> list[Attachment]:
        """What is on the model, or was before it was detached."""
        return self._attachments

    @property
    def released(self) -> bool:
        """Whether T0 has passed."""
        return self.members.released

    def summary(self) -> str:
        """
        Returns what is replicated, by family and by the rule that chose it, what it costs, and a trainer's plan.

        [`~LatePhase.targets`] lists each layer with its rule.

        Example:

        ```python
        >>> import torch
        >>> from hf_latephase import LatePhase, LatePhaseConfig

        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2))
        >>> print(LatePhase(model, LatePhaseConfig(num_members=3, weights=["rank1", "norm"])).summary())
        rank1: 1 tensor, 12 parameters a member (all linear-like layers but the output layer)
        norm: 2 tensors, 16 parameters a member (every norm layer)
        3 members: 84 late-phase parameters, 58 others; 272 more bytes than the plain model

        ```
        """
        with self.attached():
            lines = summarise(self.model, self._attachments, self._found.frozen, self.num_members)
        return lines if self.plan is None else f"{lines}\n{self.plan}"

    def is_late_phase(self, parameter_name: str) -> bool:
        """Whether a name in `model.named_parameters()` belongs to a stack `[K, ...]` of members."""
        return parameter_name in self._stack_names

    @functools.cached_property
    def _stack_names(self) -> set[str]:
        """The names of all stacks, statistics included; a base weight below factors or embeddings is none."""
        return {attachment.prefix + name for attachment in self._attachments for name in attachment.stacks}

    @functools.cached_property
    def _by_prefix(self) -> dict[str, Attachment]:
        return {attachment.prefix: attachment for attachment in self._attachments}

    def plain_name(self, parameter_name: str) -> str | None:
        """Returns the plain model's name of a parameter, `None` if it has none (rank-1 factors, embeddings)."""
        module, found, rest = parameter_name.partition(PARAMETRIZATIONS)
        tensor, _, name = rest.partition(".")
        attachment = self._by_prefix.get(f"{module}{found}{tensor}.")
        if attachment is None:
            return parameter_name
        return attachment.target.key if name == "original" else None

    def stacks(self) -> dict[str, nn.Parameter]:
        """Returns the members' parameters by name, each `[K, ...]`; of a detached model those that it had."""
        names = self._stack_names
        if not self.is_attached:
            return {n: nn.Parameter(t, False) for n, t in self._kept.items() if n in names and not _is_statistic(n)}
        return {name: p for name, p in named_parameters(self.model).items() if name in names}

    def statistics(self) -> dict[str, Tensor]:
        """Returns the members' running statistics of BatchNorm layers by name, each `[K, ...]`; as `stacks`."""
        names = self._stack_names
        if not self.is_attached:
            return {name: t for name, t in self._kept.items() if name in names and _is_statistic(name)}
        return {name: buffer for name, buffer in self.model.named_buffers() if name in names}

    def base_parameters(self) -> dict[str, nn.Parameter]:
        """Returns θ, all other parameters, by name."""
        names = self._stack_names
        return {name: p for name, p in named_parameters(self.model).items() if name not in names}

    def late_parameters(self) -> dict[str, nn.Parameter]:
        """
        Returns what learns without `base_gradient_scale` and with `member_weight_decay`, by name: the stacks, and of
        one member the weights that more would copy, so that it is their control.
        """
        copied = {target.key for target in self._found.copied}
        return self.stacks() | {name: p for name, p in named_parameters(self.model).items() if name in copied}

    def activate(self, member: int | None) -> None:
        """
        Selects the weights that the next forward and backward passes use.

        Args:
            member (`int`, *optional*):
                A member, counted from 0; `None` for the average of all.
        """
        if not self.is_attached and member is not None:
            raise RuntimeError("The members are not in the model: look at them inside `with late_phase.attached():`.")
        self._move_members()
        self.members.activate(member)

    def rest(self) -> None:
        """Selects the average for user code, which may not write into what was computed from members."""
        self.activate(None)
        self.members.at_rest = self.is_attached

    def activate_by_sample(self) -> None:
        """Lets the next passes deal out the rows of each batch over the members, in contiguous blocks."""
        if self.config.member_assignment != "sample":
            raise ValueError("activate_by_sample needs a config with member_assignment='sample'.")
        self._move_members()
        self.members.mode = "sample"

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Context in which the model computes with the average of the members, attached if they were not."""
        with self.attached():
            mode, member, at_rest = self.members.mode, self.members.member, self.members.at_rest
            self.activate(None)
            try:
                yield
            finally:
                self.activate(member)
                self.members.mode, self.members.at_rest = mode, at_rest

    @torch.no_grad()
    def release(self, generator: torch.Generator | None = None) -> None:
        """
        T0: every member becomes the shared value plus noise, φ_k = φ_0 + σ0 · rms(φ_0) · N(0, I).

        Args:
            generator (`torch.Generator`, *optional*):
                A CPU generator for the noise. Processes that train together must pass equally seeded ones.

        Raises:
            `RuntimeError`: If the members were released before.
        """
        if not self.is_attached:
            raise RuntimeError("There are no members to release: call attach() first.")
        if self.released:
            raise RuntimeError("The members were released before; rejoin() makes them one again.")
        for stack in self.stacks().values():
            self._set_members(stack, self.storage.read(stack)[:1], generator)
        self.share_first_member(list(self.statistics().values()))
        self.members.released = True

    @torch.no_grad()
    def rejoin(self) -> None:
        """Undoes a release: the average of the members becomes the shared value."""
        layers = [a for a in self._attachments if isinstance(self.model.get_submodule(a.target.module), _BatchNorm)]
        # Of these the average is that of the layers' outputs.
        folded = fold(self.model, layers, self.model.state_dict())
        for stack in self.stacks().values():
            self._set_members(stack, self.members.average(self.storage.read(stack)).unsqueeze(0), None, noise=False)
        write(self.model, layers, folded)
        self.members.released = False

    @torch.no_grad()
    def share_first_member(self, stacks: list[Tensor]) -> None:
        """Writes row 0 of each stack `[K, ...]` into all its rows."""
        for stack in stacks:
            self._set_members(stack, self.storage.read(stack)[:1], None, noise=False)

    def averaged_state_dict(self, state_dict: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """
        Returns the averaged model's weights under the plain keys of the original architecture.

        Args:
            state_dict (`dict[str, torch.Tensor]`, *optional*):
                A full state dict of the attached model to fold, gathered from a sharded model or averaged over time.
                `None`: the model's own. A plain one is returned as it is.
        """
        source = self.model.state_dict() if state_dict is None else state_dict
        if not self.is_attached or not any(PARAMETRIZATIONS in key for key in source):
            return source
        with torch.no_grad():
            folded = fold(self.model, self._attachments, source)
        plain: dict[str, Any] = {k: folded.get(self._aliases.get(k, k), source.get(k)) for k in self._plain_keys}
        return plain

    def averaged_model(self) -> nn.Module:
        """Returns a new stock model, on the same device and in the same mode, that holds the averaged weights."""
        # What saves the stock model is shared, as the copy needs none.
        savers = [saver for module in self.model.modules() if (saver := vars(module).get(METHOD)) is not None]
        model = copy.deepcopy(self.model, {id(saver): saver for saver in savers})
        if self.is_attached:
            save_as_before(model)
            detach(model, self._attachments, self._averaged_targets(), copied=True)
        return model

    @torch.no_grad()
    def load_averaged_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Makes every member that of a plain state dict: factors 1, embeddings unit vectors, stacks equal copies."""
        if self.is_attached:
            write(self.model, self._attachments, state_dict)
        for name, tensor in self.model.state_dict().items():
            if self.plain_name(name) == name and name in state_dict:
                tensor.copy_(state_dict[name])

    def distance_from_mean(self) -> Tensor:
        """Returns the rms distance of the members from their mean, relative to the rms of that (0-d, on device)."""
        spread, size = [], []
        with torch.no_grad():
            for stack in self.stacks().values():
                values = self.storage.read(stack)
                mean = self.members.average(values).unsqueeze(0)
                spread.append((values - mean).square().float().mean(0).sum())
                size.append(mean.square().float().sum())
            return (torch.stack(spread).sum() / torch.stack(size).sum()).sqrt()

    def _averaged_targets(self) -> dict[str, Tensor]:
        averaged = self.averaged_state_dict()
        values = {target.key: averaged[target.key].detach() for target in self.targets}
        # Not what is still the members' own memory: before T0 the average is a row of the stack.
        own = {tensor.untyped_storage().data_ptr() for tensor in self.model.state_dict().values()}
        return {k: v.clone() if v.untyped_storage().data_ptr() in own else v for k, v in values.items()}

    def _set_members(
        self, stack: Tensor, shared: Tensor, generator: torch.Generator | None, noise: bool = True
    ) -> None:
        """Writes φ_0 (`[1, ...]`), with noise if the config asks for it, into every member of a stack."""
        values = shared.expand(stack.shape)
        if noise and self.config.init_noise:
            # Drawn on the CPU so that every process and device draws the same.
            drawn = torch.randn(stack.shape, generator=generator, dtype=torch.float64)
            rms = shared.double().square().mean().sqrt()
            values = (values.double() + self.config.init_noise * rms * drawn.to(rms.device)).to(stack.dtype)
        self.storage.write(stack, values.clone())

    def _move_members(self) -> None:
        first = next(iter(self.model.parameters()), None)
        if first is not None:
            self.members.to(first.device)


def _aliases(model: nn.Module) -> dict[str, str]:
    """Maps each key of a shared module's parameters to the key under its first name, which targets go by."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    return {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}


def _is_statistic(name: str) -> bool:
    return any(f"{PARAMETRIZATIONS}{statistic}." in name for statistic in STATISTICS)
