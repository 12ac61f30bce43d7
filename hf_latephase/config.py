"""The settings of late-phase training."""

from __future__ import annotations

import copy
import json
import math
import os
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal


CONFIG_NAME = "late_phase_config.json"
FAMILIES = ("rank1", "norm", "head", "hypernet", "full")

PRESETS: dict[str, dict[str, Any]] = {
    # One member of norm layers adds no parameter: the model trains as without.
    "ema": {"num_members": 1, "weights": ["norm"], "ema_memory": 0.1},
    "swa": {"num_members": 1, "weights": ["norm"], "swa_start": 0.75},
    "finetune": {"num_members": 5, "weights": ["norm"], "late_phase_start": 0.05, "swa_start": 0.1},
    "paper-lm": {"num_members": 10, "weights": ["rank1"], "base_gradient_scale": 1.0, "swa_start": 0.7},
    "paper-cifar": {"num_members": 10, "weights": ["norm", "head"], "base_gradient_scale": 1.0},
}


@dataclass
class LatePhaseConfig:
    """
    Configuration of late-phase weights ([arXiv 2007.12927](https://arxiv.org/abs/2007.12927), Algorithm 1).

    Points in training (`late_phase_start`, `swa_start`, `swa_every`, `ema_start`, `ema_every`) follow the convention
    of [`~transformers.TrainingArguments`]: a value below 1 is a share of all training steps, any other a number of
    steps.

    Args:
        num_members (`int`, defaults to 10):
            Number K of copies of the late-phase weights, at least 1. With 1 nothing is replicated.
        late_phase_start (`float`, defaults to 0.6):
            T0, when the late-phase weights are replicated. Before it one model is trained.
        weights (`list[str]`, *optional*, defaults to `["rank1"]`):
            Families of late-phase weights, any of `"rank1"` (W ∘ u vᵀ, u and v replicated), `"norm"` (scale and shift
            of normalisation layers; of BatchNorm the running statistics too), `"head"` (the output layer),
            `"hypernet"` (layers with weights of one shape share weight templates, and the embeddings that mix them
            are replicated), `"full"` (every weight, an ablation). With `num_members=1` there is nothing to copy: only
            rank-1 factors and embeddings are put on the model, and the default is none at all.
        target_modules (`list[str]`, *optional*):
            Module names, name suffixes or regular expressions (matched against the full name), as in PEFT. They
            restrict every family of which they match a module; a family that none of them matches keeps its default.
            `None` or `["all-linear"]`: rank1 takes every linear-like layer (`nn.LSTM` and `nn.GRU` included) but
            embeddings and the output layer; norm takes every normalisation layer; hypernet every Linear and
            convolution that shares its shape with another, but the output layer.
        exclude_modules (`list[str]`, *optional*):
            Modules to leave alone, written like `target_modules`.
        init_noise (`float`, defaults to 0.0):
            σ0: at T0 each member is the shared value plus `init_noise` · rms(value) · N(0, I).
        base_gradient_scale (`float`, *optional*):
            γ_θ: the base weights' update uses `base_gradient_scale` · Σ_k Δθ_k. 1.0 sums the members' gradients, as in
            the paper, 1/K averages them. `None`: 1/K where the optimizer's step does not depend on the gradients'
            scale, 1.0 where it does (SGD); it is tried out and logged. Steps such as Adam's depend on a change of that
            scale: after a late T0 a sum makes them several times larger until the second moment has forgotten the
            smaller gradients before, some 1/(1 - β2) updates, unless clipping hides it.
        member_assignment (`str`, defaults to `"minibatch"`):
            `"minibatch"`: the members take turns, one minibatch each. `"sample"`: the rows of every minibatch are
            dealt out over the members in contiguous blocks and run in one pass.
        cycle_length (`int`, *optional*):
            Minibatches (over all processes) to one update after T0, a multiple of K. `None`: K (for `"sample"`: one).
            With `num_members=1` it gives the control that accumulates gradients without replicating anything.
        swa_start (`float`, *optional*):
            When stochastic weight averaging over base and members begins. `None`: never.
        swa_every (`float`, *optional*):
            Steps between two samples of the average. `None`: each update.
        ema_decay (`float`, *optional*):
            Decay per training step of an exponential moving average over base and members. It is ramped: n training
            steps after the first sample, which is copied, the step's decay is `min(ema_decay, (1 + n) / (10 + n))`. A
            sample that stands for several steps (`ema_every`, a cycle after T0) decays by the product of theirs.
            Excludes `swa_start` and `ema_memory`.
        ema_memory (`float`, *optional*):
            Memory of a moving average as a share, at most 0.5, of the training steps since it began: the mean age of
            what it averages is `ema_memory` times those steps. The decay n steps after the first sample is
            `n / (n + 1 / ema_memory - 1)` (polynomial-decay averaging, [arXiv
            1212.1824](https://arxiv.org/abs/1212.1824)). 0.1 suits runs of any length; 0.5 is the equal average.
            Excludes `swa_start` and `ema_decay`.
        ema_start (`float`, *optional*):
            When the moving average takes its first sample. `None`: 0.6, as T0. Until then the weights
            themselves are evaluated and saved: while the loss falls fast, every average is behind them.
        ema_every (`float`, *optional*):
            Steps between two of its samples. `None`: each update.
        average_device (`str`, *optional*):
            `"cpu"` keeps the average over time, and the current weights while it is evaluated, off the accelerator.
            Each sample is then copied there; a larger `ema_every` or `swa_every` makes that rare. `None`: beside the
            weights.
        evaluate_raw (`bool`, defaults to `False`):
            Whether `evaluate()` also reports the weights without the average over time, `eval_loss_raw` beside
            `eval_loss`, at the cost of a second pass. The end of training says which was better.
        member_weight_decay (`float`, *optional*):
            Weight decay of all late-phase weights from T0 on. `None`: Trainer's rule, as before T0.
        batch_norm_statistics (`str`, defaults to `"running"`):
            Which statistics the averaged model's BatchNorm layers have. `"running"`: the members' running ones,
            folded with their scale and shift so that each layer's output is the mean of the members' outputs (as the
            reference code evaluates). `"recomputed"`: averaged scale and shift, and statistics measured over the
            training set with the averaged weights. `"recomputed_members"`: measured for each member, then folded (as
            the paper does after SWA). Measuring takes one pass, or K, over the training set at each evaluation and
            saving after new training steps.

    The defaults are the paper's. Recommended, from the runs in `examples/benchmarks/RESULTS.md` and `docs/results.md`:

    - Fine-tuning a transformer on little text: `num_members=5, weights=["norm"], late_phase_start=0.05,
      base_gradient_scale=0.2, swa_start=0.1`, a constant rate, and gradient accumulation over a multiple of
      `num_members` minibatches. Of a gpt2 of two layers on 60 KB of Django's documentation, in bits per byte: 2.596,
      the strongest control 2.598 (a constant rate and SWA alone), SWA of linear decay 2.613.
    - Where it overfits, `weights=["rank1"], init_noise=0.15` in their place. On 60 KB of enwik6: 3.437, the strongest
      control 3.416 (a dropout of 0.05), SWA of linear decay 3.467. Try dropout and early stopping first.
    - Language models from scratch: `num_members=1`, plain training. A small LSTM on Django's documentation: late-phase
      2.171, one member that accumulates as long 2.170, plain training 2.061 (all with linear decay). A small gpt2:
      late-phase 3.074, one member that accumulates as long 3.073, plain training 2.880.
    - Image classifiers: replication won nothing in ten epochs of a small net (`docs/results.md`); `num_members=1` with
      `swa_start` or `ema_decay` is weight averaging alone. For long training there are the paper's figures only.

    Raises:
        `ValueError`: If a value is out of range; the message names the field.

    Example:

    ```python
    >>> from hf_latephase import LatePhaseConfig

    >>> LatePhaseConfig(num_members=5, weights=["rank1", "norm"]).late_phase_start
    0.6
    ```
    """

    num_members: int = field(default=10, metadata={"help": "Number K of copies of the late-phase weights."})
    late_phase_start: float = field(
        default=0.6, metadata={"help": "T0: below 1 a share of all training steps, else a number of steps."}
    )
    weights: list[str] = field(
        default=None,  # type: ignore[arg-type]  # __post_init__ fills it in
        metadata={"help": f"Families of late-phase weights, any of {', '.join(FAMILIES)}."},
    )
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "Module names, suffixes or regular expressions, as in PEFT."}
    )
    exclude_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules to leave alone, written like target_modules."}
    )
    init_noise: float = field(default=0.0, metadata={"help": "sigma_0, relative to the rms of each tensor."})
    base_gradient_scale: float | None = field(
        default=None,
        metadata={"help": "gamma_theta: 1.0 sums the members' base gradients, 1/K averages them. None: by optimizer."},
    )
    member_assignment: Literal["minibatch", "sample"] = field(
        default="minibatch", metadata={"help": "Members take turns by minibatch, or share the rows of each batch."}
    )
    cycle_length: int | None = field(
        default=None, metadata={"help": "Minibatches per update after T0, a multiple of K. None: K."}
    )
    swa_start: float | None = field(default=None, metadata={"help": "Start of SWA: share of all steps, or steps."})
    swa_every: float | None = field(default=None, metadata={"help": "Steps between SWA samples. None: each update."})
    ema_decay: float | None = field(default=None, metadata={"help": "Decay per step of a ramped moving average."})
    ema_memory: float | None = field(
        default=None, metadata={"help": "Memory of a moving average, a share of training so far, at most 0.5."}
    )
    ema_start: float | None = field(
        default=None, metadata={"help": "Start of the moving average: share of all steps, or steps. None: 0.6."}
    )
    ema_every: float | None = field(
        default=None, metadata={"help": "Steps between samples of the moving average. None: each update."}
    )
    average_device: str | None = field(
        default=None, metadata={"help": "'cpu' keeps the average over time off the accelerator."}
    )
    evaluate_raw: bool = field(
        default=False, metadata={"help": "Evaluate the weights without the average over time, too."}
    )
    member_weight_decay: float | None = field(
        default=None, metadata={"help": "Weight decay of all late-phase weights from T0 on. None: Trainer's rule."}
    )
    batch_norm_statistics: Literal["running", "recomputed", "recomputed_members"] = field(
        default="running",
        metadata={"help": "BatchNorm statistics of the averaged model: folded, or measured over the training set."},
    )

    def __post_init__(self) -> None:
        if not _is_count(self.num_members):
            raise ValueError(
                f"num_members must be a whole number of at least 1, got {self.num_members!r}. Choose 1 to replicate "
                "nothing, 10 as in the paper."
            )
        if self.weights is None:
            self.weights = ["rank1"] if self.num_members > 1 else []  # type: ignore[unreachable]
        self._check_weights()
        for name in ("target_modules", "exclude_modules"):
            self._check_patterns(name)
        _check_number("late_phase_start", self.late_phase_start, "a share of all steps (below 1) or a number of steps")
        _check_number("init_noise", self.init_noise, "relative to the rms of each tensor; 0 adds none")
        scale = self.base_gradient_scale
        if scale is not None and not (_is_finite(scale) and scale > 0):
            raise ValueError(
                f"base_gradient_scale must be positive and finite, got {scale!r}: 1.0 sums the members' base "
                "gradients, 1/num_members averages them. Leave it out to choose by the optimizer."
            )
        if self.member_assignment not in ("minibatch", "sample"):
            raise ValueError(
                f"member_assignment must be 'minibatch' or 'sample', got {self.member_assignment!r}: choose one."
            )
        if self.member_assignment == "sample" and "full" in self.weights:
            raise ValueError(
                "member_assignment='sample' cannot run weights=['full']: one pass cannot give each row of a batch its "
                "own copy of every weight. Use member_assignment='minibatch'."
            )
        if self.cycle_length is not None and not (
            _is_count(self.cycle_length) and self.cycle_length % self.num_members == 0
        ):
            raise ValueError(
                f"cycle_length must be a multiple of num_members={self.num_members}, so that every member sees "
                f"equally many minibatches; got {self.cycle_length!r}. Leave it out for the shortest cycle."
            )
        self._check_averaging()
        if self.member_weight_decay is not None:
            _check_number("member_weight_decay", self.member_weight_decay, "leave it out for Trainer's rule")
        self._check_statistics()

    def _check_statistics(self) -> None:
        known = ("running", "recomputed", "recomputed_members")
        if self.batch_norm_statistics not in known:
            raise ValueError(
                f"batch_norm_statistics must be one of {list(known)}, got {self.batch_norm_statistics!r}: choose one."
            )
        copies = {"norm", "full"} & set(self.weights)
        if self.batch_norm_statistics != "running" and self.num_members > 1 and not copies:
            raise ValueError(
                f"batch_norm_statistics={self.batch_norm_statistics!r} measures those of BatchNorm layers that are "
                f"late-phase weights, but weights={self.weights} has no 'norm'. Add it, or keep 'running'."
            )

    def _check_weights(self) -> None:
        if not isinstance(self.weights, (list, tuple)) or (not self.weights and self.num_members > 1):
            raise ValueError(
                f"weights must be a list with at least one of {list(FAMILIES)}, got {self.weights!r}. Write a single "
                "one as a list of one."
            )
        unknown = [family for family in self.weights if family not in FAMILIES]
        if unknown:
            raise ValueError(f"weights names unknown families {unknown}: choose from {list(FAMILIES)}.")
        if len(set(self.weights)) != len(self.weights):
            raise ValueError(f"weights names a family twice: {self.weights}. Name each once.")
        if "full" in self.weights and len(self.weights) > 1:
            raise ValueError(
                f"weights=['full'] replicates every weight and stands alone, got {self.weights}. Drop the others, or "
                "'full'."
            )

    def _check_patterns(self, name: str) -> None:
        patterns = getattr(self, name)
        if patterns is None:
            return
        if (
            not isinstance(patterns, (list, tuple))
            or not patterns
            or not all(isinstance(p, str) and p for p in patterns)
        ):
            raise ValueError(
                f"{name} must be None or a list of names or regular expressions, got {patterns!r}. "
                "Write a single one as a list of one."
            )

    def _check_averaging(self) -> None:
        if self.swa_start is not None:
            _check_number("swa_start", self.swa_start, "a share of all steps (below 1) or a number of steps")
            same_unit = (self.swa_start < 1) == (self.late_phase_start < 1)
            # With one member T0 changes nothing, so SWA may start anywhere.
            if self.num_members > 1 and same_unit and self.swa_start < self.late_phase_start:
                raise ValueError(
                    f"swa_start={self.swa_start} lies before late_phase_start={self.late_phase_start}: the average "
                    "would mix members with the weights that they came from. Start SWA at T0 or later."
                )
        if self.swa_every is not None and self.swa_start is None:
            raise ValueError("swa_every needs swa_start: set it, or leave both out.")
        if self.ema_decay is not None and not (_is_finite(self.ema_decay) and 0 < self.ema_decay < 1):
            raise ValueError(
                f"ema_decay must lie between 0 and 1 (both excluded), got {self.ema_decay!r}. Leave it out for no "
                "average; 0.999 is usual."
            )
        if self.ema_memory is not None and not (_is_finite(self.ema_memory) and 0 < self.ema_memory <= 0.5):
            raise ValueError(
                f"ema_memory must be a share of training so far, above 0 and at most 0.5, got {self.ema_memory!r}. "
                "0.1 is usual."
            )
        averages = [name for name in ("swa_start", "ema_decay", "ema_memory") if getattr(self, name) is not None]
        if len(averages) > 1:
            raise ValueError(f"{' and '.join(averages)} exclude each other: choose one average.")
        if self.ema_start is not None:
            _check_number("ema_start", self.ema_start, "a share of all steps (below 1) or a number of steps")
        for name in ("ema_start", "ema_every"):
            if getattr(self, name) is not None and not {"ema_decay", "ema_memory"} & set(averages):
                raise ValueError(f"{name} needs ema_decay or ema_memory: set one, or leave {name} out.")
        for name in ("swa_every", "ema_every"):
            every = getattr(self, name)
            if every is not None and not (_is_finite(every) and every > 0):
                raise ValueError(
                    f"{name} must be positive (a share of all steps below 1, or steps), got {every!r}. "
                    "Leave it out to average after each update."
                )
        if self.average_device not in (None, "cpu"):
            raise ValueError(
                f"average_device must be None or 'cpu', got {self.average_device!r}: None keeps the average over time "
                "beside the weights."
            )
        if not isinstance(self.evaluate_raw, bool):
            raise ValueError(f"evaluate_raw must be True or False, got {self.evaluate_raw!r}.")
        for name in ("average_device", "evaluate_raw"):
            if getattr(self, name) and not averages:
                raise ValueError(
                    f"{name} needs an average over time: set swa_start, ema_decay or ema_memory, or leave {name} out."
                )

    @property
    def averages_over_time(self) -> bool:
        """Whether SWA or a moving average is asked for, which is then evaluated and saved."""
        return self.swa_start is not None or self.ema_decay is not None or self.ema_memory is not None

    @classmethod
    def preset(cls, name: str, **changes: Any) -> LatePhaseConfig:
        """
        Returns settings that are recommended for a purpose.

        - `"ema"`: plain training and a moving average, from 0.6 of training on, over the last tenth of the steps since
          (`docs/averaging.md`).
        - `"swa"`: plain training and the equal average of its last quarter ([arXiv
          1803.05407](https://arxiv.org/abs/1803.05407)).
        - `"finetune"`: a transformer on little text, with a constant rate and gradient accumulation over a multiple of
          five minibatches (`examples/benchmarks/RESULTS.md`).
        - `"paper-lm"`: the paper's language model, as in `examples/language_modeling/recipes/enwik8_lstm_paper.yaml`.
        - `"paper-cifar"`: the paper's wide residual network, as in `examples/vision/recipes/cifar10_sgd.yaml`.

        Args:
            name (`str`):
                One of these.
            changes (`Any`):
                Fields to set otherwise.

        Raises:
            `ValueError`: If there is no preset of that name.

        Example:

        ```python
        >>> from hf_latephase import LatePhaseConfig

        >>> LatePhaseConfig.preset("ema", evaluate_raw=True).ema_memory
        0.1

        ```
        """
        if name not in PRESETS:
            raise ValueError(f"There is no preset {name!r}: choose one of {sorted(PRESETS)}.")
        return cls(**(copy.deepcopy(PRESETS[name]) | changes))

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain Python values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LatePhaseConfig:
        """
        Builds a config from a dictionary.

        Raises:
            `ValueError`: If a key is unknown.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"Unknown LatePhaseConfig fields {unknown}. Known fields: {sorted(known)}.")
        return cls(**values)

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Writes `late_phase_config.json` into `save_directory`, which is created if need be."""
        os.makedirs(save_directory, exist_ok=True)
        with open(os.path.join(save_directory, CONFIG_NAME), "w", encoding="utf-8") as file:
            json.dump(self.to_dict(), file, indent=2, sort_keys=True)
            file.write("\n")

    @classmethod
    def from_pretrained(cls, save_directory: str | os.PathLike) -> LatePhaseConfig:
        """
        Reads a config that [`~LatePhaseConfig.save_pretrained`] wrote.

        Raises:
            `FileNotFoundError`: If the folder holds none.
            `ValueError`: If the file is damaged, or holds an unknown key or a value out of range.
        """
        path = os.path.join(save_directory, CONFIG_NAME)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"No {CONFIG_NAME} in {str(save_directory)!r}: nothing was saved there.")
        with open(path, encoding="utf-8") as file:
            try:
                values = json.load(file)
            except ValueError as error:
                raise ValueError(f"{path!r} is not valid JSON ({error}). Save the config again.") from error
        return cls.from_dict(values)


def _check_number(name: str, value: float, meaning: str) -> None:
    if not (_is_finite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and not negative ({meaning}), got {value!r}.")


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
