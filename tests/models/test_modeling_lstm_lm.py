"""The LSTM language model: its numbers against plain torch, its state, generation, saving and Trainer."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, Trainer, TrainingArguments

import hf_latephase.models
from hf_latephase.compat import STATE_NAME
from hf_latephase.models import LSTMForCausalLM, LSTMLMConfig
from hf_latephase.models.modeling_lstm_lm import LSTMState


VOCAB_SIZE = 23


def build(seed: int = 0, **overrides: Any) -> LSTMForCausalLM:
    """A small model in evaluation mode and double precision."""
    torch.manual_seed(seed)
    values = {"vocab_size": VOCAB_SIZE, "embedding_size": 7, "hidden_size": 11, "num_hidden_layers": 2, **overrides}
    return LSTMForCausalLM(LSTMLMConfig(**values)).double().eval()


def random_ids(*shape: int, seed: int = 1) -> torch.Tensor:
    # From 2 on: no padding and no end of text among the prompts.
    return torch.randint(2, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def state_of(output: Any) -> LSTMState | None:
    return getattr(output, STATE_NAME)


def state_tensors(state: LSTMState) -> torch.Tensor:
    return torch.stack((state.hidden, state.cell))


# ---------------------------------------------------------------------------------------------------- configuration


def test_the_papers_size_has_the_papers_number_of_parameters() -> None:
    model = LSTMForCausalLM(LSTMLMConfig(vocab_size=205, embedding_size=205, hidden_size=500))
    by_hand = 205 * 205 + 4 * 500 * (205 + 500) + 2 * 4 * 500 + 205 * 500 + 205
    assert by_hand == 1_558_730
    assert sum(parameter.numel() for parameter in model.parameters()) == by_hand
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_defaults_are_byt5_bytes() -> None:
    config = LSTMLMConfig()
    assert (config.vocab_size, config.pad_token_id, config.eos_token_id, config.bos_token_id) == (259, 0, 1, None)


def test_config_survives_saving(tmp_path: Path) -> None:
    config = LSTMLMConfig(vocab_size=5, embedding_size=3, dropout=0.25, pad_token_id=None, eos_token_id=None)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, LSTMLMConfig)
    unsaved = dict.fromkeys(("_name_or_path", "auto_map"))
    assert {**again.to_dict(), **unsaved} == {**config.to_dict(), **unsaved}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vocab_size": 0}, "`vocab_size` must be at least 1, got 0"),
        ({"hidden_size": -1}, "`hidden_size` must be at least 1"),
        ({"num_hidden_layers": 0}, "`num_hidden_layers` must be at least 1"),
        ({"dropout": 1.0}, r"`dropout` must lie in \[0, 1\), got 1.0"),
        ({"tie_word_embeddings": True}, "`embedding_size=205` and `hidden_size=500`"),
    ],
)
def test_config_refuses_values_that_describe_no_model(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LSTMLMConfig(**values)


def test_values_assigned_after_the_config_was_made_are_checked_too() -> None:
    config = LSTMLMConfig()
    config.tie_word_embeddings = True
    with pytest.raises(ValueError, match="`embedding_size=205` and `hidden_size=500`"):
        LSTMForCausalLM(config)


@pytest.mark.parametrize(
    ("values", "std"),
    [({}, 1.0), ({"initializer_range": 0.1}, 0.1), ({"tie_word_embeddings": True, "embedding_size": 64}, 64**-0.5)],
)
def test_initialisation(values: dict[str, Any], std: float) -> None:
    torch.manual_seed(0)
    model = LSTMForCausalLM(LSTMLMConfig(**{"embedding_size": 60, "hidden_size": 64, **values}))
    assert model.embed_tokens.weight.std().item() == pytest.approx(std, rel=0.03)
    bound = 64**-0.5
    uniform = [*model.lstm.parameters(), model.lm_head.bias]
    if not model.config.tie_word_embeddings:
        uniform.append(model.lm_head.weight)
    for parameter in uniform:
        assert 0.9 * bound < parameter.abs().max() <= bound
        assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)


def test_resized_vocabulary() -> None:
    model = build()
    ids = random_ids(1, 4)
    before = model(ids).logits
    model.resize_token_embeddings(VOCAB_SIZE + 3)
    assert model.get_input_embeddings().weight.shape == (VOCAB_SIZE + 3, 7)
    after = model(ids, labels=ids)
    assert after.logits.shape[-1] == VOCAB_SIZE + 3 and after.loss.isfinite()
    torch.testing.assert_close(after.logits[..., :VOCAB_SIZE], before)


# ------------------------------------------------------------------------------------------------ forward and loss


class PlainLanguageModel(nn.Module):
    """The same network without transformers."""

    def __init__(self, model: LSTMForCausalLM) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB_SIZE, 7)
        self.lstm = nn.LSTM(7, 11, num_layers=2, batch_first=True)
        self.lm_head = nn.Linear(11, VOCAB_SIZE)
        self.double().load_state_dict(model.state_dict())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.lstm(self.embed_tokens(ids))[0])


def test_forward_loss_and_gradients_equal_plain_torch() -> None:
    model = build().train()
    plain = PlainLanguageModel(model)
    ids = random_ids(3, 8)
    labels = ids.clone()
    labels[1, 5:] = -100

    output = model(ids, labels=labels)
    logits = plain(ids)
    loss = F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB_SIZE), labels[:, 1:].reshape(-1), ignore_index=-100)
    output.loss.backward()
    loss.backward()

    torch.testing.assert_close(output.logits, logits, rtol=0, atol=1e-14)
    # transformers' loss computes in single precision whatever the model's type.
    torch.testing.assert_close(output.loss.double(), loss, rtol=1e-6, atol=0)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7, msg=name)
    assert ids.shape == (3, 8) and output.logits.shape == (3, 8, VOCAB_SIZE)


def test_num_items_in_batch_divides_the_summed_loss() -> None:
    model = build()
    ids = random_ids(3, 8)
    mean = model(ids, labels=ids).loss
    scaled = model(ids, labels=ids, num_items_in_batch=torch.tensor(50)).loss
    torch.testing.assert_close(scaled, mean * (3 * 7) / 50)


def test_logits_to_keep_and_inputs_embeds_and_tuples() -> None:
    model = build()
    ids = random_ids(2, 6)
    full = model(ids)
    assert torch.equal(model(ids, logits_to_keep=2).logits, full.logits[:, -2:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 3])).logits, full.logits[:, [0, 3]])
    assert torch.equal(model(inputs_embeds=model.embed_tokens(ids)).logits, full.logits)
    loss, logits, state = model(ids, labels=ids, return_dict=False)
    assert loss.ndim == 0 and torch.equal(logits, full.logits) and isinstance(state, LSTMState)


def test_dropout_acts_in_training_only() -> None:
    model, without = build(dropout=0.5), build(dropout=0.0)
    ids = random_ids(2, 6)
    assert torch.equal(model(ids).logits, without(ids).logits)
    assert torch.equal(without.train()(ids).logits, without.eval()(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("place", ["embeddings", "outputs"])
def test_dropout_lies_before_and_behind_the_lstm(place: str) -> None:
    model = build(dropout=0.5, num_hidden_layers=1).train()
    seen: dict[str, torch.Tensor] = {}
    if place == "embeddings":
        model.lstm.register_forward_pre_hook(lambda module, inputs: seen.update(dropped=inputs[0]))
    else:
        model.lm_head.register_forward_pre_hook(lambda module, inputs: seen.update(dropped=inputs[0]))
    model(random_ids(4, 50))
    assert (seen["dropped"] == 0).double().mean().item() == pytest.approx(0.5, abs=0.05)


def test_inputs_that_cannot_be_read_are_refused() -> None:
    model = build()
    ids = random_ids(2, 4)
    state = state_of(model(ids))
    with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
        model()
    with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
        model(ids, inputs_embeds=model.embed_tokens(ids))
    with pytest.raises(ValueError, match="sequence length is 0"):
        model(ids[:, :0])
    with pytest.raises(ValueError, match="holds 2 sequences, but the input has 1"):
        model(ids[:1], cache=state)
    with pytest.raises(ValueError, match="`LSTMState` returned by an earlier call, got DynamicCache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="two names of one state"):
        model(ids, cache=state, past_key_values=state)
    for shape in ((2, 3), (1, 4), (2, 1, 4, 4)):
        with pytest.raises(ValueError, match="`attention_mask` must have the shape of the input"):
            model(ids, attention_mask=torch.ones(shape))


# ------------------------------------------------------------------------------------------------------- the state


@pytest.mark.parametrize("cuts", [[5], [1, 2, 9]])
def test_carried_state_equals_one_pass(cuts: list[int]) -> None:
    model = build()
    ids = random_ids(3, 12)
    whole = model(ids, use_cache=True)
    state, pieces = None, []
    for window in ids.tensor_split(cuts, dim=1):
        output = model(window, **{STATE_NAME: state}, use_cache=True)
        state = state_of(output)
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole.logits, rtol=0, atol=1e-14)
    torch.testing.assert_close(state_tensors(state), state_tensors(state_of(whole)), rtol=0, atol=1e-14)
    assert state.get_seq_length() == 12
    assert not torch.allclose(model(ids[:, cuts[-1] :]).logits, pieces[-1])  # the state matters


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_state_goes_by_both_names(name: str) -> None:
    model = build()
    ids = random_ids(2, 6)
    output = model(ids[:, 4:], **{name: state_of(model(ids[:, :4]))})
    torch.testing.assert_close(output.logits, model(ids).logits[:, 4:], rtol=0, atol=1e-14)
    assert state_of(output).seen_tokens == 6
    assert name in model.config.keys_to_ignore_at_inference


def test_forward_leaves_the_given_state_as_it_was() -> None:
    model = build()
    state = state_of(model(random_ids(2, 4)))
    before, length = state_tensors(state), state.seen_tokens
    model(random_ids(2, 4, seed=2), **{STATE_NAME: state})
    assert torch.equal(state_tensors(state), before) and state.seen_tokens == length


def test_state_is_returned_when_asked_for() -> None:
    model = build()
    ids = random_ids(2, 4)
    assert state_of(model(ids)) is not None
    assert state_of(model(ids, use_cache=False)) is None
    assert state_of(build(use_cache=False)(ids)) is None
    model.train()
    assert state_of(model(ids)) is None
    assert state_of(model(ids, use_cache=True)) is not None


def test_detached_state_cuts_the_graph() -> None:
    model = build().train()
    ids = random_ids(2, 4)
    state = state_of(model(ids, use_cache=True))
    assert state.hidden.grad_fn is not None
    assert state.detach().hidden.grad_fn is None and state.detach().cell.grad_fn is None
    assert torch.equal(state_tensors(state.detach()), state_tensors(state))
    assert state.detach().seen_tokens == 4


MASK = [
    [1, 1, 1, 1, 1, 1],
    [0, 0, 1, 1, 1, 1],  # left
    [1, 1, 1, 0, 0, 0],  # right
    [0, 1, 0, 0, 1, 1],  # both and between
    [0, 0, 0, 0, 0, 0],
]


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("use_cache", [False, True])
def test_padding_leaves_no_trace(with_state: bool, use_cache: bool) -> None:
    model = build()
    mask = torch.tensor(MASK)
    ids = random_ids(5, 6)
    start = state_of(model(random_ids(5, 3, seed=2))) if with_state else None
    output = model(ids, attention_mask=mask, **{STATE_NAME: start}, use_cache=use_cache)
    assert (state_of(output) is not None) == use_cache
    for row in range(5):
        tokens = mask[row].bool()
        row_state = LSTMState(start.hidden[:, [row]], start.cell[:, [row]]) if start is not None else None
        if tokens.any():
            alone = model(ids[row : row + 1, tokens], **{STATE_NAME: row_state})
            torch.testing.assert_close(output.logits[row, tokens], alone.logits[0], rtol=0, atol=1e-14)
            row_state = state_of(alone)
        if use_cache:
            ours = state_tensors(state_of(output))[:, :, [row]]
            expected = state_tensors(row_state) if row_state is not None else torch.zeros_like(ours)
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-14)


def test_padding_leaves_no_trace_in_the_gradients() -> None:
    model = build().train()
    ids = random_ids(1, 4)
    padded = torch.cat([random_ids(1, 3, seed=2), ids], dim=1)
    labels = padded.clone()
    labels[:, :4] = -100  # the first token has nothing to be predicted from
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    gradients = []
    for inputs in ({"input_ids": ids, "labels": ids}, {"input_ids": padded, "labels": labels, "attention_mask": mask}):
        model.zero_grad()
        model(**inputs).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-9)


# ------------------------------------------------------------------------------------------------------ generation


def build_talkative(**overrides: Any) -> LSTMForCausalLM:
    """A model whose texts are varied: with its first weights an LSTM soon repeats one token, whatever its state."""
    model = build(seed=1, eos_token_id=None, **overrides)
    with torch.no_grad():
        for parameter in model.lstm.parameters():
            parameter.mul_(8)
    return model


def greedy_by_hand(model: LSTMForCausalLM, ids: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Reads the whole text again for every token."""
    for _ in range(num_tokens):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


def record_lengths(model: LSTMForCausalLM) -> list[int]:
    """The lengths of what the LSTM reads from now on."""
    lengths: list[int] = []
    model.lstm.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
    return lengths


def test_greedy_generation_equals_a_loop_over_the_whole_text() -> None:
    model = build_talkative()
    ids = random_ids(3, 5)
    expected = greedy_by_hand(model, ids, 12)
    assert all(len(text.unique()) > 3 for text in expected[:, 5:])  # a constant text would prove little
    lengths = record_lengths(model)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), expected)
    assert lengths == [5] + [1] * 11
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=False), expected)
    embeddings = model.embed_tokens(ids)
    assert torch.equal(model.generate(inputs_embeds=embeddings, max_new_tokens=12, do_sample=False), expected[:, 5:])


def test_generation_stops_at_the_end_of_text() -> None:
    model = build_talkative()
    ids = random_ids(1, 5)
    full = greedy_by_hand(model, ids, 12)
    end = full[0, 9].item()
    stop = (full[0, 5:] == end).nonzero()[0].item() + 5
    assert torch.equal(model.generate(ids, max_new_tokens=12, eos_token_id=end), full[:, : stop + 1])


def test_generation_continues_from_a_state() -> None:
    model = build_talkative()
    ids = random_ids(2, 8)
    expected = greedy_by_hand(model, ids, 6)
    state = state_of(model(ids[:, :5]))
    lengths = record_lengths(model)
    assert torch.equal(model.generate(ids, **{STATE_NAME: state}, max_new_tokens=6), expected)
    assert lengths[0] == 3
    output = model.generate(ids, max_new_tokens=6, return_dict_in_generate=True)
    # The last token is chosen but not yet read.
    assert state_of(output).get_seq_length() == 8 + 6 - 1


def test_beam_search_with_state_equals_beam_search_without(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_talkative()
    ids = random_ids(3, 5)
    orders = []
    reorder = LSTMState.reorder_cache

    def recording(self: LSTMState, beam_idx: torch.LongTensor) -> None:
        orders.append(beam_idx)
        reorder(self, beam_idx)

    monkeypatch.setattr(LSTMState, "reorder_cache", recording)
    options: dict[str, Any] = {
        "max_new_tokens": 12,
        "num_beams": 4,
        "num_return_sequences": 4,
        "do_sample": False,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    expected = model.generate(ids, use_cache=False, **options)
    assert not orders
    output = model.generate(ids, use_cache=True, **options)
    assert any(not torch.equal(order, torch.arange(12)) for order in orders)
    assert torch.equal(output.sequences, expected.sequences)
    torch.testing.assert_close(output.sequences_scores, expected.sequences_scores)


def test_sampling_with_state_equals_sampling_without() -> None:
    model = build_talkative()
    ids = random_ids(2, 5)
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        texts.append(
            model.generate(ids, max_new_tokens=10, do_sample=True, num_return_sequences=3, use_cache=use_cache)
        )
    assert texts[0].shape == (6, 15)
    assert torch.equal(texts[0], texts[1])
    assert len(texts[0].unique(dim=0)) > 2


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("use_cache", [False, True])
def test_left_padded_prompts_generate_as_they_do_alone(num_beams: int, use_cache: bool) -> None:
    model = build_talkative()
    prompts = [random_ids(1, length, seed=length) for length in (3, 7, 5)]
    batch = torch.cat([F.pad(prompt, (7 - prompt.shape[1], 0)) for prompt in prompts])
    mask = torch.cat([F.pad(torch.ones_like(prompt), (7 - prompt.shape[1], 0)) for prompt in prompts])
    options: dict[str, Any] = {"max_new_tokens": 10, "num_beams": num_beams, "do_sample": False}
    texts = model.generate(batch, attention_mask=mask, use_cache=use_cache, **options)
    for prompt, text in zip(prompts, texts, strict=True):
        assert torch.equal(text[7:], model.generate(prompt, **options)[0, prompt.shape[1] :])
    unmasked = model.generate(batch, attention_mask=torch.ones_like(mask), **options)
    assert not torch.equal(unmasked, texts)  # the mask matters


def test_assisted_decoding_is_refused() -> None:
    model = build()
    with pytest.raises(ValueError, match="not supported with stateful models"):
        model.generate(random_ids(1, 5), max_new_tokens=4, prompt_lookup_num_tokens=2)


# ---------------------------------------------------------------------------------------------- saving and loading


@pytest.mark.parametrize("tied", [False, True])
def test_reload_is_exact(tmp_path: Path, tied: bool) -> None:
    model = build(tie_word_embeddings=tied, embedding_size=11).float()
    assert (model.lm_head.weight is model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is LSTMForCausalLM
    assert {name: list(keys) for name, keys in info.items() if keys} == {}
    assert (again.lm_head.weight is again.embed_tokens.weight) == tied
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    # nn.LSTM computes with a cached list of its weights, which loading has to refresh.
    ids = random_ids(2, 5)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_missing_weights_are_initialised_and_their_neighbours_kept(tmp_path: Path) -> None:
    model = build().float()
    missing = {"lm_head.bias", "lstm.bias_hh_l1"}
    state_dict = {name: value for name, value in model.state_dict().items() if name not in missing}
    model.save_pretrained(tmp_path, state_dict=dict(state_dict))  # a copy, for it is emptied
    again, info = LSTMForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == missing
    for name in missing:
        assert 0.7 * 11**-0.5 < again.state_dict()[name].abs().max() <= 11**-0.5
    for name, value in state_dict.items():
        assert torch.equal(again.state_dict()[name], value), name


LOAD_WITHOUT_THE_LIBRARY = """
import sys
sys.modules["hf_latephase"] = None  # importing it raises
import torch
from transformers import AutoModelForCausalLM

ids = torch.load("ids.pt")
for folder in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    text = model.generate(ids, max_new_tokens=8, num_beams=2)
    torch.save({"logits": model(ids).logits, "text": text}, folder + ".pt")
"""


def test_folders_load_where_the_library_is_absent(tmp_path: Path) -> None:
    ids = random_ids(2, 5)
    torch.save(ids, tmp_path / "ids.pt")
    models = {
        "untied": build_talkative().float(),
        "tied": build_talkative(tie_word_embeddings=True, embedding_size=11).float(),
    }
    for folder, model in models.items():
        model.save_pretrained(tmp_path / folder)
        assert (tmp_path / folder / "modeling_lstm_lm.py").is_file()

    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_MODULES_CACHE")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-I", "-c", LOAD_WITHOUT_THE_LIBRARY, *models]
    finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr

    for folder, model in models.items():
        loaded = torch.load(tmp_path / f"{folder}.pt")
        torch.testing.assert_close(loaded["logits"], model(ids).logits, rtol=0, atol=1e-6)
        assert torch.equal(loaded["text"], model.generate(ids, max_new_tokens=8, num_beams=2))


def test_the_package_can_be_imported_again() -> None:
    again = importlib.reload(hf_latephase.models)
    assert AutoModelForCausalLM._model_mapping[LSTMLMConfig] is again.LSTMForCausalLM


# --------------------------------------------------------------------------------------------------------- Trainer


def test_trainer_trains_evaluates_and_predicts(tmp_path: Path) -> None:
    model = build(dropout=0.1).float()
    rows = [{"input_ids": row, "labels": row} for row in random_ids(10, 9)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        # Trainer would set config.use_cache to False, and no state be returned in evaluation; older ones do not.
        **({"use_cache": True} if hasattr(TrainingArguments, "use_cache") else {}),
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    assert state_of(model(rows[0]["input_ids"][None])) is not None
    assert trainer.model_accepts_loss_kwargs  # num_items_in_batch reaches the loss

    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert trainer.state.global_step == 3 and after < before

    predictions = trainer.predict(rows).predictions
    assert predictions.shape == (10, 9, VOCAB_SIZE)  # logits alone, no state beside them
    ids = torch.stack([row["input_ids"] for row in rows])
    torch.testing.assert_close(torch.tensor(predictions), model.eval()(ids).logits, rtol=0, atol=1e-5)
