"""Publishing, with the Hub's own client, to a Hub on this machine; and loading what was published."""

from __future__ import annotations

import hashlib
import inspect
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.file_download
import huggingface_hub.hf_api
import pytest
import torch
import transformers.utils.hub
from huggingface_hub import CommitInfo, HfApi, ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import _http
from packaging.version import Version
from safetensors.torch import load, load_file
from transformers import ByT5Tokenizer, Trainer, TrainerCallback
from transformers.testing_utils import CaptureLogger

import hub_server
import tiny
from hf_latephase import LatePhaseConfig
from hf_latephase.compat import CONNECTION_ERRORS
from hf_latephase.models import (
    PyramidNetConfig,
    PyramidNetForImageClassification,
    WideResNetConfig,
    WideResNetForImageClassification,
)
from hf_latephase.publishing.hub import PublishingMixin
from hf_latephase.publishing.hub import logger as publishing_logger
from hub_server import READ_TOKEN, TOKEN, USER, Failure, HubServer, running_hub


REPO = f"{USER}/model"
TOKENIZER_FILES = {"tokenizer_config.json"}
if Version(transformers.__version__) < Version("5"):
    TOKENIZER_FILES |= {"special_tokens_map.json"}
LSTM_FILES = {
    "README.md", "config.json", "generation_config.json", "late_phase_config.json", "model.safetensors",
    "modeling_lstm_lm.py", "training_args.bin",
} | TOKENIZER_FILES  # fmt: skip
MEMBERS = "late_phase.safetensors"
TEMPLATE = "{}/{{repo_id}}/resolve/{{revision}}/{{filename}}"  # that of a download, which the client builds at import


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with running_hub() as hub:
        yield hub


def use_endpoint(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    # These remember it. Before transformers 5.3 Trainer uploads with huggingface_hub's own.
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", url)


def go_offline(monkeypatch: pytest.MonkeyPatch, is_offline: bool) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_offline)
    if hasattr(_http, "reset_sessions"):  # before huggingface_hub 1 connections remember it
        _http.reset_sessions()


@pytest.fixture
def hub(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """The empty Hub, which this process's client now takes for the Hub, with nobody logged in."""
    server.clear()
    use_endpoint(monkeypatch, server.url)
    for module in (constants, huggingface_hub.file_download):  # the latter before huggingface_hub 1
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", TEMPLATE.format(server.url), raising=False)
    go_offline(monkeypatch, False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    # The client waits longer before each of its five retries.
    monkeypatch.setattr(_http, "time", SimpleNamespace(**(vars(time) | {"sleep": lambda seconds: None})))
    return server


def lstm_trainer(folder: Path, steps: int = 4, **kwargs: Any) -> Any:
    config = LatePhaseConfig(num_members=2, late_phase_start=1, weights=["rank1"])
    arguments = {"max_steps": steps, "hub_token": TOKEN, "hub_model_id": "model"} | kwargs
    extra = {"processing_class": ByT5Tokenizer(extra_ids=0)}
    torch.manual_seed(0)
    return tiny.trainer(folder, tiny.lstm(), config, rows=4 * steps, extra=extra, **arguments)


def published(hub: HubServer, revision: str = "main", name: str = REPO) -> dict[str, bytes]:
    files = hub.repos[name].files(revision)
    assert files is not None
    return {path: data for path, data in files.items() if path != ".gitattributes"}


def in_root(files: dict[str, bytes]) -> set[str]:
    return {path for path in files if "/" not in path}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_weights(data: bytes, model: Any) -> None:
    expected, found = model.state_dict(), load(data)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


# ---- what is published can be loaded ----


def image_trainer(folder: Path, model: Any) -> Any:
    draw = torch.Generator().manual_seed(1)
    rows = [
        {"pixel_values": torch.randn(3, 8, 8, generator=draw), "labels": torch.tensor(index % 3)}
        for index in range(16)
    ]
    config = LatePhaseConfig(num_members=2, late_phase_start=1, weights=["norm"])
    extra = {"train_dataset": rows, "eval_dataset": rows[:4]}
    args = tiny.arguments(folder, max_steps=4, hub_token=TOKEN, optim="sgd")
    return tiny.LatePhaseTrainer(model=model, args=args, late_phase_config=config, **extra)


LOAD = """
import sys
sys.modules["hf_latephase"] = None  # importing it raises
import torch, transformers
from huggingface_hub import ModelCard

inputs = torch.load("inputs.pt")
for repo, loader in {repos!r}.items():
    options = {{"trust_remote_code": True}} if repo != "{user}/gpt2" else {{}}
    auto = getattr(transformers, loader)
    model, info = auto.from_pretrained(repo, output_loading_info=True, **options)
    assert not any(info.values()), info
    own = "transformers" if repo == "{user}/gpt2" else "transformers_modules"
    assert type(model).__module__.partition(".")[0] == own, type(model)
    assert "late-phase-weights" in ModelCard.load(repo).data.tags
    if loader == "AutoModelForCausalLM":
        tokenizer = transformers.AutoTokenizer.from_pretrained(repo, **options)
        assert tokenizer("ab").input_ids == [100, 101, 1], tokenizer("ab")
    with torch.no_grad():
        torch.save(model.eval()(inputs[loader]).logits, repo.replace("/", "-") + ".pt")
"""


def test_what_is_published_loads_in_a_process_without_the_library(hub: HubServer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = {"num_labels": 3}
    tokenizer = {"processing_class": ByT5Tokenizer(extra_ids=0)}
    text = LatePhaseConfig(num_members=2, late_phase_start=1, weights=["rank1"])
    wide = WideResNetForImageClassification(WideResNetConfig(depth=10, widen_factor=1, **images))
    pyramid = PyramidNetForImageClassification(PyramidNetConfig(depth=11, alpha=6, **images))
    trainers = {
        "lstm": lstm_trainer(tmp_path / "lstm", hub_model_id=None, hub_private_repo=True),
        "gpt2": tiny.trainer(tmp_path / "gpt2", tiny.gpt2(), text, max_steps=4, hub_token=TOKEN, extra=tokenizer),
        "wide": image_trainer(tmp_path / "wide", wide),
        "pyramid": image_trainer(tmp_path / "pyramid", pyramid),
    }
    loaders = {"lstm": "AutoModelForCausalLM", "gpt2": "AutoModelForCausalLM"}
    repos = {f"{USER}/{name}": loaders.get(name, "AutoModelForImageClassification") for name in trainers}
    for trainer in trainers.values():
        trainer.train()
        assert trainer.late_phase.distance_from_mean() > 0  # there is something to average
        assert isinstance(trainer.push_to_hub(), CommitInfo)
    assert hub.repos[f"{USER}/lstm"].private and not hub.repos[f"{USER}/gpt2"].private
    assert published(hub, name=f"{USER}/lstm").keys() == LSTM_FILES
    assert not any(path.endswith(".py") for path in published(hub, name=f"{USER}/gpt2"))
    assert "modeling_pyramidnet.py" in published(hub, name=f"{USER}/pyramid")

    inputs = {"AutoModelForCausalLM": tiny.Text(2).ids, "AutoModelForImageClassification": torch.randn(2, 3, 8, 8)}
    torch.save(inputs, tmp_path / "inputs.pt")
    unwanted = ("PYTHONPATH", "HF_MODULES_CACHE", "HF_HUB_OFFLINE")
    environment = {name: value for name, value in os.environ.items() if name not in unwanted}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
    command = [sys.executable, "-I", "-c", LOAD.format(repos=repos, user=USER)]
    finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    for name, trainer in trainers.items():
        with torch.no_grad():
            expected = trainer.averaged_model().eval()(inputs[repos[f"{USER}/{name}"]]).logits
        torch.testing.assert_close(torch.load(tmp_path / f"{USER}-{name}.pt"), expected, rtol=0, atol=1e-5)


def test_the_documentation_publishes(hub: HubServer, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "publishing.md").read_text(encoding="utf-8")
    (snippet,) = [part for part in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "push_to_hub" in part]
    base_trainer = SimpleNamespace(evaluate=lambda: {"eval_loss": 9.25})
    exec(snippet, {"trainer": lstm_trainer(tmp_path / "run"), "base_trainer": base_trainer})
    card = ModelCard(published(hub)["README.md"].decode())
    assert {"mine", "late-phase-weights"} <= set(card.data.tags) and card.data.language == "en"
    assert "on my corpus" in card.text and "| base | 9.25 |" in card.text


# ---- while training ----


class OneAtATime(TrainerCallback):
    """Waits for each upload: Trainer skips those that come while one is running."""

    def __init__(self) -> None:
        self.trainer: Any = None

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._finish_current_push()


def train_and_publish(folder: Path, strategy: str, steps: int = 5, **kwargs: Any) -> Any:
    """Saves at step 3, inside a cycle, and at 6 if there are so many."""
    saving = {"save_strategy": "steps", "save_steps": 3, "push_to_hub": True, "hub_strategy": strategy}
    trainer = lstm_trainer(folder, steps, **saving, **kwargs)
    waiting = OneAtATime()
    waiting.trainer = trainer
    trainer.add_callback(waiting)
    trainer.train()
    return trainer


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_hub_strategies(hub: HubServer, tmp_path: Path, strategy: str) -> None:
    folder = tmp_path / "run"
    trainer = train_and_publish(folder, strategy, steps=6)
    files, log = published(hub), [message for _, message in hub.repos[REPO].log][1:]
    folders = {"checkpoint": {"last-checkpoint"}, "all_checkpoints": {"checkpoint-3", "checkpoint-6"}}
    assert {path.partition("/")[0] for path in files if "/" in path} == folders.get(strategy, set())
    for inside in folders.get(strategy, set()):
        assert f"{inside}/{MEMBERS}" in files and f"{inside}/optimizer.pt" in files
    if strategy == "end":
        assert log == [] and files == {}
    else:
        # The root is the stock model, also of a save inside a cycle: all that it needs, and no members.
        assert in_root(files) == LSTM_FILES
        first = next(commit for commit in hub.repos[REPO].commits.values() if "model.safetensors" in commit)
        assert in_root(first) - {".gitattributes"} == LSTM_FILES
        saved = load_file(folder / "checkpoint-3" / "model.safetensors")
        assert all(torch.equal(load(first["model.safetensors"])[name], value) for name, value in saved.items())
        assert "steps trained: 3 of 6" in first["README.md"].decode()
        uploads = [""] if strategy == "every_save" else ["", ", checkpoint"]
        assert log == [f"Training in progress, step {step}{upload}" for step in (3, 6) for upload in uploads]
        check_weights(files["model.safetensors"], trainer.averaged_model())

    info = trainer.push_to_hub()
    assert isinstance(info, CommitInfo) and info.commit_message == "End of training"
    assert hub.repos[REPO].branches["main"] == info.oid
    assert in_root(published(hub)) == LSTM_FILES
    check_weights(published(hub)["model.safetensors"], trainer.averaged_model())
    assert (folder / "checkpoint-6" / MEMBERS).is_file()


def test_nothing_vanishes_while_an_upload_goes_through_the_folder(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client lists the folder in the background, and fails if a folder in it is gone when it gets there."""
    upload_folder, listed, vanished = HfApi.upload_folder, set[Path](), set[Path]()

    def upload_slowly(self: HfApi, *args: Any, **kwargs: Any) -> Any:
        listed.update(Path(kwargs["folder_path"]).rglob("*"))
        return upload_folder(self, *args, **kwargs)

    class Look(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            vanished.update(path for path in listed if not path.exists())
            listed.clear()

    monkeypatch.setattr(HfApi, "upload_folder", upload_slowly)
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "hub_strategy": "checkpoint"}
    trainer = lstm_trainer(tmp_path / "run", 4, push_to_hub=True, **saving)
    trainer.add_callback(Look())
    trainer.train()
    assert len(hub.repos[REPO].log) > 1 and vanished == set()


def test_training_goes_on_from_a_published_checkpoint(hub: HubServer, tmp_path: Path) -> None:
    uninterrupted = train_and_publish(tmp_path / "run", "checkpoint", steps=5)
    assert not uninterrupted._stepping.held  # the last step applied what was left
    downloaded = HfApi(endpoint=hub.url).snapshot_download(
        REPO, allow_patterns="last-checkpoint/*", local_dir=tmp_path / "download", token=TOKEN
    )
    resumed = lstm_trainer(tmp_path / "again", 5)
    resumed.train(resume_from_checkpoint=os.path.join(downloaded, "last-checkpoint"))
    assert resumed.state.global_step == 5
    for name, value in uninterrupted.late_phase.model.state_dict().items():
        assert torch.equal(resumed.late_phase.model.state_dict()[name], value), name


def test_saving_a_model_publishes_it_as_with_trainer(hub: HubServer, tmp_path: Path) -> None:
    trainer = lstm_trainer(tmp_path / "run", push_to_hub=True)
    trainer.train()
    trainer.save_model()
    assert hub.repos[REPO].log[-1] == ("main", "Model save")
    assert published(hub).keys() == LSTM_FILES


# ---- the arguments are Trainer's ----


@pytest.mark.parametrize("name", ["create_model_card", "push_to_hub", "init_hf_repo"])
def test_signatures_are_trainers(name: str) -> None:
    def parameters(owner: type) -> list[tuple[str, Any, Any]]:
        found = inspect.signature(getattr(owner, name)).parameters.values()
        return [(p.name, p.kind, p.default) for p in found]

    own, trainers = parameters(PublishingMixin), parameters(Trainer)
    if "private" not in [name for name, *_ in trainers]:  # before transformers 5.23
        own = [parameter for parameter in own if parameter[0] != "private"]
    assert own == trainers


def test_revision_message_tags_and_waiting(hub: HubServer, tmp_path: Path) -> None:
    trainer = lstm_trainer(tmp_path / "run", hub_revision="trial/one")
    trainer.train()
    HfApi(endpoint=hub.url, token=TOKEN).create_repo(REPO)
    HfApi(endpoint=hub.url, token=TOKEN).create_branch(REPO, branch="trial/one")
    future = trainer.push_to_hub("First", blocking=False, tags=["mine"], dataset="some text", language="en")
    assert isinstance(future, Future) and isinstance(future.result(), CommitInfo)
    assert hub.repos[REPO].log[-1] == ("trial/one", "First") and published(hub) == {}
    card = hub_server._front_matter(published(hub, "trial/one")["README.md"].decode())
    assert set(card["tags"]) == {"mine", "late-phase-weights", "generated_from_trainer"}
    assert card["language"] == "en" and "some text" in published(hub, "trial/one")["README.md"].decode()
    trainer.push_to_hub("Second", revision="main", tags="other", dataset_name="a corpus")  # TRL's word for it
    assert "on a corpus" in published(hub)["README.md"].decode()
    assert hub.repos[REPO].log[-1] == ("main", "Second")
    assert {"mine", "other"} < set(hub_server._front_matter(published(hub)["README.md"].decode())["tags"])


def test_a_repository_that_exists_is_used(hub: HubServer, tmp_path: Path) -> None:
    hub.repos[REPO] = hub_server.Repo(private=False)
    hub.repos[REPO].commit("main", {".gitattributes": b"", "notes.txt": b"kept"}, "by hand")
    trainer = lstm_trainer(tmp_path / "run", push_to_hub=True)
    trainer.train()
    trainer.push_to_hub()
    assert published(hub).keys() == LSTM_FILES | {"notes.txt"} and published(hub)["notes.txt"] == b"kept"


def test_publishing_twice_without_a_change_makes_no_commit(hub: HubServer, tmp_path: Path) -> None:
    trainer = lstm_trainer(tmp_path / "run")
    trainer.train()
    first = trainer.push_to_hub()
    assert trainer.push_to_hub().oid == first.oid
    assert len(hub.repos[REPO].log) == 2


def test_the_pipelined_upload_of_large_files(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the client does by default: hf_xet stores large files, here in a folder, and commits name them."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.xet_folder = tmp_path / "storage"
    trainer = lstm_trainer(tmp_path / "run")
    trainer.train()
    assert isinstance(trainer.push_to_hub(), CommitInfo)
    assert published(hub).keys() == LSTM_FILES
    expected = hashlib.sha256((tmp_path / "run" / "model.safetensors").read_bytes()).hexdigest()
    assert published(hub)["model.safetensors"] == hub_server.pointer(expected)
    assert any(hub.xet_folder.rglob("*")) and not hub.objects

    hub.failures = [Failure("POST", r"/commit/main$", 500)]
    trainer.create_model_card(model_name="model", tags="changed")
    before = contents(tmp_path / "run")
    with pytest.raises(HfHubHTTPError) as caught:
        trainer.push_to_hub(tags="changed")
    assert "trainer.push_to_hub() uploads it" in "".join(caught.value.__notes__)
    assert contents(tmp_path / "run") == before


# ---- when it goes wrong ----


def check_push_fails(trainer: Any, folder: Path, error: Any, *words: str) -> None:
    """The error says what to do, and everything that was saved is still there."""
    trainer.save_model(_internal_call=True)
    trainer.create_model_card(model_name="model")
    before = contents(folder)
    with pytest.raises(error) as caught:
        trainer.push_to_hub()
    notes = "\n".join(getattr(caught.value, "__notes__", []))
    for word in words:
        assert word in notes, notes
    assert contents(folder) == before
    check_weights(before["model.safetensors"], trainer.averaged_model())


@pytest.mark.parametrize(
    "method, path, error",
    [
        ("POST", r"/preupload/", HfHubHTTPError),
        ("POST", r"/objects/batch$", HfHubHTTPError),
        ("PUT", r"/large-files/", RuntimeError),
        ("POST", r"/large-files/verify$", RuntimeError),
        ("POST", r"/commit/", HfHubHTTPError),
    ],
)
def test_an_upload_that_breaks_off(
    hub: HubServer, tmp_path: Path, method: str, path: str, error: type[Exception]
) -> None:
    folder = tmp_path / "run"
    trainer = lstm_trainer(folder, push_to_hub=True)
    trainer.train()
    hub.failures = [Failure(method, path, 500)]
    check_push_fails(trainer, folder, error, "The Hub refused, or broke off.", str(folder))
    assert hub.count(method, path) >= 1 and published(hub) == {}

    hub.failures = []
    trainer.push_to_hub()
    assert published(hub).keys() == LSTM_FILES
    check_weights(published(hub)["model.safetensors"], trainer.averaged_model())


def test_a_hiccup_is_retried(hub: HubServer, tmp_path: Path) -> None:
    trainer = lstm_trainer(tmp_path / "run")
    trainer.train()
    hub.failures = [Failure("PUT", r"/large-files/", 503, times=2)]
    trainer.push_to_hub()
    assert published(hub).keys() == LSTM_FILES and hub.failures[0].times == 0


@pytest.mark.parametrize("token, status", [(None, 401), ("hf_wrong", 401), (READ_TOKEN, 403)])
def test_without_a_token_that_may_write(hub: HubServer, tmp_path: Path, token: str | None, status: int) -> None:
    with pytest.raises(HfHubHTTPError) as caught:
        lstm_trainer(tmp_path / "first", push_to_hub=True, hub_token=token)
    assert caught.value.response.status_code == status
    assert "hf auth login" in caught.value.__notes__[0] and "untouched" not in caught.value.__notes__[0]

    # Found out after training, too.
    trainer = lstm_trainer(tmp_path / "run", hub_token=token)
    trainer.train()
    check_push_fails(trainer, tmp_path / "run", HfHubHTTPError, "hub_token in TrainingArguments")
    trainer.push_to_hub(token=TOKEN)
    assert published(hub).keys() == LSTM_FILES


def test_without_a_network(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = lstm_trainer(tmp_path / "run", push_to_hub=True)
    trainer.train()
    with running_hub() as gone:
        closed = gone.url
    use_endpoint(monkeypatch, closed)
    check_push_fails(trainer, tmp_path / "run", CONNECTION_ERRORS, closed, "cannot be reached", str(tmp_path / "run"))
    with pytest.raises(CONNECTION_ERRORS) as caught:
        lstm_trainer(tmp_path / "other", push_to_hub=True)
    assert "cannot be reached" in caught.value.__notes__[0]

    go_offline(monkeypatch, True)
    check_push_fails(trainer, tmp_path / "run", OfflineModeIsEnabled, "Unset HF_HUB_OFFLINE")
    go_offline(monkeypatch, False)
    use_endpoint(monkeypatch, hub.url)
    trainer.push_to_hub()
    assert published(hub).keys() == LSTM_FILES


def test_an_upload_that_fails_while_training_goes_on(hub: HubServer, tmp_path: Path) -> None:
    hub.failures = [Failure("PUT", r"/large-files/", 500)]
    with CaptureLogger(publishing_logger) as log:
        trainer = train_and_publish(tmp_path / "run", "every_save", steps=6)
    assert trainer.state.global_step == 6
    assert log.out.count(f"An upload to {REPO} failed, training goes on") == 2
    assert "broke off" in log.out and "trainer.push_to_hub() uploads it" in log.out
    assert published(hub) == {}
    hub.failures = []
    trainer.push_to_hub()
    assert in_root(published(hub)) == LSTM_FILES


def test_a_card_that_the_hub_refuses_is_not_uploaded(hub: HubServer, tmp_path: Path) -> None:
    trainer = lstm_trainer(tmp_path / "run")
    trainer.train()
    with pytest.raises(ValueError, match="Invalid metadata in README.md"):
        trainer.push_to_hub(license=["no", "string"])
    assert published(hub) == {}
    trainer.push_to_hub(license="mit")
    assert published(hub).keys() == LSTM_FILES
