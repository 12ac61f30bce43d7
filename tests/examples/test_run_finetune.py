"""Fine-tuning of pretrained language models: any tokenizer, scored in bits per byte, before and after."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    ByT5Tokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

import score_ensemble
from byte_lm import members_forward
from common.recipe import parse_arguments
from hf_latephase import LatePhase, LatePhaseConfig
from hf_latephase.analysis import score_bytes
from hf_latephase.models import LSTMForCausalLM, LSTMLMConfig
from run_enwik8 import MethodArguments
from run_finetune import PretrainedArguments, TextArguments, load_texts, main, tokenize


RECIPES = Path(__file__).resolve().parents[2] / "examples" / "language_modeling" / "recipes"
WINDOW = 16


@pytest.fixture
def text(tmp_path):
    words = np.random.default_rng(0).choice(["late ", "phase ", "weights\n", "é "], 600)
    path = tmp_path / "text.txt"
    path.write_text("".join(words), encoding="utf-8")
    return path


@pytest.fixture(params=["bytes", "subwords"])
def pretrained(request, tmp_path, text):
    """A folder as users have it: a model with its tokenizer."""
    if request.param == "bytes":
        tokenizer = ByT5Tokenizer(extra_ids=0)
    else:
        bpe = ByteLevelBPETokenizer()
        bpe.train([str(text)], vocab_size=280, special_tokens=["<end>"], show_progress=False)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<end>")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=2, n_positions=WINDOW + 1, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=None,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model", tokenizer


@pytest.fixture
def flags(tmp_path, text):
    return [
        *("--data_file", str(text), "--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out")),
        *("--window", str(WINDOW), "--num_members", "2", "--max_steps", "4", "--late_phase_start", "0.5"),
        *("--weights", "norm", "--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "4"),
        *("--learning_rate", "1e-2", "--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy", "no"),
        *("--max_train_tokens", "400", "--use_cpu", "--disable_tqdm", "true", "--dataloader_pin_memory", "false"),
    ]


def bits_per_byte(model, ids, num_bytes, first):
    """Windows of WINDOW tokens, half of each scored, written out."""
    bits, stride = 0.0, WINDOW // 2
    inputs = torch.tensor([first, *ids])
    for end in range(WINDOW, len(ids) + stride, stride):
        end = min(end, len(ids))
        with torch.no_grad():
            log_probs = model(inputs[None, end - WINDOW : end]).logits[0].double().log_softmax(-1)
        own = -log_probs.gather(1, inputs[end - WINDOW + 1 : end + 1, None])[:, 0]
        count = WINDOW if end == WINDOW else (len(ids) - WINDOW) % stride or stride if end == len(ids) else stride
        bits += own[-count:].sum().item() / math.log(2)
    return bits / num_bytes


def test_a_run_scores_before_and_after_in_bits_per_byte(pretrained, flags, text, tmp_path):
    folder, tokenizer = pretrained
    main([*flags, "--method", "late_phase", "base"])
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["results"]
    assert [result["method"] for result in results] == ["before", "late_phase", "base"]
    content = text.read_bytes()
    test = content[len(content) * 95 // 100 :].decode(errors="ignore")
    ids = tokenizer(test, add_special_tokens=False)["input_ids"]
    for result, path in zip(
        results, (folder, tmp_path / "out" / "late_phase", tmp_path / "out" / "base"), strict=True
    ):
        model = AutoModelForCausalLM.from_pretrained(path).eval()
        expected = bits_per_byte(model, ids, len(test.encode()), tokenizer.eos_token_id)
        assert result["scores"]["test"] == pytest.approx(expected, rel=1e-5)
    assert results[1]["scores"]["test"] < results[0]["scores"]["test"]
    assert results[1]["scores"] != results[2]["scores"]
    # Before T0 the methods are one.
    assert results[1]["curve"][0] == results[2]["curve"][0]
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_splits_of_a_data_set(tmp_path):
    rows = {"train": ["ab", "cd"], "validation": ["e"], "test": ["f"]}
    for name, words in rows.items():
        Dataset.from_dict({"words": words}).to_json(tmp_path / f"{name}.json")
    arguments = TextArguments(dataset=str(tmp_path), text_column="words")
    assert load_texts(arguments) == {"train": "ab\ncd", "validation": "e", "test": "f"}
    with pytest.raises(ValueError, match="no column 'text', only \\['words'\\]"):
        load_texts(TextArguments(dataset=str(tmp_path)))
    (tmp_path / "test.json").unlink()
    with pytest.raises(ValueError, match="no split \\['test'\\]"):
        load_texts(arguments)


def test_a_text_cut_short_counts_the_bytes_that_are_left():
    split = tokenize("é" * 10, ByT5Tokenizer(extra_ids=0), 4)
    assert (len(split.ids), split.num_bytes) == (4, 4)


@pytest.mark.parametrize("pretrained", ["bytes"], indirect=True)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--window", "17"], "window=17 takes 18 positions, but the model has 17"),
        (["--model_config", '{"resid_pdropp": 0.1}'], "GPT2Config has no field 'resid_pdropp'"),
        (["--model_config", "[]"], "model_config must be a mapping"),
        (["--dataset", "some/name"], "data_file and dataset are both given"),
        (["--max_eval_tokens", "0"], "max_eval_tokens must be at least 1"),
        (["--model", ""], "model is missing"),
        (["--target_modules", "nothing"], "nothing"),
        (["--method", "lat_phase"], "did you mean 'late_phase'"),
        (["--resume_from_checkpoint", "x"], "Use --resume"),
    ],
)
def test_bad_input_is_refused_before_training(pretrained, arguments, message, flags, tmp_path):
    with pytest.raises(ValueError, match=message):
        main([*flags, *arguments])
    assert not (tmp_path / "out").exists()


def test_the_recipe_is_one_cycle_an_update(tmp_path):
    types = (PretrainedArguments, TextArguments, MethodArguments, LatePhaseConfig, TrainingArguments)
    arguments = [str(RECIPES / "finetune.yaml"), "--model=x", f"--output_dir={tmp_path}"]
    *_, config, args = parse_arguments(types, arguments)
    assert args.gradient_accumulation_steps % config.num_members == 0


@pytest.mark.parametrize("chunk", [5, 30])
@pytest.mark.parametrize("kind", ["lstm", "gpt2"])
def test_the_ensemble_of_members_is_the_mean_of_their_probabilities(kind, chunk):
    torch.manual_seed(0)
    if kind == "lstm":
        model = LSTMForCausalLM(LSTMLMConfig(embedding_size=4, hidden_size=8))
    else:
        config = GPT2Config(
            vocab_size=259, n_embd=8, n_layer=1, n_head=2, n_positions=31, bos_token_id=1, eos_token_id=1,
            initializer_range=0.5,  # far from uniform, so that members differ
        )  # fmt: skip
        model = GPT2LMHeadModel(config)
    late_phase = LatePhase(model, LatePhaseConfig(num_members=3, init_noise=1.0))
    late_phase.release(torch.Generator().manual_seed(1))
    ids = np.random.default_rng(0).integers(3, 259, 30)
    own = torch.tensor(ids)
    inputs = torch.cat([torch.tensor([1]), own[:-1]])[None]
    model.eval()
    total = torch.zeros(30)
    for member in range(3):
        late_phase.activate(member)
        with torch.no_grad():
            if kind == "lstm" or chunk == 30:
                logits = model(input_ids=inputs).logits[0]
            else:  # windows that do not overlap
                logits = model(input_ids=inputs.view(-1, chunk)).logits.flatten(0, 1)
        total += logits.softmax(-1).gather(1, own[:, None])[:, 0] / 3
    forward = members_forward(late_phase, model)
    score = score_bytes(model, ids, chunk, forward=forward, disable_tqdm=True)
    assert score.nll_nats == pytest.approx(-total.log().sum().item(), rel=1e-5)
    late_phase.activate(0)
    alone = score_bytes(model, ids, chunk, disable_tqdm=True)
    assert score.nll_nats != pytest.approx(alone.nll_nats, rel=1e-3)


@pytest.mark.parametrize("pretrained", ["bytes"], indirect=True)
def test_the_members_ensemble_is_scored_on_demand(pretrained, flags, tmp_path):
    more = ["--init_noise", "0.3", "--score_members", "true", "--swa_start", "0.5"]
    main([*flags, *more, "--method", "late_phase", "base"])
    _, late, base = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["results"]
    assert late["ensemble_scores"] != late["scores"]
    assert late["ensemble_scores"]["test"] == pytest.approx(late["scores"]["test"], rel=0.05)
    assert base["ensemble_scores"] is None
    assert "late_phase, ensemble of the members" in (tmp_path / "out" / "results.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("pretrained", ["bytes"], indirect=True)
def test_a_deep_ensemble_is_the_mean_of_its_models_probabilities(pretrained, text, tmp_path):
    folder, tokenizer = pretrained
    torch.manual_seed(5)
    other = GPT2LMHeadModel(AutoModelForCausalLM.from_pretrained(folder).config)
    other.save_pretrained(tmp_path / "other")
    flags = ["--data_file", str(text), "--window", str(WINDOW), "--output_dir", str(tmp_path / "both"), "--use_cpu"]
    score_ensemble.main([*flags, "--disable_tqdm", "true", "--models", str(folder), str(tmp_path / "other")])
    results = json.loads((tmp_path / "both" / "results.json").read_text(encoding="utf-8"))["results"]
    assert [result["method"] for result in results] == [str(folder), str(tmp_path / "other"), "ensemble"]
    content = text.read_bytes()
    test = content[len(content) * 95 // 100 :].decode(errors="ignore")
    ids = tokenizer(test, add_special_tokens=False)["input_ids"]
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in (folder, tmp_path / "other")]

    class Mean:
        def __call__(self, inputs):
            probabilities = sum(model(inputs).logits.double().softmax(-1) for model in models) / 2
            return type("Output", (), {"logits": probabilities.log()})()

    for result, model in zip(results, (*models, Mean()), strict=True):
        expected = bits_per_byte(model, ids, len(test.encode()), tokenizer.eos_token_id)
        assert result["scores"]["test"] == pytest.approx(expected, rel=1e-5)
    assert len({result["scores"]["test"] for result in results}) == 3
    with pytest.raises(ValueError, match="at least two"):
        score_ensemble.main([*flags, "--models", str(folder)])


def test_a_deep_ensemble_of_lstms_reads_on(text, tmp_path):
    folders = [tmp_path / name for name in ("a", "b")]
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        LSTMForCausalLM(LSTMLMConfig(embedding_size=4, hidden_size=8)).save_pretrained(folder)
        ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    scores = []
    for window in (8, 1000):  # in chunks, and in one go
        out = tmp_path / f"out-{window}"
        flags = ["--data_file", str(text), "--window", str(window), "--output_dir", str(out), "--use_cpu"]
        score_ensemble.main([*flags, "--disable_tqdm", "true", "--models", *map(str, folders)])
        results = json.loads((out / "results.json").read_text(encoding="utf-8"))["results"]
        scores.append([result["scores"]["test"] for result in results])
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)
