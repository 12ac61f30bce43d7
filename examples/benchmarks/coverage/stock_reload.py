"""
Reloads saved models with their stock classes in an interpreter that cannot import `hf_latephase`.

`python stock_reload.py FOLDER...` prints a line of JSON for each folder: its name and what is wrong, if anything.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from tiny_models import inputs


TOLERANCE = 1e-5  # relative to the largest logit, where that is above 1
EXPECTED, ROW = "expected.safetensors", "row.json"
MARK = "row: "  # before our lines on stdout, where Trainer writes too


def logits(kind: str, model: Any) -> Tensor:
    """Returns the logits of a model in evaluation mode on a batch that training has not seen."""
    training = model.training
    model.eval()
    batch = {name: value for name, value in inputs(kind, model, seed=100).items() if name != "labels"}
    torch.manual_seed(0)  # some hash at random in evaluations too
    with torch.no_grad():
        outputs = model(**batch)
    model.train(training)
    return (outputs["logits"] if "logits" in outputs else outputs[0]).detach().clone()


def generated(kind: str, model: Any) -> Tensor:
    """Returns the tokens that a model generates greedily."""
    training = model.training
    model.eval()
    batch = inputs(kind, model, seed=100)
    names = {"labels", "decoder_input_ids", "position_ids"}
    torch.manual_seed(0)
    with torch.no_grad():
        tokens = model.generate(
            **{name: value for name, value in batch.items() if name not in names}, max_new_tokens=3, do_sample=False
        )
    model.train(training)
    return tokens.float() if tokens.is_floating_point() else tokens.long()


def problem(folder: Path) -> str:
    """Reloads one model and says what is wrong with it; nothing, if it is as it should be."""
    row = json.loads((folder / ROW).read_text(encoding="utf-8"))
    expected = load_file(folder / EXPECTED)
    model_class = getattr(transformers, row["class_name"])
    model, info = model_class.from_pretrained(folder, output_loading_info=True)
    for name in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(name):
            return f"{name}: {sorted(map(str, info[name]))[:3]}"
    if list(model.state_dict()) != row["keys"]:
        return "other keys than the stock model"
    size = expected["logits"].abs().max().clamp_min(1)
    difference = ((logits(row["kind"], model) - expected["logits"]).abs().max() / size).item()
    if not difference <= TOLERANCE:
        return f"logits differ by {difference:.1e}"
    if row["generates"] and not torch.equal(generated(row["kind"], model), expected["tokens"]):
        return "generate() gives other tokens"
    return ""


def main(folders: list[str]) -> None:
    """Prints a line for each folder."""
    sys.modules["hf_latephase"] = None  # type: ignore[assignment]  # any import of it fails from here on
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    for folder in folders:
        try:
            wrong = problem(Path(folder))
        except Exception as error:
            wrong = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:150]}"
        print(MARK + json.dumps({"folder": Path(folder).name, "problem": wrong}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
