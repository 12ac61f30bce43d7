"""What `regime.py` runs: tasks, methods, rates, sizes of minibatches, seeds."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from runs import Run


RECIPES = Path(__file__).with_name("recipes")


AVERAGES = {"SWA": ["--swa_start=0.7"], "EMA": ["--ema_memory=0.1"], None: []}
AVERAGED = ", SWA"  # as figures call an average over time, of whatever kind


@dataclass(frozen=True)
class Method:
    """
    A way to train.

    Attributes:
        flags (`list[str]`): What it adds to the recipe.
        shared (`int`): How many seeds, from 0 on, it has at the rate that all methods share.
        tuned (`int`): How many it has at a rate of its own; 0: at no other rate than that.
        average (`str`, *optional*): The average over time: SWA beside the final weights, or EMA in their place.
    """

    flags: list[str]
    shared: int = 1
    tuned: int = 5
    average: str | None = "SWA"

    @property
    def results(self) -> tuple[str, ...]:
        """What is read of it: the final weights, called "", or their average over time, or both."""
        return {"SWA": ("", AVERAGED), "EMA": (AVERAGED,), None: ("",)}[self.average]


@dataclass(frozen=True)
class Task:
    """
    A model and what it is trained on.

    Attributes:
        title (`str`): What tables call it.
        script, recipe (`str`): What trains it.
        rates (`tuple[float, ...]`): What the first seed of a tuned method tries.
        rate (`float`): That of them which all methods share in the table at one rate.
        batch_size, steps (`int`): The recipe's.
        measure (`str`): What validation chooses by.
        methods (`dict[str, Method]`): By name.
        data (`str`, *optional*): The script's flag for data from elsewhere; none: what the repository embeds.
    """

    title: str
    script: str
    recipe: str
    rates: tuple[float, ...]
    rate: float
    batch_size: int
    steps: int
    measure: str
    methods: dict[str, Method]
    data: str | None = None


@dataclass(frozen=True)
class Setting:
    """One run: a method of a task at a rate, with minibatches of a size, for some steps, from a seed."""

    task: str
    method: str
    rate: float
    batch_size: int
    steps: int
    seed: int

    @classmethod
    def of(cls, task: str, run: dict[str, Any]) -> Setting:
        """That of a recorded run."""
        return cls(task, *(run[name] for name in ("method", "rate", "batch_size", "steps", "seed")))

    @property
    def name(self) -> str:
        """Its folder's name."""
        words = self.method.replace(",", "").replace(" ", "_").replace("(", "").replace(")", "").replace("=", "")
        return f"{words}-b{self.batch_size}-r{self.rate:g}-n{self.steps}-s{self.seed}"

    def run(self, folder: Path, data: str | None = None) -> Run:
        """The run, in a folder of its own; of a task with data from elsewhere, their path is given."""
        task = TASKS[self.task]
        flags = [
            *task.methods[self.method].flags,
            *AVERAGES[task.methods[self.method].average],
            f"--learning_rate={self.rate}",
            f"--per_device_train_batch_size={self.batch_size}",
            f"--max_steps={self.steps}",
            f"--seed={self.seed}",
        ]
        if data is not None:
            flags.append(f"--{task.data}={data}")
        labels = {key: value for key, value in asdict(self).items() if key != "task"}
        return Run(folder / self.task / self.name, task.script, [str(RECIPES / task.recipe), *flags], labels)


BASE, ONE, ACCUMULATION, LATE = ([f"--method={name}"] for name in ("base", "one_member", "accumulation", "late_phase"))
HEAD, NORM, RANK1 = (f"--weights={name}" for name in ("head", "norm", "rank1"))  # one head or norm is no new parameter
DECAY = ["--decay_after_start=true"]  # linear, from T0 on
LINEAR, COSINE = (["--lr_scheduler_type=" + name] for name in ("linear", "cosine"))
TASKS = {
    "lstm": Task(
        *("LSTM of 128 units, Python's language reference", "run_enwik8.py", "regime_lstm.yaml"),
        *((0.00125, 0.0025, 0.005, 0.01, 0.02, 0.04), 0.005, 4, 4000, "bpc"),
        {
            "base": Method(BASE, 5),
            "one member (rank-1)": Method([*ONE, RANK1], 5),
            "accumulation (rank-1)": Method([*ACCUMULATION, RANK1], 2, tuned=0),
            "accumulation (plain)": Method([*ACCUMULATION, HEAD], 5),
            "late-phase rank-1": Method([*LATE, RANK1], 5),
            "late-phase head": Method([*LATE, HEAD], 5),
            "late-phase rank-1 and head": Method([*LATE, "--weights", "rank1", "head"], 2, tuned=0),
            "base, linear decay": Method([*BASE, *DECAY], 5),
            "base, cosine": Method([*BASE, *COSINE], tuned=3),
            "base, EMA": Method(BASE, tuned=3, average="EMA"),
            "base, schedule-free": Method([*BASE, "--optim=schedule_free_adamw"], tuned=3, average=None),
            "accumulation (plain), linear decay": Method([*ACCUMULATION, HEAD, *DECAY], tuned=3),
            "late-phase head, linear decay": Method([*LATE, HEAD, *DECAY], tuned=3),
        },
    ),
    "gpt2": Task(
        *("gpt2 of 2 layers, Python's language reference", "run_enwik8.py", "regime_gpt2.yaml"),
        *((0.001, 0.002, 0.004, 0.008), 0.002, 4, 4000, "bpc"),
        {
            "base": Method(BASE),
            "one member (rank-1)": Method([*ONE, RANK1]),
            "accumulation (rank-1)": Method([*ACCUMULATION, RANK1]),
            "accumulation (plain)": Method([*ACCUMULATION, NORM]),
            "late-phase norm": Method([*LATE, NORM]),
            "late-phase rank-1": Method([*LATE, RANK1]),
            "base, linear decay": Method([*BASE, *DECAY]),
            "late-phase norm, linear decay": Method([*LATE, NORM, *DECAY], tuned=3),
        },
    ),
    "enwik6": Task(
        *("LSTM of 128 units, the first 1,000,000 bytes of enwik8", "run_enwik8.py", "regime_lstm.yaml"),
        *((0.0025, 0.005, 0.01, 0.02), 0.005, 4, 4000, "bpc"),
        {
            "base": Method(BASE),
            "one member (rank-1)": Method([*ONE, RANK1]),
            "accumulation (plain)": Method([*ACCUMULATION, HEAD]),
            "late-phase rank-1": Method([*LATE, RANK1]),
            "late-phase head": Method([*LATE, HEAD]),
            "base, linear decay": Method([*BASE, *DECAY]),
            "base, cosine": Method([*BASE, *COSINE], tuned=3),
            "base, schedule-free": Method([*BASE, "--optim=schedule_free_adamw"], tuned=3, average=None),
        },
        data="data_file",
    ),
    "cifar": Task(
        *("WideResNet 10-1, 9,000 images of CIFAR-10", "run_cifar.py", "regime_cifar.yaml"),
        *((0.025, 0.05, 0.1, 0.2), 0.1, 25, 2000, "nll"),
        {
            "base": Method(BASE, 3, tuned=8),
            "accumulation (plain)": Method(ACCUMULATION, tuned=8),
            "late-phase norm and head": Method(LATE, 3, tuned=8),
            "base, linear": Method([*BASE, *LINEAR], tuned=3),
            "base, cosine": Method([*BASE, *COSINE], tuned=3),
            "late-phase norm and head, linear": Method([*LATE, *LINEAR], tuned=3),
        },
        data="dataset",
    ),
}


def setting(task: str, method: str, seed: int, rate: float | None = None) -> Setting:
    """A run as the recipe has it, at the rate that all methods share or at another."""
    own = TASKS[task]
    return Setting(task, method, rate or own.rate, own.batch_size, own.steps, seed)


# Other noise, all else being equal: windows in a minibatch.
SWEEP = [
    replace(setting("lstm", method, 0), batch_size=size)
    for size in (2, 8, 16, 64)
    for method in ("base", "accumulation (plain)", "late-phase head")
    if size < 64 or method != "accumulation (plain)"  # of the largest the two that are compared: they take longest
]
# Twice as many minibatches for these, with so many seeds.
LONGER, LONGER_SEEDS = ("base", "accumulation (plain)", "late-phase head", "base, linear decay"), 3
