"""The pyramidal residual network and ShakeDrop: their numbers against a plain recomputation, saving, and Trainer."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, Trainer, TrainingArguments

from hf_latephase import LatePhaseConfig, LatePhaseTrainer
from hf_latephase.models import PyramidNetConfig, PyramidNetForImageClassification
from hf_latephase.models.modeling_pyramidnet import ShakeDrop
from image_models import (
    check_loads_without_the_library,
    check_missing_weights,
    check_new_output_layer,
    check_reload_is_exact,
    random_images,
)
from tiny import CHECKPOINTING


NUM_LABELS = 5
BASIC = {"depth": 14, "alpha": 15, "bottleneck": False}  # 6 blocks: 18.5, 21, 23.5, 26, 28.5, 31 channels
BOTTLENECK = {"depth": 20, "alpha": 10, "bottleneck": True}


def build(**overrides: Any) -> PyramidNetForImageClassification:
    """A small model in double precision and evaluation mode, with nothing at 0 or 1 where a mistake could hide."""
    torch.manual_seed(0)
    values = {**BASIC, "num_labels": NUM_LABELS, **overrides}
    model = PyramidNetForImageClassification(PyramidNetConfig(**values)).double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 1.5)
        model.classifier.bias.normal_()
    return model


# ---------------------------------------------------------------------------------------------------- configuration


def widths_by_hand(depth: int, alpha: int, bottleneck: bool) -> list[int]:
    """Channels of each block's 3x3 convolutions: the exact width, rounded half up in whole numbers."""
    num_blocks = (depth - 2) // (9 if bottleneck else 6) * 3
    return [(2 * (16 * num_blocks + alpha * (i + 1)) + num_blocks) // (2 * num_blocks) for i in range(num_blocks)]


def count_by_hand(depth: int, alpha: int, bottleneck: bool, num_labels: int) -> tuple[int, int]:
    """Weights of the convolutions and the output layer, and those of batch normalisation."""
    weights, normalisation, channels = 3 * 16 * 9, 2 * 16, 16
    for width in widths_by_hand(depth, alpha, bottleneck):
        if bottleneck:
            weights += channels * width + 9 * width * width + 4 * width * width
            normalisation += 2 * (channels + width + width + 4 * width)
            channels = 4 * width
        else:
            weights += 9 * channels * width + 9 * width * width
            normalisation += 2 * (channels + width + width)
            channels = width
    return weights + channels * num_labels + num_labels, normalisation + 2 * channels


def count_normalisation(model: nn.Module) -> int:
    return sum(m.weight.numel() + m.bias.numel() for m in model.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize(
    ("depth", "alpha", "bottleneck", "expected", "paper", "features"),
    [
        (110, 48, False, 1_772_706, 1.7, 64),
        (110, 84, False, 3_904_446, 3.8, 100),
        (110, 270, False, 28_485_477, 28.3, 286),
        (164, 270, True, 27_216_021, 27.0, 1144),
        (200, 240, True, 26_752_702, 26.6, 1024),
        (236, 220, True, 26_969_046, 26.8, 944),
        (272, 200, True, 26_210_842, 26.0, 864),
    ],
)
def test_number_of_parameters(
    depth: int, alpha: int, bottleneck: bool, expected: int, paper: float, features: int
) -> None:
    with torch.device("meta"):
        model = PyramidNetForImageClassification(PyramidNetConfig(depth=depth, alpha=alpha, bottleneck=bottleneck))
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    weights, normalisation = count_by_hand(depth, alpha, bottleneck, num_labels=10)
    assert weights + normalisation == expected
    assert count_normalisation(model) == normalisation
    # The paper's millions leave batch normalisation out: so counted, bottlenecks agree to its one decimal. Its basic
    # rows are up to 0.14 lower, whatever the rounding of the widths: with alpha = 270 there is nothing to round.
    assert abs(weights / 1e6 - paper) < (0.055 if bottleneck else 0.14)
    assert model.classifier.in_features == features


def test_widths_are_rounded_half_up() -> None:
    model = build()
    widths = [block.branch[1].out_channels for stage in model.stages for block in stage]
    assert widths == [19, 21, 24, 26, 29, 31] == widths_by_hand(**BASIC)
    assert [round(16 + 15 * (i + 1) / 6) for i in range(6)] != widths  # Python's rounding goes to even numbers


def test_defaults_are_pyramidnet_272_for_cifar10() -> None:
    config = PyramidNetConfig()
    values = (config.depth, config.alpha, config.bottleneck, config.shakedrop, config.num_channels, config.num_labels)
    assert values == (272, 200, True, 0.5, 3, 10)


@pytest.mark.parametrize("values", [{}, {"num_labels": 2}, {"num_labels": 100, "shakedrop": 0.0}, {"alpha": 3}])
def test_config_survives_saving(tmp_path: Path, values: dict[str, Any]) -> None:
    config = PyramidNetConfig(**values)
    assert config.num_labels == values.get("num_labels", 10)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, PyramidNetConfig)
    unsaved = dict.fromkeys(("_name_or_path", "auto_map"))
    assert {**again.to_dict(), **unsaved} == {**config.to_dict(), **unsaved}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"depth": 112}, r"9 \* n \+ 2 .* `bottleneck=True`, got 112. Take 110 or 119"),
        ({"depth": 109, "bottleneck": False}, r"6 \* n \+ 2 .* `bottleneck=False`, got 109. Take 104 or 110"),
        ({"depth": 2}, "got 2. Take 11 or 20"),
        ({"alpha": -1}, "`alpha` must be at least 0, got -1"),
        ({"num_channels": 0}, "`num_channels` must be at least 1"),
        ({"num_labels": 0}, "`num_labels` must be at least 1"),
        ({"shakedrop": 1.0}, r"`shakedrop` must lie in \[0, 1\), got 1.0"),
    ],
)
def test_config_refuses_values_that_describe_no_model(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PyramidNetConfig(**values)


def test_values_assigned_after_the_config_was_made_are_checked_too() -> None:
    config = PyramidNetConfig()
    config.bottleneck = False
    config.depth = 111
    with pytest.raises(ValueError, match="Take 110 or 116"):
        PyramidNetForImageClassification(config)


def test_initialisation() -> None:
    model = PyramidNetForImageClassification(PyramidNetConfig(depth=11, alpha=240))
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.bias is None
            if module.weight.numel() > 5000:  # fewer are too few to tell
                assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05), name
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all() and module.momentum == 0.1
            assert (module.running_mean == 0).all() and (module.running_var == 1).all()
    bound = 1024**-0.5
    assert 0.95 * bound < model.classifier.weight.abs().max() <= bound
    assert model.classifier.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert (model.classifier.bias == 0).all()


# ------------------------------------------------------------------------------------------------ forward and loss


class Plain:
    """The network recomputed from its state dict: normalisation by its formula, blocks by the paper's figure."""

    def __init__(self, model: PyramidNetForImageClassification, training: bool) -> None:
        self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        for name, _ in model.named_parameters():
            self.weights[name].requires_grad_()
        self.config, self.training = model.config, training
        self.running: dict[str, torch.Tensor] = {}  # statistics after the pass

    def normalise(self, x: torch.Tensor, name: str) -> torch.Tensor:
        w = self.weights
        mean, variance = w[f"{name}.running_mean"], w[f"{name}.running_var"]
        if self.training:
            seen_mean, count = x.mean(dim=(0, 2, 3)), x.numel() // x.shape[1]
            seen_variance = ((x - seen_mean[:, None, None]) ** 2).mean(dim=(0, 2, 3))
            self.running[f"{name}.running_mean"] = 0.9 * mean + 0.1 * seen_mean.detach()
            self.running[f"{name}.running_var"] = 0.9 * variance + 0.1 * seen_variance.detach() * count / (count - 1)
            mean, variance = seen_mean, seen_variance
        scale = w[f"{name}.weight"] / (variance + 1e-5).sqrt()
        return (x - mean[:, None, None]) * scale[:, None, None] + w[f"{name}.bias"][:, None, None]

    def block(self, x: torch.Tensor, name: str, stride: int) -> torch.Tensor:
        y = self.normalise(x, f"{name}.0")
        if self.config.bottleneck:
            y = torch.einsum("bchw,oc->bohw", y, self.weights[f"{name}.1.weight"][..., 0, 0])
            y = self.normalise(y, f"{name}.2").clamp(min=0)
            y = F.conv2d(y, self.weights[f"{name}.4.weight"], stride=stride, padding=1)
            y = self.normalise(y, f"{name}.5").clamp(min=0)
            y = torch.einsum("bchw,oc->bohw", y, self.weights[f"{name}.7.weight"][..., 0, 0])
            y = self.normalise(y, f"{name}.8")
        else:
            y = F.conv2d(y, self.weights[f"{name}.1.weight"], stride=stride, padding=1)
            y = self.normalise(y, f"{name}.2").clamp(min=0)
            y = F.conv2d(y, self.weights[f"{name}.4.weight"], padding=1)
            y = self.normalise(y, f"{name}.5")
        return y

    def shortcut(self, x: torch.Tensor, out_channels: int, stride: int) -> torch.Tensor:
        if stride == 2:
            # The mean of each 2x2 window, of what there is of it at an odd border.
            windows = [
                [x[:, :, i : i + 2, j : j + 2] for j in range(0, x.shape[3], 2)] for i in range(0, x.shape[2], 2)
            ]
            x = torch.stack([torch.stack([cell.mean(dim=(2, 3)) for cell in row], dim=-1) for row in windows], dim=-2)
        zeros = x.new_zeros(x.shape[0], out_channels - x.shape[1], *x.shape[2:])
        return torch.cat([x, zeros], dim=1)

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        w, config = self.weights, self.config
        x = self.normalise(F.conv2d(images, w["stem.weight"], padding=1), "stem_bn")
        blocks_a_stage = (config.depth - 2) // (9 if config.bottleneck else 6)
        for number in range(1, 3 * blocks_a_stage + 1):
            stage, index = divmod(number - 1, blocks_a_stage)
            stride = 2 if stage > 0 and index == 0 else 1
            residual = self.block(x, f"stages.{stage}.{index}.branch", stride)
            expectation = 1 - config.shakedrop * number / (3 * blocks_a_stage)
            x = residual * expectation + self.shortcut(x, residual.shape[1], stride)
        x = self.normalise(x, "bn").clamp(min=0)
        return x.sum(dim=(2, 3)) / x[0, 0].numel() @ w["classifier.weight"].T + w["classifier.bias"]


@pytest.mark.parametrize(("training", "shakedrop"), [(False, 0.5), (True, 0.0)])
@pytest.mark.parametrize(
    ("values", "size"), [(BASIC, (8, 8)), (BOTTLENECK, (8, 8)), ({**BOTTLENECK, "num_channels": 1}, (7, 10))]
)
def test_forward_gradients_and_statistics_equal_a_plain_recomputation(
    values: dict[str, Any], size: tuple[int, int], training: bool, shakedrop: float
) -> None:
    model = build(**values, shakedrop=shakedrop).train(training)
    plain = Plain(model, training)
    images, labels = random_images(3, model.config.num_channels, *size), torch.tensor([0, 4, 2])

    output = model(images, labels=labels)
    logits = plain.logits(images)
    torch.testing.assert_close(output.logits, logits, rtol=0, atol=1e-12)
    loss = (logits.exp().sum(dim=1).log() - logits[torch.arange(3), labels]).mean()
    torch.testing.assert_close(output.loss, loss, rtol=0, atol=1e-12)

    output.loss.backward()
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain.weights[name].grad, rtol=1e-9, atol=1e-12, msg=name)
    assert bool(plain.running) == training
    for name, value in plain.running.items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=1e-12, msg=name)


def test_num_items_in_batch_divides_the_summed_loss() -> None:
    model = build()
    images, labels = random_images(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    mean = model(images, labels=labels).loss
    scaled = model(images, labels=labels, num_items_in_batch=torch.tensor(10)).loss
    torch.testing.assert_close(scaled, mean * 4 / 10)


def test_tuples_and_what_is_left_out() -> None:
    model = build()
    images = random_images(2, 3, 8, 8)
    output = model(images)
    assert output.loss is None and list(output) == ["logits"]
    loss, logits = model(images, labels=torch.tensor([0, 1]), return_dict=False)
    assert loss.ndim == 0 and torch.equal(logits, output.logits)


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (3, 8, 8), (2, 8, 8, 3)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must have the shape \(batch_size, 3, height, width\), got"):
        build()(random_images(*shape))


def test_channels_last_gives_the_same_logits() -> None:
    model, images = build(**BOTTLENECK), random_images(2, 3, 8, 8)
    expected = model(images).logits
    layouts = []
    model.bn.register_forward_pre_hook(
        lambda module, args: layouts.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    model.to(memory_format=torch.channels_last)
    logits = model(images.to(memory_format=torch.channels_last)).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    assert layouts == [True]


@pytest.mark.slow
@pytest.mark.parametrize(("training", "shakedrop", "backend"), [(False, 0.5, "aot_eager"), (True, 0.0, "inductor")])
def test_compiles_as_one_graph(training: bool, shakedrop: float, backend: str) -> None:
    model = build(depth=11, alpha=6, bottleneck=True, shakedrop=shakedrop).train(training)
    plain = Plain(model, training)
    images, labels = random_images(3, 3, 8, 8), torch.tensor([0, 4, 2])
    output = torch.compile(model, fullgraph=True, backend=backend)(images, labels=labels)
    torch.testing.assert_close(output.logits, plain.logits(images), rtol=0, atol=1e-12)
    output.loss.backward()
    F.cross_entropy(plain.logits(images), labels).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain.weights[name].grad, rtol=1e-9, atol=1e-12, msg=name)


# ------------------------------------------------------------------------------------------------------- ShakeDrop


def scales(module: nn.Module, num_batches: int) -> tuple[torch.Tensor, torch.Tensor]:
    """By what the branch and its gradient are multiplied, `[num_batches, 8]` each: one scale an image."""
    forward, backward = [], []
    for seed in range(num_batches):
        branch = random_images(8, 3, 2, 2, seed=seed).requires_grad_()
        arriving = random_images(8, 3, 2, 2, seed=seed + num_batches)
        output = module(branch)
        output.backward(arriving)
        for found, numerator, denominator in ((forward, output.detach(), branch), (backward, branch.grad, arriving)):
            ratio = (numerator / denominator.detach()).flatten(1)
            torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-9, atol=1e-9)
            found.append(ratio[:, 0])
    return torch.stack(forward), torch.stack(backward)


def test_shakedrop_scales_values_by_alpha_and_gradients_by_beta() -> None:
    torch.manual_seed(0)
    num_batches = 1500
    forward, backward = scales(ShakeDrop(0.3).train(), num_batches)
    kept = ((forward - 1).abs() < 1e-9).all(dim=1)
    assert torch.equal(kept, ((backward - 1).abs() < 1e-9).all(dim=1))
    # Four standard deviations of a mean of so many draws, for each of the means below.
    assert kept.double().mean().item() == pytest.approx(0.7, abs=4 * math.sqrt(0.3 * 0.7 / num_batches))

    alpha, beta = forward[~kept], backward[~kept]  # one draw an image, all images of a disturbed batch
    tolerance = 4 / math.sqrt(alpha.numel())
    for drawn, low, high in ((alpha, -1.0, 1.0), (beta, 0.0, 1.0)):
        assert low - 1e-9 <= drawn.min() < low + 0.02 and high - 0.02 < drawn.max() <= high + 1e-9
        width = high - low
        assert drawn.mean().item() == pytest.approx((low + high) / 2, abs=tolerance * width / math.sqrt(12))
        assert drawn.var().item() == pytest.approx(width**2 / 12, rel=tolerance)
        assert drawn.flatten().unique().numel() == drawn.numel()
    assert abs(torch.corrcoef(torch.stack([alpha.flatten(), beta.flatten()]))[0, 1]) < tolerance

    # What evaluation multiplies by is what training multiplies by in the mean.
    spread = forward.mean(dim=1).std().item() / math.sqrt(num_batches)
    assert forward.mean().item() == pytest.approx(0.7, abs=4 * spread)


def test_shakedrop_in_evaluation_is_the_expectation() -> None:
    forward, backward = scales(ShakeDrop(0.3).eval(), 2)
    torch.testing.assert_close(forward, torch.full_like(forward, 0.7))
    torch.testing.assert_close(backward, torch.full_like(backward, 0.7))


@pytest.mark.parametrize("training", [False, True])
def test_shakedrop_of_probability_0_draws_nothing(training: bool) -> None:
    branch = random_images(2, 3, 2, 2)
    before = torch.get_rng_state()
    assert ShakeDrop(0.0).train(training)(branch) is branch
    assert torch.equal(torch.get_rng_state(), before)


def test_shakedrops_probability_rises_linearly_to_the_last_block() -> None:
    model = build(**BOTTLENECK, shakedrop=0.3)
    found = [module.drop_probability for module in model.modules() if isinstance(module, ShakeDrop)]
    assert found == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.25, 0.3])


def test_shakedrop_disturbs_the_branch_and_leaves_the_shortcut() -> None:
    model = build(shakedrop=0.9).train()
    block, images = model.stages[2][1], random_images(4, 29, 4, 4)
    shortcut = F.pad(images, (0, 0, 0, 0, 0, 2))
    torch.manual_seed(0)
    residuals = torch.stack([block(images) - shortcut for _ in range(20)])
    plain = block.branch(images)
    ratio = (residuals / plain).flatten(2)
    assert (ratio.amax(dim=2) - ratio.amin(dim=2)).max() < 1e-6  # one scale an image
    assert ratio[..., 0].std() > 0.3 and ratio.abs().max() < 1 + 1e-6


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_shakedrop_compiles_as_one_graph(backend: str) -> None:
    torch.manual_seed(0)
    forward, backward = scales(torch.compile(ShakeDrop(0.5).train(), fullgraph=True, backend=backend), 40)
    disturbed = (forward - 1).abs() > 1e-9
    assert 5 < disturbed.all(dim=1).sum() < 35
    assert forward[disturbed].min() < -0.8 and backward.min() >= 0 and (forward - backward)[disturbed].abs().min() > 0


# ---------------------------------------------------------------------------------------------- saving and loading


def test_reload_is_exact(tmp_path: Path) -> None:
    model = build(**BOTTLENECK)
    assert type(model) is PyramidNetForImageClassification
    check_reload_is_exact(model, tmp_path)


def test_missing_weights_are_initialised_and_their_neighbours_kept(tmp_path: Path) -> None:
    check_missing_weights(build(), tmp_path, "stages.1.0.branch.2.weight", "stages.1.0.branch.1.weight")


def test_another_number_of_classes_makes_a_new_output_layer_only(tmp_path: Path) -> None:
    check_new_output_layer(build(), tmp_path, features=31)


def test_the_folder_loads_where_the_library_is_absent(tmp_path: Path) -> None:
    check_loads_without_the_library(build(**BOTTLENECK), tmp_path, "modeling_pyramidnet.py")


# -------------------------------------------------------------------------------------------------------- trainers


def arguments(folder: Path, **overrides: Any) -> TrainingArguments:
    values = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        **overrides,
    }
    return TrainingArguments(**values)


def rows(number: int) -> list[dict[str, Any]]:
    images = random_images(number, 3, 8, 8).float()
    return [{"pixel_values": image, "labels": index % NUM_LABELS} for index, image in enumerate(images)]


def test_trainer_trains_evaluates_and_predicts(tmp_path: Path) -> None:
    model = PyramidNetForImageClassification(PyramidNetConfig(**BASIC, num_labels=NUM_LABELS))
    data = rows(8)
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=data, eval_dataset=data)
    assert trainer.label_names == ["labels"]
    assert trainer.model_accepts_loss_kwargs  # num_items_in_batch reaches the loss
    # No batch normalisation is exempt from weight decay for its name, while others are not.
    decayed = trainer.get_decay_parameter_names(model)
    assert {name for name, _ in model.named_parameters() if name not in decayed} == {
        name for name, _ in model.named_parameters() if name.endswith(".bias")
    }

    before = [parameter.clone() for parameter in model.parameters()]
    trainer.train()
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    predictions = trainer.predict(data).predictions
    assert predictions.shape == (8, NUM_LABELS)
    images = torch.stack([row["pixel_values"] for row in data])
    torch.testing.assert_close(torch.tensor(predictions), model.eval()(images).logits, rtol=0, atol=1e-4)


def test_late_phase_trainer_saves_a_stock_model(tmp_path: Path) -> None:
    model = PyramidNetForImageClassification(PyramidNetConfig(**BASIC, num_labels=NUM_LABELS))
    config = LatePhaseConfig(num_members=2, weights=["head"], late_phase_start=0)
    trainer = LatePhaseTrainer(
        model=model, args=arguments(tmp_path), late_phase_config=config, train_dataset=rows(8), eval_dataset=rows(8)
    )
    assert [target.key for target in trainer.late_phase.targets] == ["classifier.weight", "classifier.bias"]
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(tmp_path / "out"))
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert type(again) is PyramidNetForImageClassification
    images = torch.stack([row["pixel_values"] for row in rows(8)])
    labels = torch.tensor([row["labels"] for row in rows(8)])
    assert again(images, labels=labels).loss.item() == pytest.approx(loss, rel=1e-4)


def test_activation_checkpointing_is_refused(tmp_path: Path) -> None:
    trainer = Trainer(model=build(), args=arguments(tmp_path, **{CHECKPOINTING: True}), train_dataset=rows(4))
    with pytest.raises(ValueError, match="PyramidNetForImageClassification does not support"):
        trainer.train()
