"""Windows of one long text, for causal language models."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset


IGNORED_LABEL = -100


class TokenWindows(Dataset):
    """
    Windows of a text that has been tokenized.

    Window i holds the tokens i·T … (i+1)·T, T + 1 of them: models of transformers shift the labels themselves, so a
    window has T targets and neighbours share one token. Where the length does not divide, the last window is moved
    back to end with the text, and targets it would repeat are masked. Every token but the first is a target exactly
    once.

    Args:
        data (`np.ndarray`):
            The text: token ids `[N]`, of any integer type.
        window (`int`):
            T, the number of targets of a window.

    Raises:
        `ValueError`: If `window` is below 1, or the text is shorter than one window.

    Example:

    ```python
    >>> import numpy as np
    >>> from hf_latephase.data import TokenWindows

    >>> windows = TokenWindows(np.array([7, 8, 9, 7, 8, 9]), window=3)
    >>> windows[1]
    {'input_ids': tensor([9, 7, 8, 9]), 'labels': tensor([-100, -100,    8,    9])}
    ```
    """

    unit = "tokens"

    def __init__(self, data: np.ndarray, window: int) -> None:
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}.")
        if len(data) < window + 1:
            raise ValueError(
                f"The text has {len(data)} {self.unit}, but one window of {window} targets takes {window + 1}. "
                "Use a longer text or a shorter window."
            )
        self.data = data
        self.window = window

    def __len__(self) -> int:
        return -(-(len(self.data) - 1) // self.window)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        """Fetch a batch of windows at once; `DataLoader` prefers this to one call a window."""
        chosen = np.asarray(indices, dtype=np.int64)
        chosen = np.where(chosen < 0, chosen + len(self), chosen)
        if ((chosen < 0) | (chosen >= len(self))).any():
            raise IndexError(f"indices {list(indices)} reach beyond the {len(self)} windows.")
        first = chosen * self.window
        start = np.minimum(first, len(self.data) - 1 - self.window)
        positions = start[:, None] + np.arange(self.window + 1)
        ids = self.encode(self.data[positions])
        # Position `first` is never a target (the model drops label 0); what comes before it belongs to a neighbour.
        moved_back = (start < first)[:, None] & (positions <= first[:, None])
        labels = np.where(moved_back, IGNORED_LABEL, ids)
        return [
            {"input_ids": row, "labels": row_labels}
            for row, row_labels in zip(torch.from_numpy(ids), torch.from_numpy(labels), strict=True)
        ]

    def encode(self, data: np.ndarray) -> np.ndarray:
        """Returns the ids of some of the text, `int64`."""
        return data.astype(np.int64)
