"""Rank-1 factors of mixtures of experts: factors for each expert."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

from hf_latephase import LatePhase, LatePhaseConfig
from test_trainer import assert_same, weights_of


K, EXPERTS = 3, 4
SIZES = {
    "vocab_size": 48, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 16, "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
}  # fmt: skip


def mixtral() -> Any:
    torch.manual_seed(0)
    # PyTorch's grouped product knows no float64.
    return MixtralForCausalLM(MixtralConfig(**SIZES, experts_implementation="eager")).double()


def gpt_oss() -> Any:
    # Stores its experts' weights transposed, with biases.
    torch.manual_seed(0)
    config = GptOssConfig(**SIZES, layer_types=["full_attention"] * 2, experts_implementation="eager")
    return GptOssForCausalLM(config).double()


stacked_experts = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5"), reason="Before transformers 5.0 mixtral's experts are layers."
)
every_model = pytest.mark.parametrize("make", [pytest.param(mixtral, marks=stacked_experts), gpt_oss])


def ids(rows: int = 6) -> Tensor:
    return torch.randint(3, 48, (rows, 8), generator=torch.Generator().manual_seed(1))


def released(model: Any, **kwargs: Any) -> LatePhase:
    config = LatePhaseConfig(
        num_members=K, weights=["rank1"], init_noise=0.3, target_modules=[r"model\.layers\.\d\.mlp\.experts"], **kwargs
    )
    late_phase = LatePhase(model, config)
    late_phase.release(torch.Generator().manual_seed(3))
    return late_phase


def by_hand(late_phase: LatePhase, plain: Any, k: int | None) -> Any:
    """The plain model with W_e ∘ (u_e v_eᵀ) of every expert, one after the other."""
    model, own = copy.deepcopy(plain), late_phase.model.state_dict()
    with torch.no_grad():
        for target in late_phase.targets:
            prefix = f"{target.module}.parametrizations.{target.tensor}."
            factors = [own[f"{prefix}0.{side}"] for side in ("left", "right")]
            u, v = (f.mean(0) if k is None else f[k] for f in factors)
            weight = model.get_parameter(target.key)
            for e in range(EXPERTS):
                weight[e] = own[f"{prefix}original"][e] * torch.outer(u[e], v[e])
    return model


@every_model
def test_members_and_average_compute_with_each_experts_own_factors(make: Any) -> None:
    plain = make()
    late_phase = released(copy.deepcopy(plain))
    assert len(late_phase.targets) == 4
    assert {stack.shape[:2] for stack in late_phase.stacks().values()} == {(K, EXPERTS)}
    for k in (2, 0, None):
        late_phase.activate(k)
        late_phase.model.zero_grad()
        member = by_hand(late_phase, plain, k)
        for model in (late_phase.model, member):
            model(input_ids=ids(), labels=ids()).loss.backward()
        torch.testing.assert_close(late_phase.model(ids()).logits, member(ids()).logits)
        # What no factor multiplies has the plain gradients.
        grad = late_phase.model.model.embed_tokens.weight.grad
        torch.testing.assert_close(grad, member.model.embed_tokens.weight.grad)
        for target in late_phase.targets if k is not None else []:
            prefix = f"{target.module}.parametrizations.{target.tensor}."
            own = dict(late_phase.model.named_parameters())
            weight, left, right = (own[prefix + name] for name in ("original", "0.left", "0.right"))
            g = member.get_parameter(target.key).grad
            product = left[k].unsqueeze(2) * right[k].unsqueeze(1)
            torch.testing.assert_close(weight.grad, g * product)
            torch.testing.assert_close(left.grad[k], torch.einsum("enm,em->en", g * weight, right[k]))
            torch.testing.assert_close(right.grad[k], torch.einsum("enm,en->em", g * weight, left[k]))
    torch.testing.assert_close(late_phase.averaged_state_dict(), by_hand(late_phase, plain, None).state_dict())


@stacked_experts
def test_rows_dealt_out_are_members_on_their_own_rows() -> None:
    plain = mixtral()
    late_phase = released(copy.deepcopy(plain), member_assignment="sample")
    late_phase.activate_by_sample()
    expected = [by_hand(late_phase, plain, k)(rows).logits for k, rows in enumerate(ids().chunk(K))]
    torch.testing.assert_close(late_phase.model(ids()).logits, torch.cat(expected))


@every_model
def test_it_goes_back_to_the_plain_model_to_the_bit(make: Any) -> None:
    model = make()
    before = weights_of(model)
    late_phase = LatePhase(model, LatePhaseConfig(num_members=K, weights=["rank1"]))
    assert any(target.module.endswith("experts") for target in late_phase.targets)
    late_phase.release()
    assert_same(late_phase.averaged_state_dict(), before)
    assert_same(weights_of(late_phase.detach()), before)


@stacked_experts
def test_each_product_is_computed_once_a_pass() -> None:
    late_phase = released(mixtral())
    parametrization = late_phase.model.model.layers[0].mlp.experts.parametrizations["gate_up_proj"][0]
    calls, forward = [], parametrization.forward

    def counted(weight: torch.Tensor) -> torch.Tensor:
        calls.append(parametrization.fixed.value is None)
        return forward(weight)

    parametrization.forward = counted
    late_phase.model(ids())
    assert calls.count(True) == 1
