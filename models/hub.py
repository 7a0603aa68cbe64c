"""A model in the Hugging Face form (the extra ``hf``). Importing this module registers it with transformers::

    import palimpsest.models.hub
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("runs/mine")      # any folder that MemoryLM.save wrote
    model.generate(tokens, attention_mask=mask, max_new_tokens=64)
    model.save_pretrained("mine")                                  # palimpsest.models.load("mine") reads it as well

No remote code is involved. A folder from before its config.json had a ``model_type`` is not recognised by the Auto
classes; ``PalimpsestForCausalLM.from_pretrained`` reads it.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .config import ModelConfig, validate
from .lm import IGNORE, MODEL_TYPE, SCHEMA, MemoryLM, make
from .state import State

PIECE = 2048  # a long prompt is read in pieces of this many tokens: one [piece, vocabulary] of logits at a time


class PalimpsestConfig(PretrainedConfig):
    """What a run folder's config.json says: ``model``, the section of a :class:`ModelConfig`; ``run``, the whole run's
    configuration or null; ``schema``. The rest is transformers' own, and has no bearing on what is computed."""

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        model: dict[str, Any] | None = None,
        run: dict[str, Any] | None = None,
        schema: int = SCHEMA,
        **kwargs: Any,
    ) -> None:
        if schema != SCHEMA:
            raise ValueError(f"schema of the configuration was {schema}; it must be {SCHEMA}")
        self.model, self.run, self.schema = model, run, schema
        super().__init__(**({"tie_word_embeddings": False} | kwargs))  # ours are one tensor, where they are tied

    @property
    def vocab_size(self) -> int:
        """Tokens are in [0, vocab_size); this and all sizes: 0 without a model."""
        return (self.model or {}).get("vocab_size", 0)

    @property
    def hidden_size(self) -> int:
        """The width of the residual stream."""
        return (self.model or {}).get("dim", 0)

    @property
    def num_hidden_layers(self) -> int:
        """The number of blocks."""
        return (self.model or {}).get("layers", 0)


class StateCache(Cache):
    """A :class:`palimpsest.models.State` (None: before the first token) as transformers passes caches around.

    The cache is one object that takes each new state, as transformers expects; the states themselves never change. To
    go on from a saved state: ``model.generate(all_tokens, past_key_values=StateCache(load_state(path)))``.
    """

    def __init__(self, state: State | None = None) -> None:
        super().__init__(layers=[])
        self.state = state

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen by the row that has seen the most."""
        return 0 if self.state is None else int(self.state.position.max())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows ``beam_idx`` in place of those there were, as beam search asks."""
        if self.state is not None:
            self.state = self.state.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """The same."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times."""
        if self.state is not None:
            self.state = self.state.select(torch.arange(self.state.rows).repeat_interleave(repeats))

    def reset(self) -> None:
        """Back to before the first token."""
        self.state = None

    def crop(self, tokens_to_remove: int) -> None:
        """A memory cannot unread what it has read.

        Raises:
            ValueError: always.
        """
        raise ValueError("crop was asked of a StateCache; a memory keeps no copy of itself from before a token")

    @property
    def is_croppable(self) -> bool:
        """No."""
        return False


class PalimpsestForCausalLM(PreTrainedModel, GenerationMixin):
    """A :class:`MemoryLM`, ``self.model``, with the interface of transformers' causal language models."""

    config_class = PalimpsestConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    accepts_loss_kwargs = True
    _is_stateful = True  # generation that takes tokens back is refused by transformers itself

    def __init__(self, config: PalimpsestConfig) -> None:
        super().__init__(config)
        if config.model is None:
            raise ValueError("model of the configuration was null; it must be the model section of a run")
        self.model = make(validate(ModelConfig, config.model, "model"))
        self.post_init()

    @classmethod
    def of(cls, model: MemoryLM, run_config: dict[str, Any] | None = None) -> "PalimpsestForCausalLM":
        """Around a model that there is already: no copy is made."""
        with torch.device("meta"):
            made = cls(PalimpsestConfig(model=model.config.model_dump(mode="json"), run=run_config))
        made.model = model
        return made.train(model.training)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As :meth:`transformers.PreTrainedModel.from_pretrained`, whose arguments these are.

        Raises:
            ValueError: for weights that are not all of the model's.
        """
        told = kwargs.pop("output_loading_info", False)
        found: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, loaded = found
        wrong = [f"{what.removesuffix('_keys')} {sorted(map(str, loaded[what]))[0]}" for what in FAULTS if loaded[what]]
        if wrong:
            raise ValueError(f"weights were not those of the configuration; there is {', '.join(wrong)}")
        return (model, loaded) if told else model

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """As :meth:`transformers.PreTrainedModel.save_pretrained`, with the weights under the names of ``MemoryLM``."""
        weights = self.state_dict() if state_dict is None else state_dict
        named = {name.removeprefix("model."): x for name, x in weights.items()}
        super().save_pretrained(save_directory, is_main_process, named, **kwargs)

    def get_input_embeddings(self) -> torch.nn.Module:
        """The table of the tokens."""
        return self.model.embed

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        """The table belongs to the configuration.

        Raises:
            ValueError: always.
        """
        raise ValueError("embeddings were to be replaced; the vocabulary must stay that of the configuration")

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: StateCache | State | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Read tokens.

        Args:
            input_ids: int64 [B, T], those that follow ``past_key_values``.
            attention_mask: [B, ≥ T], its last T columns for these tokens; 0: not a token of the text. What is masked is
                never read: rows are packed as documents of unequal length are, so that padding, on either side, changes
                neither memories nor positions. Its logits are 0.
            labels: int64 [B, T], the tokens themselves (the shift happens here); −100 and masked ones are left out.
            use_cache: give the state after the tokens; None: not with labels, nor in training.
            logits_to_keep: only those of the last so many tokens; 0: all.
            num_items_in_batch: what the loss is divided by in place of the number of its targets, as a Trainer gives it
                for all micro-batches together.

        Returns:
            ``CausalLMOutputWithPast`` (a tuple with ``return_dict=False``): ``past_key_values`` is a StateCache. With
            labels in training ``loss`` is the model's, with its z-loss and its auxiliary losses, and there are no
            logits: no [T, vocabulary] is ever made. In evaluation it is the cross-entropy of the logits alone.

        Raises:
            ValueError: for a mask or a cache that is neither, and those of ``MemoryLM.forward``.
        """
        cache = _cache_of(past_key_values)
        keep = (labels is None and not self.training) if use_cache is None else use_cache
        mask = _mask_of(attention_mask, input_ids)
        targets = None if labels is None else _shifted(labels, mask)
        tokens, cu_seqlens = input_ids, None
        if mask is not None:
            tokens, cu_seqlens = input_ids[mask][None], F.pad(mask.sum(1).cumsum(0), (1, 0)).int()
            targets = None if targets is None else targets[mask][None]
        logits = loss = None
        if targets is not None and self.training:
            out = self.model(tokens, cache.state, cu_seqlens, targets, return_state=keep)
            count = out.valid.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            loss = (out.loss_sum + out.valid * sum(out.aux.values())) / count
            state = out.state
        else:
            logits, state = self._read(tokens, cache.state, cu_seqlens, keep, logits_to_keep if mask is None else 0)
            if targets is not None:
                loss = self._loss(logits, targets, cache.state, cu_seqlens, num_items_in_batch)
            logits = logits[:, -logits_to_keep:] if mask is None else _unpacked(logits[0], mask, logits_to_keep)
        if keep:
            cache.state = state
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache if keep else None)
        return output.to_tuple() if return_dict is False else output

    def _read(
        self, tokens: Tensor, state: State | None, cu_seqlens: Tensor | None, keep: bool, last: int
    ) -> tuple[Tensor, State | None]:
        """Logits [B, ≥ last, V] (last = 0: all), and the state."""
        pieces = tokens.split(PIECE, 1) if 0 < last <= (tokens.shape[1] - 1) % PIECE + 1 else (tokens,)
        for place, piece in enumerate(pieces):
            out = self.model(piece, state, cu_seqlens, return_state=keep or place + 1 < len(pieces))
            state = out.state
        return out.logits, state

    def _loss(
        self,
        logits: Tensor,
        targets: Tensor,
        state: State | None,
        cu_seqlens: Tensor | None,
        count: Tensor | int | None,
    ) -> Tensor:
        targets = self.model.counted(targets, state, cu_seqlens)
        total = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
        return total / ((targets != IGNORE).sum().clamp(min=1) if count is None else count)

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Nothing: every part draws what it owns when it is made, and what is loaded is loaded whole."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # generation begins without a cache, and goes on with the one that forward gives


FAULTS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def _cache_of(past: Any) -> StateCache:
    if isinstance(past, StateCache):
        return past
    if past is not None and not isinstance(past, State):
        raise ValueError(f"past_key_values was {type(past).__name__}; it must be a StateCache, a State or None")
    return StateCache(past)


def _mask_of(attention_mask: Tensor | None, tokens: Tensor) -> Tensor | None:
    """Which of tokens [B, T] are read, boolean; None: all."""
    if attention_mask is None:
        return None
    shape, need = tuple(attention_mask.shape), tuple(tokens.shape)
    if len(shape) != 2 or shape[0] != need[0] or shape[1] < need[1]:
        raise ValueError(f"attention_mask was {shape}; it must be [{need[0]}, {need[1]} or more]")
    mask = attention_mask[:, -need[1] :].bool()
    return None if mask.all() else mask


def _shifted(labels: Tensor, mask: Tensor | None) -> Tensor:
    """The token that follows each, where there is one that counts."""
    labels = labels if mask is None else labels.masked_fill(~mask, IGNORE)
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)


def _unpacked(logits: Tensor, mask: Tensor, last: int) -> Tensor:
    """Packed logits [N, V] at the places of mask [B, T] where they belong: [B, last or T, V]."""
    place = (mask.flatten().cumsum(0) - 1).clamp(min=0).view_as(mask)[:, -last:]
    return logits[place].masked_fill(~mask[:, -last:, None], 0)


AutoConfig.register(MODEL_TYPE, PalimpsestConfig, exist_ok=True)
AutoModelForCausalLM.register(PalimpsestConfig, PalimpsestForCausalLM, exist_ok=True)
