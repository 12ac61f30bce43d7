"""BatchNorm as late-phase weights: members' statistics, the fold, measured statistics, trainers and processes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from transformers import TrainerCallback

from hf_latephase import LatePhase, LatePhaseConfig
from hf_latephase.core.running_statistics import forget_statistics, late_phase_layers, measure_statistics
from test_trainer import assert_same, training_logs, weights_of
from tiny import ConvNet, double, trainer


K = 3
TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class NormAndActivation(nn.BatchNorm2d):
    """A subclass with a forward of its own, as timm's."""

    def forward(self, rows: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        outputs = nn.functional.batch_norm(
            rows, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        return outputs.sin()


LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "1d": (lambda: nn.BatchNorm1d(5), (5,)),
    "1d-length": (lambda: nn.BatchNorm1d(5, momentum=0.3), (5, 4)),
    "2d": (lambda: nn.BatchNorm2d(5, eps=1e-2), (5, 3, 4)),
    "3d": (lambda: nn.BatchNorm3d(5), (5, 2, 3, 2)),
    "sync": (lambda: nn.SyncBatchNorm(5), (5, 3, 4)),
    "cumulative": (lambda: nn.BatchNorm2d(5, momentum=None), (5, 3, 4)),
    "no-statistics": (lambda: nn.BatchNorm2d(5, track_running_stats=False), (5, 3, 4)),
    "subclass": (lambda: NormAndActivation(5), (5, 3, 4)),
    "frozen-scale": (lambda: frozen(nn.BatchNorm2d(5), "weight"), (5, 3, 4)),
    "frozen-shift": (lambda: frozen(nn.BatchNorm2d(5), "bias"), (5, 3, 4)),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def frozen(layer: nn.Module, tensor: str) -> nn.Module:
    getattr(layer, tensor).requires_grad_(False)
    return layer


def batch(name: str, rows: int = 4, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(rows, *LAYERS[name][1], generator=generator, dtype=torch.float64) + 1


def model_of(name: str) -> nn.Sequential:
    return nn.Sequential(LAYERS[name][0]()).double()


def config(**kwargs: Any) -> LatePhaseConfig:
    return LatePhaseConfig(**{"num_members": K, "weights": ["norm"], "late_phase_start": 0, **kwargs})


def released(model: nn.Module, **kwargs: Any) -> LatePhase:
    """Members that differ in all that they have."""
    late_phase = LatePhase(model, config(**kwargs))
    late_phase.release()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for stack in [*late_phase.stacks().values(), *late_phase.statistics().values()]:
            if stack.is_floating_point():
                stack.mul_(torch.rand(stack.shape, generator=generator, dtype=torch.float64) + 0.5)
                stack.add_(torch.rand(stack.shape, generator=generator, dtype=torch.float64))
    return late_phase


def member_layer(late_phase: LatePhase, plain: nn.Module, k: int) -> nn.Module:
    """Member k as a plain model."""
    layer = copy.deepcopy(plain)
    own = late_phase.model.state_dict()
    values = {f"0.{t}": own[f"0.parametrizations.{t}.original"][k] for t in TENSORS if f"0.{t}" in plain.state_dict()}
    layer.load_state_dict(values)
    return layer


# ---- one member ----


@every_layer
@pytest.mark.parametrize("training", [True, False])
def test_a_member_is_the_plain_layer_with_its_tensors(name: str, training: bool) -> None:
    plain = model_of(name)
    late_phase = released(copy.deepcopy(plain))
    members = [member_layer(late_phase, plain, k).train(training) for k in range(K)]
    late_phase.model.train(training)
    for k in (1, 0, 1):
        late_phase.model.zero_grad()
        members[k].zero_grad()
        late_phase.activate(k)
        rows, expected_rows = batch(name).requires_grad_(), batch(name).requires_grad_()
        outputs, expected = late_phase.model(rows), members[k](expected_rows)
        torch.testing.assert_close(outputs, expected, rtol=0, atol=0)
        outputs.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(rows.grad, expected_rows.grad, rtol=0, atol=0)
        for key, p in members[k].named_parameters():
            if p.requires_grad:
                grad = late_phase.stacks()[key.replace("0.", "0.parametrizations.") + ".original"].grad
                torch.testing.assert_close(grad[k], p.grad, rtol=0, atol=0)
                assert not grad[[i for i in range(K) if i != k]].any()
    for k in range(K):  # each has its own statistics, and only those that ran have new ones
        assert_same(member_layer(late_phase, plain, k).state_dict(), members[k].state_dict())


@every_layer
@pytest.mark.parametrize("training", [True, False])
def test_rows_dealt_out_are_members_on_their_own_rows(name: str, training: bool) -> None:
    plain = model_of(name)
    late_phase = released(copy.deepcopy(plain), member_assignment="sample")
    members = [member_layer(late_phase, plain, k).train(training) for k in range(K)]
    late_phase.model.train(training)
    for seed in range(2):
        rows, expected_rows = batch(name, 2 * K, seed).requires_grad_(), batch(name, 2 * K, seed).requires_grad_()
        late_phase.activate_by_sample()
        outputs = late_phase.model(rows)
        expected = torch.cat([m(r) for m, r in zip(members, expected_rows.chunk(K), strict=True)])
        torch.testing.assert_close(outputs, expected)
        late_phase.model.zero_grad()
        outputs.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(rows.grad, expected_rows.grad)
        for p in (p for m in members for p in m.parameters()):
            assert (p.grad is not None) == p.requires_grad
        for key, stack in late_phase.stacks().items():
            if stack.requires_grad:
                own = [dict(m.named_parameters())[late_phase.plain_name(key)] for m in members]
                torch.testing.assert_close(stack.grad, torch.stack([p.grad for p in own]))
                for p in own:
                    p.grad = None
        for k in range(K):
            torch.testing.assert_close(member_layer(late_phase, plain, k).state_dict(), members[k].state_dict())


# ---- the average ----


@every_layer
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_fold_is_the_mean_of_the_members_outputs(name: str, dtype: torch.dtype) -> None:
    if name == "subclass":
        pytest.skip("the layer goes on after its affine map")
    plain = model_of(name)
    late_phase = released(copy.deepcopy(plain))
    late_phase.model.eval().to(dtype)
    rows = batch(name).to(dtype)
    outputs = []
    for k in range(K):
        late_phase.activate(k)
        outputs.append(late_phase.model(rows))
    expected, tolerance = torch.stack(outputs).mean(0), 1e-12 if dtype == torch.float64 else 1e-6
    late_phase.activate(None)
    stock = plain.eval().to(dtype)
    stock.load_state_dict(late_phase.averaged_state_dict())
    scale = expected.abs().max()
    for model in (late_phase.model, stock, late_phase.averaged_model(), late_phase.detach()):
        assert ((model(rows) - expected).abs().max() / scale).item() < tolerance
    assert type(late_phase.model[0]) is type(plain[0])


@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_members_fold_to_the_bit(name: str, dtype: torch.dtype) -> None:
    plain = model_of(name).to(dtype)
    plain(batch(name).to(dtype))
    with torch.no_grad():
        plain[0].weight.mul_(0.7)
    before, parameters = weights_of(plain), dict(plain.named_parameters())
    late_phase = LatePhase(plain, config())
    assert_same(late_phase.averaged_state_dict(), before)
    late_phase.release()
    assert_same(late_phase.averaged_state_dict(), before)
    assert_same(weights_of(late_phase.detach()), before)
    assert all(plain.get_parameter(key) is p for key, p in parameters.items())
    assert list(plain[0]._buffers) == list(LAYERS[name][0]()._buffers)


def test_rejoining_keeps_the_fold() -> None:
    late_phase = released(model_of("2d"))
    before = {k: v.clone() for k, v in late_phase.averaged_state_dict().items()}
    late_phase.rejoin()
    torch.testing.assert_close(late_phase.averaged_state_dict(), before)
    assert all(torch.equal(s[0], s[1]) for s in late_phase.statistics().values())


def test_evaluating_the_average_changes_nothing() -> None:
    late_phase = released(model_of("2d"))
    before = weights_of(late_phase.model)
    late_phase.activate(None)
    late_phase.model(batch("2d"))  # even in training mode
    assert_same(weights_of(late_phase.model), before)


def test_a_layer_without_scale_keeps_its_statistics_shared() -> None:
    model = nn.Sequential(nn.BatchNorm1d(5, affine=False), nn.BatchNorm1d(5))
    late_phase = LatePhase(model, config())
    assert {target.module for target in late_phase.targets} == {"1"}


# ---- measured statistics ----


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.0), nn.BatchNorm1d(6)).double()


def minibatches(count: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [{"rows": torch.randn(8, 5, generator=generator, dtype=torch.float64)} for _ in range(count)]


def test_measuring_the_average_is_update_bn_on_the_averaged_model() -> None:
    late_phase = released(network())
    before = weights_of(late_phase.model)
    gamma = before["1.parametrizations.weight.original"].mean(0)
    stock = late_phase.averaged_model()
    with torch.no_grad():  # with measured statistics, the average is that of scale and shift
        for layer in (1, 4):
            stock[layer].weight.copy_(before[f"{layer}.parametrizations.weight.original"].mean(0))
            stock[layer].bias.copy_(before[f"{layer}.parametrizations.bias.original"].mean(0))
    update_bn([m["rows"] for m in minibatches()], stock)
    late_phase.model.eval()
    late_phase.activate(1)
    measure_statistics(late_phase, minibatches, lambda m: late_phase.model(m["rows"]))
    averaged = late_phase.averaged_state_dict()
    torch.testing.assert_close(averaged, stock.state_dict())
    torch.testing.assert_close(averaged["1.weight"], gamma)
    assert late_phase.members.mode == "member" and int(late_phase.members.index) == 1
    rows = minibatches()[0]["rows"]
    with late_phase.averaged():
        torch.testing.assert_close(late_phase.model(rows), stock.eval()(rows))
    assert not any(module.training for module in late_phase.model.modules())
    assert all(layer.momentum == 0.1 for layer in late_phase_layers(late_phase))
    assert_same(weights_of(late_phase.model), before)  # training goes on with the running ones
    forget_statistics(late_phase)
    assert not torch.equal(late_phase.averaged_state_dict()["1.running_mean"], averaged["1.running_mean"])


def test_measuring_each_member() -> None:
    late_phase = released(network())
    before = weights_of(late_phase.model)
    expected = []
    for k in range(K):
        member = network()
        own = {
            key: before[f"{key[0]}.parametrizations.{key[2:]}.original"][k]
            for key in member.state_dict()
            if "0." not in key
        }
        member.load_state_dict(own | {key: before[key] for key in ("0.weight", "0.bias")})
        update_bn([m["rows"] for m in minibatches()], member)
        expected.append(member)
    measure_statistics(late_phase, minibatches, lambda m: late_phase.model(m["rows"]), of_members=True)
    late_phase.model.eval()
    rows = minibatches()[0]["rows"]
    for k in range(K):
        late_phase.activate(k)
        torch.testing.assert_close(late_phase.model(rows), expected[k].eval()(rows))
    mean, own = late_phase.averaged_state_dict()["1.running_mean"], [m[1].running_mean for m in expected]
    torch.testing.assert_close(mean, torch.stack(own).mean(0))
    assert_same(weights_of(late_phase.model), before)


def test_measuring_leaves_other_layers_alone() -> None:
    late_phase = released(network(), exclude_modules=["4"])
    before = weights_of(late_phase.model)
    measure_statistics(late_phase, minibatches, lambda m: late_phase.model(m["rows"]))
    assert_same(weights_of(late_phase.model), before)
    assert late_phase.model.training and late_phase.model[4].training


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_a_failure_while_measuring_leaves_everything_as_it_was(failure: type) -> None:
    late_phase = released(network())
    before, averaged = weights_of(late_phase.model), late_phase.averaged_state_dict()
    calls = []

    def forward(minibatch: dict[str, Tensor]) -> None:
        late_phase.model(minibatch["rows"])
        calls.append(1)
        if len(calls) == 3:
            raise failure

    with pytest.raises(failure):
        measure_statistics(late_phase, minibatches, forward)
    assert_same(weights_of(late_phase.model), before)
    assert_same(late_phase.averaged_state_dict(), averaged)
    assert all(layer.momentum == 0.1 for layer in late_phase_layers(late_phase))


def test_measuring_without_minibatches_or_layers_is_refused() -> None:
    late_phase = released(network())
    with pytest.raises(ValueError, match="no minibatches"):
        measure_statistics(late_phase, list, lambda m: None)
    with pytest.raises(ValueError, match="No BatchNorm layer"):
        measure_statistics(LatePhase(torch.nn.Linear(2, 2), config(weights=["head"])), minibatches, lambda m: None)


# ---- trainers ----


@pytest.mark.parametrize("num_members", [1, 3])
def test_until_T0_it_is_trainer_to_the_bit(tmp_path, num_members: int) -> None:
    runs = []
    for own in (
        None,
        config(num_members=num_members, weights=["norm"], late_phase_start=0 if num_members == 1 else 9),
    ):
        torch.manual_seed(0)
        run = trainer(tmp_path, ConvNet(), own, logging_steps=1, eval_strategy="steps", eval_steps=4, max_steps=10)
        if own is not None and num_members > 1:
            run.add_callback(Stop())
        elif own is None:
            run.add_callback(Stop()) if num_members > 1 else None
        run.train()
        runs.append(run)
    plain, late = runs
    assert_same(weights_of(plain.model), late.late_phase.averaged_state_dict())
    assert training_logs(plain) == training_logs(late)


class Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 9


@pytest.mark.parametrize("settings", [
    {},
    {"swa_start": 6, "swa_every": 2},
    {"ema_decay": 0.9},
    {"swa_start": 6, "batch_norm_statistics": "recomputed"},
    {"swa_start": 6, "batch_norm_statistics": "recomputed_members"},
    {"member_weight_decay": 0.3},
], ids=["plain", "swa", "ema", "swa-recomputed", "swa-recomputed-members", "decay"])  # fmt: skip
@pytest.mark.parametrize("stop", [5, 8])
def test_resuming_is_never_having_stopped(tmp_path, settings: dict[str, Any], stop: int) -> None:
    own = config(late_phase_start=4, weights=["norm", "head"], **settings)
    logs, weights = [], []
    for resume in (False, True):
        torch.manual_seed(0)
        run = trainer(
            tmp_path, ConvNet(), own, save_strategy="steps", save_steps=1, logging_steps=1, max_steps=14,
            eval_strategy="steps", eval_steps=3, train_sampling_strategy="random",
        )  # fmt: skip
        run.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}") if resume else None)
        logs.append([log for log in training_logs(run) if "train_loss" not in log])
        weights.append(weights_of(run.model) | weights_of(run.averaged_model()))
    assert_same(*weights)
    assert logs[0] == logs[1]


def test_what_is_evaluated_is_what_is_saved(tmp_path) -> None:
    from safetensors.torch import load_file

    run = trainer(tmp_path, ConvNet(), config(late_phase_start=2, swa_start=4, batch_norm_statistics="recomputed"))
    run.train()
    loss = run.evaluate()["eval_loss"]
    run.save_model(str(tmp_path / "out"))
    stock = ConvNet()
    stock.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    plain = trainer(tmp_path, stock, None)
    assert plain.evaluate()["eval_loss"] == pytest.approx(loss, abs=1e-6)


def test_measuring_in_evaluations_leaves_training_alone(tmp_path) -> None:
    weights = []
    for steps in (2, 100):
        torch.manual_seed(0)
        run = trainer(
            tmp_path, ConvNet(), config(batch_norm_statistics="recomputed"), eval_strategy="steps", eval_steps=steps,
            train_sampling_strategy="random",
        )  # fmt: skip
        run.train()
        weights.append(weights_of(run.model))
    assert_same(*weights)


def test_members_weight_decay(tmp_path) -> None:
    """From T0 on it is that of all late-phase weights, and of no others; so too when training begins anew."""
    model = double(ConvNet())
    run = trainer(
        tmp_path, model, config(late_phase_start=2, member_weight_decay=0.25, weights=["norm"]), weight_decay=0.125,
        optimizer=(torch.optim.SGD, {"lr": 0.05}),
    )  # fmt: skip
    seen = []

    class Watch(Stop):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            names = {id(p): n for n, p in model.named_parameters()}
            seen.append({names[id(p)]: g["weight_decay"] for g in run.optimizer.param_groups for p in g["params"]})

    run.add_callback(Watch())
    run.train()
    run.train()
    steps = run.state.max_steps
    assert len(seen) == 2 * steps > 4
    for step, decays in ((index % steps, decays) for index, decays in enumerate(seen)):
        assert len(decays) == len(list(model.parameters()))
        for name, decay in decays.items():
            plain = 0.125 if name.endswith(("first.weight", "second.weight", "head.weight", "embed.weight")) else 0.0
            late = run.late_phase.is_late_phase(name) and step >= 2
            assert decay == (0.25 if late else plain), (step, name)


def test_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="batch_norm_statistics must be one of"):
        config(batch_norm_statistics="exact")
    with pytest.raises(ValueError, match="no 'norm'. Add it"):
        config(weights=["head"], batch_norm_statistics="recomputed")
    with pytest.raises(ValueError, match="member_weight_decay must be finite"):
        config(member_weight_decay=-1.0)
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    before = weights_of(model)
    with pytest.raises(ValueError, match="no BatchNorm layer that tracks statistics.*Keep 'running'"):
        LatePhase(model, config(batch_norm_statistics="recomputed"))
    assert_same(weights_of(model), before)
    with pytest.raises(ValueError, match="one row, too few for the batch statistics.*larger batch"):
        trainer(
            tmp_path, ConvNet(), config(member_assignment="sample"), per_device_train_batch_size=K, rows=8 * K,
        )  # fmt: skip


@pytest.mark.slow
def test_compiles_to_one_graph_for_all_members() -> None:
    from torch._dynamo.testing import CompileCounter

    late_phase = released(network())
    counter = CompileCounter()
    compiled = torch.compile(late_phase.model, backend=counter, fullgraph=True)
    twin = copy.deepcopy(late_phase)
    for k in (0, 1, 2, 0):
        for one, model in ((late_phase, compiled), (twin, twin.model)):
            one.activate(k)
            one.model.zero_grad()
            model(minibatches()[k]["rows"]).square().sum().backward()
        assert_same(weights_of(late_phase.model), weights_of(twin.model))
    assert counter.frame_count == 1
