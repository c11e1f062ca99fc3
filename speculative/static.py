"""A model over a cache that stands still: what it does between prompt and end is device work alone, which a CUDA graph can hold.

Shapes: B batch, T time, H query heads, G key/value heads, P head width, V vocabulary, S slots of an attention layer. Row b's token at
position p has its key and value in slot p. Cursors and positions are on the device; recurrent layers go through the kernels of
`llamba.kernels.decode`. Weights are the model's own; what stands between two projections is one launch where the layers are those of a
Llama (`LEAN`), and the layer's own forward elsewhere.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from llamba.kernels.block import add_norm, gated
from llamba.kernels.decode import commit, cursors, plan
from llamba.kernels.slots import attend, place
from llamba.models.cache import SteppedLayer
from llamba.models.hybrid import RECURRENT
from llamba.models.mixers import Mixer
from llamba.models.offloaded import is_offloaded
from llamba.speculative.rewind import FIXED_ROPES, LEAN, PlacedLayer, Rewindable
from llamba.speculative.steps import STEPS, Angles, Windowed

OWN_ATTENTION = "llamba_slots"


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: "Sight", scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """`attend` as transformers calls it: queries [B, H, T, P], all slots [B, S, G, P]; returns [B, T, H, P]."""
    return attend(query.transpose(1, 2), key, value, attention_mask.positions, scaling, attention_mask.window), None


AttentionInterface.register(OWN_ATTENTION, attention)


class Sight(NamedTuple):
    """What stands for an attention layer's mask: each token [B, T] sees what stands before it, at most `window` tokens."""

    positions: Tensor
    window: int | None


@contextmanager
def own_attention(config: PreTrainedConfig) -> Iterator[None]:
    """Within, the model's attention layers call `attention`."""
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
        """Store keys and values [B, G, T, P]; returns those of all slots [B, S, G, P]."""
        self.keys[self.rows, self.positions] = key_states.transpose(1, 2)
        self.values[self.rows, self.positions] = value_states.transpose(1, 2)
        return self.keys, self.values

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
    if (reader.recurrent != reader.cache.layers or _turning(model)) and reader.backbone.rotary_emb.rope_type not in FIXED_ROPES:
        return f"its rotary angles ({reader.backbone.rotary_emb.rope_type}) depend on the length"
    if is_offloaded(model):
        return "its weights are offloaded"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "its weights are on several devices"
    if model.config.to_dict().get("quantization_config"):
        return "its weights are quantised, and what multiplies them may look at the device"
    return None


def _turning(model: PreTrainedModel) -> bool:
    """Whether a mixer turns heads by their positions."""
    return any(mixer.sight is not None or mixer.config.rotary for mixer in model.modules() if isinstance(mixer, Mixer))


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
        self.counts = torch.arange(longest, device=device)
        places = torch.arange(slots, device=device)[None]
        example = torch.empty(1, dtype=dtype, device=device)
        turns = bool(self.placed) or _turning(model)
        self.rotary: list[Tensor] = [part[0] for part in self.backbone.rotary_emb(example, position_ids=places)] if turns else []
        self.angles: Angles | None = None  # cosines and sines [B, T, Q] of a round's tokens
        whole = not self.placed or all(
            part.shape[-1] == self.placed[0].keys.shape[-1] for part in self.rotary
        )  # heads are turned as a whole
        self.lean = whole and all(type(layer) in LEAN for layer in self.backbone.layers) and model.config.hidden_act == "silu"

    def _layer(self, index: int, rows: int, dtype: torch.dtype, device: torch.device) -> Any:
        if self.kinds[index] != RECURRENT:
            values = self.config.to_dict()
            heads = values["num_attention_heads"]
            width = values.get("head_dim") or values["hidden_size"] // heads
            return SlotLayer(rows, self.slots, values.get("num_key_value_heads") or heads, width, dtype, device)
        steps = STEPS[type(self.backbone.layers[index].self_attn)]
        held = self.held[index] = steps.buffers(self.backbone.layers[index].self_attn, rows, self.longest, dtype, device)
        self.ring = (held.own if isinstance(held, Windowed) else held).dt.shape[1]
        return SteppedLayer(lambda mixer, hidden: steps.run(mixer, hidden, held, self.at, self.angles))

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
        if self.rotary:
            cos, sin = (part[positions] for part in self.rotary)
            self.angles = cos, sin
        return self._lean(tokens, positions) if self.lean else self._by_layers(tokens, positions)

    def _lean(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The layers of a Llama, with one launch between two projections."""
        delta, hidden = self.backbone.embed_tokens(tokens), None  # [B, T, D]
        for layer, own, kind in zip(self.backbone.layers, self.cache.layers, self.kinds, strict=True):
            hidden, normed = _add_norm(delta, hidden, layer.input_layernorm)
            if isinstance(own, SlotLayer):
                delta = self._attention(layer.self_attn, normed, own, positions, self.windows[kind])
            else:
                delta = layer.self_attn(normed, past_key_values=self.cache)[0]
            hidden, normed = _add_norm(delta, hidden, layer.post_attention_layernorm)
            delta = layer.mlp.down_proj(gated(layer.mlp.gate_proj(normed), layer.mlp.up_proj(normed)))
        return self.head(_add_norm(delta, hidden, self.norm)[1])

    def _attention(self, module: Any, normed: Tensor, own: SlotLayer, positions: Tensor, window: int | None) -> Tensor:
        q, k, v = (proj(normed).unflatten(-1, (-1, module.head_dim)) for proj in (module.q_proj, module.k_proj, module.v_proj))
        if isinstance(module, Qwen3Attention):
            q, k = module.q_norm(q), module.k_norm(k)
        cos, sin = self.rotary
        q = place(q, k, v, cos, sin, positions, own.keys, own.values)
        return module.o_proj(attend(q, own.keys, own.values, positions, module.scaling, window).flatten(2))

    def _by_layers(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Any family's layers, by their own forward."""
        for layer in self.placed:
            layer.positions = positions
        hidden = self.backbone.embed_tokens(tokens)  # [B, T, D]
        with own_attention(self.config):
            for layer, kind in zip(self.backbone.layers, self.kinds, strict=True):
                sight = None if kind == RECURRENT else Sight(positions, self.windows[kind])
                hidden = layer(
                    hidden, attention_mask=sight, position_ids=positions, past_key_values=self.cache, use_cache=True,
                    position_embeddings=self.angles,
                )  # fmt: skip
        return self.head(self.norm(hidden))

    def commit(self, kept: Tensor) -> None:
        """Keep the first kept[b] tokens of the call before. Only device work."""
        commit(self.at, kept)


def _add_norm(delta: Tensor, hidden: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
    return add_norm(delta, hidden, norm.weight, norm.variance_epsilon)
