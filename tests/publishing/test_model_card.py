"""The text and the metadata of model cards, and the cards in model_cards/ against the records of their runs."""

from __future__ import annotations

import inspect
import json
import re
import shlex
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from huggingface_hub import EvalResult, HfApi, ModelCard, constants
from huggingface_hub.repocard_data import model_index_to_eval_results
from transformers import ByT5Tokenizer, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

import run_enwik8
import tiny
from common.recipe import parse_arguments
from hf_latephase import LatePhaseConfig, LatePhaseMixin
from hf_latephase.publishing.model_card import EMISSIONS_NAME, read_emissions
from hf_latephase.publishing.trainer_card import final_results
from hub_server import metadata_errors, running_hub
from make_model_cards import RUNS, make_card


CARDS = Path(__file__).parents[2] / "model_cards"
TYPES = (
    *(run_enwik8.LanguageModelArguments, run_enwik8.DataArguments, run_enwik8.MethodArguments),
    *(LatePhaseConfig, TrainingArguments),
)
CITATION = "Neural networks with late-phase weights"


def config(**kwargs: Any) -> LatePhaseConfig:
    return LatePhaseConfig(**{"num_members": 2, "late_phase_start": 0.5, "weights": ["rank1"], **kwargs})


def trained(folder: Path, late: LatePhaseConfig | None = None, model: Any = None, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    trainer = tiny.trainer(folder, model or tiny.gpt2(), late or config(), rows=16, max_steps=4, **kwargs)
    trainer.train()
    return trainer


def card_of(trainer: Any, **options: Any) -> ModelCard:
    trainer.create_model_card(**options)
    return ModelCard.load(Path(trainer.args.output_dir, "README.md"))


def section(card: ModelCard, heading: str) -> str:
    found = re.search(rf"^#+ {heading}\n(.*?)(?=^#|\Z)", card.text, re.DOTALL | re.MULTILINE)
    assert found is not None, f"no {heading!r} in {card.text}"
    return found.group(1)


def table(text: str) -> list[dict[str, str]]:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def check_valid(card: ModelCard, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the client's own way to ask the Hub, which here is the server of the tests."""
    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        if "https://huggingface.co" in inspect.getsource(ModelCard.validate):  # some releases ask a fixed address
            HfApi(endpoint=hub.url)._validate_yaml(str(card))
        else:
            card.validate()
        assert hub.count("POST", "validate-yaml") == 1


# ---- what a trainer writes ----


def test_a_card_says_what_was_averaged(tmp_path: Path) -> None:
    late = config(weights=["rank1", "norm"], swa_start=0.75, base_gradient_scale=0.5)
    tokenizer = {"processing_class": ByT5Tokenizer(extra_ids=0)}
    card = card_of(trained(tmp_path / "my-model", late, extra=tokenizer))
    said = {row["setting"]: row["value"] for row in table(section(card, "Late-phase weights").split("\n\n")[1])}
    assert said == {
        "families": "rank1, norm",
        "members (K)": "2",
        "late phase from (T0)": "0.5: step 2",
        "SWA from": "0.75: step 3, each update, 1 sample",
        "`base_gradient_scale`": "0.5",
    }
    layers = table(section(card, "Late-phase weights").split("\n\n")[2])
    assert {"late-phase weights": "`transformer.h.*.attn.c_attn.weight`", "family": "rank1", "tensors": "2"} in layers
    assert {"late-phase weights": "`transformer.ln_f.bias`", "family": "norm", "tensors": "1"} in layers
    assert sum(int(row["tensors"]) for row in layers) == 2 * 4 + 2 * 4 + 2
    assert "2 copies" in card.text and CITATION in section(card, "Citation")
    loading = section(card, "Use")
    assert 'model = AutoModelForCausalLM.from_pretrained("my-model")' in loading
    assert 'tokenizer = AutoTokenizer.from_pretrained("my-model")' in loading and "trust_remote_code" not in loading
    training = section(card, "Training")
    assert "- optimizer: AdamW (betas=(0.9, 0.999), eps=1e-08)" in training and "- learning_rate: 0.05" in training
    assert "- steps trained: 4 of 4" in training
    assert card.data.tags == ["late-phase-weights", "generated_from_trainer"]
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"


def test_a_card_of_what_was_not_replicated_does_not_claim_it(tmp_path: Path) -> None:
    early = tiny.trainer(tmp_path / "early", tiny.gpt2(), config())
    text = card_of(early).text
    assert "nothing has been replicated yet" in text and "2 copies" not in text and "Not evaluated." in text
    alone = card_of(trained(tmp_path / "alone", config(num_members=1, ema_decay=0.9, ema_start=0.0))).text
    assert "One member: nothing was replicated." in alone and "copies" not in alone
    assert "| EMA | decay 0.9 per step, ramped, from 0.0: step 0, each update, 4 samples |" in alone


def test_code_beside_the_weights_is_asked_for(tmp_path: Path) -> None:
    card = card_of(trained(tmp_path, model=tiny.lstm()), model_name="mine")
    assert 'AutoModelForCausalLM.from_pretrained("mine", trust_remote_code=True)' in section(card, "Use")
    assert card.data.pipeline_tag == "text-generation"


def test_a_model_that_is_none_of_transformers(tmp_path: Path) -> None:
    card = card_of(trained(tmp_path, config(weights=["norm"]), tiny.ConvNet(), eval_strategy="steps", eval_steps=2))
    assert "state dict" in section(card, "Use") and "from_pretrained" not in card.text
    assert "loss" in section(card, "Results")
    assert not card.data.eval_results and card.data.pipeline_tag is None  # the Hub takes no results without a task


def test_results_with_controls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trained(tmp_path / "run", eval_strategy="steps", eval_steps=2, logging_steps=1)
    found = trainer.evaluate()
    base = trained(tmp_path / "base", config(num_members=1, weights=["norm"]))
    accumulation = trained(tmp_path / "accumulation", config(num_members=1, cycle_length=2))
    trainer.control_results = {"base": base.evaluate(), "accumulation": accumulation.evaluate()}
    card = card_of(trainer, dataset="random numbers", dataset_tags="numbers", language="en", license="mit")
    assert table(section(card, "Results")) == [
        {"": "**this model**", "loss": f"{found['eval_loss']:.5g}"},
        {"": "base", "loss": f"{trainer.control_results['base']['eval_loss']:.5g}"},
        {"": "accumulation", "loss": f"{trainer.control_results['accumulation']['eval_loss']:.5g}"},
    ]
    assert "Evaluated at step 4 of 4. The other rows are its controls." in card.text
    history = table(section(card, "On the way"))
    logged = [entry for entry in trainer.state.log_history if "eval_loss" in entry][:2]
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    assert [row["step"] for row in history] == ["2", "4"]
    assert [row["loss"] for row in history] == [f"{entry['eval_loss']:.5g}" for entry in logged]
    assert [row["training loss"] for row in history] == [f"{losses[step]:.5g}" for step in (2, 4)]

    # The metadata make the way through the Hub's own classes, there and back.
    assert card.data.eval_results == [
        EvalResult(
            task_type="text-generation", task_name="Causal Language Modeling", dataset_type="numbers",
            dataset_name="random numbers", metric_type="loss", metric_name="loss", metric_value=found["eval_loss"],
        )
    ]  # fmt: skip
    data = card.data.to_dict()
    assert model_index_to_eval_results(data["model-index"]) == ("run", card.data.eval_results)
    assert (data["language"], data["license"], data["datasets"]) == ("en", "mit", ["numbers"])
    assert ModelCard(str(card)).data.to_dict() == data
    check_valid(card, monkeypatch)
    card.data.license = ["none"]
    with pytest.raises(ValueError, match="license"):
        check_valid(card, monkeypatch)


def logged(*entries: dict[str, Any], best: int | None = None) -> Any:
    trainer = type("Stand-in", (), {})()
    trainer.state = type("State", (), {"log_history": list(entries), "best_global_step": best})()
    trainer.args = type("Arguments", (), {"load_best_model_at_end": best is not None})()
    return trainer


def test_results_are_those_of_the_model_that_is_there() -> None:
    first, second = {"eval_loss": 1.0, "eval_runtime": 9.0, "step": 5}, {"eval_loss": 2.0, "step": 10}
    end, later = {"train_runtime": 1.0, "train_loss": 3.0, "step": 10}, {"eval_loss": 4.0, "step": 10}
    assert final_results(logged()) == ({}, None)
    assert final_results(logged({"loss": 7.0, "step": 1}, first, second, end)) == ({"loss": 2.0}, 10)
    assert final_results(logged(first, second, end, best=5)) == ({"loss": 1.0}, 5)
    assert final_results(logged(first, second, best=5)) == ({"loss": 2.0}, 10)  # training goes on
    assert final_results(logged(first, second, end, later, best=5)) == ({"loss": 4.0}, 10)
    names = {"eval_a_loss": 1.0, "eval_a_runtime": 9.0, "step": 10}, {"eval_b_loss": 2.0, "step": 10}
    assert final_results(logged(first, *names)) == ({"a_loss": 1.0, "b_loss": 2.0}, 10)


def test_figures_that_are_no_numbers_stay_out_of_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trained(tmp_path)
    trainer.log({"eval_loss": float("nan"), "eval_accuracy": torch.tensor(0.5).item(), "eval_names": ["a"]})
    card = card_of(trainer)
    assert [(entry.metric_type, entry.metric_value) for entry in card.data.eval_results] == [("accuracy", 0.5)]
    assert table(section(card, "Results"))[0] == {"": "**this model**", "loss": "nan", "accuracy": "0.5"}
    assert card.data.metrics == ["accuracy"]
    assert "On the way" not in card.text  # logged after training
    check_valid(card, monkeypatch)


def test_tags_are_merged_and_the_users_list_is_left_alone(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, tiny.gpt2(), config())
    mine = ["mine", "late-phase-weights"]
    assert card_of(trainer, tags=mine).data.tags == ["mine", "late-phase-weights", "generated_from_trainer"]
    assert mine == ["mine", "late-phase-weights"]
    assert set(card_of(trainer, tags="other").data.tags) == {*mine, "other", "generated_from_trainer"}
    assert set(card_of(trainer).data.tags) == {*mine, "other", "generated_from_trainer"}


def test_base_model_and_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.gpt2()
    model.config._name_or_path = "someone/small-gpt2"
    trainer = tiny.trainer(tmp_path, model, config())
    rows = Dataset.from_dict({"input_ids": [[3, 4]], "labels": [[3, 4]]})
    rows.info.builder_name, rows.info.config_name, rows._split = "some_text", "plain", "test"
    trainer.eval_dataset = rows
    trainer.log({"eval_loss": 1.0})
    card = card_of(trainer)
    assert card.data.base_model == "someone/small-gpt2" and card.data.datasets == ["some_text"]
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.dataset_config, result.dataset_split) == ("some_text", "plain", "test")
    assert "Fine-tuned from [someone/small-gpt2]" in card.text and "on some_text" in card.text
    check_valid(card, monkeypatch)

    model.config._name_or_path = "/no/longer/there/checkpoint"
    card = card_of(trainer)
    assert card.data.base_model is None and "Trained from scratch" in card.text


def test_emissions_that_were_measured(tmp_path: Path) -> None:
    """The columns that CodeCarbon writes, in kilograms; a row a run."""
    rows = "timestamp,duration,emissions,country_name,cpu_model,gpu_model\n"
    rows += "2026-01-01,9.0,0.5,Nowhere,old,\n2026-01-02,9.0,0.00123,Iceland,Some CPU,\n"
    (tmp_path / EMISSIONS_NAME).write_text(rows)
    card = card_of(tiny.trainer(tmp_path, tiny.gpt2(), config()))
    assert card.data["co2_eq_emissions"] == {
        "emissions": pytest.approx(1.23), "source": "CodeCarbon", "geographical_location": "Iceland",
        "hardware_used": "Some CPU",
    }  # fmt: skip
    assert "1.23 g of CO2 equivalents in Iceland" in section(card, "Emissions")
    for broken in ("", "timestamp,emissions\n", "timestamp\n2026\n", "emissions\nmuch\n"):
        (tmp_path / EMISSIONS_NAME).write_text(broken)
        assert read_emissions(tmp_path) is None
    card = card_of(tiny.trainer(tmp_path, tiny.gpt2(), config()))
    assert "Emissions" not in card.text and "co2_eq_emissions" not in card.data


class OwnCards(Trainer):
    """With cards of its own, by TRL's signature."""

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        text = f"---\ntags: [theirs]\nlicense: mit\n---\n\n# {model_name}\n\nOn {dataset_name}, tags {tags}.\n"
        Path(self.args.output_dir, "README.md").write_text(text)


class LatePhaseOwnCards(LatePhaseMixin, OwnCards):
    pass


def test_a_parent_with_cards_of_its_own_keeps_them(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, tiny.gpt2(), config(), trainer_class=LatePhaseOwnCards)
    for _ in range(2):  # the second time over the first
        card = card_of(trainer, model_name="a", dataset=["b", "c"], tags="mine", language="en")
        assert "# a\n\nOn b, tags mine." in card.text and card.data.license == "mit"
        assert set(card.data.tags) == {"theirs", "mine", "late-phase-weights"}
        assert card.text.count("## Late-phase weights") == 1


def test_an_adapters_card_is_trainers_with_our_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    base = tiny.gpt2()
    base.config._name_or_path = "someone/small-gpt2"
    adapter = config(target_modules=["lora_A.default", "lora_B.default"])
    trainer = trained(tmp_path, adapter, peft.get_peft_model(base, lora))
    trainer.save_model()
    for _ in range(2):
        card = card_of(trainer, tags="mine")
        assert card.data.library_name == "peft" and {"mine", "late-phase-weights", "lora"} <= set(card.data.tags)
        assert card.text.count("## Late-phase weights") == 1 and "2 copies" in card.text
        assert "## Training procedure" in card.text
    check_valid(card, monkeypatch)


# ---- the cards of runs that happened ----


@pytest.mark.parametrize("name", RUNS)
def test_rendered_cards_are_those_of_their_records(name: str) -> None:
    record = json.loads((CARDS / f"{name}.json").read_text(encoding="utf-8"))
    assert make_card(name, record).content == (CARDS / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", RUNS)
def test_figures_in_the_cards_are_the_recorded_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read back out of the text, without the code that wrote it."""
    record = json.loads((CARDS / f"{name}.json").read_text(encoding="utf-8"))
    card = ModelCard.load(CARDS / f"{name}.md")
    assert metadata_errors(str(card)) == [] and "late-phase-weights" in card.data.tags
    check_valid(card, monkeypatch)

    rows = {row.pop(""): row for row in table(section(card, "Results"))}
    recorded: dict[str, Any] = {}
    for result in record["results"]:
        if "averaged_scores" in result:
            recorded[result["method"]] = list(result["scores"].values())
            recorded[f"{result['method']}, SWA"] = list(result["averaged_scores"].values())
        else:
            scores = [result["scores"]["test"][key] for key in ("accuracy", "nll", "brier_score", "calibration_error")]
            variant = f", {result['variant']}" if result["variant"] else ""
            recorded[result["method"] + variant] = [*scores, *result["ood_auroc"].values()]
    assert len(rows) == len(recorded)
    for method, values in recorded.items():
        row = rows[f"**this model** ({method})" if method == "late_phase, SWA" else method]
        assert [float(cell) for cell in list(row.values())[:-1]] == pytest.approx(values, rel=1e-4)
    assert {"base", "base, SWA", "accumulation", "accumulation, SWA", "late_phase"} <= rows.keys()

    indexed = {entry.metric_value for entry in card.data.eval_results}
    assert indexed and indexed <= {value for values in (*recorded.values(),) for value in values}
    assert set(recorded["late_phase, SWA"]) & indexed
    late, settings = record["late_phase_config"], record["settings"]
    assert f"| members (K) | {late['num_members']} |" in card.text
    start = int(late["late_phase_start"] * settings["max_steps"] + 0.5)
    assert f"| late phase from (T0) | {late['late_phase_start']}: step {start} |" in card.text
    made = section(card, "Made with")
    for fact in (record["run"]["command"], record["run"]["machine"], settings["torch"], f"seed: {settings['seed']}"):
        assert str(fact) in made
    rate = "lr_points" if settings.get("lr_points") else "learning_rate"
    assert f"- {rate}: {settings[rate]}" in section(card, "Training")


@pytest.mark.parametrize("name", ["lstm-python-reference", "gpt2-python-reference"])
def test_the_command_of_a_card_gives_the_settings_of_its_run(name: str) -> None:
    """Whatever has become of the recipe since."""
    record = json.loads((CARDS / f"{name}.json").read_text(encoding="utf-8"))
    _, script, recipe, *flags = shlex.split(record["run"]["command"])
    assert [script, recipe] == [f"examples/{RUNS[name].script}", f"examples/{RUNS[name].recipe}"]
    assert flags == RUNS[name].flags
    *arguments, args = parse_arguments(TYPES, [str(CARDS.parent / recipe), *flags, "--use_cpu"])
    now = run_enwik8.describe_settings(arguments, args)
    then = {key: value for key, value in record["settings"].items() if key not in ("torch", "transformers")}
    for settings in (now, then):
        # The same one; it is the default from torch 2.8 on.
        settings["optim"] = OptimizerNames(settings["optim"]).value.removesuffix("_fused")
    assert then.items() <= now.items()
