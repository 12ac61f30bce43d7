"""Every command and every snippet of the README and of docs/ runs, or stands here with the reason why it cannot."""

from __future__ import annotations

import copy
import importlib
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    ByT5Tokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
)

import draw_cycle
from hf_latephase import LatePhase, LatePhaseConfig
from hf_latephase.data import ByteSplits, load_bytes
from tiny import Text, arguments, gpt2, trainer


ROOT = Path(__file__).resolve().parents[1]
README = "\n".join(
    path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
)
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)

# What makes a command small: the same script and recipe, with these flags after its own.
SHORT = """--max_steps 6 --num_members 2 --eval_strategy steps --eval_steps 3 --logging_steps 3 --save_strategy no
    --per_device_train_batch_size 4 --gradient_accumulation_steps 1 --output_dir out --use_cpu --disable_tqdm true
    --dataloader_num_workers 0 --dataloader_persistent_workers false --dataloader_pin_memory false --report_to none """
TEXT = SHORT + "--max_bytes 4000 --window 16 --stride 8 --curve_bytes 60 --sample_bytes 20 --model_config "
LSTM = TEXT + """'{"embedding_size": 6, "hidden_size": 8}' """
GPT2 = TEXT + """'{"n_embd": 8, "n_layer": 1, "n_head": 2}' """
IMAGES = (
    SHORT
    + """--image_size 8 --padding 1 --cutout 0 --curve_images 4 --ood_dataset my/folder --method late_phase base
    --model_config '{"depth": 10, "widen_factor": 1}' """
)

TEXT, VISION = "examples/language_modeling/", "examples/vision/"
SPEED = "examples/benchmarks/speed/"
RUN = {
    f"python {TEXT}run_enwik8.py {TEXT}recipes/enwik8_demo.yaml": LSTM,
    f"python {TEXT}run_enwik8.py {TEXT}recipes/enwik8_demo.yaml --data_file my.txt": LSTM,
    # What the Hub or a download would give is a file, a folder and a tiny model here (see `workplace`).
    f"python {TEXT}run_enwik8.py {TEXT}recipes/enwik8_gpt2.yaml --method late_phase base": GPT2,
    f"python {TEXT}run_finetune.py {TEXT}recipes/finetune.yaml --model my/lm --data_file my.txt": (
        "--use_cpu --max_steps 2 --window 16 --output_dir out"
    ),
    f"python {TEXT}score_ensemble.py --models outputs/a/base outputs/b/base --data_file my.txt": (
        "--models my/lm my/lm --use_cpu --window 16 --output_dir out"
    ),
    f"python {TEXT}run_enwik8.py --help": "",
    f"python {VISION}run_cifar.py {VISION}recipes/cifar_digits.yaml": IMAGES,
    f"python {VISION}run_cifar.py {VISION}recipes/cifar10_swa.yaml": IMAGES + "--dataset my/folder",
    f"python {VISION}run_cifar.py {VISION}recipes/cifar10_sgd.yaml --dataset my/folder": IMAGES,
    f"python {VISION}run_imagenet.py {VISION}recipes/imagenet_resnet50.yaml": (
        SHORT + "--model my/model --dataset my/folder"
    ),
    "python examples/toy/noisy_quadratic.py": "--output_dir out --replicas 20 --num_updates 50 --num_members 2",
}
LAUNCHED = {
    "accelerate launch --config_file examples/accelerate_configs/ddp.yaml your_script.py",
    "accelerate launch --config_file examples/accelerate_configs/fsdp2.yaml your_script.py",
}
# Makes an environment of its own first, which takes minutes: make is only asked what it would run then.
MADE = {
    "make demo": rf"OMP_NUM_THREADS=1 \S+ ({TEXT}run_enwik8.py {TEXT}recipes/enwik8_demo.yaml)",
    "make test": r"OMP_NUM_THREADS=1 \S+ (-m pytest -n 2)",
}
CANNOT_RUN = {
    'pip install ".[examples,vision]" torch torchvision': "needs the network; `make` and test_packaging.py install",
    f"python {SPEED}speed.py --device cuda": "needs a GPU",
    f"HF_LATEPHASE_FUSED=0 python {SPEED}speed.py --device cuda --rows rank1 --write false": "needs a GPU",
    f"python {SPEED}overhead.py --device cuda": "needs a GPU",
    "accelerate launch --config_file examples/accelerate_configs/deepspeed_zero2.yaml your_script.py": (
        "needs DeepSpeed; test_deepspeed.py launches it where that is installed"
    ),
}


def commands() -> list[str]:
    """The lines of all shell blocks, without their comments."""
    lines = "".join(text.replace("\\\n", " ") for language, text in BLOCKS if language == "bash").splitlines()
    bare = (re.sub(r"(^|\s+)#.*", "", line).strip() for line in lines)
    return [line for line in bare if line]


def snippets() -> list[str]:
    return [text for language, text in BLOCKS if language == "python"]


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """A folder from which the commands find what they name, and in which their outputs stay."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("run_enwik8.load_bytes", load_text)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    rng = np.random.default_rng(0)
    (tmp_path / "my.txt").write_text(" ".join(rng.choice(["late", "phase", "weights"], 1000)))
    for split in ("train", "test"):
        for label in ("a", "b"):
            folder = tmp_path / "my" / "folder" / split / label
            folder.mkdir(parents=True)
            for index in range(10):
                PIL.Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    names = {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", **names)
    ResNetForImageClassification(config).save_pretrained(tmp_path / "my" / "model")
    language = GPT2Config(vocab_size=259, n_embd=8, n_layer=1, n_head=2, n_positions=32)
    GPT2LMHeadModel(language).save_pretrained(tmp_path / "my" / "lm")
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / "my" / "lm")
    return tmp_path


def load_text(data_file: str | None, dataset: str | None, cache_dir: str | None) -> ByteSplits:
    """In place of `load_bytes`: enwik8 is a file of one's own."""
    return load_bytes("my.txt" if dataset == "enwik8" else data_file)


def test_every_command_is_run_or_excused() -> None:
    known = {*RUN, *LAUNCHED, *MADE, *CANNOT_RUN}
    assert set(commands()) == known, "put a new command of the documentation into one of the lists above"
    assert {snippet.splitlines()[0] for snippet in snippets()} == {*SNIPPETS, *PUBLISHING}, (
        "test a new snippet of the documentation"
    )
    # No language under which a command would go unseen.
    assert {language for language, _ in BLOCKS} <= {"bash", "python", "bibtex", ""}
    assert not [
        text for language, text in BLOCKS if not language and re.search(r"^\$? ?(python|pip|make) ", text, re.M)
    ]


def test_every_file_that_is_named_exists() -> None:
    # The README's; mkdocs looks at those in docs/.
    links = re.findall(r"\]\((?!https?://|#)([^)\s]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    quoted = re.findall(r"\b(?:examples|tests|docs)/[\w./*-]*\w", README)
    assert len(links) > 3 and len(quoted) > 10
    assert not [name for name in {*links, *quoted} if not any(ROOT.glob(name))]


@pytest.mark.parametrize("command", RUN)
def test_scripts(command: str, workplace: Path) -> None:
    python, script, *own = shlex.split(command)
    assert python == "python" and (workplace / script).is_file()
    main = importlib.import_module(Path(script).stem).main
    if "--help" in own:
        with pytest.raises(SystemExit) as stopped:
            main(own)
        assert stopped.value.code == 0
        return
    main([*own, *shlex.split(RUN[command])])
    assert (workplace / "out" / "results.json").is_file()


@pytest.mark.parametrize("command", MADE)
def test_make(command: str) -> None:
    shown = subprocess.run(["make", "-n", *command.split()[1:]], cwd=ROOT, capture_output=True, text=True, check=True)
    (last,) = re.findall(MADE[command], shown.stdout)
    assert last.startswith("-m pytest") or f"python {last}" in RUN


def test_installing_names_extras_that_exist() -> None:
    named = {extra for text in re.findall(r"\"?\.\[([\w,]+)\]", README) for extra in text.split(",")}
    assert named and all(f'"{extra}"' in (ROOT / "setup.py").read_text() for extra in named)


def test_the_drawing_is_what_its_script_draws(tmp_path: Path) -> None:
    draw_cycle.main(tmp_path / "cycle.svg")
    # Releases of matplotlib place letters differently, so not byte by byte.
    drawings = [re.findall(r'id="[a-z]+_\d+"|#[0-9a-f]{6}', path.read_text()) for path in (
        tmp_path / "cycle.svg", draw_cycle.DRAWING,
    )]  # fmt: skip
    assert drawings[0] == drawings[1] and len(drawings[0]) > 50


# ---- snippets ----


def quick_start(snippet: str, folder: Path) -> None:
    names: dict[str, Any] = {
        "model": gpt2(),
        "training_args": arguments(folder / "run", max_steps=30),
        "train_dataset": Text(64),
        "eval_dataset": Text(12, seed=2),
    }
    exec(snippet, names)
    check_saved(folder, names["trainer"])


def check_saved(folder: Path, run: Any) -> None:
    assert run.late_phase.released and run.late_phase.distance_from_mean() > 0
    ids = run.eval_dataset[0]["input_ids"][None]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder / "out")(ids).logits
        torch.testing.assert_close(logits, run.averaged_model().eval()(ids).logits)


def settings_of_the_controls(snippet: str, folder: Path) -> None:
    configs: list[LatePhaseConfig] = []
    for line in snippet.splitlines():
        configs.append(eval(line, {"LatePhaseConfig": LatePhaseConfig}))
    assert configs
    for config in configs:
        run = trainer(folder, gpt2(), config, max_steps=20)
        run.train()
        averages_over_time = run.time_average is not None and run.time_average.num_averaged > 0
        assert averages_over_time == (config.cycle_length is None)


def own_loop(snippet: str, folder: Path) -> None:
    model = gpt2()
    batches = [{"input_ids": row["input_ids"][None], "labels": row["labels"][None]} for row in Text(6)]
    config = LatePhaseConfig(num_members=3, weights=["norm"])
    before = copy.deepcopy(model.state_dict())
    exec(snippet, {
        "torch": torch, "LatePhase": LatePhase, "model": model, "config": config, "cycles": [batches[:3], batches[3:]],
    })  # fmt: skip
    saved = AutoModelForCausalLM.from_pretrained(folder / "out").state_dict()
    assert saved.keys() == before.keys() and any(not torch.equal(saved[key], before[key]) for key in saved)


SNIPPETS: dict[str, Callable[[str, Path], None]] = {
    "from hf_latephase import LatePhaseConfig, LatePhaseTrainer": quick_start,
    "LatePhaseConfig(num_members=1, swa_start=0.75)  # SWA: the mean of the last quarter's weights": (
        settings_of_the_controls
    ),
    'LatePhaseConfig.preset("ema")  # from 0.6 of training on, a moving average over the last tenth since': (
        settings_of_the_controls
    ),
    'LatePhaseConfig.preset("ema")  # plain training, and a moving average of the weights from 0.6 of it on': (
        settings_of_the_controls
    ),
    "with LatePhase(model, config) as late_phase:": own_loop,
    'LatePhaseConfig(num_members=5, weights=["norm"], late_phase_start=0.05, base_gradient_scale=1 / 5, '
    "swa_start=0.1)": settings_of_the_controls,
}
# Need a Hub: test_hub.py, which runs the first as it stands and loads in a fresh process as the second says.
PUBLISHING = (
    "trainer.train()",
    'model = AutoModelForCausalLM.from_pretrained("me/my-model", trust_remote_code=True)  # for models with code',
)


@pytest.mark.parametrize("snippet", [text for text in snippets() if text.splitlines()[0] in SNIPPETS])
def test_snippets(snippet: str, workplace: Path) -> None:
    SNIPPETS[snippet.splitlines()[0]](snippet, workplace)


# ---- on two processes ----

YOUR_SCRIPT = """
import os

import torch.distributed as dist
from distributed_worker import allow_fsdp_on_cpu
from tiny import Text, arguments, gpt2

allow_fsdp_on_cpu()
model, train_dataset, eval_dataset = gpt2(), Text(160), Text(12, seed=2)
training_args = arguments("run", max_steps=10, gradient_accumulation_steps=5)
assert training_args.world_size == 2
{snippet}
assert trainer.late_phase.released and trainer.late_phase.distance_from_mean() > 0
print("world size", trainer.accelerator.num_processes, flush=True)
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # as in distributed_worker.py: gloo's threads may abort an interpreter that shuts down
"""


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted(LAUNCHED))
def test_launching(command: str, workplace: Path) -> None:
    (workplace / "your_script.py").write_text(YOUR_SCRIPT.format(snippet=textwrap.dedent(snippets()[0])))
    launcher, *own = shlex.split(command)
    assert launcher == "accelerate"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", *own],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("world size 2") == 2
    AutoModelForCausalLM.from_pretrained(workplace / "out")
