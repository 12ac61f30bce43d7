"""Architectures chosen for their differences: attach, train, average, save, reload; and the sweep over all of them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file

import round_trip
import stock_reload
from hf_latephase import LatePhase, LatePhaseConfig
from round_trip import Row, examine
from runs import EXAMPLES
from tiny_models import build


BENCHMARKS = EXAMPLES / "benchmarks" / "coverage"
SUBSET = [
    "causal-lm/llama", "causal-lm/gpt2", "causal-lm/falcon", "causal-lm/phi3", "causal-lm/gemma2", "causal-lm/mixtral",
    "causal-lm/gpt_oss", "causal-lm/deepseek_v3", "causal-lm/mamba", "causal-lm/mamba2", "causal-lm/jamba",
    "causal-lm/recurrent_gemma", "causal-lm/rwkv", "causal-lm/zamba", "causal-lm/qwen3_next", "causal-lm/apertus",
    "causal-lm/roberta-prelayernorm", "causal-lm/xlnet", "causal-lm/reformer", "causal-lm/gemma3n_text",
    "causal-lm/big_bird", "masked-lm/albert", "masked-lm/deberta-v2", "seq2seq/t5", "seq2seq/bart", "image/levit",
    "image/vit", "image/convnext", "image/swin", "image/cvt", "audio/wav2vec2", "timm/test_resnet",
]  # fmt: skip


def load_coverage() -> ModuleType:
    """The script, under a name that no installed package has."""
    spec = importlib.util.spec_from_file_location("coverage_benchmark", BENCHMARKS / "coverage.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


coverage = load_coverage()


# Older releases whose stock class is missing, cannot be trained or is reloaded with other logits.
STOCK_FAILS = {
    "causal-lm/qwen3_next": ["4.56"], "causal-lm/apertus": ["4.56", "5.0"], "image/convnext": ["4.56"],
    "causal-lm/recurrent_gemma": ["5.0"],
}  # fmt: skip
RELEASE = Version(transformers.__version__)


def reload_problem(folder: Path) -> str:
    try:
        return stock_reload.problem(folder)
    except NotImplementedError as error:
        return str(error)


@pytest.mark.parametrize("name", SUBSET)
def test_an_architecture(name: str, tmp_path: Path) -> None:
    kind, _, architecture = name.partition("/")
    rows = list(examine(kind, architecture, tmp_path, ["rank1+norm", "head"]))
    if f"{RELEASE.major}.{RELEASE.minor}" in STOCK_FAILS.get(name, ()):
        cause = rows[0].cause or reload_problem(tmp_path / rows[0].folder)
        assert cause
        pytest.skip(f"The stock class of transformers {RELEASE} fails: {cause}")
    assert [row.family for row in rows] == ["stock", "rank1+norm", "head"], rows[0].cause
    for row in rows:
        assert row.result in ("saved", "no layer"), row
        if row.result == "saved":
            assert not stock_reload.problem(tmp_path / row.folder), row
    assert rows[1].result == "saved" and rows[1].layers > 1


@pytest.mark.parametrize("name", SUBSET[::3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_a_round_trip_in_half_precision(name: str, dtype: torch.dtype) -> None:
    kind, _, architecture = name.partition("/")
    model = build(kind, architecture).to(dtype)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    late_phase = LatePhase(model, LatePhaseConfig(num_members=3, weights=["rank1", "norm"]))
    late_phase.release()
    averaged = late_phase.averaged_state_dict()
    late_phase.detach()
    for state in (averaged, model.state_dict()):
        assert list(state) == list(before)
        assert all(torch.equal(state[key], before[key]) and state[key].dtype == before[key].dtype for key in before)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    stock, row = examine("causal-lm", "gpt2", folder, ["rank1"])
    assert (stock.result, row.result, row.generates) == ("saved", "saved", True)
    return folder / row.folder


def damaged(saved: Path, folder: Path, kind: str) -> Path:
    for path in saved.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    name = stock_reload.EXPECTED if kind in ("logits", "tokens") else "model.safetensors"
    tensors = load_file(folder / name)
    if kind == "key":
        tensors["transformer.h.0.ln_1.more"] = torch.ones(1)
    elif kind == "lost":
        del tensors["transformer.h.0.ln_1.weight"]
    elif kind == "weight":
        tensors["transformer.h.0.ln_1.weight"] += 1e-2
    elif kind == "logits":
        tensors["logits"] += 2e-5
    else:
        tensors["tokens"][0, -1] += 1
    save_file(tensors, folder / name, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(("kind", "message"), [
    ("key", "unexpected_keys"), ("lost", "missing_keys"), ("weight", "logits differ"), ("logits", "logits differ"),
    ("tokens", "other tokens"),
])  # fmt: skip
def test_a_damaged_model_is_noticed(kind: str, message: str, saved: Path, tmp_path: Path) -> None:
    assert stock_reload.problem(saved) == ""
    assert message in stock_reload.problem(damaged(saved, tmp_path, kind))


def test_a_fresh_interpreter_has_no_hf_latephase(saved: Path, tmp_path: Path) -> None:
    wrong = damaged(saved, tmp_path, "weight")
    script = BENCHMARKS / "stock_reload.py"
    run = subprocess.run([sys.executable, script, saved, wrong], capture_output=True, text=True, check=True)
    lines = [json.loads(line.removeprefix(stock_reload.MARK)) for line in run.stdout.splitlines()]
    assert [line["folder"] for line in lines] == [saved.name, wrong.name]
    assert lines[0]["problem"] == "" and "logits differ" in lines[1]["problem"]
    code = "import stock_reload; stock_reload.main([]); import hf_latephase"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=BENCHMARKS)
    assert "import of hf_latephase halted" in run.stderr


def test_wrong_results_are_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def nothing(*args: object, **kwargs: object) -> None:
        raise ValueError("weights='norm': none")

    monkeypatch.setattr(round_trip, "LatePhase", nothing)
    _, row = examine("causal-lm", "gpt2", tmp_path, ["norm"])
    assert (row.result, row.cause) == ("failed", "attach: weights='norm': none")
    monkeypatch.undo()
    monkeypatch.setattr(LatePhase, "detach", lambda self: self.model)
    _, row = examine("causal-lm", "gpt2", tmp_path, ["norm"])
    assert row.result == "failed" and "other modules" in row.cause
    monkeypatch.undo()
    monkeypatch.setattr(LatePhase, "distance_from_mean", lambda self: torch.zeros(()))
    _, row = examine("causal-lm", "gpt2", tmp_path, ["norm"])
    assert (row.result, row.cause) == ("failed", "train: the members do not differ")


def test_a_hang_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def hang(*args: object) -> None:
        while True:
            pass

    monkeypatch.setattr(round_trip, "build", hang)
    monkeypatch.setattr(round_trip, "SECONDS", 1)
    (row,) = examine("causal-lm", "gpt2", tmp_path)
    assert row.result == "failed" and "not finished after 1 seconds" in row.cause


def rows() -> list[Row]:
    return [
        Row("causal-lm", "a", "stock", "AForCausalLM", result="passed", generates=True),
        Row("causal-lm", "a", "rank1", "AForCausalLM", 3, "passed", missed=["Odd.weight"]),
        Row("causal-lm", "a", "norm", "AForCausalLM", 2, "failed", "train: no"),
        Row("causal-lm", "a", "head", "AForCausalLM", 0, "no layer", "'w' is tied to ['e']"),
        Row("causal-lm", "b", "stock", cause="build: not here"),
    ]


def test_the_report_names_all_that_does_not_pass() -> None:
    text = coverage.report(rows(), {"torch": "1"})
    assert "| Causal language models | 2 | 1 | 1 | 0 |" in text
    assert "| a | AForCausalLM | failed | 3 | failed |  | tied | yes |" in text
    assert "| b |  | stock fails |" in text
    assert "- a, norm: train: no\n- b, stock: build: not here\n" in text
    assert "- rank1: `Odd.weight` in a" in text
    passed = [row for row in rows() if row.family != "norm"]
    assert "| Causal language models | 2 | 1 | 1 | 1 |" in coverage.report(passed, {"torch": "1"})


def test_all_of_transformers_is_listed() -> None:
    names = coverage.architectures()
    assert len(names) == len({*names})
    absent = {"causal-lm/qwen3_next"} if Version("4.57") > RELEASE else set()
    assert {*SUBSET} - {*names} == absent
    mapped = {"5.23": 189, "5.19": 170, "5.0": 142, "4.56": 132}
    mapped = next(count for release, count in mapped.items() if Version(release) <= RELEASE)
    assert sum(name.startswith("causal-lm/") for name in names) >= mapped
    assert {name.partition("/")[0] for name in names} == {*coverage.TITLES}


def test_the_table_is_made_from_the_rows_of_the_sweep() -> None:
    found, releases = coverage.read_rows(coverage.RESULTS.with_suffix(".json"))
    assert coverage.report(found, releases) == coverage.RESULTS.read_text(encoding="utf-8")
    causal = [row for row in found if row.kind == "causal-lm"]
    verdicts = [coverage.verdict(families) for families in coverage.by_architecture(causal).values()]
    # All that transformers 5.23 maps; what its own class cannot build, save and reload is none of ours.
    assert len(verdicts) == 189
    assert verdicts.count("passed") >= 180 and set(verdicts) <= {"passed", "stock fails"}


@pytest.mark.slow
def test_every_architecture(tmp_path: Path) -> None:
    found = coverage.sweep(coverage.architectures(), workers=2, folder=tmp_path)
    verdicts = {names: coverage.verdict(families) for names, families in coverage.by_architecture(found).items()}
    assert [names for names, verdict in verdicts.items() if verdict == "failed"] == []
    causal = [
        families["stock"] for (kind, _), families in coverage.by_architecture(found).items() if kind == "causal-lm"
    ]
    assert sum(not row.cause.startswith("build") for row in causal) >= 180
    assert coverage.report(found, coverage.releases()) == coverage.RESULTS.read_text(encoding="utf-8")
