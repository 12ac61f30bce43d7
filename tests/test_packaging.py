"""What is published: whole, described, quick to import, and at work far from the checkout."""

from __future__ import annotations

import email
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from oldest import constraints, floors


ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
# Seconds of this process's time (not of the clock: other processes may want the core), beyond importing Trainer.
IMPORT_BUDGET = 0.5

USE = """
import json, sys, time
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

before, start = set(sys.modules), time.process_time()
import hf_latephase

seconds, imported = time.process_time() - start, sorted(set(sys.modules) - before)

import torch
from hf_latephase import LatePhaseConfig, LatePhaseTrainer

torch.set_num_threads(1)
config = GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1)
rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(16, (40, 8))]
trainer = LatePhaseTrainer(
    model=GPT2LMHeadModel(config),
    args=TrainingArguments(
        "run", per_device_train_batch_size=4, max_steps=10, learning_rate=0.1, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no",
    ),
    late_phase_config=LatePhaseConfig(num_members=3, weights=["rank1", "norm"], late_phase_start=4),  # two cycles
    train_dataset=rows,
)
trainer.train()
distance = trainer.late_phase.distance_from_mean().item()
trainer.save_model("saved")
logits = [model.eval()(rows[0]["input_ids"][None]).logits for model in
          (trainer.averaged_model(), AutoModelForCausalLM.from_pretrained("saved"))]
json.dump({
    "file": hf_latephase.__file__, "seconds": seconds, "imported": imported, "distance": distance,
    "difference": (logits[0] - logits[1]).abs().max().item(),
}, open("result.json", "w"))
"""


def run(*command: Any, **kwargs: Any) -> str:
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300, **kwargs)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """The source distribution and the wheel made from it."""
    # Of a copy: setuptools leaves a folder build/ behind, and packs what an earlier build left there.
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        shutil.copy(ROOT / name, source)
    for name in ("hf_latephase", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    run("-m", "build", "--no-isolation", "--outdir", out, source)
    sdist, wheel = out.glob("*.tar.gz"), out.glob("*.whl")
    return {"sdist": next(sdist), "wheel": next(wheel)}


def package_files() -> set[str]:
    files = (path for path in (ROOT / "hf_latephase").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in files}


def test_the_wheel_holds_the_package_and_nothing_else(built) -> None:
    names = {name for name in zipfile.ZipFile(built["wheel"]).namelist() if ".dist-info/" not in name}
    assert names == package_files()  # templates and py.typed among them
    assert "hf_latephase/py.typed" in names


def test_the_source_distribution_holds_what_the_wheel_is_made_of(built) -> None:
    with tarfile.open(built["sdist"]) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    names = {name for name in names if ".egg-info/" not in name} - {"PKG-INFO", "setup.cfg"}
    assert names == package_files() | set(SOURCES)


def test_the_metadata_describe_the_package(built) -> None:
    with zipfile.ZipFile(built["wheel"]) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_string(archive.read(name).decode())
        assert any(entry.endswith("licenses/LICENSE") for entry in archive.namelist())
    assert (metadata["Name"], metadata["Requires-Python"], metadata["License"]) == (
        "hf_latephase", ">=3.11", "Apache-2.0",
    )  # fmt: skip
    required = [value for value in metadata.get_all("Requires-Dist") if "extra ==" not in value]
    assert {value.partition(">=")[0] for value in required} >= {
        "transformers[torch]", "torch", "accelerate", "datasets", "evaluate", "safetensors", "numpy",
    }  # fmt: skip
    # What `make test-oldest` pins is what is published.
    published = {value.replace("[torch]", "").replace(">=", "==") for value in required if ">=" in value}
    assert published == set(floors((ROOT / "setup.py").read_text(encoding="utf-8"))) and published
    assert any(re.fullmatch(r"torch===[\d.]+", one) for one in constraints((ROOT / "setup.py").read_text("utf-8")))
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    run("-m", "twine", "check", "--strict", *built.values())


@pytest.fixture(scope="module")
def used(built, tmp_path_factory) -> dict[str, Any]:
    """What a program found that used the installed wheel from a folder of its own."""
    site, elsewhere = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("elsewhere")
    run("-m", "pip", "install", "--no-deps", "--no-index", "--target", site, built["wheel"])
    (elsewhere / "use.py").write_text(USE)
    run("use.py", cwd=elsewhere, env=os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"})
    return json.loads((elsewhere / "result.json").read_text()) | {"site": str(site)}


def test_the_installed_wheel_trains_saves_and_reloads(used) -> None:
    assert used["file"].startswith(used["site"])
    assert used["distance"] > 1e-3
    assert used["difference"] < 1e-5


def test_importing_costs_little_beyond_trainer(used) -> None:
    assert used["seconds"] < IMPORT_BUDGET
    # Nothing that Trainer does without: vision, plots and metrics are imported by those who use them.
    assert {name.partition(".")[0] for name in used["imported"]} == {"hf_latephase"}
    assert not {"hf_latephase.models", "hf_latephase.data", "hf_latephase.metrics"} & set(used["imported"])
