"""
Makes the cards in model_cards/ from runs that happened, each beside the record that its figures come from.

    python examples/make_model_cards.py                                  # trains what was not trained yet
    python examples/make_model_cards.py --run wide-resnet-digits         # one of them
    python examples/make_model_cards.py --render                         # trains nothing: from the records alone
    python examples/make_model_cards.py --output_dir outputs/mine --cards_dir cards

A card is rendered from its record alone: the record holds the finished run's results.json, the configs of the model
and of late-phase training, and the command, the machine and the versions. A run that is found in output_dir, with its
run.json, is not trained again. All need no network.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification, ByT5Tokenizer

import hf_latephase.models  # noqa: F401  # makes their types known to the Auto classes
from hf_latephase import LatePhase, LatePhaseConfig
from hf_latephase.config import CONFIG_NAME
from hf_latephase.core.points import resolve_points
from hf_latephase.publishing.model_card import (
    CardContents,
    describe_late_phase,
    eval_results,
    loading_code,
    render_card,
)


ROOT = Path(__file__).resolve().parent.parent
METHOD = "late_phase"
RUN_NAME = "run.json"
HYPERPARAMETERS = [
    *("seed", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "window", "learning_rate"),
    *("lr_points", "lr_scheduler_type", "decay_after_start", "warmup_steps", "optim", "optim_args", "weight_decay"),
    *("max_grad_norm", "padding", "cutout", "flip"),
]
MEASURES = {"accuracy": "accuracy", "nll": "NLL", "brier_score": "Brier", "calibration_error": "ECE"}
CONTROLS = (
    "`base` is plain training; `accumulation` has one member and updates as rarely as late-phase training does. All "
    "began with the same weights and saw the same minibatches; SWA is the average over time, from the same run. One "
    "seed: small differences may be chance. Minutes are those of training, evaluations on the way included."
)


@dataclass
class Run:
    """A command, and what it trains on."""

    script: str
    recipe: str
    dataset: str
    dataset_type: str
    flags: list[str] = field(default_factory=list)


# Shorter than the demo, in larger minibatches.
_SHORT = [
    *("--method", METHOD, "base", "accumulation", "--max_steps=200", "--eval_steps=40", "--logging_steps=50"),
    *("--curve_bytes=10000", "--per_device_train_batch_size=16", "--num_members=5", "--weights=rank1"),
]
RUNS = {
    "lstm-python-reference": Run(
        "language_modeling/run_enwik8.py",
        "language_modeling/recipes/enwik8_demo.yaml",
        "Python's language reference",
        "python-language-reference",
        _SHORT,
    ),
    "gpt2-python-reference": Run(
        "language_modeling/run_enwik8.py",
        "language_modeling/recipes/enwik8_demo.yaml",
        "Python's language reference",
        "python-language-reference",
        [
            *_SHORT,
            "--model_type=gpt2",
            '--model_config={"n_embd": 64, "n_layer": 2, "n_head": 2}',
            "--learning_rate=2e-3",
        ],
    ),
    "wide-resnet-digits": Run(
        "vision/run_cifar.py", "vision/recipes/cifar_digits.yaml", "scikit-learn's digits", "digits"
    ),
}


def train(run: Run, folder: Path) -> None:
    """Runs the command, unless it has run; its last act is the record of command and machine."""
    if (folder / RUN_NAME).is_file():
        return
    parts = [f"examples/{run.script}", f"examples/{run.recipe}", *run.flags]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, *parts, f"--output_dir={folder.resolve()}", "--report_to=none", "--disable_tqdm=true"]
    started = time.monotonic()
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    record = {
        "command": f"python {shlex.join(parts)}",
        "machine": describe_machine(),
        "minutes": (time.monotonic() - started) / 60,
        "python": platform.python_version(),
    }
    (folder / RUN_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def describe_machine() -> str:
    """The processor, and the GPU if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = os.environ.get("OMP_NUM_THREADS")
    limited = f", {threads} thread{'' if threads == '1' else 's'}" if threads else ""
    return f"{platform.machine()} CPU, {os.cpu_count()} cores{limited}, no GPU"


def read_record(run: Run, folder: Path) -> dict[str, Any]:
    """Collects what a finished run left: everything that its card says."""
    return {
        "run": _read(folder / RUN_NAME),
        "dataset": run.dataset,
        "dataset_type": run.dataset_type,
        "model_config": _read(folder / METHOD / "config.json"),
        "late_phase_config": _read(folder / METHOD / CONFIG_NAME),
        **_read(folder / "results.json"),
    }


def figures(record: dict[str, Any]) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]], list[dict]]:
    """
    Reads the figures of a record.

    Args:
        record (`dict[str, Any]`):
            What [`read_record`] returned.

    Returns:
        `tuple`: The rows of the table by name, the saved model first; the saved model's figures by split, for the
        model index; and its curve.
    """
    average = "EMA" if record["late_phase_config"]["swa_start"] is None else "SWA"
    rows: dict[str, dict[str, float]] = {}
    splits: dict[str, dict[str, dict[str, float]]] = {}
    for result in record["results"]:
        if "averaged_scores" in result:
            variants = {"": result["scores"], average: result["averaged_scores"] or {}}
            for variant, scores in variants.items():
                name = f"{result['method']}, {variant}" if variant else result["method"]
                if scores:
                    named = {f"{split}, bits per character": value for split, value in scores.items()}
                    rows[name] = named | {"minutes": round(result["minutes"], 2)}
                    splits[name] = {split: {"bits_per_character": value} for split, value in scores.items()}
        else:
            name = f"{result['method']}, {result['variant']}" if result["variant"] else result["method"]
            splits[name] = {
                split: {key: scores[key] for key in MEASURES} for split, scores in result["scores"].items()
            }
            inside = {label: result["scores"]["test"][key] for key, label in MEASURES.items()}
            outside = {f"OOD {source}": value for source, value in result["ood_auroc"].items()}
            rows[name] = inside | outside | {"minutes": round(result["minutes"], 2)}
    # What was saved is averaged over time, if anything was.
    saved = f"{METHOD}, {average}" if f"{METHOD}, {average}" in rows else METHOD
    order = {f"**this model** ({saved})": rows.pop(saved)} | rows
    curve = next(result["curve"] for result in record["results"] if result["method"] == METHOD)
    names = {"step": "step"} | {
        measure + end: f"{text} of what was watched{f', {average}' if end else ''}"
        for measure, text in (("bpc", "bits per character"), ("error", "error rate"))
        for end in ("", "_averaged")
    }
    named = [{text: point[key] for key, text in names.items() if key in point} for point in curve]
    return order, splits[saved], named


def make_card(name: str, record: dict[str, Any]) -> ModelCard:
    """
    Renders the card of a record.

    Args:
        name (`str`):
            The model's name.
        record (`dict[str, Any]`):
            What [`read_record`] returned, or its file in model_cards/ holds.

    Returns:
        `huggingface_hub.ModelCard`: The card.
    """
    settings, run = record["settings"], record["run"]
    config = LatePhaseConfig.from_dict(record["late_phase_config"])
    is_text = "window" in settings
    auto = AutoModelForCausalLM if is_text else AutoModelForImageClassification
    # Its layers are all that is asked of it.
    model = auto.from_config(AutoConfig.for_model(**record["model_config"]))
    loading = loading_code(model, ByT5Tokenizer(extra_ids=0) if is_text else None, f"path/to/{name}")
    rows, splits, curve = figures(record)
    task = "text-generation" if is_text else "image-classification"
    index = [
        entry
        for split, results in splits.items()
        for entry in eval_results(results, task, record["dataset"], record["dataset_type"], dataset_split=split)
    ]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        tags=[record["model_config"]["model_type"]],
        metrics=None if is_text else ["accuracy"],
        model_name=name,
        eval_results=index,
    )
    measures = "Lower is better." if is_text else "Of the test images; OOD: AUROC of the predictive entropy."
    watched = f"{settings['curve_bytes']} validation bytes" if is_text else f"{settings['curve_images']} images"
    # Settings that others replace.
    unused = {"learning_rate", "lr_scheduler_type"} if settings.get("lr_points") else set()
    unused |= {"lr_scheduler_type"} if settings.get("decay_after_start") else {"decay_after_start"}
    used = {key: settings[key] for key in HYPERPARAMETERS if settings.get(key) is not None and key not in unused}
    contents = CardContents(
        name=name,
        late_phase=describe_late_phase(LatePhase(model, config), resolve_points(config, settings["max_steps"])),
        loading=loading,
        dataset=record["dataset"],
        results=rows,
        results_note=f"{measures} {CONTROLS} What was watched on the way are the first {watched}.",
        hyperparameters=used,
        history=curve,
        provenance={
            "command": f"`{run['command']}`",
            "seed": str(settings["seed"]),
            "machine": run["machine"],
            "took": f"{run['minutes']:.1f} minutes, all methods together",
            "Python": run["python"],
            **{
                library: settings[library]
                for library in ("transformers", "torch", "torchvision")
                if library in settings
            },
            "figures": f"`{name}.json`, beside this card; made by `python examples/make_model_cards.py`",
        },
    )
    return render_card(data, contents)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def main(argv: list[str] | None = None) -> None:
    """Trains what was not trained yet, and writes records and cards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="+", choices=list(RUNS), default=list(RUNS), help="default: all")
    parser.add_argument("--render", action="store_true", help="only render the cards of the records that are there")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs" / "model_cards", help="of the runs")
    parser.add_argument("--cards_dir", type=Path, default=ROOT / "model_cards", help="of the cards")
    arguments = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    arguments.cards_dir.mkdir(parents=True, exist_ok=True)
    for name in arguments.run:
        record_path = arguments.cards_dir / f"{name}.json"
        if not arguments.render:
            train(RUNS[name], arguments.output_dir / name)
            record = read_record(RUNS[name], arguments.output_dir / name)
            text = json.dumps(record, indent=2, ensure_ascii=False)
            record_path.write_text(text + "\n", encoding="utf-8")
        # From the file, so that the record and the card agree.
        make_card(name, _read(record_path)).save(record_path.with_suffix(".md"))
        print(f"Wrote {record_path.with_suffix('.md')}", flush=True)


if __name__ == "__main__":
    main()
