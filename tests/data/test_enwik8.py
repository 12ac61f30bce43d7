"""Text as bytes: ids, splits, the download's checks, windows."""

import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import ByT5Tokenizer, GPT2Config, GPT2LMHeadModel

from hf_latephase.data import (
    BYTE_OFFSET,
    BYTE_VOCAB_SIZE,
    ByteWindows,
    decode_ids,
    encode_bytes,
    enwik8,
    load_bytes,
    split_bytes,
)


ENWIK6 = Path(__file__).parents[3] / "shared" / "data" / "enwik6"
needs_enwik6 = pytest.mark.skipif(not ENWIK6.is_file(), reason=f"{ENWIK6} is not there")


def as_array(text: bytes) -> np.ndarray:
    return np.frombuffer(text, dtype=np.uint8)


# Ids


def assert_encodes_as_byt5(text: str) -> None:
    tokenizer = ByT5Tokenizer(extra_ids=0)
    assert encode_bytes(text.encode()).tolist() == tokenizer(text, add_special_tokens=False).input_ids


def test_ids_are_those_of_byt5() -> None:
    assert_encodes_as_byt5("Every byte: naïve, 日本, \t\n\x00 and 🙂.")
    assert len(ByT5Tokenizer(extra_ids=0)) == BYTE_VOCAB_SIZE


@needs_enwik6
def test_ids_of_real_text_are_those_of_byt5() -> None:
    assert_encodes_as_byt5(bytes(load_bytes(ENWIK6).train[:20_000]).decode())


def test_encoding_takes_bytes_and_arrays_and_nothing_else() -> None:
    ids = encode_bytes(bytes(range(256)))
    assert ids.dtype == np.int64
    assert ids.tolist() == list(range(BYTE_OFFSET, BYTE_VOCAB_SIZE))
    np.testing.assert_array_equal(encode_bytes(as_array(bytes(range(256)))), ids)
    with pytest.raises(TypeError, match="int64"):
        encode_bytes(ids)


def test_decoding_inverts_encoding() -> None:
    text = "naïve 日本 🙂"
    ids = encode_bytes(text.encode())
    assert decode_ids(ids) == decode_ids(torch.from_numpy(ids)) == decode_ids(ids.tolist()) == text


def test_decoding_leaves_out_special_ids_and_replaces_what_is_not_utf8() -> None:
    cut = encode_bytes("aé".encode())[:-1]
    assert decode_ids([0, 1, 2, *cut, BYTE_VOCAB_SIZE]) == "a\ufffd"


# Splits


def test_enwik8_splits_are_the_standard_ones() -> None:
    splits = split_bytes(np.zeros(100_000_000, dtype=np.uint8))
    assert [len(split) for split in splits] == [90_000_000, 5_000_000, 5_000_000]


@pytest.mark.parametrize("length", [20, 21, 999, 1000, 12_345])
def test_splits_are_consecutive_and_complete(length: int, tmp_path: Path) -> None:
    text = np.random.default_rng(0).integers(256, size=length, dtype=np.uint8).tobytes()
    (tmp_path / "text").write_bytes(text)
    splits = load_bytes(tmp_path / "text")
    assert b"".join(map(bytes, splits)) == text
    assert all(isinstance(split, np.memmap) for split in splits)
    assert abs(len(splits.train) - 0.9 * length) < 1
    assert abs(len(splits.validation) - 0.05 * length) < 1


def test_default_text_needs_no_file_and_no_network() -> None:
    splits = load_bytes()
    text = b"".join(map(bytes, splits)).decode()
    assert len(text) > 300_000
    assert text.index('The "assert" statement') < text.index('The "yield" statement')
    for first, second in zip(splits, load_bytes(), strict=True):
        np.testing.assert_array_equal(first, second)


def test_errors_name_cause_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist.*--data_file"):
        load_bytes(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="not a file"):
        load_bytes(tmp_path)
    (tmp_path / "text").touch()
    with pytest.raises(ValueError, match=r"text is empty.*--data_file"):
        load_bytes(tmp_path / "text")
    (tmp_path / "text").write_bytes(b"too short")
    with pytest.raises(ValueError, match="9 bytes"):
        load_bytes(tmp_path / "text")
    with pytest.raises(ValueError, match="both given"):
        load_bytes(tmp_path / "text", "enwik8")
    with pytest.raises(ValueError, match=r"text8.*--data_file"):
        load_bytes(dataset="text8")


# The download. Only the transfer itself is replaced: unpacking, checks and splitting are the real ones.


@pytest.fixture
def fake_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def serve(content: bytes, name: str = "enwik8") -> None:
        archive = tmp_path / "enwik8.zip"
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr(name, content)
        monkeypatch.setattr(enwik8.DownloadManager, "download", lambda self, url: str(archive))

    return serve


def test_download_is_unpacked_verified_and_split(fake_download, monkeypatch, tmp_path) -> None:
    # SHA-1 of a million "a", from FIPS 180's test vectors.
    monkeypatch.setattr(enwik8, "ENWIK8_SIZE", 1_000_000)
    monkeypatch.setattr(enwik8, "ENWIK8_SHA1", "34aa973cd4c4daa4f61eeb2bdbad27316534016f")
    fake_download(b"a" * 1_000_000)
    splits = load_bytes(dataset="enwik8", cache_dir=tmp_path)
    assert [len(split) for split in splits] == [900_000, 50_000, 50_000]
    assert isinstance(splits.train, np.memmap)


def test_download_of_another_size_is_refused(fake_download, tmp_path) -> None:
    fake_download(b"a" * 1000)
    with pytest.raises(OSError, match=r"1000 bytes, not the 100000000 of enwik8.*--data_file"):
        load_bytes(dataset="enwik8", cache_dir=tmp_path)


def test_damaged_download_is_refused(fake_download, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(enwik8, "ENWIK8_SIZE", 1000)
    fake_download(b"a" * 1000)
    with pytest.raises(OSError, match=r"SHA-1 .*, not the 57b8363b814821dc9d47aa4d41f58733519076b2.*--data_file"):
        load_bytes(dataset="enwik8", cache_dir=tmp_path)


def test_archive_without_enwik8_is_refused(fake_download, tmp_path) -> None:
    fake_download(b"a" * 1000, name="enwik9")
    with pytest.raises(OSError, match="holds no enwik8"):
        load_bytes(dataset="enwik8", cache_dir=tmp_path)


def test_no_network_names_the_remedy(monkeypatch, tmp_path) -> None:
    def unreachable(self: object, url: str) -> str:
        raise FileNotFoundError(url)  # what datasets raises where a name does not resolve

    monkeypatch.setattr(enwik8.DownloadManager, "download", unreachable)
    with pytest.raises(ConnectionError, match=r"mattmahoney\.net.*--data_file"):
        load_bytes(dataset="enwik8", cache_dir=tmp_path)


# Windows


@pytest.mark.parametrize(("length", "window"), [(2, 1), (5, 4), (9, 4), (10, 4), (11, 4), (12, 4), (97, 10)])
def test_every_byte_but_the_first_is_a_target_once(length: int, window: int) -> None:
    text = np.arange(length, dtype=np.uint8)
    targets = []
    for item in DataLoader(ByteWindows(text, window), batch_size=2):
        inputs, labels = item["input_ids"], item["labels"]
        assert inputs.dtype == labels.dtype == torch.int64
        assert inputs.shape[1] == labels.shape[1] == window + 1
        assert ((labels == inputs) | (labels == -100)).all()
        # Bytes are their own positions here: each input is followed by the next.
        assert (inputs.diff() == 1).all()
        shifted = labels[:, 1:]
        targets += (shifted[shifted != -100] - BYTE_OFFSET).tolist()
    assert sorted(targets) == list(range(1, length))


def test_windows_start_every_window_bytes() -> None:
    windows = ByteWindows(np.arange(13, dtype=np.uint8), window=4)
    assert [item["input_ids"][0].item() - BYTE_OFFSET for item in windows] == [0, 4, 8]
    assert all((item["labels"] == item["input_ids"]).all() for item in windows)


def test_windows_behave_as_a_sequence() -> None:
    windows = ByteWindows(np.arange(12, dtype=np.uint8), window=4)
    assert len(windows) == 3
    for single, batched in zip([windows[2], windows[-3]], windows.__getitems__([2, 0]), strict=True):
        assert all(torch.equal(single[key], batched[key]) for key in ("input_ids", "labels"))
    for index in (3, -4):
        with pytest.raises(IndexError):
            windows[index]


def test_loader_fetches_a_batch_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fetch = ByteWindows.__getitems__

    def counted(self: ByteWindows, indices: list[int]) -> list[dict[str, torch.Tensor]]:
        calls.append(len(indices))
        return fetch(self, indices)

    monkeypatch.setattr(ByteWindows, "__getitems__", counted)
    assert len(list(DataLoader(ByteWindows(np.arange(41, dtype=np.uint8), window=4), batch_size=4))) == 3
    assert calls == [4, 4, 2]


def test_labels_follow_the_convention_of_transformers() -> None:
    torch.manual_seed(0)
    ids = {"vocab_size": BYTE_VOCAB_SIZE, "bos_token_id": None, "eos_token_id": 1}
    config = GPT2Config(n_positions=8, n_embd=8, n_layer=1, n_head=1, **ids)
    model = GPT2LMHeadModel(config).eval()
    (batch,) = DataLoader(ByteWindows(as_array(b"windows"), window=6), batch_size=1)
    output = model(**batch, num_items_in_batch=6)
    expected = torch.nn.functional.cross_entropy(output.logits[0, :-1], batch["input_ids"][0, 1:])
    torch.testing.assert_close(output.loss, expected)


def test_windows_refuse_what_they_cannot_cut() -> None:
    with pytest.raises(ValueError, match=r"4 bytes, but one window of 4 targets takes 5"):
        ByteWindows(as_array(b"abcd"), window=4)
    with pytest.raises(ValueError, match="at least 1"):
        ByteWindows(as_array(b"abcd"), window=0)
    with pytest.raises(TypeError, match="int64"):
        ByteWindows(encode_bytes(b"abcdef"), window=4)


# Speed and memory, on 20 MB: a fifth of enwik8


@pytest.fixture(scope="module")
def large_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "text"
    path.write_bytes(np.random.default_rng(0).integers(256, size=1_000_000, dtype=np.uint8).tobytes() * 20)
    return path


def read_all(path: Path) -> int:
    loader = DataLoader(ByteWindows(load_bytes(path).train, window=512), batch_size=64)
    return sum(batch["input_ids"].shape[0] * 512 for batch in loader)


def test_reading_a_file_is_fast_and_allocates_next_to_nothing(large_file: Path) -> None:
    start = time.perf_counter()
    assert read_all(large_file) >= 17_999_999
    # 100 MB "in seconds": a tenth of this on an idle core.
    assert time.perf_counter() - start < 10
    tracemalloc.start()
    ByteWindows(load_bytes(large_file).train, window=512).__getitems__(range(0, 30_000, 300))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5_000_000


def test_resident_memory_stays_below_three_times_the_file(large_file: Path) -> None:
    # Mapped pages count here, while the file is in use.
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak that earlier tests left
    except OSError:
        pytest.skip("the peak of the resident memory can be reset on Linux only")
    before = resident_bytes("VmRSS")
    read_all(large_file)
    growth = resident_bytes("VmHWM") - before
    assert 10_000_000 < growth < 3 * 20_000_000


def resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
