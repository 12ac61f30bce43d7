"""Text as bytes: enwik8, a file of one's own, or the text that every Python installation holds."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from datasets import DownloadConfig, DownloadManager

from hf_latephase.data.windows import TokenWindows


# The ids of transformers' ByT5Tokenizer(extra_ids=0): 0 pad, 1 eos, 2 unk, then the 256 bytes.
PAD_ID = 0
EOS_ID = 1
UNK_ID = 2
BYTE_OFFSET = 3
BYTE_VOCAB_SIZE = 256 + BYTE_OFFSET

# The Hub's LTCB/enwik8 is a loading script around this archive, and datasets no longer runs scripts.
ENWIK8_URL = "https://mattmahoney.net/dc/enwik8.zip"
ENWIK8_SIZE = 100_000_000
ENWIK8_SHA1 = "57b8363b814821dc9d47aa4d41f58733519076b2"


class ByteSplits(NamedTuple):
    """Three consecutive stretches of one text, each a `uint8` array (views: nothing is copied)."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def encode_bytes(data: bytes | np.ndarray) -> np.ndarray:
    """
    Ids of raw bytes: id = byte + 3, as in [`~transformers.ByT5Tokenizer`].

    The tokenizer reads special tokens such as `</s>` out of the text first; here they are bytes like all others.

    Args:
        data (`bytes` or `np.ndarray`):
            Raw bytes, or an array of `uint8` of any shape.

    Returns:
        `np.ndarray`: The ids as `int64`, eight times as large as `data`: for a long text encode a window at a time,
        as [`ByteWindows`] and [`~hf_latephase.analysis.score_bytes`] do.

    Raises:
        `TypeError`: If an array is not `uint8`: it may hold ids already.

    Example:

    ```python
    >>> from hf_latephase.data import decode_ids, encode_bytes

    >>> encode_bytes(b"abc")
    array([100, 101, 102])
    >>> decode_ids(encode_bytes("naïve".encode()))
    'naïve'
    ```
    """
    symbols = data if isinstance(data, np.ndarray) else np.frombuffer(data, dtype=np.uint8)
    if symbols.dtype != np.uint8:
        raise TypeError(f"encode_bytes takes bytes, but the array holds {symbols.dtype}. Pass an array of uint8.")
    # np.add keeps the subclass np.memmap, whose pages these are not.
    return np.add(symbols, BYTE_OFFSET, dtype=np.int64).view(np.ndarray)


def decode_ids(ids: np.ndarray | torch.Tensor | Sequence[int]) -> str:
    """
    Text of ids. Ids that stand for no byte (pad, eos, unk, sentinels) are left out.

    Args:
        ids (`np.ndarray`, `torch.Tensor` or `list[int]`):
            One sequence of ids.

    Returns:
        `str`: The text; bytes that are not UTF-8 (a character cut in half, say) show as U+FFFD.
    """
    if isinstance(ids, torch.Tensor):
        ids = ids.numpy(force=True)
    values = np.asarray(ids, dtype=np.int64)
    is_byte = (values >= BYTE_OFFSET) & (values < BYTE_VOCAB_SIZE)
    return (values[is_byte] - BYTE_OFFSET).astype(np.uint8).tobytes().decode("utf-8", errors="replace")


def split_bytes(data: np.ndarray) -> ByteSplits:
    """
    Split a text as enwik8 is split: the first 90 % train, the next 5 % validation, the last 5 % test.

    Args:
        data (`np.ndarray`):
            The text as `uint8`.

    Returns:
        [`ByteSplits`]: Views of `data`.

    Raises:
        `ValueError`: If a split would be empty.
    """
    first, second = len(data) * 90 // 100, len(data) * 95 // 100
    splits = ByteSplits(data[:first], data[first:second], data[second:])
    if not all(len(split) for split in splits):
        raise ValueError(f"A text of {len(data)} bytes leaves a split empty at 90/5/5. Use 20 bytes or more.")
    return splits


def load_bytes(
    data_file: str | os.PathLike[str] | None = None,
    dataset: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> ByteSplits:
    """
    Load a text as bytes, split 90/5/5. Files are mapped into memory, not read.

    Args:
        data_file (`str`, *optional*):
            A local file; any bytes will do.
        dataset (`str`, *optional*):
            `"enwik8"`: the 100,000,000 bytes of the Large Text Compression Benchmark, downloaded once, verified, and
            split 90M/5M/5M. `None` with no `data_file`: Python's language reference as CPython ships it (about 0.5 MB
            that differ a little from version to version), which needs no network.
        cache_dir (`str`, *optional*):
            Where the download is kept. `None`: the cache of `datasets`.

    Returns:
        [`ByteSplits`]: The `train`, `validation` and `test` bytes.

    Raises:
        `ConnectionError`: If enwik8 cannot be downloaded.
        `FileNotFoundError`: If `data_file` is not a file.
        `OSError`: If the download is not enwik8.
        `ValueError`: If both `data_file` and `dataset` are given, `dataset` is unknown, or the text is too short.

    Example:

    ```python
    >>> from hf_latephase.data import load_bytes

    >>> splits = load_bytes()
    >>> bytes(splits.train[:22])
    b'The "assert" statement'
    ```
    """
    if data_file is not None and dataset is not None:
        raise ValueError(f"data_file={str(data_file)!r} and dataset={dataset!r} are both given. Name one text.")
    if data_file is not None:
        return split_bytes(_map_file(Path(data_file)))
    if dataset == "enwik8":
        return split_bytes(_verified_enwik8(_download_enwik8(cache_dir)))
    if dataset is not None:
        raise ValueError(f"Unknown dataset {dataset!r}. Use 'enwik8', or name a file of your own with `--data_file`.")
    return split_bytes(np.frombuffer(_language_reference(), dtype=np.uint8))


class ByteWindows(TokenWindows):
    """
    [`TokenWindows`] of raw bytes.

    Ids are made when a window is asked for: the data set takes no memory beyond the bytes it looks at.

    Args:
        data (`np.ndarray`):
            The text as `uint8`, a memory-mapped file for example.
        window (`int`):
            T, the number of targets of a window.

    Raises:
        `TypeError`: If `data` is not `uint8`.
        `ValueError`: If `window` is below 1, or the text is shorter than one window.

    Example:

    ```python
    >>> import numpy as np
    >>> from hf_latephase.data import ByteWindows

    >>> windows = ByteWindows(np.frombuffer(b"abcdef", dtype=np.uint8), window=3)
    >>> len(windows)
    2
    >>> windows[1]
    {'input_ids': tensor([102, 103, 104, 105]), 'labels': tensor([-100, -100,  104,  105])}
    ```
    """

    unit = "bytes"

    def __init__(self, data: np.ndarray, window: int) -> None:
        if data.dtype != np.uint8:
            raise TypeError(f"ByteWindows takes bytes, but the array holds {data.dtype}. Pass an array of uint8.")
        super().__init__(data, window)

    def encode(self, data: np.ndarray) -> np.ndarray:
        """Returns the ids of some bytes, `int64`."""
        return encode_bytes(data)


def _map_file(path: Path) -> np.ndarray:
    """The bytes of a file, mapped into memory."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file. Check the path given as `--data_file`.")
    # An empty file cannot be mapped; numpy's message would not say which one it was.
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty. Give a file with at least 20 bytes of text as `--data_file`.")
    return np.memmap(path, dtype=np.uint8, mode="r")


def _download_enwik8(cache_dir: str | os.PathLike[str] | None) -> Path:
    """Download and unpack enwik8 into the cache of `datasets`, or find it there."""
    # The file never changes and is verified below: without its ETag a cached copy needs no network.
    config = DownloadConfig(cache_dir=cache_dir, use_etag=False)
    try:
        folder = DownloadManager(dataset_name="enwik8", download_config=config).download_and_extract(ENWIK8_URL)
    except Exception as error:  # aiohttp, fsspec and zipfile have no base class of errors in common
        raise ConnectionError(
            f"enwik8 could not be downloaded from {ENWIK8_URL} ({type(error).__name__}: {error}). "
            "Without network access, name a local copy, or any other text, with `--data_file`."
        ) from error
    return Path(folder) / "enwik8"


def _verified_enwik8(path: Path) -> np.ndarray:
    """The bytes of enwik8, once their number and checksum are right."""
    if not path.is_file():
        raise OSError(f"The archive from {ENWIK8_URL} holds no enwik8. Name a local copy with `--data_file`.")
    remedy = f"Delete {path.parent} and the archive beside it to download again, or name a copy with `--data_file`."
    if path.stat().st_size != ENWIK8_SIZE:
        raise OSError(f"{path} has {path.stat().st_size} bytes, not the {ENWIK8_SIZE} of enwik8. {remedy}")
    data = _map_file(path)
    # Not against malice: the published list has this sum, and it tells a damaged copy from a whole one.
    checksum = hashlib.sha1(data.data, usedforsecurity=False).hexdigest()
    if checksum != ENWIK8_SHA1:
        raise OSError(f"{path} has the SHA-1 {checksum}, not the {ENWIK8_SHA1} of enwik8. {remedy}")
    return data


def _language_reference() -> bytes:
    """Python's language reference, the text behind `help()`."""
    # Imported here: half a megabyte of strings that only this text needs.
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics)).encode()
