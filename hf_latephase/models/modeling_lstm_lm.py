"""A language model made of one embedding, an LSTM and a linear output, with its configuration and its carried state.

The file stands alone on purpose: `save_pretrained` copies it beside the weights, and
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` then needs torch and transformers only
(4.56.2 or newer).
"""

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple


try:
    from transformers import PreTrainedConfig
    from transformers import initialization as init
except ImportError:  # transformers 4, which asks `_init_weights` only about modules of which something is missing
    from torch.nn import init  # type: ignore[no-redef]
    from transformers import PretrainedConfig as PreTrainedConfig


HiddenAndCell = tuple[torch.Tensor, torch.Tensor]  # each [num_hidden_layers, B, H]

# What transformers calls a model's memory of the text: `cache` from 5.24 on, `past_key_values` before.
_STATE_NAMES = ("past_key_values", "cache")
_STATE_NAME = next(field.name for field in fields(CausalLMOutputWithPast) if field.name in _STATE_NAMES)


class LSTMLMConfig(PreTrainedConfig):
    r"""
    Configuration of a [`LSTMForCausalLM`]. The defaults give a byte-level model over the ids of ByT5's tokenizer
    (id = byte + 3), with the embedding and hidden sizes inferred for the enwik8 model of the late-phase weights paper.

    Args:
        vocab_size (`int`, *optional*, defaults to 259):
            Number of token ids. 259 is ByT5's three special ids and 256 bytes.
        embedding_size (`int`, *optional*, defaults to 205):
            Size of the token embeddings, the input of the first LSTM layer.
        hidden_size (`int`, *optional*, defaults to 500):
            Number of units of each LSTM layer.
        num_hidden_layers (`int`, *optional*, defaults to 1):
            Number of stacked LSTM layers.
        dropout (`float`, *optional*, defaults to 0.0):
            Dropout probability on the embeddings, between stacked LSTM layers and on the last layer's output.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`):
            Whether the output layer uses the embedding matrix as its weight. Needs `embedding_size == hidden_size`.
        initializer_range (`float`, *optional*):
            Standard deviation of the normal initialisation of the embeddings. Defaults to 1.0, as in `nn.Embedding`;
            to `hidden_size ** -0.5` when the embeddings are tied, where 1.0 would give enormous first logits. The
            LSTM and the output layer always start uniformly within `hidden_size ** -0.5` of zero, as in PyTorch.
        use_cache (`bool`, *optional*, defaults to `True`):
            Whether the model returns its state when it is not in training mode. Trainer overwrites it with
            `TrainingArguments.use_cache`, which is `False` unless given; `generate` has a setting of its own.
        pad_token_id (`int`, *optional*, defaults to 0):
            Id of the padding token. Give `None` for a vocabulary in which every id is text: `generate` infers an
            attention mask from this id.
        bos_token_id (`int`, *optional*):
            Id of the token that begins a text. ByT5 has none.
        eos_token_id (`int` or `list[int]`, *optional*, defaults to 1):
            Id of the token that ends a text. Give `None` for a vocabulary in which every id is text: `generate` stops
            at this id.

    Example:

    ```python
    >>> from hf_latephase.models import LSTMForCausalLM, LSTMLMConfig

    >>> configuration = LSTMLMConfig(vocab_size=205, pad_token_id=None, eos_token_id=None)
    >>> LSTMForCausalLM(configuration).num_parameters()
    1558730
    ```"""

    model_type = "lstm_lm"
    # The state is no prediction: Trainer must not gather it as if it were logits.
    keys_to_ignore_at_inference = list(_STATE_NAMES)

    vocab_size: int = 259
    embedding_size: int = 205
    hidden_size: int = 500
    num_hidden_layers: int = 1
    dropout: float = 0.0
    tie_word_embeddings: bool = False
    initializer_range: float | None = None
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 1

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.check_values()

    if "__post_init__" not in vars(PreTrainedConfig):  # transformers 4 and 5.0

        def __init__(self, **kwargs: Any) -> None:
            own = {name: kwargs.pop(name, getattr(type(self), name)) for name in LSTMLMConfig.__annotations__}
            super().__init__(**kwargs)
            vars(self).update(own)
            self.check_values()

    def check_values(self) -> None:
        """Raises a `ValueError` if the values do not describe a model. Called here and again when a model is built."""
        for name in ("vocab_size", "embedding_size", "hidden_size", "num_hidden_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"`dropout` must lie in [0, 1), got {self.dropout}.")
        if self.tie_word_embeddings and self.embedding_size != self.hidden_size:
            raise ValueError(
                "`tie_word_embeddings=True` makes one matrix serve as embedding and output layer, which needs "
                f"`embedding_size == hidden_size`, got `embedding_size={self.embedding_size}` and "
                f"`hidden_size={self.hidden_size}`."
            )


@dataclass(eq=False)
class LSTMState:
    """
    What the model remembers of the tokens it has read. It stands where attention models keep a `Cache`: forward takes
    it and returns it as `cache` (`past_key_values` before transformers 5.24). Forward never writes into the state it
    is given, so one state may start several continuations.

    Args:
        hidden (`torch.Tensor` of shape `(num_hidden_layers, batch_size, hidden_size)`):
            The hidden state after the last token.
        cell (`torch.Tensor` of shape `(num_hidden_layers, batch_size, hidden_size)`):
            The cell state after the last token.
        seen_tokens (`int`, *optional*, defaults to 0):
            Number of positions read so far, padding included.
    """

    hidden: torch.Tensor
    cell: torch.Tensor
    seen_tokens: int = 0

    # Read by `generate`: the state is not of a fixed address, it cannot be wound back to an earlier token, and it
    # counts the tokens it has read (a memory whose every layer `is_linear` does not).
    is_compileable: ClassVar[bool] = False
    is_croppable: ClassVar[bool] = False
    is_linear: ClassVar[tuple[bool]] = (False,)

    @property
    def batch_size(self) -> int:
        """Number of sequences the state belongs to."""
        return self.hidden.shape[1]

    def get_seq_length(self) -> int:
        """Number of positions read so far; `generate` skips as many of the ids it is given beside a state."""
        return self.seen_tokens

    def detach(self) -> "LSTMState":
        """The same state cut off from the graph, to carry it over windows without backpropagating through them."""
        return LSTMState(self.hidden.detach(), self.cell.detach(), self.seen_tokens)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Puts the state of sequence `beam_idx[i]` in place `i`, as beam search asks after each step."""
        self.hidden = self.hidden.index_select(1, beam_idx.to(self.hidden.device))
        self.cell = self.cell.index_select(1, beam_idx.to(self.cell.device))


class LSTMForCausalLM(PreTrainedModel, GenerationMixin):
    r"""
    An LSTM language model: embedding, dropout, `nn.LSTM`, dropout, linear output with bias.

    The state can be carried by hand from one window of a text to the next; the two calls below give the logits of one
    pass over both windows:

    ```python
    >>> import torch
    >>> from hf_latephase.models import LSTMForCausalLM, LSTMLMConfig

    >>> model, input_ids = LSTMForCausalLM(LSTMLMConfig(hidden_size=16)), torch.randint(3, 259, (1, 200))
    >>> first, state = model(input_ids[:, :100], use_cache=True).to_tuple()
    >>> second, _ = model(input_ids[:, 100:], cache=state, use_cache=True).to_tuple()
    ```

    Before transformers 5.24 the output calls its state `past_key_values`, which the model also takes.

    In training mode a state is returned only if `use_cache=True` is passed, and it carries its graph: pass on
    `state.detach()` for truncated backpropagation through time.

    Args:
        config ([`LSTMLMConfig`]):
            Configuration of the model.
    """

    config_class = LSTMLMConfig
    supports_gradient_checkpointing = False
    # Makes `generate` refuse assisted decoding, which has to take tokens back.
    _is_stateful = True
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}

    def __init__(self, config: LSTMLMConfig):
        super().__init__(config)
        # Attributes of a config can be assigned after it was made.
        config.check_values()
        # `embed_tokens` and `lm_head` are the names under which transformers finds the two embeddings.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size)
        self.lstm = nn.LSTM(
            config.embedding_size,
            config.hidden_size,
            num_layers=config.num_hidden_layers,
            batch_first=True,
            # nn.LSTM drops between layers only, and warns when there is nothing between.
            dropout=config.dropout if config.num_hidden_layers > 1 else 0.0,
        )
        self.dropout = nn.Dropout(config.dropout)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # `init` leaves alone what from_pretrained has loaded; torch's own reset_parameters would not.
        bound = self.config.hidden_size**-0.5
        if isinstance(module, nn.Embedding):
            std = self.config.initializer_range
            if std is None:
                std = bound if self.config.tie_word_embeddings else 1.0
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, (nn.LSTM, nn.Linear)):
            for parameter in module.parameters(recurse=False):
                init.uniform_(parameter, -bound, bound)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # `generate` would otherwise hand a key-value cache to the first forward.
        return False

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: LSTMState | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        past_key_values: LSTMState | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Token ids. Exactly one of `input_ids` and `inputs_embeds` is needed.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 for tokens, 0 for padding, wherever in the row it lies. Padding leaves the state as it was, and its
                logits say nothing. A mask longer than the input is read from its end. Looking for padding waits for
                the device: leave the mask out when there is none.
            cache ([`LSTMState`], *optional*):
                The state to start from, as returned by an earlier call.
            inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, embedding_size)`, *optional*):
                Embeddings to use in place of those of `input_ids`.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Token ids to predict, aligned with `input_ids`: they are shifted inside the loss. -100 is ignored.
            use_cache (`bool`, *optional*):
                Whether to return the state. Defaults to `config.use_cache`, in training mode to `False`.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                Compute the logits of that many last positions, or of the positions in this index; 0 means all.
            past_key_values ([`LSTMState`], *optional*):
                `cache`, by the name that `generate` gives it before transformers 5.24.
            return_dict (`bool`, *optional*):
                Whether to return a [`~modeling_outputs.CausalLMOutputWithPast`] or a tuple.
            kwargs (`dict`, *optional*):
                Passed to the loss: `num_items_in_batch`, `shift_labels`.

        Returns:
            [`~modeling_outputs.CausalLMOutputWithPast`] whose `cache` (before transformers 5.24:
            `past_key_values`) is an [`LSTMState`] or `None`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if inputs_embeds.shape[1] == 0:
            raise ValueError("The input has no tokens: its sequence length is 0.")
        if past_key_values is not None:
            if cache is not None:
                raise ValueError("`cache` and `past_key_values` are two names of one state: pass one of them.")
            cache = past_key_values
        if cache is not None:
            _check_state(cache, batch_size=inputs_embeds.shape[0])
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training

        outputs, last = self._read(self.dropout(inputs_embeds), attention_mask, cache, need_last=use_cache)

        # -0 is 0, so that 0 keeps every position.
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(self.dropout(outputs[:, kept]))

        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)

        state = None
        if use_cache and last is not None:
            seen_tokens = cache.seen_tokens if cache is not None else 0
            state = LSTMState(*last, seen_tokens + inputs_embeds.shape[1])
        # transformers types the field as its own Cache; `generate` asks only for what LSTMState has.
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{_STATE_NAME: state})  # type: ignore[arg-type]

    def _read(
        self, embeddings: torch.Tensor, attention_mask: torch.Tensor | None, past: LSTMState | None, need_last: bool
    ) -> tuple[torch.Tensor, HiddenAndCell | None]:
        """Runs the LSTM. Returns its outputs `[B, T, H]` and, if needed, what each row's last token leaves."""
        start = (past.hidden, past.cell) if past is not None else None
        if attention_mask is not None:
            is_token = _last_columns(attention_mask, embeddings.shape[:2])
            if not is_token.all():
                return self._read_padded(embeddings, is_token, start, need_last)
        return self.lstm(embeddings, start)

    def _read_padded(
        self, embeddings: torch.Tensor, is_token: torch.Tensor, start: HiddenAndCell | None, need_last: bool
    ) -> tuple[torch.Tensor, HiddenAndCell | None]:
        """As `_read`, for rows with padding: each row is read with its tokens first, so none follows a padding."""
        order = torch.argsort((~is_token).long(), dim=1, stable=True)[..., None]  # [B, T, 1]
        tokens_first = embeddings.gather(1, order.expand_as(embeddings))
        last = None
        if need_last:
            outputs, last = self._read_packed(tokens_first, is_token.sum(dim=1), start)
        else:
            # Padding behind the tokens cannot reach their outputs. A plain tensor suits wrappers of nn.LSTM, too.
            outputs, _ = self.lstm(tokens_first, start)
        order = order.expand_as(outputs)
        return torch.zeros_like(outputs).scatter(1, order, outputs), last

    def _read_packed(
        self, embeddings: torch.Tensor, num_tokens: torch.Tensor, start: HiddenAndCell | None
    ) -> tuple[torch.Tensor, HiddenAndCell]:
        """Reads the first `num_tokens` `[B]` of each row and stops there."""
        if start is None:
            zeros = embeddings.new_zeros(self.config.num_hidden_layers, len(embeddings), self.config.hidden_size)
            start = (zeros, zeros)
        # A packed row cannot be empty: an empty one reads a padding and is given its state back below.
        lengths = num_tokens.clamp(min=1).cpu()
        packed = pack_padded_sequence(embeddings, lengths, batch_first=True, enforce_sorted=False)
        packed_outputs, (hidden, cell) = self.lstm(packed, start)
        outputs, _ = pad_packed_sequence(packed_outputs, batch_first=True, total_length=embeddings.shape[1])
        has_tokens = (num_tokens > 0)[None, :, None]  # [1, B, 1]
        return outputs, (torch.where(has_tokens, hidden, start[0]), torch.where(has_tokens, cell, start[1]))


def _last_columns(attention_mask: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The mask of the present input as booleans: while generating, the mask covers the tokens read before as well."""
    if attention_mask.dim() != 2 or attention_mask.shape[0] != shape[0] or attention_mask.shape[1] < shape[1]:
        raise ValueError(
            f"`attention_mask` must have the shape of the input, {tuple(shape)}, or more columns, "
            f"got {tuple(attention_mask.shape)}."
        )
    return attention_mask[:, -shape[1] :] != 0


def _check_state(state: LSTMState, batch_size: int) -> None:
    """Raises a `ValueError` unless `state` is the state of `batch_size` sequences."""
    if not isinstance(state, LSTMState):
        raise ValueError(f"The state must be the `LSTMState` returned by an earlier call, got {type(state).__name__}.")
    if state.batch_size != batch_size:
        raise ValueError(f"The state holds {state.batch_size} sequences, but the input has {batch_size}.")


__all__ = ["LSTMForCausalLM", "LSTMLMConfig", "LSTMState"]
