"""Where noise limits training: the runs parse, validation chooses, the tables are made from the figures."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from transformers import TrainingArguments

import paper_cifar
import regime
import regime_report
import run_cifar
import run_enwik8
from common.recipe import parse_arguments
from hf_latephase import LatePhaseConfig
from regime_settings import RECIPES, SWEEP, TASKS, setting
from runs import README, RESULTS_PAGE, Run, difference, with_table


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
LANGUAGE = Path(run_enwik8.__file__).parent
every_task = pytest.mark.parametrize("name", TASKS)


@every_task
def test_every_method_sees_as_much_at_the_same_rate(name, tmp_path) -> None:
    task = TASKS[name]
    names = set()
    for method in task.methods:
        own = setting(name, method, 7)
        run = own.run(tmp_path, task.data and "elsewhere")
        names.add(run.folder)
        *_, data, methods, config, args = parse_arguments(
            TYPES[task.script], [*run.arguments, f"--output_dir={tmp_path}", "--use_cpu"]
        )
        assert task.data is None or getattr(data, task.data) == "elsewhere"
        assert len(methods.method) == 1
        assert (methods.method == ["late_phase"]) == method.startswith("late-phase")
        assert (args.seed, args.learning_rate, args.max_steps) == (7, task.rate, task.steps)
        assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (task.batch_size, 1)
        assert (config.num_members, config.late_phase_start, config.base_gradient_scale) == (10, 0.6, 1.0)
        averages = {"SWA": (0.7, None), "EMA": (None, 0.1), None: (None, None)}
        assert (config.swa_start, config.ema_memory) == averages[task.methods[method].average]
    assert len(names) == len(task.methods)  # no folder for two


def test_other_noise_differs_in_nothing_else() -> None:
    task = TASKS["lstm"]
    assert len(set(SWEEP)) == len(SWEEP)
    for own in SWEEP:
        usual = setting("lstm", own.method, own.seed)
        assert own != usual
        assert replace(own, batch_size=task.batch_size, rate=task.rate) == usual


@pytest.fixture
def ran(tmp_path, monkeypatch) -> list[Run]:
    """The runs that the command starts; each is best where its rate is nearest to 0.004, its average at the least."""
    started: list[Run] = []

    def run_all(runs: list[Run], workers: int) -> None:
        for run in runs:
            if not run.is_finished:
                started.append(run)
                run.folder.mkdir(parents=True)
                rate = run.labels["rate"]
                result: dict[str, Any] = {"scores": {"validation": abs(rate - 0.004), "test": 2.0}, "minutes": 1.0}
                if "swa_start" in str(run.arguments) or "ema_memory" in str(run.arguments):
                    result["averaged_scores"] = {"validation": rate, "test": 4.0}
                (run.folder / "results.json").write_text(json.dumps({"results": [result]}))
                (run.folder / "finished").touch()

    monkeypatch.setattr(regime, "run_all", run_all)
    monkeypatch.setattr(regime, "figures_of", lambda name: tmp_path / f"{name}.json")
    monkeypatch.setattr(regime, "write_report", lambda: None)
    monkeypatch.setattr("sys.argv", ["regime.py", "--task=lstm", f"--output_dir={tmp_path / 'out'}"])
    return started


def test_the_first_seed_chooses_the_rate_of_the_others(ran, tmp_path) -> None:
    regime.main()
    record = json.loads((tmp_path / "lstm.json").read_text())
    assert record["environment"]["torch"] == torch.__version__ and str(tmp_path) not in json.dumps(record)
    task = TASKS["lstm"]
    for name, method in task.methods.items():
        own = {(run["rate"], run["seed"]) for run in record["runs"] if run["method"] == name}
        expected = {(task.rate, seed) for seed in range(method.shared)}
        best = {"": 0.005, regime_report.SWA: 0.00125}
        if method.tuned:
            expected |= {(rate, 0) for rate in task.rates}
            expected |= {(best[result], seed) for result in method.results for seed in range(method.tuned)}
        assert own == expected, name
    assert len(ran) == len(record["runs"])


def test_all_seeds_decide_among_the_rates_that_have_them() -> None:
    def run(rate: float, seed: int, bpc: float) -> dict[str, Any]:
        return {"method": "base", "rate": rate, "batch_size": 4, "seed": seed, "validation": {"bpc": bpc}}

    # The first seed likes 0.1, both together 0.2; 0.4 was tried by the first alone.
    figures = regime_report.Figures([run(0.1, 0, 1.5), run(0.1, 1, 3.0), run(0.2, 0, 2.0), run(0.2, 1, 2.0)])
    assert figures.first_choice("base", "", "bpc") == 0.1 and figures.chosen_rate("base", "", "bpc") == 0.2
    figures.runs.append(run(0.4, 0, 1.0))
    assert figures.first_choice("base", "", "bpc") == 0.4 and figures.chosen_rate("base", "", "bpc") == 0.2


def test_what_has_run_is_read_not_repeated(ran, tmp_path, monkeypatch) -> None:
    regime.main()
    path, count = tmp_path / "lstm.json", len(ran)
    before = path.read_text()
    regime.main()
    assert len(ran) == count and path.read_text() == before
    # What is recorded counts where the folders are gone.
    (tmp_path / "out").rename(tmp_path / "gone")
    regime.main()
    assert len(ran) == count and path.read_text() == before
    # Not if it was made with something else.
    monkeypatch.setattr(regime, "made_with", lambda: {"torch": "another"})
    regime.main()
    assert len(ran) == 2 * count and json.loads(path.read_text())["environment"] == {"torch": "another"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [({"task": "mine"}, "task must be one of"), ({"task": "cifar"}, "add --data"),
     ({"task": "enwik6", "data": "nowhere"}, "does not exist"), ({"task": "steps", "data": "x"}, "leave data out")],
)  # fmt: skip
def test_what_is_refused(flags, message) -> None:
    with pytest.raises(ValueError, match=message):
        regime.RegimeArguments(**flags)


def test_more_minibatches_need_the_usual_ones() -> None:
    with pytest.raises(ValueError, match="figures of lstm"):
        regime.longer(regime_report.Figures([]))


def test_the_closed_form_falls_with_noise() -> None:
    task = TASKS["lstm"]
    gain = regime_report.predicted_gain
    assert gain((task.batch_size, task.rate), adam=False) == 1
    # Linear in the noise's variance, exactly.
    assert gain((2 * task.batch_size, task.rate), adam=False) == pytest.approx(0.5, rel=1e-12)
    # And to first order in the rate.
    assert gain((task.batch_size, task.rate / 2), adam=True) == pytest.approx(0.5, abs=0.03)
    assert gain((2 * task.batch_size, task.rate), adam=True) == pytest.approx(0.5**0.5, abs=0.03)


def test_what_is_recorded_of_an_image_classifier() -> None:
    scores = {"accuracy": 0.5, "nll": 1.0, "brier_score": 0.6}
    better = {"accuracy": 0.6, "nll": 0.9, "brier_score": 0.5}
    results = [
        {"method": "late_phase", "variant": variant, "minutes": 1.5, "scores": {"validation": own, "test": own}}
        for variant, own in (("", scores), ("SWA", better), ("ensemble", better), ("SWA, ensemble", scores))
    ]
    (found,) = regime.records_of({"results": results})
    record = setting("cifar", "base", 3).run(Path()).labels | found
    assert (record["seed"], record["minutes"]) == (3, 1.5)
    assert record["test"] == record["validation"] == {"accuracy": 0.5, "nll": 1.0}
    assert record["test, SWA"] == {"accuracy": 0.6, "nll": 0.9}


def test_ahead_means_better() -> None:
    # By hand: differences 1, 2, 3; their standard deviation is 1, and t(0.975, 2) = 4.3027.
    assert regime_report.ahead([1.0, 2.0, 3.0], [2.0, 4.0, 6.0], 2) == "+2.00 ± 2.48"
    assert regime_report.ahead([2.0, 4.0, 6.0], [1.0, 2.0, 3.0], 2, higher=True) == "+2.00 ± 2.48"
    assert regime_report.ahead([1.0], [2.0]) == "–"


# ---- what is recorded, and what is said of it ----


def recorded(name: str) -> list[dict]:
    return json.loads(regime_report.figures_of(name).read_text(encoding="utf-8"))["runs"]


def test_tables_are_made_from_the_figures() -> None:
    for mark, (table, pages) in regime_report.TABLES.items():
        for path in pages:
            page = path.read_text(encoding="utf-8")
            assert page == with_table(page, mark, table()), (mark, path)
            # A figure that is not the runs' would show.
            assert page != with_table(page, mark, table().replace("1", "7", 1))


@pytest.mark.parametrize("name", regime.PLANS)
def test_every_run_that_the_command_makes_is_recorded(name) -> None:
    runs = recorded(name)
    assert [regime.setting_of(name, run) for run in runs] == regime.plan(name, regime_report.Figures(runs))


def test_what_is_said_of_the_lstm_is_what_the_figures_say() -> None:
    words = words_of(RESULTS_PAGE)
    figures, rate = regime_report.Figures.of("lstm"), TASKS["lstm"].rate
    head, rank1, one, base = "late-phase head", "late-phase rank-1", "one member (rank-1)", "base"

    def test(method: str, averaged: str = "") -> list[float]:
        return figures.values(method, rate, f"test{averaged}", "bpc")

    assert f"output layers are ahead of base by {ahead(test(head), test(base))}," in words
    assert f"rank-1 weights are ahead of their one member by {ahead(test(rank1), test(one))}," in words
    ahead(test(rank1), test(base), 0)
    cost = statistics.mean(test(one)) - statistics.mean(test(base))
    assert f"which the rank-1 parameters had cost ({cost:.3f})" in words
    swa = ", SWA"
    assert f"of the output layer with SWA by {ahead(test(base, swa), test(head, swa))}." in words
    best = statistics.mean(test(base, swa))
    shared = [name for name, method in TASKS["lstm"].methods.items() if method.shared > 1]
    late = [method for method in shared if method.startswith("late-phase")]
    assert late and all(best < statistics.mean(test(method, averaged)) for method in late for averaged in ("", swa))
    accumulation = test("accumulation (plain)")
    mean, width = difference(accumulation, test(head)[: len(accumulation)])
    assert abs(mean) < width  # level


class Chosen:
    """A task's methods on test, each at the rate that validation chose."""

    def __init__(self, name: str, measure: str = "bpc") -> None:
        self.figures, self.task, self.measure = regime_report.Figures.of(name), TASKS[name], measure

    def rate(self, method: str, averaged: str = "") -> float:
        return self.figures.chosen_rate(method, averaged, self.task.measure)

    def __call__(self, method: str, averaged: str = "") -> list[float]:
        return self.figures.values(method, self.rate(method, averaged), f"test{averaged}", self.measure)


def ahead(own: list[float], other: list[float], sign: int = 1, digits: int = 3) -> str:
    """How far the first is below the second, once it is sure that the interval is above, around (0) or below zero."""
    mean, width = difference(other[: len(own)], own[: len(other)])
    assert sign == (mean > width) - (mean < -width), (mean, width)
    return f"{mean:.{digits}f} ± {width:.{digits}f}"


def words_of(page: Path) -> str:
    """A page without line ends."""
    return " ".join(page.read_text(encoding="utf-8").split())


def test_what_is_said_of_rates_of_their_own_is_what_the_figures_say() -> None:
    words, test, swa = words_of(RESULTS_PAGE), Chosen("lstm"), regime_report.SWA
    head, rank1, one, base = "late-phase head", "late-phase rank-1", "one member (rank-1)", "base"
    accumulation, decay = "accumulation (plain)", ", linear decay"
    over_base, over_one = ahead(test(head), test(base)), ahead(test(head), test(one))
    assert f"output layers are ahead of base**, by {over_base}, and of one member by {over_one}." in words
    assert test.rate(head) == 2 * test.rate(base) and "they do best at twice the rate of base" in words
    assert f"rank-1 weights are ahead of their one member**, by {ahead(test(rank1), test(one))};" in words
    assert f"They are not ahead of base ({ahead(test(rank1), test(base), 0)})" in words
    assert f"rank-1 parameters alone cost {difference(test(one), test(base))[0]:.3f} here" in words
    assert f"it is {ahead(test(accumulation), test(head))} ahead of the output layer's members" in words
    assert f"without SWA**, by {ahead(test(base, swa), test(head))}." in words
    assert f"level with base ({ahead(test(head, swa), test(base, swa), 0)}), and so is accumulation" in words
    assert f"({ahead(test(accumulation, swa), test(base, swa), 0)}). The paper" in words
    assert f"they are {ahead(test(base + decay), test(head + decay))} behind plain training with it" in words
    decaying = [[*test(base + name)] for name in (decay, ", cosine", ", schedule-free")]
    kept = [test(m, a) for m in (base, one, accumulation, head, rank1) for a in ("", swa)]
    assert max(map(statistics.mean, decaying)) < min(map(statistics.mean, kept))
    for other in decaying[1:]:
        ahead(other, decaying[0], 0)  # level
    for page, sentence in (
        ("README.md", f"With a rate chosen for each it is ahead by {over_base}"),
        ("docs/guide.md", f"limits training they gain {over_base[:5]} bits."),
        (
            "examples/benchmarks/RESULTS.md",
            f"output layers are {over_base} ahead of base and {over_one} of one member",
        ),
    ):
        assert sentence in words_of(RESULTS_PAGE.parents[1] / page), page


def test_what_is_said_of_the_second_text_is_what_the_figures_say() -> None:
    words, test, swa = words_of(RESULTS_PAGE), Chosen("enwik6"), regime_report.SWA
    head, rank1, one, base = "late-phase head", "late-phase rank-1", "one member (rank-1)", "base"
    accumulation = test("accumulation (plain)")
    over_base, over_one = ahead(test(head), test(base)), ahead(test(head), test(one))
    assert (
        f"Members of the output layer are ahead of base**, by {over_base}, and of one member by {over_one}." in words
    )
    assert f"Accumulation is level with them ({ahead(accumulation, test(head), 0)} ahead)." in words
    over_one, over_base = ahead(test(rank1), test(one)), ahead(test(rank1), test(base), 0)
    assert f"ahead of their one member, by {over_one}, and not of base ({over_base})." in words
    without, averaged = ahead(test(base, swa), test(head)), ahead(test(base, swa), test(head, swa))
    assert f"SWA of base is {without} ahead of the members without SWA, and {averaged} with it." in words
    decay = ahead(test("base, linear decay"), test(base, swa), 0)
    assert f"A rate that decays is level with SWA of base here ({decay})." in words


def test_what_is_said_of_the_transformer_is_what_the_figures_say() -> None:
    words, test, swa = words_of(RESULTS_PAGE), Chosen("gpt2"), regime_report.SWA
    norm, rank1, one, base = "late-phase norm", "late-phase rank-1", "one member (rank-1)", "base"
    decay = "base, linear decay"
    over_base, over_one = ahead(test(norm), test(base)), ahead(test(norm), test(one))
    assert f"norm layers are ahead of base**, by {over_base}, and of one member by {over_one}." in words
    assert f"Accumulation is level with them ({ahead(test(norm), test('accumulation (plain)'), 0)})." in words
    assert f"rank-1 weights are ahead of their one member**, by {ahead(test(rank1), test(one))}." in words
    assert f"Over base they have {ahead(test(rank1), test(base), 0)}, which includes zero." in words
    level = ahead(test("accumulation (rank-1)"), test(rank1), 0)
    assert f"Accumulation with such factors is level with them ({level} ahead)." in words
    assert f"SWA of base is {ahead(test(base, swa), test(norm, swa))} ahead of the norm layers with SWA." in words
    others = [test(method, a) for method in TASKS["gpt2"].methods if "decay" not in method for a in ("", swa)]
    assert all(statistics.mean(test(decay)) < statistics.mean(other) for other in others)
    assert f"ahead of all, of SWA of base by {ahead(test(decay), test(base, swa))}." in words
    members = ahead(test(decay), test("late-phase norm, linear decay"))
    assert f"With linear decay norm members are {members} behind plain training with it." in words
    readme = words_of(README)
    assert f"norm layers of a small gpt2 by {over_base}" in readme


def test_what_is_said_of_noise_is_what_the_figures_say() -> None:
    words = words_of(RESULTS_PAGE)
    found = {noise: statistics.mean(own) for noise, own in regime_report.gains("late-phase head").items()}
    predicted = {noise: regime_report.own_gain() * regime_report.predicted_gain(noise, adam=True) for noise in found}

    def pair(size: int, rate: float) -> tuple[str, str]:
        return f"{found[size, rate]:.3f}", f"{predicted[size, rate]:.3f}"

    rates = (*pair(4, 0.01), *pair(4, 0.02), *pair(4, 0.04))
    assert "at 0.01 members gain {} (predicted {}), at 0.02 {} ({}), at 0.04 {} ({}).".format(*rates) in words
    assert "of two windows they gain {} ({}), of eight {} ({}).".format(*pair(2, 0.005), *pair(8, 0.005)) in words
    assert f"{-found[4, 0.0025]:.3f} at half the rate, {-found[4, 0.00125]:.3f} at a quarter" in words
    sizes = (*pair(16, 0.005), *pair(64, 0.005))
    assert "Of 16 windows members gain {} (predicted {}), of 64 {} ({}).".format(*sizes) in words
    task, bytes_of_training = TASKS["lstm"], 419_571
    passes = [round(size * 100 * task.steps / bytes_of_training) for size in (16, 64)]
    assert "sees the text {} and {} times there".format(*passes) in words
    (few,), (many,) = (regime_report.all_runs().values("base", task.rate, "test", "bpc", size) for size in (16, 64))
    assert many > few and f"overfits: {many:.3f} of 64 windows, {few:.3f} of 16." in words
    (accumulation,) = regime_report.gains("accumulation (plain)")[16, task.rate]
    assert f"and accumulation of 16 windows gains {accumulation:.3f}." in words


def test_what_is_said_of_more_minibatches_is_what_the_figures_say() -> None:
    words, task, swa = words_of(RESULTS_PAGE), TASKS["lstm"], regime_report.SWA
    usual, longer = Chosen("lstm"), Chosen("lstm")
    longer.figures = regime_report.Figures.of("steps")
    head, base = "late-phase head", "base"
    assert {run["steps"] for run in longer.figures.runs} == {2 * task.steps}
    assert f"**They help base**, by {ahead(longer(base), usual(base)[:3])}" in words
    assert f"Members keep a lead of {ahead(longer(head), longer(base))}." in words
    behind = statistics.mean(usual(head)[:3]) - statistics.mean(longer(base))
    assert f"they had come within {behind:.3f} of what base has" in words
    average, decay = ahead(longer(base, swa), longer(head)), ahead(longer("base, linear decay"), longer(head))
    assert f"SWA of base is {average} ahead of the members without SWA, linear decay {decay}." in words


def test_what_is_said_of_the_image_classifier_is_what_the_figures_say() -> None:
    words, swa = words_of(RESULTS_PAGE), regime_report.SWA
    late, accumulation, linear = "late-phase norm and head", "accumulation (plain)", "base, linear"
    nats, accuracy = Chosen("cifar", "nll"), Chosen("cifar", "accuracy")

    def points(own: list[float], other: list[float], sign: int) -> str:
        return ahead([-value for value in own], [-value for value in other], sign, 2)

    over_base = points(accuracy(late), accuracy("base"), 1)
    nats_over_base = ahead(nats(late), nats("base"))
    assert f"training is ahead of base**, by {over_base} points, and by {nats_over_base} nats." in words
    level = points(accuracy(accumulation), accuracy(late), 0), ahead(nats(accumulation), nats(late), 0)
    assert "Accumulation is level with it, by {} points and {} nats.".format(*level) in words
    behind = points(accuracy("base", swa), accuracy(late, swa), 0)
    assert f"With SWA late-phase training is level with base ({behind} points behind)," in words
    averaged = points(accuracy(accumulation, swa), accuracy("base", swa), 0)
    assert f"and so is accumulation ({averaged} ahead)." in words
    readme = words_of(README)
    assert f"late-phase training is {over_base} points ahead of base" in readme
    means = [statistics.mean(accuracy(*which)) for which in ((linear,), (late + ", linear",), ("base", swa))]
    assert "has {:.1f} %, with members {:.1f} %. SWA of base has {:.1f} %.".format(*means) in words


def test_the_demo_is_what_its_table_is_made_of() -> None:
    """Its recipe says what the benchmark's says, with the flags of the late-phase row; the rest is what it shows."""
    demo, own = (
        yaml.safe_load(path.read_text(encoding="utf-8"))
        for path in (LANGUAGE / "recipes" / "enwik8_demo.yaml", RECIPES / "regime_lstm.yaml")
    )
    shown = {"curve_bytes", "sample_bytes", "eval_strategy", "eval_steps", "logging_steps"}
    assert {key: value for key, value in own.items() if key not in {*shown, "weights"}}.items() <= demo.items()
    assert demo.keys() - own.keys() - shown == {"method", "output_dir", "seed", "swa_start"}
    assert demo["swa_start"] == 0.7
    assert demo["weights"] == ["head"] and demo["method"] == list(regime_report.DEMO)
    assert TASKS["lstm"].methods[regime_report.DEMO["late_phase"]].flags == ["--method=late_phase", "--weights=head"]


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
