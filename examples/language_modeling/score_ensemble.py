"""
Scores saved language models together: the deep ensemble, which predicts the mean of their probabilities.

    cd examples/language_modeling
    python score_ensemble.py --models outputs/a outputs/b --data_file my.txt --output_dir outputs/both

The models are what `run_finetune.py`, `run_enwik8.py` or anybody's `save_pretrained` wrote, with one tokenizer.
Figures are bits per byte, of each model and of all together. It costs as many times the training and the inference.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where `common` is

from common.recipe import parse_arguments
from common.report import Result, write_report
from hf_latephase.analysis import is_recurrent, mean_forward, model_forward
from run_finetune import SCORED, TextArguments, load_texts, make_scorer, tokenize


@dataclass
class EnsembleArguments:
    """The models."""

    models: list[str] = field(default_factory=list, metadata={"help": "Folders, or names on the Hub; at least two."})

    def __post_init__(self) -> None:
        if len(self.models) < 2:
            raise ValueError(f"models: an ensemble takes at least two, got {self.models}.")


def main(argv: list[str] | None = None) -> None:
    """Scores each model and their ensemble, and reports."""
    ensemble, text, args = parse_arguments((EnsembleArguments, TextArguments, TrainingArguments), argv, __doc__)
    tokenizer = AutoTokenizer.from_pretrained(ensemble.models[0])
    texts = load_texts(text)
    splits = {name: tokenize(texts[name], tokenizer, text.max_eval_tokens) for name in SCORED}
    score = make_scorer(splits, text, tokenizer, show_progress=not args.disable_tqdm)
    models = nn.ModuleList(AutoModelForCausalLM.from_pretrained(name) for name in ensemble.models).to(args.device)
    results = [
        Result(name, 0.0, {split: score(model, split) for split in SCORED})
        for name, model in zip(ensemble.models, models, strict=True)
    ]
    recurrent = is_recurrent(models[0])
    forward = mean_forward([model_forward(model, carries_state=recurrent) for model in models])
    models.carries_state = recurrent  # type: ignore[assignment]
    results.append(Result("ensemble", 0.0, {split: score(models, split, forward) for split in SCORED}))
    note = "Bits per byte, lower is better; the ensemble is the mean of the models' predicted probabilities."
    settings = {"models": ensemble.models, "window": text.window, "stride": text.stride, "torch": torch.__version__}
    print(write_report(results, "SWA", settings, note, Path(args.output_dir)))


if __name__ == "__main__":
    main()
