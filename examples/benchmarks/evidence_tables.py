"""What `evidence.py` compares: for each table its text, its model, its methods, and the rates to choose from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from runs import EXAMPLES, Run
from texts import write_text


SHARED = EXAMPLES.parents[1] / "shared" / "data"


@dataclass(frozen=True)
class Row:
    """
    A line of a table.

    Attributes:
        name (`str`): What it is called.
        run (`str`): The run that it is read out of, a key of the table's `runs`.
        averaged (`bool`): Whether it is the average over time (SWA, EMA) of that run.
        is_late_phase (`bool`): Whether weights are replicated.
    """

    name: str
    run: str
    averaged: bool = False
    is_late_phase: bool = False


@dataclass(frozen=True)
class Table:
    """
    A comparison.

    Attributes:
        name, title, description (`str`): What it is, for the file, the heading and the reader.
        script, recipe (`str`): The script in `examples/` and its recipe.
        text (`str`): `"enwik6"` or `"django"`: what is trained on.
        pretrained (`str`, *optional*): A key of `PRETRAINING`: the model that is fine-tuned.
        runs (`dict[str, list[str]]`): The flags of each run.
        rows (`list[Row]`): The lines.
        rates (`list[float]`): Learning rates to choose from.
        seeds (`list[int]`): The first chooses the rates.
    """

    name: str
    title: str
    description: str
    script: str
    recipe: str
    text: str
    pretrained: str | None
    runs: dict[str, list[str]]
    rows: list[Row]
    rates: list[float]
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])

    def flags(self, folder: Path) -> list[str]:
        """What all runs have in common."""
        flags = [f"--data_file={text_file(self.text, folder)}"]
        return flags + ([f"--model={pretrained_folder(self.pretrained, folder)}"] if self.pretrained else [])

    def prepare(self, folder: Path) -> None:
        """Fetches the text and trains the model to fine-tune, unless they are there."""
        if self.text == "django":
            write_text(text_file("django", folder))
        if self.pretrained is None:
            return
        model, text = self.pretrained.split("_")
        if text == "django":
            write_text(text_file("django", folder))
        flags = [str(EXAMPLES / "recipes" / f"pretrain_{model}.yaml"), f"--data_file={text_file(text, folder)}"]
        Run(folder / "pretrained" / self.pretrained, "run_enwik8.py", flags, {}).start()


def text_file(text: str, folder: Path) -> Path:
    """Where a text lies."""
    return SHARED / "enwik6" if text == "enwik6" else folder / "django.txt"


def pretrained_folder(pretrained: str, folder: Path) -> Path:
    """Where a model to fine-tune lies."""
    return folder / "pretrained" / pretrained / "base"


def fine_tuning(
    model: str, source: str, target: str, rates: list[float], runs: dict[str, list[str]], rows: list[Row]
) -> Table:
    """A small model, trained on one text, fine-tuned on little of another."""
    return Table(
        name=f"finetune_{model}_{target}",
        title=f"Fine-tuning {model} on 60 KB of {target}",
        description=(
            f"A small {model} pretrained on {source} and fine-tuned on the first 60,000 bytes of {target}. Every "
            "update of every method takes five minibatches: replication takes no update away, and `base` and `one "
            "member` are the accumulation control."
        ),
        script="run_finetune.py",
        recipe=f"evidence_finetune_{model}.yaml",
        text=target,
        pretrained=f"{model}_{source}",
        runs=runs,
        rows=rows,
        rates=rates,
    )


BASE, ONE, LATE = ["--method=base"], ["--method=one_member"], ["--method=late_phase"]
SWA, COSINE = ["--swa_start=0.1"], ["--lr_scheduler_type=cosine"]
SCHEDULE_FREE = ["--method=base", "--lr_scheduler_type=constant", "--optim=schedule_free_adamw"]
GPT2_DROPOUT = ['--model_config={"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}']
LSTM_DROPOUT = ['--model_config={"dropout": 0.2}']
GPT2_RUNS = {
    "base": [*BASE, *SWA],
    "ema": [*BASE, "--ema_decay=0.98"],
    "cosine": [*BASE, *SWA, *COSINE],
    "dropout": [*BASE, *SWA, *GPT2_DROPOUT],
    "schedule-free": SCHEDULE_FREE,
    "one": [*ONE, *SWA],
    "one noisy": [*LATE, *SWA, "--num_members=1", "--init_noise=0.15"],
    "late 0": [*LATE, *SWA],
    "late 0.15": [*LATE, *SWA, "--init_noise=0.15"],
}
GPT2_ROWS = [
    Row("base, linear decay", "base"),
    Row("base, linear decay, SWA", "base", averaged=True),
    Row("base, linear decay, EMA", "ema", averaged=True),
    Row("base, cosine decay, SWA", "cosine", averaged=True),
    Row("base, dropout 0.1, SWA", "dropout", averaged=True),
    Row("base, schedule-free AdamW", "schedule-free"),
    Row("one member (rank-1), SWA", "one", averaged=True),
    Row("one member (rank-1), σ0 = 0.15, SWA", "one noisy", averaged=True),
    Row("late-phase rank-1, σ0 = 0, SWA", "late 0", averaged=True, is_late_phase=True),
    Row("late-phase rank-1, σ0 = 0.15", "late 0.15", is_late_phase=True),
    Row("late-phase rank-1, σ0 = 0.15, SWA", "late 0.15", averaged=True, is_late_phase=True),
]
LSTM_RUNS = {
    "base": [*BASE, *SWA],
    "dropout": [*BASE, *SWA, *LSTM_DROPOUT],
    "dropout cosine": [*BASE, *SWA, *COSINE, *LSTM_DROPOUT],
    "schedule-free": [*SCHEDULE_FREE, *LSTM_DROPOUT],
    "one dropout": [*ONE, *SWA, *LSTM_DROPOUT],
    "late 0.3": [*LATE, *SWA, "--init_noise=0.3"],
    "late 0 dropout": [*LATE, *SWA, *LSTM_DROPOUT],
    "late 0.15 dropout": [*LATE, *SWA, *LSTM_DROPOUT, "--init_noise=0.15"],
}
LSTM_ROWS = [
    Row("base, linear decay", "base"),
    Row("base, linear decay, SWA", "base", averaged=True),
    Row("base, dropout 0.2, linear decay", "dropout"),
    Row("base, dropout 0.2, linear decay, SWA", "dropout", averaged=True),
    Row("base, dropout 0.2, cosine decay", "dropout cosine"),
    Row("base, dropout 0.2, schedule-free AdamW", "schedule-free"),
    Row("one member (rank-1), dropout 0.2", "one dropout"),
    Row("late-phase rank-1, σ0 = 0.3", "late 0.3", is_late_phase=True),
    Row("late-phase rank-1, σ0 = 0.3, SWA", "late 0.3", averaged=True, is_late_phase=True),
    Row("late-phase rank-1, dropout 0.2, σ0 = 0", "late 0 dropout", is_late_phase=True),
    Row("late-phase rank-1, dropout 0.2, σ0 = 0.15", "late 0.15 dropout", is_late_phase=True),
]
GPT2_RATES, LSTM_RATES = [5e-4, 1e-3, 2e-3], [4e-3, 8e-3, 1.6e-2]
TABLES = {
    table.name: table
    for table in (
        fine_tuning("gpt2", "django", "enwik6", GPT2_RATES, GPT2_RUNS, GPT2_ROWS),
        fine_tuning("gpt2", "enwik6", "django", GPT2_RATES, GPT2_RUNS, GPT2_ROWS),
        fine_tuning("lstm", "django", "enwik6", LSTM_RATES, LSTM_RUNS, LSTM_ROWS),
        fine_tuning("lstm", "enwik6", "django", LSTM_RATES, LSTM_RUNS, LSTM_ROWS),
    )
}
