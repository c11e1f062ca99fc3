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
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, StaticLayer
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask, packed_sequence_mask_function
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from llamba.models.cache import KEPT, RecurrentLayer
from llamba.models.hybrid_cache import RECURRENT, as_hybrid_cache, check_rows, new_hybrid_cache
from llamba.models.masks import Said, said
from llamba.models.mixers import Mixer, Recurrence, build_mixer, initialise
from llamba.models.mixers.outline import FP32_PARAMETERS

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

        `stream` [B, T, D] is what enters layer `first`, where that is known; the layers below are not run. Documents also come from a
        4-D mask, from `cu_seq_lens_q`, and from `position_ids` that restart. Neither attention, state nor convolution reaches over a
        boundary.
        Raises ValueError for packed documents together with a cache, and for a mask that recurrent layers cannot obey; see `masks.said`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds is needed")
        if stream is not None:
            hidden = stream
        else:
            hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # [B, T, D]
        lengths = _packed_lengths(kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k"))
        past_key_values, calls = self.prepare(hidden, attention_mask, position_ids, seq_idx, past_key_values, use_cache, lengths)
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
        lengths: Tensor | None = None,
    ) -> tuple[Cache | None, list[dict[str, Any]]]:
        """The cache, and what each layer is called with beside the hidden states [B, T, D] and the cache."""
        explicit = position_ids is not None and (seq_idx is not None or lengths is not None)
        seen = self._adopt(past_key_values, hidden)
        mask, documents = self._said(attention_mask, position_ids, seq_idx, lengths, hidden, seen)
        caches = past_key_values is not None or (use_cache and not self.training)
        if is_compiling() and caches and documents is not None and seq_idx is None and lengths is None:
            torch._assert_async(documents[:, -1].max() == 0, PACKED)
            documents = None
        if past_key_values is not None and documents is not None:
            raise ValueError(PACKED)
        if past_key_values is None and caches and documents is None:
            past_key_values = new_hybrid_cache(self.config)
        if position_ids is None:
            position_ids = self._positions(hidden, past_key_values, documents)
        masks = self._masks(hidden, attention_mask, Said(mask, documents), past_key_values, position_ids, explicit)
        rotary = self.rotary_emb(hidden, position_ids=position_ids)
        shared = {"position_ids": position_ids, "position_embeddings": rotary}
        return past_key_values, [shared | {"attention_mask": masks[kind]} for kind in self.config.layer_types]

    def _adopt(self, cache: Cache | None, hidden: Tensor) -> int:
        """How many tokens the cache holds, which is made ours. Raises ValueError where it does not fit the model or the tokens."""
        if cache is None:
            return 0
        check_rows(as_hybrid_cache(cache, self.config), hidden.shape[0])
        recurrent = next((layer.seen for layer in cache.layers if isinstance(layer, RecurrentLayer)), None)
        check_room(cache, (recurrent or 0) + hidden.shape[1])
        return int(cache.get_seq_length()) if recurrent is None else recurrent

    def _said(
        self, given: Any, position_ids: Tensor | None, seq_idx: Tensor | None, lengths: Tensor | None, hidden: Tensor, seen: int
    ) -> Said:
        if isinstance(given, dict):
            given = given[RECURRENT] if RECURRENT in given else given.get("full_attention")
        if RECURRENT not in self.config.layer_types and isinstance(given, Tensor) and given.ndim == 4:
            return Said(None, None)
        B, T = hidden.shape[:2]
        mask, documents = said(given, position_ids, seq_idx, lengths, B, T, seen)
        return Said(None if mask is None else mask.expand(B, -1), None if documents is None else documents.expand(B, -1))

    def _positions(self, hidden: Tensor, cache: Cache | None, documents: Tensor | None) -> Tensor:
        seen = 0 if cache is None else cache.get_seq_length()
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None] + seen
        if documents is None:
            return positions
        first = (documents[:, :, None] > documents[:, None, :]).sum(-1)  # [B, T] tokens of earlier documents
        return positions - first

    def _masks(
        self, hidden: Tensor, attention_mask: Tensor | dict | None, heard: Said, cache: Cache | None, position_ids: Tensor, explicit: bool
    ) -> dict[str, Any]:
        """The mask of each kind of layer. explicit: the documents stand in more than the positions, which need not restart."""
        mask, documents = heard
        made: dict[str, Any] = {RECURRENT: Recurrence(mask, documents)}
        if isinstance(attention_mask, dict):
            return {**attention_mask, **made}
        together, traced = None, False
        if documents is not None and (attention_mask is None or attention_mask.ndim == 2):
            attention_mask = attention_mask if mask is not None else None  # all ones would hide the documents from transformers
            traced = is_compiling()  # transformers would build a mask with documents by vmap, which cannot be exported
            wanted = (attention_mask is not None or explicit) and not traced
            together = packed_sequence_mask_function(documents) if wanted else None  # with positions, transformers would count it by them
        static = cache is not None and any(isinstance(layer, StaticLayer) for layer in cache.layers)  # its empty slots must be masked
        for kind in set(self.config.layer_types) - {RECURRENT}:
            made[kind] = MASKS[kind](
                config=self.config, inputs_embeds=hidden, attention_mask=attention_mask, past_key_values=cache,
                position_ids=position_ids if together is None and not traced else None, and_mask_function=together,
                allow_is_causal_skip=not (static or traced),
                layer_idx=self.config.layer_types.index(kind),  # whose slots the mask is for; transformers 5.17 takes a recurrent layer's
            )  # fmt: skip
            if traced and documents is not None:
                made[kind] = _cut(made[kind], documents)
        return made


def _packed_lengths(queries: Tensor | None, keys: Tensor | None) -> Tensor | None:
    """cu_seq_lens of queries, which must be those of keys."""
    if queries is not None and keys is not None and not is_compiling() and not torch.equal(queries, keys):
        raise ValueError(f"cu_seq_lens_q and cu_seq_lens_k must be the same; got {queries.tolist()} and {keys.tolist()}")
    return keys if queries is None else queries


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


class HybridCausalLM(PreTrainedModel, GenerationMixin):
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

    def save_pretrained(self, save_directory: Any, *args: Any, self_contained: bool = False, **kwargs: Any) -> Any:
        """As transformers'; `self_contained` puts the code beside the weights, for `trust_remote_code=True` without llamba."""
        saved = super().save_pretrained(save_directory, *args, **kwargs)
        if self_contained and kwargs.get("is_main_process", True):
            from llamba.models.self_contained import add_code

            add_code(save_directory)
        return saved

    def init_continuous_batching(self, *args, **kwargs):
        """As transformers', for students without recurrent layers. Raises ValueError for others, as `generate_batch` does."""
        if RECURRENT in self.config.layer_types:
            raise ValueError(
                "generate_batch pages keys and values, of which recurrent layers have none; use model.generate on a left-padded batch, or "
                "llamba.speculative.generate"
            )
        return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]

    def _get_candidate_generator(self, *args, assistant_model=None, **kwargs):
        if assistant_model is not None:
            check_draft(self, assistant_model)
        made = super()._get_candidate_generator(*args, assistant_model=assistant_model, **kwargs)  # type: ignore[misc]
        made.get_candidates = partial(_within_rollback, made.get_candidates)
        given, mask = kwargs["model_kwargs"], kwargs["model_kwargs"].get("attention_mask")
        if given.get("past_key_values") is not None:  # generate forgets a mask of ones, but for its length
            text = mask.shape[1] if mask is not None else vars(kwargs["generation_config"]).get("_mask_length", 0)
            given["unread"] = check_unread(given["past_key_values"], kwargs["input_ids"], text)
        return made

    def prepare_inputs_for_generation(self, input_ids, *args, unread=None, is_first_iteration=False, **kwargs):
        """As transformers', but drafted generation behind a filled cache reads the tokens from `unread` on, not the whole text again."""
        if is_first_iteration and unread:
            kwargs["next_sequence_length"] = input_ids.shape[1] - unread
        cache, count = kwargs.get("past_key_values"), kwargs.get("next_sequence_length")
        if is_first_iteration and cache is not None and count is not None and count < 1:
            check_unread(cache, input_ids)
        made = super().prepare_inputs_for_generation(input_ids, *args, is_first_iteration=is_first_iteration, **kwargs)  # type: ignore[misc]
        return made

    def _prepare_cache_for_generation(self, generation_config, model_kwargs: dict, *args, **kwargs):
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            check_room(as_hybrid_cache(cache, self.config), generation_config.max_length - 1)  # the last token is not read


class HybridSequenceClassifier(GenericForSequenceClassification):
    """Mixed into a family's pretrained model, before it: a score of the last token over a `HybridBackbone`, as reward models have it."""

    _keep_in_fp32_modules_strict: Any = list(FP32_PARAMETERS)
    _is_stateful = False

    def _init_weights(self, module: nn.Module) -> None:
        _init_weights(super(), module)


def check_unread(cache: Cache, prompt: Tensor, text: int = 0) -> int:
    """Where in a prompt [B, T] the tokens begin that the cache has not read. Raises ValueError where there is none, or where the prompt is
    but the new part of a text of `text` tokens."""
    seen, tokens = int(cache.get_seq_length()), prompt.shape[1]
    if seen and text > tokens:
        raise ValueError(f"drafted generation behind a filled cache needs the whole text; got {tokens} tokens and a mask of {text}")
    if seen >= tokens:
        raise ValueError(
            f"the cache has read {seen} tokens and the prompt has {tokens}; pass all that was read and at least one token more"
        )
    return seen


def check_room(cache: Cache, tokens: int) -> None:
    """Raise ValueError where so many tokens in all do not fit a static cache, whose attention layers would write past their end."""
    rooms = [layer.get_max_length() for layer in cache.layers if isinstance(layer, StaticLayer) and not layer.is_sliding]
    if rooms and min(rooms) < tokens:
        raise ValueError(
            f"the static cache has room for {min(rooms)} tokens and {tokens} are needed; make it with max_cache_len={tokens} or more, or "
            "lower max_new_tokens"
        )


def _within_rollback(
    whole: Callable[..., tuple[Tensor, Tensor | None]], tokens: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
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
