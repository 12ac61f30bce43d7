"""What a comparison of `evidence.py` is made of: rows, which are read out of runs, and a table of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from runs import EXAMPLES, Run, run_all
from texts import write_text


# What is read out of a run.
FINAL, AVERAGED, ENSEMBLE = "scores", "averaged_scores", "ensemble_scores"
SHARED = EXAMPLES.parents[1] / "shared" / "data"
RECIPES = Path(__file__).with_name("recipes")


@dataclass(frozen=True)
class Row:
    """
    A line of a table.

    Attributes:
        name (`str`): What it is called.
        run (`str`): The run that it is read out of, a key of the table's `runs`.
        figures (`str`): Those of the final weights, of the average over time (SWA, EMA) or of the members' ensemble.
        is_late_phase (`bool`): Whether weights are replicated, and their mean is the model.
    """

    name: str
    run: str
    figures: str = FINAL
    is_late_phase: bool = False

    @property
    def is_one_model(self) -> bool:
        """Whether it costs what one model costs, and so may be held against late-phase weights."""
        return self.figures != ENSEMBLE


@dataclass(frozen=True)
class Table:
    """
    A comparison.

    Attributes:
        name, title, description (`str`): What it is, for the file, the heading and the reader.
        script, recipe (`str`): The script in `examples/` and its recipe.
        text (`str`): `"enwik6"` or `"django"`: what is trained on.
        pretrained (`str`, *optional*): Model and text, as `"gpt2_django"`: what is fine-tuned.
        runs (`dict[str, list[str]]`): The flags of each run.
        rows (`list[Row]`): The lines.
        rates (`list[float]`): Learning rates to begin with; several of them are extended where the best is at an end.
        common (`list[str]`): Flags that all runs share.
        seeds (`list[int]`): The first tries all rates, all of them its two best.
        deep_ensemble (`str`, *optional*): The row whose models, of all seeds, are scored together too.
        device (`str`): What it runs on, `"cpu"` or `"cuda"`.
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
    common: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    deep_ensemble: str | None = "base, linear decay, SWA"
    device: str = "cpu"

    @property
    def is_ablation(self) -> bool:
        """Whether all rows are late-phase training, to be compared with the first."""
        return all(row.is_late_phase for row in self.rows)

    def flags(self, folder: Path) -> list[str]:
        """What all runs have in common."""
        flags = [f"--data_file={text_file(self.text, folder)}", *self.common]
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
        flags = [str(RECIPES / f"pretrain_{model}.yaml"), f"--data_file={text_file(text, folder)}"]
        run = Run(folder / "pretrained" / self.pretrained, "run_enwik8.py", flags, {}, self.device)
        run_all([run], workers=1)


def text_file(text: str, folder: Path) -> Path:
    """Where a text lies."""
    return SHARED / "enwik6" if text == "enwik6" else folder / "django.txt"


def pretrained_folder(pretrained: str, folder: Path) -> Path:
    """Where a model to fine-tune lies."""
    return folder / "pretrained" / pretrained / "base"
