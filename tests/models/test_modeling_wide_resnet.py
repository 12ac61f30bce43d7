"""The wide residual network: its numbers against a plain recomputation, saving, and the two trainers."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, Trainer, TrainingArguments

from hf_latephase import LatePhaseConfig, LatePhaseTrainer
from hf_latephase.models import WideResNetConfig, WideResNetForImageClassification
from image_models import (
    check_loads_without_the_library,
    check_missing_weights,
    check_new_output_layer,
    check_reload_is_exact,
    random_images,
)
from tiny import CHECKPOINTING


NUM_LABELS = 5


def build(**overrides: Any) -> WideResNetForImageClassification:
    """A small model in double precision and evaluation mode, with nothing at 0 or 1 where a mistake could hide."""
    torch.manual_seed(0)
    values = {"depth": 10, "widen_factor": 1, "num_labels": NUM_LABELS, **overrides}
    model = WideResNetForImageClassification(WideResNetConfig(**values)).double().eval()
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


def count_by_hand(depth: int, k: int, num_labels: int) -> int:
    """Weights of the convolutions and of batch normalisation, block by block."""
    total, channels = 3 * 16 * 9, 16
    for width in (16 * k, 32 * k, 64 * k):
        for _ in range((depth - 4) // 6):
            total += 2 * channels + 9 * channels * width + 2 * width + 9 * width * width
            if channels != width:
                total += channels * width
            channels = width
    return total + 2 * channels + channels * num_labels + num_labels


@pytest.mark.parametrize(
    ("depth", "widen_factor", "num_labels", "expected"),
    [
        (28, 10, 10, 36_479_194),
        (28, 14, 10, 71_470_810),
        (28, 10, 100, 36_536_884),
        (16, 2, 10, 691_674),
        (10, 1, 10, 77_850),
    ],
)
def test_number_of_parameters(depth: int, widen_factor: int, num_labels: int, expected: int) -> None:
    config = WideResNetConfig(depth=depth, widen_factor=widen_factor, num_labels=num_labels)
    with torch.device("meta"):
        model = WideResNetForImageClassification(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert count_by_hand(depth, widen_factor, num_labels) == expected
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("depth", "widen_factor", "millions"),
    [(40, 1, 0.6), (40, 2, 2.2), (40, 4, 8.9), (40, 8, 35.7), (22, 8, 17.2), (16, 8, 11.0), (28, 12, 52.5)],
)
def test_sizes_of_the_papers_table(depth: int, widen_factor: int, millions: float) -> None:
    with torch.device("meta"):
        model = WideResNetForImageClassification(WideResNetConfig(depth=depth, widen_factor=widen_factor))
    assert round(model.num_parameters() / 1e6, 1) == millions


def test_defaults_are_wrn_28_10_for_cifar10() -> None:
    config = WideResNetConfig()
    values = (config.depth, config.widen_factor, config.num_channels, config.dropout, config.num_labels)
    assert values == (28, 10, 3, 0.0, 10)


@pytest.mark.parametrize(
    "values",
    [{}, {"num_labels": 2}, {"num_labels": 100, "dropout": 0.3}, {"id2label": {0: "cat", 1: "dog", 2: "owl"}}],
)
def test_config_survives_saving(tmp_path: Path, values: dict[str, Any]) -> None:
    config = WideResNetConfig(depth=16, **values)
    assert config.num_labels == values.get("num_labels", len(values.get("id2label", range(10))))
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, WideResNetConfig)
    unsaved = dict.fromkeys(("_name_or_path", "auto_map"))
    assert {**again.to_dict(), **unsaved} == {**config.to_dict(), **unsaved}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"depth": 29}, r"6 \* n \+ 4 .*, got 29. Take 28 or 34"),
        ({"depth": 4}, r"got 4. Take 10 or 16"),
        ({"widen_factor": 0}, "`widen_factor` must be at least 1, got 0"),
        ({"num_channels": 0}, "`num_channels` must be at least 1"),
        ({"num_labels": 0}, "`num_labels` must be at least 1"),
        ({"dropout": 1.0}, r"`dropout` must lie in \[0, 1\), got 1.0"),
    ],
)
def test_config_refuses_values_that_describe_no_model(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WideResNetConfig(**values)


def test_values_assigned_after_the_config_was_made_are_checked_too() -> None:
    config = WideResNetConfig()
    config.depth = 27
    with pytest.raises(ValueError, match="Take 22 or 28"):
        WideResNetForImageClassification(config)


def test_initialisation() -> None:
    model = WideResNetForImageClassification(WideResNetConfig(depth=10, widen_factor=4))
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.bias is None
            if name != "stem":  # too few to tell
                assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05), name
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all() and module.momentum == 0.1
            assert (module.running_mean == 0).all() and (module.running_var == 1).all()
    bound = 256**-0.5
    assert 0.95 * bound < model.classifier.weight.abs().max() <= bound
    assert model.classifier.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert (model.classifier.bias == 0).all()


# ------------------------------------------------------------------------------------------------ forward and loss


class Plain:
    """The network recomputed from its state dict: normalisation by its formula, blocks by the paper's table."""

    def __init__(self, model: WideResNetForImageClassification, training: bool) -> None:
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

    def block(self, x: torch.Tensor, name: str, first: bool, stride: int) -> torch.Tensor:
        w = self.weights
        ready = self.normalise(x, f"{name}.bn1").clamp(min=0)
        if first and (stride > 1 or self.config.widen_factor > 1):
            x = torch.einsum(
                "bchw,oc->bohw", ready[:, :, ::stride, ::stride], w[f"{name}.projection.weight"][..., 0, 0]
            )
        else:
            assert f"{name}.projection.weight" not in w
        y = F.conv2d(ready, w[f"{name}.conv1.weight"], stride=stride, padding=1)
        y = self.normalise(y, f"{name}.bn2").clamp(min=0)
        return x + F.conv2d(y, w[f"{name}.conv2.weight"], padding=1)

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        w = self.weights
        x = F.conv2d(images, w["stem.weight"], padding=1)
        for stage in range(3):
            for index in range((self.config.depth - 4) // 6):
                stride = 2 if stage > 0 and index == 0 else 1
                x = self.block(x, f"stages.{stage}.{index}", index == 0, stride)
        x = self.normalise(x, "bn").clamp(min=0)
        return x.sum(dim=(2, 3)) / x[0, 0].numel() @ w["classifier.weight"].T + w["classifier.bias"]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("values", "size"), [({}, (8, 8)), ({"depth": 16, "widen_factor": 2}, (8, 8)), ({"num_channels": 1}, (7, 10))]
)
def test_forward_gradients_and_statistics_equal_a_plain_recomputation(
    values: dict[str, Any], size: tuple[int, int], training: bool
) -> None:
    model = build(**values).train(training)
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


def test_dropout_lies_between_the_convolutions_and_acts_in_training_only() -> None:
    model, without = build(dropout=0.5), build()
    images = random_images(4, 3, 16, 16)
    assert torch.equal(model(images).logits, without(images).logits)

    def record(model: WideResNetForImageClassification) -> dict[str, torch.Tensor]:
        inputs: dict[str, torch.Tensor] = {}
        for name, module in model.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_pre_hook(lambda module, args, name=name: inputs.update({name: args[0]}))
        model.train()(images)
        return inputs

    dropped, plain = record(model), record(without)
    block = "stages.0.0"
    assert torch.equal(dropped[f"{block}.conv1"], plain[f"{block}.conv1"])
    share = dropped[f"{block}.conv2"] / plain[f"{block}.conv2"]  # 0 or 2; nan where ReLU gave 0
    share = share[~share.isnan()]
    torch.testing.assert_close(share.unique(), torch.tensor([0.0, 2.0]).double())
    assert share.mean().item() == pytest.approx(1.0, abs=0.05)
    for name, value in dropped.items():
        zeros = (value == 0).double().mean().item()
        assert (zeros > 0.65) == name.endswith("conv2"), (name, zeros)


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (3, 8, 8), (2, 8, 8, 3)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must have the shape \(batch_size, 3, height, width\), got"):
        build()(random_images(*shape))


def test_channels_last_gives_the_same_logits() -> None:
    model, images = build(widen_factor=2), random_images(2, 3, 8, 8)
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
@pytest.mark.parametrize(("training", "backend"), [(False, "aot_eager"), (True, "inductor")])
def test_compiles_as_one_graph(training: bool, backend: str) -> None:
    model = build().train(training)
    plain = Plain(model, training)
    images, labels = random_images(3, 3, 8, 8), torch.tensor([0, 4, 2])
    output = torch.compile(model, fullgraph=True, backend=backend)(images, labels=labels)
    torch.testing.assert_close(output.logits, plain.logits(images), rtol=0, atol=1e-12)
    output.loss.backward()
    F.cross_entropy(plain.logits(images), labels).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain.weights[name].grad, rtol=1e-9, atol=1e-12, msg=name)


# ---------------------------------------------------------------------------------------------- saving and loading


def test_reload_is_exact(tmp_path: Path) -> None:
    model = build(dropout=0.1)
    assert type(model) is WideResNetForImageClassification
    check_reload_is_exact(model, tmp_path)


def test_missing_weights_are_initialised_and_their_neighbours_kept(tmp_path: Path) -> None:
    check_missing_weights(build(), tmp_path, "stages.1.0.bn2.weight", "stages.1.0.conv1.weight")


def test_another_number_of_classes_makes_a_new_output_layer_only(tmp_path: Path) -> None:
    check_new_output_layer(build(), tmp_path, features=64)


def test_the_folder_loads_where_the_library_is_absent(tmp_path: Path) -> None:
    check_loads_without_the_library(build(), tmp_path, "modeling_wide_resnet.py")


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
    model = WideResNetForImageClassification(WideResNetConfig(depth=10, widen_factor=1, num_labels=NUM_LABELS))
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
    model = WideResNetForImageClassification(WideResNetConfig(depth=10, widen_factor=1, num_labels=NUM_LABELS))
    config = LatePhaseConfig(num_members=2, weights=["head"], late_phase_start=0)
    trainer = LatePhaseTrainer(
        model=model, args=arguments(tmp_path), late_phase_config=config, train_dataset=rows(8), eval_dataset=rows(8)
    )
    assert [target.key for target in trainer.late_phase.targets] == ["classifier.weight", "classifier.bias"]
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(tmp_path / "out"))
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert type(again) is WideResNetForImageClassification
    images = torch.stack([row["pixel_values"] for row in rows(8)])
    labels = torch.tensor([row["labels"] for row in rows(8)])
    assert again(images, labels=labels).loss.item() == pytest.approx(loss, rel=1e-4)


def test_activation_checkpointing_is_refused(tmp_path: Path) -> None:
    trainer = Trainer(model=build(), args=arguments(tmp_path, **{CHECKPOINTING: True}), train_dataset=rows(4))
    with pytest.raises(ValueError, match="WideResNetForImageClassification does not support"):
        trainer.train()
