"""Opening encoded images: one by one, all of them, or only far enough to see that they can be opened."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import PIL.Image
import torch
from datasets import Dataset, Image
from torch import Tensor
from tqdm.auto import tqdm


END_OF_JPEG = b"\xff\xd9"
# Some writers append a few bytes to the end of a JPEG.
TAIL = 4096
# Fewer images are done before a progress bar would be read.
WORTH_A_BAR = 2000


def decode_image(record: Mapping[str, Any], name: str) -> PIL.Image.Image:
    """
    Open one image.

    Args:
        record (`dict`):
            Its `bytes` or its `path`, as a split of [`load_images`] holds them.
        name (`str`):
            What to call it in a message, if it has no path.

    Returns:
        `PIL.Image.Image`: The image in RGB, turned as its EXIF data say.

    Raises:
        `ValueError`: If it cannot be opened; the message names it.
    """
    try:
        return Image(mode="RGB").decode_example(dict(record))
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, ValueError, zlib.error, ...
        where = record.get("path") or name
        raise ValueError(
            f"The image {where} ({name}) cannot be opened ({type(error).__name__}: {error}). Replace it, or take it "
            "out."
        ) from error


def decode_images(split: Dataset, image_column: str, size: int, name: str, show_progress: bool = True) -> Tensor:
    """
    Decode all images of a split, for data sets that fit into memory (50,000 images of 32 x 32 take 154 MB).

    Args:
        split (`datasets.Dataset`):
            The images, undecoded.
        image_column (`str`):
            Their column.
        size (`int`):
            Height and width in pixels. Others are resized (bilinear, shorter side first) and cropped to the centre.
        name (`str`):
            What to call the split in messages.
        show_progress (`bool`, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        `torch.Tensor`: `uint8` `[N, 3, size, size]`.
    """
    images = torch.empty(len(split), 3, size, size, dtype=torch.uint8)
    for index, record in _records(split, image_column, f"Decoding {name}", show_progress):
        image = _fit(decode_image(record, f"row {index} of {name}"), size)
        images[index] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return images


def check_files(split: Dataset, image_column: str, name: str, show_progress: bool = True) -> None:
    """
    Look into every image of a split. A JPEG that begins and ends as it should is not decoded; all others are.

    Args:
        split (`datasets.Dataset`):
            The images, undecoded.
        image_column (`str`):
            Their column.
        name (`str`):
            What to call the split in messages.
        show_progress (`bool`, defaults to `True`):
            Whether to show a progress bar.

    Raises:
        `ValueError`: If one cannot be opened; the message names it.
    """
    for index, record in _records(split, image_column, f"Checking {name}", show_progress):
        if not _is_whole_jpeg(record):
            decode_image(record, f"row {index} of {name}")


def _records(
    split: Dataset, column: str, description: str, show_progress: bool
) -> Iterator[tuple[int, dict[str, Any]]]:
    images = split.select_columns([column])
    hidden = not show_progress or len(split) < WORTH_A_BAR
    for index, row in enumerate(tqdm(images, desc=description, disable=hidden, unit=" images")):
        yield index, row[column]


def _is_whole_jpeg(record: Mapping[str, Any]) -> bool:
    """Whether it is a JPEG whose header can be read and that has not been cut off."""
    try:
        path, content = record["path"], record["bytes"]
        with contextlib.closing(io.BytesIO(content) if content is not None else io.FileIO(path)) as file:
            is_jpeg = PIL.Image.open(file).format == "JPEG"
            file.seek(0, io.SEEK_END)
            file.seek(max(0, file.tell() - TAIL))
            return is_jpeg and END_OF_JPEG in file.read()
    except Exception:  # whatever it is, decoding will tell
        return False


def _fit(image: PIL.Image.Image, size: int) -> PIL.Image.Image:
    width, height = image.size
    if (width, height) == (size, size):
        return image
    scale = size / min(width, height)
    width, height = max(size, round(width * scale)), max(size, round(height * scale))
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), PIL.Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + size, top + size))
