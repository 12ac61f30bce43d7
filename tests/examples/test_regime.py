"""Where noise limits training: the runs parse, validation chooses, the tables are made from the figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from transformers import TrainingArguments

import paper_cifar
import regime
import regime_report
import run_cifar
import run_enwik8
from common.recipe import parse_arguments
from hf_latephase import LatePhaseConfig
from regime_settings import SWEEP, TASKS, setting


TYPES = {
    "run_enwik8.py": (
        *(run_enwik8.LanguageModelArguments, run_enwik8.DataArguments, run_enwik8.MethodArguments),
        *(LatePhaseConfig, TrainingArguments),
    ),
    "run_cifar.py": (
        *(run_cifar.ModelArguments, run_cifar.ImageArguments, run_cifar.MethodArguments),
        *(LatePhaseConfig, TrainingArguments),
    ),
}
every_task = pytest.mark.parametrize("name", TASKS)


@every_task
def test_every_method_sees_as_much_at_the_same_rate(name, tmp_path) -> None:
    task = TASKS[name]
    names = set()
    for method in task.methods:
        own = setting(name, method, 7)
        run = own.run(tmp_path)
        names.add(run.folder)
        *_, methods, config, args = parse_arguments(
            TYPES[task.script], [*run.arguments, f"--output_dir={tmp_path}", "--use_cpu"]
        )
        assert len(methods.method) == 1
        assert (methods.method == ["late_phase"]) == method.startswith("late-phase")
        assert (args.seed, args.learning_rate, args.max_steps) == (7, task.rate, task.steps)
        assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (task.batch_size, 1)
        assert (config.num_members, config.late_phase_start, config.base_gradient_scale) == (10, 0.6, 1.0)
        assert config.swa_start == 0.7
    assert len(names) == len(task.methods)  # no folder for two


def test_minibatches_of_other_sizes_differ_in_nothing_else() -> None:
    task = TASKS["lstm"]
    assert {own.batch_size for own in SWEEP} >= {2, 16}
    for own in SWEEP:
        assert replace(own, batch_size=task.batch_size) == setting("lstm", own.method, own.seed)


def report_of(bits: float) -> dict:
    scores = {"validation": bits, "test": 10 * bits}
    return {
        "settings": {"torch": "1", "transformers": "2"},
        "results": [{"minutes": 1.0, "scores": scores, "averaged_scores": {"validation": bits / 2, "test": 5 * bits}}],
    }


def test_validation_chooses_the_rate_and_other_rates_have_no_test_figures(tmp_path, monkeypatch) -> None:
    task, ran = TASKS["gpt2"], []
    (low,) = task.other_rates

    def run_all(runs, workers):
        for run in runs:
            if not run.is_finished:
                ran.append(run.folder)
                run.folder.mkdir(parents=True)
                rate = next(float(flag.partition("=")[2]) for flag in run.arguments if "learning_rate" in flag)
                # One method likes the low rate, all others the shared one.
                likes_low = "accumulation" in run.folder.name
                bits = {task.rate: 2.0, low: 1.0 if likes_low else 3.0}[rate]
                (run.folder / "results.json").write_text(json.dumps(report_of(bits)))
                (run.folder / "finished").touch()

    monkeypatch.setattr(regime, "run_all", run_all)
    records = regime.fill("gpt2", tmp_path, None, 1)
    for method in task.methods:
        seeds = {
            rate: [r["seed"] for r in records if (r["method"], r["rate"]) == (method, rate)]
            for rate in (low, task.rate)
        }
        everyone = list(range(task.methods[method].seeds))
        assert seeds == {low: everyone if "accumulation" in method else [0], task.rate: everyone}
    for own in records:
        read = own["rate"] == task.rate or (own["rate"] == low and "accumulation" in own["method"])
        assert ("test" in own, "test, SWA" in own) == (read, read)
    before = len(ran)
    assert regime.fill("gpt2", tmp_path, None, 1) == records
    assert len(ran) == before  # nothing runs twice


def test_what_is_recorded_of_an_image_classifier() -> None:
    scores = {"accuracy": 0.5, "nll": 1.0, "brier_score": 0.6}
    better = {"accuracy": 0.6, "nll": 0.9, "brier_score": 0.5}
    results = [
        {"method": "late_phase", "variant": variant, "minutes": 1.5, "scores": {"validation": own, "test": own}}
        for variant, own in (("", scores), ("SWA", better), ("ensemble", better), ("SWA, ensemble", scores))
    ]
    record = regime.records_of(setting("cifar", "base", 3), {"results": results})
    assert (record["seed"], record["minutes"]) == (3, 1.5)
    assert record["test"] == record["validation"] == {"accuracy": 0.5, "nll": 1.0}
    assert record["test, SWA"] == {"accuracy": 0.6, "nll": 0.9}


def test_ahead_means_better() -> None:
    # By hand: differences 1, 2, 3; their standard deviation is 1, and t(0.975, 2) = 4.3027.
    assert regime_report.ahead([1.0, 2.0, 3.0], [2.0, 4.0, 6.0], 2) == "+2.00 ± 2.48"
    assert regime_report.ahead([2.0, 4.0, 6.0], [1.0, 2.0, 3.0], 2, higher=True) == "+2.00 ± 2.48"
    assert regime_report.ahead([1.0], [2.0]) == "–"


# ---- on a GPU, as the paper trains ----


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Two classes of noise on dark and on bright ground."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for split, count in (("train", 64), ("test", 8)):
        for label, name in enumerate(("dark", "light")):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for index in range(count):
                image = rng.integers(100 * label, 100 * label + 120, (32, 32, 3), dtype=np.uint8)
                PIL.Image.fromarray(image).save(tmp_path / "data" / split / name / f"{index}.png")
    return tmp_path / "data"


def test_the_papers_runs_in_small(folder, tmp_path, monkeypatch, capsys) -> None:
    arguments = paper_cifar.PaperArguments(
        dataset=str(folder), model="10-1", max_steps=20, loaders=0, device="cpu", output_dir=str(tmp_path / "out")
    )
    runs = [paper_cifar.make_run(arguments, method, 0) for method in paper_cifar.METHODS]
    for run in runs:
        *_, config, args = parse_arguments(TYPES["run_cifar.py"], [*run.arguments, "--output_dir=out", "--use_cpu"])
        assert (config.num_members, args.per_device_train_batch_size, args.num_train_epochs) == (10, 128, 200)
    times = iter([0, 0, 0, 2 * 60])
    paper_cifar.run_until(runs, 1, lambda: next(times))  # no time is left for the third
    assert [run.is_finished for run in runs] == [True, True, False]
    assert "call this again for 10-1-cifar10_swa-accumulation-0" in capsys.readouterr().out
    path = tmp_path / "figures.json"
    path.write_text(json.dumps(paper_cifar.collect_finished(runs, path, "cpu")))
    methods = {record["method"] for record in json.loads(path.read_text())["runs"]}
    assert {"base", "base, SWA", "late_phase", "late_phase, SWA"} <= methods
    # What is recorded stays where the runs' folder is gone, and a run that was cut off goes on where it was.
    runs[0].folder.rename(tmp_path / "gone")
    resumed = runs[1].folder / "late_phase"
    (runs[1].folder / "finished").unlink()
    assert any(resumed.glob("checkpoint-*"))
    runs[1].start()
    assert runs[1].is_finished
    again = paper_cifar.collect_finished(runs, path, "cpu")
    assert {record["method"] for record in again["runs"]} == methods
    assert "10-1 | cifar10_swa | base, SWA" in paper_cifar.table(again["runs"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "cuda"}, "torch sees no GPU"),
        ({"recipe": "cifar100_swa"}, "recipe must be"),
        ({"dataset": "nowhere"}, "is no folder"),
    ],
)
def test_what_the_papers_script_refuses(change, message, folder, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        paper_cifar.PaperArguments(**{"dataset": str(folder), "device": "cpu"} | change)
