"""What lies in a checkpoint folder, when it appears, and which folders are refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers.trainer
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
)
from transformers.trainer_utils import get_last_checkpoint

from hf_latephase import LatePhaseConfig
from hf_latephase.training.checkpoints.checkpoint import STATE_NAME, TENSORS_NAME
from hf_latephase.training.checkpoints.staging import STAGING_NAME
from test_trainer import assert_same, weights_of
from tiny import VOCAB, gpt2, llama, lstm, trainer, use_hub


CONFIG = LatePhaseConfig(num_members=3, weights=["rank1"], late_phase_start=2)


def checkpoints(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.startswith("checkpoint"))


def mixtral() -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, max_position_embeddings=16,
    )  # fmt: skip
    return MixtralForCausalLM(config)


# ---- refused before anything is changed ----


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint inside a cycle."""
    folder = tmp_path_factory.mktemp("saved")
    trainer(folder, gpt2(), CONFIG, max_steps=7, save_strategy="steps", save_steps=4).train()
    return folder / "checkpoint-4"


def everything(run: Any) -> dict[str, Any]:
    """All that a refused checkpoint could have changed."""
    run.create_optimizer()
    return {
        "model": {name: t.clone() for name, t in run.model.state_dict().items()},
        "optimizer": {
            f"{index}.{name}": torch.as_tensor(value).clone()
            for index, state in run.optimizer.state_dict()["state"].items()
            for name, value in state.items()
        },
        "state": json.dumps(vars(run.state), default=str, sort_keys=True),
        "released": run.late_phase.released,
        "held": list(run._stepping.held),
        "in_train": run.is_in_train,
        "generators": torch.get_rng_state(),
    }


def cut(name: str, share: float = 0.5) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return damage


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(("damage", "error", "message"), [
    (shutil.rmtree, FileNotFoundError, "There is no checkpoint"),
    (remove(STATE_NAME), FileNotFoundError, "LatePhaseTrainer did not write it"),
    (remove(TENSORS_NAME), ValueError, "damaged: late_phase.safetensors cannot be read"),
    (cut(TENSORS_NAME), ValueError, "damaged: late_phase.safetensors cannot be read"),
    (cut(TENSORS_NAME, 0.99), ValueError, "damaged: late_phase.safetensors cannot be read"),
    (write(TENSORS_NAME, b"\0" * 64), ValueError, "damaged: late_phase.safetensors cannot be read"),
    (cut(STATE_NAME), ValueError, "damaged: late_phase_state.json cannot be read"),
    (write(STATE_NAME, b"{}"), ValueError, "damaged: late_phase_state.json lacks"),
    (write(STATE_NAME, b"[1]"), ValueError, "damaged: late_phase_state.json lacks"),
    (remove("model.safetensors"), ValueError, "damaged: no weights file holds"),
    (cut("model.safetensors"), ValueError, "damaged: model.safetensors cannot be read"),
    (remove("optimizer.pt"), FileNotFoundError, "lacks optimizer"),
    (cut("optimizer.pt"), ValueError, "damaged: optimizer.pt is cut off"),
    (remove("scheduler.pt"), FileNotFoundError, "lacks scheduler"),
    (cut("scheduler.pt", 0.9), ValueError, "damaged: scheduler.pt is cut off"),
    (remove("rng_state.pth"), FileNotFoundError, "lacks rng_state"),
    (cut("rng_state.pth"), ValueError, "damaged: rng_state.pth is cut off"),
    (remove("trainer_state.json"), FileNotFoundError, "lacks trainer_state.json"),
    (cut("trainer_state.json"), ValueError, "damaged: trainer_state.json cannot be read"),
    (write("trainer_state.json", b"{}"), ValueError, "damaged: trainer_state.json names no global_step"),
])  # fmt: skip
@pytest.mark.parametrize("trained", [False, True])
def test_a_damaged_checkpoint_is_refused_and_nothing_changes(
    tmp_path, saved: Path, damage: Any, error: type, message: str, trained: bool
) -> None:
    folder = tmp_path / "checkpoint-4"
    shutil.copytree(saved, folder)
    damage(folder)
    torch.manual_seed(5)
    run = trainer(tmp_path, gpt2(), CONFIG, max_steps=7)
    if trained:
        run.train()
    before = everything(run)
    with pytest.raises(error, match=message) as caught:
        run.train(resume_from_checkpoint=str(folder))
    assert "checkpoint-4" in str(caught.value)
    assert any(word in str(caught.value) for word in ("Use another", "Choose another", "must be that of"))
    after = everything(run)
    assert_same(before.pop("model"), after.pop("model"))
    assert_same(before.pop("optimizer"), after.pop("optimizer"))
    assert torch.equal(before.pop("generators"), after.pop("generators"))
    assert before == after


@pytest.mark.parametrize(("model", "config", "settings", "message"), [
    (gpt2, {"num_members": 4}, {}, "num_members=3, the config 4"),
    (gpt2, {"weights": ["norm"]}, {}, "replicates other weights"),
    (gpt2, {"weights": ["rank1", "norm"]}, {}, "replicates other weights"),
    (gpt2, {"target_modules": ["c_fc"]}, {}, "replicates other weights"),
    (lambda: gpt2(n_inner=24), {}, {}, "written for another model"),
    (lambda: gpt2(tie_word_embeddings=False), {}, {}, "no weights file holds 'lm_head.weight'"),
    (lstm, {}, {}, "replicates other weights"),
    (gpt2, {}, {"gradient_accumulation_steps": 3}, "lies inside a cycle of 3 steps"),
    (gpt2, {"cycle_length": 6}, {}, "lies inside a cycle of 3 steps"),
])  # fmt: skip
def test_another_runs_checkpoint_is_refused_and_nothing_changes(
    tmp_path, saved: Path, model: Any, config: dict, settings: dict, message: str
) -> None:
    config = {"num_members": 3, "weights": ["rank1"], "late_phase_start": 2, **config}
    run = trainer(tmp_path, model(), LatePhaseConfig(**config), max_steps=7, **settings)
    before = everything(run)
    with pytest.raises(ValueError, match=message):
        run.train(resume_from_checkpoint=str(saved))
    after = everything(run)
    assert_same(before.pop("model"), after.pop("model"))
    assert before["state"] == after["state"] and not after["released"] and not after["held"]


def test_plain_trainers_checkpoint_is_refused(tmp_path) -> None:
    trainer(tmp_path, gpt2(), None, max_steps=2, save_strategy="steps", save_steps=2).train()
    run = trainer(tmp_path, gpt2(), CONFIG, max_steps=7)
    with pytest.raises(FileNotFoundError, match="LatePhaseTrainer did not write it"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(ValueError, match="No valid checkpoint found.*only broken ones"):
        run.train(resume_from_checkpoint=True)


# ---- when a folder appears ----


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("method", [
    "save_model", "_save_optimizer_and_scheduler", "_save_scaler", "_save_rng_state", "_push_from_checkpoint",
])  # fmt: skip
def test_a_save_that_breaks_off_leaves_no_checkpoint(tmp_path, monkeypatch, method: str) -> None:
    """Wherever saving ends, there is the old checkpoint and no new one, and the next run goes on from the old one."""
    run = trainer(tmp_path, gpt2(), CONFIG, max_steps=6, save_strategy="steps", save_steps=2, save_total_limit=1)
    parent = getattr(Trainer, method)

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = parent(self, *args, **kwargs)
        if self.state.global_step == 4:
            raise Interrupted
        return result

    if method == "_push_from_checkpoint":
        # Trainer's own call, right before the end: everything is written, nothing has its place.
        place, name = (transformers.trainer, "rotate_checkpoints")
        if not hasattr(place, name):  # before transformers 5.3
            place, name = run, "_rotate_checkpoints"
        monkeypatch.setattr(place, name, lambda **kwargs: interrupted_rotation(run))
    else:
        monkeypatch.setattr(Trainer, method, interrupted)

    def interrupted_rotation(run: Any) -> None:
        if run.state.global_step == 4:
            raise Interrupted

    with pytest.raises(Interrupted):
        run.train()
    assert checkpoints(tmp_path) == ["checkpoint-2"]
    assert os.listdir(tmp_path / STAGING_NAME) == ["checkpoint-4"]
    assert get_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    monkeypatch.undo()
    resumed = trainer(tmp_path, gpt2(), CONFIG, max_steps=6, save_strategy="steps", save_steps=2, save_total_limit=1)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6 and checkpoints(tmp_path) == ["checkpoint-6"]
    assert not (tmp_path / STAGING_NAME).exists()


def test_a_deletion_that_breaks_off_leaves_no_half_checkpoint(tmp_path, monkeypatch) -> None:
    run = trainer(tmp_path, gpt2(), CONFIG, max_steps=4, save_strategy="steps", save_steps=2, save_total_limit=1)
    parent = shutil.rmtree

    def interrupted(path: Any, *args: Any, **kwargs: Any) -> None:
        if os.path.isdir(path) and "optimizer.pt" in os.listdir(path):
            os.remove(os.path.join(path, "optimizer.pt"))
            raise Interrupted
        parent(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(Interrupted):
        run.train()
    assert checkpoints(tmp_path) == ["checkpoint-4"]


def test_an_unfinished_folder_is_ignored_by_name(tmp_path, caplog) -> None:
    trainer(tmp_path, gpt2(), CONFIG, max_steps=4, save_strategy="steps", save_steps=2).train()
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "checkpoint-9" / "checkpoint-is-incomplete.txt").touch()  # of transformers' just-in-time checkpoints
    transformers.utils.logging.enable_propagation()
    run = trainer(tmp_path, gpt2(), CONFIG, max_steps=6)
    begun: list[int] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            begun.append(state.global_step)

    run.add_callback(Watch())
    with caplog.at_level("WARNING"):
        run.train(resume_from_checkpoint=True)
    assert begun == [2]
    assert "checkpoint-9, which lacks" in caplog.text and "checkpoint-4, which lacks optimizer" in caplog.text


def test_a_checkpoint_saved_again_is_replaced(tmp_path) -> None:
    for seed in (1, 2):
        torch.manual_seed(seed)
        run = trainer(tmp_path, gpt2(), CONFIG, max_steps=4, save_strategy="steps", save_steps=2)
        run.train()
        (tmp_path / "checkpoint-2" / "stray.txt").touch()
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    assert not (tmp_path / "checkpoint-4" / "stray.txt").exists()
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert_same(run.late_phase.averaged_state_dict(), weights_of(reloaded))


@pytest.mark.parametrize("limit", [None, 1, 2, 3])
@pytest.mark.parametrize("best", [False, True])
def test_rotation_keeps_what_trainer_keeps(tmp_path, limit: int | None, best: bool) -> None:
    kept = []
    for config in (None, CONFIG):
        scores = iter([3.0, 1.0, 2.0, 4.0, 5.0, 6.0])
        folder = tmp_path / str(config is None)
        run = trainer(
            folder, gpt2(), config, max_steps=12, save_strategy="steps", save_steps=2, eval_strategy="steps",
            eval_steps=2, save_total_limit=limit, load_best_model_at_end=best, metric_for_best_model="score",
            greater_is_better=False, extra={"compute_metrics": lambda prediction: {"score": next(scores)}},  # noqa: B023
        )  # fmt: skip
        run.train()
        state = json.loads((folder / checkpoints(folder)[-1] / "trainer_state.json").read_text())
        paths = [run.state.best_model_checkpoint, state["best_model_checkpoint"]]
        kept.append((checkpoints(folder), [path and Path(path).relative_to(folder) for path in paths]))
    assert kept[0] == kept[1]


def test_the_best_checkpoint_is_found_in_a_folder_that_was_moved(tmp_path) -> None:
    def new(folder: Path, **kwargs: Any) -> Any:
        scores = iter([1.0, 2.0, 3.0]) if folder.name == "first" else iter([2.0, 3.0])
        return trainer(
            folder, gpt2(), CONFIG, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
            load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=False,
            extra={"compute_metrics": lambda prediction: {"score": next(scores, 9.0)}}, **kwargs,
        )  # fmt: skip

    new(tmp_path / "first", max_steps=4).train()
    shutil.move(tmp_path / "first", tmp_path / "second")
    run = new(tmp_path / "second", max_steps=6)
    run.train(resume_from_checkpoint=True)
    assert run.state.best_model_checkpoint == str(tmp_path / "second" / "checkpoint-2")


def test_what_is_pushed_is_whole_and_nothing_goes_afterwards(tmp_path, monkeypatch) -> None:
    seen: list[tuple[str, list[str], list[str]]] = []

    class Hub:
        def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, folder_path: str, **kwargs: Any) -> Future:
            seen.append((os.path.relpath(folder_path, tmp_path), os.listdir(folder_path), checkpoints(tmp_path)))
            done: Future = Future()
            done.set_result(None)
            return done

    use_hub(monkeypatch.setattr, Hub())
    run = trainer(
        tmp_path, gpt2(), CONFIG, max_steps=4, save_strategy="steps", save_steps=2, save_total_limit=1,
        push_to_hub=True, hub_strategy="all_checkpoints", hub_always_push=True,
    )  # fmt: skip
    run.train()
    assert [(name, existing) for name, _, existing in seen] == [
        (".", ["checkpoint-2"]), ("checkpoint-2", ["checkpoint-2"]),
        (".", ["checkpoint-4"]), ("checkpoint-4", ["checkpoint-4"]),
    ]  # fmt: skip
    assert sorted(seen[-1][1]) == sorted(os.listdir(tmp_path / "checkpoint-4"))
    assert checkpoints(tmp_path) == ["checkpoint-4"]


# ---- what lies in it ----


@pytest.mark.parametrize("model", [gpt2, llama, lstm])
@pytest.mark.parametrize("average", [{}, {"swa_start": 3}], ids=["plain", "swa"])
def test_a_checkpoint_is_a_stock_model(tmp_path, model: Any, average: dict[str, Any]) -> None:
    config = LatePhaseConfig(num_members=3, weights=["rank1"], late_phase_start=2, **average)
    run = trainer(tmp_path, model(), config, max_steps=6, save_strategy="steps", save_steps=6)
    run.train()
    folder = tmp_path / "checkpoint-6"
    reloaded, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, dtype="auto"
    )
    assert not any(info.values())
    assert_same(weights_of(run.averaged_model()), weights_of(reloaded))
    theirs = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"}  # Trainer's
    ours = {name for name in os.listdir(folder) if not name.endswith((".json", ".safetensors", ".py"))}
    assert ours == theirs


def test_no_tensor_is_written_twice(tmp_path) -> None:
    """Nor are tied ones; and what the stock file holds to the bit is left to it."""
    config = LatePhaseConfig(num_members=3, weights=["rank1"], late_phase_start=3)
    run = trainer(tmp_path, gpt2(), config, max_steps=6, save_strategy="steps", save_steps=1)
    run.train()
    names = {}
    for step in (2, 6):
        with safe_open(tmp_path / f"checkpoint-{step}" / TENSORS_NAME, framework="pt") as file:
            names[step] = [name for name in file.keys() if name.startswith("model.")]  # noqa: SIM118
    # Member 0 is trained before T0 too, so that the base below its factors is never what the stock file holds.
    assert all("parametrizations" in name for name in names[2] + names[6])
    assert not any("lm_head" in name or "wte" in name for name in names[2] + names[6])


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("average", [{}, {"swa_start": 3}], ids=["plain", "swa"])
@pytest.mark.parametrize("model", [gpt2, llama, mixtral])
def test_resume_from_shards_and_other_keys(tmp_path, monkeypatch, model: Any, average: dict, shards: bool) -> None:
    """mixtral's experts are fused in memory and apart on the disk."""
    if shards:
        parent = PreTrainedModel.save_pretrained
        monkeypatch.setattr(
            PreTrainedModel,
            "save_pretrained",
            lambda self, *a, **k: parent(self, *a, **{"max_shard_size": "8KB", **k}),
        )
    config = LatePhaseConfig(num_members=3, weights=["rank1", "norm"], late_phase_start=2, **average)
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    torch.manual_seed(0)
    whole = trainer(tmp_path, model(), config, **settings)
    whole.train()
    folder = tmp_path / "checkpoint-4"
    assert (len(list(folder.glob("model*.safetensors"))) > 1) == shards
    resumed = trainer(tmp_path / "resumed", model(), config, **settings)
    resumed.train(resume_from_checkpoint=str(folder))
    assert_same(weights_of(whole.model), weights_of(resumed.model))
    AutoModelForCausalLM.from_pretrained(folder)


def test_best_of_models_only_whose_keys_differ(tmp_path) -> None:
    scores = iter([1.0, 2.0])
    run = trainer(
        tmp_path, mixtral(), CONFIG, max_steps=6, eval_strategy="steps", eval_steps=3, save_strategy="steps",
        save_steps=3, load_best_model_at_end=True, save_only_model=True, metric_for_best_model="score",
        greater_is_better=False, extra={"compute_metrics": lambda prediction: {"score": next(scores)}},
    )  # fmt: skip
    run.train()
    best = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    assert_same(weights_of(best), run.late_phase.averaged_state_dict())


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(("steps", "most"), [(20, 1.4), (14, 1.75)], ids=["between cycles", "inside one"])
def test_size_beside_plain_trainers(tmp_path, steps: int, most: float) -> None:
    """Beyond Trainer's: the base below the factors; inside a cycle also the held gradients."""
    sizes = []
    for name, config in (
        ("plain", None),
        ("late", LatePhaseConfig(num_members=10, weights=["rank1"], late_phase_start=0)),
    ):
        model = gpt2(n_inner=512)
        model = type(model)(type(model.config)(**{**model.config.to_dict(), "n_embd": 128, "vocab_size": 512}))
        run = trainer(tmp_path / name, model, config, rows=16, max_steps=20, save_strategy="steps", save_steps=steps)
        run.train()
        sizes.append(size(tmp_path / name / f"checkpoint-{steps}"))
    print(f"{sizes[1] / sizes[0]:.3f}")
    assert sizes[1] / sizes[0] < most
