"""Whose model it is: members are on the user's model while it trains, and only then."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..compat import TrainerHooks
from ..config import LatePhaseConfig
from ..core.averaging import TimeAverage
from ..core.evaluated_weights import EvaluatedWeights
from ..core.late_phase import LatePhase
from ..core.member_groups import MemberGroups
from ..core.optimizers import check_elementwise, group_apart, unwrapped
from .adapter import TrainerAdapter
from .checkpoints.resume import StateKeeper
from .member_evaluation import MemberEvaluation
from .monitor import MemberMonitor
from .stepping import Stepping
from .support import check_adapter, check_callbacks
from .training_statistics import measure_with
from .zero import EngineStepping, MasterWeights, leave_engine, mark_groups


class LendingMixin(TrainerHooks):
    """The part of [`LatePhaseMixin`] that puts members on the model and into the optimizer, and gives both back."""

    late_phase_config: LatePhaseConfig
    late_phase: LatePhase
    time_average: TimeAverage | None
    model_init: Any  # the annotation of Trainer's leaves out that it may be None
    optimizer: Any
    model_wrapped: Any
    _adapter: TrainerAdapter
    _groups: MemberGroups | None = None

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Checks every model that `model_init` makes."""
        model = super().call_model_init(trial)
        if hasattr(self, "args"):  # sentence-transformers makes one for itself before it constructs its Trainer
            self._take(model)
        return model

    def _take(self, model: nn.Module) -> None:
        """Checks a model, and changes nothing of it."""
        check_adapter(model, self.late_phase_config, self.args)
        self.late_phase = LatePhase(model, self.late_phase_config, attach=False)
        self.time_average = None
        self._evaluated = EvaluatedWeights(self.late_phase, None, None)
        self._member_evaluation = MemberEvaluation(self.late_phase)
        has_engine = self.is_deepspeed_enabled
        self._state_keeper = StateKeeper(self.late_phase, self.is_fsdp_enabled or has_engine, has_engine)
        by_sample = self.late_phase_config.member_assignment == "sample"
        self._monitor = MemberMonitor(self.late_phase, self._adapter, by_sample)
        stepping = EngineStepping if has_engine else Stepping
        self._stepping = stepping(self.late_phase, self.late_phase_config, self._adapter, self._monitor)
        if has_engine:
            self.late_phase.storage = MasterWeights()

    def _attach(self) -> None:
        """Puts the members on the model, unless they are there, and into its optimizer."""
        if self.late_phase.is_attached:
            return
        assert self.model is not None
        if self.late_phase.model is not self.model:
            self._take(self.model)
        check_callbacks(self.callback_handler.callbacks, self.late_phase_config)
        count = getattr(self.model, "num_parameters", None)
        self._plain_size: int | None = None if count is None else count(exclude_embeddings=True)
        # Groups are made on the stock model, whose names, types and shapes they go by.
        self._decaying = set(super().get_decay_parameter_names(self.model))
        if self.is_deepspeed_enabled:  # those of an earlier training are its engine's
            self.optimizer, self.model_wrapped = None, self.model
        before = self.optimizer
        try:
            if before is None and not self.is_fsdp_enabled:
                self.create_optimizer()
            self.late_phase.attach()
            if self.optimizer is not None:
                self._join(unwrapped(self.optimizer))
        except BaseException:
            self.optimizer = before  # one that was refused is not tried again
            raise
        self.time_average = self._new_average()
        self._evaluated = self._new_view()
        self.late_phase.rest()

    def _join(self, optimizer: torch.optim.Optimizer) -> None:
        apart = self.is_deepspeed_enabled or self.late_phase_config.member_weight_decay is not None
        self._groups = MemberGroups(optimizer, self.lr_scheduler, self.late_phase, apart)
        if self.is_deepspeed_enabled:
            mark_groups(optimizer, self.late_phase.late_parameters())
        self._check_optimizer(optimizer)
        # A method of the user's may not look whether there is one, and DeepSpeed has Trainer forget it.
        joined = self.optimizer

        def create_optimizer(*args: Any, **kwargs: Any) -> torch.optim.Optimizer:
            self.optimizer = self.optimizer or joined
            return self.optimizer  # type: ignore[no-any-return]

        self.__dict__["create_optimizer"] = create_optimizer

    def _give_back(self, interrupted: bool) -> None:
        """Makes the model the stock model that is evaluated and saved."""
        self.__dict__.pop("create_optimizer", None)
        if not self.late_phase.is_attached:
            return
        self._stepping.drop_held()
        self._state_keeper.forget()
        self.late_phase.rest()
        try:
            self._evaluated.settle(measures=not interrupted)
        finally:
            if not self.is_fsdp_enabled:  # its shards are those of the attached model
                if self.is_deepspeed_enabled:
                    self._leave_engine()
                elif self._groups is not None:
                    self._groups.leave()
                self._groups = None
                model = self.late_phase.detach()
                if isinstance(self.model_wrapped, DistributedDataParallel):
                    self.model_wrapped = model  # the wrapper knows the attached model's shapes

    def _leave_engine(self) -> None:
        """Has the engine let go of the model. The optimizer, whose tensors are the engine's, is not used again."""
        assert isinstance(self._stepping, EngineStepping) and isinstance(self.late_phase.storage, MasterWeights)
        self._stepping.end_training()
        self.late_phase.storage.is_linked = False
        if self._adapter.engine is not None:
            leave_engine(self._adapter.engine)

    def _new_view(self) -> EvaluatedWeights:
        def measure() -> dict[str, Tensor]:
            of_members = self.late_phase_config.batch_norm_statistics == "recomputed_members"
            return measure_with(self._adapter, self.late_phase, of_members)

        is_measured = self.late_phase_config.batch_norm_statistics != "running" and self.train_dataset is not None
        view = EvaluatedWeights(self.late_phase, self.time_average, measure if is_measured else None)
        self.late_phase.view = view.applied
        return view

    def _new_average(self) -> TimeAverage | None:
        config = self.late_phase_config
        if not config.averages_over_time:
            return None
        model, device = self.late_phase.model, config.average_device
        return TimeAverage(model, config.ema_decay, config.ema_memory, device, self.late_phase.storage)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names the parameters that decay: those of the plain model, replicated or not. Rank-1 factors never do."""
        if not self.late_phase.is_attached:
            return super().get_decay_parameter_names(model)
        plain = {name: self.late_phase.plain_name(name) for name, _ in model.named_parameters()}
        return [name for name, plain_name in plain.items() if plain_name in self._decaying]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Creates the parent's optimizer: on the stock model, but for FSDP's, which is attached by then."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.late_phase.is_attached:
            if self.late_phase_config.member_weight_decay is not None:
                group_apart(unwrapped(optimizer), self.late_phase.late_parameters().values())
            self._check_optimizer(unwrapped(optimizer))
        return optimizer

    def _check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        if self.late_phase.num_members > 1:
            check_elementwise(optimizer, self.late_phase.stacks().values())
