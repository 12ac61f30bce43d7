"""Predictions of ensembles, beside copies of the members that are combined by plain formulas."""

from __future__ import annotations

import copy
import itertools
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_latephase import LatePhase, LatePhaseConfig
from hf_latephase.analysis import (
    EnsemblePrediction,
    combine_predictions,
    ensemble_log_probs,
    mean_forward,
    model_forward,
    predict_with_dropout,
    predict_with_members,
    score_bytes,
)
from tiny import VOCAB, gpt2, lstm


K = 4


def classifier(p: float = 0.0) -> nn.Sequential:
    layers = [nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(p), nn.LayerNorm(16), nn.Linear(16, 5)]
    return nn.Sequential(*layers).double()


def attached(model: nn.Module, members: int = K) -> LatePhase:
    """Late-phase weights whose members differ widely."""
    late_phase = LatePhase(model, LatePhaseConfig(num_members=members, weights=["head"]))
    late_phase.release()
    with torch.no_grad():
        for stack in late_phase.stacks().values():
            stack.add_(torch.randn_like(stack))
    return late_phase


def copies(late_phase: LatePhase) -> list[nn.Module]:
    """Each member as a stock model of its own."""
    models = []
    for member in range(late_phase.num_members):
        model = copy.deepcopy(late_phase.averaged_model())
        weights = model.state_dict()
        for name, stack in late_phase.stacks().items():
            weights[late_phase.plain_name(name)].copy_(stack[member].detach())
        models.append(model)
    return models


def twin(predictions: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """All members at once, all pairs, from probabilities."""
    probs = torch.stack([torch.softmax(p, -1) for p in predictions])
    mean = probs.mean(0)
    chosen = probs.argmax(-1)
    pairs = list(itertools.combinations(range(len(predictions)), 2))
    disagreement = torch.stack([(chosen[a] != chosen[b]).double() for a, b in pairs]).mean(0)
    entropy, mean_entropy = -(mean * mean.log()).sum(-1), -(probs * probs.log()).sum(-1).mean(0)
    return mean.log(), disagreement, entropy - mean_entropy


def assert_is_twin(prediction: EnsemblePrediction, predictions: list[Tensor]) -> None:
    log_probs, disagreement, mutual_information = twin(predictions)
    torch.testing.assert_close(prediction.log_probs, log_probs, rtol=0, atol=1e-12)
    torch.testing.assert_close(prediction.disagreement, disagreement, rtol=0, atol=1e-12)
    torch.testing.assert_close(prediction.mutual_information, mutual_information, rtol=0, atol=1e-12)
    # Neither is at an end of its range, where a mistake could hide.
    assert 0.05 < disagreement.mean() < 0.95
    assert mutual_information.mean() > 0.05


# ---- combining ----


@pytest.mark.parametrize("shape", [(50, 5), (7, 3, 5)])
def test_combined_is_what_the_twin_says(shape: tuple[int, ...]) -> None:
    logits = [2 * torch.randn(shape).double() for _ in range(K)]
    kept = [one.clone() for one in logits]
    prediction = combine_predictions(logits)
    assert_is_twin(prediction, logits)
    assert_is_twin(combine_predictions(one.log_softmax(-1) for one in logits), logits)
    assert all(torch.equal(one, before) for one, before in zip(logits, kept, strict=True))


def test_figures_worked_out_by_hand() -> None:
    certain = torch.tensor([[0.0, -math.inf, -math.inf]])
    prediction = combine_predictions([certain, certain, certain.roll(1, -1)])
    assert prediction.log_probs.exp().tolist() == [pytest.approx([2 / 3, 1 / 3, 0])]
    # Two of the three pairs differ.
    assert prediction.disagreement.tolist() == pytest.approx([2 / 3])
    # All uncertainty comes from the members: each by itself is certain.
    assert prediction.mutual_information.tolist() == pytest.approx([math.log(3) - 2 / 3 * math.log(2)])
    # Unsure members that agree: all uncertainty is their own.
    unsure = combine_predictions([torch.zeros(1, 3)] * 3)
    assert unsure.mutual_information.tolist() == pytest.approx([0], abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(2, 5))
def test_combined_figures_are_in_their_ranges(seed: int, members: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = [4 * torch.randn(9, classes, generator=generator) for _ in range(members)]
    prediction = combine_predictions(logits)
    torch.testing.assert_close(prediction.log_probs.exp().sum(-1), torch.ones(9))
    assert ((prediction.disagreement >= 0) & (prediction.disagreement <= 1)).all()
    bound = math.log(min(members, classes)) + 1e-5
    assert ((prediction.mutual_information >= 0) & (prediction.mutual_information <= bound)).all()
    reverse = combine_predictions(reversed(logits))
    assert torch.equal(reverse.disagreement, prediction.disagreement)
    torch.testing.assert_close(reverse.log_probs, prediction.log_probs)


def test_one_member_and_equal_members_agree() -> None:
    logits = torch.randn(8, 5).double()
    for members in (1, 3):
        prediction = combine_predictions([logits] * members)
        torch.testing.assert_close(prediction.log_probs, logits.log_softmax(-1))
        assert prediction.disagreement.tolist() == [0] * 8
        assert prediction.mutual_information.tolist() == pytest.approx([0] * 8, abs=1e-12)
    # Rounding makes nothing negative.
    assert combine_predictions([torch.randn(1000, 5)] * 3).mutual_information.min() == 0


def test_low_precision_is_combined_in_float32() -> None:
    logits = [torch.randn(6, 5).bfloat16() for _ in range(3)]
    prediction = combine_predictions(logits)
    assert prediction.log_probs.dtype == prediction.disagreement.dtype == torch.float32
    torch.testing.assert_close(prediction.log_probs, twin([one.float() for one in logits])[0])


def test_predictions_are_not_kept() -> None:
    weights = torch.randn(5, 5, requires_grad=True)
    alive: list[weakref.ref[Tensor]] = []

    def predictions() -> Iterator[Tensor]:
        for _ in range(6):
            # The newest before this one is still in the loop's hands.
            assert sum(reference() is not None for reference in alive) <= 1
            logits = torch.randn(20, 5) @ weights
            assert not logits.requires_grad
            alive.append(weakref.ref(logits))
            yield logits
            del logits

    assert not combine_predictions(predictions()).log_probs.requires_grad


def test_predictions_that_do_not_belong_together_are_errors() -> None:
    with pytest.raises(ValueError, match="at least one member"):
        combine_predictions([])
    with pytest.raises(ValueError, match=r"Member 1 predicted a tensor of shape \[4, 4\], the ones before \[4, 5\]"):
        combine_predictions([torch.zeros(4, 5), torch.zeros(4, 4)])


# ---- members ----


def test_members_predict_as_copies_do() -> None:
    model = classifier().eval()
    late_phase = attached(model)
    rows = 2 * torch.randn(40, 6).double()
    expected = [copy(rows).detach() for copy in copies(late_phase)]
    assert_is_twin(predict_with_members(late_phase, lambda: model(rows)), expected)
    torch.testing.assert_close(ensemble_log_probs(late_phase, lambda: model(rows)), twin(expected)[0])


@pytest.mark.parametrize("active", [None, 2])
def test_the_active_member_is_active_again(active: int | None) -> None:
    model = classifier().eval()
    late_phase = attached(model)
    rows = torch.randn(4, 6).double()
    late_phase.activate(active)
    before = model(rows)
    predict_with_members(late_phase, lambda: model(rows))
    assert torch.equal(model(rows), before)

    def fail() -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_with_members(late_phase, fail)
    assert torch.equal(model(rows), before)


def test_before_t0_the_ensemble_is_the_one_member() -> None:
    model = classifier().eval()
    late_phase = LatePhase(model, LatePhaseConfig(num_members=K, weights=["head"]))
    with torch.no_grad():
        # Training moves row 0; the others wait for T0.
        for stack in late_phase.stacks().values():
            stack[0].add_(torch.randn_like(stack[0]))
    rows = torch.randn(9, 6).double()
    with late_phase.averaged():
        expected = model(rows).log_softmax(-1)
    prediction = predict_with_members(late_phase, lambda: model(rows))
    torch.testing.assert_close(prediction.log_probs, expected)
    assert prediction.disagreement.tolist() == [0] * 9
    torch.testing.assert_close(ensemble_log_probs(late_phase, lambda: model(rows)), expected)


@pytest.mark.parametrize("make", [gpt2, lstm])
def test_bits_per_character_of_the_ensemble(make: Callable[[], Any]) -> None:
    """One model whose members take turns scores a text as K models do; an LSTM's members each carry their state."""
    model = make().double()
    recurrent = make is lstm
    late_phase = LatePhase(model, LatePhaseConfig(num_members=3, weights=["rank1"]))
    late_phase.release()
    with torch.no_grad():
        for stack in late_phase.stacks().values():
            stack.add_(torch.randn_like(stack))
    plain = model_forward(model, recurrent)

    def forward_of(member: int) -> Callable[..., Any]:
        def forward(input_ids: Tensor, state: Any) -> Any:
            late_phase.activate(member)
            return plain(input_ids, state)

        return forward

    def score(scored: nn.Module, forward: Any) -> float:
        settings = {"carries_state": recurrent, "disable_tqdm": True}
        return score_bytes(scored, ids, 8, 4, forward=forward, **settings).nll_nats

    ids = torch.randint(3, VOCAB, (40,))
    ensemble = score(model, mean_forward([forward_of(member) for member in range(3)]))

    models = []
    for member in range(3):
        # All members equal to one: their average is that one.
        alone = copy.deepcopy(late_phase)
        with torch.no_grad():
            for stack in alone.stacks().values():
                stack.copy_(stack[member].expand_as(stack).clone())
        models.append(alone.averaged_model())
    expected = score(nn.ModuleList(models), mean_forward([model_forward(one, recurrent) for one in models]))
    assert ensemble == pytest.approx(expected, rel=1e-10)
    members = [score(one, None) for one in models]
    assert max(members) - min(members) > 0.1
    # Jensen's inequality.
    assert ensemble < sum(members) / 3


# ---- dropout ----


def test_dropout_samples_are_what_the_masks_give() -> None:
    model = classifier(p=0.5)
    rows = torch.randn(60, 6).double()
    prediction = predict_with_dropout(model, lambda: model(rows), 5, seed=3)
    # By hand: only the mask is random, and all else in evaluation mode.
    model.eval()
    torch.manual_seed(3)
    samples = [
        model[5](model[4](nn.functional.dropout(model[:3](rows), 0.5, training=True))).detach() for _ in range(5)
    ]
    assert_is_twin(prediction, samples)


def test_dropout_changes_nothing_for_good() -> None:
    model = classifier(p=0.5).train()
    model[4].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    rows = torch.randn(8, 6, generator=torch.Generator().manual_seed(1)).double()
    first = predict_with_dropout(model, lambda: model(rows), 3, seed=0)
    again = predict_with_dropout(model, lambda: model(rows), 3, seed=0)
    other = predict_with_dropout(model, lambda: model(rows), 3, seed=1)
    assert torch.equal(first.log_probs, again.log_probs)
    assert not torch.equal(first.log_probs, other.log_probs)
    with pytest.raises(RuntimeError):
        predict_with_dropout(model, lambda: model(rows[:, :2]), 3, seed=0)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_dropout_that_cannot_be_sampled_is_an_error() -> None:
    for model in (classifier(p=0.0), nn.Linear(6, 5)):
        with pytest.raises(ValueError, match="Train a model with dropout"):
            predict_with_dropout(model, lambda: torch.zeros(1, 5), 3, seed=0)
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        predict_with_dropout(classifier(p=0.5), lambda: torch.zeros(1, 5), 0, seed=0)
