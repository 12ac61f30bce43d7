"""The user's own optimizer: groups made on the stock model, members in their places, all of it given back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from hf_latephase import LatePhase, LatePhaseConfig
from hf_latephase.core.member_groups import MemberGroups
from test_trainer import assert_same, weights_of
from tiny import gpt2, trainer


def groups_of(model: nn.Module, optimizer: Any) -> list[tuple[list[str], float, float]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return [([names[id(p)] for p in g["params"]], g["weight_decay"], g["lr"]) for g in optimizer.param_groups]


def layer_wise(model: Any, **kwargs: Any) -> torch.optim.Optimizer:
    """Two blocks with rates of their own, matrices that decay, the rest."""
    blocks: list[dict[str, Any]] = [
        {"params": [p for p in block.parameters() if p.ndim > 1], "lr": 0.01 * (i + 1), "weight_decay": 0.1}
        for i, block in enumerate(model.transformer.h)
    ]
    held = {id(p) for group in blocks for p in group["params"]}
    rest = [p for p in model.parameters() if id(p) not in held]
    return torch.optim.AdamW([*blocks, {"params": rest, "weight_decay": 0.0}], lr=0.05, **kwargs)


class Groups(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **kwargs: Any) -> None:
        self.seen = groups_of(model, optimizer.optimizer)


@pytest.mark.parametrize("weights", [["norm"], ["rank1"], ["rank1", "norm"], ["hypernet"]], ids="+".join)
def test_layer_wise_rates(tmp_path: Path, weights: list[str]) -> None:
    torch.manual_seed(0)
    model = gpt2()
    optimizer = layer_wise(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda s: 1.0, lambda s: 0.5**s, lambda s: 1.0])
    before = groups_of(model, optimizer)
    watch = Groups()
    config = LatePhaseConfig(num_members=2, weights=weights, late_phase_start=1)
    run = trainer(
        tmp_path, model, config, max_steps=5, extra={"optimizers": (optimizer, schedule), "callbacks": [watch]}
    )  # fmt: skip
    values = weights_of(model)
    run.train()
    assert all(not torch.equal(values[key], value) for key, value in weights_of(model).items() if "ln_" in key)
    # Stacks in their weights' places; factors with their weights' rates, without decay.
    for (names, decay, _), (inside, inside_decay, _) in zip(before, watch.seen, strict=False):
        assert decay == inside_decay
        if "hypernet" not in weights:
            assert names == [run.late_phase.plain_name(n) for n in inside][: len(names)]
    added = watch.seen[3:]
    assert all(decay == 0 for _, decay, _ in added)
    if "norm" not in weights:
        assert [rate for _, _, rate in added][:2] == [watch.seen[0][2], watch.seen[1][2]]
        assert all(".0." in name for names, _, _ in added for name in names)
    # What the user has is as it was, at the rates that the schedule has come to.
    after = groups_of(model, optimizer)
    assert [(names, decay) for names, decay, _ in after] == [(names, decay) for names, decay, _ in before]
    assert [rate for _, _, rate in after] == pytest.approx([0.01, 0.02 * 0.5**5, 0.05])
    assert len(schedule.base_lrs) == len(schedule.lr_lambdas) == 3
    assert {id(p) for p in optimizer.state} <= {id(p) for p in model.parameters()}
    assert all(t.shape == p.shape for p, s in optimizer.state.items() for n, t in s.items() if n != "step")
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run.train()


def test_one_member_is_trainer_with_that_optimizer_to_the_bit(tmp_path: Path) -> None:
    models = []
    for config in (None, LatePhaseConfig(num_members=1, weights=["norm"], ema_decay=0.5, late_phase_start=0)):
        torch.manual_seed(0)
        model = gpt2()
        optimizer = layer_wise(model)
        run = trainer(tmp_path, model, config, max_steps=5, extra={"optimizers": (optimizer, None)})
        run.train()
        run.train()  # with the moments that are there
        models.append(model if config is None else run.averaged_model(time_averaged=False))
    # The second training starts from the average.
    assert not torch.equal(models[0].transformer.wte.weight, models[1].transformer.wte.weight)
    models.clear()
    for config in (None, LatePhaseConfig(num_members=1, weights=["norm"], late_phase_start=0)):
        torch.manual_seed(0)
        model = gpt2()
        optimizer = layer_wise(model)
        run = trainer(tmp_path, model, config, max_steps=5, extra={"optimizers": (optimizer, None)})
        run.train()
        run.train()
        models.append(model)
    assert_same(weights_of(models[0]), weights_of(models[1]))


@pytest.mark.parametrize("weights", [["norm"], ["rank1"], ["head"]], ids="+".join)
def test_state_is_carried_to_the_members_and_back(weights: list[str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.1, weight_decay=0.2)
    model(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    state = {name: {k: v.clone() for k, v in optimizer.state[p].items()} for name, p in model.named_parameters()}
    names = list(optimizer.param_groups[0]["param_names"])
    late_phase = LatePhase(model, LatePhaseConfig(num_members=3, weights=weights))
    groups = MemberGroups(optimizer, None, late_phase)
    for stack in late_phase.stacks().values():
        assert any(stack is p for group in optimizer.param_groups for p in group["params"])
        for name, value in optimizer.state.get(stack, {}).items():
            assert name == "step" or (value.shape == stack.shape and torch.equal(value[0], value[2]))
    assert all(len(group["params"]) == len(group["param_names"]) for group in optimizer.param_groups)
    optimizer.zero_grad()
    late_phase.release()
    for k in range(3):
        late_phase.activate(k)
        model(torch.randn(5, 4)).square().sum().backward()
    # Without a step the state comes back to rounding.
    groups.leave()
    late_phase.detach()
    assert len(optimizer.param_groups) == 1 and optimizer.param_groups[0]["param_names"] == names
    assert optimizer.param_groups[0]["weight_decay"] == 0.2
    for name, parameter in model.named_parameters():
        for key, value in state[name].items():
            torch.testing.assert_close(optimizer.state[parameter][key], value, rtol=1e-6, atol=0)


class Mixing(torch.optim.SGD):
    """SGD, but for groups marked `mixes`, which step by the norm of the whole tensor, as Muon's matrices do."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad / (p.grad.norm() if group["mixes"] else 1), alpha=group["lr"])


def test_an_optimizer_is_judged_group_by_group(tmp_path: Path) -> None:
    def mixing(model: Any, mixes_vectors: bool) -> torch.optim.Optimizer:
        groups = [
            {"params": [], "mixes": False},  # as sentence-transformers' first group
            {"params": [p for p in model.parameters() if p.ndim > 1], "mixes": True},
            {"params": [p for p in model.parameters() if p.ndim == 1], "mixes": mixes_vectors},
        ]
        optimizer = Mixing.__new__(Mixing)
        torch.optim.Optimizer.__init__(optimizer, groups[1:], {"lr": 0.1, "mixes": False})
        optimizer.param_groups.insert(0, {**optimizer.param_groups[1], **groups[0]})
        return optimizer

    config = LatePhaseConfig(num_members=2, weights=["norm"], late_phase_start=0)
    model = gpt2()
    run = trainer(tmp_path, model, config, max_steps=4, extra={"optimizers": (mixing(model, False), None)})
    run.train()
    assert run.late_phase.distance_from_mean() > 0
    model = gpt2()
    before = weights_of(model)
    optimizer = mixing(model, True)
    run = trainer(tmp_path, model, config, max_steps=4, extra={"optimizers": (optimizer, None)})
    with pytest.raises(ValueError, match="Mixing cannot train late-phase weights: it mixes"):
        run.train()
    assert_same(weights_of(model), before)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}


def test_an_optimizer_without_the_members_is_refused(tmp_path: Path) -> None:
    config = LatePhaseConfig(num_members=2, weights=["norm"], late_phase_start=0)
    model = gpt2()
    before = weights_of(model)
    other = torch.optim.SGD(gpt2().parameters(), lr=0.1)
    run = trainer(tmp_path, model, config, max_steps=4, extra={"optimizers": (other, None)})
    with pytest.raises(ValueError, match="does not hold 'transformer.h.0.ln_1.weight'.*never be trained"):
        run.train()
    assert_same(weights_of(model), before)

    from hf_latephase import LatePhaseTrainer

    class Older(LatePhaseTrainer):
        def create_optimizer(self, model: Any = None) -> Any:
            self.optimizer = other
            return other

    run = trainer(tmp_path, model, config, max_steps=4, trainer_class=Older)
    with pytest.raises(ValueError, match="does not hold 'transformer.h.0.ln_1.weight'.*never be trained"):
        run.train()
    assert_same(weights_of(model), before)


def test_parameters_built_earlier_are_the_members(tmp_path: Path) -> None:
    model = gpt2()
    groups = [{"params": [p for n, p in model.named_parameters() if "ln_" in n], "lr": 0.2}]
    groups.append({"params": [p for n, p in model.named_parameters() if "ln_" not in n], "lr": 0.01})
    config = LatePhaseConfig(num_members=2, weights=["norm"], late_phase_start=0)
    run = trainer(tmp_path, model, config, max_steps=4, optimizer=(torch.optim.SGD, {"params": groups, "lr": 0.1}))
    run.train()
    assert run.late_phase.distance_from_mean() > 0


def test_resumed_to_the_bit(tmp_path: Path) -> None:
    config = LatePhaseConfig(num_members=3, weights=["rank1", "norm"], late_phase_start=2)
    runs = []
    for folder, checkpoint in (("a", None), ("b", str(tmp_path / "a" / "checkpoint-4"))):
        torch.manual_seed(0)
        model = gpt2()
        run = trainer(
            tmp_path / folder, model, config, max_steps=8, save_strategy="steps", save_steps=4,
            extra={"optimizers": (layer_wise(model), None)},
        )  # fmt: skip
        run.train(resume_from_checkpoint=checkpoint)
        runs.append(run)
    assert_same(weights_of(runs[0].model), weights_of(runs[1].model))
    for name, stack in runs[0].late_phase.stacks().items():
        assert torch.equal(stack, runs[1].late_phase.stacks()[name]), name


def test_one_member_is_the_control_of_its_members(tmp_path: Path) -> None:
    """What more members would copy learns from its own minibatches' mean, without γ and with the members' decay."""
    seen: dict[str, torch.Tensor] = {}
    decays: dict[str, float] = {}

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, model: Any, optimizer: Any, **kwargs: Any) -> None:
            names = {id(p): name for name, p in model.named_parameters()}
            seen.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
            for group in optimizer.param_groups:
                decays.update({names[id(p)]: group["weight_decay"] for p in group["params"]})

    gradients = []
    for gamma in (1.0, 3.0):
        torch.manual_seed(0)
        config = LatePhaseConfig(
            num_members=1, weights=["norm"], cycle_length=3, late_phase_start=0, base_gradient_scale=gamma,
            member_weight_decay=0.25,
        )  # fmt: skip
        run = trainer(
            tmp_path, gpt2(), config, max_steps=1, gradient_accumulation_steps=3, weight_decay=0.1,
            extra={"callbacks": [Watch()]},
        )  # fmt: skip
        run.train()
        assert run.late_phase.targets == []
        gradients.append(dict(seen))
    for name, value in gradients[0].items():
        factor = 1.0 if "ln_" in name else 3.0
        torch.testing.assert_close(gradients[1][name], factor * value, rtol=1e-6, atol=0, msg=name)
        assert decays[name] == (0.25 if "ln_" in name else 0.0 if "bias" in name else 0.1)


def test_one_member_is_a_control_whatever_else_its_config_says(tmp_path: Path) -> None:
    """An average that begins before T0, and patterns for layers that only more members would copy."""
    for values, late in (
        ({"weights": ["norm"], "swa_start": 0.3}, {"ln_1", "ln_2", "ln_f"}),
        ({"weights": ["norm"], "target_modules": ["ln_f"]}, {"ln_f"}),
        ({"weights": ["rank1", "norm"], "target_modules": ["c_attn", "ln_f"]}, {"ln_f", "left", "right"}),
        ({"weights": ["head"]}, set()),  # tied, so that more members would be refused
        ({"weights": [], "swa_start": 0.0}, set()),
    ):
        run = trainer(tmp_path, gpt2(), LatePhaseConfig(num_members=1, **values), max_steps=4)
        names: set[str] = set()

        class Watch(TrainerCallback):
            def on_step_end(self, *args: Any, run: Any = run, names: set[str] = names, **kwargs: Any) -> None:
                names |= {n.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
                          for n in run.late_phase.late_parameters()}  # fmt: skip

        run.add_callback(Watch())
        run.train()
        assert names == late, values
