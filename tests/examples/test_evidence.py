"""The evidence: its tables can run, its arithmetic is right, and its report is that of the recorded figures."""

from __future__ import annotations

import json
import re
import statistics
from contextlib import nullcontext
from pathlib import Path

import pytest
from transformers import TrainingArguments

import evidence
import run_enwik8
import run_finetune
import score_ensemble
from common.recipe import parse_arguments
from comparison import AVERAGED, ENSEMBLE
from evidence_tables import TABLES
from hf_latephase import LatePhaseConfig
from run_enwik8 import MethodArguments
from runs import with_table


TRAINING = (MethodArguments, LatePhaseConfig, TrainingArguments)
TYPES = {
    "run_finetune.py": (run_finetune.PretrainedArguments, run_finetune.TextArguments, *TRAINING),
    "run_enwik8.py": (run_enwik8.LanguageModelArguments, run_enwik8.DataArguments, *TRAINING),
}
every_table = pytest.mark.parametrize("table", TABLES.values(), ids=lambda table: table.name)


@every_table
def test_every_run_parses_and_gives_every_method_equally_many_rows(table, tmp_path) -> None:
    minibatches = set()
    for row in table.rows:
        run = evidence.make_run(table, row, table.rates[0], 7, tmp_path)
        flags = [flag for flag in run.arguments if not flag.startswith("--optim=")]  # an optional package
        *_, methods, config, args = parse_arguments(TYPES[table.script], [*flags, f"--output_dir={tmp_path}"])
        assert len(methods.method) == 1
        assert (args.seed, args.learning_rate) == (7, table.rates[0])
        # Rows can be dealt out of whole batches only.
        assert config.member_assignment == "minibatch" or args.dataloader_drop_last
        replicates = methods.method == ["late_phase"] and config.num_members > 1
        assert row.is_late_phase == (replicates and row.is_one_model)
        assert row.figures != AVERAGED or config.swa_start is not None or config.ema_decay is not None
        assert (row.figures == ENSEMBLE) == methods.score_members
        seen = args.max_steps * args.gradient_accumulation_steps * args.per_device_train_batch_size
        minibatches.add(2 * seen if "half" in row.name else seen)
        if table.pretrained is None:
            assert args.gradient_accumulation_steps == 1
            if row.is_late_phase or "accumulation" in row.name:  # its control: as many updates, of gradients as large
                assert (config.num_members, config.base_gradient_scale, config.cycle_length) == (5, 1 / 5, None)
        elif replicates and config.member_assignment == "minibatch":
            # An update is one cycle: replication takes none away.
            assert args.gradient_accumulation_steps % config.num_members == 0
    # Every method sees as much, but for those that say that they stop early.
    assert len(minibatches) == 1
    if table.deep_ensemble:
        (row,) = (row for row in table.rows if row.name == table.deep_ensemble)
        assert row.figures == AVERAGED  # what a run saves


def test_paired_difference() -> None:
    # By hand: differences 1, 2, 3; their standard deviation is 1, and t(0.975, 2) = 4.3027.
    assert evidence.difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.3027 / 3**0.5), abs=1e-4)


def test_the_rate_is_chosen_on_validation_and_test_figures_of_other_rates_are_not_kept(tmp_path, monkeypatch) -> None:
    table = next(iter(TABLES.values()))
    ran = []

    def run_all(runs, workers):
        for run in runs:
            if not run.is_finished:
                ran.append(run.labels["run"])
                run.folder.mkdir(parents=True)
                # Validation is best at the second rate, of averages at twice the highest; test at a rate of 0.
                rate = run.labels["rate"]
                best = {
                    "scores": table.rates[1],
                    "averaged_scores": 2 * table.rates[-1],
                    "ensemble_scores": table.rates[0] / 2,
                }
                result = {key: {"validation": 1e3 * abs(rate - own), "test": rate} for key, own in best.items()}
                (run.folder / "results.json").write_text(json.dumps({"results": [{}, result]}))
                (run.folder / "finished").touch()

    monkeypatch.setattr(evidence, "run_all", run_all)
    rows = evidence.fill(table, tmp_path, 1)
    plain = next(row.name for row in table.rows if row.figures == "scores")
    assert rows[plain]["rate"] == table.rates[1]
    assert rows[plain]["test"] == [table.rates[1]] * len(table.seeds)
    assert set(rows[plain]) == {"validation by rate", "rate", "seeds", "validation", "test"}
    averaged = next(row.name for row in table.rows if row.figures == AVERAGED)
    # The grid is extended until the best is not its end.
    assert rows[averaged]["rate"] == 2 * table.rates[-1]
    tried = [float(rate) for rate in rows[averaged]["validation by rate"]]
    assert tried == [*table.rates, 2 * table.rates[-1], 4 * table.rates[-1]]
    assert [float(rate) for rate in rows[plain]["validation by rate"]] == table.rates
    ensemble = next(row.name for row in table.rows if row.figures == ENSEMBLE)
    tried = [float(rate) for rate in rows[ensemble]["validation by rate"]]
    assert tried == [table.rates[0] / 4, table.rates[0] / 2, *table.rates]
    assert rows[ensemble]["rate"] == table.rates[0] / 2
    before = len(ran)
    assert evidence.fill(table, tmp_path, 1) == rows
    assert len(ran) == before  # nothing runs twice


def test_all_seeds_choose_between_the_two_best_rates_of_the_first(tmp_path, monkeypatch) -> None:
    table = TABLES["finetune_gpt2_enwik6_60kb"]
    low, middle, high = table.rates
    # The first seed says the middle; on average it is the highest rate: one more is tried, and is far off.
    figures = {low: 4.0, middle: 3.0, high: 3.04, 2 * high: 5.0}
    monkeypatch.setattr(evidence, "run_all", lambda runs, workers: None)

    def read(run, row):
        rate, seed = run.labels["rate"], run.labels["seed"]
        shift = 0.5 if seed and rate == middle else 0.0
        return {"validation": figures[rate] + shift, "test": 10 * rate + seed}

    monkeypatch.setattr(evidence, "read", read)
    for row in evidence.fill(table, tmp_path, 1).values():
        assert row["rate"] == high
        assert row["validation"] == [3.04] * 5 and row["test"] == [10 * high + seed for seed in range(5)]
        tried = {f"{low:g}": [4.0], f"{middle:g}": [3.0, *[3.5] * 4], f"{high:g}": [3.04] * 5, f"{2 * high:g}": [5.0]}
        assert row["validation by rate"] == tried


def test_a_rate_far_from_the_first_seeds_best_is_not_run_with_all_seeds() -> None:
    assert evidence.two_best({1.0: [3.5], 2.0: [3.04], 3.0: [3.0]}) == [3.0, 2.0]
    assert evidence.two_best({1.0: [3.5], 2.0: [3.06], 3.0: [3.0]}) == [3.0]
    assert evidence.two_best({1.0: [3.0]}) == [1.0]


def test_an_ensemble_is_no_strongest_control() -> None:
    table = TABLES["finetune_gpt2_enwik6_60kb"]
    rows = {row.name: {"test": [2.0, 2.0]} for row in table.rows}
    (ensemble,) = (row.name for row in table.rows if row.figures == ENSEMBLE)
    rows[ensemble]["test"] = [1.0, 1.0]
    rows["base, linear decay"]["test"] = [1.5, 1.5]
    assert evidence.best_of(table, rows, late_phase=False, split="test") == "base, linear decay"


@pytest.mark.parametrize("name", ["finetune_gpt2_enwik6_60kb", "scratch_lstm_django"])
def test_the_deep_ensemble_takes_every_seed_at_the_chosen_rate(name, tmp_path, monkeypatch) -> None:
    table, ran = TABLES[name], []

    def run_all(runs, workers):
        ran.extend(runs)
        for run in runs:
            run.folder.mkdir(parents=True)
            results = [{"scores": {"validation": 9.0, "test": 9.0}}, {"scores": {"validation": 1.0, "test": 2.0}}]
            (run.folder / "results.json").write_text(json.dumps({"results": results}))

    monkeypatch.setattr(evidence, "run_all", run_all)
    rate = table.rates[1]
    figures = evidence.deep_ensemble(table, {table.deep_ensemble: {"rate": rate}}, tmp_path)
    assert figures == {"validation": 1.0, "test": 2.0}
    (run,) = ran
    assert f"{rate:g}" in run.folder.name  # another rate's would be taken for it
    types = (score_ensemble.EnsembleArguments, run_finetune.TextArguments, TrainingArguments)
    ensemble, text, _ = parse_arguments(types, [*run.arguments, f"--output_dir={tmp_path}"])
    (row,) = (row for row in table.rows if row.name == table.deep_ensemble)
    folders = [evidence.make_run(table, row, rate, seed, tmp_path).folder for seed in table.seeds]
    assert ensemble.models == [str(folder / "base") for folder in folders]
    # As the runs themselves are scored.
    assert (text.window, text.max_eval_tokens) == ((64, 50_000) if "gpt2" in name else (100, 50_000))


def test_report_is_made_from_the_figures() -> None:
    text = evidence.RESULTS.read_text(encoding="utf-8")
    assert text == evidence.report()
    for path, table in ((evidence.RESULTS_PAGE, evidence.summary()), (evidence.README, evidence.headline())):
        page = path.read_text(encoding="utf-8")
        assert page == with_table(page, "evidence", table)
    # Every table is there, and complete.
    assert set(evidence.recorded()) == {path.stem for path in evidence.FIGURES.glob("*.json")}
    for name, record in evidence.recorded().items():
        row = TABLES[name].rows[0].name
        record["rows"][row]["test"][0] += 0.1
        # A figure that is not the runs' would show.
        assert evidence.section(TABLES[name], record) not in text


def test_a_table_with_rows_that_have_not_run_is_left_out(tmp_path, monkeypatch, capsys) -> None:
    name, record = next(iter(evidence.recorded().items()))
    monkeypatch.setattr(evidence, "FIGURES", tmp_path)
    (tmp_path / f"{name}.json").write_text(json.dumps(record))
    assert set(evidence.recorded()) == {name}
    record["rows"].pop("base, linear decay")
    (tmp_path / f"{name}.json").write_text(json.dumps(record))
    assert evidence.recorded() == {}
    assert (
        f"{name} is left out of the report until these rows have run: ['base, linear decay']"
        in capsys.readouterr().err
    )


def test_a_table_is_completed_by_the_rows_that_it_lacks(tmp_path, monkeypatch) -> None:
    table = TABLES["finetune_gpt2_enwik6_60kb"]
    whole = {row.name: {"rate": 1.0} for row in table.rows}
    lacking = [table.rows[1].name, table.rows[4].name]
    environment = evidence.environment() | evidence.versions()
    record = {"environment": environment, "deep ensemble": {"test": 1.0}, "rows": dict(whole)}
    for name in lacking:
        del record["rows"][name]
    monkeypatch.setattr(evidence, "fill", lambda part, *_: {row.name: {"rate": 2.0} for row in part.rows})
    completed = evidence.complete(table, record, tmp_path, 1)
    assert list(completed["rows"]) == [row.name for row in table.rows]
    assert [name for name, row in completed["rows"].items() if row["rate"] == 2.0] == lacking
    assert completed["deep ensemble"] == {"test": 1.0}
    record["environment"] = environment | {"torch": "1.0"}
    with pytest.raises(ValueError, match="recorded with .*'torch': '1.0'.*: run all its rows"):
        evidence.complete(table, record, tmp_path, 1)


PLAIN = [
    *("base, linear decay", "base, linear decay, SWA", "base, linear decay, EMA", "base, cosine decay, SWA"),
    *("base, schedule-free AdamW", "one member (rank-1), SWA", "one member (rank-1), σ0 = 0.15, SWA"),
    *("base, constant rate, SWA", "base, constant rate, EMA", "one member (rank-1), EMA"),
]


@pytest.mark.parametrize(
    ("name", "late", "chosen", "noise"),
    [
        (
            "finetune_gpt2_django_60kb",
            "late-phase norm, σ0 = 0, γ = 1/K, constant rate, SWA",
            "late-phase norm and rank-1, σ0 = 0.15, EMA",
            None,
        ),
        (
            "finetune_gpt2_enwik6_60kb",
            "late-phase rank-1, σ0 = 0.15, γ = 1/K, constant rate, SWA",
            "late-phase rank-1, σ0 = 0.15, γ = 1/K, constant rate, SWA",
            "--init_noise=0.15",
        ),
    ],
)
def test_what_is_said_of_fine_tuning_is_what_the_figures_say(name, late, chosen, noise) -> None:
    """`late` is what the config's docstring recommends, `chosen` what validation chose."""
    table, rows = TABLES[name], evidence.recorded()[name]["rows"]
    assert evidence.best_of(table, rows, late_phase=True, split="validation") == chosen
    (run,) = {row.run for row in table.rows if row.name == late}
    settings = table.runs[run]
    assert "--swa_start=0.1" in settings
    assert [flag for flag in settings if flag.startswith("--init_noise")] == ([noise] if noise else [])
    words = " ".join(LatePhaseConfig.__doc__.split())
    control = evidence.best_of(table, rows, late_phase=False, split="test")
    means = [f"{statistics.mean(rows[row]['test']):.3f}" for row in (late, control, "base, linear decay, SWA")]
    pattern = r"{}, the strongest control {} \([^)]*\), SWA of linear decay {}".format(*map(re.escape, means))
    assert re.search(pattern, words)
    # docs/results.md: ahead, by an interval without zero, of the plain rows on both texts, on Django of the strongest
    # one, though by little; on enwik6 behind or level with a little dropout, and level with half as many updates.
    differences = {row: evidence.difference(rows[row]["test"], rows[late]["test"]) for row in rows}
    for row in PLAIN:
        mean, width = differences[row]
        assert mean - width > 0, row
    linear, constant, plain = "base, linear decay, SWA", "base, constant rate, SWA", "late-phase norm, σ0 = 0"
    if "django" in name:
        assert control == constant and round(differences[control][0], 3) == 0.002
        mean, width = evidence.difference(rows[control]["test"], rows[chosen]["test"])
        assert (round(mean, 3), round(width, 3)) == (-0.004, 0.011)
        for other, said in (
            ("late-phase rank-1, σ0 = 0.15, SWA", (0.007, 0.004)),
            ("base, gradients × 5 from T0 on, EMA", (0.024, 0.004)),
            ("one member (rank-1), σ0 = 0.15, EMA", (0.044, 0.008)),
        ):
            mean, width = evidence.difference(rows[other]["test"], rows["late-phase rank-1, σ0 = 0.15, EMA"]["test"])
            assert (round(mean, 3), round(width, 3)) == said
        large = "base, gradients × 5 from T0 on, SWA"
        for own, other, said in (
            (f"{plain}, γ = 1/K, SWA", linear, 0.0012),
            (f"{plain}, SWA", linear, 0.0153),
            (f"{plain}, SWA", large, 0.0015),
        ):
            mean, width = evidence.difference(rows[other]["test"], rows[own]["test"])
            assert mean - width > 0 and round(mean, 4) == said
    else:
        mean, width = differences["base, dropout 0.05, SWA"]
        assert mean + width < 0 and control == "base, dropout 0.05, SWA"
        mild = "base, dropout 0.02, constant rate, SWA"
        for row in ("base, half the updates, SWA", mild):
            mean, width = differences[row]
            assert abs(mean) < width
        ahead = statistics.mean(rows[late]["validation"]) - statistics.mean(rows[mild]["validation"])
        assert round(ahead, 3) == 0.009
        assert round(differences[linear][0], 3) == 0.030
        # Replication without noise adds nothing.
        for own, other in ((f"{plain}, γ = 1/K, SWA", linear), (f"{plain}, γ = 1/K, constant rate, SWA", constant)):
            assert abs(evidence.difference(rows[other]["test"], rows[own]["test"])[0]) < 0.002


@pytest.mark.parametrize(("model", "near", "behind"), [("lstm", 0.002, 0.110), ("gpt2", 0.006, 0.194)])
def test_what_is_said_of_training_from_scratch_is_what_the_figures_say(model, near, behind) -> None:
    rows = evidence.recorded()[f"scratch_{model}_django"]["rows"]
    late, one = "late-phase rank-1, linear decay", "one member (rank-1), accumulation from T0 on, linear decay"
    words = " ".join(LatePhaseConfig.__doc__.split())
    means = [f"{statistics.mean(rows[row]['test']):.3f}" for row in (late, one, "base, linear decay")]
    assert "late-phase {}, one member that accumulates as long {}, plain training {}".format(*means) in words
    for schedule in ("linear decay", "constant rate", "constant rate, SWA"):
        own, control = (f"{start}, {schedule}" for start in (late.partition(",")[0], one.rpartition(",")[0]))
        assert abs(evidence.difference(rows[control]["test"], rows[own]["test"])[0]) < near
    mean, width = evidence.difference(rows["base, linear decay"]["test"], rows[late]["test"])
    assert mean + width < 0 and round(mean, 3) == -behind
    mean, width = evidence.difference(
        rows["base, constant rate"]["test"], rows["late-phase rank-1, constant rate"]["test"]
    )
    assert abs(mean) < width
    others = [statistics.mean(row["test"]) for name, row in rows.items() if "schedule-free" not in name]
    assert statistics.mean(rows["base, schedule-free AdamW"]["test"]) < min(others) - 0.03


def test_what_is_said_of_the_lstm_is_what_the_figures_say() -> None:
    name = "finetune_lstm_enwik6_60kb"
    table, rows = TABLES[name], evidence.recorded()[name]["rows"]
    late = "late-phase rank-1, dropout 0.2, γ = 1/K, EMA"
    assert evidence.best_of(table, rows, late_phase=True, split="validation") == late

    def ahead(own: str, other: str) -> tuple[float, float]:
        """By how much, rounded, and half the interval's width."""
        mean, width = evidence.difference(rows[other]["test"], rows[own]["test"])
        return round(mean, 3), round(width, 3)

    control = "one member (rank-1), dropout 0.2, EMA"
    assert evidence.best_of(table, rows, late_phase=False, split="test") == control
    assert ahead(late, control) == (0.000, 0.003)
    base = "base, dropout 0.2, linear decay"
    assert ahead(late, base) == (0.005, 0.002)
    assert ahead(late, f"{base}, EMA") == (0.007, 0.002)
    one, swa = "one member (rank-1), dropout 0.2, SWA", "late-phase rank-1, dropout 0.2, γ = 1/K, SWA"
    assert rows[one]["rate"] == rows[swa]["rate"] == rows[f"{base}, SWA"]["rate"]
    assert ahead(one, f"{base}, SWA")[0] == 0.012
    assert ahead(swa, one) == (-0.002, 0.001)
    assert ahead(base, "base, linear decay")[0] == pytest.approx(0.06, abs=0.005)


def test_what_is_said_of_the_settings_is_what_the_figures_say() -> None:
    name = "ablations_gpt2_enwik6"
    table, rows = TABLES[name], evidence.recorded()[name]["rows"]
    assert table.is_ablation and table.title not in evidence.summary()
    assert evidence.num_runs(table, rows) == 3 * len(rows)
    usual = table.rows[0].name
    intervals = {row: evidence.difference(rows[row]["test"], rows[usual]["test"]) for row in rows}
    for row, said in (("T0 = 0.3", 0.040), ("T0 = 0.6", 0.079), ("rank-1, second block only", 0.038)):
        mean, width = intervals[row]
        assert mean - width > 0 and round(mean, 3) == said
    equal = ["γ = 0.2", "cosine decay", "norm and rank-1", "rows dealt out (by sample)", "rank-1, first block only"]
    for row in [*equal, *(f"K = {members}, ten minibatches" for members in (2, 5, 10))]:
        mean, width = intervals[row]
        assert abs(mean) < width, row
    means = {row: [statistics.mean(rows[row][split]) for split in ("validation", "test")] for row in rows}
    noises = [usual, *(row for row in rows if row.startswith("σ0"))]
    assert max(noises, key=lambda row: means[row][0]) == "σ0 = 0.3" == min(noises, key=lambda row: means[row][1])


def test_a_table_for_a_gpu_is_refused_where_there_is_none(monkeypatch) -> None:
    (name,) = (name for name, table in TABLES.items() if table.device == "cuda")
    for seen in (True, False):
        monkeypatch.setattr("torch.cuda.is_available", lambda seen=seen: seen)
        with nullcontext() if seen else pytest.raises(ValueError, match=f"'{name}'.* torch sees none"):
            evidence.EvidenceArguments(tables=[name])


def test_no_path_of_a_machine_is_recorded() -> None:
    for path in evidence.FIGURES.glob("*.json"):
        assert str(Path.home()) not in path.read_text(encoding="utf-8")
        assert "/tmp/" not in path.read_text(encoding="utf-8")
