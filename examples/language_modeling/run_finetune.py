"""
Fine-tunes a pretrained causal language model with late-phase weights beside its controls, in bits per byte.

    cd examples/language_modeling
    python run_finetune.py --model openai-community/gpt2 --data_file my.txt --output_dir outputs/mine
    python run_finetune.py recipes/finetune.yaml --model path/to/a/saved/model --data_file my.txt

A recipe, YAML or JSON, comes first; flags after it override it. The model is any causal language model of the Hub or
a local folder that `save_pretrained` wrote, with its tokenizer. All methods start from its weights and see the same
minibatches in the same order; the model is scored as it is, too. Figures are bits per byte of the text, whatever the
tokenizer, so that models can be compared.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import load_dataset
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where `common` is

import hf_latephase.models  # noqa: F401  # makes the LSTM known to the Auto classes
from byte_lm import TextTrainer, reload_and_check
from common.model_arguments import parse_config
from common.recipe import name_base_gradient_scale, parse_arguments
from common.report import Result, plot_curves, write_report
from hf_latephase import LatePhaseConfig
from hf_latephase.analysis import Forward, score_bytes
from hf_latephase.core.points import steps_at
from hf_latephase.core.weights import find_targets
from hf_latephase.data import TokenWindows, load_bytes
from run_enwik8 import MethodArguments, describe_settings, method_configs


SCORED = ("validation", "test")
SPLITS = ("train", *SCORED)


@dataclass
class PretrainedArguments:
    """The pretrained model."""

    model: str | None = field(
        default=None, metadata={"help": "A model of the Hub, or a local folder that save_pretrained wrote."}
    )
    model_config: dict | str | None = field(
        default=None, metadata={"help": "JSON of config fields to change, e.g. '{\"resid_pdrop\": 0.1}'."}
    )

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model is missing: name a pretrained one, on the Hub or in a local folder.")
        self.model_config = parse_config(self.model_config)


@dataclass
class TextArguments:
    """The text to fine-tune on, and how it is cut up and scored."""

    data_file: str | None = field(default=None, metadata={"help": "A local text file, split 90/5/5."})
    dataset: str | None = field(
        default=None, metadata={"help": "A data set of the Hub, or a local folder of one, with three splits of text."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration, if it has several."})
    text_column: str = field(default="text", metadata={"help": "Its column of text."})
    max_train_tokens: int | None = field(default=None, metadata={"help": "Fine-tune on the beginning only."})
    max_eval_tokens: int | None = field(default=None, metadata={"help": "Score the beginning of the other splits."})
    window: int = field(default=128, metadata={"help": "Tokens predicted in one training sequence."})
    stride: int | None = field(default=None, metadata={"help": "Tokens scored per window. Default: window / 2."})

    def __post_init__(self) -> None:
        if self.data_file is not None and self.dataset is not None:
            raise ValueError("data_file and dataset are both given. Name one text.")
        for name in ("max_train_tokens", "max_eval_tokens", "window", "stride"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if self.stride is None:
            self.stride = max(1, self.window // 2)


@dataclass(frozen=True)
class Split:
    """A stretch of text: its token ids `[N]`, and how many bytes they stand for."""

    ids: np.ndarray
    num_bytes: int


def load_texts(arguments: TextArguments) -> dict[str, str]:
    """
    The text of each split.

    Raises:
        `ValueError`: If a data set lacks a split or the column.
    """
    if arguments.dataset is None:
        splits = load_bytes(arguments.data_file)
        # A character that a split cuts in two is left out.
        return {name: getattr(splits, name).tobytes().decode("utf-8", errors="ignore") for name in SPLITS}
    dataset = load_dataset(arguments.dataset, arguments.dataset_config)
    missing = [name for name in SPLITS if name not in dataset]
    if missing:
        raise ValueError(f"{arguments.dataset} has no split {missing}, only {sorted(dataset)}. Name a text with all.")
    columns = dataset["train"].column_names
    if arguments.text_column not in columns:
        raise ValueError(f"{arguments.dataset} has no column {arguments.text_column!r}, only {columns}: text_column.")
    return {name: "\n".join(dataset[name][arguments.text_column]) for name in SPLITS}


def tokenize(text: str, tokenizer: Any, max_tokens: int | None) -> Split:
    """Tokenizes a text as one sequence, without special tokens."""
    ids = np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)
    if max_tokens is not None and len(ids) > max_tokens:
        ids = ids[:max_tokens]
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return Split(ids, len(text.encode()))


def load_model(arguments: PretrainedArguments, window: int) -> Any:
    """
    The pretrained model.

    Raises:
        `ValueError`: If it has no place for a window, or no such field in its config.
    """
    chosen: Any = arguments.model_config or {}
    model_config = AutoConfig.from_pretrained(arguments.model)
    for name in chosen:
        if not hasattr(model_config, name):
            raise ValueError(f"model_config: {type(model_config).__name__} has no field {name!r}.")
    model = AutoModelForCausalLM.from_pretrained(arguments.model, **chosen)
    positions = getattr(model.config, "max_position_embeddings", None)
    # Windows come with the token before the first target.
    if positions is not None and window + 1 > positions:
        raise ValueError(f"window={window} takes {window + 1} positions, but the model has {positions}.")
    return model


def make_scorer(
    splits: dict[str, Split], arguments: TextArguments, tokenizer: Any, show_progress: bool
) -> Callable[..., float]:
    """A function from a model, a split's name and, if it is not called as it is, a `Forward` to bits per byte."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id

    def score(model: nn.Module, name: str, forward: Forward | None = None) -> float:
        split = splits[name]
        total = score_bytes(
            model,
            split.ids,
            arguments.window,
            arguments.stride,
            forward=forward,
            start_id=start or 0,
            disable_tqdm=not show_progress,
        )
        return total.nll_nats / split.num_bytes / math.log(2)

    return score


def run_method(
    config: LatePhaseConfig,
    pretrained: PretrainedArguments,
    text: TextArguments,
    splits: dict[str, Split],
    tokenizer: Any,
    methods: MethodArguments,
    args: TrainingArguments,
) -> tuple[Result, int]:
    """Fine-tune, score, save and reload one method. Returns its result, and T0 in steps."""
    folder, is_main = args.output_dir, args.process_index == 0
    score = make_scorer(splits, text, tokenizer, show_progress=is_main and not args.disable_tqdm)
    set_seed(args.seed)
    trainer = TextTrainer(
        model=load_model(pretrained, text.window),
        args=args,
        late_phase_config=config,
        train_dataset=TokenWindows(splits["train"].ids, text.window),
        eval_dataset=TokenWindows(splits["validation"].ids, text.window),
        processing_class=tokenizer,
        data_collator=default_data_collator,  # all windows have one length: nothing to pad
        score=lambda model: score(model, "validation"),
        decay_after_start=methods.decay_after_start,
    )
    checkpoint = get_last_checkpoint(folder) if methods.resume and Path(folder).is_dir() else None
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics

    def scores(model: nn.Module, forward: Forward | None) -> dict[str, float]:
        return {name: score(model, name, forward) for name in SCORED}

    result = trainer.result(metrics["train_runtime"], scores, methods.score_members)
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    reloaded, difference = reload_and_check(folder, trainer.averaged_model(), splits["test"].ids[: text.window])
    result.details |= {"parameters": reloaded.num_parameters(), "reload_difference": difference}
    if is_main:
        print(f"\nSaved in {folder}, reloaded as {type(reloaded).__name__}: logits differ by {difference:.1e}.")
    return result, steps_at(config.late_phase_start, trainer.state.max_steps)


def main(argv: list[str] | None = None) -> None:
    """Scores the model as it is, runs every method and reports."""
    types = (PretrainedArguments, TextArguments, MethodArguments, LatePhaseConfig, TrainingArguments)
    *arguments, args = parse_arguments(types, argv, __doc__)
    pretrained, text, methods, config = arguments
    config = name_base_gradient_scale(config, args.optim)
    if args.resume_from_checkpoint is not None:
        raise ValueError("resume_from_checkpoint names one run, and here each method is one. Use --resume.")
    is_main = args.process_index == 0
    tokenizer = AutoTokenizer.from_pretrained(pretrained.model)
    limits = {"train": text.max_train_tokens, "validation": text.max_eval_tokens, "test": text.max_eval_tokens}
    splits = {name: tokenize(content, tokenizer, limits[name]) for name, content in load_texts(text).items()}
    model = load_model(pretrained, text.window)
    configs = method_configs(config, methods.method, model.config)
    for method_config in configs.values():
        find_targets(model, method_config)
    settings = describe_settings(arguments, args)
    note = (
        f"Bits per byte (lower is better) of {splits['validation'].num_bytes} validation and "
        f"{splits['test'].num_bytes} test bytes, every token scored once, windows of {text.window} tokens that score "
        f"their last {text.stride}. The minutes are those of training, with the evaluations for the curves."
    )
    score = make_scorer(splits, text, tokenizer, show_progress=False)
    model.to(args.device)
    before = {name: score(model, name) for name in SCORED}
    results = [Result("before", 0.0, before, curve=[{"step": 0, "bpc": before["validation"]}])]
    average, folder = "EMA" if config.swa_start is None else "SWA", Path(args.output_dir)
    for method, method_config in configs.items():
        if is_main:
            print(f"\n== {method} ({len(results)} of {len(configs)})", flush=True)
        method_args = copy.deepcopy(args)
        method_args.output_dir = str(folder / method)
        result, start = run_method(method_config, pretrained, text, splits, tokenizer, methods, method_args)
        results.append(result)
        if is_main:
            # After every method: what is done stays if a later one fails.
            table = write_report(results, average, settings, note, folder)
            plot_curves(results[1:], average, start, "bits per byte, validation", folder / "curves.png")
    if is_main:
        print(f"\n{table}\nIn {folder}: results.md, results.json, curves.png, and a folder for each method's model.")


if __name__ == "__main__":
    main()
