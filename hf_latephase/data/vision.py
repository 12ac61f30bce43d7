"""Labelled images: a data set of the Hub, a folder of one's own, or the digits that scikit-learn holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, load_dataset
from torch import Tensor

from .decoding import check_files


DIGITS = "digits"
PHOTOS = "photos"
# scikit-learn's digits come writer by writer: these last ones were drawn by others than the rest.
DIGITS_TEST = 360
TEST_SPLITS = ("test", "validation", "valid", "val")
VALIDATION_SPLITS = ("validation", "valid", "val")
# Where a data set has several labels, the one its benchmark is about.
PREFERRED_LABELS = ("label", "labels", "fine_label")


@dataclass(frozen=True)
class ImageSplits:
    """
    The splits of a labelled image data set.

    Attributes:
        train (`datasets.Dataset`): To learn from. Images are held undecoded;
            [`~hf_latephase.data.decoding.decode_image`] opens one.
        validation (`datasets.Dataset`, *optional*): To choose by; `None` if there is none.
        test (`datasets.Dataset`): To report.
        image_column (`str`): Name of the column of images.
        label_column (`str`): Name of the column of labels, integers from 0 on.
        class_names (`list[str]`): Names of the classes, by label.
    """

    train: Dataset
    validation: Dataset | None
    test: Dataset
    image_column: str
    label_column: str
    class_names: list[str]

    def labels(self, split: Dataset) -> Tensor:
        """Returns the labels of a split, `int64` `[N]`."""
        return torch.from_numpy(_labels(split, self.label_column))

    def named(self) -> dict[str, Dataset]:
        """Returns the splits that there are by name."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in splits.items() if split is not None}


def load_images(
    dataset: str | None = None,
    validation_share: float = 0.0,
    seed: int = 0,
    label_column: str | None = None,
    cache_dir: str | None = None,
    show_progress: bool = True,
) -> ImageSplits:
    """
    Load a labelled image data set and check it. Every image file of a local folder is looked into.

    Args:
        dataset (`str`, *optional*):
            A local folder, of parquet files or with one folder of images a class (`train/cat/1.png`), or a data set of
            the Hub, `uoft-cs/cifar10`, with its configuration after a colon if it has several. `None` or `"digits"`:
            scikit-learn's 1,797 digits of 8 x 8 pixels, which need no network; the last 360 are the test split.
        validation_share (`float`, defaults to 0.0):
            Share of the training split to hold out, the same share of each class, as the validation split. With 0 the
            data set's own is taken, if it has one besides a test split.
        seed (`int`, defaults to 0):
            Chooses what is held out.
        label_column (`str`, *optional*):
            The column of labels. `None`: the only one, or CIFAR-100's `fine_label`.
        cache_dir (`str`, *optional*):
            Where downloads are kept. `None`: the cache of `datasets`.
        show_progress (`bool`, defaults to `True`):
            Whether to show a progress bar while files are checked.

    Returns:
        [`ImageSplits`]: The splits, their columns and classes. Where labels of the test split are unknown (ImageNet),
        the validation split is the test split.

    Raises:
        `ConnectionError`: If the data set is no folder and cannot be had from the Hub.
        `FileNotFoundError`: If a local folder is missing.
        `ValueError`: If there are no images, fewer than two classes, unknown labels, splits that disagree about the
            classes, an image that cannot be opened, or a `validation_share` that leaves nothing.

    Example:

    ```python
    >>> from hf_latephase.data.vision import load_images

    >>> splits = load_images()
    >>> len(splits.train), len(splits.test), splits.class_names[:3]
    (1437, 360, ['0', '1', '2'])
    ```
    """
    if not 0 <= validation_share < 1:
        raise ValueError(f"validation_share must be at least 0 and below 1, got {validation_share}.")
    source, name = _load(dataset, cache_dir), dataset or DIGITS
    image_column = _image_column(source, name)
    source = {key: split.cast_column(image_column, Image(decode=False)) for key, split in source.items()}
    for key, split in source.items():
        if len(split) == 0:
            raise ValueError(f"The split {key!r} of {name} is empty. Put images there, or take the split away.")
    column = _label_column(next(iter(source.values())), name, label_column)
    train, validation, test = _assign_splits(source, name, column)
    class_names = _class_names(train, name, column)
    for key, split in (("validation", validation), ("test", test)):
        if split is not None:
            _check_classes(train, split, key, name, column, class_names)
    if validation_share:
        train, validation = _hold_out(train, column, validation_share, seed, name)
    splits = ImageSplits(train, validation, test, image_column, column, class_names)
    if _is_folder(dataset):
        for key, split in splits.named().items():
            check_files(split, image_column, f"{name}, split {key!r}", show_progress)
    return splits


def load_unlabelled(dataset: str, cache_dir: str | None = None) -> tuple[Dataset, str]:
    """
    Load the images of one split, for out-of-distribution data: the test split, else validation, else the first.

    Args:
        dataset (`str`):
            As in [`load_images`], or `"photos"`: 520 crops of 32 x 32 pixels of scikit-learn's two sample photographs.
        cache_dir (`str`, *optional*):
            Where downloads are kept.

    Returns:
        `tuple[datasets.Dataset, str]`: The images, undecoded, and the name of their column.
    """
    source = DatasetDict(test=_photos()) if dataset == PHOTOS else _load(dataset, cache_dir)
    split = next((source[name] for name in TEST_SPLITS if name in source), next(iter(source.values())))
    column = _image_column(source, dataset)
    if len(split) == 0:
        raise ValueError(f"{dataset} holds no images to test on. Put some there, or name another data set.")
    return split.cast_column(column, Image(decode=False)), column


def _load(dataset: str | None, cache_dir: str | None) -> DatasetDict:
    if dataset is None or dataset == DIGITS:
        return _digits()
    path = Path(dataset).expanduser()
    if _is_folder(dataset):
        return _load_folder(path, cache_dir)
    if path.is_file():
        raise ValueError(f"{dataset} is a file. Name the folder that holds it, or a data set of the Hub.")
    if path.is_absolute() or dataset.startswith((".", "~")):
        raise FileNotFoundError(f"The folder {dataset} does not exist. Check the path.")
    name, _, configuration = dataset.partition(":")
    try:
        loaded = load_dataset(name, configuration or None, cache_dir=cache_dir)
    except Exception as error:  # network, Hub, archives and parsers have no base class of errors in common
        raise ConnectionError(
            f"{dataset!r} is neither a folder here nor could it be loaded from the Hub ({type(error).__name__}: "
            f"{error}). Check the name (owner/name, or owner/name:configuration), or name a local folder."
        ) from error
    return loaded


def _is_folder(dataset: str | None) -> bool:
    return dataset is not None and Path(dataset).expanduser().is_dir()


def _load_folder(path: Path, cache_dir: str | None) -> DatasetDict:
    holds_parquet = next(path.rglob("*.parquet"), None) is not None
    if not holds_parquet and not any(_is_image_name(file) for file in path.rglob("*")):
        raise ValueError(
            f"The folder {path} holds neither parquet files nor images. Give it train and test splits: train.parquet "
            "and test.parquet, or train/CLASS/*.png and test/CLASS/*.png."
        )
    # drop_labels=False: a folder with one class would lose its labels, and the message about it its cause.
    options: dict[str, Any] = {} if holds_parquet else {"drop_labels": False}
    try:
        return load_dataset(
            "parquet" if holds_parquet else "imagefolder", data_dir=str(path), cache_dir=cache_dir, **options
        )
    except Exception as error:  # pyarrow, fsspec and the builders have no base class of errors in common
        cause = error.__cause__ or error
        raise ValueError(
            f"The folder {path} cannot be read ({type(cause).__name__}: {cause}). Put at least one image "
            "in each split; all parquet files must hold the same columns, all images lie in one folder a class."
        ) from error


def _is_image_name(file: Path) -> bool:
    return file.suffix.lower() in PIL.Image.registered_extensions() and file.is_file()


def _image_column(source: DatasetDict, name: str) -> str:
    features = next(iter(source.values())).features
    # Parquet files that `datasets` did not write hold images as plain structs.
    columns = [
        column
        for column, feature in features.items()
        if isinstance(feature, Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})
    ]
    if len(columns) != 1:
        found = f"{len(columns)} columns of images {columns}" if columns else "no column of images"
        raise ValueError(f"{name} has {found}, among its columns {list(features)}; exactly one is needed.")
    return columns[0]


def _label_column(split: Dataset, name: str, asked_for: str | None) -> str:
    features = split.features
    candidates = [column for column, feature in features.items() if isinstance(feature, ClassLabel)]
    candidates = candidates or [
        column
        for column in PREFERRED_LABELS
        if isinstance(features.get(column), Value) and features[column].dtype.startswith(("int", "uint"))
    ]
    if asked_for is not None:
        if asked_for not in features:
            raise ValueError(f"{name} has no column {asked_for!r}. Its columns: {list(features)}.")
        return asked_for
    if len(candidates) > 1:
        candidates = [column for column in PREFERRED_LABELS if column in candidates][:1] or candidates
    if len(candidates) != 1:
        raise ValueError(
            f"{name} has {len(candidates)} columns of class labels {candidates} among {list(features)}. Name one with "
            "`label_column`; labels must be integers."
        )
    return candidates[0]


def _assign_splits(source: Mapping[str, Dataset], name: str, column: str) -> tuple[Dataset, Dataset | None, Dataset]:
    labelled = {key: split for key, split in source.items() if not (_labels(split, column) == -1).all()}
    test = next((key for key in TEST_SPLITS if key in labelled), None)
    if "train" not in labelled or test is None:
        raise ValueError(
            f"{name} needs a training split and a test or validation split with labels; it has {list(source)}, "
            f"labelled: {list(labelled)}. In a folder, name them train.parquet and test.parquet, or train/ and test/."
        )
    validation = next((key for key in VALIDATION_SPLITS if key in labelled and key != test), None)
    return labelled["train"], None if validation is None else labelled[validation], labelled[test]


def _labels(split: Dataset, column: str) -> np.ndarray:
    values = split.with_format("arrow")[:][column].combine_chunks().fill_null(-1)
    return values.to_numpy(zero_copy_only=False).astype(np.int64)


def _class_names(train: Dataset, name: str, column: str) -> list[str]:
    labels = _labels(train, column)
    feature = train.features[column]
    names = feature.names if isinstance(feature, ClassLabel) else [str(i) for i in range(int(labels.max()) + 1)]
    if labels.min() < 0:
        raise ValueError(
            f"{name}: {int((labels < 0).sum())} training images have no label. Label them or take them out."
        )
    if labels.max() >= len(names):
        raise ValueError(f"{name}: a training image has the label {labels.max()}, but there are {len(names)} classes.")
    if len(np.unique(labels)) < 2:
        raise ValueError(
            f"All training images of {name} are of one class ({names[int(labels[0])]!r}): there is nothing to tell "
            "apart. Give images of at least two classes; in a folder, each in a folder of its own."
        )
    return list(names)


def _check_classes(train: Dataset, split: Dataset, key: str, name: str, column: str, class_names: list[str]) -> None:
    feature = split.features[column]
    if isinstance(feature, ClassLabel) and feature.names != class_names:
        differing = sorted(set(feature.names) ^ set(class_names))[:5] or "their order"
        raise ValueError(
            f"{name}: the training split has {len(class_names)} classes, the {key} split {len(feature.names)}; they "
            f"differ in {differing}. Give all splits the same classes."
        )
    counts = Counter(_labels(split, column).tolist())
    unknown = sorted(set(counts) - set(_labels(train, column).tolist()))
    if unknown:
        label = unknown[0]
        what = repr(class_names[label]) if 0 <= label < len(class_names) else "unknown"
        raise ValueError(
            f"{name}: {counts[label]} images of the {key} split have the label {label} ({what}), and no training "
            f"image has it; there are {len(class_names)} classes. Make the splits agree."
        )


def _hold_out(train: Dataset, column: str, share: float, seed: int, name: str) -> tuple[Dataset, Dataset]:
    """Split off a share of each class, rounded down."""
    labels = _labels(train, column)
    order = np.random.default_rng(seed).permutation(len(labels))
    held: list[int] = []
    for label in np.unique(labels):
        own = order[labels[order] == label]
        held.extend(own[: int(share * len(own))])
    if not held:
        raise ValueError(f"validation_share={share} holds out no image of {name}: no class is large enough. Raise it.")
    kept = np.setdiff1d(np.arange(len(labels)), held)
    return train.select(kept), train.select(sorted(held))


def _digits() -> DatasetDict:
    # Imported here: only this data needs scikit-learn, which is not installed with the library.
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=[str(i) for i in range(10)])})
    columns = {"image": [PIL.Image.fromarray(image) for image in pixels], "label": digits.target.tolist()}
    whole = Dataset.from_dict(columns, features=features)
    last = len(whole) - DIGITS_TEST
    return DatasetDict(train=whole.select(range(last)), test=whole.select(range(last, len(whole))))


def _photos(size: int = 32) -> Dataset:
    from sklearn.datasets import load_sample_images

    crops = [
        PIL.Image.fromarray(photo[top : top + size, left : left + size])
        for photo in load_sample_images().images
        for top in range(0, photo.shape[0] - size + 1, size)
        for left in range(0, photo.shape[1] - size + 1, size)
    ]
    return Dataset.from_dict({"image": crops}, features=Features({"image": Image()}))
