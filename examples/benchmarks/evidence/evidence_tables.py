"""What `evidence.py` compares: for each table its text, its model, its methods, and the rates to choose from."""

from __future__ import annotations

import dataclasses

from comparison import AVERAGED, ENSEMBLE, Row, Table


def fine_tuning(
    model: str,
    source: str,
    target: str,
    kilobytes: int,
    rates: list[float],
    runs: dict[str, list[str]],
    rows: list[Row],
) -> Table:
    """A small model, trained on one text, fine-tuned on little of another."""
    return Table(
        name=f"finetune_{model}_{target}_{kilobytes}kb",
        title=f"Fine-tuning {model} on {kilobytes} KB of {target}",
        description=(
            f"A small {model} pretrained on {source}, fine-tuned on the first {kilobytes},000 bytes of {target}. "
            "Every update of every method takes five minibatches: replication takes no update away, and `base` and "
            "`one member` are the accumulation control."
        ),
        script="run_finetune.py",
        recipe=f"evidence_finetune_{'lstm' if model == 'lstm' else 'transformer'}.yaml",
        text=target,
        pretrained=f"{model}_{source}",
        runs=runs,
        rows=rows,
        rates=rates,
        common=[f"--max_train_tokens={kilobytes}000"],
    )


def on_gpu(table: Table, recipe: str) -> Table:
    """The same at a size that asks for one."""
    return dataclasses.replace(
        table, recipe=recipe, device="cuda", deep_ensemble=None, description=f"{table.description} On a GPU, in bf16."
    )


def from_scratch(model: str, text: str, rates: list[float], runs: dict[str, list[str]], rows: list[Row]) -> Table:
    """A small model trained on a part of a text that is too large to overfit."""
    return Table(
        name=f"scratch_{model}_{text}",
        title=f"Training {model} from scratch on {text}",
        description=(
            f"A small {model}, initialised for each seed, trained on {text} for less than a pass, an update each "
            "minibatch: as in the paper, late-phase training has one update in five minibatches from T0 = 0.6 on, and "
            "accumulation is its control. SWA from T0 on, γ = 1/K."
        ),
        script="run_enwik8.py",
        recipe=f"evidence_scratch_{model}.yaml",
        text=text,
        pretrained=None,
        runs=runs,
        rows=rows,
        rates=rates,
    )


def ablations(model: str, source: str, target: str, rate: float) -> Table:
    """The settings of the fine-tuning table, one at a time, at its rate."""
    rows = [Row(name, name, figures=AVERAGED, is_late_phase=True) for name in ABLATIONS]
    table = fine_tuning(model, source, target, 60, [rate], ABLATIONS, rows)
    return dataclasses.replace(
        table,
        name=f"ablations_{model}_{target}",
        title=f"What the settings do: {model} on 60 KB of {target}",
        description=(
            f"The same as in “{table.title}”, always with SWA; one setting at a time differs from those of the first "
            "row. At one rate, which is not tuned for each."
        ),
        seeds=[0, 1, 2],
        deep_ensemble=None,
    )


BASE, ONE, LATE = ["--method=base"], ["--method=one_member"], ["--method=late_phase"]
LATE_NORM = [*LATE, "--weights", "norm"]
SWA, EMA = ["--swa_start=0.1"], ["--ema_decay=0.98", "--ema_start=0"]
COSINE, CONSTANT = ["--lr_scheduler_type=cosine"], ["--lr_scheduler_type=constant_with_warmup"]
SCHEDULE_FREE = ["--method=base", "--lr_scheduler_type=constant", "--optim=schedule_free_adamw"]
BATCH_ENSEMBLE = [*LATE, "--late_phase_start=0", "--score_members=true"]
LSTM_DROPOUT = ['--model_config={"dropout": 0.2}']


def gpt2_dropout(rate: float) -> list[str]:
    """All three of GPT-2's."""
    return [f'--model_config={{"resid_pdrop": {rate}, "embd_pdrop": {rate}, "attn_pdrop": {rate}}}']


MILD_DROPOUT = {f"{rate}": gpt2_dropout(rate) for rate in (0.02, 0.05, 0.1)}
NOISE = "--init_noise=0.15"
TRANSFORMER_RUNS = {
    "base": [*BASE, *SWA],
    "ema": [*BASE, *EMA],
    "cosine": [*BASE, *SWA, *COSINE],
    "schedule-free": SCHEDULE_FREE,
    **{f"dropout {rate}": [*BASE, *SWA, *flags] for rate, flags in MILD_DROPOUT.items()},
    "one": [*ONE, *SWA],
    "one noisy": [*LATE, *SWA, "--num_members=1", NOISE],
    "late 0": [*LATE, *SWA],
    "late 0.15": [*LATE, *SWA, NOISE],
}
TRANSFORMER_ROWS = [
    Row("base, linear decay", "base"),
    Row("base, linear decay, SWA", "base", figures=AVERAGED),
    Row("base, linear decay, EMA", "ema", figures=AVERAGED),
    Row("base, cosine decay, SWA", "cosine", figures=AVERAGED),
    Row("base, schedule-free AdamW", "schedule-free"),
    *(Row(f"base, dropout {rate}, SWA", f"dropout {rate}", figures=AVERAGED) for rate in MILD_DROPOUT),
    Row("one member (rank-1), SWA", "one", figures=AVERAGED),
    Row("one member (rank-1), σ0 = 0.15, SWA", "one noisy", figures=AVERAGED),
    Row("late-phase rank-1, σ0 = 0, SWA", "late 0", figures=AVERAGED, is_late_phase=True),
    Row("late-phase rank-1, σ0 = 0.15", "late 0.15", is_late_phase=True),
    Row("late-phase rank-1, σ0 = 0.15, SWA", "late 0.15", figures=AVERAGED, is_late_phase=True),
]
# What stops early overfits less: in half as many updates.
HALF = ["--max_steps=80"]
HALF_RUNS = {
    "base half": [*BASE, *SWA, *HALF],
    "dropout 0.05 half": [*BASE, *SWA, *gpt2_dropout(0.05), *HALF],
    "late 0.15 half": [*LATE, *SWA, NOISE, *HALF],
}
HALF_ROWS = [
    Row("base, half the updates, SWA", "base half", figures=AVERAGED),
    Row("base, dropout 0.05, half the updates, SWA", "dropout 0.05 half", figures=AVERAGED),
    Row("late-phase rank-1, σ0 = 0.15, half the updates, SWA", "late 0.15 half", AVERAGED, is_late_phase=True),
]
ENSEMBLE_RUNS = {"batch ensemble": [*BATCH_ENSEMBLE, NOISE]}
BATCH_ENSEMBLE_ROW = Row("BatchEnsemble, five predictions", "batch ensemble", figures=ENSEMBLE)
# Norm layers add no parameters: their one member is the base.
FAMILY_RUNS = {
    "late norm": [*LATE_NORM, *SWA],
    "late both": [*LATE, *SWA, "--weights", "norm", "rank1"],
}
FAMILY_ROWS = [
    Row("late-phase norm, σ0 = 0, SWA", "late norm", AVERAGED, is_late_phase=True),
    Row("late-phase norm and rank-1, σ0 = 0, SWA", "late both", AVERAGED, is_late_phase=True),
]
# What SWA is made for; and the base's gradients as means, as plain accumulation has them.
MEAN = ["--base_gradient_scale=0.2"]
MEAN_RUNS = {
    "constant": [*BASE, *SWA, *CONSTANT],
    "late norm mean": [*LATE_NORM, *SWA, *MEAN],
    "late norm mean constant": [*LATE_NORM, *SWA, *MEAN, *CONSTANT],
}
MEAN_ROWS = [
    Row("base, constant rate, SWA", "constant", AVERAGED),
    Row("late-phase norm, σ0 = 0, γ = 1/K, SWA", "late norm mean", AVERAGED, is_late_phase=True),
    Row(
        *("late-phase norm, σ0 = 0, γ = 1/K, constant rate, SWA", "late norm mean constant", AVERAGED),
        is_late_phase=True,
    ),
]
# Against gradients that are sums from T0 on.
ONE_SUM = [*LATE_NORM, "--num_members=1", "--base_gradient_scale=5"]
SUM_RUNS = {
    "one sum": [*ONE_SUM, *SWA],
    "one sum ema": [*ONE_SUM, *EMA],
    "one noisy ema": [*LATE, *EMA, "--num_members=1", NOISE],
    "late both 0.15 ema": [*LATE, *EMA, NOISE, "--weights", "norm", "rank1"],
    "late norm 0.15 ema": [*LATE_NORM, *EMA, NOISE],
    "late norm constant": [*LATE_NORM, *SWA, *CONSTANT],
}
SUM_ROWS = [
    Row("base, gradients × 5 from T0 on, SWA", "one sum", AVERAGED),
    Row("base, gradients × 5 from T0 on, EMA", "one sum ema", AVERAGED),
    Row("one member (rank-1), σ0 = 0.15, EMA", "one noisy ema", AVERAGED),
    Row("late-phase norm and rank-1, σ0 = 0.15, EMA", "late both 0.15 ema", AVERAGED, is_late_phase=True),
    Row("late-phase norm, σ0 = 0.15, EMA", "late norm 0.15 ema", AVERAGED, is_late_phase=True),
    Row("late-phase norm, σ0 = 0, constant rate, SWA", "late norm constant", AVERAGED, is_late_phase=True),
]
# The best that noise and dropout do.
NOISE_RUNS = {
    "dropout 0.02 constant": [*BASE, *SWA, *CONSTANT, *gpt2_dropout(0.02)],
    "late 0.15 mean constant": [*LATE, *SWA, NOISE, *MEAN, *CONSTANT],
}
NOISE_ROWS = [
    Row("base, dropout 0.02, constant rate, SWA", "dropout 0.02 constant", AVERAGED),
    Row(
        *("late-phase rank-1, σ0 = 0.15, γ = 1/K, constant rate, SWA", "late 0.15 mean constant", AVERAGED),
        is_late_phase=True,
    ),
]
# EMA in place of SWA, of all that SWA helped.
EMA_RUNS = {
    "constant ema": [*BASE, *EMA, *CONSTANT],
    "one ema": [*ONE, *EMA],
    "late 0.15 ema": [*LATE, *EMA, NOISE],
    "late norm mean constant ema": [*LATE_NORM, *EMA, *MEAN, *CONSTANT],
}
EMA_ROWS = [
    Row("base, constant rate, EMA", "constant ema", AVERAGED),
    Row("one member (rank-1), EMA", "one ema", AVERAGED),
    Row("late-phase rank-1, σ0 = 0.15, EMA", "late 0.15 ema", AVERAGED, is_late_phase=True),
    Row(
        *("late-phase norm, σ0 = 0, γ = 1/K, constant rate, EMA", "late norm mean constant ema", AVERAGED),
        is_late_phase=True,
    ),
]
LSTM_RUNS = {
    "base": [*BASE, *SWA],
    "dropout": [*BASE, *SWA, *LSTM_DROPOUT],
    "dropout ema": [*BASE, *EMA, *LSTM_DROPOUT],
    "dropout cosine": [*BASE, *SWA, *COSINE, *LSTM_DROPOUT],
    "dropout constant": [*BASE, *SWA, *CONSTANT, *LSTM_DROPOUT],
    "schedule-free": [*SCHEDULE_FREE, *LSTM_DROPOUT],
    "one dropout": [*ONE, *SWA, *LSTM_DROPOUT],
    "one dropout ema": [*ONE, *EMA, *LSTM_DROPOUT],
    "late 0.3": [*LATE, *SWA, "--init_noise=0.3"],
    "late 0 dropout": [*LATE, *SWA, *LSTM_DROPOUT],
    "late 0.15 dropout": [*LATE, *SWA, *LSTM_DROPOUT, NOISE],
    "late mean dropout": [*LATE, *SWA, *LSTM_DROPOUT, *MEAN],
    "late mean dropout ema": [*LATE, *EMA, *LSTM_DROPOUT, *MEAN],
    "late mean dropout constant": [*LATE, *SWA, *LSTM_DROPOUT, *MEAN, *CONSTANT],
    "batch ensemble": [*BATCH_ENSEMBLE, NOISE, *LSTM_DROPOUT],
}
LSTM_ROWS = [
    Row("base, linear decay", "base"),
    Row("base, linear decay, SWA", "base", figures=AVERAGED),
    Row("base, dropout 0.2, linear decay", "dropout"),
    Row("base, dropout 0.2, linear decay, SWA", "dropout", figures=AVERAGED),
    Row("base, dropout 0.2, linear decay, EMA", "dropout ema", figures=AVERAGED),
    Row("base, dropout 0.2, cosine decay", "dropout cosine"),
    Row("base, dropout 0.2, constant rate, SWA", "dropout constant", figures=AVERAGED),
    Row("base, dropout 0.2, schedule-free AdamW", "schedule-free"),
    Row("one member (rank-1), dropout 0.2", "one dropout"),
    Row("one member (rank-1), dropout 0.2, SWA", "one dropout", figures=AVERAGED),
    Row("one member (rank-1), dropout 0.2, EMA", "one dropout ema", figures=AVERAGED),
    Row("late-phase rank-1, σ0 = 0.3", "late 0.3", is_late_phase=True),
    Row("late-phase rank-1, σ0 = 0.3, SWA", "late 0.3", figures=AVERAGED, is_late_phase=True),
    Row("late-phase rank-1, dropout 0.2, σ0 = 0", "late 0 dropout", is_late_phase=True),
    Row("late-phase rank-1, dropout 0.2, σ0 = 0.15", "late 0.15 dropout", is_late_phase=True),
    Row("late-phase rank-1, dropout 0.2, γ = 1/K", "late mean dropout", is_late_phase=True),
    Row("late-phase rank-1, dropout 0.2, γ = 1/K, SWA", "late mean dropout", figures=AVERAGED, is_late_phase=True),
    Row("late-phase rank-1, dropout 0.2, γ = 1/K, EMA", "late mean dropout ema", figures=AVERAGED, is_late_phase=True),
    Row(
        *("late-phase rank-1, dropout 0.2, γ = 1/K, constant rate, SWA", "late mean dropout constant", AVERAGED),
        is_late_phase=True,
    ),
    BATCH_ENSEMBLE_ROW,
]
SCRATCH_SWA = ["--swa_start=0.6"]
ACCUMULATION = ["--method=accumulation", *MEAN]
# All members in every update, as BatchEnsemble is trained: four, which divide a minibatch.
TOGETHER = ["--num_members=4", "--member_assignment=sample", "--dataloader_drop_last=true"]
SCRATCH_RUNS = {
    "base": [*BASE, *SCRATCH_SWA],
    "ema": [*BASE, *EMA],
    "cosine": [*BASE, *SCRATCH_SWA, *COSINE],
    "constant": [*BASE, *SCRATCH_SWA, *CONSTANT],
    "schedule-free": SCHEDULE_FREE,
    "one": [*ONE, *SCRATCH_SWA],
    "accumulation": [*ACCUMULATION, *SCRATCH_SWA],
    "accumulation constant": [*ACCUMULATION, *SCRATCH_SWA, *CONSTANT],
    "late": [*LATE, *SCRATCH_SWA, *MEAN],
    "late ema": [*LATE, *EMA, *MEAN],
    "late constant": [*LATE, *SCRATCH_SWA, *MEAN, *CONSTANT],
    "batch ensemble": [*BATCH_ENSEMBLE, *TOGETHER, "--init_noise=0.5", "--base_gradient_scale=0.25"],
}
SCRATCH_ROWS = [
    Row("base, constant rate", "constant"),
    Row("base, constant rate, SWA", "constant", figures=AVERAGED),
    Row("base, linear decay", "base"),
    Row("base, linear decay, SWA", "base", figures=AVERAGED),
    Row("base, linear decay, EMA", "ema", figures=AVERAGED),
    Row("base, cosine decay", "cosine"),
    Row("base, schedule-free AdamW", "schedule-free"),
    Row("one member (rank-1), linear decay", "one"),
    Row("one member (rank-1), linear decay, SWA", "one", figures=AVERAGED),
    Row("one member (rank-1), accumulation from T0 on, linear decay", "accumulation"),
    Row("one member (rank-1), accumulation from T0 on, constant rate", "accumulation constant"),
    Row("one member (rank-1), accumulation from T0 on, constant rate, SWA", "accumulation constant", figures=AVERAGED),
    Row("late-phase rank-1, linear decay", "late", is_late_phase=True),
    Row("late-phase rank-1, linear decay, SWA", "late", figures=AVERAGED, is_late_phase=True),
    Row("late-phase rank-1, linear decay, EMA", "late ema", figures=AVERAGED, is_late_phase=True),
    Row("late-phase rank-1, constant rate", "late constant", is_late_phase=True),
    Row("late-phase rank-1, constant rate, SWA", "late constant", figures=AVERAGED, is_late_phase=True),
    Row("BatchEnsemble, four predictions", "batch ensemble", figures=ENSEMBLE),
]
# A much larger model: the rows that decide.
LARGE_RUNS = {
    "base": [*BASE, *SWA],
    "constant": [*BASE, *SWA, *CONSTANT],
    "dropout 0.1": [*BASE, *SWA, *gpt2_dropout(0.1)],
    "late norm mean": [*LATE_NORM, *SWA, *MEAN],
    "late norm mean constant": [*LATE_NORM, *SWA, *MEAN, *CONSTANT],
}
LARGE_ROWS = [
    *TRANSFORMER_ROWS[:2],
    *MEAN_ROWS,
    Row("base, dropout 0.1, SWA", "dropout 0.1", AVERAGED),
]
# What a transformer has and the LSTM has not: norm layers.
NORM_RUNS = {
    "norm": [*LATE, *SCRATCH_SWA, *MEAN, "--weights", "norm"],
    "both": [*LATE, *SCRATCH_SWA, *MEAN, "--weights", "norm", "rank1"],
}
NORM_ROWS = [
    Row("late-phase norm, linear decay", "norm", is_late_phase=True),
    Row("late-phase norm and rank-1, linear decay", "both", is_late_phase=True),
]
# One setting at a time beside that of the table above; of the ten members an update takes ten smaller minibatches.
NOISY = [*LATE, *SWA, NOISE]
TEN = ["--per_device_train_batch_size=4", "--gradient_accumulation_steps=10"]
ABLATIONS = {
    "K = 5, T0 = 0.05, σ0 = 0.15, rank-1": NOISY,
    "σ0 = 0.05": [*LATE, *SWA, "--init_noise=0.05"],
    "σ0 = 0.1": [*LATE, *SWA, "--init_noise=0.1"],
    "σ0 = 0.2": [*LATE, *SWA, "--init_noise=0.2"],
    "σ0 = 0.3": [*LATE, *SWA, "--init_noise=0.3"],
    "K = 2, ten minibatches": [*NOISY, *TEN, "--num_members=2"],
    "K = 5, ten minibatches": [*NOISY, *TEN],
    "K = 10, ten minibatches": [*NOISY, *TEN, "--num_members=10"],
    "T0 = 0": [*NOISY, "--late_phase_start=0"],
    "T0 = 0.3": [*NOISY, "--late_phase_start=0.3", "--swa_start=0.3"],
    "T0 = 0.6": [*NOISY, "--late_phase_start=0.6", "--swa_start=0.6"],
    "norm": [*NOISY, "--weights", "norm"],
    "norm and rank-1": [*NOISY, "--weights", "norm", "rank1"],
    "rank-1, first block only": [*NOISY, "--target_modules", r"transformer\.h\.0\..*"],
    "rank-1, second block only": [*NOISY, "--target_modules", r"transformer\.h\.1\..*"],
    "rows dealt out (by sample)": [
        *NOISY, "--member_assignment=sample", "--per_device_train_batch_size=40", "--gradient_accumulation_steps=1",
        "--dataloader_drop_last=true",
    ],
    "γ = 0.2": [*NOISY, *MEAN],
    "cosine decay": [*NOISY, *COSINE],
    "constant rate": [*NOISY, *CONSTANT],
}  # fmt: skip
SCRATCH_RATES = {"lstm": [8e-3, 1.6e-2, 3.2e-2], "gpt2": [2e-3, 4e-3, 8e-3]}
TRANSFORMER_RATES, LSTM_RATES = [5e-4, 1e-3, 2e-3], [4e-3, 8e-3, 1.6e-2]
TABLES = {
    table.name: table
    for table in (
        fine_tuning(
            *("gpt2", "django", "enwik6", 60, TRANSFORMER_RATES),
            TRANSFORMER_RUNS
            | HALF_RUNS
            | MEAN_RUNS
            | NOISE_RUNS
            | EMA_RUNS
            | ENSEMBLE_RUNS
            | {"dropout 0.05 ema": [*BASE, *EMA, *gpt2_dropout(0.05)]}
            | {"both 0.15": [*LATE, *SWA, NOISE, "--weights", "norm", "rank1"]},
            [
                *(*TRANSFORMER_ROWS, *HALF_ROWS, *MEAN_ROWS, *NOISE_ROWS, *EMA_ROWS),
                Row("base, dropout 0.05, EMA", "dropout 0.05 ema", figures=AVERAGED),
                Row("late-phase norm and rank-1, σ0 = 0.15, SWA", "both 0.15", AVERAGED, is_late_phase=True),
                BATCH_ENSEMBLE_ROW,
            ],
        ),
        fine_tuning(
            *("gpt2", "enwik6", "django", 60, TRANSFORMER_RATES),
            TRANSFORMER_RUNS | HALF_RUNS | FAMILY_RUNS | MEAN_RUNS | SUM_RUNS | EMA_RUNS | ENSEMBLE_RUNS,
            [
                *(*TRANSFORMER_ROWS, *HALF_ROWS, *FAMILY_ROWS, *MEAN_ROWS, *SUM_ROWS, *EMA_ROWS),
                BATCH_ENSEMBLE_ROW,
            ],
        ),
        on_gpu(
            fine_tuning("gpt2-25m", "django", "enwik6", 200, [2.5e-4, 5e-4, 1e-3], LARGE_RUNS, LARGE_ROWS),
            "evidence_finetune_gpt2-25m.yaml",
        ),
        fine_tuning("lstm", "django", "enwik6", 60, LSTM_RATES, LSTM_RUNS, LSTM_ROWS),
        from_scratch("lstm", "django", SCRATCH_RATES["lstm"], SCRATCH_RUNS, SCRATCH_ROWS),
        from_scratch("gpt2", "django", SCRATCH_RATES["gpt2"], SCRATCH_RUNS | NORM_RUNS, [*SCRATCH_ROWS, *NORM_ROWS]),
        ablations("gpt2", "django", "enwik6", 1e-3),
    )
}
