"""The cache of one recurrent layer: one state per sequence and short rings of what is not folded into it yet.

Shapes: B batch, T time, C convolution channels, W convolution width, L ring length, R = L + 2 (W - 1) raw ring length.
A token at position p lives in ring slot p mod L (raw inputs: p mod R); the slot behind the last takes what must not be kept.
Taking tokens back is integer arithmetic on `length` (committed positions); `folded` is the position of `state`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, LinearAttentionCacheLayerMixin

RING = 32

Inputs = tuple[Tensor, ...]
Advance = Callable[[tuple[Inputs, Tensor], Tensor | None], Tensor | None]


def _ring_like(values: Tensor, slots: int) -> Tensor:
    return values.new_zeros(values.shape[0], slots + 1, *values.shape[2:])


def _gather(ring: Tensor, first: Tensor, count: int) -> Tensor:
    """Entries first .. first + count - 1 of each row, in order: [B, count, ...]."""
    slots = (first[:, None] + torch.arange(count, device=ring.device)) % (ring.shape[1] - 1)
    return ring[torch.arange(ring.shape[0], device=ring.device)[:, None], slots]


def _scatter(ring: Tensor, positions: Tensor, values: Tensor, keep: Tensor) -> None:
    """Write values [B, T, ...] to their slots where `keep` [B, T]; at most one kept value per slot."""
    slots = torch.where(keep, positions % (ring.shape[1] - 1), ring.shape[1] - 1)
    ring[torch.arange(ring.shape[0], device=ring.device)[:, None], slots] = values.detach().to(ring.dtype)


class RecurrentLayer(LinearAttentionCacheLayerMixin, CacheLayerMixin):
    """Cache of one mixer; speaks the protocol of transformers' cache layers (record, crop, reorder, select, repeat).

    `state` is fp32 (fp64 for fp64 models) at position `folded`. Without recording every token is folded at once and only the raw
    convolution inputs are kept. With recording (speculative decoding) the last `RING` tokens stay in the rings, so that up to that
    many can be taken back.
    """

    is_compileable = False
    is_croppable = True
    supports_early_init = False
    is_sliding = False

    def __init__(self, conv_width: int, ring: int = RING):
        CacheLayerMixin.__init__(self)
        LinearAttentionCacheLayerMixin.__init__(self)
        self.conv_width, self.ring = conv_width, ring
        self._clear()

    def _clear(self) -> None:
        self.state: Tensor | None = None
        self.raw: Tensor | None = None
        self.rings: Inputs | None = None
        self.length: Tensor | None = None
        self.folded: Tensor | None = None
        self.seen = 0

    @property
    def is_recording(self) -> bool:
        """Whether tokens may be taken back later."""
        return self.record_past

    def window(self) -> Tensor | None:
        """Raw convolution inputs of the last W - 1 tokens [B, W - 1, C], oldest first; None before the first token."""
        if self.raw is None or self.length is None:
            return None
        return _gather(self.raw, self.length - (self.conv_width - 1), self.conv_width - 1)

    def pending(self) -> tuple[Inputs, Tensor] | None:
        """Inputs that are committed but not in `state`: rings in order [B, L, ...] and which entries count [B, L]."""
        if self.rings is None or self.length is None or self.folded is None:
            return None
        folded, count = self.folded, self.length - self.folded
        inputs = tuple(_gather(ring, folded, self.ring) for ring in self.rings)
        return inputs, torch.arange(self.ring, device=count.device) < count[:, None]

    def extend_one(self, raw: Tensor, state: Tensor) -> None:
        """Note one token per row, already folded into `state`. raw [B, 1, C]."""
        assert self.length is not None and self.raw is not None, "the first tokens come through extend"
        _scatter(self.raw, self.length[:, None], raw, torch.ones_like(self.length, dtype=torch.bool)[:, None])
        self.length = self.length + 1
        self.folded, self.state = self.length, state.detach()
        self.seen += 1

    def extend(self, raw: Tensor, inputs: Inputs, mask: Tensor | None, state: Tensor, advance: Advance) -> None:
        """Note new tokens. raw [B, T, C]; inputs (x, B, step) [B, T, ...]; mask [B, T] True = real; `state` after all of them.

        `advance` folds (inputs, mask) into a state; it is called only while recording, for tokens that no longer fit the rings.
        """
        real = torch.ones(raw.shape[:2], dtype=torch.bool, device=raw.device) if mask is None else mask
        if self.raw is None or self.length is None:
            self.raw = _ring_like(raw, self.ring + 2 * (self.conv_width - 1))
            self.length = self.folded = torch.zeros(raw.shape[0], dtype=torch.long, device=raw.device)
        rank = real.cumsum(1)  # [B, T], 1 for the first real token
        positions = self.length[:, None] + rank - 1
        _scatter(self.raw, positions, raw, real & (rank > rank[:, -1:] - (self.raw.shape[1] - 1)))
        if self.record_past:
            self._record(positions, inputs, real, advance)
        else:
            self.state, self.folded = state.detach(), self.length + rank[:, -1]
        self.length = self.length + rank[:, -1]
        self.seen += raw.shape[1]

    def _record(self, positions: Tensor, inputs: Inputs, real: Tensor, advance: Advance) -> None:
        if self.rings is None:
            self.rings = tuple(_ring_like(values, self.ring) for values in inputs)
        held = self.pending()
        assert held is not None and self.folded is not None, "lengths are set before inputs are recorded"
        old, counts = held
        together = tuple(torch.cat(pair, 1) for pair in zip(old, inputs, strict=True))
        real_together = torch.cat((counts, real), 1)
        rank = real_together.cumsum(1)
        overflow = (rank[:, -1] - self.ring).clamp_min(0)  # [B]
        if bool(overflow.any()):
            folding = real_together & (rank <= overflow[:, None])
            self.state = advance((together, folding), self.state)
            self.folded = self.folded + overflow
        keep = real & (positions >= self.folded[:, None])
        for ring, values in zip(self.rings, inputs, strict=True):
            _scatter(ring, positions, values, keep)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens of every row (transformers passes a negative count, or 0)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative count of tokens to remove; got {tokens_to_remove}")
        if tokens_to_remove == 0 or self.length is None:
            return
        if not self.record_past or self.folded is None or bool((self.length + tokens_to_remove < self.folded).any()):
            raise ValueError(
                f"cannot take back {-tokens_to_remove} tokens: a recurrent layer holds at most the last {self.ring} tokens, and only "
                "after cache.activate_past_recording()"
            )
        self.length = self.length + tokens_to_remove
        self.seen += tokens_to_remove

    def get_seq_length(self) -> int:
        """Tokens seen, padding included, as attention layers count them."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Key length and offset of a mask for a model without attention layers."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self._clear()

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        for name in ("state", "raw", "length", "folded"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else change(value))
        self.rings = None if self.rings is None else tuple(map(change, self.rings))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in the order of the selected beams."""
        self._map(lambda value: value.index_select(0, beam_idx.to(value.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows only."""
        self._map(lambda value: value[indices.to(value.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._map(lambda value: value.repeat_interleave(repeats, 0))

    @property
    def batch_size(self) -> int:
        """Rows held, -1 before the first token."""
        return -1 if self.length is None else self.length.shape[0]

    def lazy_initialization(self, *args, **kwargs) -> None:
        """Buffers are made by the first `extend`."""

    def update(self, *args, **kwargs):
        """Not for this layer: mixers use `extend`."""
        raise TypeError("a recurrent layer holds no keys and values; mixers call extend")

    update_conv_state = update_recurrent_state = update


def adopt(cache: Cache, config: PreTrainedConfig) -> Cache:
    """Give a fresh transformers cache our layers where the model is recurrent; a cache that has them is returned as it is.

    Raises ValueError for a cache that another recurrent implementation has filled.
    """
    if not cache.layers:
        cache.layers, cache.layer_class_to_replicate = DynamicCache(config=config).layers, None
    for index, kind in enumerate(config.layer_types):
        layer: Any = cache.layers[index]
        if kind != "linear_attention" or isinstance(layer, RecurrentLayer):
            continue
        if any(layer.has_previous_state.values()):
            raise ValueError(f"layer {index} of the cache was filled by another model; pass an empty cache or past_key_values=None")
        cache.layers[index] = fresh = RecurrentLayer(config.mixer["conv_width"])
        fresh.record_past = layer.record_past
    return cache
