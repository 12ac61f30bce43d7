"""What the late phase must know of a Trainer beyond its public methods: the one place that does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from ..core.optimizers import unwrapped


# The modes of torch.compile that record and replay.
_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")


class TrainerAdapter:
    """
    A trainer as those see it who work for it.

    Everything is read when it is asked for: Trainer replaces its state, its optimizer and its accelerator as it goes.
    `tests/training/test_private_names.py` lists the private names and what would break without them.

    Args:
        trainer (`transformers.Trainer`):
            The trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer: Any = trainer  # much of what it has is missing from its annotations

    # ---- what it is set up with ----

    @property
    def args(self) -> TrainingArguments:
        """Its arguments."""
        return self._trainer.args

    @property
    def accelerator(self) -> Accelerator:
        """Its accelerator."""
        return self._trainer.accelerator

    @property
    def state(self) -> TrainerState:
        """Where it stands."""
        return self._trainer.state

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Its optimizer, without what accelerate and DeepSpeed's engine have wrapped around it."""
        return unwrapped(self._trainer.optimizer)

    @property
    def model(self) -> nn.Module | None:
        """Its model, unless `model_init` has yet to make one."""
        return self._trainer.model

    @property
    def callbacks(self) -> list[TrainerCallback]:
        """Its callbacks."""
        return self._trainer.callback_handler.callbacks

    @property
    def train_dataset(self) -> Any:
        """Its training set, if it has one."""
        return self._trainer.train_dataset

    @property
    def train_batch_size(self) -> int:
        """The rows of a minibatch of this process, as `auto_find_batch_size` may have changed them."""
        return self._trainer._train_batch_size

    @property
    def is_deepspeed_enabled(self) -> bool:
        """Whether DeepSpeed trains."""
        return bool(self._trainer.is_deepspeed_enabled)

    @property
    def engine(self) -> Any:
        """DeepSpeed's engine, once training has begun."""
        return self._trainer.deepspeed

    @property
    def deepspeed_config(self) -> dict[str, Any]:
        """DeepSpeed's settings."""
        config: dict[str, Any] = self.accelerator.state.deepspeed_plugin.hf_ds_config.config
        return config

    @property
    def is_fsdp_enabled(self) -> bool:
        """Whether FSDP shards the model."""
        return bool(self._trainer.is_fsdp_enabled)

    @property
    def has_cuda_graphs(self) -> bool:
        """Whether the next forward pass writes into the memory of this one's gradients."""
        return self.args.torch_compile_mode in _CUDA_GRAPHS

    # ---- one minibatch ----

    @property
    def accumulation_steps(self) -> int:
        """The minibatches of the current step; fewer where an epoch ends."""
        return self._trainer.current_gradient_accumulation_steps

    def own_items(self, inputs: Any, num_items_in_batch: Any) -> Any:
        """What stands for Trainer's count of the targets of a whole step: that of the minibatch, if there is one."""
        trainer = self._trainer
        # Label smoothing takes the mean by itself.
        smoothed = trainer.label_smoother is not None and trainer.compute_loss_func is None
        if num_items_in_batch is None or smoothed:
            return None
        steps = self.accumulation_steps
        labels = inputs.get("shift_labels", inputs.get("labels")) if isinstance(inputs, Mapping) else None
        if not isinstance(labels, Tensor):  # counted in a way of the trainer's own
            items = num_items_in_batch / steps
        else:
            if trainer._loss_shifts_labels and "shift_labels" not in inputs:
                labels = labels[..., 1:]
            # Trainer multiplies the loss by the number of processes when it counts over all of them.
            processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            items = labels.ne(-100).sum() * processes
        return items * steps if trainer.loss_is_scaled_for_ga else items

    @contextlib.contextmanager
    def own_mean(self) -> Iterator[None]:
        """Has models and Trainer take the mean over the minibatch, unless a loss is on a whole step's scale anyway."""
        trainer = self._trainer
        scaled, counts = trainer.loss_is_scaled_for_ga, trainer.model_accepts_loss_kwargs
        if not scaled:
            trainer.loss_is_scaled_for_ga = trainer.model_accepts_loss_kwargs = False
        try:
            yield
        finally:
            trainer.loss_is_scaled_for_ga, trainer.model_accepts_loss_kwargs = scaled, counts

    @contextlib.contextmanager
    def weighed_backward(self, factor: float, is_required: bool) -> Iterator[None]:
        """
        Multiplies what `accelerator.backward` gets, whoever computed and scaled the loss.

        Args:
            factor (`float`):
                By what.
            is_required (`bool`):
                Whether a step that runs its backward pass in another way is refused.

        Raises:
            `ValueError`: If the pass is required and did not come.
        """
        accelerator: Any = self.accelerator
        backward, before = accelerator.backward, vars(accelerator).get("backward")
        is_missing = is_required

        def weighed(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            nonlocal is_missing
            is_missing = False
            backward(loss if factor == 1 else loss * factor, *args, **kwargs)

        accelerator.backward = weighed
        try:
            yield
        finally:
            del accelerator.backward
            if before is not None:
                accelerator.backward = before
        if is_missing:
            raise ValueError(
                f"{type(self._trainer).__name__}.training_step runs the backward pass without "
                "self.accelerator.backward(loss), so with gradient_accumulation_steps > 1 or several processes the "
                "members' gradients cannot be weighed. Call that, or accumulate over one minibatch."
            )

    @contextlib.contextmanager
    def held_back(self, model: nn.Module) -> Iterator[None]:
        """Keeps accelerate's optimizer from stepping at the end of this step, and DDP from reducing gradients."""
        self.accelerator.gradient_state._set_sync_gradients(False)
        with model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext():
            yield

    # ---- a pass over the training set ----

    def train_dataloader(self) -> DataLoader[Any]:
        """Its training set in minibatches."""
        return self._trainer.get_train_dataloader()

    def forward(self, minibatch: Any) -> None:
        """Runs the model on a minibatch as training does, for what its layers keep of it."""
        inputs = self._trainer._prepare_inputs(minibatch)
        with self._trainer.compute_loss_context_manager():
            self._trainer.compute_loss(self.model, inputs)

    # ---- what it has logged, and not yet logged ----

    @property
    def loss_since_log(self) -> Tensor:
        """The sum of this process's losses since the last log."""
        return self._trainer._tr_loss

    @property
    def last_logged(self) -> int:
        """The step of the last log."""
        return self._trainer._globalstep_last_logged

    def go_on_logging(self, loss_since_log: Tensor, last_logged: int) -> None:
        """Takes over what a checkpoint's run had not yet logged."""
        self._trainer._globalstep_last_logged = last_logged
        self._trainer._tr_loss = loss_since_log
        # The mean over this call of train(), which Trainer returns, leaves earlier steps out.
        self._trainer._total_loss_scalar = -loss_since_log.item()
