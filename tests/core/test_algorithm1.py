"""LatePhaseTrainer against the plain loop of reference.py, step by step in float64."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import BatchNorm1d
from transformers import TrainerCallback

from hf_latephase import LatePhaseConfig
from reference import Algorithm1
from tiny import MODELS, double, trainer


SGD = (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True})
ADAMW = (torch.optim.AdamW, {"lr": 1e-3, "betas": (0.9, 0.95)})
WEIGHT_DECAY = 0.01


def is_norm(key: str) -> bool:
    return "ln_" in key or "norm" in key


def is_rank1(key: str, weight: Tensor) -> bool:
    return weight.ndim > 1 and not any(part in key for part in ("wte", "wpe", "embed", "lm_head"))


def decays(key: str) -> bool:
    # What Trainer does: no decay for norms and biases.
    return not (is_norm(key) or "bias" in key)


def reference_for(model: Any, weights: list[str], K: int, optimizer: tuple[type, dict], **kwargs: Any) -> Algorithm1:
    keys = dict(model.named_parameters())
    rank1 = [k for k, w in keys.items() if "rank1" in weights and is_rank1(k, w)]
    replicated = [k for k in keys if ("norm" in weights and is_norm(k)) or ("head" in weights and "lm_head" in k)]
    if "full" in weights:
        replicated = list(keys)
    by_shape: dict[Any, list[str]] = {}
    for key, weight in keys.items():
        if "hypernet" in weights and is_rank1(key, weight):
            by_shape.setdefault(weight.shape, []).append(key)
    kwargs["hypernet"] = [group for group in by_shape.values() if len(group) > 1]
    kwargs["batch_norms"] = [
        n for n, m in model.named_modules() if isinstance(m, BatchNorm1d) and f"{n}.weight" in replicated
    ]

    def U(parameters: list[tuple[Tensor, bool]]) -> torch.optim.Optimizer:
        groups = [{"params": [p], "weight_decay": WEIGHT_DECAY if decay else 0.0} for p, decay in parameters]
        return optimizer[0](groups or [torch.zeros(1)], **optimizer[1])

    return Algorithm1(copy.deepcopy(model), rank1, replicated, K, U, decays=decays, **kwargs)


class Recorder(TrainerCallback):
    """Keeps the averaged weights after each of Trainer's steps."""

    def __init__(self) -> None:
        self.averages: list[dict[str, Tensor]] = []

    def on_step_end(self, *args: Any, model: Any, **kwargs: Any) -> None:
        average = self.trainer.late_phase.averaged_state_dict()
        self.averages.append({k: v.clone().cpu() for k, v in average.items()})


def assert_close(average: dict[str, Tensor], reference: dict[str, Tensor], step: int) -> None:
    for key, expected in reference.items():
        scale = expected.abs().max().clamp_min(1e-3)
        error = ((average[key] - expected).abs().max() / scale).item()
        assert error < 1e-10, f"step {step}: {key} differs by {error:.1e}"


def run(tmp_path: Any, model: Any, config: LatePhaseConfig, optimizer: Any, **kwargs: Any) -> tuple[Any, list]:
    recorder = Recorder()
    run = trainer(
        tmp_path, model, config, optimizer=optimizer,
        extra={"callbacks": [recorder]}, **{"weight_decay": WEIGHT_DECAY} | kwargs,
    )  # fmt: skip
    recorder.trainer = run
    run.train()
    return run, recorder.averages


CASES = [
    ("gpt2", ["rank1"]),
    ("gpt2", ["norm"]),
    ("llama", ["rank1", "norm", "head"]),
    ("lstm", ["rank1"]),
    ("lstm", ["rank1", "head"]),
    ("convnet", ["norm", "head"]),
    ("convnet", ["hypernet", "norm"]),
    ("llama", ["hypernet"]),
]


@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize(("name", "weights"), CASES, ids=lambda v: "+".join(v) if isinstance(v, list) else v)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_minibatch(tmp_path, name: str, weights: list[str], accumulation: int, optimizer: Any) -> None:
    follow(tmp_path, name, weights, accumulation, optimizer, cycles=50)


def test_several_minibatches_a_member(tmp_path) -> None:
    follow(tmp_path, "gpt2", ["rank1", "norm"], 6, ADAMW, cycles=20)


@pytest.mark.parametrize("name", ["llama", "convnet"])
def test_every_weight_replicated(tmp_path, name: str) -> None:
    follow(tmp_path, name, ["full"], 1, SGD, cycles=20)


def follow(tmp_path, name: str, weights: list[str], accumulation: int, optimizer: Any, cycles: int) -> None:
    """Trains past T0 and through some cycles, and compares the averages after each."""
    K, size = 3, 4
    start = 4
    steps_per_cycle = 3 if accumulation == 1 else 1
    max_steps = start + cycles * steps_per_cycle
    model = double(MODELS[name]())
    rows = size * accumulation * 20  # whole windows: no epoch ends inside one
    reference = reference_for(model, weights, K, optimizer)
    config = LatePhaseConfig(num_members=K, weights=weights, late_phase_start=start, base_gradient_scale=1.0)
    run_, averages = run(
        tmp_path, model, config, optimizer, rows=rows, max_steps=max_steps,
        gradient_accumulation_steps=accumulation, per_device_train_batch_size=size,
    )  # fmt: skip
    batches = run_.train_dataset.batches(size)
    seen = 0

    def take(count: int) -> list[dict[str, Tensor]]:
        nonlocal seen
        taken = [batches[(seen + i) % len(batches)] for i in range(count)]
        seen += count
        return taken

    for step in range(start):
        reference.shared_step(take(accumulation))
        # Before T0 the averaged model is (θ, φ_0).
        assert_close(averages[step], reference.weights(reference.phi[0]) | reference.S[0], step)
    reference.release()
    for cycle in range(cycles):
        minibatches = take(accumulation * steps_per_cycle)
        m = len(minibatches) // K
        reference.cycle({k: minibatches[k::K] for k in range(K)}, m)
        step = start + (cycle + 1) * steps_per_cycle - 1
        assert_close(averages[step], reference.averaged(), step)
    name = next(iter(reference.phi[0]))
    assert not torch.equal(reference.phi[0][name], reference.phi[1][name])


@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize(("name", "weights"), CASES, ids=str)
def test_sample(tmp_path, name: str, weights: list[str], optimizer: Any) -> None:
    K, size, cycles = 3, 6, 50
    accumulation = 2 if name == "llama" else 1
    model = double(MODELS[name]())
    reference = reference_for(model, weights, K, optimizer)
    config = LatePhaseConfig(
        num_members=K, weights=weights, late_phase_start=0, member_assignment="sample", base_gradient_scale=1.0
    )
    run_, averages = run(
        tmp_path, model, config, optimizer, rows=size * accumulation * 25, max_steps=cycles,
        gradient_accumulation_steps=accumulation, per_device_train_batch_size=size,
    )  # fmt: skip
    batches = run_.train_dataset.batches(size)
    for cycle in range(cycles):
        passes = [batches[(cycle * accumulation + i) % len(batches)] for i in range(accumulation)]
        own = {k: [{n: t[2 * k : 2 * k + 2] for n, t in p.items()} for p in passes] for k in range(K)}
        reference.cycle(own, accumulation)
        assert_close(averages[cycle], reference.averaged(), cycle)


@pytest.mark.parametrize("gamma", [1.0, 0.25])
@pytest.mark.parametrize("max_norm", [0.0, 0.05])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_gamma_and_clipping(tmp_path, gamma: float, max_norm: float, accumulation: int) -> None:
    K = 4
    model = double(MODELS["gpt2"]())
    reference = reference_for(model, ["rank1", "norm"], K, SGD, gamma=gamma, max_norm=max_norm)
    config = LatePhaseConfig(num_members=K, weights=["rank1", "norm"], late_phase_start=0, base_gradient_scale=gamma)
    steps_per_cycle = K // accumulation
    run_, averages = run(
        tmp_path, model, config, SGD, rows=64 * 4, max_steps=10 * steps_per_cycle, max_grad_norm=max_norm,
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    batches = run_.train_dataset.batches(4)
    for cycle in range(10):
        reference.cycle({k: [batches[(cycle * K + k) % len(batches)]] for k in range(K)})
        assert_close(averages[(cycle + 1) * steps_per_cycle - 1], reference.averaged(), cycle)


@pytest.mark.parametrize("K", [5, 10])
def test_by_default_adams_steps_stay_what_they_are_at_T0(tmp_path, K: int) -> None:
    """The default γ; of a sum the median step after T0 is several times that before."""
    model = double(MODELS["gpt2"]())
    config = LatePhaseConfig(num_members=K, weights=["norm"], late_phase_start=30)
    run_, averages = run(
        tmp_path, model, config, (torch.optim.Adam, {"lr": 1e-9}), rows=4 * K, max_steps=36, weight_decay=0.0,
        gradient_accumulation_steps=K,
    )  # fmt: skip
    weights = torch.stack([average["transformer.h.0.mlp.c_fc.weight"] for average in averages])
    sizes = weights.diff(dim=0).abs().flatten(1).median(dim=1).values
    assert 1 / 1.2 < (sizes[29:] / sizes[28]).max() < 1.2
    assert run_._stepping.base_gradient_scale == 1 / K


def test_adams_steps_grow_at_T0_unless_gradients_are_averaged(tmp_path) -> None:
    """Its second moment is that of single gradients; γ = 1/K keeps their scale."""
    K, start, rate = 4, 30, 1e-9  # so small a rate that the gradient of an epoch, one update, stays what it is

    def steps(gamma: float) -> Tensor:
        model = double(MODELS["gpt2"]())
        config = LatePhaseConfig(num_members=K, weights=["norm"], late_phase_start=start, base_gradient_scale=gamma)
        optimizer = (torch.optim.Adam, {"lr": rate, "betas": (0.5, 0.9), "eps": 1e-30})
        _, averages = run(
            tmp_path / str(gamma), model, config, optimizer, rows=4 * K, max_steps=start + 3, weight_decay=0.0,
            gradient_accumulation_steps=K,
        )  # fmt: skip
        weights = torch.stack([average["transformer.h.0.mlp.c_fc.weight"] for average in averages])
        return (weights.diff(dim=0).abs() / rate).flatten(1).median(dim=1).values

    as_before = torch.ones(start + 2, dtype=torch.float64)
    assert torch.allclose(steps(1 / K), as_before, atol=1e-3)
    summed = steps(1.0)
    assert torch.allclose(summed[: start - 1], as_before[: start - 1], atol=1e-3)
    # By hand: m = 0.5 + 0.5 K, v = 0.9 + 0.1 K², and one and two steps later.
    m = v = 1.0
    for own in summed[start - 1 :]:
        m, v = 0.5 * m + 0.5 * K, 0.9 * v + 0.1 * K**2
        assert own == pytest.approx(m / v**0.5, rel=0.02) and own > 1.5


def test_cycle_over_several_accumulated_steps(tmp_path) -> None:
    """K = 3 with accumulation 2: a cycle takes 3 of Trainer's steps, each member two minibatches."""
    model = double(MODELS["gpt2"]())
    reference = reference_for(model, ["norm"], 3, SGD)
    config = LatePhaseConfig(num_members=3, weights=["norm"], late_phase_start=0)
    run_, averages = run(tmp_path, model, config, SGD, rows=4 * 36, max_steps=18, gradient_accumulation_steps=2)
    batches = run_.train_dataset.batches(4)
    for cycle in range(6):
        own = batches[cycle * 6 : cycle * 6 + 6]
        reference.cycle({k: own[k::3] for k in range(3)}, 2)
        assert_close(averages[cycle * 3 + 2], reference.averaged(), cycle)
        if cycle:  # inside a cycle nothing moves
            for key, value in averages[cycle * 3].items():
                assert torch.equal(value, averages[cycle * 3 - 1][key])


@pytest.mark.parametrize("gamma", [1.0, 3.0])
def test_accumulation_control(tmp_path, gamma: float) -> None:
    """K = 1 with a cycle length steps once every so many minibatches, on their mean loss."""
    model = double(MODELS["gpt2"]())
    reference = reference_for(model, ["rank1"], 1, SGD, gamma=gamma)
    config = LatePhaseConfig(
        num_members=1, weights=["rank1"], late_phase_start=2, cycle_length=3, base_gradient_scale=gamma
    )
    run_, averages = run(tmp_path, model, config, SGD, rows=4 * 32, max_steps=32)
    batches = run_.train_dataset.batches(4)
    for step in range(2):
        reference.shared_step([batches[step]])
    for cycle in range(10):
        own = batches[2 + cycle * 3 : 5 + cycle * 3]
        reference.cycle({0: own}, 3)
        assert_close(averages[4 + cycle * 3], reference.averaged(), cycle)


@pytest.mark.parametrize("optimizer", [SGD], ids=["sgd"])
def test_short_window_at_the_end_of_an_epoch(tmp_path, optimizer: Any) -> None:
    """Members that saw no minibatch neither decay nor coast on momentum."""
    K = 4
    model = double(MODELS["llama"]())
    reference = reference_for(model, ["norm", "head"], K, optimizer)
    config = LatePhaseConfig(num_members=K, weights=["norm", "head"], late_phase_start=0)
    # 10 minibatches an epoch: windows of 4, 4 and 2.
    run_, averages = run(
        tmp_path, model, config, optimizer, rows=40, max_steps=9, gradient_accumulation_steps=4
    )  # fmt: skip
    batches = run_.train_dataset.batches(4)
    for step in range(9):
        own = batches[(step % 3) * 4 : (step % 3) * 4 + 4]
        reference.cycle({k: [minibatch] for k, minibatch in enumerate(own)})
        assert_close(averages[step], reference.averaged(), step)


def test_unfinished_cycle_at_the_last_step_uses_the_members_it_has(tmp_path) -> None:
    model = double(MODELS["gpt2"]())
    reference = reference_for(model, ["norm"], 4, SGD)
    config = LatePhaseConfig(num_members=4, weights=["norm"], late_phase_start=0, base_gradient_scale=1.0)
    run_, averages = run(tmp_path, model, config, SGD, rows=64, max_steps=6)
    batches = run_.train_dataset.batches(4)
    reference.cycle({k: [batches[k]] for k in range(4)})
    reference.cycle({k: [batches[4 + k]] for k in range(2)})
    assert_close(averages[-1], reference.averaged(), 5)


def test_bare_loop(tmp_path) -> None:
    """LatePhase alone, with one optimizer over base and stacks."""
    from hf_latephase import LatePhase

    K = 3
    model = double(MODELS["lstm"]())
    reference = reference_for(model, ["rank1", "head"], K, ADAMW)
    late_phase = LatePhase(model, LatePhaseConfig(num_members=K, weights=["rank1", "head"]))
    plain = {name: late_phase.plain_name(name) for name, _ in model.named_parameters()}
    groups = [
        {"params": [p], "weight_decay": WEIGHT_DECAY if plain[n] and decays(plain[n]) else 0}
        for n, p in model.named_parameters()
    ]
    optimizer = ADAMW[0](groups, **ADAMW[1])
    late_phase.release()
    text = functools.partial(torch.randint, 3, 48, (4, 8))
    for cycle in range(50):
        minibatches = {}
        for k in range(K):
            ids = text()
            minibatches[k] = [{"input_ids": ids, "labels": ids}]
            late_phase.activate(k)
            model(**minibatches[k][0]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        reference.cycle(minibatches)
        assert_close(late_phase.averaged_state_dict(), reference.averaged(), cycle)
