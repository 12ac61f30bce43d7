"""
How flat the loss is around trained image classifiers: along random directions, and by the largest eigenvalues of the
Hessian.

    python examples/benchmarks/evidence/flatness.py --models outputs/cifar_digits/late_phase outputs/cifar_digits/base
    python examples/benchmarks/evidence/flatness.py --dataset path/to/folder \
        --models seed0/late_phase seed1/late_phase seed0/base seed1/base

Takes stock models, as `run_cifar.py` saves them. Folders of the same name are runs of one method (`--names` says
otherwise), summed up by their mean and spread. The loss is the cross entropy, without weight decay, on a random
subset of the training images without augmentation. Writes `flatness.json` and `flatness.png`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, HfArgumentParser

import hf_latephase.models  # noqa: F401  # makes wide_resnet and pyramidnet known to the Auto classes
from hf_latephase.analysis import hessian_eigenvalues, loss_along_directions
from hf_latephase.data.augmentation import DecodedImages, channel_statistics
from hf_latephase.data.decoding import decode_images
from hf_latephase.data.vision import load_images


matplotlib.use("Agg")  # before pyplot: the machine may have no display

from matplotlib import pyplot as plt  # noqa: E402


# Of Okabe and Ito: colour-blind people tell them apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


@dataclass
class FlatnessArguments:
    """The models, the images, and how finely to look."""

    models: list[str] = field(metadata={"help": "Folders of saved image classifiers."})
    names: list[str] | None = field(
        default=None, metadata={"help": "A name for each model, equal for runs of one method. Default: the folders'."}
    )
    dataset: str | None = field(
        default=None,
        metadata={"help": "What the models were trained on: a folder, or a data set of the Hub. Default: digits."},
    )
    image_size: int = field(default=32, metadata={"help": "As in training."})
    validation_share: float = field(default=0.0, metadata={"help": "As in training."})
    num_images: int = field(default=512, metadata={"help": "Training images that the loss is the mean over."})
    batch_size: int = field(default=128, metadata={"help": "Images at a time; does not change the figures."})
    num_directions: int = 10
    max_distance: float = field(default=0.5, metadata={"help": "1 is as far as the norm of each filter."})
    num_steps: int = field(default=5, metadata={"help": "Distances looked at on each side of the model."})
    num_eigenvalues: int = 5
    seed: int = field(default=0, metadata={"help": "Chooses the images and the directions."})
    device: str = field(default="cpu", metadata={"help": "Where to compute: cpu, cuda, ..."})
    output_dir: str = "outputs/flatness"

    def __post_init__(self) -> None:
        for name in ("num_images", "batch_size", "num_directions", "num_steps", "num_eigenvalues"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.max_distance <= 0:
            raise ValueError(f"max_distance must be above 0, got {self.max_distance}.")
        for folder in self.models:
            if not (Path(folder) / "config.json").is_file():
                raise ValueError(f"{folder} holds no saved model (config.json). Name a folder made by save_model().")
        if self.names is None:
            self.names = [Path(folder).resolve().name for folder in self.models]
        if len(self.names) != len(self.models):
            raise ValueError(f"There are {len(self.models)} models, but {len(self.names)} names. Give each one name.")

    @property
    def distances(self) -> list[float]:
        """From one side to the other; the model itself is in the middle."""
        return torch.linspace(-self.max_distance, self.max_distance, 2 * self.num_steps + 1).tolist()


@dataclass
class Flatness:
    """What was found around one model."""

    name: str
    model: str
    losses: list[list[float]]  # a row a direction, a column a distance
    eigenvalues: list[float]  # largest first


def load_batches(arguments: FlatnessArguments) -> list[dict[str, Tensor]]:
    """The subset of the training images, normalised as in training."""
    splits = load_images(arguments.dataset, arguments.validation_share)
    decoded = decode_images(splits.train, splits.image_column, arguments.image_size, "the training images")
    images = DecodedImages(decoded, splits.labels(splits.train), *channel_statistics(decoded))
    generator = torch.Generator().manual_seed(arguments.seed)
    chosen = torch.randperm(len(images), generator=generator)[: arguments.num_images]
    return [
        {
            "pixel_values": images.pixel_values(rows).to(arguments.device),
            "labels": splits.labels(splits.train)[rows].to(arguments.device),
        }
        for rows in chosen.split(arguments.batch_size)
    ]


def load_models(arguments: FlatnessArguments, batches: list[dict[str, Tensor]]) -> list[nn.Module]:
    """The models, all of which know the classes of the images."""
    classes = max(int(batch["labels"].max()) for batch in batches) + 1
    models = []
    for folder in arguments.models:
        model = AutoModelForImageClassification.from_pretrained(folder)
        if model.config.num_labels < classes:
            raise ValueError(
                f"{folder} tells {model.config.num_labels} classes apart, but the images have at least {classes}. "
                "Name with --dataset the data that it was trained on."
            )
        models.append(model.to(arguments.device))
    return models


def cross_entropy(call: Callable[..., Any], batch: dict[str, Tensor]) -> Tensor:
    """The mean loss of a batch."""
    return nn.functional.cross_entropy(call(pixel_values=batch["pixel_values"]).logits, batch["labels"])


def measure(arguments: FlatnessArguments) -> list[Flatness]:
    """Looks around every model, in equal directions where the architectures are equal."""
    batches = load_batches(arguments)
    results = []
    for name, folder, model in zip(
        arguments.names or [], arguments.models, load_models(arguments, batches), strict=True
    ):
        print(f"\n== {name}: {folder}", flush=True)
        losses = loss_along_directions(
            model,
            cross_entropy,
            batches,
            arguments.distances,
            num_directions=arguments.num_directions,
            seed=arguments.seed,
            disable_tqdm=False,
        )
        eigenvalues = hessian_eigenvalues(
            model,
            cross_entropy,
            batches,
            num_eigenvalues=arguments.num_eigenvalues,
            seed=arguments.seed,
            disable_tqdm=False,
        )
        results.append(Flatness(name, folder, losses.tolist(), eigenvalues.tolist()))
    return results


def by_name(results: list[Flatness]) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each method the losses `[runs x directions, distances]` and the eigenvalues `[runs, number]`."""
    groups = {}
    for name in dict.fromkeys(result.name for result in results):
        own = [result for result in results if result.name == name]
        losses = torch.tensor([row for result in own for row in result.losses], dtype=torch.float64)
        groups[name] = losses, torch.tensor([result.eigenvalues for result in own], dtype=torch.float64)
    return groups


def spread(values: Tensor) -> Tensor:
    """Standard deviation over the rows, of the sample; 0 for one row."""
    return values.std(0, correction=min(1, len(values) - 1))


def table(results: list[Flatness], distances: list[float]) -> str:
    """Loss at the model and at both ends, and the largest eigenvalue, in Markdown."""
    header = ["method", "loss", f"loss at ±{distances[-1]:g}", "largest eigenvalue", "trained models"]
    lines = [header, ["---", *["---:"] * 4]]
    for name, (losses, eigenvalues) in by_name(results).items():
        middle, ends = losses[:, len(distances) // 2], losses[:, [0, -1]].flatten()
        figures = [f"{v.mean():.4g} ± {spread(v):.2g}" for v in (ends, eigenvalues[:, 0])]
        lines.append([name, f"{middle.mean():.4g}", *figures, str(len(eigenvalues))])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot(results: list[Flatness], distances: list[float], path: Path) -> None:
    """Left the loss along the directions, mean and standard deviation; right the eigenvalues."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    groups = by_name(results)
    width = 0.8 / len(groups)
    for index, (name, (losses, eigenvalues)) in enumerate(groups.items()):
        colour, mean, deviation = COLOURS[index % len(COLOURS)], losses.mean(0).numpy(), spread(losses).numpy()
        # Ever narrower, their bars beside each other: curves that lie on each other are all seen.
        left.plot(distances, mean, color=colour, linewidth=len(groups) + 1 - index, label=name)
        beside = [distance + 0.012 * (index - (len(groups) - 1) / 2) for distance in distances]
        left.errorbar(beside, mean, deviation, color=colour, fmt="none", capsize=3, elinewidth=1)
        ranks = torch.arange(1, eigenvalues.shape[1] + 1) + (index - (len(groups) - 1) / 2) * width
        heights, errors = eigenvalues.mean(0).numpy(), spread(eigenvalues).numpy()
        right.bar(ranks.numpy(), heights, width, yerr=errors, color=colour, label=name, capsize=2)
    left.set_xlabel("distance along random directions, in norms of each filter")
    left.set_ylabel("training loss (nats)")
    right.set_xlabel("rank, the largest first")
    right.set_ylabel("eigenvalue of the Hessian")
    right.xaxis.get_major_locator().set_params(integer=True)
    left.legend(loc="upper center", title="mean ± standard deviation")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Measures, writes the figures and plots them."""
    (arguments,) = HfArgumentParser(FlatnessArguments, description=__doc__).parse_args_into_dataclasses(argv)
    results = measure(arguments)
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "command": " ".join(["python", *(sys.argv if argv is None else [__file__, *argv])]),
        "settings": asdict(arguments) | {"torch": torch.__version__, "transformers": transformers.__version__},
        "distances": arguments.distances,
        "results": [asdict(result) for result in results],
    }
    (folder / "flatness.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    plot(results, arguments.distances, folder / "flatness.png")
    print(f"\n{table(results, arguments.distances)}\n\nIn {folder}: flatness.json, flatness.png.")


if __name__ == "__main__":
    main()
