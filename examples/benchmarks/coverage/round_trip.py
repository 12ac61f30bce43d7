"""Attach, train, average, save: what becomes of one architecture before a fresh interpreter reloads it."""

from __future__ import annotations

import copy
import json
import re
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from hf_latephase import LatePhase, LatePhaseConfig, LatePhaseTrainer
from stock_reload import EXPECTED, MARK, ROW, generated, logits
from tiny_models import build, inputs


FAMILIES: dict[str, list[str]] = {
    "rank1": ["rank1"],
    "norm": ["norm"],
    "rank1+norm": ["rank1", "norm"],
    "head": ["head"],
}
MEMBERS, CYCLES, SECONDS = 2, 2, 180


class WrongResult(Exception):
    """Something did not come out as it should."""


@dataclass
class Row:
    """
    What came of one family on one architecture.

    Attributes:
        kind, architecture, family (`str`): What was tried; the family `"stock"` is plain training of the plain model.
        class_name (`str`): The class of the model.
        layers (`int`): How many modules have late-phase weights.
        result (`str`): `"saved"` until it is reloaded, then `"passed"`; `"no layer"` where the model has none of the
            family, or a tied head; `"failed"`.
        cause (`str`): The stage and the reason of a failure; for `"no layer"`, what the library said.
        missed (`list[str]`): Weights of the family's kind that it leaves alone, as `Class.tensor`.
        generates (`bool`): Whether the class has a `generate()` that works, and so must do so afterwards.
    """

    kind: str
    architecture: str
    family: str
    class_name: str = ""
    layers: int = 0
    result: str = "failed"
    cause: str = ""
    missed: list[str] = field(default_factory=list)
    generates: bool = False

    @property
    def folder(self) -> str:
        """The name of the folder that holds the saved model."""
        return f"{self.kind}-{self.architecture}-{self.family}"


class Batches(Dataset):
    """Whole batches, each another one."""

    def __init__(self, kind: str, model: nn.Module, count: int) -> None:
        self.batches = [inputs(kind, model, seed) for seed in range(count)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.batches[index]


def examine(kind: str, architecture: str, folder: Path, families: list[str] | None = None) -> Iterator[Row]:
    """
    Trains and saves an architecture, first without late-phase weights, then with those of each family.

    Args:
        kind, architecture (`str`): As in `tiny_models.KINDS`.
        folder (`pathlib.Path`): Where models are saved, each with the logits that it should have.
        families (`list[str]`, *optional*): Some of `FAMILIES`; all if left out.

    Yields:
        `Row`: That of the plain model, then one for each family; only the first if the stock library itself fails.
    """
    trip = RoundTrip(kind, architecture, folder)
    stock = trip.run("stock")
    yield stock
    if stock.result == "saved":
        for family in FAMILIES if families is None else families:
            yield trip.run(family)


class RoundTrip:
    """The round trips of one architecture; the stages name where one ended."""

    def __init__(self, kind: str, architecture: str, folder: Path) -> None:
        self.kind, self.architecture, self.folder = kind, architecture, folder
        self.generates = False
        self.stage = ""

    def run(self, family: str) -> Row:
        """Returns the row of a family, whatever happens on the way."""
        row = Row(self.kind, self.architecture, family)
        try:
            with time_limit(SECONDS):
                self.stage = "build"
                model: Any = build(self.kind, self.architecture)
                row.class_name = type(model).__name__
                self._plain(row, model) if family == "stock" else self._late_phase(row, model)
        except Exception as error:
            row.result, row.cause = "failed", f"{self.stage}: {first_line(error)}"
        return row

    def _plain(self, row: Row, model: Any) -> None:
        self.stage = "forward"
        before = self._logits(model)
        self.stage = "train"
        trainer = self._trainer(model, None)
        trainer.train()
        self._check_trained(model, before)
        self.stage = "save"
        self.generates = callable(getattr(model, "can_generate", None)) and model.can_generate()
        if self.generates:
            try:
                generated(self.kind, model)
            except Exception as error:
                self.generates, row.cause = False, f"stock generate(): {first_line(error)}"
        self._save(row, trainer, model, list(model.state_dict()))

    def _late_phase(self, row: Row, model: Any) -> None:
        before = self._logits(model)
        plain = copy.deepcopy(model)  # only now: some change their modules in the first call
        config = LatePhaseConfig(
            num_members=MEMBERS, weights=FAMILIES[row.family], late_phase_start=1, base_gradient_scale=1.0
        )
        self.stage = "attach"
        try:
            late_phase = LatePhase(model, config)
        except ValueError as error:
            check_same(model, plain)
            if has_layers(plain, row.family):
                raise
            row.result, row.cause = "no layer", first_line(error)
            return
        row.layers = len({target.module for target in late_phase.targets})
        row.missed = missed(plain, row.family, {target.key for target in late_phase.targets})
        self._check_untrained(late_phase, plain, before)
        self.stage = "train"
        trainer = self._trainer(model, config)
        trainer.train()
        if not trainer.late_phase.distance_from_mean() > 0:
            if not reached(plain, inputs(self.kind, plain, 0), [target.key for target in trainer.late_phase.targets]):
                row.result, row.cause = "no layer", "none that takes part in a forward pass on these inputs"
                return
            raise WrongResult("the members do not differ")
        trainer.late_phase.activate(None)
        self._check_trained(model, before)
        self.stage = "save"
        self._save(row, trainer, model, list(plain.state_dict()))
        self.stage = "detach"
        averaged = self._logits(model)
        trainer.late_phase.detach()
        check_same(model, plain, values=False)
        if not nearly_equal(self._logits(model), averaged):
            raise WrongResult("the detached model computes something else")

    def _check_untrained(self, late_phase: LatePhase, plain: nn.Module, before: Tensor) -> None:
        """Attaching, releasing and detaching change no weight, and no logit but for its last bit."""
        model = late_phase.model
        late_phase.release()
        for member in (None, *range(MEMBERS)):
            late_phase.activate(member)
            if not nearly_equal(self._logits(model), before):
                raise WrongResult("attaching changed the logits")
        late_phase.detach()
        check_same(model, plain)

    def _check_trained(self, model: nn.Module, before: Tensor) -> None:
        after = self._logits(model)
        if not after.isfinite().all():
            raise WrongResult("the logits are not finite")
        if torch.equal(after, before):
            raise WrongResult("training changed nothing")

    def _trainer(self, model: nn.Module, config: LatePhaseConfig | None) -> Any:
        steps = 1 + CYCLES  # one before T0
        arguments = TrainingArguments(
            str(self.folder / "trainer"), max_steps=steps, gradient_accumulation_steps=MEMBERS, use_cpu=True,
            per_device_train_batch_size=1, remove_unused_columns=False, save_strategy="no", report_to=[],
            disable_tqdm=True, logging_steps=1000, learning_rate=1e-3, dataloader_pin_memory=False,
        )  # fmt: skip
        late: dict[str, Any] = {} if config is None else {"late_phase_config": config}
        batches = Batches(self.kind, model, steps * MEMBERS)
        with torch.no_grad():
            outputs = model(**batches[0])
        if getattr(outputs, "loss", None) is None:
            late["compute_loss_func"] = mean_square
        return (Trainer if config is None else LatePhaseTrainer)(
            model=model, args=arguments, train_dataset=batches, data_collator=_only, **late
        )

    def _save(self, row: Row, trainer: Any, model: Any, keys: list[str]) -> None:
        """Saves the model with the logits, tokens and keys that it should have when it is reloaded."""
        path = self.folder / row.folder
        trainer.save_model(str(path))
        expected = {"logits": self._logits(model).contiguous()}
        if self.generates:
            expected["tokens"] = generated(self.kind, model).contiguous()
        row.generates, row.result = self.generates, "saved"
        save_file(expected, path / EXPECTED)
        (path / ROW).write_text(json.dumps(asdict(row) | {"keys": keys}), encoding="utf-8")
        if row.family != "stock":
            own, stock = (
                saved_tensors(path),
                saved_tensors(self.folder / Row(self.kind, self.architecture, "stock").folder),
            )
            if own != stock:
                raise WrongResult(f"the saved tensors differ from the stock model's: {sorted(own ^ stock)[:3]}")

    def _logits(self, model: Any) -> Tensor:
        return logits(self.kind, model)


def nearly_equal(left: Tensor, right: Tensor) -> bool:
    """
    Equality to a few units in the last place of the largest logit.

    The same weights at another address can give another last bit, with matrix products as they are (seen with wavlm
    and perceiver); `tests/` compare to the bit where they can.
    """
    return bool((left - right).abs().max() <= 4 * torch.finfo(left.dtype).eps * right.abs().max())


def reached(model: nn.Module, batch: dict[str, Any], keys: list[str]) -> bool:
    """Whether any of some parameters has a gradient."""
    outputs = model(**batch)
    loss = getattr(outputs, "loss", None)
    (mean_square(outputs, None) if loss is None else loss).backward()
    parameters = dict(model.named_parameters())
    return any(parameters[key].grad is not None for key in keys)


def mean_square(outputs: Any, labels: Any, **kwargs: Any) -> Tensor:
    """A loss for classes that return none."""
    return (outputs["logits"] if "logits" in outputs else outputs[0]).square().mean()


def check_same(model: nn.Module, plain: nn.Module, values: bool = True) -> None:
    """Raises `WrongResult` unless a model has the classes, the keys and, if asked, the bits of another."""
    if [(n, type(m)) for n, m in model.named_modules()] != [(n, type(m)) for n, m in plain.named_modules()]:
        raise WrongResult("other modules than the stock model")
    own, stock = model.state_dict(), plain.state_dict()
    if list(own) != list(stock):
        raise WrongResult("other keys than the stock model")
    if values and not all(torch.equal(own[key], stock[key]) for key in stock):
        raise WrongResult("other weights than before")


def has_layers(model: nn.Module, family: str) -> bool:
    """Whether late-phase weights of a family should be possible, by rules that know nothing of `hf_latephase`."""
    if family == "head":
        shared = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
        # A bias can be tied as well as a weight.
        return any(all(shared[id(p)] == 1 for p in head.parameters(recurse=False)) for head in output_layers(model))
    return all(missed(model, one, set()) for one in FAMILIES[family])


def missed(model: nn.Module, family: str, replicated: set[str]) -> list[str]:
    """Names the weights of a family's kind that are not replicated: matrices, or vectors of what is called a norm."""
    heads, found = output_layers(model), set()
    for module_name, module in model.named_modules():
        class_name = type(module).__name__
        if family not in ("norm", "rank1") or isinstance(module, nn.Embedding) or module in heads:
            continue
        is_norm = re.search("norm", class_name, re.IGNORECASE) is not None
        for name, parameter in module.named_parameters(recurse=False):
            wanted = is_norm and parameter.ndim == 1 if family == "norm" else parameter.ndim > 1 and not is_norm
            if wanted and f"{module_name}.{name}" not in replicated:
                found.add(f"{class_name}.{name}")
    return sorted(found)


def output_layers(model: Any) -> list[nn.Module]:
    """The layers that give the logits: what transformers calls the output embeddings, else the last linear layer."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if isinstance(head, nn.ModuleList):
        return list(head)
    return [m for m in model.modules() if isinstance(m, nn.Linear)][-1:] if head is None else [head]


def saved_tensors(folder: Path) -> set[tuple[str, str, str]]:
    """Name, dtype and shape of all tensors in a saved model."""
    found = set()
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                found.add((name, part.get_dtype(), str(part.get_shape())))
    return found


def first_line(error: BaseException) -> str:
    """The kind of an error and its first line, short enough for a table."""
    lines = str(error).strip().splitlines() or [""]
    text = lines[0] if type(error).__name__ in ("WrongResult", "ValueError") else f"{type(error).__name__}: {lines[0]}"
    return text if len(text) < 160 else text[:157] + "..."


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Context that raises `TimeoutError` after so many seconds."""

    def interrupt(*args: Any) -> None:
        raise TimeoutError(f"not finished after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _only(rows: list[dict[str, Any]]) -> dict[str, Any]:
    (batch,) = rows
    return batch


def main(folder: str, names: list[str]) -> None:
    """Prints a line of JSON for each row of each architecture, named `kind/architecture`."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for name in names:
        kind, _, architecture = name.partition("/")
        for row in examine(kind, architecture, Path(folder)):
            print(MARK + json.dumps(asdict(row)), flush=True)
        print(MARK + json.dumps({"finished": name}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
