"""Every symbol of a text scored once, against a scorer that goes one symbol at a time."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from hf_latephase.analysis import TextScore, is_recurrent, mean_forward, model_forward, score_bytes
from hf_latephase.data import BYTE_VOCAB_SIZE, encode_bytes, load_bytes
from hf_latephase.metrics import BitsPerCharacter
from hf_latephase.models import LSTMForCausalLM, LSTMLMConfig


ENWIK6 = Path(__file__).parents[3] / "shared" / "data" / "enwik6"
TEXT = b"Late-phase weights are replicated, and averaged at the end: \xe2\x88\x91."


class TinyLSTM(nn.Module):
    """A recurrent language model of the least kind."""

    carries_state = True

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTE_VOCAB_SIZE, 8)
        self.lstm = nn.LSTM(8, 16, batch_first=True)
        self.head = nn.Linear(16, BYTE_VOCAB_SIZE)

    def forward(self, input_ids, use_cache=False, past_key_values=None):
        hidden, state = self.lstm(self.embedding(input_ids), past_key_values)
        return SimpleNamespace(logits=self.head(hidden), past_key_values=state if use_cache else None)


def sharpen(model: nn.Module) -> nn.Module:
    """Weights so large that context matters: a scorer with the wrong context must fail."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.7)
    return model.double()


def tiny_gpt2(seed: int = 0, dropout: float = 0.5) -> nn.Module:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=BYTE_VOCAB_SIZE,
        bos_token_id=None,
        eos_token_id=1,
        n_positions=16,
        n_embd=8,
        n_layer=2,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
    )
    return sharpen(GPT2LMHeadModel(config))


def tiny_lstm(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return sharpen(TinyLSTM())


def tiny_lstm_lm(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return sharpen(LSTMForCausalLM(LSTMLMConfig(embedding_size=8, hidden_size=16, num_hidden_layers=2, dropout=0.5)))


def score(model: nn.Module, ids: object, window: int, stride: int | None = None, **kwargs: object) -> TextScore:
    return score_bytes(model, ids, window, stride, disable_tqdm=True, **kwargs)


@torch.no_grad()
def symbol_nll(model: nn.Module, context: list[int], target: int) -> float:
    logits = model(input_ids=torch.tensor([context])).logits[0, -1].double()
    return -torch.log(torch.exp(logits - logits.max())[target] / torch.exp(logits - logits.max()).sum()).item()


def slow_score(model: nn.Module, text: bytes, window: int | None, stride: int = 1) -> float:
    """One symbol at a time, with the context it is allowed; all before it where there is no window."""
    sequence = [1] + [byte + 3 for byte in text]
    model.eval()
    total = 0.0
    for position in range(len(text)):
        start = 0
        if window is not None and position >= window:
            end = window
            while end <= position:
                end = min(end + stride, len(text))
            start = end - window
        total += symbol_nll(model, sequence[start : position + 1], sequence[position + 1])
    return total


def test_uniform_model_takes_log2_of_the_vocabulary() -> None:
    model = tiny_gpt2()
    nn.init.zeros_(model.lm_head.weight)
    assert score(model, TEXT, 8, 3).bits_per_character == pytest.approx(math.log2(259), abs=1e-9)


@pytest.mark.parametrize(
    ("length", "window", "stride"),
    [(1, 8, 8), (7, 8, 3), (8, 8, 8), (9, 8, 8), (16, 8, 8), (30, 8, 1), (31, 8, 3), (33, 8, 5), (40, 16, 8)],
)
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_windows_equal_one_symbol_at_a_time(length: int, window: int, stride: int, batch_size: int) -> None:
    model = tiny_gpt2()
    fast = score(model, TEXT[:length], window, stride, batch_size=batch_size)
    assert fast.num_characters == length
    assert fast.nll_nats == pytest.approx(slow_score(model, TEXT[:length], window, stride), abs=1e-6)


def test_context_is_not_without_effect() -> None:
    # What makes the comparison above one that could fail.
    model = tiny_gpt2()
    scores = [slow_score(model, TEXT[:30], 8, stride) for stride in (1, 4, 8)]
    assert min(abs(scores[0] - scores[1]), abs(scores[1] - scores[2])) > 0.1


@pytest.mark.parametrize("make", [tiny_lstm, tiny_lstm_lm])
@pytest.mark.parametrize("window", [1, 7, 13, 500])
def test_state_is_carried_over_the_whole_text(make: Callable[[], nn.Module], window: int) -> None:
    model = make()
    fast = score(model, TEXT, window)
    assert fast.num_characters == len(TEXT)
    assert fast.nll_nats == pytest.approx(slow_score(model, TEXT, None), abs=1e-6)


def test_state_makes_a_difference() -> None:
    model = tiny_lstm()
    assert abs(score(model, TEXT, 7).nll_nats - score(model, TEXT, 7, carries_state=False).nll_nats) > 0.1


@pytest.mark.parametrize("length", [1, 2, 5, 17, 50])
@pytest.mark.parametrize(("window", "stride"), [(1, 1), (5, 2), (5, 5), (7, 6), (16, 3)])
def test_every_symbol_is_scored_once_and_in_its_place(length: int, window: int, stride: int) -> None:
    # Symbol i costs 2 ** i on this model: `length` terms that set all `length` bits are one of each.
    def forward(input_ids: torch.Tensor, state: object) -> tuple[torch.Tensor, None]:
        # `start_id` -1 makes the inputs consecutive, so that the right target is always input + 1.
        assert (input_ids.diff() == 1).all()
        log_probs = torch.full((*input_ids.shape, length), torch.inf, dtype=torch.float64)
        targets = input_ids[..., None] + 1
        return log_probs.scatter(-1, targets, -(2.0 ** targets.double())), None

    ids = np.arange(length)
    result = score(nn.Identity(), ids, window, stride, batch_size=3, forward=forward, start_id=-1)
    assert result == TextScore(2.0**length - 1, length)


def test_bytes_arrays_and_ids_are_the_same_text() -> None:
    model, ids = tiny_gpt2(), encode_bytes(TEXT)
    results = [
        score(model, text, 8, 4)
        for text in (TEXT, np.frombuffer(TEXT, dtype=np.uint8), ids, ids.astype(np.int32), torch.from_numpy(ids))
    ]
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_lstm, tiny_lstm_lm])
def test_ensemble_averages_probabilities(make: Callable[[int], nn.Module]) -> None:
    members = nn.ModuleList(make(seed) for seed in range(3))
    recurrent = is_recurrent(members[0])
    ensemble = mean_forward([model_forward(member, recurrent) for member in members])
    result = score(members, TEXT[:20], 8, 4, forward=ensemble, carries_state=recurrent)

    members.eval()
    sequence = [1] + [byte + 3 for byte in TEXT[:20]]
    expected = 0.0
    for position in range(20):
        end = 8
        while end <= position:
            end += 4
        context = sequence[0 if recurrent else end - 8 : position + 1]
        nlls = [symbol_nll(member, context, sequence[position + 1]) for member in members]
        expected -= math.log(sum(math.exp(-nll) for nll in nlls) / 3)
    assert result.num_characters == 20
    assert result.nll_nats == pytest.approx(expected, abs=1e-6)


def test_ensemble_of_one_is_the_model() -> None:
    model = tiny_gpt2()
    alone = score(model, TEXT, 8, 4)
    assert score(model, TEXT, 8, 4, forward=mean_forward([model_forward(model)])) == alone
    with pytest.raises(ValueError, match="at least one member"):
        mean_forward([])


def test_half_precision_logits_are_normalised_in_float32() -> None:
    model = tiny_gpt2().bfloat16()
    log_probs, _ = model_forward(model.eval())(torch.tensor([[1, 5, 9]]), None)
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(1, 3), atol=1e-5, rtol=0)


def test_dropout_is_off_and_modes_are_put_back() -> None:
    model = tiny_gpt2().train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    assert score(model, TEXT, 8, 4) == score(model, TEXT, 8, 4)
    assert [module.training for module in model.modules()] == modes

    def fail(input_ids: torch.Tensor, state: object) -> tuple[torch.Tensor, None]:
        assert not model.training
        assert torch.is_inference_mode_enabled()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(model, TEXT, 8, 4, forward=fail)
    assert [module.training for module in model.modules()] == modes


def test_which_models_carry_state() -> None:
    assert is_recurrent(tiny_lstm())
    assert is_recurrent(tiny_lstm_lm())
    assert not is_recurrent(tiny_gpt2())
    assert not is_recurrent(nn.Identity())


def test_score_feeds_the_metric(tmp_path: Path) -> None:
    metric = BitsPerCharacter(cache_dir=str(tmp_path))
    parts = [score(tiny_gpt2(), text, 8, 4) for text in (TEXT[:10], TEXT[10:])]
    for part in parts:
        metric.add_batch(**part.metric_inputs())
    whole = TextScore(sum(part.nll_nats for part in parts), len(TEXT))
    assert metric.compute()["bits_per_character"] == pytest.approx(whole.bits_per_character, rel=1e-12)


@pytest.mark.parametrize("stride", [0, -1, 9])
def test_stride_must_leave_no_gap(stride: int) -> None:
    with pytest.raises(ValueError, match=f"between 1 and the window of 8, got {stride}"):
        score(tiny_gpt2(), TEXT, 8, stride)


def test_errors_name_the_cause() -> None:
    model = tiny_gpt2()
    with pytest.raises(ValueError, match="16 positions, but the window is 17"):
        score(model, TEXT, 17)
    with pytest.raises(ValueError, match="at least 1"):
        score(model, TEXT, 0)
    with pytest.raises(ValueError, match="at least 1"):
        score(model, TEXT, 8, batch_size=0)
    with pytest.raises(ValueError, match="at least one symbol"):
        score(model, b"", 8)
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        score(model, np.ones((2, 3), dtype=np.int64), 8)
    with pytest.raises(TypeError, match="float64"):
        score(model, np.ones(3), 8)


@pytest.mark.skipif(not ENWIK6.is_file(), reason=f"{ENWIK6} is not there")
def test_real_text_straight_from_the_file() -> None:
    test_split = load_bytes(ENWIK6).test[:3001]
    model = tiny_lstm().float()
    result = score(model, test_split, 256)
    assert result.num_characters == 3001
    assert result == score(model, encode_bytes(test_split), 256)
    torch.testing.assert_close(result.nll_nats, score(model, test_split, 1000).nll_nats, rtol=1e-5, atol=0)
