"""
Trains a byte-level language model with late-phase weights beside its controls, and compares them in bits per byte.

    cd examples/language_modeling
    python run_enwik8.py recipes/enwik8_demo.yaml
    python run_enwik8.py recipes/enwik8_demo.yaml --method late_phase base --seed 1
    python run_enwik8.py --model_type lstm --data_file my.txt --output_dir outputs/mine --max_steps 1000

A recipe, YAML or JSON, comes first; flags after it override it. All methods start from the same weights and see the
same minibatches in the same order; each is scored with and without averaging over time (SWA or EMA), from one run.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    ByT5Tokenizer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where `common` is

from byte_lm import TextTrainer, reload_and_check, sample_text
from common.model_arguments import ModelArguments, check_config
from common.recipe import check_methods, name_base_gradient_scale, parse_arguments
from common.report import Result, plot_curves, write_report
from hf_latephase import LatePhaseConfig
from hf_latephase.analysis import Forward, is_recurrent, score_bytes
from hf_latephase.compat import PreTrainedConfig
from hf_latephase.core.points import steps_at
from hf_latephase.data import BYTE_VOCAB_SIZE, ByteSplits, ByteWindows, encode_bytes, load_bytes
from hf_latephase.models import LSTMLMConfig


METHODS = ("late_phase", "base", "one_member", "accumulation")
LSTM = "lstm"
# Where state is carried the length of a chunk changes no figure: long ones are cheaper.
RECURRENT_CHUNK = 1000
PROMPT_BYTES = 50


@dataclass
class LanguageModelArguments(ModelArguments):
    """The model, built from a config with fresh weights."""

    model_type: str = field(
        default=LSTM, metadata={"help": "lstm, or any causal language model of transformers: gpt2, llama, ..."}
    )


@dataclass
class DataArguments:
    """The text, and how it is cut up and scored."""

    data_file: str | None = field(
        default=None, metadata={"help": "A local file, split 90/5/5; any bytes will do. Takes the place of dataset."}
    )
    dataset: str | None = field(
        default=None,
        metadata={"help": "enwik8: downloaded and verified. Neither this nor data_file: Python's language reference."},
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where the download is kept."})
    max_bytes: int | None = field(
        default=None, metadata={"help": "Use the beginning of each split, this much in all."}
    )
    window: int = field(default=100, metadata={"help": "Bytes predicted in one training sequence."})
    stride: int | None = field(
        default=None, metadata={"help": "Bytes scored per window (models without carried state). Default: window / 2."}
    )
    max_eval_bytes: int | None = field(default=None, metadata={"help": "Score the beginning of the other splits."})
    curve_bytes: int = field(default=50_000, metadata={"help": "Validation bytes scored for the curves on the way."})
    sample_bytes: int = field(default=200, metadata={"help": "Length of the generated sample."})

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_eval_bytes", "curve_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if self.stride is None:
            self.stride = max(1, self.window // 2)


@dataclass
class MethodArguments:
    """What is compared."""

    method: list[str] = field(
        default_factory=lambda: list(METHODS),
        metadata={"help": f"One or several of {', '.join(METHODS)}. Default: all."},
    )
    decay_after_start: bool = field(
        default=False,
        metadata={"help": "Keep the rate until T0, then let it fall linearly to 0. Replaces lr_scheduler_type."},
    )
    score_members: bool = field(
        default=False, metadata={"help": "Score the ensemble of the members too, which takes K times as long."}
    )
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint of each method."})

    def __post_init__(self) -> None:
        check_methods(self.method, METHODS)


def build_config(model_arguments: ModelArguments, window: int) -> PreTrainedConfig:
    """The model's config, for bytes, with as many positions as a training sequence has inputs."""
    model_type = LSTMLMConfig.model_type if model_arguments.model_type == LSTM else model_arguments.model_type
    chosen: dict[str, Any] = dict(model_arguments.model_config or {})
    defaults = check_config(model_type, chosen)
    settings = {"vocab_size": BYTE_VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    if hasattr(defaults, "max_position_embeddings"):
        # Windows come with the byte before the first target.
        settings["max_position_embeddings"] = window + 1
    return AutoConfig.for_model(model_type, **(settings | chosen))


def method_configs(
    config: LatePhaseConfig, methods: list[str], model_config: PreTrainedConfig
) -> dict[str, LatePhaseConfig]:
    """
    What each method is, as a `LatePhaseConfig`: a control is late-phase training with one member.

    Args:
        config (`LatePhaseConfig`):
            The settings of `late_phase`.
        methods (`list[str]`):
            The methods asked for.
        model_config (`PreTrainedConfig`):
            The model's config.

    Returns:
        `dict[str, LatePhaseConfig]`: By method, in the order asked for.
    """
    one_member = dataclasses.replace(config, num_members=1, cycle_length=None, init_noise=0.0, base_gradient_scale=1.0)
    minibatches = config.cycle_length or (config.num_members if config.member_assignment == "minibatch" else 1)
    # Families that add no parameters: with one member they leave the model what it is.
    if model_config.model_type == LSTMLMConfig.model_type:
        plain = {"weights": ["full"], "target_modules": ["lstm"]}
    else:
        plain = {"weights": ["norm"], "target_modules": None}
    configs = {
        "late_phase": config,
        "base": dataclasses.replace(one_member, member_assignment="minibatch", exclude_modules=None, **plain),
        "one_member": one_member,
        "accumulation": dataclasses.replace(
            one_member,
            cycle_length=minibatches,
            # The members' base gradients are summed; a single member's is a mean.
            base_gradient_scale=config.base_gradient_scale * config.num_members,
        ),
    }
    return {method: configs[method] for method in methods}


def load_splits(arguments: DataArguments) -> ByteSplits:
    """The text, cut to `max_bytes` in the proportions of its splits, what is scored to `max_eval_bytes`."""
    # A flag must be able to replace what a recipe names.
    dataset = arguments.dataset if arguments.data_file is None else None
    splits = load_bytes(arguments.data_file, dataset, arguments.cache_dir)
    if arguments.max_bytes is not None:
        share = min(1.0, arguments.max_bytes / sum(map(len, splits)))
        splits = ByteSplits(*(split[: max(1, int(len(split) * share))] for split in splits))
    limit = arguments.max_eval_bytes
    return ByteSplits(splits.train, splits.validation[:limit], splits.test[:limit])


def make_scorer(data: DataArguments, show_progress: bool) -> Callable[..., float]:
    """A function from a model, bytes and, if it is not called as it is, a `Forward` to bits per character."""

    def score(model: nn.Module, symbols: Any, forward: Forward | None = None) -> float:
        window = RECURRENT_CHUNK if is_recurrent(model) else data.window
        stride = None if is_recurrent(model) else data.stride
        total = score_bytes(model, symbols, window, stride, forward=forward, disable_tqdm=not show_progress)
        return total.bits_per_character

    return score


def run_method(
    config: LatePhaseConfig,
    model_config: PreTrainedConfig,
    splits: ByteSplits,
    data: DataArguments,
    methods: MethodArguments,
    args: TrainingArguments,
) -> tuple[Result, int]:
    """Train, score, save, reload and sample one method. Returns its result, and T0 in steps."""
    folder, is_main = args.output_dir, args.process_index == 0
    watched = splits.validation[: data.curve_bytes]
    score_quietly = make_scorer(data, show_progress=False)
    set_seed(args.seed)  # the same initial weights for every method
    trainer = TextTrainer(
        model=AutoModelForCausalLM.from_config(model_config),
        args=args,
        late_phase_config=config,
        train_dataset=ByteWindows(splits.train, data.window),
        eval_dataset=ByteWindows(watched, data.window),
        processing_class=ByT5Tokenizer(extra_ids=0),
        data_collator=default_data_collator,  # all windows have one length: nothing to pad
        score=lambda model: score_quietly(model, watched),
        decay_after_start=methods.decay_after_start,
    )
    checkpoint = get_last_checkpoint(folder) if methods.resume and Path(folder).is_dir() else None
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics

    score = make_scorer(data, show_progress=is_main and not args.disable_tqdm)

    def scores(model: nn.Module, forward: Forward | None) -> dict[str, float]:
        watched = {"validation": splits.validation, "test": splits.test}
        return {name: score(model, symbols, forward) for name, symbols in watched.items()}

    result = trainer.result(metrics["train_runtime"], scores, methods.score_members)
    if config.num_members > 1:
        members = trainer.evaluate_members()
        result.details["members"] = members
        if is_main:
            print(f"\nThe members over windows of the watched text, each read cold; loss in nats:\n{members}")
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    reloaded, difference = reload_and_check(folder, trainer.averaged_model(), encode_bytes(splits.test[: data.window]))
    text = sample_text(reloaded, splits.test[:PROMPT_BYTES].tobytes(), data.sample_bytes, args.seed)
    result.details |= {"parameters": reloaded.num_parameters(), "reload_difference": difference, "sample": text}
    if is_main:
        print(f"\nSaved in {folder}, reloaded as {type(reloaded).__name__}: logits differ by {difference:.1e}.")
        print(f"A sample after {PROMPT_BYTES} bytes of the test text:\n{text}\n", flush=True)
    return result, steps_at(config.late_phase_start, trainer.state.max_steps)


def describe(model_config: PreTrainedConfig, data: DataArguments, splits: ByteSplits) -> str:
    """How to read the table."""
    if model_config.model_type == LSTMLMConfig.model_type:
        reading = "state carried over the whole split"
    else:
        reading = f"windows of {data.window} bytes that score their last {data.stride}"
    watched = min(data.curve_bytes, len(splits.validation))
    return (
        f"Bits per character (lower is better) of {len(splits.validation)} validation and {len(splits.test)} test "
        f"bytes, every byte scored once, {reading}. The curves and the table of members show the first {watched} "
        "validation bytes. The minutes are those of training, with the evaluations for the curves."
    )


def describe_settings(arguments: list[Any], args: TrainingArguments) -> dict[str, Any]:
    """The settings worth keeping beside the figures."""
    names = """seed max_steps num_train_epochs per_device_train_batch_size gradient_accumulation_steps learning_rate
        weight_decay lr_scheduler_type warmup_steps optim adam_beta1 adam_beta2 max_grad_norm bf16 fp16 world_size"""
    settings = {key: value for part in arguments for key, value in dataclasses.asdict(part).items()}
    settings |= {name: getattr(args, name) for name in names.split()}
    return settings | {"torch": torch.__version__, "transformers": transformers.__version__}


def main(argv: list[str] | None = None) -> None:
    """Runs every method and reports."""
    types = (LanguageModelArguments, DataArguments, MethodArguments, LatePhaseConfig, TrainingArguments)
    *arguments, args = parse_arguments(types, argv, __doc__)
    model_arguments, data, methods, config = arguments
    config = name_base_gradient_scale(config, args.optim)
    if args.resume_from_checkpoint is not None:
        raise ValueError("resume_from_checkpoint names one run, and here each method is one. Use --resume.")

    splits = load_splits(data)
    model_config = build_config(model_arguments, data.window)
    configs = method_configs(config, methods.method, model_config)
    settings, note = describe_settings(arguments, args), describe(model_config, data, splits)
    average = "EMA" if config.swa_start is None else "SWA"
    ylabel = f"bits per character, first {min(data.curve_bytes, len(splits.validation))} validation bytes"
    folder, is_main = Path(args.output_dir), args.process_index == 0
    results: list[Result] = []
    for method, method_config in configs.items():
        if is_main:
            print(f"\n== {method} ({len(results) + 1} of {len(configs)})", flush=True)
        method_args = copy.deepcopy(args)
        method_args.output_dir = str(folder / method)
        result, start = run_method(method_config, model_config, splits, data, methods, method_args)
        results.append(result)
        if is_main:
            # After every method: what is done stays if a later one fails.
            table = write_report(results, average, settings, note, folder)
            plot_curves(results, average, start, ylabel, folder / "curves.png")
    if is_main:
        print(f"\n{table}\nIn {folder}: results.md, results.json, curves.png, and a folder for each method's model.")


if __name__ == "__main__":
    main()
