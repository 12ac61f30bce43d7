"""LatePhaseMixin on sentence-transformers' trainers: past T0, evaluated, saved, reloaded with the stock class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, BertModel

from hf_latephase import LatePhaseConfig
from hf_latephase.training.trainer import LatePhaseMixin
from test_other_trainers import CPU, WORDS, config, texts, tokenizer
from tiny import same_weights


st = pytest.importorskip("sentence_transformers")
try:
    from sentence_transformers.sentence_transformer import evaluation, losses, modules
except ImportError:  # their names before sentence-transformers 6
    from sentence_transformers import evaluation, losses
    from sentence_transformers import models as modules
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def pairs(rows: int, seed: int = 1) -> Dataset:
    """Two sentences and how alike they are."""
    left, right = texts(rows, seed)["text"], texts(rows, seed + 10)["text"]
    return Dataset.from_dict({"left": left, "right": right, "score": [index % 2 * 1.0 for index in range(rows)]})


def entailments(rows: int, seed: int = 1) -> Dataset:
    """Two sentences and one of three labels."""
    data = pairs(rows, seed).remove_columns("score")
    return data.add_column("label", [index % 3 for index in range(rows)])


def bert(folder: Path, model_class: type, **kwargs: Any) -> str:
    settings = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, pad_token_id=0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        **kwargs,
    )  # fmt: skip
    torch.manual_seed(0)
    model_class(settings).save_pretrained(folder / "bert")  # type: ignore[attr-defined]
    tokenizer().save_pretrained(folder / "bert")
    return str(folder / "bert")


def bi_encoder(folder: Path) -> Any:
    transformer = modules.Transformer(bert(folder, BertModel))
    return st.SentenceTransformer(modules=[transformer, modules.Pooling(16)], device="cpu")


def cross_encoder(folder: Path) -> Any:
    path = bert(folder, BertForSequenceClassification, num_labels=1)
    return st.CrossEncoder(path, num_labels=1, device="cpu")


def softmax(model: Any) -> Any:
    """A loss with weights of its own, which are trained but not saved."""
    return losses.SoftmaxLoss(model, sentence_embedding_dimension=16, num_labels=3)


def cached(model: Any) -> Any:
    """A loss that runs the model again in its backward pass."""
    return losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)


# By name: the trainer, its arguments, the model, the data, the loss.
KINDS: dict[str, tuple[str, str, Any, Any, Any]] = {
    "cosine": ("SentenceTransformerTrainer", "SentenceTransformerTrainingArguments", bi_encoder, pairs,
               lambda model: losses.CosineSimilarityLoss(model)),
    "softmax": ("SentenceTransformerTrainer", "SentenceTransformerTrainingArguments", bi_encoder, entailments,
                softmax),
    "cached": ("SentenceTransformerTrainer", "SentenceTransformerTrainingArguments", bi_encoder,
               lambda *args, **kwargs: pairs(*args, **kwargs).remove_columns("score"), cached),
    "cross": ("CrossEncoderTrainer", "CrossEncoderTrainingArguments", cross_encoder, pairs, None),
}  # fmt: skip


def make(folder: Path, kind: str, late: LatePhaseConfig | None = None, model: Any = None, **kwargs: Any) -> Any:
    """A trainer of one kind, of sentence-transformers' own class with `late=None`."""
    trainer_class, args_class, make_model, data, make_loss = KINDS[kind]
    stock: Any = getattr(st, trainer_class)
    late_class: Any = type(f"LatePhase{trainer_class}", (LatePhaseMixin, stock), {})
    model = model or make_model(folder)
    torch.manual_seed(0)
    extra = {} if make_loss is None else {"loss": make_loss(model)}
    args = getattr(st, args_class)(
        str(folder), **{**CPU, "max_steps": 6, "save_strategy": "no", "lr_scheduler_type": "constant", **kwargs}
    )
    own = {} if late is None else {"late_phase_config": late}
    return (stock if late is None else late_class)(
        model=model, args=args, train_dataset=data(24), eval_dataset=data(8, seed=2), **own, **extra
    )


def outputs(model: Any) -> torch.Tensor:
    data = pairs(8, seed=3)
    if isinstance(model, st.CrossEncoder):
        return model.predict(list(zip(data["left"], data["right"], strict=True)), convert_to_tensor=True)
    return model.encode(list(data["left"]), convert_to_tensor=True)


@pytest.mark.parametrize("kind", KINDS)
def test_trains_past_t0_and_saves_a_stock_model(tmp_path, kind: str) -> None:
    late = config(3, ["rank1", "norm"], init_noise=0.1)
    run = make(tmp_path / "a", kind, late, save_strategy="steps", save_steps=4)
    run.train()
    logs = [log for log in run.state.log_history if "loss" in log]
    assert [log["late_phase"] for log in logs] == [0.0] * 2 + [1.0] * 4
    assert run.late_phase.distance_from_mean() > 0
    run.save_model(tmp_path / "saved")
    loaded = type(run.model)(str(tmp_path / "saved"), device="cpu")
    assert torch.allclose(outputs(loaded), outputs(run.model), atol=1e-6)
    if kind != "softmax":  # its loss has weights of its own
        stock = make(tmp_path / "stock", kind, model=loaded)
        assert run.evaluate()["eval_loss"] == pytest.approx(stock.evaluate()["eval_loss"], abs=1e-6)
        resumed = make(tmp_path / "b", kind, late)
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
        same_weights(resumed.model, run.model)


@pytest.mark.parametrize("kind", KINDS)
def test_one_member_is_the_stock_trainer_to_the_bit(tmp_path, kind: str) -> None:
    plain = make(tmp_path, kind, gradient_accumulation_steps=2, max_steps=3)
    run = make(tmp_path, kind, LatePhaseConfig(num_members=1, late_phase_start=0), gradient_accumulation_steps=2,
               max_steps=3)  # fmt: skip
    plain.train()
    run.train()
    same_weights(run.model, plain.model)
    same_weights(run.loss, plain.loss)


@pytest.mark.parametrize("save_only_model", [False, True])
@pytest.mark.parametrize("kind", ["cosine", "cross"])
def test_the_best_model_is_loaded(tmp_path, kind: str, save_only_model: bool) -> None:
    run = make(
        tmp_path, kind, config(2, ["rank1"], init_noise=0.1), eval_strategy="steps", eval_steps=2,
        save_strategy="steps", save_steps=2, load_best_model_at_end=True, save_only_model=save_only_model,
        learning_rate=0.5,
    )  # fmt: skip
    run.train()
    best = type(run.model)(run.state.best_model_checkpoint, device="cpu")
    assert torch.allclose(outputs(best), outputs(run.model), atol=1e-6)
    seen = [log["eval_loss"] for log in run.state.log_history if "eval_loss" in log]
    assert len(seen) == 3 and run.evaluate()["eval_loss"] == pytest.approx(min(seen), abs=1e-5)
    assert run.model.model_card_data.best_model_step == int(run.state.best_model_checkpoint.rsplit("-")[-1])


def test_the_evaluator_scores_the_averaged_model(tmp_path) -> None:
    data = pairs(8, seed=3)
    evaluator = evaluation.EmbeddingSimilarityEvaluator(data["left"], data["right"], data["score"])
    run = make(tmp_path, "cosine", config(2, ["rank1"], init_noise=0.5), eval_strategy="steps", eval_steps=6)
    run.evaluator = evaluator
    run.train()
    scores = [log for log in run.state.log_history if "eval_pearson_cosine" in log]
    expected = evaluator(run.averaged_model())["pearson_cosine"]
    assert scores[-1]["eval_pearson_cosine"] == pytest.approx(expected, abs=1e-6)


def test_model_init(tmp_path) -> None:
    """It is called once before there is a Trainer, too."""
    torch.manual_seed(0)
    args = st.SentenceTransformerTrainingArguments(str(tmp_path), **{**CPU, "max_steps": 4, "save_strategy": "no"})
    stock: Any = st.SentenceTransformerTrainer
    run = type("Late", (LatePhaseMixin, stock), {})(
        model=None, model_init=lambda: bi_encoder(tmp_path), args=args, train_dataset=pairs(24),
        loss=losses.CosineSimilarityLoss(bi_encoder(tmp_path)),
        late_phase_config=config(2, ["norm"], late_phase_start=0),
    )  # fmt: skip
    run.train()
    assert run.late_phase.model is run.model and run.loss.model is run.model
    assert run.late_phase.distance_from_mean() > 0
