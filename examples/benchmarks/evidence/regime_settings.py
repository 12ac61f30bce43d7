"""What `regime.py` runs: tasks, methods, rates, sizes of minibatches, seeds."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from runs import Run


RECIPES = Path(__file__).with_name("recipes")


@dataclass(frozen=True)
class Method:
    """
    A way to train.

    Attributes:
        flags (`list[str]`): What it adds to the recipe.
        seeds (`int`): How many, from 0 on.
    """

    flags: list[str]
    seeds: int


@dataclass(frozen=True)
class Task:
    """
    A model and what it is trained on.

    Attributes:
        title (`str`): What tables call it.
        script, recipe (`str`): What trains it.
        rate (`float`): The rate that all methods share.
        batch_size, steps (`int`): The recipe's.
        methods (`dict[str, Method]`): By name.
    """

    title: str
    script: str
    recipe: str
    rate: float
    batch_size: int
    steps: int
    methods: dict[str, Method]


@dataclass(frozen=True)
class Setting:
    """One run: a method of a task at a rate, with minibatches of a size, for some steps, from a seed."""

    task: str
    method: str
    rate: float
    batch_size: int
    steps: int
    seed: int

    @property
    def name(self) -> str:
        """Its folder's name."""
        words = self.method.replace(",", "").replace(" ", "_").replace("(", "").replace(")", "").replace("=", "")
        return f"{words}-b{self.batch_size}-r{self.rate:g}-n{self.steps}-s{self.seed}"

    def run(self, folder: Path, dataset: str | None = None) -> Run:
        """The run, in a folder of its own."""
        task = TASKS[self.task]
        flags = [
            *task.methods[self.method].flags,
            f"--learning_rate={self.rate}",
            f"--per_device_train_batch_size={self.batch_size}",
            f"--max_steps={self.steps}",
            f"--seed={self.seed}",
        ]
        if dataset is not None:
            flags.append(f"--dataset={dataset}")
        labels = {key: value for key, value in asdict(self).items() if key != "task"}
        return Run(folder / self.task / self.name, task.script, [str(RECIPES / task.recipe), *flags], labels)


BASE, ONE, ACCUMULATION, LATE = ([f"--method={name}"] for name in ("base", "one_member", "accumulation", "late_phase"))
HEAD, NORM, RANK1 = (f"--weights={name}" for name in ("head", "norm", "rank1"))  # one head or norm is no new parameter
TASKS = {
    "lstm": Task(
        *("LSTM of 128 units, Python's language reference", "run_enwik8.py", "regime_lstm.yaml", 0.005),
        *(4, 4000),
        {
            "base": Method(BASE, 5),
            "one member (rank-1)": Method([*ONE, RANK1], 5),
            "accumulation (rank-1)": Method([*ACCUMULATION, RANK1], 2),
            "accumulation (plain)": Method([*ACCUMULATION, HEAD], 5),
            "late-phase rank-1": Method([*LATE, RANK1], 5),
            "late-phase head": Method([*LATE, HEAD], 5),
            "late-phase rank-1 and head": Method([*LATE, "--weights", "rank1", "head"], 2),
            "base, linear decay": Method([*BASE, "--decay_after_start=true"], 5),
        },
    ),
    "gpt2": Task(
        *("gpt2 of 2 layers, Python's language reference", "run_enwik8.py", "regime_gpt2.yaml", 0.004),
        *(4, 4000),
        {
            "base": Method(BASE, 3),
            "one member (rank-1)": Method([*ONE, RANK1], 3),
            "accumulation (plain)": Method([*ACCUMULATION, NORM], 3),
            "late-phase norm": Method([*LATE, NORM], 3),
            "late-phase rank-1": Method([*LATE, RANK1], 3),
        },
    ),
    "cifar": Task(
        *("WideResNet 10-1, 9,000 images of CIFAR-10", "run_cifar.py", "regime_cifar.yaml", 0.1),
        *(25, 2000),
        {
            "base": Method(BASE, 3),
            "late-phase norm and head": Method(LATE, 3),
        },
    ),
}


def setting(task: str, method: str, seed: int, rate: float | None = None) -> Setting:
    """A run as the recipe has it, at the rate that all methods share or at another."""
    own = TASKS[task]
    return Setting(task, method, rate or own.rate, own.batch_size, own.steps, seed)


# Other noise, all else being equal: (windows in a minibatch, rate).
NOISES = [(2, 0.005), (8, 0.005), (4, 0.0025)]
SWEEP = [
    replace(setting("lstm", method, 0, rate), batch_size=size)
    for size, rate in NOISES
    for method in ("base", "late-phase head")
]
