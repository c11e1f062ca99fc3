"""The hybrid model: a Hugging Face causal LM whose recurrent layers hold a mixer where `self_attn` stood.

Shapes: B batch, T time of this call, D model width, V vocabulary. Everything but the mixers is the family's own code in transformers.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, StaticLayer
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask, packed_sequence_mask_function
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from llamba.models.adoption import RECURRENT, adopt, check_rows, fresh_cache
from llamba.models.cache import KEPT, RecurrentLayer
from llamba.models.mixers import Mixer, Recurrence, build_mixer, initialise
from llamba.models.mixers.base import FP32_PARAMETERS

MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}


PACKED = "packed documents (seq_idx, or position_ids that restart) cannot be combined with a cache; pass use_cache=False"


@dataclass(frozen=True)
class Parts:
    """Where a family's model differs from Llama: name of the final norm, dropout after the embedding, a bias in the head."""

    final_norm: str = "norm"
    embed_dropout: str | None = None
    head_bias: bool = False


def mixer_layers(config: PreTrainedConfig) -> list[int]:
    """Layers that hold the student's own mixer: the recurrent ones, and those whose attention was made anew. A teacher has none."""
    values = config.to_dict()
    anew = (values.get("mixer") or {}).get("layers") or []
    return [index for index, kind in enumerate(values.get("layer_types") or []) if kind == RECURRENT or index in anew]


def document_numbers(seq_idx: Tensor | None, position_ids: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Document number of each token [B, T], counted from 0, or None where there is one document.

    `seq_idx` [B, T] labels documents directly. Otherwise a document starts where `position_ids` [B, T] does not go on rising
    over real tokens; padded positions (`mask` [B, T] False) say nothing. While a graph is traced no value is looked at: one document
    is numbered too.
    """
    if seq_idx is not None:
        starts = seq_idx[:, 1:] != seq_idx[:, :-1]
    elif position_ids is not None:
        real = torch.ones_like(position_ids, dtype=torch.bool) if mask is None else mask.expand(position_ids.shape)
        last = torch.where(real, position_ids, -1).cummax(1).values if mask is not None else position_ids
        starts = real[:, 1:] & (position_ids[:, 1:] <= last[:, :-1])
        if mask is not None and (is_compiling() or bool(starts.any())):
            starts = _restarts(position_ids, real)
    else:
        return None
    if not is_compiling() and not bool(starts.any()):
        return None
    return nn.functional.pad(starts, (1, 0)).cumsum(1)


def _restarts(position_ids: Tensor, real: Tensor) -> Tensor:
    """True [B, T - 1] at real tokens whose position does not exceed that of the real token before."""
    index = torch.arange(position_ids.shape[1], device=position_ids.device)
    previous = torch.where(real, index, -1).cummax(1).values[:, :-1]  # [B, T - 1] index of the last real token so far
    before = position_ids.gather(1, previous.clamp_min(0))
    return real[:, 1:] & (previous >= 0) & (position_ids[:, 1:] <= before)


def padding_mask(attention_mask: Tensor | dict | None, length: int) -> Tensor | None:
    """True = real [B, T] for the last `length` tokens, or None where nothing is padded (or the mask is 4-D and cannot say).

    While a graph is traced no value is looked at: a mask of ones stays one.
    """
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask.get(RECURRENT)
    if attention_mask is None or attention_mask.ndim != 2:
        return None
    mask = attention_mask[:, -length:].bool()
    return None if not is_compiling() and bool(mask.all()) else mask


class HybridBackbone(PreTrainedModel):
    """Mixed into a family's base model, before it. Builds the mixers and runs the layers, each with the mask of its kind."""

    parts: ClassVar[Parts] = Parts()
    layers: Any
    embed_tokens: Any
    rotary_emb: Any
    _keep_in_fp32_modules_strict = list(FP32_PARAMETERS)

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        for index, kind in enumerate(config.layer_types):
            if kind == RECURRENT:
                self.layers[index].self_attn = build_mixer(config.mixer, index)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        _init_weights(super(), module)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        seq_idx: Tensor | None = None,
        first: int = 0,
        stream: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As the family's own forward, and `seq_idx` [B, T]: document numbers of a packed row.

        `stream` [B, T, D] is what enters layer `first`, where that is known; the layers below are not run. Documents also come
        from `position_ids` that restart. Neither attention, state nor convolution reaches over a boundary.
        Raises ValueError for packed documents together with a cache that already holds tokens.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds is needed")
        if stream is not None:
            hidden = stream
        else:
            hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # [B, T, D]
        past_key_values, calls = self.prepare(hidden, attention_mask, position_ids, seq_idx, past_key_values, use_cache)
        if self.parts.embed_dropout is not None and stream is None:
            hidden = self.get_submodule(self.parts.embed_dropout)(hidden)
        for layer, call in zip(self.layers[first:], calls[first:], strict=True):
            hidden = layer(hidden, **call, past_key_values=past_key_values, use_cache=use_cache, **kwargs)
        hidden = self.get_submodule(self.parts.final_norm)(hidden)
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=past_key_values)

    def prepare(
        self,
        hidden: Tensor,
        attention_mask: Tensor | dict | None = None,
        position_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
    ) -> tuple[Cache | None, list[dict[str, Any]]]:
        """The cache, and what each layer is called with beside the hidden states [B, T, D] and the cache."""
        mask = padding_mask(attention_mask, hidden.shape[1])
        documents = document_numbers(seq_idx, position_ids, mask) if hidden.shape[1] > 1 else None
        if is_compiling() and use_cache and not self.training and seq_idx is None and documents is not None:
            torch._assert_async(documents[:, -1].max() == 0, PACKED)
            documents = None
        past_key_values = self._cache_for(past_key_values, use_cache, documents, hidden)
        if position_ids is None:
            position_ids = self._positions(hidden, past_key_values, documents)
        masks = self._masks(hidden, attention_mask, mask, documents, past_key_values, position_ids)
        rotary = self.rotary_emb(hidden, position_ids=position_ids)
        shared = {"position_ids": position_ids, "position_embeddings": rotary}
        return past_key_values, [shared | {"attention_mask": masks[kind]} for kind in self.config.layer_types]

    def _cache_for(self, cache: Cache | None, use_cache: bool | None, documents: Tensor | None, hidden: Tensor) -> Cache | None:
        if cache is not None:
            if documents is not None:
                raise ValueError(PACKED)
            seen = next((layer.seen for layer in adopt(cache, self.config).layers if isinstance(layer, RecurrentLayer)), 0)
            check_room(cache, seen + hidden.shape[1])
            check_rows(cache, hidden.shape[0])
            return cache
        if not use_cache or self.training or documents is not None:
            return None
        return fresh_cache(self.config)

    def _positions(self, hidden: Tensor, cache: Cache | None, documents: Tensor | None) -> Tensor:
        seen = 0 if cache is None else cache.get_seq_length()
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None] + seen
        if documents is None:
            return positions
        first = (documents[:, :, None] > documents[:, None, :]).sum(-1)  # [B, T] tokens of earlier documents
        return positions - first

    def _masks(
        self,
        hidden: Tensor,
        attention_mask: Tensor | dict | None,
        mask: Tensor | None,
        documents: Tensor | None,
        cache: Cache | None,
        position_ids: Tensor,
    ) -> dict[str, Any]:
        made: dict[str, Any] = {RECURRENT: Recurrence(mask, documents)}
        if isinstance(attention_mask, dict):
            return {**attention_mask, **made}
        together, traced = None, False
        if documents is not None:
            attention_mask = attention_mask if mask is not None else None  # all ones would hide the documents from transformers
            traced = is_compiling()  # transformers would build a mask with documents by vmap, which cannot be exported
            together = packed_sequence_mask_function(documents) if attention_mask is not None and not traced else None
        static = cache is not None and any(isinstance(layer, StaticLayer) for layer in cache.layers)  # its empty slots must be masked
        for kind in set(self.config.layer_types) - {RECURRENT}:
            made[kind] = MASKS[kind](
                config=self.config, inputs_embeds=hidden, attention_mask=attention_mask, past_key_values=cache,
                position_ids=None if traced else position_ids, and_mask_function=together, allow_is_causal_skip=not (static or traced),
                layer_idx=self.config.layer_types.index(kind),  # whose slots the mask is for; transformers 5.17 takes a recurrent layer's
            )  # fmt: skip
            if traced and documents is not None:
                made[kind] = _cut(made[kind], documents)
        return made


def _cut(mask: Any, documents: Tensor) -> Tensor:
    """An attention mask [B or 1, 1, T, T], bool or added to the scores, that also keeps documents [B, T] apart."""
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        raise ValueError('a graph with positions or documents needs attn_implementation="sdpa" or "eager"')
    same = (documents[:, :, None] == documents[:, None, :])[:, None]
    return mask & same if mask.dtype == torch.bool else mask.masked_fill(~same, torch.finfo(mask.dtype).min)


class PrunedHead(nn.Linear):
    """A head over some tokens of the vocabulary [V], of which it has K; the logits of all others are -inf.

    `tokens` [K] says which they are. For drafts in speculative decoding: what they cannot propose, the target still can.
    """

    tokens: Tensor

    def __init__(self, width: int, kept: int, vocabulary: int, bias: bool):
        super().__init__(width, kept, bias=bias)
        self.vocabulary = vocabulary
        self.register_buffer("tokens", torch.arange(kept))

    def forward(self, hidden: Tensor) -> Tensor:  # [..., D] -> [..., V]
        logits = super().forward(hidden)
        return logits.new_full((*logits.shape[:-1], self.vocabulary), -torch.inf).index_copy_(-1, self.tokens, logits)

    def places(self, tokens: Tensor, missing: int) -> Tensor:
        """Where the head has these tokens; `missing` for those that it does not have, and for negative ones."""
        table = torch.full((self.vocabulary + 1,), missing, device=tokens.device)
        table[self.tokens] = torch.arange(len(self.tokens), device=tokens.device)
        return table[torch.where(tokens < 0, self.vocabulary, tokens)]


class HybridCausalLM(PreTrainedModel):
    """Mixed into a family's causal LM, before it: the same head over a `HybridBackbone`."""

    backbone: ClassVar[type[HybridBackbone]]
    model: Any
    _keep_in_fp32_modules_strict = list(FP32_PARAMETERS)
    _is_stateful = False
    conversion: Any = None

    def __init__(self, config: PreTrainedConfig):
        PreTrainedModel.__init__(self, config)
        self.model = self.backbone(config)
        self.vocab_size = config.vocab_size
        shape = config.hidden_size, config.vocab_size
        bias, kept = self.backbone.parts.head_bias, config.head_tokens
        self.lm_head = nn.Linear(*shape, bias=bias) if kept is None else PrunedHead(shape[0], kept, shape[1], bias)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        _init_weights(super(), module)

    def _get_candidate_generator(self, *args, assistant_model=None, **kwargs):
        if assistant_model is not None:
            check_draft(self, assistant_model)
        made = super()._get_candidate_generator(*args, assistant_model=assistant_model, **kwargs)  # type: ignore[misc]
        made.get_candidates = partial(_few, made.get_candidates)
        return made

    def _prepare_cache_for_generation(self, generation_config, model_kwargs: dict, *args, **kwargs):
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            check_room(adopt(cache, self.config), generation_config.max_length - 1)  # the last token is not read


def check_room(cache: Cache, tokens: int) -> None:
    """Raise ValueError where so many tokens in all do not fit a static cache, whose attention layers would write past their end."""
    rooms = [layer.get_max_length() for layer in cache.layers if isinstance(layer, StaticLayer) and not layer.is_sliding]
    if rooms and min(rooms) < tokens:
        raise ValueError(
            f"the static cache has room for {min(rooms)} tokens and {tokens} are needed; make it with max_cache_len={tokens} or more, or "
            "lower max_new_tokens"
        )


def _few(whole: Callable[..., tuple[Tensor, Tensor | None]], tokens: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Candidates [B, T] behind the tokens, no more of them than the cache can take back: another tokenizer may make any number."""
    made, logits = whole(tokens, *args, **kwargs)
    return made[:, : tokens.shape[1] + KEPT - 1], None if logits is None else logits[:, : KEPT - 1]


def check_draft(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    """Raise ValueError for a draft that cannot go back (a recurrent model that is not ours); warn of one larger than the target."""
    if draft._is_stateful:
        raise ValueError(
            f"the draft's state must be able to go back, and that of {type(draft).__name__} cannot; use a Llama-type model or "
            "a model of ours"
        )
    large, small = (sum(p.numel() for p in model.parameters()) for model in (draft, target))
    if large > small:
        warnings.warn(f"the draft has {large:,} parameters, more than the target's {small:,}: it cannot make decoding faster", stacklevel=4)


def _init_weights(family: Any, module: nn.Module) -> None:
    family._init_weights(module)
    if isinstance(module, Mixer):
        initialise(module, None, "attention")
