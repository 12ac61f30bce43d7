"""Images as a model takes them: normalised, and for training cropped, flipped and cut out at random by torchvision."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from datasets import Dataset
from torch import Tensor
from torchvision.transforms import v2
from transformers import TrainerCallback

from .decoding import decode_image


# Mean and standard deviation of ImageNet's channels, on which its classifiers of all libraries were trained.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class RandomlyDrawn(torch.utils.data.Dataset):
    """
    A data set whose random draws depend on a seed, the epoch and the example only.

    So every method sees the same augmented images, whatever random numbers its model takes, and training that is
    resumed goes on to the bit although the loader reads ahead. Call [`~RandomlyDrawn.set_epoch`] before each epoch, or
    give a Trainer the callback [`EpochDraws`].

    Args:
        seed (`int`):
            The seed of the draws.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        # Shared, so that workers which outlive an epoch see the next.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._drawn_for: int | None = None  # the epoch that draws were made for

    def set_epoch(self, epoch: int) -> None:
        """Draws anew for an epoch, counted from 0."""
        self._epoch.fill_(epoch)

    def reseeded(self, seed: int) -> Self:
        """Returns the same data with draws of another seed, at epoch 0."""
        other = copy.copy(self)
        RandomlyDrawn.__init__(other, seed)
        return other

    def epoch_generator(self) -> torch.Generator:
        """Returns the generator of this epoch's draws, at its beginning."""
        # Two generators in a row: seeds and epochs that add up to the same must not draw the same.
        seeds = torch.Generator().manual_seed(self._seed)
        epochs = torch.randint(2**63 - 1, (int(self._epoch) + 1,), generator=seeds)
        return torch.Generator().manual_seed(int(epochs[-1]))


class EpochDraws(TrainerCallback):
    """Tells a training set that is a [`RandomlyDrawn`] which epoch begins."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sets the epoch; a resumed run begins inside of one."""
        dataset = getattr(kwargs.get("train_dataloader"), "dataset", None)
        if isinstance(dataset, RandomlyDrawn):
            dataset.set_epoch(int(state.epoch or 0))


class DecodedImages(RandomlyDrawn):
    """
    Small images decoded once, normalised and augmented a batch at a time.

    An example is `{"pixel_values": float32 [3, H, W], "labels": int64 []}`. `DataLoader` fetches batches through
    `__getitems__`, which is many times faster than one image after the other.

    Args:
        images (`torch.Tensor`):
            `uint8` `[N, 3, H, W]`, see [`~hf_latephase.data.decoding.decode_images`].
        labels (`torch.Tensor`, *optional*):
            `int64` `[N]`. `None`: the examples have no labels.
        mean (`Sequence[float]`):
            Subtracted from the channels, on a scale of 0 to 1.
        std (`Sequence[float]`):
            Divides the channels.
        padding (`int`, defaults to 0):
            Random crops of the original size, after so many black pixels were put on each side.
        flip (`bool`, defaults to `False`):
            Whether to mirror every other image, drawn at random.
        cutout (`int`, defaults to 0):
            Side in pixels of the square that is set to zero after normalisation. Its centre is any pixel of the image,
            so it may reach over the border (DeVries & Taylor, 2017).
        seed (`int`, defaults to 0):
            The seed of the draws.

    Raises:
        `TypeError`: If the images are not `uint8`.
        `ValueError`: If images and labels are not equally many.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | None,
        mean: Sequence[float],
        std: Sequence[float],
        padding: int = 0,
        flip: bool = False,
        cutout: int = 0,
        seed: int = 0,
    ) -> None:
        if images.dtype != torch.uint8:
            raise TypeError(f"DecodedImages takes bytes, but the images are {images.dtype}. Pass a tensor of uint8.")
        if labels is not None and len(labels) != len(images):
            raise ValueError(f"There are {len(images)} images, but {len(labels)} labels. Pass one label an image.")
        super().__init__(seed)
        self.images = images
        self.labels = labels
        self.mean, self.std = list(mean), list(std)
        self.padding, self.flip, self.cutout = padding, flip, cutout

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """Fetch a batch of images at once."""
        chosen = torch.as_tensor(list(indices))
        rows = self.pixel_values(chosen).unbind()
        if self.labels is None:
            return [{"pixel_values": row} for row in rows]
        return [{"pixel_values": row, "labels": label} for row, label in zip(rows, self.labels[chosen], strict=True)]

    def pixel_values(self, indices: Tensor) -> Tensor:
        """Returns the images as the model takes them, `float32` `[B, 3, H, W]`."""
        self._draw()
        images = self.images[indices]
        if self.padding:
            images = self._crop(images, self._corners[indices])
        if self.flip:
            images = torch.where(
                self._flips[indices][:, None, None, None], v2.functional.horizontal_flip(images), images
            )
        pixels = v2.functional.normalize(
            v2.functional.to_dtype(images, torch.float32, scale=True), self.mean, self.std
        )
        return cut_out(pixels, self._centres[indices], self.cutout) if self.cutout else pixels

    def _draw(self) -> None:
        """Draws for all images at once, on the first use in an epoch."""
        if self._drawn_for == int(self._epoch):
            return
        generator, (height, width) = self.epoch_generator(), self.images.shape[-2:]
        self._corners = torch.randint(2 * self.padding + 1, (len(self), 2), generator=generator)
        self._flips = torch.rand(len(self), generator=generator) < 0.5
        rows = torch.randint(height, (len(self), 1), generator=generator)
        columns = torch.randint(width, (len(self), 1), generator=generator)
        self._centres = torch.cat([rows, columns], dim=1)
        self._drawn_for = int(self._epoch)

    def _crop(self, images: Tensor, corners: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        padded = v2.functional.pad(images, [self.padding])
        crops = [
            image[:, top : top + height, left : left + width]
            for image, (top, left) in zip(padded, corners.tolist(), strict=True)
        ]
        return torch.stack(crops)


class EncodedImages(RandomlyDrawn):
    """
    Images decoded when they are asked for, for data sets that do not fit into memory.

    An example is `{"pixel_values": float32 [3, H, W], "labels": int64 []}`.

    Args:
        split (`datasets.Dataset`):
            The images, undecoded.
        image_column (`str`):
            Their column.
        label_column (`str`):
            The column of labels.
        transform (`Callable[[PIL.Image.Image], torch.Tensor]`):
            What makes an image into `pixel_values`, by random numbers of torch's default generator if by any.
        name (`str`):
            What to call the split if an image cannot be opened.
        seed (`int`, defaults to 0):
            The seed of the draws.
    """

    def __init__(
        self,
        split: Dataset,
        image_column: str,
        label_column: str,
        transform: Callable[[Any], Tensor],
        name: str,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        self.split, self.image_column = split, image_column
        self.labels = torch.as_tensor(split[label_column][:], dtype=torch.int64)
        self.transform = transform
        self.name = name

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self._drawn_for != int(self._epoch):
            self._seeds = torch.randint(2**63 - 1, (len(self),), generator=self.epoch_generator())
            self._drawn_for = int(self._epoch)
        row = self.split[index]
        image = decode_image(row[self.image_column], f"row {index} of {self.name}")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(self._seeds[index]))
            return {"pixel_values": self.transform(image), "labels": self.labels[index]}


def cut_out(pixels: Tensor, centres: Tensor, size: int) -> Tensor:
    """
    Set a square of each image to zero; the part of it outside of the image is lost.

    Args:
        pixels (`torch.Tensor`):
            Normalised images `[B, C, H, W]`.
        centres (`torch.Tensor`):
            Row and column of each square's centre, `int64` `[B, 2]`. Of an even side the pixel after the middle.
        size (`int`):
            The side in pixels.

    Returns:
        `torch.Tensor`: `[B, C, H, W]`.
    """
    first = centres - size // 2
    rows, columns = (
        (torch.arange(length) >= first[:, axis, None]) & (torch.arange(length) < first[:, axis, None] + size)
        for axis, length in enumerate(pixels.shape[-2:])
    )
    return pixels.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)


def channel_statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """
    Mean and standard deviation of each channel over all images and pixels, on a scale of 0 to 1.

    Args:
        images (`torch.Tensor`):
            `uint8` `[N, C, H, W]`.

    Returns:
        `tuple[list[float], list[float]]`: The means and the standard deviations. Of a channel without contrast the
        latter is one grey level, so that it can divide.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in images.unbind(1):
        # Counting grey levels is exact, and takes no copy of the images as floats.
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = (share * values).sum()
        means.append(mean.item())
        deviations.append(max((share * (values - mean).square()).sum().sqrt().item(), 1 / 255))
    return means, deviations


def imagenet_transform(train: bool, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> Any:
    """
    The usual transform of ImageNet: random resized crop to 224 and flip; or resize to 256 and crop 224 at the centre.

    Args:
        train (`bool`):
            Whether to draw at random.
        mean (`Sequence[float]`):
            Subtracted from the channels, on a scale of 0 to 1.
        std (`Sequence[float]`):
            Divides the channels.

    Returns:
        `torchvision.transforms.v2.Compose`: From a PIL image to `float32` `[3, 224, 224]`.
    """
    view = [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()] if train else [v2.Resize(256), v2.CenterCrop(224)]
    return v2.Compose([*view, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
