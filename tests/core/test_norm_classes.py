"""Every normalisation layer that transformers defines, as a late-phase weight."""

from __future__ import annotations

import ast
import copy
import functools
import importlib
import inspect
import re
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from hf_latephase import LatePhase, LatePhaseConfig
from hf_latephase.core.weights.norm import is_norm_layer


K, WIDTH = 3, 8
# Arguments for constructors, by name; classes that ask for others are looked up in MADE.
ARGUMENTS = {
    "hidden_size": WIDTH, "dim": WIDTH, "normalized_shape": WIDTH, "size": WIDTH, "c_in": WIDTH, "num_channels": WIDTH,
    "feat_size": WIDTH, "n": WIDTH, "group_size": 4, "n_groups": 2, "num_groups": 2, "bias": True, "num_heads": 2,
    "config": SimpleNamespace(hidden_size=WIDTH, eps=1e-5, num_groups=2, hidden_act="gelu", layer_norm_eps=1e-5),
}  # fmt: skip
MADE: dict[str, dict[str, Any]] = {
    "ChameleonLayerNorm": {"hidden_size": (2, WIDTH)},
    "Gemma3nAudioCumulativeGroupNorm": {"feature_dims": [5]},
}
# Layouts that a class may want, tried in turn: rows first in each.
LAYOUTS = [(6, WIDTH), (WIDTH,), (WIDTH, 5), (WIDTH, WIDTH, WIDTH), (2, 5, WIDTH), (2, 2, WIDTH), (5, WIDTH)]


@functools.cache
def definitions() -> dict[str, list[tuple[str, str]]]:
    """(module, class) of all classes with "norm" in their name, grouped by what they compute; read, not imported."""
    root = Path(transformers.__file__).parent
    same = defaultdict(list)
    for path in sorted(root.glob("models/*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        if not re.search(r"^class \w*[Nn]orm", text, re.MULTILINE):
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef) and re.search("norm", node.name, re.IGNORECASE):
                bases = ", ".join(ast.unparse(base) for base in node.bases)
                source = [
                    ast.unparse(n) for n in node.body if isinstance(n, ast.FunctionDef) and n.name != "extra_repr"
                ]
                key = re.sub(
                    r'(""".*?"""|->[^:]*|: [\w.\[\]| ]+(?==|,|\)))', "", "\n".join([bases, *source]), flags=re.DOTALL
                )
                same[key.replace(node.name, "X")].append(
                    (f"transformers.models.{path.parent.name}.{path.stem}", node.name)
                )
    return same


@functools.cache
def layers() -> dict[str, nn.Module]:
    """One instance of each distinct leaf class with vectors as parameters."""
    found = {}
    for (module, name), *_ in definitions().values():
        try:
            layer_class = getattr(importlib.import_module(module), name)
        except ModuleNotFoundError:  # of tensorflow, by a model of transformers 4
            continue
        if not issubclass(layer_class, nn.Module):
            continue
        layer = construct(layer_class)
        if layer is not None and not list(layer.children()) and list(layer.parameters()):
            found[f"{module.split('.')[2]}.{name}"] = layer
    return found


def construct(layer_class: type) -> nn.Module | None:
    kwargs = {}
    for parameter in inspect.signature(layer_class).parameters.values():
        given = MADE.get(layer_class.__name__, {})
        if parameter.name in {**ARGUMENTS, **given}:
            kwargs[parameter.name] = given.get(parameter.name, ARGUMENTS.get(parameter.name))
    try:
        return layer_class(**kwargs)
    except (AttributeError, TypeError, KeyError):
        return None  # a block that wants a whole config


def rows_for(layer: nn.Module) -> list[Tensor]:
    """Inputs that the layer takes: rows of some layout, and a gate of the same shape if it wants one."""
    names = [p.name for p in inspect.signature(layer.forward).parameters.values()]
    gates = ["gate"] if "gate" in names else []
    errors = []
    for layout in LAYOUTS:
        torch.manual_seed(1)
        rows = [torch.randn(2 * K, *layout) for _ in [0, *gates]]
        try:
            if layer(*rows).shape == rows[0].shape:
                return [t.requires_grad_() for t in rows]
        except (RuntimeError, ValueError, IndexError, AssertionError) as error:
            errors.append(error)
    raise AssertionError(f"{type(layer).__name__} takes no layout: {errors}")


class Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *rows: Tensor) -> Tensor:
        return self.layer(*rows)


def randomised(layer: nn.Module) -> nn.Module:
    layer = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.rand(parameter.shape) + 0.5)
    return layer


def close(left: Tensor, right: Tensor) -> bool:
    # These classes compute in float32, whatever they are given.
    return torch.allclose(left, right, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.19"),
    reason="Older releases have fewer classes.",
)
def test_enough_classes_are_found() -> None:
    named = [name for same in definitions().values() for _, name in same]
    assert len(named) >= 300 and len(definitions()) >= 60
    assert len(layers()) >= (40 if Version(transformers.__version__) >= Version("5.23") else 35)  # 5.19: 37
    covered = {name for same in definitions().values() for module, name in same if key_of(same[0]) in layers()}
    assert len(covered) >= 200
    wanted = {
        "LlamaRMSNorm",
        "GemmaRMSNorm",
        "MambaRMSNormGated",
        "T5LayerNorm",
        "Qwen3NextRMSNormGated",
        "GptOssRMSNorm",
    }
    assert wanted <= covered


def key_of(definition: tuple[str, str]) -> str:
    return f"{definition[0].split('.')[2]}.{definition[1]}"


def test_every_class_is_a_late_phase_weight() -> None:
    problems = {}
    for name, layer in layers().items():
        try:
            check(layer)
        except Exception as error:  # all of them in one report
            problems[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    assert not problems, "\n".join(f"{name}: {problem}" for name, problem in problems.items())


def check(layer: nn.Module) -> None:
    assert is_norm_layer(layer), "not recognised"
    plain = randomised(layer)
    rows = rows_for(plain)
    model = Model(copy.deepcopy(plain))
    before = plain(*rows).detach()
    config = LatePhaseConfig(num_members=K, weights=["norm"], init_noise=0.5, member_assignment="sample")
    late_phase = LatePhase(model, config)
    names = [name for name, _ in plain.named_parameters()]
    assert [target.key for target in late_phase.targets] == [f"layer.{name}" for name in names]
    assert torch.equal(model(*rows), before), "attaching changed the output"

    late_phase.release(torch.Generator().manual_seed(2))
    stacks = {name: late_phase.stacks()[f"layer.parametrizations.{name}.original"] for name in names}
    cotangent = torch.randn(before.shape)
    expected, row_gradients = [], []
    for k in range(K):
        member = copy.deepcopy(plain)
        with torch.no_grad():
            for name, parameter in member.named_parameters():
                parameter.copy_(stacks[name][k])
        # One member for all rows.
        late_phase.activate(k)
        model.zero_grad()
        outputs = model(*rows)
        theirs = member(*rows)
        assert torch.equal(outputs, theirs), f"member {k} is not the plain layer"
        gradients = torch.autograd.grad(outputs, list(stacks.values()), cotangent)
        plain_gradients = torch.autograd.grad(theirs, list(member.parameters()), cotangent)
        for gradient, theirs in zip(gradients, plain_gradients, strict=True):
            assert close(gradient[k], theirs), f"member {k}: another gradient"
            assert not gradient[[j for j in range(K) if j != k]].any(), "an idle member has a gradient"
        # And its own block of them.
        block = [t.detach().chunk(K)[k].requires_grad_() for t in rows]
        output = member(*block)
        output.backward(cotangent.chunk(K)[k])
        expected.append((output.detach(), {name: p.grad for name, p in member.named_parameters()}))
        row_gradients.append(block[0].grad)

    late_phase.activate_by_sample()
    outputs = model(*rows)
    outputs.backward(cotangent)
    assert outputs.shape == before.shape
    assert close(outputs, torch.cat([output for output, _ in expected])), "dealt rows: another output"
    assert close(rows[0].grad, torch.cat(row_gradients)), "dealt rows: another gradient of the rows"
    for name, stack in stacks.items():
        by_member = torch.stack([gradients[name] for _, gradients in expected])
        assert close(stack.grad, by_member), f"dealt rows: another gradient of {name}"

    mean = copy.deepcopy(plain)
    with torch.no_grad():
        for name, parameter in mean.named_parameters():
            parameter.copy_(stacks[name].mean(0))
    assert close(late_phase.averaged_model()(*rows), mean(*rows)), "the average is not the mean"
    late_phase.detach()
    assert type(model.layer) is type(plain) and list(model.layer.state_dict()) == list(plain.state_dict())
    assert close(model(*rows), mean(*rows)), "detached, another output"


@pytest.mark.parametrize("name", ["RobertaPreLayerNormSelfAttention", "DbrxNormAttentionNorm"])
def test_a_name_does_not_make_a_norm(name: str) -> None:
    (module,) = {m for same in definitions().values() for m, n in same if n == name}
    layer_class = getattr(importlib.import_module(module), name)
    layer = object.__new__(layer_class)
    nn.Module.__init__(layer)
    layer.LayerNorm = nn.LayerNorm(WIDTH)
    layer.weight = nn.Parameter(torch.ones(WIDTH))
    assert not is_norm_layer(layer)


def test_batch_norm_is_one() -> None:
    assert is_norm_layer(nn.BatchNorm1d(WIDTH)) and is_norm_layer(nn.SyncBatchNorm(WIDTH))
