"""Whatever the model and the config: refused by name with nothing changed, or attached and detached to the bit."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_latephase import LatePhase, LatePhaseConfig
from test_bad_input import Snapshot


# The same examples in every run: a test that fails now and then is of no use to the next person.
properties = settings(
    max_examples=50, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)

# Layers, and by hand the tensors of each that rank-1 factors multiply and that norms replicate.
LAYERS: dict[str, tuple[Any, list[str], list[str]]] = {
    "linear": (lambda: nn.Linear(4, 4), ["weight"], []),
    "wide": (lambda: nn.Linear(4, 6, bias=False), ["weight"], []),
    "transposed": (lambda: Conv1D(5, 4), ["weight"], []),
    "conv1d": (lambda: nn.Conv1d(4, 4, 3), ["weight"], []),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), ["weight"], []),
    "lstm": (lambda: nn.LSTM(4, 3), ["weight_ih_l0", "weight_hh_l0"], []),
    "gru": (lambda: nn.GRU(4, 3, bias=False), ["weight_ih_l0", "weight_hh_l0"], []),
    "layer_norm": (lambda: nn.LayerNorm(4), [], ["weight", "bias"]),
    "rms_norm": (lambda: nn.RMSNorm(4), [], ["weight"]),
    "group_norm": (lambda: nn.GroupNorm(2, 4), [], ["weight", "bias"]),
    "batch_norm": (
        lambda: nn.BatchNorm1d(4), [], ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    ),
    "embedding": (lambda: nn.Embedding(7, 4), [], []),
    "dropout": (nn.Dropout, [], []),
}  # fmt: skip
HYPERNET = ("linear", "wide", "transposed", "conv1d", "conv2d")


class Bag(nn.Module):
    """Layers that nobody calls, and a head."""

    def __init__(self, kinds: list[str]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LAYERS[kind][0]() for kind in kinds)
        self.head = nn.Linear(4, 3)


@dataclass
class Case:
    """A model and a config that fits it, with the tensors that must be replicated; all by the table above."""

    kinds: list[str]
    frozen: set[int]
    dtype: torch.dtype
    config: dict[str, Any]
    targets: set[str]

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = Bag(self.kinds)
        for i, layer in enumerate(model.layers):
            layer.requires_grad_(i not in self.frozen)
        model.to(self.dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    buffer.uniform_(0.5, 1.5)  # a variance is positive
        return model


@st.composite
def numbers(draw: DrawFn) -> dict[str, Any]:
    """Values of the fields that have nothing to do with the model."""
    members = draw(st.integers(1, 4))
    start = draw(st.sampled_from([0, 0.25, 0.6, 3, 100]))
    values: dict[str, Any] = {"num_members": members, "late_phase_start": start}
    optional: dict[str, SearchStrategy] = {
        "init_noise": st.floats(0, 2),
        "base_gradient_scale": st.floats(1e-6, 10),
        "cycle_length": st.integers(1, 5).map(lambda cycles: cycles * members),
        "member_weight_decay": st.floats(0, 1),
        "member_assignment": st.sampled_from(["minibatch", "sample"]),
    }
    for name in draw(st.sets(st.sampled_from(sorted(optional)))):
        values[name] = draw(optional[name])
    average = draw(st.sampled_from(["none", "swa", "ema", "memory"]))
    if average == "ema":
        values["ema_decay"] = draw(st.floats(0.001, 0.999))
    if average == "memory":
        values["ema_memory"] = draw(st.floats(0.001, 0.5))
    if average in ("ema", "memory"):
        values["ema_start"] = draw(st.none() | st.floats(0, 500))
        values["ema_every"] = draw(st.none() | st.floats(0.01, 50))
    if average == "swa":
        values["swa_start"] = draw(st.floats(start, 0.99) if start < 1 else st.integers(start, 500))
        values["swa_every"] = draw(st.none() | st.floats(0.01, 50))
    return values


@st.composite
def cases(draw: DrawFn) -> Case:
    """A model of some layers, and a config with families, targets and exclusions that it has."""
    kinds = draw(st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=7))
    config = draw(numbers())
    places = range(len(kinds))
    frozen = draw(st.sets(st.sampled_from(places), max_size=2))
    excluded = draw(st.sets(st.sampled_from(places), max_size=2))
    left = [i for i in places if i not in excluded]
    linear = {f"layers.{i}.{name}" for i in left for name in LAYERS[kinds[i]][1]}
    norms = {f"layers.{i}.{name}" for i in left if i not in frozen for name in LAYERS[kinds[i]][2]}
    twins = {
        f"layers.{i}.weight"
        for i in left
        if i not in frozen
        and kinds[i] in HYPERNET
        and any(kinds[i] == kinds[j] for j in left if j not in {i, *frozen})
    }
    trained = {key for key in linear if int(key.split(".")[1]) not in frozen}
    own = {"rank1": trained, "norm": norms, "hypernet": twins, "head": {"head.weight", "head.bias"}}
    possible = [family for family, targets in own.items() if targets]
    families = draw(st.lists(st.sampled_from(possible), min_size=1, unique=True))
    assume(not {"rank1", "hypernet"} <= {*families})
    # One member has nothing to copy.
    attached = [family for family in families if config["num_members"] > 1 or family in ("rank1", "hypernet")]
    targets = set().union(*(own[family] for family in attached))
    config["weights"] = families
    if excluded:
        config["exclude_modules"] = [f"layers.{i}" for i in sorted(excluded)]
    if families == ["rank1"]:
        chosen = draw(st.sets(st.sampled_from(sorted({key.rpartition(".")[0] for key in linear}))))
        if chosen:
            names = sorted(chosen)
            patterns = [names, [name.replace(".", r"\.") for name in names], ["|".join(names)]]
            config["target_modules"] = draw(st.sampled_from(patterns))
            targets = {key for key in linear if key.rpartition(".")[0] in chosen}
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    return Case(kinds, frozen, dtype, config, targets)


def same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in theirs)


@given(cases())
@properties
def test_what_fits_is_attached_and_detached_to_the_bit(case: Case) -> None:
    model = case.model()
    snapshot = Snapshot(model)
    config = LatePhaseConfig(**case.config)
    late_phase = LatePhase(model, config)
    assert {target.key for target in late_phase.targets} == case.targets
    assert late_phase.summary()
    assert same_bits(late_phase.averaged_state_dict(), snapshot.state)
    if config.init_noise == 0:
        late_phase.release()
        assert same_bits(late_phase.averaged_state_dict(), snapshot.state)
        assert same_bits(late_phase.averaged_model().state_dict(), snapshot.state)
    late_phase.activate(draw_member(case))
    assert late_phase.detach() is model
    snapshot.assert_unchanged()
    # And once more: nothing was left behind.
    LatePhase(model, config).detach()
    assert same_bits(model.state_dict(), snapshot.state)


def draw_member(case: Case) -> int | None:
    """The average or the last member, so that what is active is not always what it was at first."""
    members = case.config["num_members"]
    return None if len(case.kinds) % 2 else members - 1


@given(cases())
@properties
def test_members_that_differ_come_back_as_their_average(case: Case) -> None:
    assume("hypernet" not in case.config["weights"] and "batch_norm" not in case.kinds)
    model = case.model().double()
    late_phase = LatePhase(model, LatePhaseConfig(**case.config | {"init_noise": 0.5}))
    late_phase.release(torch.Generator().manual_seed(1))
    stacks = {name: stack.detach().clone() for name, stack in late_phase.stacks().items()}
    base = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    rank1 = {target.key for target in late_phase.targets if target.family == "rank1"}
    late_phase.detach()
    for key in case.targets:
        module, _, tensor = key.rpartition(".")
        prefix = f"{module}.parametrizations.{tensor}"
        if key in rank1:
            u, v = stacks[f"{prefix}.0.left"].mean(0), stacks[f"{prefix}.0.right"].mean(0)
            weight = base[f"{prefix}.original"]
            expected = weight * torch.outer(u, v).reshape(len(u), len(v), *[1] * (weight.ndim - 2))
        else:
            expected = stacks[f"{prefix}.original"].mean(0)
        assert torch.allclose(model.state_dict()[key], expected, rtol=1e-12, atol=1e-12), key


@given(numbers(), st.lists(st.sampled_from(["rank1", "norm", "head", "hypernet"]), min_size=1, unique=True))
@properties
def test_configs_survive_json(values: dict[str, Any], weights: list[str]) -> None:
    config = LatePhaseConfig(**values, weights=weights, target_modules=["a", r"b\.\d+"])
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        assert LatePhaseConfig.from_pretrained(folder) == config
    assert LatePhaseConfig.from_dict(config.to_dict()) == config


# ---- what does not fit ----

not_numbers = st.sampled_from([math.nan, math.inf, -math.inf, "1", None, [], True, 1j])
negative = st.floats(max_value=-1e-9, allow_nan=False)
not_names = st.sampled_from(["norm", [], 3, [""], [None], ["a", 1], {"a": 1}, True])
BAD: dict[str, SearchStrategy] = {
    "num_members": not_numbers | st.integers(max_value=0) | st.floats(1.5, 9.5),
    "late_phase_start": not_numbers | negative,
    "weights": st.sampled_from(
        [[], "norm", {}, ["lora"], ["norm", "norm"], ["full", "norm"], ["norm", ""], [1], 3, [["norm"]]]
    ),
    "target_modules": not_names,
    "exclude_modules": not_names,
    "init_noise": not_numbers | negative,
    "base_gradient_scale": not_numbers.filter(lambda value: value is not None) | negative | st.just(0.0),
    "member_assignment": st.sampled_from(["row", "", None, 1, "Sample"]),
    "cycle_length": st.integers(max_value=0) | st.sampled_from(["4", 2.5, True, math.nan]),
    "swa_start": not_numbers.filter(lambda value: value is not None) | negative,
    "swa_every": (not_numbers.filter(lambda value: value is not None) | negative | st.just(0)),
    "ema_decay": not_numbers.filter(lambda value: value is not None) | negative | st.floats(1, 9) | st.just(0.0),
    "ema_memory": not_numbers.filter(lambda value: value is not None) | negative | st.floats(0.51, 9) | st.just(0.0),
    "ema_start": not_numbers.filter(lambda value: value is not None) | negative,
    "ema_every": (not_numbers.filter(lambda value: value is not None) | negative | st.just(0)),
    "average_device": st.sampled_from(["cuda", "", 0, True, "CPU"]),
    "evaluate_raw": st.sampled_from(["yes", "", None, 0, 1]),
    "member_weight_decay": not_numbers.filter(lambda value: value is not None) | negative,
    "batch_norm_statistics": st.sampled_from(["mean", "", None, 0, "recomputed"]),
}


def test_every_field_is_tried() -> None:
    assert {*BAD} == {field.name for field in fields(LatePhaseConfig)}


@pytest.mark.parametrize("field", BAD)
def test_a_bad_value_is_refused_by_the_name_of_its_field(field: str) -> None:
    @given(numbers(), BAD[field])
    @properties
    def check(values: dict[str, Any], bad: Any) -> None:
        others = {name: value for name, value in values.items() if not name.startswith(("swa_", "ema_"))}
        if field == "swa_every":
            others["swa_start"] = 1000
        if field in ("weights", "batch_norm_statistics"):  # of one member nothing is copied
            others = {"num_members": 2}
        if field in ("ema_start", "ema_every"):
            others["ema_memory"] = 0.1
        with pytest.raises(ValueError, match=field):
            LatePhaseConfig(**others | {field: bad})

    check()


@st.composite
def misfits(draw: DrawFn) -> tuple[Case, nn.Module, str]:
    """A model, a config that does not fit it, and the field at fault."""
    case = draw(cases().filter(lambda case: case.config["num_members"] > 1))
    model: Any = case.model()
    config = case.config
    kind = draw(
        st.sampled_from(["nothing", "nothing excluded", "regex", "no layer", "tied", "frozen", "parametrized"])
    )
    field = "weights"
    if kind == "nothing":
        field, config["target_modules"] = "target_modules", ["head", draw(st.sampled_from(["haed", "layers.99", "y"]))]
    elif kind == "nothing excluded":
        field = "exclude_modules"
        config[field] = [*config.get(field, []), draw(st.sampled_from(["layer", "norm_1", r"head\.\d"]))]
    elif kind == "regex":
        field = draw(st.sampled_from(["target_modules", "exclude_modules"]))
        config[field] = [draw(st.sampled_from(["*a", "(", "[a", "a{2,1}"]))]
    elif kind == "no layer":
        family = draw(st.sampled_from(["rank1", "norm", "hypernet"]))
        column = 2 if family == "norm" else 1
        keep = [i for i, name in enumerate(case.kinds) if not LAYERS[name][column]]
        model.layers = nn.ModuleList(model.layers[i] for i in keep)
        config.update(weights=[family], target_modules=None, exclude_modules=None)
    elif kind == "tied":
        model.embedding = nn.Embedding(3, 4)
        model.embedding.weight = model.head.weight
        config.update(weights=[draw(st.sampled_from(["head", "full"]))], member_assignment="minibatch")
        config.update(target_modules=None, exclude_modules=None)
    elif kind == "frozen":
        model.requires_grad_(False)
        config.update(weights=[draw(st.sampled_from(["head", "full"]))], member_assignment="minibatch")
        config.update(target_modules=None, exclude_modules=None)
    else:
        field = "exclude_modules"
        nn.utils.parametrizations.weight_norm(model.float().head)
        config.update(weights=["head"], target_modules=None, exclude_modules=None)
    return case, model, field


@given(misfits())
@properties
def test_what_does_not_fit_is_refused_and_changes_nothing(misfit: tuple[Case, nn.Module, str]) -> None:
    case, model, field = misfit
    snapshot = Snapshot(model)
    config = LatePhaseConfig(**case.config)
    with pytest.raises(ValueError, match=field):
        LatePhase(model, config)
    snapshot.assert_unchanged()
