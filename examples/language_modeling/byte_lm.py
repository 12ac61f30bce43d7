"""Language models in training and after it: curves, reloading, samples of bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed

from common.report import Result
from hf_latephase import LatePhase, LatePhaseTrainer
from hf_latephase.analysis import Forward, is_recurrent, mean_forward, model_forward
from hf_latephase.core.points import steps_at
from hf_latephase.data import decode_ids, encode_bytes


RELOAD_TOLERANCE = 1e-5
# (a model, how it is called unless as it is) -> figures by split
Scores = Callable[[nn.Module, Forward | None], dict[str, float]]


class TextTrainer(LatePhaseTrainer):
    """
    [`LatePhaseTrainer`] that evaluates in bits per character.

    Differs from the parent in that `evaluate` scores a text symbol by symbol, before and after averaging over time
    (SWA or EMA), instead of the loss over windows; and in one more learning-rate schedule.

    Args:
        score (`Callable[[nn.Module], float]`):
            Bits per character of a stock model on the text to watch.
        decay_after_start (`bool`, defaults to `False`):
            Whether the rate is constant until T0 (after the warm-up) and falls linearly to 0 from there.
    """

    def __init__(
        self, *args: Any, score: Callable[[nn.Module], float], decay_after_start: bool = False, **kwargs: Any
    ) -> None:
        self._score = score
        self._decay_after_start = decay_after_start
        super().__init__(*args, **kwargs)

    @property
    def has_time_average(self) -> bool:
        """Whether weights have been averaged over time."""
        return self.time_average is not None and self.time_average.num_averaged > 0

    def averaged_model(self, time_averaged: bool = True) -> nn.Module:
        """Returns the parent's model, with the weights that a schedule-free optimizer evaluates, if it is one."""
        if callable(getattr(self.optimizer, "eval", None)):
            self.optimizer.eval()  # the next training step calls train()
        return super().averaged_model(time_averaged)

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """Creates the parent's schedule, or the one that decays from T0."""
        if self._decay_after_start:
            start = steps_at(self.late_phase_config.late_phase_start, num_training_steps)
            self.args.lr_scheduler_type = "warmup_stable_decay"
            self.args.lr_scheduler_kwargs = {"num_decay_steps": num_training_steps - start, "decay_type": "linear"}
        return super().create_scheduler(num_training_steps, *args, **kwargs)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Scores the averaged model, and the one averaged over time too once there is one."""
        metrics = {f"{metric_key_prefix}_bpc": self._score(self.averaged_model(time_averaged=False))}
        if self.has_time_average:
            metrics[f"{metric_key_prefix}_bpc_averaged"] = self._score(self.averaged_model())
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def result(self, seconds: float, scores: Scores, score_members: bool = False) -> Result:
        """
        What training has achieved, without and with averaging over time.

        Args:
            seconds (`float`):
                How long it took.
            scores (`Callable[[nn.Module, Forward | None], dict[str, float]]`):
                The figures of a model, called as `Forward` says, by split.
            score_members (`bool`, defaults to `False`):
                Whether the members' ensemble is scored too.
        """
        result = Result(
            method=Path(self.args.output_dir).name,
            minutes=seconds / 60,
            scores=scores(self.averaged_model(time_averaged=False), None),
            averaged_scores=scores(self.averaged_model(), None) if self.has_time_average else None,
            curve=self.curve(),
        )
        if score_members and self.late_phase.num_members > 1:
            with self.late_phase.averaged():  # for its end, which brings back what was active
                model = self.accelerator.unwrap_model(self.late_phase.model)
                result.ensemble_scores = scores(model, members_forward(self.late_phase, model))
        return result

    def curve(self) -> list[dict[str, float]]:
        """What `evaluate` has logged so far."""
        names = {"step": "step", "eval_bpc": "bpc", "eval_bpc_averaged": "bpc_averaged"}
        return [
            {names[key]: value for key, value in entry.items() if key in names}
            for entry in self.state.log_history
            if "eval_bpc" in entry
        ]


def members_forward(late_phase: LatePhase, model: nn.Module) -> Forward:
    """The ensemble of the members: the mean of their predicted probabilities."""
    forward = model_forward(model, carries_state=is_recurrent(model))

    def of_member(member: int) -> Forward:
        def predict(input_ids: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
            late_phase.activate(member)
            return forward(input_ids, state)

        return predict

    return mean_forward([of_member(member) for member in range(late_phase.num_members)])


def sample_text(model: PreTrainedModel, prompt: bytes, num_bytes: int, seed: int) -> str:
    """Let a model go on from a prompt. A text longer than the model has positions is read from half of them back."""
    positions = None if is_recurrent(model) else getattr(model.config, "max_position_embeddings", None)
    ids = torch.from_numpy(encode_bytes(prompt))[None].to(model.device)
    total = ids.shape[1] + num_bytes
    set_seed(seed)
    model.eval()
    while ids.shape[1] < total:
        seen = ids if positions is None else ids[:, -(positions // 2) :]
        room = total - ids.shape[1] if positions is None else min(total - ids.shape[1], positions - seen.shape[1])
        # min_new_tokens: the end-of-text id, never trained, is not to end the sample.
        output = model.generate(
            seen, attention_mask=torch.ones_like(seen), do_sample=True, max_new_tokens=room, min_new_tokens=room
        )
        ids = torch.cat([ids, output[:, seen.shape[1] :]], dim=1)
    # A terminal would obey control characters.
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in decode_ids(ids[0]))


def reload_and_check(folder: str, model: PreTrainedModel, probe: np.ndarray) -> tuple[PreTrainedModel, float]:
    """
    Load a saved folder as a stock model, and hold it against the model that was saved.

    Args:
        folder (`str`):
            What `save_model` wrote.
        model (`PreTrainedModel`):
            The trainer's averaged model.
        probe (`np.ndarray`):
            Ids `[T]` of a text to compare the logits on.

    Returns:
        `tuple[PreTrainedModel, float]`: The reloaded model and the largest difference of its logits.

    Raises:
        `RuntimeError`: If the logits differ by more than 1e-5.
    """
    reloaded = AutoModelForCausalLM.from_pretrained(folder).to(model.device)
    ids = torch.from_numpy(probe)[None].to(model.device)
    with torch.no_grad():
        difference = (reloaded(ids).logits - model.eval()(ids).logits).abs().max().item()
    if not difference <= RELOAD_TOLERANCE:
        raise RuntimeError(f"The model saved in {folder} differs from the trained one: logits by {difference:.3g}.")
    return reloaded, difference
