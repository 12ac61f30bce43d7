"""The model belongs to the user: stock before train() and after it, and never a wrong file in between."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.optim.swa_utils import AveragedModel
from transformers import GPT2LMHeadModel, GPT2Model, Trainer, TrainerCallback

from hf_latephase import LatePhase, LatePhaseConfig
from hf_latephase.core.weights.guard import GuardedWeight
from test_trainer import assert_same, weights_of
from tiny import ConvNet, Text, exact_loss, gpt2, trainer


IDS = Text(3, seed=7).ids
# Before transformers 5.0 torch.export and torch.jit.trace fail on a stock GPT-2, too: its mask is made in a vmap.
TRACES = hasattr(transformers, "PreTrainedConfig")
CONFIGS: dict[str, dict[str, Any]] = {
    "norm": {"num_members": 3, "weights": ["norm"], "init_noise": 0.3},
    "rank1": {"num_members": 3, "weights": ["rank1"], "init_noise": 0.3},
    "norm swa": {"num_members": 3, "weights": ["norm"], "init_noise": 0.3, "swa_start": 4},
    "one ema": {"num_members": 1, "ema_decay": 0.7},
    "one swa": {"num_members": 1, "weights": ["rank1"], "swa_start": 1},
    "batch norm": {"num_members": 3, "weights": ["norm"], "init_noise": 0.3},
}
# T0 is step 2 and cycles have three steps: 2 to 4, 5 to 7, 8 to 10.
STAGES: dict[str, int | None] = {"before": None, "before T0": 1, "inside a cycle": 6, "after": None, "exception": None}
every_config = pytest.mark.parametrize("name", CONFIGS)
every_stage = pytest.mark.parametrize("stage", STAGES)


class Interrupted(Exception):
    pass


class At(TrainerCallback):
    """Calls a function with the model at the end of a step."""

    def __init__(self, step: int, call: Callable[[nn.Module], None]) -> None:
        self.step, self.call, self.was_called = step, call, False

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.was_called = True
            self.call(model)


def stock(name: str) -> nn.Module:
    torch.manual_seed(1)
    return ConvNet() if name == "batch norm" else gpt2()


def late_phase_trainer(folder: Path, name: str, model: nn.Module, **kwargs: Any) -> Any:
    config = LatePhaseConfig(**{"late_phase_start": 2, **CONFIGS[name]})
    return trainer(folder, model, config, **{"max_steps": 10, **kwargs})


def at_stage(folder: Path, name: str, stage: str, look: Callable[[Any, nn.Module], None], **kwargs: Any) -> Any:
    """Runs a training and looks at the model at one stage of it."""
    model = stock(name)
    run = late_phase_trainer(folder, name, model, **kwargs)
    if stage == "before":
        look(run, model)
        return run
    step = STAGES[stage]
    if step is not None:
        callback = At(step, lambda current: look(run, current))
        run.add_callback(callback)
        run.train()
        assert callback.was_called
        return run
    if stage == "exception":

        def fail(current: nn.Module) -> None:
            raise Interrupted

        run.add_callback(At(6, fail))
        with pytest.raises(Interrupted):
            run.train()
    else:
        run.train()
    look(run, model)
    return run


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    was_training = model.training
    output = model.eval()(IDS).logits
    model.train(was_training)
    return output


def is_attached(stage: str) -> bool:
    return STAGES[stage] is not None


# ---- looking ----


@every_config
@every_stage
def test_what_is_read_of_the_model(tmp_path: Path, name: str, stage: str) -> None:
    """Values, not only keys: whatever user code reads is the averaged stock model."""

    def look(run: Any, model: Any) -> None:
        expected = run.averaged_model()
        assert type(expected) is type(stock(name)) and list(expected.state_dict()) == list(stock(name).state_dict())
        if stage != "before":
            assert not torch.equal(logits(expected), logits(stock(name)))
        # With an average over time a callback computes with the weights that training has just made, as Trainer's do.
        over_time = is_attached(stage) and ("ema" in name or "swa" in name)
        seen = run.averaged_model(time_averaged=False) if over_time else expected
        torch.testing.assert_close(logits(model), logits(seen), rtol=0, atol=1e-6)
        if hasattr(model, "save_pretrained"):
            check_saving(tmp_path, model, expected)
        if not is_attached(stage):
            check_stock(tmp_path, name, model, expected)

    at_stage(tmp_path, name, stage, look)


def check_saving(folder: Path, model: Any, expected: Any) -> None:
    def same(loaded: Any, part: Any = expected) -> None:
        for key, value in part.state_dict().items():
            torch.testing.assert_close(loaded.state_dict()[key], value, rtol=0, atol=0, msg=key)

    model.save_pretrained(folder / "whole")
    same(GPT2LMHeadModel.from_pretrained(folder / "whole"))
    model.save_pretrained(folder / "shards", max_shard_size="4KB")
    assert len(list((folder / "shards").glob("*.safetensors"))) > 2
    same(GPT2LMHeadModel.from_pretrained(folder / "shards"))
    if any("parametrizations" in key for key in model.state_dict()):  # else it is what the caller wants
        model.save_pretrained(folder / "given", state_dict=model.state_dict())
        same(GPT2LMHeadModel.from_pretrained(folder / "given"))
    copied = copy.deepcopy(model)
    kept = model.transformer.wte.weight.detach().clone()
    model.transformer.wte.weight.data.zero_()  # no longer the copy's
    copied.save_pretrained(folder / "copy")
    model.transformer.wte.weight.data.copy_(kept)
    same(GPT2LMHeadModel.from_pretrained(folder / "copy"))
    model.transformer.save_pretrained(folder / "part")
    same(GPT2Model.from_pretrained(folder / "part"), expected.transformer)


def check_stock(folder: Path, name: str, model: Any, expected: Any) -> None:
    """What only a stock model can."""
    plain = stock(name)
    assert_same(weights_of(model), weights_of(expected))
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())
    assert "save_pretrained" not in vars(model)
    # pickle
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(again), logits(expected))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(logits(torch.load(file, weights_only=False)), logits(expected))
    plain.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits(plain), logits(expected))
    assert torch.equal(logits(copy.deepcopy(model)), logits(expected))
    # others' tools
    assert torch.equal(logits(AveragedModel(model).module), logits(expected))
    saved = folder / "trainer"
    other = trainer(saved, model, None)
    other.save_model(str(saved))
    assert other.evaluate()["eval_loss"] == pytest.approx(trainer(saved, expected, None).evaluate()["eval_loss"])
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in half.parameters())
    if name != "batch norm":
        ours, theirs = (m.eval().generate(IDS[:, :4], max_new_tokens=6, do_sample=False) for m in (model, expected))
        assert torch.equal(ours, theirs)
    if TRACES:
        exported = torch.export.export(copy.deepcopy(model).eval(), (IDS,), strict=False)
        torch.testing.assert_close(exported.module()(IDS).logits, logits(expected), rtol=0, atol=1e-5)


@every_config
@pytest.mark.parametrize("stage", ["after", "exception"])
def test_it_is_what_is_evaluated_and_saved(tmp_path: Path, name: str, stage: str) -> None:
    def look(run: Any, model: Any) -> None:
        loss = run.evaluate()["eval_loss"]
        assert loss == trainer(tmp_path / "stock", copy.deepcopy(model), None).evaluate()["eval_loss"]
        run.save_model(str(tmp_path / "saved"))
        if name != "batch norm":
            loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "saved")
            assert torch.equal(logits(loaded), logits(model))
        assert_same(run.late_phase.averaged_state_dict(), weights_of(model))
        assert_same(weights_of(run.late_phase.averaged_model()), weights_of(model))
        before = weights_of(model)
        table = run.evaluate_members()
        if name != "batch norm":  # of which nobody can tell that it predicts the next token
            assert table["average"]["loss"] == pytest.approx(loss, abs=1e-5)
        assert len(table) == (2 + (3 if CONFIGS[name]["num_members"] == 3 else 1))
        if CONFIGS[name]["num_members"] == 3:
            assert len({row["loss"] for row in table.values()}) == 5
        assert_same(weights_of(model), before)
        run.late_phase.detach()
        run.save_model(str(tmp_path / "again"))

    at_stage(tmp_path, name, stage, look)


@every_config
@pytest.mark.parametrize("stage", ["after", "exception"])
def test_references_stay_good(tmp_path: Path, name: str, stage: str) -> None:
    """Parameters and buffers are the objects that the user holds, in their old order."""
    model = stock(name)
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    order = list(model.state_dict())
    run = late_phase_trainer(tmp_path, name, model)
    if stage == "exception":
        run.add_callback(At(6, lambda current: (_ for _ in ()).throw(Interrupted)))
        with pytest.raises(Interrupted):
            run.train()
    else:
        run.train()
    assert run.model is model and list(model.state_dict()) == order
    for key, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        assert tensor is held[key], key
        assert tensor.shape == dict(stock(name).state_dict())[key].shape if key in order else True
        assert tensor.grad is None or tensor.grad.shape == tensor.shape


def test_construction_changes_nothing(tmp_path: Path) -> None:
    for name in CONFIGS:
        model = stock(name)
        keys, modules = list(model.state_dict()), [type(m) for m in model.modules()]
        run = late_phase_trainer(tmp_path, name, model)
        assert run.late_phase.summary()
        assert list(model.state_dict()) == keys and [type(m) for m in model.modules()] == modules
        assert_same(weights_of(model), weights_of(stock(name)))
    with pytest.raises(ValueError, match="late_phase_start=20 is step 20.*ends at step 10"):
        trainer(tmp_path, model, LatePhaseConfig(num_members=2, weights=["norm"], late_phase_start=20))
    assert_same(weights_of(model), weights_of(stock(name)))


# ---- changing ----


@pytest.mark.parametrize("strict", [True, False])
@every_config
@every_stage
def test_a_plain_state_dict_is_loaded(tmp_path: Path, name: str, stage: str, strict: bool) -> None:
    torch.manual_seed(5)
    given = {key: torch.rand_like(v) if v.is_floating_point() else v for key, v in stock(name).state_dict().items()}
    if name != "batch norm":
        given["lm_head.weight"] = given["transformer.wte.weight"]  # tied
    kept = {key: value.clone() for key, value in given.items()}

    def look(run: Any, model: Any) -> None:
        missing, unexpected = model.load_state_dict(given, strict=strict)
        assert not missing and not unexpected
        raw = run.late_phase.averaged_state_dict()
        assert_same(raw, given)
        assert_same(given, kept)  # the user's own dictionary

    run = at_stage(tmp_path, name, stage, look)
    if stage == "before":
        run.train()


@pytest.mark.parametrize("name", ["norm", "rank1", "one ema", "one swa"])
def test_a_second_trainer_starts_from_the_average(tmp_path: Path, name: str) -> None:
    model = stock(name)
    late_phase_trainer(tmp_path, name, model).train()
    between = copy.deepcopy(model)
    runs = []
    for each in (model, between):
        torch.manual_seed(3)
        run = late_phase_trainer(tmp_path, name, each)
        run.train()
        runs.append(run)
    assert_same(weights_of(model), weights_of(between))
    # So does a second train(), with the optimizer as it is.
    again = runs[0]
    again.train()
    assert again.state.global_step == 10 and not torch.equal(logits(model), logits(between))
    again.evaluate_members()


@every_config
def test_resized_and_frozen_between_trainings(tmp_path: Path, name: str) -> None:
    if name == "batch norm":
        pytest.skip("a model without token embeddings of transformers'")
    for weights in (None, ["head"], ["full"]):
        if weights is not None and CONFIGS[name]["num_members"] == 1:
            continue
        torch.manual_seed(0)
        model = gpt2(tie_word_embeddings=False)
        values = {**CONFIGS[name], **({} if weights is None else {"weights": weights}), "late_phase_start": 2}
        run = trainer(tmp_path, model, LatePhaseConfig(**values))
        model.resize_token_embeddings(56)
        model.gradient_checkpointing_enable()
        run.train()
        assert model.lm_head.weight.shape == (56, 16)
        expected = logits(copy.deepcopy(model))
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        run.evaluate()
        run.save_model(str(tmp_path / "saved"))
        assert torch.equal(logits(model), expected)
        assert torch.equal(logits(GPT2LMHeadModel.from_pretrained(tmp_path / "saved")), expected)
        model.resize_token_embeddings(60)
        run.save_model(str(tmp_path / "larger"))
        assert GPT2LMHeadModel.from_pretrained(tmp_path / "larger").lm_head.weight.shape == (60, 16)


def test_frozen_layers_stay_frozen(tmp_path: Path) -> None:
    model = gpt2()
    frozen = model.transformer.h[0].requires_grad_(False)
    before = weights_of(frozen)
    run = trainer(tmp_path, model, LatePhaseConfig(num_members=2, weights=["rank1", "norm"], late_phase_start=2))
    assert not any(target.module.startswith("transformer.h.0.") for target in run.late_phase.targets)
    assert "left out, as they are frozen: 8 tensors, transformer.h.0." in run.late_phase.summary()
    run.train()
    assert_same(weights_of(frozen), before)
    # Named outright, their factors are trained, which is said.
    config = LatePhaseConfig(num_members=2, target_modules=[r"transformer\.h\.0\.attn\.c_attn"], late_phase_start=2)
    run = trainer(tmp_path, model, config)
    assert "frozen but for what is added" in run.late_phase.summary()
    run.train()
    assert not torch.equal(frozen.attn.c_attn.weight, before["attn.c_attn.weight"])
    assert not frozen.attn.c_attn.weight.requires_grad


def test_writing_into_a_computed_weight_is_refused(tmp_path: Path) -> None:
    """Weight clipping in a callback: the average is no place to write to, the stacks are."""
    seen: list[str] = []

    def clip(model: Any) -> None:
        weight = model.transformer.ln_f.weight
        writes: list[Callable[[], Any]] = [
            lambda: weight.data.clamp_(-1, 1),
            lambda: weight.detach().mul_(2),
            lambda: weight.data.__setitem__(0, 1.0),
            lambda: nn.init.zeros_(weight),
            lambda: model.transformer.h[0].attn.c_attn.weight.data.copy_(torch.zeros(16, 48)),
        ]
        for write in writes:
            with pytest.raises(RuntimeError, match="late_phase.stacks"), torch.no_grad():
                write()
            seen.append("refused")
        # Reading is as ever, and yields plain tensors.
        assert type(weight * 2) is torch.Tensor and isinstance(weight, GuardedWeight)
        assert weight.norm().item() > 0 and weight.shape == (16,)
        for stack in run.late_phase.stacks().values():
            stack.data.clamp_(-0.5, 0.5)
        assert weight_of(model).max() <= 0.5

    def weight_of(model: Any) -> torch.Tensor:
        return model.transformer.ln_f.weight

    run = trainer(
        tmp_path, gpt2(), LatePhaseConfig(num_members=2, weights=["norm", "rank1"], late_phase_start=2),
        extra={"callbacks": [At(4, clip)]},
    )  # fmt: skip
    run.train()
    assert seen == ["refused"] * 5
    # With one member norm layers are the model's own.
    one = trainer(
        tmp_path, gpt2(), LatePhaseConfig(num_members=1, weights=["norm"], ema_decay=0.5),
        extra={"callbacks": [At(10, lambda model: model.transformer.ln_f.weight.data.fill_(3.0))]},
    )  # fmt: skip
    one.train()
    assert (one.averaged_model(time_averaged=False).transformer.ln_f.weight == 3).all()


# ---- one member needs no family ----


class NoNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(48, 8)
        self.loss_function = exact_loss

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        scores = self.embed(input_ids) @ self.embed.weight.T
        return {"loss": self.loss_function(scores, labels, 48), "logits": scores}


@pytest.mark.parametrize("weights", [None, [], ["norm"], ["head"]], ids=str)
@pytest.mark.parametrize("average", [{"ema_decay": 0.5, "ema_start": 1}, {"swa_start": 1}], ids=["ema", "swa"])
def test_averaging_alone_attaches_nothing(tmp_path: Path, weights: Any, average: dict[str, Any]) -> None:
    torch.manual_seed(0)
    plain_model = NoNorms()
    model = copy.deepcopy(plain_model)
    plain = trainer(tmp_path, plain_model, None, max_steps=2)
    plain.train()
    run = trainer(tmp_path, model, LatePhaseConfig(num_members=1, weights=weights, **average), max_steps=2)
    assert run.late_phase.targets == []
    run.train()
    assert_same(weights_of(run.averaged_model(time_averaged=False)), weights_of(plain_model))
    assert run.time_average.num_averaged == 2 and not torch.equal(model.embed.weight, plain_model.embed.weight)


def test_one_member_has_trainers_groups(tmp_path: Path) -> None:
    """Norm vectors stay vectors under their names, whoever makes groups of them."""
    groups: list[list[list[str]]] = []

    class Own(Trainer):
        def create_optimizer(self, model: Any = None) -> Any:
            own = self.model
            matrices = [p for p in own.parameters() if p.dim() >= 2]
            vectors = [p for p in own.parameters() if p.dim() < 2]
            decayed = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
            self.optimizer = torch.optim.AdamW(decayed, lr=0.01)
            return self.optimizer

    from hf_latephase import LatePhaseMixin

    class Late(LatePhaseMixin, Own):
        pass

    class Watch(TrainerCallback):
        def on_train_begin(
            self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **kwargs: Any
        ) -> None:
            names = {id(p): name for name, p in model.named_parameters()}
            groups.append([[names[id(p)] for p in group["params"]] for group in optimizer.param_groups])

    models = []
    for late in (
        None,
        LatePhaseConfig(num_members=1, weights=["norm"], ema_decay=0.5),
        LatePhaseConfig(3, 2, ["norm"]),
    ):
        torch.manual_seed(0)
        model = gpt2()
        run = trainer(
            tmp_path, model, late, trainer_class=Own if late is None else Late, extra={"callbacks": [Watch()]}
        )  # fmt: skip
        run.train()
        models.append(model if late is None else run.averaged_model(time_averaged=False))
    assert groups[0] == groups[1]
    assert_same(weights_of(models[0]), weights_of(models[1]))
    # Of more members, the stacks of vectors are with the vectors: the groups were made on the stock model.
    assert all("ln_" in name or "bias" in name for name in groups[2][1])
    assert [len(group) for group in groups[2]] == [len(group) for group in groups[0]]


# ---- LatePhase without a trainer ----


@pytest.mark.parametrize("weights", [["norm"], ["rank1"], ["hypernet"], ["head"], ["full"]], ids="+".join)
def test_a_context_leaves_the_stock_model(weights: list[str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4))
    parameters = dict(model.named_parameters())
    late_phase = LatePhase(model, LatePhaseConfig(num_members=3, weights=weights, init_noise=0.2), attach=False)
    assert dict(model.named_parameters()) == parameters
    for _ in range(3):
        with late_phase as same:
            assert same is late_phase and dict(model.named_parameters()).keys() != parameters.keys()
            late_phase.release(torch.Generator().manual_seed(0))
            averaged = {key: value.clone() for key, value in late_phase.averaged_state_dict().items()}
            stacks = {name: stack.detach().clone() for name, stack in late_phase.stacks().items()}
        assert {name: id(p) for name, p in model.named_parameters()} == {n: id(p) for n, p in parameters.items()}
        assert_same(weights_of(model), averaged)
        assert_same(dict(late_phase.stacks()), stacks)
        # A look at the members changes nothing.
        before, rows = weights_of(model), torch.randn(2, 4)
        with late_phase.attached(), torch.no_grad():
            outputs = []
            for member in range(3):
                late_phase.activate(member)
                outputs.append(model(rows))
            assert not torch.equal(outputs[0], outputs[1])
            late_phase.activate(None)
            average = model(rows)
        torch.testing.assert_close(average, model(rows).detach(), rtol=0, atol=1e-6)
        assert_same(weights_of(model), before)
        with pytest.raises(RuntimeError, match="not in the model"):
            late_phase.activate(0)
        with pytest.raises(RuntimeError, match="attach"):
            late_phase.release()
