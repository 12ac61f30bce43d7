"""How well a causal language model predicts a text, every symbol of it counted once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from hf_latephase.compat import state_name
from hf_latephase.data.enwik8 import EOS_ID, encode_bytes

from ..core.ensemble import evaluation_mode


# (input_ids [B, T], state of the chunk before or None) -> (log probabilities [B, T, V], state for the chunk after)
Forward = Callable[[torch.Tensor, Any], tuple[torch.Tensor, Any]]


@dataclass(frozen=True)
class TextScore:
    """
    The negative log-likelihood of a text.

    Args:
        nll_nats (`float`):
            Sum over all symbols, natural logarithm.
        num_characters (`int`):
            Number of symbols the sum runs over: the length of the text.
    """

    nll_nats: float
    num_characters: int

    @property
    def bits_per_character(self) -> float:
        """The score in bits, per symbol."""
        return self.nll_nats / self.num_characters / math.log(2)

    def metric_inputs(self) -> dict[str, list[Any]]:
        """What [`~hf_latephase.metrics.BitsPerCharacter`] takes, as one example."""
        return {"nll": [self.nll_nats], "characters": [self.num_characters]}


def score_bytes(
    model: nn.Module,
    ids: np.ndarray | torch.Tensor | bytes,
    window: int,
    stride: int | None = None,
    *,
    batch_size: int = 16,
    device: torch.device | str | None = None,
    forward: Forward | None = None,
    carries_state: bool | None = None,
    start_id: int = EOS_ID,
    disable_tqdm: bool = False,
) -> TextScore:
    """
    Score every symbol of a text exactly once.

    The first symbol is predicted from `start_id` alone, so that `num_characters == len(ids)` and figures of different
    windows are over the same symbols. (Training never shows that start: it costs a few bits in the whole text.)

    A model that carries state (recurrent) reads the text from end to end, batch 1, in chunks of `window`; a symbol is
    predicted from all before it, whatever the chunks. Any other model sees windows of `window` symbols, each starting
    `stride` after the one before; a window scores only the `stride` symbols at its end (the first window scores all of
    its own, the last, moved back to end with the text, what is left), so that all but the first few are predicted
    from at least `window - stride` symbols of context.

    Runs in evaluation mode and without gradients; each module's mode is put back after.

    Args:
        model (`nn.Module`):
            A causal language model of transformers, or anything called and answering like one. With `forward`: the
            module, or `nn.ModuleList`, that `forward` runs.
        ids (`np.ndarray`, `torch.Tensor` or `bytes`):
            The text: one sequence of ids, or raw bytes (`uint8`), which are encoded a batch of windows at a time.
        window (`int`):
            Symbols the model reads at once.
        stride (`int`, *optional*):
            Symbols a window scores, at most `window`. Smaller is slower and gives more context. `None`: `window`, the
            cheapest and most pessimistic. Without effect where state is carried.
        batch_size (`int`, defaults to 16):
            Windows run at once. Without effect where state is carried.
        device (`torch.device` or `str`, *optional*):
            Where the ids are sent. `None`: where the model's first parameter is. The model is not moved.
        forward (`Forward`, *optional*):
            Replaces the call of the model: `forward(input_ids, state) -> (log_probs, state)`. See [`mean_forward`].
        carries_state (`bool`, *optional*):
            Whether state goes from chunk to chunk. `None`: as [`is_recurrent`] says of the model.
        start_id (`int`, defaults to 1):
            The symbol before the first, by default the end of another text.
        disable_tqdm (`bool`, defaults to `False`):
            Whether to hide the progress bar.

    Returns:
        [`TextScore`]: Summed negative log-likelihood and number of symbols.

    Raises:
        `TypeError`: If `ids` are not integers.
        `ValueError`: If `ids` is empty or not one sequence, `window` or `batch_size` is below 1, `stride` is not in
            1 … `window`, or the model has fewer positions than `window`.

    Example:

    ```python
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from hf_latephase.data import BYTE_VOCAB_SIZE
    >>> from hf_latephase.analysis import score_bytes

    >>> ids = {"vocab_size": BYTE_VOCAB_SIZE, "bos_token_id": None, "eos_token_id": 1}
    >>> config = GPT2Config(n_positions=16, n_embd=8, n_layer=1, n_head=2, **ids)
    >>> score = score_bytes(GPT2LMHeadModel(config), b"How likely is this?", window=16, stride=8, disable_tqdm=True)
    >>> score.num_characters
    19
    >>> 7 < score.bits_per_character < 9  # log2(259) = 8.02: nothing learned yet
    True
    ```
    """
    symbols = _as_symbols(ids)
    stride = window if stride is None else stride
    recurrent = is_recurrent(model) if carries_state is None else carries_state
    _check_sizes(model, window, stride, batch_size, recurrent)
    device = _device_of(model) if device is None else torch.device(device)
    forward = model_forward(model, carries_state=recurrent) if forward is None else forward
    plan = _chunks(len(symbols), window) if recurrent else _windows(len(symbols), window, stride, batch_size)

    nll_nats, num_characters, state = 0.0, 0, None
    with (
        evaluation_mode(model),
        torch.inference_mode(),
        tqdm(total=len(symbols), desc="Scoring", unit="byte", disable=disable_tqdm) as progress,
    ):
        for positions, num_scored in plan:
            inputs, targets = _gather(symbols, positions, start_id)
            log_probs, new_state = forward(inputs.to(device), state)
            # Windows overlap: what one has seen must not leak into the next.
            state = new_state if recurrent else None
            nll = -log_probs.gather(-1, targets.to(device)[..., None])[..., 0]
            # float64 on the CPU: MPS has none, and a batch of sums is too few numbers to matter.
            scored = torch.arange(nll.shape[1]) >= nll.shape[1] - num_scored[:, None]
            nll_nats += nll.cpu().double()[scored].sum().item()
            num_characters += int(scored.sum())
            progress.update(int(scored.sum()))
    return TextScore(nll_nats, num_characters)


def model_forward(model: nn.Module, carries_state: bool = False) -> Forward:
    """
    The log probabilities of a causal language model, in float32 at least.

    Args:
        model (`nn.Module`):
            Called as `model(input_ids=..., use_cache=...)`, answers with `logits`. Where state is carried also given
            `cache`, or `past_key_values` if that is what its `forward` takes, and answered with the same.
        carries_state (`bool`, defaults to `False`):
            Whether to give back the state, and take it up.

    Returns:
        `Forward`: For [`score_bytes`] and [`mean_forward`].
    """
    name = state_name(model)

    def forward(input_ids: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        # An argument is passed only where it means something: a model without a cache need not know the name.
        memory = {name: state} if carries_state else {}
        output = model(input_ids=input_ids, use_cache=carries_state, **memory)
        logits = output.logits.to(torch.promote_types(output.logits.dtype, torch.float32))
        return logits.log_softmax(-1), getattr(output, name) if carries_state else None

    return forward


def mean_forward(forwards: Sequence[Forward]) -> Forward:
    """
    The ensemble that averages its members' probabilities.

    Args:
        forwards (`Sequence[Forward]`):
            One per member. They may run one model, if each first makes its own member the active one.

    Returns:
        `Forward`: The log of the mean probability. Its state is the list of the members' states.

    Raises:
        `ValueError`: If there are no members.

    Example:

    ```python
    >>> import torch
    >>> from hf_latephase.models import LSTMForCausalLM, LSTMLMConfig
    >>> from hf_latephase.analysis import mean_forward, model_forward, score_bytes

    >>> config = LSTMLMConfig(hidden_size=16)
    >>> members = torch.nn.ModuleList(LSTMForCausalLM(config) for _ in range(3))
    >>> ensemble = mean_forward([model_forward(member, carries_state=True) for member in members])
    >>> settings = {"window": 8, "carries_state": True, "disable_tqdm": True}
    >>> score_bytes(members, b"How likely?", forward=ensemble, **settings).num_characters
    11
    ```
    """
    members = list(forwards)
    if not members:
        raise ValueError("An ensemble needs at least one member.")

    def forward(input_ids: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        states = [None] * len(members) if state is None else list(state)
        total, states[0] = members[0](input_ids, states[0])
        # One at a time: K members take the memory of two.
        for index, member in enumerate(members[1:], start=1):
            log_probs, states[index] = member(input_ids, states[index])
            total = torch.logaddexp(total, log_probs)
        return total - math.log(len(members)), states

    return forward


def is_recurrent(model: nn.Module) -> bool:
    """
    Whether a model is recurrent: its state stands for everything it has read, and can be fed back without end.

    Args:
        model (`nn.Module`):
            Says so itself with an attribute `carries_state`; otherwise `LSTMForCausalLM` does and others do not.

    Returns:
        `bool`: The answer. Caches of attention do not count: they grow with the text.
    """
    declared = getattr(model, "carries_state", None)
    if declared is not None:
        return bool(declared)
    return getattr(getattr(model, "config", None), "model_type", None) == "lstm_lm"


def _as_symbols(ids: np.ndarray | torch.Tensor | bytes) -> np.ndarray:
    """One sequence as an array, `uint8` for raw bytes."""
    if isinstance(ids, bytes):
        symbols = np.frombuffer(ids, dtype=np.uint8)
    else:
        symbols = ids.numpy(force=True) if isinstance(ids, torch.Tensor) else np.asarray(ids)
    if symbols.ndim != 1 or len(symbols) == 0:
        raise ValueError(f"ids must be one sequence with at least one symbol, but have the shape {symbols.shape}.")
    if not np.issubdtype(symbols.dtype, np.integer):
        raise TypeError(f"ids must be integers, or bytes as uint8, but are {symbols.dtype}.")
    return symbols


def _check_sizes(model: nn.Module, window: int, stride: int, batch_size: int, recurrent: bool) -> None:
    if window < 1 or batch_size < 1:
        raise ValueError(f"window and batch_size must be at least 1, got {window} and {batch_size}.")
    if not 1 <= stride <= window:
        raise ValueError(
            f"stride must be between 1 and the window of {window}, got {stride}: symbols would be missed."
        )
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not recurrent and isinstance(limit, int) and 0 < limit < window:
        raise ValueError(f"The model has {limit} positions, but the window is {window}. Use a shorter window.")


def _device_of(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _chunks(length: int, window: int) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Consecutive stretches, each scored whole: positions [1, T] and the number scored [1]."""
    for start in range(0, length, window):
        positions = np.arange(start, min(start + window, length))[None]
        yield positions, torch.tensor([positions.shape[1]])


def _windows(length: int, window: int, stride: int, batch_size: int) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Batches of overlapping windows: positions [B, T] and how many at the end of each are scored [B]."""
    window = min(window, length)
    count = 1 + -(-(length - window) // stride)
    for first in range(0, count, batch_size):
        # Window w ends before position window + w * stride; the last is moved back so that all have one length.
        index = np.arange(first, min(first + batch_size, count))
        ends = np.minimum(window + index * stride, length)
        previous_ends = np.where(index > 0, window + (index - 1) * stride, 0)
        yield ends[:, None] + np.arange(-window, 0), torch.from_numpy(ends - previous_ends)


def _gather(symbols: np.ndarray, positions: np.ndarray, start_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets at the positions, and as inputs the symbol before each."""
    targets, inputs = (_encoded(symbols[at]) for at in (positions, np.maximum(positions - 1, 0)))
    inputs[positions == 0] = start_id
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def _encoded(symbols: np.ndarray) -> np.ndarray:
    return encode_bytes(symbols) if symbols.dtype == np.uint8 else symbols.astype(np.int64)
