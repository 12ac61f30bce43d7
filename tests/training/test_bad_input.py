"""What cannot work is refused by name, with a remedy, before anything is changed."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn
from transformers import Adafactor, OlmoConfig, OlmoForCausalLM

from hf_latephase import LatePhase, LatePhaseConfig
from tiny import gpt2, llama, lstm, trainer


class Snapshot:
    """A model's keys, bits and classes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.state = {key: value.clone() for key, value in model.state_dict().items()}
        self.parameters = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
        self.classes = [(name, type(m)) for name, m in model.named_modules()]

    def assert_unchanged(self) -> None:
        state = self.model.state_dict()
        assert list(state) == list(self.state)
        for key, value in self.state.items():
            assert state[key].dtype == value.dtype and torch.equal(state[key], value), key
        assert [(name, id(p), p.requires_grad) for name, p in self.model.named_parameters()] == self.parameters
        assert [(name, type(m)) for name, m in self.model.named_modules()] == self.classes


def named(**cases: Any) -> Any:
    return pytest.mark.parametrize("case", list(cases.values()), ids=[name.replace("_", "-") for name in cases])


# ---- the config alone ----


@named(
    no_members=({"num_members": 0}, "num_members must be a whole number.*got 0.*Choose"),
    negative_members=({"num_members": -3}, "num_members.*got -3.*Choose"),
    fractional_members=({"num_members": 2.5}, r"num_members.*got 2\.5.*Choose"),
    members_as_bool=({"num_members": True}, "num_members.*got True.*Choose"),
    members_as_text=({"num_members": "3"}, "num_members.*got '3'.*Choose"),
    members_nan=({"num_members": math.nan}, "num_members.*got nan.*Choose"),
    negative_start=({"late_phase_start": -0.1}, r"late_phase_start.*not negative.*\(a share.*or a number of steps\)"),
    nan_start=({"late_phase_start": math.nan}, "late_phase_start must be finite.*share of all steps"),
    infinite_start=({"late_phase_start": math.inf}, "late_phase_start must be finite.*share of all steps"),
    text_start=({"late_phase_start": "half"}, "late_phase_start must be finite.*share of all steps.*'half'"),
    no_start=({"late_phase_start": None}, "late_phase_start must be finite.*share of all steps.*None"),
    unknown_family=({"weights": ["lora"]}, r"weights names unknown families \['lora'\]: choose from .*rank1"),
    one_unknown_family=({"weights": ["norm", "Rank1"]}, r"unknown families \['Rank1'\]: choose from .*rank1"),
    no_weights=({"weights": []}, r"weights must be a list with at least one of .*rank1.*got \[\]"),
    weights_as_text=({"weights": "rank1"}, "weights must be a list.*got 'rank1'.*list of one"),
    family_twice=({"weights": ["norm", "norm"]}, "weights names a family twice.*Name each once"),
    full_with_others=({"weights": ["full", "norm"]}, "'full'.*stands alone.*Drop"),
    targets_as_text=({"target_modules": "c_attn"}, "target_modules must be None or a list.*list of one"),
    no_targets=({"target_modules": []}, "target_modules must be None or a list"),
    empty_target=({"target_modules": ["c_attn", ""]}, "target_modules must be None or a list"),
    number_as_target=({"target_modules": [3]}, "target_modules must be None or a list of names"),
    exclude_as_text=({"exclude_modules": "ln_f"}, "exclude_modules must be None or a list.*list of one"),
    negative_noise=({"init_noise": -0.5}, "init_noise.*not negative.*0 adds none"),
    nan_noise=({"init_noise": math.nan}, "init_noise must be finite.*0 adds none"),
    no_scale=({"base_gradient_scale": 0.0}, "base_gradient_scale must be positive.*1/num_members averages"),
    negative_scale=({"base_gradient_scale": -1.0}, "base_gradient_scale must be positive.*1.0 sums"),
    nan_scale=({"base_gradient_scale": math.nan}, "base_gradient_scale must be positive and finite.*1.0 sums"),
    text_scale=({"base_gradient_scale": "mean"}, "base_gradient_scale must be positive and finite.*1.0 sums"),
    unknown_assignment=({"member_assignment": "row"}, "member_assignment must be 'minibatch' or 'sample', got 'row'"),
    full_by_sample=({"weights": ["full"], "member_assignment": "sample"},
        "'sample' cannot run.*Use member_assignment"),
    cycle_not_multiple=({"num_members": 3, "cycle_length": 4},
        "cycle_length must be a multiple of num_members=3.*got 4"),
    cycle_below_members=({"num_members": 3, "cycle_length": 1}, "cycle_length must be a multiple of num_members=3"),
    cycle_zero=({"num_members": 3, "cycle_length": 0}, "cycle_length must be a multiple.*Leave it out"),
    cycle_negative=({"num_members": 3, "cycle_length": -3}, "cycle_length must be a multiple.*got -3.*Leave it out"),
    cycle_fractional=({"num_members": 1, "cycle_length": 1.5}, "cycle_length must be a multiple.*Leave it out"),
    swa_before_start=({"swa_start": 0.5},
        r"swa_start=0\.5 lies before late_phase_start=0\.6.*Start SWA at T0 or later"),
    swa_steps_before=({"swa_start": 5, "late_phase_start": 6}, "swa_start=5 lies before.*Start SWA at T0 or later"),
    negative_swa=({"swa_start": -1}, "swa_start must be finite and not negative.*number of steps"),
    nan_swa=({"swa_start": math.nan}, "swa_start must be finite.*number of steps"),
    swa_every_alone=({"swa_every": 2}, "swa_every needs swa_start: set it, or leave both out"),
    swa_every_zero=({"swa_start": 0.7, "swa_every": 0}, "swa_every must be positive.*Leave it out"),
    swa_every_negative=({"swa_start": 0.7, "swa_every": -1}, "swa_every must be positive.*Leave it out"),
    swa_every_nan=({"swa_start": 0.7, "swa_every": math.nan}, "swa_every must be positive.*Leave it out"),
    ema_zero=({"ema_decay": 0.0}, "ema_decay must lie between 0 and 1.*Leave it out"),
    ema_one=({"ema_decay": 1.0}, "ema_decay must lie between 0 and 1.*Leave it out"),
    ema_above=({"ema_decay": 99.9}, "ema_decay must lie between 0 and 1.*Leave it out"),
    ema_nan=({"ema_decay": math.nan}, "ema_decay must lie between 0 and 1.*Leave it out"),
    ema_and_swa=({"ema_decay": 0.9, "swa_start": 0.7}, "swa_start and ema_decay exclude each other: choose one"),
    two_emas=({"ema_decay": 0.9, "ema_memory": 0.1}, "ema_decay and ema_memory exclude each other: choose one"),
    memory_zero=({"ema_memory": 0.0}, "ema_memory must be a share of training so far.*0.1 is usual"),
    memory_above=({"ema_memory": 0.6}, "ema_memory must be a share of training so far.*0.1 is usual"),
    memory_nan=({"ema_memory": math.nan}, "ema_memory must be a share of training so far.*0.1 is usual"),
    ema_start_alone=({"ema_start": 0.5}, "ema_start needs ema_decay or ema_memory: set one, or leave ema_start out"),
    ema_start_of_swa=({"ema_start": 9, "swa_start": 0.7}, "ema_start needs ema_decay or ema_memory: set one"),
    ema_start_negative=({"ema_start": -1.0, "ema_memory": 0.1}, "ema_start must be finite and not negative"),
    ema_every_alone=({"ema_every": 2}, "ema_every needs ema_decay or ema_memory: set one, or leave ema_every out"),
    ema_every_zero=({"ema_every": 0, "ema_memory": 0.1}, "ema_every must be positive.*Leave it out"),
    device=({"ema_memory": 0.1, "average_device": "cuda"}, "average_device must be None or 'cpu', got 'cuda'"),
    device_alone=({"average_device": "cpu"}, "average_device needs an average over time: set swa_start.*leave"),
    raw_alone=({"evaluate_raw": True}, "evaluate_raw needs an average over time: set swa_start.*leave"),
    raw_word=({"evaluate_raw": "yes", "ema_memory": 0.1}, "evaluate_raw must be True or False, got 'yes'"),
)  # fmt: skip
def test_config(case: tuple[dict[str, Any], str]) -> None:
    values, message = case
    with pytest.raises(ValueError, match=message):
        LatePhaseConfig(**values)


# ---- a model that does not fit ----


class Embeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(5, 4), nn.Embedding(3, 4)


def weight_normed() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    nn.utils.parametrizations.weight_norm(model[0])
    return model


def frozen(model: nn.Module, part: str) -> nn.Module:
    for name, parameter in model.named_parameters():
        if part in name:
            parameter.requires_grad_(False)
    return model


def attached_before() -> nn.Module:
    model = gpt2()
    LatePhase(model, LatePhaseConfig(num_members=2, weights=["rank1"]))
    return model


def olmo() -> nn.Module:
    return OlmoForCausalLM(
        OlmoConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )


@named(
    hypernet_alone=(lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), {"weights": ["hypernet"]},
                    "no two of the 1 layers chosen do. Choose other target_modules"),
    target_matches_nothing=(gpt2, {"target_modules": ["c_atn"]},
                            r"target_modules: 'c_atn' matches no module\. The nearest.*c_attn.*leave target_modules"),
    one_target_of_two=(llama, {"target_modules": ["q_proj", "w_proj"]}, "'w_proj' matches no module.*_proj.*name one"),
    not_a_suffix=(llama, {"target_modules": ["proj"]}, "'proj' matches no module.*nearest"),
    part_of_a_regex=(gpt2, {"target_modules": [r"h\.0"]}, "matches no module.*nearest"),
    invalid_regex=(gpt2, {"target_modules": ["c_attn", "mlp.(c_fc"]}, r"'mlp\.\(c_fc' is neither.*Escape"),
    invalid_exclude_regex=(gpt2, {"exclude_modules": ["*ln"]}, r"'\*ln' is neither.*Escape"),
    target_of_no_family=(gpt2, {"target_modules": ["wte"]},
        "'wte' matches only modules that no family.*could name.*c_attn"),
    norm_is_no_linear=(gpt2, {"target_modules": ["ln_1"]}, "'ln_1' matches only modules that no family.*could name"),
    exclude_matches_nothing=(gpt2, {"exclude_modules": ["mpl"]}, "exclude_modules: 'mpl' matches no module.*mlp.*out"),
    everything_excluded=(gpt2, {"exclude_modules": [".*"]}, "no layer of this family.*exclude_modules"),
    norms_excluded=(gpt2, {"weights": ["norm"], "exclude_modules": [r".*ln_\w"]},
        "no layer of this family.*exclude_modules"),
    target_excluded=(gpt2, {"target_modules": ["c_fc"], "exclude_modules": ["c_fc"]},
        "'c_fc' matches only.*could name"),
    tied_head=(gpt2, {"weights": ["head"]}, "lm_head.weight' is tied to .*wte.*Untie it .*tie_word_embeddings=False"),
    tied_target=(gpt2, {"target_modules": ["lm_head"]}, "lm_head.weight' is tied to .*Untie it.*leave it out"),
    tied_full=(gpt2, {"weights": ["full"]}, "tied to.*Untie"),
    tied_lstm_head=(lambda: lstm(tie_word_embeddings=True), {"weights": ["head"]}, "is tied to .*Untie it"),
    bare_norms=(olmo, {"weights": ["norm"]}, r"normalisation layers \(OlmoLayerNorm\) have no weights.*\['rank1'\]"),
    bare_norms_beside_others=(lambda: nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.LayerNorm(3, bias=False,
        elementwise_affine=False)), {"weights": ["norm"], "exclude_modules": ["1"]},
        "no layer of this family.*exclude_modules"),
    no_norms=(lstm, {"weights": ["norm"]}, r"no layer of this family.*LayerNorm.*Choose another family"),
    only_bare_batch_norms=(lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False)),
                           {"weights": ["norm"]}, r"normalisation layers \(BatchNorm1d\) have no weights.*rank1"),
    only_embeddings=(Embeddings, {"weights": ["rank1"]}, "no layer of this family.*nn.Linear.*Choose another family"),
    only_an_output_layer=(lambda: nn.Linear(3, 2), {"weights": ["rank1"]}, "but for the output layer.*Choose another"),
    no_head=(Embeddings, {"weights": ["head"]}, "no layer of this family.*an output layer.*Choose another family"),
    attached=(attached_before, {"weights": ["rank1"]}, "is parametrized already.*Detach that first"),
    attached_others=(attached_before, {"weights": ["norm"]}, "is parametrized already.*Detach that first"),
    weight_normed=(weight_normed, {"weights": ["rank1"], "target_modules": ["0"]},
                   "'0' is parametrized already.*weight_norm.*exclude_modules"),
    frozen_norms=(lambda: frozen(gpt2(), "ln_"), {"weights": ["norm"]},
        r"'transformer\.h\.0\.ln_1.* is frozen.*choose another"),
    frozen_head=(lambda: frozen(llama(), "lm_head"), {"weights": ["head"]},
        "'lm_head.weight' is frozen.*choose another"),
    second_family_fails=(lstm, {"weights": ["rank1", "norm"]}, "weights='norm'.*no layer of this family"),
)  # fmt: skip
def test_model(case: tuple[Callable[[], nn.Module], dict[str, Any], str]) -> None:
    make, values, message = case
    model = make()
    snapshot = Snapshot(model)
    with pytest.raises(ValueError, match=message):
        LatePhase(model, LatePhaseConfig(num_members=3, **values))
    snapshot.assert_unchanged()


def test_nearest_modules_are_near() -> None:
    with pytest.raises(ValueError) as error:
        LatePhase(llama(), LatePhaseConfig(target_modules=["qproj"]))
    assert "'q_proj'" in str(error.value)


@named(
    negative=(lambda late_phase: late_phase.activate(-1), ValueError, "no member -1: num_members=3, counted from 0"),
    too_large=(lambda late_phase: late_phase.activate(3), ValueError, "no member 3: num_members=3, counted from 0"),
    by_sample=(lambda late_phase: late_phase.activate_by_sample(), ValueError, "needs.*member_assignment='sample'"),
    released_twice=(lambda late_phase: late_phase.release(), RuntimeError, "released before.*rejoin"),
)  # fmt: skip
def test_calls(case: tuple[Callable[[LatePhase], Any], type, str]) -> None:
    call, error, message = case
    late_phase = LatePhase(gpt2(), LatePhaseConfig(num_members=3, weights=["norm"], init_noise=0.1))
    late_phase.release()
    late_phase.activate(2)
    snapshot = Snapshot(late_phase.model)
    ids = torch.tensor([[3, 4, 5]])
    before = late_phase.model.eval()(ids).logits
    with pytest.raises(error, match=message):
        call(late_phase)
    snapshot.assert_unchanged()
    assert torch.equal(late_phase.model(ids).logits, before)


# ---- a trainer that cannot be ----


@named(
    batch_not_divisible=({"member_assignment": "sample", "num_members": 3}, {},
                         "per_device_train_batch_size=4 cannot be shared equally by num_members=3.*Choose a batch"),
    short_last_batch=({"member_assignment": "sample", "num_members": 4}, {"rows": 18},
                      "the last batch of an epoch has 2 of 4 rows.*Set dataloader_drop_last=True"),
    bad_target=({"target_modules": ["c_atn"]}, {}, "'c_atn' matches no module.*nearest"),
    tied_head=({"weights": ["head"]}, {}, "is tied to.*Untie"),
)  # fmt: skip
def test_trainer(case: tuple[dict[str, Any], dict[str, Any], str], tmp_path: Path) -> None:
    values, arguments, message = case
    model = gpt2()
    snapshot = Snapshot(model)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, model, LatePhaseConfig(**{"num_members": 2, **values}), **arguments)
    snapshot.assert_unchanged()


def test_a_dropped_last_batch_may_be_short(tmp_path: Path) -> None:
    config = LatePhaseConfig(num_members=4, member_assignment="sample", late_phase_start=0)
    run = trainer(tmp_path, gpt2(), config, rows=18, dataloader_drop_last=True, max_steps=6)
    run.train()
    assert run.state.global_step == 6


@named(
    start_at_the_end=({"late_phase_start": 10},
        "late_phase_start=10 is step 10, but training ends at step 10.*Lower it"),
    start_past_the_end=({"late_phase_start": 99}, "late_phase_start=99 is step 99.*never begin.*train longer"),
    start_rounds_up=({"late_phase_start": 0.95}, r"late_phase_start=0\.95 is step 10.*Lower it"),
    swa_share_before_start=({"late_phase_start": 6, "swa_start": 0.5},
        r"swa_start=0\.5 is step 5, before.*T0 or later"),
    swa_steps_before_share=({"late_phase_start": 0.6, "swa_start": 5}, "swa_start=5 is step 5, before.*T0 or later"),
    swa_past_the_end=({"swa_start": 11}, "swa_start=11 is step 11, but training ends at step 10"),
)  # fmt: skip
def test_points_outside_of_training(case: tuple[dict[str, Any], str], tmp_path: Path) -> None:
    values, message = case
    config = LatePhaseConfig(num_members=2, weights=["rank1", "norm"], **values)
    model = gpt2()
    snapshot = Snapshot(model)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, model, config)
    snapshot.assert_unchanged()
    # With epochs their number is known once training is about to begin.
    run = trainer(tmp_path, model, config, max_steps=-1, num_train_epochs=1, rows=40)
    assert_refuses_to_train(run, message)


def assert_refuses_to_train(run: Any, message: str, error: type[Exception] = ValueError, **kwargs: Any) -> None:
    snapshot = Snapshot(run.model)
    average = {key: value.clone() for key, value in run.late_phase.averaged_state_dict().items()}
    optimizer = optimizer_state(run)
    with pytest.raises(error, match=message):
        run.train(**kwargs)
    snapshot.assert_unchanged()
    for key, value in run.late_phase.averaged_state_dict().items():
        assert torch.equal(value, average[key]), key
    after = optimizer_state(run)
    assert after.keys() == optimizer.keys() or not optimizer
    for key, value in after.items():
        assert torch.equal(value, optimizer[key]), key


def optimizer_state(run: Any) -> dict[tuple[int, str], Tensor]:
    state = run.optimizer.state_dict()["state"] if run.optimizer is not None else {}
    return {(i, k): torch.as_tensor(v).clone() for i, s in state.items() for k, v in s.items()}


# ---- optimizers ----


class Lamb(torch.optim.Optimizer):
    """Adam's direction, scaled by each tensor's own norm: what members stacked in one tensor must not share."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                square = self.state[p].setdefault("square", torch.zeros_like(p))
                square.mul_(0.9).addcmul_(p.grad, p.grad, value=0.1)
                direction = p.grad / (square.sqrt() + 1e-6)
                p.add_(direction, alpha=-group["lr"] * (p.norm() / direction.norm().clamp_min(1e-12)).item())


class Lion(torch.optim.Optimizer):
    """The sign of an average: elementwise."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                p.add_((0.9 * average + 0.1 * p.grad).sign(), alpha=-group["lr"])
                average.mul_(0.99).add_(p.grad, alpha=0.01)


MIXING = {
    "Adafactor": (Adafactor, {"lr": 0.01, "relative_step": False, "scale_parameter": False}),
    "Adafactor-relative": (Adafactor, {"lr": None, "relative_step": True, "warmup_init": True}),
    "torch-Adafactor": (torch.optim.Adafactor, {"lr": 0.01}),
    "Lamb": (Lamb, {}),
    "LBFGS": (torch.optim.LBFGS, {}),
    **({"Muon": (torch.optim.Muon, {})} if hasattr(torch.optim, "Muon") else {}),  # torch 2.9
}
ELEMENTWISE = {
    "SGD": (torch.optim.SGD, {"lr": 0.01}),
    "SGD-Nesterov": (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "nesterov": True}),
    "SGD-foreach": (torch.optim.SGD, {"lr": 0.01, "foreach": True}),
    "Adam": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01}),
    "AdamW-fused": (torch.optim.AdamW, {"lr": 0.01, "fused": True}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01, "centered": True}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.01}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.01}),
    "Lion": (Lion, {}),
}


@pytest.mark.parametrize("name", MIXING)
def test_optimizers_that_mix_members(name: str, tmp_path: Path) -> None:
    config = LatePhaseConfig(num_members=2, weights=["rank1", "norm"])
    run = trainer(tmp_path, gpt2(), config, optimizer=MIXING[name])
    snapshot = Snapshot(run.model)
    kind = MIXING[name][0].__name__
    # Muon refuses vectors and LBFGS Trainer's groups themselves, before anyone can look at them.
    own = {"Muon": "Muon only supports 2D", "LBFGS": "LBFGS doesn't support per-parameter options"}
    message = own.get(kind, f"{kind} cannot train late-phase weights.*Use an elementwise")
    with pytest.raises(ValueError, match=message):
        run.train()
    snapshot.assert_unchanged()
    assert run.state.global_step == 0


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_optimizers_train(name: str, tmp_path: Path) -> None:
    config = LatePhaseConfig(num_members=2, weights=["norm"], late_phase_start=1)
    run = trainer(tmp_path, gpt2(), config, max_steps=5, optimizer=ELEMENTWISE[name])
    before = run.late_phase.averaged_state_dict()["transformer.ln_f.weight"].clone()
    run.train()
    assert not torch.equal(run.late_phase.averaged_state_dict()["transformer.ln_f.weight"], before)
    assert run.late_phase.distance_from_mean() > 0


def test_optim_by_name(tmp_path: Path) -> None:
    run = trainer(tmp_path, gpt2(), LatePhaseConfig(num_members=2, weights=["norm"]), optim="adafactor")
    assert_refuses_to_train(run, "Adafactor cannot train late-phase weights.*Use an elementwise")
    run = trainer(tmp_path, gpt2(), LatePhaseConfig(num_members=1, late_phase_start=0), optim="adafactor", max_steps=2)
    run.train()  # one member is not mixed with any


# ---- checkpoints that do not fit ----


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    config = LatePhaseConfig(num_members=2, weights=["norm"], late_phase_start=2)
    run = trainer(folder, gpt2(), config, max_steps=5, save_strategy="steps", save_steps=5)
    run.train()
    return folder / "checkpoint-5"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@named(
    no_state=(lambda f: (f / "late_phase_state.json").unlink(), {}, FileNotFoundError,
              r"holds no late_phase_state\.json.*Choose another checkpoint"),
    no_tensors=(lambda f: (f / "late_phase.safetensors").unlink(), {}, (ValueError, FileNotFoundError),
                "checkpoint-5.*nother checkpoint"),
    half_the_tensors=(lambda f: truncate(f / "late_phase.safetensors"), {}, ValueError, "damaged.*nother checkpoint"),
    half_the_state=(lambda f: truncate(f / "late_phase_state.json"), {}, ValueError, "damaged.*nother checkpoint"),
    empty_tensors=(lambda f: (f / "late_phase.safetensors").write_bytes(b""), {}, ValueError,
        "damaged.*nother checkpoint"),
    state_is_a_list=(lambda f: (f / "late_phase_state.json").write_text("[]"), {}, ValueError,
        "damaged.*nother checkpoint"),
    state_lacks_keys=(lambda f: (f / "late_phase_state.json").write_text("{}"), {}, ValueError,
        "damaged.*nother checkpoint"),
    half_the_model=(lambda f: truncate(f / "model.safetensors"), {}, ValueError, "damaged.*nother checkpoint"),
    no_model=(lambda f: (f / "model.safetensors").unlink(), {}, (ValueError, FileNotFoundError),
              "checkpoint-5.*nother checkpoint"),
    other_members=(None, {"num_members": 3}, ValueError, "has num_members=2, the config 3.*Resume with"),
    other_family=(None, {"weights": ["rank1"]}, ValueError, "replicates other weights.*Resume with the same"),
    more_families=(None, {"weights": ["rank1", "norm"]}, ValueError, "replicates other weights.*Resume with the same"),
    other_targets=(None, {"target_modules": ["ln_1"]}, ValueError, "replicates other weights.*ln_2.*Resume with"),
    other_width=(None, {"model": lambda: llama()}, ValueError, "replicates other weights.*Resume with"),
)  # fmt: skip
def test_checkpoint(case: tuple[Any, dict[str, Any], Any, str], checkpoint: Path, tmp_path: Path) -> None:
    damage, values, error, message = case
    values = dict(values)
    folder = tmp_path / "checkpoint-5"
    shutil.copytree(checkpoint, folder)
    if damage is not None:
        damage(folder)
    make = values.pop("model", gpt2)
    config = LatePhaseConfig(**{"num_members": 2, "weights": ["norm"], "late_phase_start": 2, **values})
    run = trainer(tmp_path, make(), config, max_steps=4, rows=16)
    run.train()  # so that there are weights and an optimizer to lose
    run.args.max_steps = 9
    assert_refuses_to_train(run, message, error, resume_from_checkpoint=str(folder))


def test_the_checkpoint_itself_is_good(checkpoint: Path, tmp_path: Path) -> None:
    config = LatePhaseConfig(num_members=2, weights=["norm"], late_phase_start=2)
    run = trainer(tmp_path, gpt2(), config, max_steps=7)
    run.train(resume_from_checkpoint=str(checkpoint))
    assert run.state.global_step == 7


@pytest.mark.parametrize(("backend", "message"), [
    ({"is_fsdp_enabled": True, "fsdp_version": 1}, r"FSDP1(.|\n)*\n  fsdp_version: 2\n(.|\n)*accelerate to-fsdp2"),
    ({"n_gpu": 2}, r"DataParallel.*torchrun"),
], ids=["fsdp1", "dataparallel"])  # fmt: skip
def test_backends_that_cannot_hold_members_are_refused(
    backend: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace as Stub

    from hf_latephase.training import support
    from hf_latephase.training.adapter import TrainerAdapter
    from hf_latephase.training.support import check_supported

    monkeypatch.setattr(support, "FSDP2_TORCH", "2.6")  # what else is said of FSDP2, whichever torch is installed
    state = Stub(fsdp_plugin=Stub(fsdp_version=backend.get("fsdp_version", 2)))
    fake = Stub(
        args=Stub(n_gpu=backend.get("n_gpu", 1), max_steps=-1), callback_handler=Stub(callbacks=[]),
        accelerator=Stub(state=state),
        is_deepspeed_enabled=False, is_fsdp_enabled=backend.get("is_fsdp_enabled", False),
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        check_supported(TrainerAdapter(fake), LatePhaseConfig())
    fake.args.n_gpu, state.fsdp_plugin.fsdp_version = 1, 2
    check_supported(TrainerAdapter(fake), LatePhaseConfig())
    # Still sharded, if it was.
    if fake.is_fsdp_enabled:
        with pytest.raises(ValueError, match="average_device='cpu': with FSDP.*Leave average_device out"):
            check_supported(TrainerAdapter(fake), LatePhaseConfig(ema_memory=0.1, average_device="cpu"))


@pytest.mark.parametrize(("strategy", "reshards"), [("FULL_SHARD", "true"), ("SHARD_GRAD_OP", "false")])
def test_the_lines_that_make_fsdp1_fsdp2_are_those_of_accelerate(strategy: str, reshards: str) -> None:
    from types import SimpleNamespace as Stub

    from accelerate.commands.to_fsdp2 import convert_config_to_fsdp2
    from torch.distributed.fsdp import ShardingStrategy

    from hf_latephase.training.adapter import TrainerAdapter
    from hf_latephase.training.support import check_supported

    plugin = Stub(fsdp_version=1, sharding_strategy=ShardingStrategy[strategy])
    fake = Stub(args=Stub(), accelerator=Stub(state=Stub(fsdp_plugin=plugin)))
    fake.is_deepspeed_enabled, fake.is_fsdp_enabled = False, True
    with pytest.raises(ValueError, match=f"fsdp_reshard_after_forward: {reshards}") as refusal:
        check_supported(TrainerAdapter(fake), LatePhaseConfig())
    old = {
        "fsdp_sharding_strategy": strategy, "fsdp_use_orig_params": True, "fsdp_sync_module_states": True,
        "fsdp_backward_prefetch": "BACKWARD_PRE", "fsdp_forward_prefetch": False,
    }  # fmt: skip
    new = convert_config_to_fsdp2({"fsdp_config": dict(old)})["fsdp_config"]
    assert (new.pop("fsdp_version"), new.pop("fsdp_reshard_after_forward")) == (2, reshards == "true")
    assert not new or Version(accelerate.__version__) < Version("1.11"), "which leaves in what has no use any more"
    assert all(name in str(refusal.value) for name in old), "what it takes out"


SHARED = {"num_members": 4, "weights": ["norm"]}


@pytest.mark.parametrize(("settings", "config", "steps", "message"), [
    ({"zero_optimization": {"stage": 3}}, SHARED, 2, r"ZeRO-3.*ZeRO-2.*FSDP2"),
    ({}, SHARED, 2, r"without ZeRO.*DDP"),
    ({}, SHARED, 1, r"without ZeRO"),
    ({"zero_optimization": {"stage": 2}}, SHARED, 1, r"4 minibatches .*steps=1 on 2 .* Set .*_steps=2, or use DDP"),
    ({"zero_optimization": {"stage": 1}}, SHARED | {"cycle_length": 8}, 3, r"Set gradient_accumulation_steps=4, or"),
    ({"zero_optimization": {"stage": 2}}, {"num_members": 3, "weights": ["norm"]}, 2, r"_steps=3, or"),
    ({"zero_optimization": {"stage": 2}, "optimizer": {"type": "Lamb"}}, SHARED, 2, r"Lamb.*Take `optimizer` out"),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, SHARED, 2, r"zero_force_ds_cpu_op"),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, SHARED, 2, r"'nvme'.*Use 'cpu'"),
    ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, SHARED, 2, r"round_robin_gradients.*false"),
    ({"zero_optimization": {"stage": 2, "zenflow": {}}}, SHARED, 2, None),
    ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, SHARED, 2, r"zenflow"),
    ({"zero_optimization": {"stage": 2}, "tensor_parallel": {"autotp_size": 2}}, SHARED, 2, r"autotp_size"),
    ({"zero_optimization": {"stage": 2}, "compression_training": {"a": 1}}, SHARED, 2, r"compression_training"),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}}, SHARED, 2, None),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}, "zero_force_ds_cpu_optimizer": False},
     SHARED, 2, None),
    ({"zero_optimization": {"stage": 1}}, SHARED | {"member_assignment": "sample"}, 1, None),
])  # fmt: skip
def test_what_deepspeed_cannot_do_is_refused(
    monkeypatch: pytest.MonkeyPatch, settings: dict, config: dict, steps: int, message: str | None
) -> None:
    """Here without DeepSpeed; test_deepspeed.py has real trainers."""
    from types import SimpleNamespace as Stub

    from hf_latephase.training import zero_support

    monkeypatch.setattr(zero_support, "version", lambda name: "0.19.8")
    monkeypatch.setattr(zero_support, "LOOP_HAS_HOOKS", True)
    args = Stub(gradient_accumulation_steps=steps, auto_find_batch_size=False)
    fake: Any = Stub(args=args, deepspeed_config=settings, accelerator=Stub(num_processes=2, process_index=0))
    if message is not None:
        with pytest.raises(ValueError, match=message):
            zero_support.check_deepspeed(fake, LatePhaseConfig(**config))
        return
    zero_support.check_deepspeed(fake, LatePhaseConfig(**config))
    args.auto_find_batch_size = True
    with pytest.raises(ValueError, match="auto_find_batch_size.*per_device_train_batch_size"):
        zero_support.check_deepspeed(fake, LatePhaseConfig(**config))
    monkeypatch.setattr(zero_support, "version", lambda name: "0.18.0")
    with pytest.raises(ValueError, match=r"deepspeed 0\.19\.8.* 0\.18\.0"):
        zero_support.check_deepspeed(fake, LatePhaseConfig(**config))
