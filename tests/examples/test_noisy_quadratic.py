"""The noisy quadratic problem: its closed form against Lyapunov's equation, a simulation, and the library itself."""

from __future__ import annotations

import doctest
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import solve_discrete_lyapunov
from torch import Tensor, nn
from torch.utils.data import Dataset

import quadratic_theory
from common.recipe import parse_arguments
from hf_latephase import LatePhaseConfig, LatePhaseTrainer
from noisy_quadratic import Arguments, main
from quadratic_theory import (
    Method,
    NoisyQuadratic,
    contraction,
    late_phase,
    methods,
    simulate,
    steady_state_loss,
    update,
)
from tiny import arguments


def base_sgd() -> Method:
    return Method("base SGD", num_members=1, num_late=0)


def diagonal(hessian: Any, variances: Any) -> NoisyQuadratic:
    return NoisyQuadratic(*(torch.tensor(values, dtype=torch.float64).diag() for values in (hessian, variances)))


def coupled(size: int, seed: int, correlated: bool = True) -> NoisyQuadratic:
    """Random blocks between all weights; eigenvalues of H from 0.2 to 2."""
    generator = torch.Generator().manual_seed(seed)
    q, a = (torch.randn(size, size, generator=generator, dtype=torch.float64) for _ in range(2))
    q = torch.linalg.qr(q).Q
    hessian = q * torch.linspace(0.2, 2.0, size, dtype=torch.float64) @ q.T
    noise = a @ a.T / size if correlated else torch.eye(size, dtype=torch.float64)
    return NoisyQuadratic((hessian + hessian.T) / 2, (noise + noise.T) / 2)


# ---- the closed form ----


def joint_lyapunov_loss(problem: NoisyQuadratic, method: Method, learning_rate: float) -> float:
    """The loss from the covariance of θ and all φ_k together, members and their noise kept apart."""
    n, k, late = problem.size, method.num_members, method.num_late
    h, sigma = problem.hessian.numpy(), problem.noise.numpy()
    base = n - late
    size = base + k * late
    transition, covariance = np.eye(size), np.zeros((size, size))
    for member in range(k):
        rows = base + member * late + np.arange(late)
        # Member k's weights out of the joint state, and what its gradient does to that state.
        pick = np.zeros((n, size))
        pick[np.arange(base), np.arange(base)] = 1
        pick[np.arange(base, n), rows] = 1
        push = np.zeros((size, n))
        push[:base] = learning_rate * method.base_gradient_scale * h[:base]
        push[rows] = learning_rate * h[base:]
        transition -= push @ pick
        covariance += push @ sigma @ push.T
    joint = solve_discrete_lyapunov(transition, covariance)
    average = np.zeros((n, size))
    average[:base, :base] = np.eye(base)
    for member in range(k):
        average[base:, base + member * late : base + (member + 1) * late] = np.eye(late) / k
    return float(np.trace(h @ average @ joint @ average.T) / 2)


@pytest.mark.parametrize(
    ("method", "learning_rate"),
    [
        (base_sgd(), 0.8),
        (late_phase(4, 3), 0.1),
        (late_phase(4, 3, averaged=True), 0.5),
        (Method("in between", 3, 2, 0.6), 0.3),
        (Method("full ensemble", 3, 6), 0.5),
        (Method("K-fold batch", 5, 0, 1 / 5), 0.5),
    ],
    ids=lambda value: str(getattr(value, "name", value)),
)
def test_closed_form_solves_lyapunovs_equation(method: Method, learning_rate: float) -> None:
    problem = coupled(6, seed=3)
    expected = joint_lyapunov_loss(problem, method, learning_rate)
    assert steady_state_loss(problem, method, learning_rate) == pytest.approx(expected, rel=1e-10)


def test_diagonal_closed_form() -> None:
    h, variances, k, eta = [2.0, 0.5, 1.5, 0.25], [0.3, 1.0, 2.0, 0.7], 3, 0.2
    problem = diagonal(h, variances)
    scalar = [eta * a * a * s / (2 - eta * a) / 2 for a, s in zip(h, variances, strict=True)]
    faster = [eta * a * a * s / (2 - k * eta * a) / 2 for a, s in zip(h, variances, strict=True)]
    assert steady_state_loss(problem, base_sgd(), eta) == pytest.approx(sum(scalar), rel=1e-12)
    summed, *others = methods(k, num_late=2, size=4)
    assert len(others) == 3
    for method in others:
        assert steady_state_loss(problem, method, eta) == pytest.approx(sum(scalar) / k, rel=1e-12)
    expected = sum(faster[:2]) + sum(scalar[2:]) / k
    assert steady_state_loss(problem, summed, eta) == pytest.approx(expected, rel=1e-12)


def test_to_first_order_what_the_docstring_says() -> None:
    problem, k, eta = coupled(6, seed=5), 4, 1e-6
    base = steady_state_loss(problem, base_sgd(), eta)
    powers = (problem.hessian @ problem.noise @ problem.hessian).diag()
    share = (powers[-2:].sum() / powers.sum()).item()
    saved = 1 - steady_state_loss(problem, late_phase(k, 2), eta) / base
    assert saved == pytest.approx((1 - 1 / k) * share, rel=1e-4)
    assert steady_state_loss(problem, base_sgd(), eta / k) == pytest.approx(base / k, rel=1e-4)


# ---- the simulation ----


def simulated(problem: NoisyQuadratic, method: Method, learning_rate: float, replicas: int, num_updates: int) -> float:
    generator = torch.Generator().manual_seed(0)
    loss, error = simulate(problem, method, learning_rate, replicas, num_updates, generator)
    expected = steady_state_loss(problem, method, learning_rate)
    assert error / expected < 0.003
    return loss / expected


@pytest.mark.parametrize(
    ("problem", "method", "learning_rate"),
    [
        (diagonal([1 / i for i in range(1, 7)], [float(i) for i in range(1, 7)]), base_sgd(), 0.5),
        (diagonal([1.0, 0.6, 0.8, 0.4], [0.1, 4.0, 9.0, 1.0]), late_phase(4, 2), 0.3),
        (coupled(6, seed=1, correlated=False), late_phase(3, 2), 0.25),
        (coupled(5, seed=2), late_phase(5, 2, averaged=True), 0.6),
        (coupled(4, seed=3), Method("in between", 2, 1, 0.7), 0.5),
        (coupled(4, seed=4), Method("full ensemble", 5, 4), 0.6),
        (diagonal([0.5] * 4, [2.0] * 4), Method("K-fold batch", 8, 0, 1 / 8), 1.2),
    ],
    ids=["base", "late-phase", "late-phase-coupled", "late-phase-averaged", "in-between", "ensemble", "batch"],
)
def test_simulation_agrees_with_the_closed_form(problem: NoisyQuadratic, method: Method, learning_rate: float) -> None:
    assert simulated(problem, method, learning_rate, 1500, 500) == pytest.approx(1, abs=0.01)


def test_one_weight_all_late_phase() -> None:
    # No base weight, no correlation over time: L = σ² / (2 K) at η h = 1.
    problem = diagonal([2.0], [3.0])
    method = Method("full ensemble", 6, 1)
    assert steady_state_loss(problem, method, 0.5) == pytest.approx(2 * 3 / (2 * 6), rel=1e-12)
    assert simulated(problem, method, 0.5, 1000, 250) == pytest.approx(1, abs=0.01)


def test_noise_may_be_singular() -> None:
    problem = diagonal([1.0, 0.5], [0.0, 1.0])
    loss, _ = simulate(problem, base_sgd(), 0.5, 1000, 200, torch.Generator().manual_seed(0))
    assert loss == pytest.approx(steady_state_loss(problem, base_sgd(), 0.5), rel=0.03)


@pytest.mark.parametrize("num_late", [0, 2, 5])
def test_update_is_algorithm_1(num_late: int) -> None:
    problem, k, gamma, eta = coupled(5, seed=7), 3, 0.6, 0.1
    method = Method("any", k, num_late, gamma)
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(2, 5 - num_late, generator=generator, dtype=torch.float64)
    members = torch.randn(2, k, num_late, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, k, 5, generator=generator, dtype=torch.float64)
    new_base, new_members = update(problem, method, eta, base, members, noise)
    for replica in range(2):
        total = torch.zeros(5 - num_late, dtype=torch.float64)
        for member in range(k):
            theta = base[replica].clone().requires_grad_()
            phi = members[replica, member].clone().requires_grad_()
            offset = torch.cat([theta, phi]) + noise[replica, member]
            (offset @ problem.hessian @ offset / 2).backward()
            total += theta.grad
            torch.testing.assert_close(
                new_members[replica, member], (phi - eta * phi.grad).detach(), rtol=0, atol=1e-13
            )
        torch.testing.assert_close(new_base[replica], base[replica] - eta * gamma * total, rtol=0, atol=1e-13)


# ---- the library ----


class Weights(nn.Module):
    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values.clone())


class QuadraticModel(nn.Module):
    """The loss ½ (w + ε)ᵀ H (w + ε) of one minibatch, its noise ε the input."""

    def __init__(self, problem: NoisyQuadratic, start: Tensor, num_late: int) -> None:
        super().__init__()
        self.register_buffer("hessian", problem.hessian)
        self.base, self.late = Weights(start[: len(start) - num_late]), Weights(start[len(start) - num_late :])

    def forward(self, noise: Tensor) -> dict[str, Tensor]:
        offset = torch.cat([self.base.weight, self.late.weight]) + noise
        return {"loss": ((offset @ self.hessian) * offset).sum(-1).mean() / 2}


class Draws(Dataset):
    def __init__(self, noise: Tensor) -> None:
        self.noise = noise

    def __len__(self) -> int:
        return len(self.noise)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"noise": self.noise[index]}


@pytest.mark.parametrize("gamma", [1.0, 0.25])
def test_the_library_trains_the_simulated_process(tmp_path: Path, gamma: float) -> None:
    problem, k, num_late, cycles, eta = coupled(6, seed=11), 4, 2, 5, 0.1
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(6, generator=generator, dtype=torch.float64)
    noise = torch.randn(cycles * k, 6, generator=generator, dtype=torch.float64)
    run = LatePhaseTrainer(
        model=QuadraticModel(problem, start, num_late),
        args=arguments(tmp_path, max_steps=cycles * k, per_device_train_batch_size=1, learning_rate=eta, optim="sgd"),
        late_phase_config=LatePhaseConfig(
            num_members=k, late_phase_start=0, weights=["full"], target_modules=["late"], base_gradient_scale=gamma
        ),
        train_dataset=Draws(noise),
    )
    run.train()

    method = Method("late-phase", k, num_late, gamma)
    base, members = start[None, :-num_late], start[-num_late:].expand(1, k, -1)
    for draws in noise.split(k):
        base, members = update(problem, method, eta, base, members, draws[None])
    (stack,) = run.late_phase.stacks().values()
    torch.testing.assert_close(stack.detach(), members[0], rtol=0, atol=1e-12)
    averaged = run.averaged_model()
    torch.testing.assert_close(averaged.base.weight.detach(), base[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(averaged.late.weight.detach(), members[0].mean(0), rtol=0, atol=1e-12)
    # Far from where it began, and the members apart: the comparison is of something.
    assert (base[0] - start[:-num_late]).abs().max() > 0.1 and members.std(1).min() > 0.01


# ---- bad input ----


@pytest.mark.parametrize(
    "method", [base_sgd(), late_phase(4, 2), late_phase(4, 2, averaged=True)], ids=lambda m: m.name
)
def test_the_largest_stable_rate_is_named(method: Method) -> None:
    problem = coupled(6, seed=13)
    with pytest.raises(ValueError, match="diverges.*largest stable rate lies just below") as error:
        steady_state_loss(problem, method, 10.0)
    limit = float(str(error.value).split("just below ")[1].split(". ")[0])
    for rate, stable in ((limit * 0.99, True), (limit * 1.01, False)):
        # The joint system of base and members, no average taken.
        base, members = torch.ones(1, 6 - method.num_late).double(), torch.ones(1, method.num_members, method.num_late)
        members = members.double() * torch.arange(1, method.num_members + 1).view(1, -1, 1)
        for _ in range(1000):
            base, members = update(problem, method, rate, base, members, torch.zeros(1, 1, 6).double())
        assert (torch.cat([base.flatten(), members.flatten()]).abs().max() < 1) == stable
        if stable:
            assert contraction(problem, method, rate) < 1
    with pytest.raises(ValueError, match="diverges"):
        simulate(problem, method, limit * 1.01, 2, 1, torch.Generator())


@pytest.mark.parametrize("learning_rate", [0.0, -0.1, float("nan")])
def test_rates_must_be_positive(learning_rate: float) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        steady_state_loss(diagonal([1.0], [1.0]), base_sgd(), learning_rate)


def test_problems_and_methods_are_checked() -> None:
    one = torch.eye(2, dtype=torch.float64)
    upper = torch.tensor([[1.0, 0.5], [0.0, 1.0]], dtype=torch.float64)
    for hessian, noise, message in [
        (upper, one, "hessian must be a symmetric"),
        (one, upper, "noise must be a symmetric"),
        (one.float(), one, "float64"),
        (one, torch.eye(3).double(), "one size"),
        (torch.tensor([1.0, 0.0]).double().diag(), one, "positive definite"),
        (one, -one, "covariance"),
    ]:
        with pytest.raises(ValueError, match=message):
            NoisyQuadratic(hessian, noise)
    for arguments_of_method in [(0, 1, 1.0), (2, -1, 1.0), (2, 1, 0.0)]:
        with pytest.raises(ValueError, match="needs num_members"):
            Method("bad", *arguments_of_method)
    with pytest.raises(ValueError, match="num_late=3, but there are 2"):
        steady_state_loss(NoisyQuadratic(one, one), late_phase(2, 3), 0.1)
    with pytest.raises(ValueError, match="replicas"):
        simulate(NoisyQuadratic(one, one), base_sgd(), 0.1, 1, 1, torch.Generator())


# ---- the script ----


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--late_share", "0"], "0 late-phase"),
        (["--late_share", "1"], "10 late-phase"),
        (["--dimension", "1"], "dimension"),
        (["--learning_rate", "-1"], "learning_rate"),
        (["--noise", "nan"], "noise"),
        (["--spectrum_decay", "inf"], "spectrum_decay"),
        (["--num_members", "1"], "base SGD"),
        (["--replicas", "1"], "replicas"),
    ],
)
def test_bad_flags(flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arguments([Arguments], flags)


def test_a_rate_that_diverges_ends_the_script_before_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="late-phase, γ = 1 with K=10 diverges"):
        main(["--num_members", "2", "10", "--learning_rate", "0.5", "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("is_coupled", ["true", "false"])
def test_problem_of_the_flags(is_coupled: str) -> None:
    flags = ["--dimension", "6", "--spectrum_decay", "0.5", "--noise", "3", "--coupled", is_coupled]
    (parsed,) = parse_arguments([Arguments], flags)
    problem = parsed.problem()
    expected = torch.arange(1, 7, dtype=torch.float64).rsqrt().flip(0)
    torch.testing.assert_close(torch.linalg.eigvalsh(problem.hessian), expected)
    # Gradients H ε have the covariance s² H.
    torch.testing.assert_close(problem.hessian @ problem.noise @ problem.hessian, 9 * problem.hessian)
    assert (problem.hessian[:3, 3:].abs().max() > 0.01) == (is_coupled == "true")


def test_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text("dimension: 4\nnum_members: [3, 2, 3]\nnum_updates: 20\n", encoding="utf-8")
    main([str(recipe), "--replicas", "50", "--learning_rate", "0.3", "--output_dir", str(tmp_path / "out")])
    content = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert content["settings"]["replicas"] == 50 and content["settings"]["num_members"] == [2, 3]
    rows = content["results"]
    assert [(row["method"], row["num_members"]) for row in rows[:3]] == [
        ("base SGD", 1),
        ("late-phase, γ = 1", 2),
        ("late-phase, γ = 1/K", 2),
    ]
    assert len(rows) == 9
    for row in rows:
        assert abs(row["simulated"] - row["closed_form"]) < 6 * row["standard_error"] < row["closed_form"]
        assert row["closed_form"] <= rows[0]["closed_form"]
    assert (tmp_path / "out" / "plot.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(lines) == 11 and len({len(line) for line in lines}) == 1
    assert f"{rows[-1]['closed_form']:.5g}" in lines[-1]


def test_examples_of_the_docstrings() -> None:
    assert doctest.testmod(quadratic_theory) == (0, 4)
