"""Bits per character as an evaluate metric, without a network."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hf_latephase.metrics import BitsPerCharacter


@pytest.fixture
def metric(tmp_path: Path) -> BitsPerCharacter:
    return BitsPerCharacter(cache_dir=str(tmp_path))


def test_examples_count_by_their_length(metric: BitsPerCharacter) -> None:
    # 1 bit on 3 characters and 5 bits on 1: two bits a character, not three an example.
    result = metric.compute(nll=[3 * math.log(2), 5 * math.log(2)], characters=[3, 1])
    assert result == {"bits_per_character": pytest.approx(2.0, rel=1e-15)}


def test_batches_add_up_to_one_call(metric: BitsPerCharacter) -> None:
    generator = np.random.default_rng(0)
    nll, characters = generator.exponential(100, size=30), generator.integers(1, 100, size=30)
    expected = metric.compute(nll=nll, characters=characters)
    for start in range(0, 30, 7):
        metric.add_batch(nll=nll[start : start + 7], characters=characters[start : start + 7])
    assert metric.compute() == expected
    metric.add(nll=nll[0], characters=characters[0])
    metric.add_batch(nll=nll[1:10], characters=characters[1:10])
    assert metric.compute(nll=nll[10:], characters=characters[10:]) == expected
    assert expected["bits_per_character"] == pytest.approx(nll.sum() / characters.sum() / math.log(2), rel=1e-14)


def test_sums_are_exact(metric: BitsPerCharacter) -> None:
    # float32 would lose every small term, and float64 added up in this order some of them.
    nll = [1e9] + [1e-7] * 10_000
    result = metric.compute(nll=nll, characters=[1] * len(nll))["bits_per_character"]
    assert result == (1e9 + 1e-3) / len(nll) / math.log(2)


def test_nothing_to_average_is_an_error(metric: BitsPerCharacter) -> None:
    with pytest.raises(ValueError):
        metric.compute()
    with pytest.raises(ValueError, match="no characters"):
        metric.compute(nll=[], characters=[])
    with pytest.raises(ValueError, match="no characters"):
        metric.compute(nll=[0.0], characters=[0])
    # An error does not spoil the next use.
    assert metric.compute(nll=[math.log(2)], characters=[1])["bits_per_character"] == pytest.approx(1.0)


def test_impossible_values_are_errors(metric: BitsPerCharacter) -> None:
    with pytest.raises(ValueError, match="negative"):
        metric.compute(nll=[1.0, 1.0], characters=[2, -1])
    with pytest.raises(ValueError, match="NaN"):
        metric.compute(nll=[1.0, float("nan")], characters=[2, 1])


def test_needs_no_network(tmp_path: Path) -> None:
    # Offline mode is read at import, hence the process; a socket that cannot be made catches whatever ignores it.
    code = (
        "import socket\n"
        "def refuse(*args, **kwargs): raise AssertionError('network used')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from hf_latephase.metrics import BitsPerCharacter\n"
        "metric = BitsPerCharacter()\n"
        "metric.add_batch(nll=[1.0], characters=[1])\n"
        "print(metric.compute()['bits_per_character'])\n"
    )
    root = Path(__file__).parents[2]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(root)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert float(result.stdout) == pytest.approx(1 / math.log(2))
