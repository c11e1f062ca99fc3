"""A model over a cache that stands still: what it does between prompt and end is device work alone, which a CUDA graph can hold.

Shapes: B batch, T time, H query heads, G key/value heads, R = H // G, P head width, V vocabulary, S slots of an attention layer. Row b's
token at position p has its key and value in slot p. Cursors, positions and masks are on the device; recurrent layers go through the
kernels of `llamba.kernels.decode`. Layers, norms and projections are the model's own modules.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from llamba.cache import SteppedLayer
from llamba.hybrid import RECURRENT
from llamba.kernels.decode import commit, cursors, plan
from llamba.speculative.rewind import FIXED_ROPES, PlacedLayer, Rewindable
from llamba.speculative.steps import STEPS

OWN_ATTENTION = "llamba_slots"


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention of queries [B, H, T, P] to all slots [B, G, S, P], the query heads of a group as further queries of one head.

    attention_mask [B, 1, R T, S] is added. Returns [B, T, H, P], as transformers' attention functions do.
    """
    (B, H, T, P), G = query.shape, key.shape[1]
    together = query.reshape(B, G, H // G * T, P)
    y = scaled_dot_product_attention(together, key, value, attn_mask=attention_mask, scale=scaling)
    return y.reshape(B, H, T, value.shape[-1]).transpose(1, 2), None


AttentionInterface.register(OWN_ATTENTION, attend)


@contextmanager
def own_attention(config: PreTrainedConfig) -> Iterator[None]:
    """Within, the model's attention layers call `attend`."""
    before = config._attn_implementation
    config._attn_implementation = OWN_ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


class SlotLayer:
    """Keys and values [B, S, G, P] of an attention layer; new ones go where `positions` [B, T] says."""

    def __init__(self, rows: int, slots: int, groups: int, width: int, dtype: torch.dtype, device: torch.device):
        self.keys, self.values = torch.zeros(2, rows, slots, groups, width, dtype=dtype, device=device).unbind()
        self.rows, self.positions = torch.arange(rows, device=device)[:, None], torch.empty(0)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store keys and values [B, G, T, P]; returns those of all slots [B, G, S, P]."""
        self.keys[self.rows, self.positions] = key_states.transpose(1, 2)
        self.values[self.rows, self.positions] = value_states.transpose(1, 2)
        return self.keys.transpose(1, 2), self.values.transpose(1, 2)

    def load(self, layer: PlacedLayer) -> None:
        """Take over what a prompt left."""
        if layer.is_initialized:
            count, _, slots, _ = layer.keys.shape
            self.keys[:count, :slots], self.values[:count, :slots] = layer.keys.transpose(1, 2), layer.values.transpose(1, 2)


def obstacle(model: PreTrainedModel) -> str | None:
    """Why this model cannot decode over a static cache, or None. Raises ValueError where no cache of ours serves it at all."""
    reader = Rewindable(model, 1)
    for layer, kind in zip(reader.backbone.layers, reader.kinds, strict=True):
        if kind == RECURRENT and type(layer.self_attn) not in STEPS:
            served = ", ".join(sorted({one.__name__ for one in STEPS}))
            return f"its mixer {type(layer.self_attn).__name__} has no decode kernel (those of {served} have)"
    if reader.recurrent != reader.cache.layers and reader.backbone.rotary_emb.rope_type not in FIXED_ROPES:
        return f"its rotary angles ({reader.backbone.rotary_emb.rope_type}) depend on the length"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "its weights are on several devices"
    return None


class Static:
    """A model with room for B rows of up to S - 1 tokens, read in rounds of up to `longest`. It keeps no reference to `model` itself."""

    def __init__(self, model: PreTrainedModel, rows: int, slots: int, longest: int):
        reader, device, dtype = Rewindable(model, 1), model.device, model.dtype
        self.backbone, self.head, self.norm = reader.backbone, reader.head, reader.norm
        self.kinds, self.windows = reader.kinds, reader.windows
        self.config, self.slots, self.longest, self.at = model.config, slots, longest, cursors(rows, device)
        self.held: dict[int, Any] = {}
        self.ring = 0
        layers: list[Any] = [self._layer(index, rows, dtype, device) for index in range(len(self.kinds))]
        self.placed = [layer for layer in layers if isinstance(layer, SlotLayer)]
        self.cache = Cache(layers=layers)
        self.counts, self.places = torch.arange(longest, device=device), torch.arange(slots, device=device)
        example = torch.empty(1, dtype=dtype, device=device)
        self.rotary = [part[0] for part in self.backbone.rotary_emb(example, position_ids=self.places[None])] if self.placed else []

    def _layer(self, index: int, rows: int, dtype: torch.dtype, device: torch.device) -> Any:
        if self.kinds[index] != RECURRENT:
            values = self.config.to_dict()
            heads = values["num_attention_heads"]
            width = values.get("head_dim") or values["hidden_size"] // heads
            return SlotLayer(rows, self.slots, values.get("num_key_value_heads") or heads, width, dtype, device)
        steps = STEPS[type(self.backbone.layers[index].self_attn)]
        held = self.held[index] = steps.buffers(self.backbone.layers[index].self_attn, rows, self.longest, dtype, device)
        self.ring = held.dt.shape[1]
        return SteppedLayer(lambda mixer, hidden: steps.run(mixer, hidden, held, self.at))

    def start(self, model: PreTrainedModel, prompts: list[list[int]]) -> None:
        """Read whole prompts by the model's own forward pass and take its cache over. Rows behind the last prompt stay empty."""
        reader = Rewindable(model, max(map(len, prompts)) or 1)
        reader.start(prompts)
        lengths = reader.lengths + [0] * (len(self.at.length) - len(prompts))
        self.at.length.copy_(torch.tensor(lengths))
        self.at.folded.copy_(self.at.length)
        for index, (own, theirs) in enumerate(zip(self.cache.layers, reader.cache.layers, strict=True)):
            if index in self.held:
                STEPS[type(self.backbone.layers[index].self_attn)].load(self.held[index], theirs, self.at.length)  # type: ignore[arg-type]
            else:
                own.load(theirs)  # type: ignore[union-attr]

    def read(self, tokens: Tensor, new: Tensor, keep: bool) -> Tensor:
        """Evaluate tokens [B, T], of which the first new[b] count, behind each row's place; returns logits [B, T, V]. `commit` follows.

        keep: the tokens will not be taken back. Only device work.
        """
        plan(self.at, new, self.longest, self.ring, keep)
        positions = self.at.length[:, None] + self.counts[: tokens.shape[1]]  # [B, T]
        for layer in self.placed:
            layer.positions = positions
        masks = {kind: self._mask(positions, self.windows[kind]) for kind in set(self.kinds) - {RECURRENT}}
        rotary = tuple(part[positions] for part in self.rotary)
        hidden = self.backbone.embed_tokens(tokens)  # [B, T, D]
        with own_attention(self.config):
            for layer, kind in zip(self.backbone.layers, self.kinds, strict=True):
                hidden = layer(
                    hidden, attention_mask=masks.get(kind), position_ids=positions, past_key_values=self.cache, use_cache=True,
                    position_embeddings=rotary,
                )  # fmt: skip
        return self.head(self.norm(hidden))

    def _mask(self, positions: Tensor, window: int | None) -> Tensor:
        """What is added to the scores [B, 1, R T, S]: 0 for slots that a token sees, else -inf."""
        at = positions[:, :, None]
        seen = self.places <= at if window is None else (self.places <= at) & (self.places > at - window)
        keys = self.placed[0].keys
        mask = torch.zeros(seen.shape, dtype=keys.dtype, device=keys.device).masked_fill(~seen, -torch.inf)
        return mask[:, None].repeat(1, 1, self.config.num_attention_heads // keys.shape[2], 1)

    def commit(self, kept: Tensor) -> None:
        """Keep the first kept[b] tokens of the call before. Only device work."""
        commit(self.at, kept)
