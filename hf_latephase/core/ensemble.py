"""Predictions of members and of their ensemble, and how far they disagree, without copies of the base weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from .late_phase import LatePhase


@dataclass(frozen=True)
class EnsemblePrediction:
    """
    What K classifiers predict together, and how far they disagree.

    Attributes:
        log_probs (`torch.Tensor` of shape `[..., classes]`):
            Log of the members' mean predicted probabilities.
        disagreement (`torch.Tensor` of shape `[...]`):
            Share of the pairs of members whose most probable classes differ; 0 for one member.
        mutual_information (`torch.Tensor` of shape `[...]`):
            Entropy of the mean prediction less the mean entropy of the members' predictions, in nats: what the
            members' differences add to the uncertainty (Depeweg et al., 2018; "epistemic"). 0 where all agree.
    """

    log_probs: Tensor
    disagreement: Tensor
    mutual_information: Tensor


@torch.no_grad()
def combine_predictions(logits: Iterable[Tensor]) -> EnsemblePrediction:
    """
    Combines the predictions of K classifiers for the same inputs, one at a time.

    Give it a generator that computes them one by one: then two tensors `[..., classes]` beside the newest are kept,
    whatever K is, and a deep ensemble needs only one model in memory. Runs without gradients, the generator included.

    Args:
        logits (`Iterable[torch.Tensor]`):
            Logits or log-probabilities `[..., classes]` of each member, all of one shape. Computed in float32 or
            wider.

    Returns:
        [`EnsemblePrediction`]: What the K predict together, and how far they disagree.

    Raises:
        `ValueError`: If there are no members, or they predict different numbers of examples or classes.

    Example:

    ```python
    >>> import torch
    >>> from hf_latephase.analysis import combine_predictions

    >>> certain = torch.tensor([[0.9, 0.1], [0.9, 0.1]]).log()
    >>> unlike = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()
    >>> prediction = combine_predictions([certain, unlike])
    >>> prediction.log_probs.exp()
    tensor([[0.9000, 0.1000],
            [0.5000, 0.5000]])
    >>> prediction.disagreement
    tensor([0., 1.])

    ```
    """
    total = votes = entropy = None
    count = 0
    for one in logits:
        log_probs = _log_softmax(one)
        if total is None or votes is None or entropy is None:
            total, entropy = log_probs, _entropy(log_probs)
            votes = torch.zeros_like(total, dtype=torch.int32)
        elif log_probs.shape != total.shape:
            raise ValueError(
                f"Member {count} predicted a tensor of shape {list(log_probs.shape)}, the ones before "
                f"{list(total.shape)}. All members must predict the same classes for the same inputs."
            )
        else:
            total, entropy = torch.logaddexp(total, log_probs), entropy + _entropy(log_probs)
        chosen = log_probs.argmax(-1, keepdim=True)
        votes.scatter_add_(-1, chosen, torch.ones_like(chosen, dtype=votes.dtype))
        count += 1
    if total is None or votes is None or entropy is None:
        raise ValueError("An ensemble needs at least one member.")
    mean = total - math.log(count)
    # n members that chose one class make n (n - 1) ordered pairs that agree.
    agreeing = (votes * (votes - 1)).sum(-1).to(mean.dtype)
    disagreement = 1 - agreeing / (count * (count - 1)) if count > 1 else torch.zeros_like(agreeing)
    # Never negative but for rounding.
    mutual_information = (_entropy(mean) - entropy / count).clamp_min(0)
    return EnsemblePrediction(mean, disagreement, mutual_information)


def predict_with_members(late_phase: LatePhase, predict: Callable[[], Tensor]) -> EnsemblePrediction:
    """
    Returns the members' combined prediction. The member that was active before is active again after.

    Before T0 the ensemble is the one member that exists.

    Args:
        late_phase (`LatePhase`):
            The members.
        predict (`Callable[[], torch.Tensor]`):
            Runs the model, in evaluation mode, on fixed inputs and returns its logits `[..., classes]`; called once a
            member. The inputs may be one batch, or a whole dataset.

    Raises:
        `ValueError`: If two calls of `predict` return tensors of different shapes.
    """
    # For its end, which brings back what was active.
    with late_phase.averaged():
        return combine_predictions(_member_logits(late_phase, predict))


def predict_with_dropout(
    model: nn.Module, predict: Callable[[], Tensor], num_samples: int, seed: int
) -> EnsemblePrediction:
    """
    MC-dropout (Gal & Ghahramani, 2016): the combined prediction of random masks on one model.

    The dropout layers of `torch.nn` draw masks; everything else is in evaluation mode, BatchNorm included. Dropout
    that a model applies without such a layer (as transformers' attention does) stays off. Modes and PyTorch's random
    state, of the CPU and CUDA, are put back after.

    Args:
        model (`torch.nn.Module`):
            The module that holds the dropout layers.
        predict (`Callable[[], torch.Tensor]`):
            Runs the model on fixed inputs and returns its logits `[..., classes]`; called once a sample. It must not
            change the model's mode.
        num_samples (`int`):
            Number of masks.
        seed (`int`):
            Seeds PyTorch's random numbers. The same seed and inputs give the same prediction.

    Returns:
        [`EnsemblePrediction`]: What the samples predict together, and how far they disagree.

    Raises:
        `ValueError`: If `num_samples` is below 1, or the model has no dropout layer that drops anything.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
    dropouts = [module for module in model.modules() if isinstance(module, _DropoutNd) and module.p > 0]
    if not dropouts:
        raise ValueError(
            "MC-dropout needs a dropout layer with p > 0, and the model has none: every sample would be the same. "
            "Train a model with dropout."
        )
    devices = range(torch.cuda.device_count())
    with evaluation_mode(model), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for dropout in dropouts:
            dropout.train()
        return combine_predictions(predict() for _ in range(num_samples))


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Context in which a model is in evaluation mode; afterwards each module has its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def ensemble_log_probs(late_phase: LatePhase, predict: Callable[[], Tensor]) -> Tensor:
    """
    Returns the log of the members' mean predicted probabilities.

    Before T0 the ensemble is the one member that exists. The last member stays active.

    Args:
        late_phase (`LatePhase`):
            The members.
        predict (`Callable[[], torch.Tensor]`):
            Runs the model on fixed inputs and returns its logits `[..., classes]`; called once a member.

    Returns:
        `torch.Tensor`: `[..., classes]`, float32 or wider. Only one such tensor is kept, whatever K is.
    """
    total, count = None, 0
    for logits in _member_logits(late_phase, predict):
        log_probs = _log_softmax(logits)
        total = log_probs if total is None else torch.logaddexp(total, log_probs)
        count += 1
    assert total is not None
    return total - math.log(count)


def negative_log_likelihood(logits: Tensor, labels: Tensor, shift: bool) -> Tensor:
    """
    Returns the mean negative log-likelihood in nats over all labels that are not -100 (0-d, float32 or wider).

    Args:
        logits (`torch.Tensor` of shape `[..., classes]`):
            Logits or log-probabilities.
        labels (`torch.Tensor` of shape `[...]`):
            Class indices.
        shift (`bool`):
            Whether position t predicts label t + 1, as in causal language models.
    """
    if shift:
        logits, labels = logits[..., :-1, :], labels[..., 1:]
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    return nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-100)


class MemberTable(dict[str, dict[str, float]]):
    """
    The metrics of each member (`"member_0"`, …), of the averaged model (`"average"`) and of the ensemble
    (`"ensemble"`: mean of the predicted probabilities). Prints as one table.
    """

    def __str__(self) -> str:
        columns = list(dict.fromkeys(key for row in self.values() for key in row))
        width = max(map(len, self), default=0)
        lines = [" ".join([" " * width, *(f"{column:>12}" for column in columns)])]
        for name, row in self.items():
            lines.append(" ".join([f"{name:<{width}}", *(f"{row.get(c, math.nan):12.6g}" for c in columns)]))
        return "\n".join(lines)

    def summary(self, prefix: str) -> dict[str, Any]:
        """Returns the few figures worth logging."""
        losses = torch.tensor(list(self._losses("member_")))
        return {
            f"{prefix}_member_loss_mean": losses.mean().item(),
            f"{prefix}_member_loss_std": losses.std(correction=0).item(),
            f"{prefix}_average_loss": self["average"]["loss"],
            f"{prefix}_ensemble_loss": self["ensemble"]["loss"],
        }

    def _losses(self, start: str) -> Iterator[float]:
        return (row["loss"] for name, row in self.items() if name.startswith(start))


def _member_logits(late_phase: LatePhase, predict: Callable[[], Tensor]) -> Iterator[Tensor]:
    """The logits of each member that exists: before T0 the others of the stack are idle."""
    for member in range(late_phase.num_members if late_phase.released else 1):
        late_phase.activate(member)
        yield predict()


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.float() if logits.dtype.itemsize < 4 else logits, -1)


def _entropy(log_probs: Tensor) -> Tensor:
    """In nats; a class of probability zero adds nothing."""
    terms: Tensor = torch.special.entr(log_probs.exp())
    return terms.sum(-1)
