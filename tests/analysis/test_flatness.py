"""Flatness beside explicit Hessians and steps made by hand."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Image
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

import flatness
from hf_latephase import LatePhase, LatePhaseConfig
from hf_latephase.analysis import hessian_eigenvalues, loss_along_directions
from hf_latephase.data.vision import load_images
from hf_latephase.models import WideResNetConfig, WideResNetForImageClassification


class Quadratic(nn.Module):
    """½ wᵀ H w, whatever the batch."""

    def __init__(self, eigenvalues: list[float]) -> None:
        super().__init__()
        basis = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues)).double()).Q
        self.hessian = basis @ torch.diag(torch.tensor(eigenvalues).double()) @ basis.T
        # Several parameters, so that their order and shapes matter.
        self.first = nn.Parameter(torch.randn(2, 3).double())
        self.second = nn.Parameter(torch.randn(len(eigenvalues) - 6).double())

    def forward(self, rows: Tensor) -> Tensor:
        w = torch.cat([self.first.flatten(), self.second])
        return 0.5 * w @ self.hessian @ w * rows.mean()


class Counting(nn.Module):
    """Counts its calls in a buffer, in any mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, rows: Tensor) -> Tensor:
        self.calls += 1
        return rows


def network() -> nn.Sequential:
    """A small convolutional network in training mode, with statistics that are not those of a new layer."""
    layers = [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), Counting(), nn.Flatten(), nn.Dropout(0.5)]
    model = nn.Sequential(*layers, nn.Linear(12, 3)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    for _ in range(5):
        model(3 * torch.randn(10, 2, 4, 4).double() + 1)
    return model


def batches(*sizes: int) -> list[dict[str, Tensor]]:
    return [{"images": torch.randn(n, 2, 4, 4).double(), "labels": torch.randint(3, (n,))} for n in sizes]


def mean_loss(call: Callable[..., Any], batch: Any) -> Tensor:
    return nn.functional.cross_entropy(call(batch["images"]), batch["labels"])


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def explicit_hessian(model: nn.Module, loss: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
    """The matrix, over the trained parameters."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def of_vector(vector: Tensor) -> Tensor:
        pieces = vector.split([p.numel() for p in trained.values()])
        return loss({n: piece.view(p.shape) for piece, (n, p) in zip(pieces, trained.items(), strict=True)})

    return torch.func.hessian(of_vector)(torch.cat([p.flatten() for p in trained.values()]))


# ---- eigenvalues ----


def test_eigenvalues_of_a_known_quadratic() -> None:
    # The largest in size is negative: it is not the largest.
    spectrum = [-50.0, -1.0, 0.0, 0.5, 1.0, 2.0, 3.0, 7.0, 20.0]
    model = Quadratic(spectrum)

    def loss(call: Callable[..., Any], rows: Tensor) -> Tensor:
        return call(rows)

    values = hessian_eigenvalues(model, loss, [torch.ones(4)], num_eigenvalues=3, tolerance=0)
    assert values.dtype == torch.float64
    assert values.tolist() == pytest.approx([20, 7, 3], rel=1e-10)
    # Batches weigh by their rows: a mean of 4, not of 3.
    weighted = hessian_eigenvalues(model, loss, [torch.ones(1), torch.full((2,), 5.5)], tolerance=0)
    assert weighted.tolist() == pytest.approx([80], rel=1e-10)


def test_eigenvalues_are_those_of_the_explicit_hessian() -> None:
    model, parts = network(), batches(6, 6, 2)
    values = hessian_eigenvalues(model, mean_loss, parts, num_eigenvalues=4, tolerance=0)
    plain, whole = copy.deepcopy(model).eval(), joined(parts)
    plain[3] = nn.Identity()  # torch.func forbids to count
    hessian = explicit_hessian(
        plain, lambda weights: mean_loss(lambda *a: torch.func.functional_call(plain, weights, a), whole)
    )
    expected = torch.linalg.eigvalsh(hessian)
    torch.testing.assert_close(values, expected[-4:].flip(0), rtol=1e-9, atol=0)
    assert expected[-4] > 0.01
    # One set of numbers that do not depend on the dtype, nor much on the tolerance.
    single = [{"images": part["images"].float(), "labels": part["labels"]} for part in parts]
    rough = hessian_eigenvalues(copy.deepcopy(model).float(), mean_loss, single, num_eigenvalues=4)
    torch.testing.assert_close(rough, values, rtol=1e-2, atol=0)


def test_attention_and_frozen_parameters() -> None:
    """The fused attention has no second derivative; what is frozen is no direction."""
    config = ViTConfig(
        hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=4, patch_size=2
    )
    model = ViTForImageClassification(config).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    assert model.config._attn_implementation == "sdpa"
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("attention" in name and name.endswith("weight") and parameter.ndim == 2)
    batch = {"pixel_values": torch.randn(5, 3, 4, 4).double(), "labels": torch.randint(2, (5,))}

    def loss(call: Callable[..., Any], batch: Any) -> Tensor:
        return nn.functional.cross_entropy(call(pixel_values=batch["pixel_values"]).logits, batch["labels"])

    values = hessian_eigenvalues(model, loss, [batch], num_eigenvalues=2, tolerance=0)
    plain = copy.deepcopy(model).eval()
    plain.set_attn_implementation("eager")
    hessian = explicit_hessian(
        plain, lambda weights: loss(lambda **k: torch.func.functional_call(plain, weights, (), k), batch)
    )
    assert hessian.shape == (64, 64)
    # transformers' eager attention computes its softmax in float32.
    torch.testing.assert_close(values, torch.linalg.eigvalsh(hessian)[-2:].flip(0), rtol=1e-5, atol=0)
    assert values[1] > 1e-4


def test_weights_that_the_loss_does_not_use_are_flat() -> None:
    model = Quadratic([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    model.unused = nn.Linear(2, 2)
    values = hessian_eigenvalues(model, lambda call, rows: call(rows), [torch.ones(1)], num_eigenvalues=2)
    assert values.tolist() == pytest.approx([8, 7], rel=1e-3)


# ---- directions ----


def test_steps_are_as_long_as_the_filters() -> None:
    """What the layers really compute with: each filter moved by its own norm, biases and norm layers by nothing."""
    model, seen = network(), []
    norm, head = model[1], model[-1]

    def spy(call: Callable[..., Any], batch: Any) -> Tensor:
        assert not torch.is_grad_enabled()
        handles = [m.register_forward_pre_hook(lambda m, _: seen.append(copy.deepcopy(m.state_dict()))) for m in (
            model[0], norm, head)]  # fmt: skip
        loss = mean_loss(call, batch)
        for handle in handles:
            handle.remove()
        return loss

    distances = [-0.5, 0.0, 2.0]
    loss_along_directions(model, spy, batches(2), distances, num_directions=2)
    assert len(seen) == 2 * 3 * 3
    steps: dict[int, list[Tensor]] = {0: [], 2: []}
    for index, weights in enumerate(seen):
        position = index % 3
        own = (model[0], norm, head)[position].state_dict()
        assert torch.equal(weights["bias"], own["bias"])
        if position == 1:
            assert all(torch.equal(tensor, own[name]) for name, tensor in weights.items())
            continue
        step = (weights["weight"] - own["weight"]).flatten(1)
        distance = distances[index // 3 % 3]
        torch.testing.assert_close(step.norm(dim=1), abs(distance) * own["weight"].flatten(1).norm(dim=1))
        if distance:
            steps[position].append((step / distance).flatten())
    for found in steps.values():
        # One line through the model; the next direction is another one.
        torch.testing.assert_close(found[0], found[1])
        torch.testing.assert_close(found[2], found[3])
        cosine = nn.functional.cosine_similarity(found[0], found[2], dim=0)
        assert abs(cosine) < 0.9


def test_losses_are_those_of_a_model_moved_by_hand() -> None:
    model, parts = network(), batches(6, 6, 2)
    distances = [-1.0, -0.25, 0.0, 0.5]
    losses = loss_along_directions(model, mean_loss, parts, distances, num_directions=3, seed=7)
    assert losses.shape == (3, 4)
    assert losses.dtype == torch.float64
    generator = torch.Generator().manual_seed(7)
    expected = torch.empty(3, 4).double()
    for row in expected:
        moves = {}
        for name in ("0.weight", "6.weight"):
            moves[name] = torch.randn(model.get_parameter(name).shape, generator=generator, dtype=torch.float64)
            for noise, weights in zip(moves[name], model.get_parameter(name).detach(), strict=True):
                noise *= weights.norm() / noise.norm()
        for index, distance in enumerate(distances):
            moved = copy.deepcopy(model).eval()
            with torch.no_grad():
                for name, move in moves.items():
                    moved.get_parameter(name).add_(distance * move)
                row[index] = mean_loss(moved, joined(parts))
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
    assert losses[:, 2].unique().numel() == 1
    assert losses.std(0)[[0, 1, 3]].min() > 1e-3


def test_a_wider_valley_is_flatter() -> None:
    rows = torch.randn(64, 5).double()
    losses = []
    for curvature in (1.0, 4.0):
        model = nn.Linear(5, 1).double()
        torch.manual_seed(0)
        nn.init.normal_(model.weight)
        target = model(rows).detach()

        def loss(call: Callable[..., Any], rows: Tensor, c: float = curvature, t: Tensor = target) -> Tensor:
            return c * (call(rows) - t).square().mean()

        losses.append(loss_along_directions(model, loss, [rows], [-1.0, 0.0, 1.0]))
        assert losses[-1][:, 1].abs().max() == 0
    torch.testing.assert_close(losses[1], 4 * losses[0])
    assert losses[0][:, [0, 2]].min() > 0


def test_seeds_decide() -> None:
    model, parts = network(), batches(4)
    runs = [loss_along_directions(model, mean_loss, parts, [1.0], seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    values = [hessian_eigenvalues(model, mean_loss, parts, seed=seed) for seed in (0, 0)]
    assert torch.equal(*values)


# ---- both ----


MEASURES: list[Callable[..., Tensor]] = [
    lambda model, loss, parts: loss_along_directions(model, loss, parts, [0.0, 1.0]),
    hessian_eigenvalues,
]


@pytest.mark.parametrize("measure", MEASURES, ids=["directions", "eigenvalues"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_unchanged_to_the_bit(measure: Callable[..., Tensor], fails: bool) -> None:
    model, parts = network(), batches(3)
    model[1].eval()
    model[0].bias.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict(keep_vars=True).items()}
    modes = [module.training for module in model.modules()]
    random_state, calls = torch.get_rng_state(), []

    def loss(call: Callable[..., Any], batch: Any) -> Tensor:
        result = mean_loss(call, batch)
        calls.append(1)
        if fails and len(calls) == 2:
            raise KeyboardInterrupt
        return result

    if fails:
        with pytest.raises(KeyboardInterrupt):
            measure(model, loss, parts)
    else:
        measure(model, loss, parts)
    assert len(calls) >= 2
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert [p.requires_grad for p in model.parameters()] == [name != "0.bias" for name, _ in model.named_parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("measure", MEASURES, ids=["directions", "eigenvalues"])
def test_what_cannot_be_measured_is_an_error(measure: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="no batches"):
        measure(network(), mean_loss, [])
    with pytest.raises(ValueError, match="Unfreeze"):
        measure(network().requires_grad_(False), mean_loss, batches(3))
    model = network()
    late_phase = LatePhase(model, LatePhaseConfig(num_members=2, weights=["head"]))
    with pytest.raises(ValueError, match=r"late_phase\.averaged_model\(\)"):
        measure(model, mean_loss, batches(3))
    measure(late_phase.averaged_model(), mean_loss, batches(3))


def test_numbers_that_cannot_be_are_errors() -> None:
    model, parts = network(), batches(3)
    with pytest.raises(ValueError, match="got 0 and 5"):
        loss_along_directions(model, mean_loss, parts, [])
    with pytest.raises(ValueError, match="got 1 and 0"):
        loss_along_directions(model, mean_loss, parts, [1.0], num_directions=0)
    with pytest.raises(ValueError, match="nothing to move"):
        loss_along_directions(nn.LayerNorm(3), lambda call, rows: call(rows).sum(), [torch.ones(2, 3)], [1.0])
    size = sum(p.numel() for p in model.parameters())
    for number in (0, size):
        with pytest.raises(ValueError, match=f"between 1 and {size - 1}.*got {number}"):
            hessian_eigenvalues(model, mean_loss, parts, num_eigenvalues=number)
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="no finite curvature"):
        hessian_eigenvalues(model, mean_loss, parts)


# ---- the script ----


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two untrained models of one kind, as runs save them."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("runs")
    names = [str(root / f"seed{seed}" / "base") for seed in range(2)]
    for name in names:
        WideResNetForImageClassification(WideResNetConfig(depth=10, widen_factor=1)).save_pretrained(name)
    return names


def test_the_script_measures_what_the_library_does(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = "--image_size 8 --num_images 12 --batch_size 8 --num_directions 2 --num_steps 1 --num_eigenvalues 2"
    flatness.main(["--models", *folders, folders[0], "--names", "a", "a", "b", *numbers.split(),
                   "--output_dir", str(tmp_path / "out")])  # fmt: skip
    content = json.loads((tmp_path / "out" / "flatness.json").read_text(encoding="utf-8"))
    assert content["distances"] == [-0.5, 0.0, 0.5]
    assert (tmp_path / "out" / "flatness.png").stat().st_size > 10_000
    first, second, again = content["results"]
    assert (first["losses"], first["eigenvalues"]) == (again["losses"], again["eigenvalues"])
    assert first["losses"] != second["losses"]
    assert "| a | " in (printed := capsys.readouterr().out) and "| 2 |" in printed

    # The images as any other way of loading gives them, normalised by all training images.
    splits = load_images()
    images = splits.train.cast_column("image", Image(mode="RGB"))["image"]
    whole = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 255
    whole = (whole - whole.mean((0, 2, 3), keepdim=True)) / whole.std((0, 2, 3), keepdim=True)
    chosen = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))[:12]
    model = WideResNetForImageClassification.from_pretrained(folders[0]).eval()
    with torch.no_grad():
        logits = model(pixel_values=whole[chosen]).logits
    loss = nn.functional.cross_entropy(logits, splits.labels(splits.train)[chosen]).item()
    assert [row[1] for row in first["losses"]] == pytest.approx([loss, loss], rel=1e-4)
    assert len(first["eigenvalues"]) == 2


def test_the_script_groups_runs_by_folder(folders: list[str]) -> None:
    arguments = flatness.FlatnessArguments(models=[*folders, folders[0]])
    assert arguments.names == ["base"] * 3
    results = [
        flatness.Flatness("x", "f", [[3.0, 1.0, 5.0]], [8.0, 1.0]),
        flatness.Flatness("y", "g", [[0.0, 0.0, 0.0]], [1.0, 1.0]),
        flatness.Flatness("x", "h", [[3.0, 1.0, 1.0]], [4.0, 1.0]),
    ]
    lines = flatness.table(results, [-1.0, 0.0, 1.0]).splitlines()
    assert lines[2:] == ["| x | 1 | 3 ± 1.6 | 6 ± 2.8 | 2 |", "| y | 0 | 0 ± 0 | 1 ± 0 | 1 |"]


def test_the_script_refuses_what_cannot_work(folders: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no saved model \(config.json\)"):
        flatness.FlatnessArguments(models=[str(tmp_path)])
    with pytest.raises(ValueError, match="2 models, but 1 names"):
        flatness.FlatnessArguments(models=folders, names=["a"])
    with pytest.raises(ValueError, match="num_images must be at least 1, got 0"):
        flatness.FlatnessArguments(models=folders, num_images=0)
    with pytest.raises(ValueError, match="max_distance must be above 0"):
        flatness.FlatnessArguments(models=folders, max_distance=0.0)
    few = str(tmp_path / "few")
    WideResNetForImageClassification(WideResNetConfig(depth=10, widen_factor=1, num_labels=3)).save_pretrained(few)
    with pytest.raises(ValueError, match="3 classes apart.*at least 10.*--dataset"):
        flatness.main(["--models", few, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
