"""Image data: what is loaded, what is refused, and the augmentation against a plain reference."""

import io

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from torch.utils.data import DataLoader
from transformers import TrainerState, default_data_collator

from hf_latephase.data import vision
from hf_latephase.data.augmentation import (
    DecodedImages,
    EncodedImages,
    EpochDraws,
    channel_statistics,
    cut_out,
    imagenet_transform,
)
from hf_latephase.data.decoding import check_files, decode_image, decode_images
from hf_latephase.data.vision import load_images, load_unlabelled


@pytest.fixture(autouse=True)
def no_shared_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def pixels(seed, size=8):
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def encoded(array, kind="PNG"):
    buffer = io.BytesIO()
    PIL.Image.fromarray(array).save(buffer, kind)
    return {"bytes": buffer.getvalue(), "path": None}


def write_folder(folder, counts, kind="png"):
    """Images, `counts[split][class]` of them in each folder."""
    for split, classes in counts.items():
        for name, count in classes.items():
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                PIL.Image.fromarray(pixels(index)).save(folder / split / name / f"{index}.{kind}")
    return str(folder)


def write_parquet(folder, splits, names=("a", "b"), image="img", label="label"):
    folder.mkdir(parents=True, exist_ok=True)
    for split, labels in splits.items():
        feature = ClassLabel(names=list(names)) if names else Value("int64")
        columns = {image: [encoded(pixels(index)) for index in range(len(labels))], label: labels}
        Dataset.from_dict(columns, Features({image: Image(), label: feature})).to_parquet(folder / f"{split}.parquet")
    return str(folder)


# ---- loading ----


def test_digits_are_whole_and_their_test_split_comes_last():
    from sklearn.datasets import load_digits

    splits = load_images()
    digits = load_digits()
    assert (len(splits.train), splits.validation, len(splits.test)) == (1437, None, 360)
    assert splits.class_names == [str(digit) for digit in range(10)]
    assert splits.labels(splits.test).tolist() == digits.target[1437:].tolist()
    image = np.array(decode_image(splits.test[0]["image"], "0"))
    assert (image == np.round(digits.images[1437] * 255 / 16)[..., None]).all()


def test_a_folder_of_images(tmp_path):
    folder = write_folder(tmp_path / "d", {"train": {"cat": 3, "dog": 2}, "test": {"cat": 1, "dog": 1}})
    splits = load_images(folder, show_progress=False)
    assert splits.class_names == ["cat", "dog"]
    assert sorted(splits.labels(splits.train).tolist()) == [0, 0, 0, 1, 1]
    assert (len(splits.test), splits.label_column, splits.image_column) == (2, "label", "image")
    assert splits.validation is None


@pytest.mark.parametrize("names", [("a", "b"), None])
def test_a_folder_of_parquet(names, tmp_path):
    folder = write_parquet(tmp_path / "d", {"train": [0, 1, 1], "validation": [0, 1], "test": [1, 0]}, names)
    splits = load_images(folder, show_progress=False)
    assert splits.class_names == (["a", "b"] if names else ["0", "1"])
    assert [len(split) for split in splits.named().values()] == [3, 2, 2]
    image = decode_images(splits.train, splits.image_column, 8, "d", False)
    assert (image[1].permute(1, 2, 0).numpy() == pixels(1)).all()


def test_without_test_labels_validation_is_the_test_split(tmp_path):
    folder = write_parquet(tmp_path / "d", {"train": [0, 1], "validation": [1, 0, 1], "test": [-1, -1]}, names=None)
    splits = load_images(folder, show_progress=False)
    assert len(splits.test) == 3 and splits.validation is None


def test_cifar100_is_read_by_its_fine_label(tmp_path, monkeypatch):
    features = Features({"img": Image(), "fine_label": ClassLabel(names=list("abc")), "coarse_label": ClassLabel(2)})
    columns = {"img": [encoded(pixels(i)) for i in range(3)], "fine_label": [2, 0, 1], "coarse_label": [1, 0, 0]}
    data = Dataset.from_dict(columns, features)
    asked_for = []

    def load_dataset(name, configuration, cache_dir):
        asked_for.append((name, configuration, cache_dir))
        return {"train": data, "test": data}

    monkeypatch.setattr(vision, "load_dataset", load_dataset)
    splits = load_images("uoft-cs/cifar100")
    assert (splits.image_column, splits.label_column, splits.class_names) == ("img", "fine_label", ["a", "b", "c"])
    assert load_images("uoft-cs/cifar100", label_column="coarse_label").label_column == "coarse_label"
    load_unlabelled("ufldl-stanford/svhn:cropped_digits", "somewhere")
    assert asked_for[0] == ("uoft-cs/cifar100", None, None)
    assert asked_for[-1] == ("ufldl-stanford/svhn", "cropped_digits", "somewhere")


def test_held_out_images_are_the_same_share_of_each_class(tmp_path):
    whole = load_images()
    splits = load_images(validation_share=0.1)
    assert splits.validation is not None
    assert splits.test[:] == whole.test[:]
    counts = torch.bincount(whole.labels(whole.train))
    assert torch.bincount(splits.labels(splits.validation)).tolist() == [int(0.1 * count) for count in counts]
    images = [record["bytes"] for split in (splits.train, splits.validation) for record in split["image"]]
    assert sorted(images) == sorted(record["bytes"] for record in whole.train["image"])
    again, other = load_images(validation_share=0.1), load_images(validation_share=0.1, seed=1)
    assert again.validation[:] == splits.validation[:] != other.validation[:]


def test_photos_are_crops():
    split, column = load_unlabelled("photos")
    images = decode_images(split, column, 32, "photos", False)
    assert images.shape == (2 * 13 * 20, 3, 32, 32)
    from sklearn.datasets import load_sample_images

    photo = load_sample_images().images[0]
    assert (images[21].permute(1, 2, 0).numpy() == photo[32:64, 32:64]).all()


def test_real_cifar10(cifar10):
    splits = load_images(cifar10, validation_share=0.1, show_progress=False)
    assert [len(split) for split in splits.named().values()] == [9000, 1000, 2000]
    assert splits.class_names[3] == "cat"
    assert torch.bincount(splits.labels(splits.validation)).tolist() == [100] * 10


@pytest.fixture
def cifar10():
    from pathlib import Path

    folder = Path(__file__).resolve().parents[3] / "shared" / "data" / "cifar10"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: the data are not part of the project")
    return str(folder)


# ---- bad input ----


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing does not exist"):
        load_images(str(tmp_path / "nothing"))


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "a.parquet").touch()
    with pytest.raises(ValueError, match="a.parquet is a file. Name the folder"):
        load_images(str(tmp_path / "a.parquet"))


def test_what_the_hub_does_not_give_is_named(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(vision, "load_dataset", load_dataset)
    with pytest.raises(ConnectionError, match=r"'owner/name' is neither a folder here nor .* no route"):
        load_images("owner/name")


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="holds neither parquet files nor images"):
        load_images(str(tmp_path))


def test_an_empty_split_is_refused(tmp_path, monkeypatch):
    folder = write_parquet(tmp_path / "d", {"train": [0, 1], "test": []})
    with pytest.raises(ValueError, match="cannot be read .*no data.* at least one image in each split"):
        load_images(folder)
    columns = {"image": [encoded(pixels(i)) for i in range(2)], "label": [0, 1]}
    split = Dataset.from_dict(columns, Features({"image": Image(), "label": ClassLabel(2)}))
    monkeypatch.setattr(vision, "load_dataset", lambda *a, **k: {"train": split, "test": split.select([])})
    with pytest.raises(ValueError, match="The split 'test' of owner/name is empty"):
        load_images("owner/name")


@pytest.mark.parametrize("layout", ["folder", "parquet"])
def test_one_class_is_refused(layout, tmp_path):
    if layout == "folder":
        folder = write_folder(tmp_path / "d", {"train": {"cat": 2}, "test": {"cat": 1}})
    else:
        folder = write_parquet(tmp_path / "d", {"train": [1, 1], "test": [1]})
    with pytest.raises(ValueError, match="are of one class"):
        load_images(folder)


def test_a_folder_without_a_test_split_is_refused(tmp_path):
    folder = write_folder(tmp_path / "d", {"train": {"cat": 2, "dog": 1}})
    with pytest.raises(ValueError, match=r"needs a training split and a test .* it has \['train'\]"):
        load_images(folder)


def test_splits_with_other_classes_are_refused(tmp_path):
    write_parquet(tmp_path / "d", {"train": [0, 1]}, names=("a", "b"))
    folder = write_parquet(tmp_path / "d", {"test": [0, 1, 2]}, names=("a", "b", "c"))
    with pytest.raises(ValueError, match="classes|cannot be read"):
        load_images(folder)


@pytest.mark.parametrize("names", [("a", "b", "c"), None])
def test_a_test_class_that_is_not_trained_is_refused(names, tmp_path):
    folder = write_parquet(tmp_path / "d", {"train": [0, 1], "test": [0, 2, 2]}, names)
    with pytest.raises(ValueError, match="2 images of the test split have the label 2"):
        load_images(folder)


def test_classes_of_the_hub_that_differ_are_counted(monkeypatch):
    def split(names):
        columns = {"image": [encoded(pixels(i)) for i in range(2)], "label": [0, 1]}
        return Dataset.from_dict(columns, Features({"image": Image(), "label": ClassLabel(names=names)}))

    monkeypatch.setattr(
        vision, "load_dataset", lambda *a, **k: {"train": split(["a", "b"]), "test": split(list("abc"))}
    )
    with pytest.raises(
        ValueError, match=r"the training split has 2 classes, the test split 3; they differ in \['c'\]"
    ):
        load_images("owner/name")


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_a_corrupt_image_is_found_and_named(kind, damage, tmp_path):
    folder = write_folder(tmp_path / "d", {"train": {"cat": 3, "dog": 2}, "test": {"cat": 1, "dog": 1}}, kind)
    bad = tmp_path / "d" / "train" / "dog" / f"1.{kind}"
    content = bad.read_bytes()
    bad.write_bytes({"cut": content[: len(content) * 2 // 3], "text": b"no image", "empty": b""}[damage])
    with pytest.raises(ValueError, match=rf"The image .*dog.1\.{kind} .* cannot be opened .*Replace it"):
        load_images(folder, show_progress=False)


def test_a_corrupt_row_is_found_and_counted():
    rows = [encoded(pixels(0), "JPEG"), encoded(pixels(1), "JPEG")]
    rows[1]["bytes"] = rows[1]["bytes"][:-40]
    split = Dataset.from_dict({"img": rows}, Features({"img": Image(decode=False)}))
    with pytest.raises(ValueError, match="row 1 of mine"):
        check_files(split, "img", "mine", False)
    with pytest.raises(ValueError, match="row 1 of mine"):
        decode_images(split, "img", 8, "mine", False)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match="validation_share must be"):
        load_images(validation_share=share)


def test_a_share_that_holds_out_nothing_is_refused():
    with pytest.raises(ValueError, match="holds out no image"):
        load_images(validation_share=0.001)


def test_an_unknown_label_column_is_named():
    with pytest.raises(ValueError, match=r"no column 'lable'. Its columns: \['image', 'label'\]"):
        load_images(label_column="lable")


# ---- decoding ----


def test_other_sizes_are_fitted():
    wide = np.zeros((4, 12, 3), dtype=np.uint8)
    wide[:, 4:8] = 200
    split = Dataset.from_dict({"image": [encoded(wide)]}, Features({"image": Image(decode=False)}))
    assert (decode_images(split, "image", 4, "wide", False) == 200).all()
    assert decode_images(split, "image", 7, "wide", False).shape == (1, 3, 7, 7)


# ---- augmentation ----


@pytest.fixture
def images():
    return torch.from_numpy(np.stack([pixels(seed) for seed in range(40)])).permute(0, 3, 1, 2).contiguous()


MEAN, STD = [0.4, 0.5, 0.6], [0.1, 0.2, 0.3]


def reference(dataset, index):
    """One image by loops, from the draws of the data set."""
    image = dataset.images[index].double() / 255
    (top, left), flip, (row, column) = dataset._corners[index], dataset._flips[index], dataset._centres[index]
    channels, height, width = image.shape
    result = torch.zeros_like(image)
    for y in range(height):
        for x in range(width):
            source_y, source_x = y + top - dataset.padding, (width - 1 - x if flip else x) + left - dataset.padding
            inside = 0 <= source_y < height and 0 <= source_x < width
            value = image[:, source_y, source_x] if inside else torch.zeros(channels, dtype=torch.float64)
            result[:, y, x] = (value - torch.tensor(MEAN)) / torch.tensor(STD)
            half = dataset.cutout // 2
            if row - half <= y < row - half + dataset.cutout and column - half <= x < column - half + dataset.cutout:
                result[:, y, x] = 0
    return result


@pytest.mark.parametrize(("padding", "flip", "cutout"), [(0, False, 0), (2, True, 0), (0, False, 3), (2, True, 4)])
def test_augmented_images_equal_plain_loops(padding, flip, cutout, images):
    labels = torch.arange(40)
    dataset = DecodedImages(images, labels, MEAN, STD, padding, flip, cutout, seed=3)
    batch = dataset.__getitems__([5, 0, 7])
    if not flip:
        dataset._flips = torch.zeros(40, dtype=torch.bool)
    for example, index in zip(batch, [5, 0, 7], strict=True):
        assert example["labels"] == index
        torch.testing.assert_close(example["pixel_values"].double(), reference(dataset, index), atol=2e-6, rtol=0)
    torch.testing.assert_close(dataset[7]["pixel_values"], batch[2]["pixel_values"], atol=0, rtol=0)


def test_draws_are_uniform_and_reach_over_the_border(images):
    many = images[:1].expand(20_000, -1, -1, -1)
    dataset = DecodedImages(many, None, MEAN, STD, 2, True, 4, seed=0)
    dataset[0]
    # Standard deviations of these shares: below 0.003.
    assert torch.bincount(dataset._corners[:, 0], minlength=5) / 20_000 == pytest.approx([0.2] * 5, abs=0.015)
    assert torch.bincount(dataset._centres[:, 1], minlength=8) / 20_000 == pytest.approx([1 / 8] * 8, abs=0.015)
    assert dataset._flips.float().mean().item() == pytest.approx(0.5, abs=0.015)
    ones = cut_out(torch.ones(2, 3, 8, 8), torch.tensor([[0, 0], [4, 4]]), 4)
    assert (ones == 0).sum(dim=(1, 2, 3)).tolist() == [3 * 2 * 2, 3 * 4 * 4]


def test_draws_follow_seed_and_epoch_only(images):
    def batch(seed, epoch, indices=(1, 2)):
        torch.rand(1)  # what a model may draw meanwhile
        dataset = DecodedImages(images, None, MEAN, STD, 2, True, 4, seed)
        dataset.set_epoch(epoch)
        return torch.stack([example["pixel_values"] for example in dataset.__getitems__(list(indices))])

    first = batch(0, 0)
    assert torch.equal(first, batch(0, 0))
    assert torch.equal(first, batch(0, 0, (2, 1)).flip(0))
    others = [batch(0, 1), batch(1, 0), batch(1, 1), batch(0, 2)]
    assert all(not torch.equal(first, other) for other in others)
    assert not torch.equal(others[0], others[1])  # seed 0, epoch 1 is not seed 1, epoch 0
    state = torch.get_rng_state()
    batch(0, 0)
    assert not torch.equal(state, torch.get_rng_state())  # the call above drew one number ...
    dataset = DecodedImages(images, None, MEAN, STD, 2)
    state = torch.get_rng_state()
    dataset[0]
    assert torch.equal(state, torch.get_rng_state())  # ... and the data set none


def test_a_reseeded_copy_leaves_the_first_alone(images):
    dataset = DecodedImages(images, None, MEAN, STD, 2, seed=0)
    before = dataset[0]["pixel_values"]
    other = dataset.reseeded(1)
    other.set_epoch(5)
    assert not torch.equal(other[0]["pixel_values"], before)
    assert torch.equal(dataset[0]["pixel_values"], before)
    assert torch.equal(dataset.reseeded(0)[0]["pixel_values"], before)


def test_the_callback_sets_the_epoch_of_the_training_set(images):
    dataset = DecodedImages(images, None, MEAN, STD, 2)
    loader = DataLoader(dataset)
    expected = dataset.reseeded(0)
    expected.set_epoch(2)
    EpochDraws().on_epoch_begin(None, TrainerState(epoch=2.6), None, train_dataloader=loader)
    assert torch.equal(dataset[0]["pixel_values"], expected[0]["pixel_values"])
    EpochDraws().on_epoch_begin(None, TrainerState(epoch=0.0), None, train_dataloader=DataLoader([1]))


def test_workers_that_stay_see_the_next_epoch(images):
    dataset = DecodedImages(images, None, MEAN, STD, 2)
    loader = DataLoader(
        dataset, 20, num_workers=1, persistent_workers=True, collate_fn=default_data_collator,
        multiprocessing_context="fork",
    )  # fmt: skip
    for epoch in range(2):
        dataset.set_epoch(epoch)
        seen = torch.cat([batch["pixel_values"] for batch in loader])
        assert torch.equal(seen, dataset.pixel_values(torch.arange(40)))


def test_channel_statistics_are_those_of_all_pixels(images):
    mean, std = channel_statistics(images)
    values = images.double() / 255
    assert mean == pytest.approx(values.mean(dim=(0, 2, 3)).tolist(), abs=1e-12)
    assert std == pytest.approx(values.std(dim=(0, 2, 3), correction=0).tolist(), abs=1e-12)
    assert channel_statistics(torch.zeros(2, 1, 3, 3, dtype=torch.uint8)) == ([0.0], [1 / 255])


def test_wrong_tensors_are_refused(images):
    with pytest.raises(TypeError, match="uint8"):
        DecodedImages(images.float(), None, MEAN, STD)
    with pytest.raises(ValueError, match="40 images, but 3 labels"):
        DecodedImages(images, torch.arange(3), MEAN, STD)


def test_encoded_images_draw_by_seed_epoch_and_index():
    columns = {"image": [encoded(pixels(7, 40))] * 3, "label": [0, 1, 0]}
    split = Dataset.from_dict(columns, Features({"image": Image(decode=False), "label": Value("int64")}))
    make = lambda seed: EncodedImages(split, "image", "label", imagenet_transform(True), "mine", seed)  # noqa: E731
    dataset = make(0)
    state = torch.get_rng_state()
    first = dataset[1]
    assert torch.equal(state, torch.get_rng_state())
    assert first["pixel_values"].shape == (3, 224, 224) and first["labels"] == 1
    assert torch.equal(make(0)[1]["pixel_values"], first["pixel_values"])
    assert not torch.equal(dataset[0]["pixel_values"], first["pixel_values"])  # one image, other draws
    assert not torch.equal(make(1)[1]["pixel_values"], first["pixel_values"])
    dataset.set_epoch(1)
    assert not torch.equal(dataset[1]["pixel_values"], first["pixel_values"])


def test_imagenet_images_are_scored_at_the_centre():
    image = np.zeros((256, 512, 3), dtype=np.uint8)
    image[16:240, 144:368] = 255
    view = imagenet_transform(False, [0, 0, 0], [1, 1, 1])(PIL.Image.fromarray(image))
    assert view.shape == (3, 224, 224) and (view == 1).all()


def test_a_corrupt_image_of_the_hub_is_named_when_it_is_asked_for():
    columns = {"image": [{"bytes": b"no image", "path": None}], "label": [0]}
    split = Dataset.from_dict(columns, Features({"image": Image(decode=False), "label": Value("int64")}))
    dataset = EncodedImages(split, "image", "label", imagenet_transform(False), "the training images")
    with pytest.raises(ValueError, match="row 0 of the training images"):
        dataset[0]
