"""
The noisy quadratic problem: late-phase training on it, simulated, and the closed form of its steady-state loss.

Problem. The n weights w = (θ, φ), written relative to the optimum, are base weights θ and late-phase weights φ. Each
minibatch has fresh noise ε ~ N(0, Σ) and the loss ½ (w + ε)ᵀ H (w + ε), hence the gradient H (w + ε). H is any
symmetric positive definite matrix; its blocks between θ and φ couple the two.

Training is Algorithm 1 with plain SGD of rate η for base and members, from T0 on. A cycle draws ε_1 … ε_K and does,
with g_k = H ((θ, φ_k) + ε_k),

    θ ← θ − η γ Σ_k g_k[θ]          φ_k ← φ_k − η g_k[φ]          for each k

Evaluated is the averaged model w̄ = (θ, φ̄), φ̄ = Σ_k φ_k / K, without noise: L = E ½ w̄ᵀ H w̄, the expected loss above
that of the optimum. All methods are cases of this: base SGD has K = 1; a full ensemble (mean of K independent runs)
makes every weight late-phase; a K-fold batch makes none late-phase and has γ = 1/K.

Closed form. Averaging the members' updates closes the system: with ε̄ = Σ_k ε_k / K ~ N(0, Σ/K) and the diagonal matrix
D of each weight's rate, η γ K for θ and η for φ,

    w̄ ← w̄ − D H (w̄ + ε̄)

The members' distances from φ̄ do not enter. w̄ is stable if the eigenvalues of D H lie below 2 (and then φ_k − φ̄ is too,
as eigenvalues interlace). Its mean tends to 0 and its covariance to the solution of the discrete Lyapunov equation

    P = (I − D H) P (I − H D) + D H Σ H D / K

Multiplied by D⁻¹ on both sides, and with X = (2 D⁻¹ − H)⁻¹, that is D⁻¹ = (X⁻¹ + H) / 2, the terms H P H cancel:

    (H P X⁻¹ + X⁻¹ P H) / 2 = H Σ H / K

Multiplied by X, the left side has the trace tr(H P), which is twice the loss. So in steady state

    L = tr[(2 D⁻¹ − H)⁻¹ H Σ H] / (2 K)

and if H and Σ are diagonal, with elements h_i and σ_i²,

    L = Σ_i d_i h_i² σ_i² / (2 K (2 − d_i h_i)),     d_i = η γ K for a base weight, η for a late-phase weight

What follows:

- Late-phase training with γ = 1/K, the full ensemble and the K-fold batch all have D = η I. Their averaged models are
  the same process, with 1/K of the loss of base SGD. For it the ensemble holds K copies of all weights, late-phase
  training K copies of φ alone.
- With γ = 1 the base weights move at the rate K η. Late-phase weights keep the gain of 1/K; a base weight that is
  coupled to none has η h² σ² / (2 (2 − K η h)), a little more than under base SGD, and diverges if K η h ≥ 2. To first
  order in η, what is saved is 1 − 1/K of the late-phase weights' share in the trace of H Σ H.
- K buys a lower loss at equal speed per update, and an update costs K minibatches. Base SGD at the rate η / K has the
  same steady-state loss to first order in η, and 1/K of the speed per update.

Problem: Zhang et al., "Which algorithmic choices matter at which batch sizes? Insights from a noisy quadratic model",
NeurIPS 2019. Late-phase weights: von Oswald et al., ICLR 2021. The derivation is ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


# What may be left of the start, relative to the steady-state loss, when measuring begins.
TRANSIENT = 1e-4


@dataclass(frozen=True)
class NoisyQuadratic:
    """
    The problem ½ (w + ε)ᵀ H (w + ε), ε ~ N(0, Σ), w relative to the optimum.

    Args:
        hessian (`torch.Tensor`):
            H, `[n, n]` in float64, symmetric positive definite.
        noise (`torch.Tensor`):
            Σ, `[n, n]` in float64, symmetric positive semidefinite.

    Raises:
        `ValueError`: If one of them is not.
    """

    hessian: Tensor
    noise: Tensor

    def __post_init__(self) -> None:
        for name, matrix in (("hessian", self.hessian), ("noise", self.noise)):
            if matrix.dtype != torch.float64 or matrix.ndim != 2 or not torch.equal(matrix, matrix.T):
                raise ValueError(f"{name} must be a symmetric matrix in float64. Take (A + A.T) / 2 of it.")
        if self.hessian.shape != self.noise.shape:
            raise ValueError(
                f"hessian {list(self.hessian.shape)} and noise {list(self.noise.shape)} must be of one size."
            )
        smallest = torch.linalg.eigvalsh(self.hessian)[0].item()
        if smallest <= 0:
            raise ValueError(
                f"hessian must be positive definite, but has the eigenvalue {smallest:.3g}: nothing holds the weights "
                "in that direction. Leave it out of the problem."
            )
        eigenvalues = torch.linalg.eigvalsh(self.noise)
        if eigenvalues[0] < -1e-12 * eigenvalues[-1].abs():
            raise ValueError(f"noise must be a covariance, but has the eigenvalue {eigenvalues[0].item():.3g}.")

    @property
    def size(self) -> int:
        """n, the number of weights."""
        return len(self.hessian)


@dataclass(frozen=True)
class Method:
    """
    A way to train on the problem, as a case of Algorithm 1.

    Args:
        name (`str`):
            What tables call it.
        num_members (`int`):
            K, minibatches to an update.
        num_late (`int`):
            How many weights, the last ones, are late-phase weights.
        base_gradient_scale (`float`, defaults to 1.0):
            γ.

    Raises:
        `ValueError`: If K is below 1, `num_late` negative, or γ not positive.
    """

    name: str
    num_members: int
    num_late: int
    base_gradient_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.num_members < 1 or self.num_late < 0 or not self.base_gradient_scale > 0:
            raise ValueError(f"{self}: needs num_members >= 1, num_late >= 0 and base_gradient_scale > 0.")

    def rates(self, problem: NoisyQuadratic, learning_rate: float) -> Tensor:
        """Returns the diagonal of D `[n]`: the rate at which each weight of the averaged model moves."""
        if self.num_late > problem.size:
            raise ValueError(f"{self.name} has num_late={self.num_late}, but there are {problem.size} weights.")
        rates = torch.full((problem.size,), learning_rate, dtype=torch.float64)
        rates[: problem.size - self.num_late] *= self.base_gradient_scale * self.num_members
        return rates


def late_phase(num_members: int, num_late: int, averaged: bool = False) -> Method:
    """Late-phase training with γ = 1, or if `averaged` with γ = 1/K."""
    if averaged:
        return Method("late-phase, γ = 1/K", num_members, num_late, 1 / num_members)
    return Method("late-phase, γ = 1", num_members, num_late)


def methods(num_members: int, num_late: int, size: int) -> list[Method]:
    """The methods that K minibatches to an update allow."""
    return [
        late_phase(num_members, num_late),
        late_phase(num_members, num_late, averaged=True),
        Method("full ensemble", num_members, size),
        Method("K-fold batch", num_members, 0, 1 / num_members),
    ]


def contraction(problem: NoisyQuadratic, method: Method, learning_rate: float) -> float:
    """
    The factor by which the slowest direction of the averaged model shrinks in an update.

    Raises:
        `ValueError`: If the rate is not positive or so large that the weights diverge.
    """
    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be positive, got {learning_rate}.")
    # D H has the eigenvalues of the symmetric D^½ H D^½.
    root = method.rates(problem, learning_rate).sqrt()
    eigenvalues = torch.linalg.eigvalsh(root[:, None] * problem.hessian * root)
    largest = eigenvalues[-1].item()
    if largest >= 2:
        raise ValueError(
            f"{method.name} with K={method.num_members} diverges at learning_rate={learning_rate}: the largest stable "
            f"rate lies just below {2 * learning_rate / largest:.4g}. Lower the rate, or base_gradient_scale."
        )
    return (1 - eigenvalues).abs().max().item()


def steady_state_loss(problem: NoisyQuadratic, method: Method, learning_rate: float) -> float:
    """
    The closed form: expected loss of the averaged model without noise, above that of the optimum, after many updates.

    Args:
        problem ([`NoisyQuadratic`]):
            H and Σ.
        method ([`Method`]):
            K, γ and which weights are late-phase.
        learning_rate (`float`):
            η, of the base weights and the members.

    Returns:
        `float`: tr[(2 D⁻¹ − H)⁻¹ H Σ H] / (2 K), see the top of this file.

    Raises:
        `ValueError`: If the rate is not positive or so large that the weights diverge.

    Example:

    ```python
    >>> import torch
    >>> from quadratic_theory import Method, NoisyQuadratic, steady_state_loss

    >>> one = torch.ones(1, 1, dtype=torch.float64)
    >>> steady_state_loss(NoisyQuadratic(one, one), Method("base SGD", num_members=1, num_late=0), learning_rate=1.0)
    0.5

    ```
    """
    contraction(problem, method, learning_rate)
    h = problem.hessian
    x = torch.linalg.solve(2 * method.rates(problem, learning_rate).reciprocal().diag() - h, h @ problem.noise @ h)
    return x.trace().item() / (2 * method.num_members)


def update(
    problem: NoisyQuadratic, method: Method, learning_rate: float, base: Tensor, members: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """
    One cycle of Algorithm 1, in many replicas at once.

    Args:
        problem ([`NoisyQuadratic`]), method ([`Method`]), learning_rate (`float`):
            As in [`steady_state_loss`].
        base (`torch.Tensor`):
            θ, `[replicas, n - num_late]`.
        members (`torch.Tensor`):
            φ_1 … φ_K, `[replicas, K, num_late]`.
        noise (`torch.Tensor`):
            ε_1 … ε_K, `[replicas, K, n]`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: θ and the members after it.
    """
    weights = torch.cat([base[:, None].expand(-1, method.num_members, -1), members], dim=-1)
    gradients = (weights + noise) @ problem.hessian
    of_base, of_members = gradients.split([base.shape[-1], members.shape[-1]], dim=-1)
    base = base - learning_rate * method.base_gradient_scale * of_base.sum(1)
    return base, members - learning_rate * of_members


def simulate(
    problem: NoisyQuadratic,
    method: Method,
    learning_rate: float,
    replicas: int,
    num_updates: int,
    generator: torch.Generator,
) -> tuple[float, float]:
    """
    Measure the steady-state loss.

    Every replica begins at the optimum, where base weights and members agree, and is measured once all but 1e-4 of
    that start is forgotten.

    Args:
        problem ([`NoisyQuadratic`]), method ([`Method`]), learning_rate (`float`):
            As in [`steady_state_loss`].
        replicas (`int`):
            Independent runs, at least 2.
        num_updates (`int`):
            Updates measured in each.
        generator (`torch.Generator`):
            The source of noise.

    Returns:
        `tuple[float, float]`: The mean loss of the averaged model, and the standard error of that mean.

    Raises:
        `ValueError`: If the weights diverge at this rate, or there is too little to measure.
    """
    if replicas < 2 or num_updates < 1:
        raise ValueError(f"Needs replicas >= 2 and num_updates >= 1, got {replicas} and {num_updates}.")
    slowest = contraction(problem, method, learning_rate)
    burn_in = math.ceil(math.log(TRANSIENT) / (2 * math.log(max(slowest, TRANSIENT))))
    # Not Cholesky's factor: Σ may be singular.
    eigenvalues, vectors = torch.linalg.eigh(problem.noise)
    root = eigenvalues.clamp(min=0).sqrt()[:, None] * vectors.T
    k, num_late = method.num_members, method.num_late
    base = torch.zeros(replicas, problem.size - num_late, dtype=torch.float64)
    members = torch.zeros(replicas, k, num_late, dtype=torch.float64)
    losses = torch.zeros(replicas, dtype=torch.float64)
    for step in range(burn_in + num_updates):
        noise = torch.randn(replicas, k, problem.size, generator=generator, dtype=torch.float64) @ root
        base, members = update(problem, method, learning_rate, base, members, noise)
        if step >= burn_in:
            averaged = torch.cat([base, members.mean(1)], dim=-1)
            losses += ((averaged @ problem.hessian) * averaged).sum(-1) / 2
    # Losses of one run hang together, those of different replicas do not.
    losses /= num_updates
    return losses.mean().item(), (losses.std() / math.sqrt(replicas)).item()
