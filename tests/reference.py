"""
Algorithm 1 of arXiv 2007.12927 as a plain loop, with the paper's symbols: K separate φ_k, K separate optimizers U_φ.

Nothing here comes from hf_latephase: it is what the package is compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.func import functional_call


class Algorithm1:
    """
    Args:
        model: The stock model; its forward takes a batch's items as keywords and returns an object with `.loss`.
        rank1: Keys of weights W that become W ∘ (u vᵀ).
        replicated: Keys of weights that are φ themselves.
        hypernet: Groups of keys of weights that become Σ_t e_t · template_t, with the templates of their group.
        batch_norms: Names of BatchNorm layers whose running statistics each member has for itself.
        K: Number of members.
        U: Makes an optimizer from a list of (parameter, decays) pairs.
        gamma: γ_θ.
        decays: Tells whether a plain key has weight decay; u and v never have.
        max_norm: Clips by the norm of the gradient of (1/K) Σ_k L_k with respect to θ and all φ_k.
    """

    def __init__(
        self,
        model: nn.Module,
        rank1: list[str],
        replicated: list[str],
        K: int,
        U: Callable[[list[tuple[Tensor, bool]]], torch.optim.Optimizer],
        gamma: float = 1.0,
        decays: Callable[[str], bool] = lambda key: True,
        max_norm: float = 0.0,
        hypernet: Iterable[list[str]] = (),
        batch_norms: Iterable[str] = (),
    ) -> None:
        self.model, self.K, self.U, self.gamma, self.max_norm = model, K, U, gamma, max_norm
        self.rank1, self.replicated, self.decays = rank1, replicated, decays
        weights = {key: p.detach().clone() for key, p in model.named_parameters()}
        self.hypernet, self.batch_norms = list(hypernet), list(batch_norms)
        phi_0 = {k: weights[k] for k in replicated}
        for group in self.hypernet:
            templates = torch.stack([weights.pop(key) for key in group])
            for t, key in enumerate(group):
                phi_0[f"{key}.e"] = torch.eye(len(group), dtype=templates.dtype)[t]
            weights[f"templates of {group[0]}"] = templates
        self.theta = {k: w.requires_grad_() for k, w in weights.items() if k not in replicated}
        S_0 = {k: b.detach().clone() for k, b in model.named_buffers() if k.rpartition(".")[0] in self.batch_norms}
        self.S = [{k: b.clone() for k, b in S_0.items()} for _ in range(K)]
        for key in rank1:
            W = weights[key]
            phi_0[f"{key}.u"], phi_0[f"{key}.v"] = W.new_ones(W.shape[0]), W.new_ones(W.shape[1])
        self.phi = [{k: p.detach().clone().requires_grad_() for k, p in phi_0.items()} for _ in range(K)]
        self.U_theta = U([(p, decays(k)) for k, p in self.theta.items()])
        self.U_phi = [self._member_optimizer(k) for k in range(K)]

    def _member_optimizer(self, k: int) -> torch.optim.Optimizer:
        return self.U([(p, key in self.replicated and self.decays(key)) for key, p in self.phi[k].items()])

    def weights(self, phi: dict[str, Tensor]) -> dict[str, Tensor]:
        """The plain weights of one model (θ, φ)."""
        merged = dict(self.theta)
        for key in self.replicated:
            merged[key] = phi[key]
        for key in self.rank1:
            W, u, v = self.theta[key], phi[f"{key}.u"], phi[f"{key}.v"]
            rest = [1] * (W.ndim - 2)
            merged[key] = W * u.view(-1, 1, *rest) * v.view(1, -1, *rest)
        for group in self.hypernet:
            templates = merged.pop(f"templates of {group[0]}")
            for key in group:
                merged[key] = sum(e * template for e, template in zip(phi[f"{key}.e"], templates, strict=True))
        return merged

    def L(self, M: dict[str, Tensor], k: int) -> Tensor:
        """Loss of member k on a minibatch; its running statistics, if it has any, take part in it."""
        return functional_call(self.model, self.weights(self.phi[k]) | self.S[k], (), M, tie_weights=True).loss

    def release(self, phi_0: dict[str, Tensor] | None = None) -> None:
        """T0: φ_k ← φ_0, with fresh U_φ."""
        start = {k: p.detach().clone() for k, p in (phi_0 or self.phi[0]).items()}
        self.phi = [{k: p.clone().requires_grad_() for k, p in start.items()} for _ in range(self.K)]
        self.U_phi = [self._member_optimizer(k) for k in range(self.K)]
        self.S = [{key: b.clone() for key, b in self.S[0].items()} for _ in range(self.K)]

    def shared_step(self, M: Iterable[dict[str, Tensor]]) -> None:
        """Before T0: one plain step of (θ, φ_0) on the mean loss of some minibatches."""
        M = list(M)
        parameters = [*self.theta.values(), *self.phi[0].values()]
        grads = torch.autograd.grad(sum(self.L(m, 0) for m in M) / len(M), parameters)
        self._clip(list(grads), 1)
        for p, g in zip(parameters, grads, strict=True):
            p.grad = g
        self.U_theta.step()
        self.U_phi[0].step()

    def cycle(self, M: dict[int, list[dict[str, Tensor]]], m: int = 1) -> None:
        """
        One cycle: member k sees the minibatches M[k] (m of them in a whole cycle; absent members see none).

        Δθ_k = ∇_θ of the mean loss of M[k]; the mean is over m for θ, so that a minibatch always weighs 1/m.
        """
        theta = list(self.theta.values())
        delta = [torch.zeros_like(p) for p in theta]
        phi_grads: dict[int, list[Tensor]] = {}
        for k, minibatches in M.items():
            members = list(self.phi[k].values())
            total = [torch.zeros_like(p) for p in members]
            for minibatch in minibatches:
                grads = torch.autograd.grad(self.L(minibatch, k), [*theta, *members])
                delta = [d + g / m for d, g in zip(delta, grads[: len(theta)], strict=True)]
                total = [t + g / len(minibatches) for t, g in zip(total, grads[len(theta) :], strict=True)]
            phi_grads[k] = total
        self._clip([*delta, *(g for grads in phi_grads.values() for g in grads)], self.K)
        for k, grads in phi_grads.items():
            for p, g in zip(self.phi[k].values(), grads, strict=True):
                p.grad = g
            self.U_phi[k].step()
        for p, d in zip(theta, delta, strict=True):
            p.grad = self.gamma * d
        self.U_theta.step()

    def _clip(self, grads: list[Tensor], K: int) -> None:
        if self.max_norm:
            norm = torch.sqrt(sum(g.square().sum() for g in grads)) / K
            for g in grads:
                g.mul_(torch.clamp(self.max_norm / (norm + 1e-6 / K), max=1.0))

    def averaged(self) -> dict[str, Tensor]:
        """(θ, φ̄) as plain weights; for rank-1 factors (mean u)(mean v)ᵀ, for BatchNorm the mean affine map."""
        mean = {key: torch.stack([phi[key].detach() for phi in self.phi]).mean(0) for key in self.phi[0]}
        averaged = {k: w.detach() for k, w in self.weights(mean).items()}
        for layer in self.batch_norms:
            gamma, beta = ([phi[f"{layer}.{name}"].detach() for phi in self.phi] for name in ("weight", "bias"))
            mu, var = ([S[f"{layer}.{name}"] for S in self.S] for name in ("running_mean", "running_var"))
            scale = [g / (v + 1e-5).sqrt() for g, v in zip(gamma, var, strict=True)]
            shift = [b - a * m for a, b, m in zip(scale, beta, mu, strict=True)]
            a, b, m, v = (sum(values) / self.K for values in (scale, shift, mu, var))
            s = (v + 1e-5).sqrt()
            affine = {"weight": a * s, "bias": b + a * m, "running_mean": m, "running_var": v}
            averaged |= {f"{layer}.{name}": value for name, value in affine.items()}
        return averaged
