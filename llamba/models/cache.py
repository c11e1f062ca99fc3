"""The cache of one recurrent layer: one state per sequence and, while recording, the inputs of the tokens behind it.

Shapes: B batch, T time, C convolution channels, W convolution width, S slots.
`state` is that before the *held* tokens of a row: its `counts[b]` newest ones, whose inputs stand in slots 0 .. counts[b] - 1. The raw
convolution input of slot s stands in column s + W - 1, behind the W - 1 inputs before slot 0. Slots from counts[b] on are garbage:
taking tokens back is integer arithmetic on `counts`, row by row. (Mamba-in-Llama, arXiv 2408.15237, Algorithm 2, with lazy folding.)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from llamba.kernels.window import Sight, View
from llamba.models.ring import KeyRing
from llamba.models.tree import Tree

KEPT = 32  # tokens that can be taken back
SLOTS = 2 * KEPT

Inputs = tuple[Tensor, ...]
Advance = Callable[[Inputs, Tensor | None, Tensor | None], Tensor]


def columns(buffer: Tensor, firsts: list[int], length: int) -> Tensor:
    """Columns firsts[b] .. firsts[b] + length - 1 of each row of buffer [B, S, ...]: [B, length, ...]."""
    if min(firsts) == max(firsts):
        return buffer[:, firsts[0] : firsts[0] + length]
    rows, index = _places(buffer, firsts, length)
    return buffer[rows, index.clamp_max(buffer.shape[1] - 1)]  # past the end: garbage, like all behind a row's tokens


def write(buffer: Tensor, firsts: list[int], values: Tensor) -> None:
    """Put values [B, T, ...] into columns firsts[b] .. firsts[b] + T - 1 of each row of buffer [B, S, ...]."""
    if min(firsts) == max(firsts):
        buffer[:, firsts[0] : firsts[0] + values.shape[1]] = values
    else:
        buffer[_places(buffer, firsts, values.shape[1])] = values.to(buffer.dtype)


def gather(buffer: Tensor, firsts: list[int], places: list[list[int]]) -> None:
    """Bring columns firsts[b] + places[b][j] of each row of buffer [B, S, ...] to columns firsts[b] + j; places[b] rises."""
    if all(path == list(range(len(path))) for path in places):
        return
    longest = max(map(len, places))
    index = [[first + place for place in path] + [first] * (longest - len(path)) for first, path in zip(firsts, places, strict=True)]
    rows = torch.arange(len(firsts), device=buffer.device)[:, None]
    write(buffer, firsts, buffer[rows, torch.tensor(index, device=buffer.device)])  # behind a shorter path: garbage


def check_places(tokens: int, places: list[list[int]]) -> None:
    """Raise ValueError unless each row's places rise and are among `tokens` tokens."""
    if any(path != sorted(set(path)) or (path and not 0 <= path[0] <= path[-1] < tokens) for path in places):
        raise ValueError(f"places to keep must rise within 0 .. {tokens - 1}; got {places}")


def _places(buffer: Tensor, firsts: list[int], length: int) -> tuple[Tensor, Tensor]:
    first = torch.tensor(firsts, device=buffer.device)[:, None]
    return torch.arange(len(firsts), device=buffer.device)[:, None], first + torch.arange(length, device=buffer.device)


def _own(values: Tensor) -> Tensor:
    """The values, detached, and copied where they are a part of a larger tensor that they would keep alive."""
    values = values.detach()
    if is_compiling():
        return values.clone()
    return values if values.untyped_storage().nbytes() == values.nbytes else values.clone()


@dataclass
class SteppedLayer:
    """Cache of a mixer whose tokens one kernel evaluates: `run` makes of the mixer and its input [B, T, D] what out_proj takes."""

    run: Callable[[Any, Tensor], Tensor]


class RecurrentLayer(LinearAttentionCacheLayerMixin, CacheLayerMixin):
    """Cache of one mixer; speaks the protocol of transformers' cache layers (record, crop, reorder, select, repeat).

    `state` is fp32 (fp64 for fp64 models). Without recording every token is folded into it at once and `raw` is the window of the
    convolution. With recording (speculative decoding) the last `KEPT` tokens, and at most `SLOTS`, are held, so that they can be taken
    back; `committed[b]` of them are settled and may be folded.
    """

    is_compileable = False
    is_croppable = True
    supports_early_init = False
    is_sliding = False

    def __init__(self, mixer: dict[str, Any]):
        """`mixer`: the model's `config.mixer`."""
        CacheLayerMixin.__init__(self)
        LinearAttentionCacheLayerMixin.__init__(self)
        self.mixer, self.conv_width = mixer, mixer["conv_width"]
        self._clear()

    def _clear(self) -> None:
        self.state: Tensor | None = None
        self.raw: Tensor | None = None  # [B, W - 1 (+ S while tokens are held), C]
        self.held: Inputs | None = None  # each [B, S, ...]
        self.counts: list[int] = []
        self.committed: list[int] = []
        self.absent: list[list[int]] = []  # of each row, which of the tokens seen while recording were padding
        self.seen = 0
        self.ring: KeyRing | None = None  # of a mixer with window or sinks

    @property
    def is_recording(self) -> bool:
        """Whether tokens may be taken back later."""
        return self.record_past

    def window(self) -> Tensor | None:
        """Raw convolution inputs of the last W - 1 tokens [B, W - 1, C], oldest first; None before the first token."""
        return None if self.raw is None else columns(self.raw, self.counts, self.conv_width - 1)

    def set_state(self, window: Tensor, state: Tensor, tokens: int) -> None:
        """Note `tokens` tokens that are folded already: `state` and `window` [B, W - 1, C] after them. Nothing may be held."""
        assert not any(self.counts), "held tokens are folded first"
        self.state, self.seen = _own(state), self.seen + tokens
        if self.held is None:
            self.raw, self.counts = _own(window), [0] * window.shape[0]
            self.committed = self.counts
        else:
            assert self.raw is not None
            self.raw[:, : self.conv_width - 1] = window

    def append_conv(self, raw: Tensor, advance: Advance, fold_after: int, behind: int = 0) -> Tensor:
        """Append raw inputs [B, T, C], T <= KEPT; returns the window before them and themselves [B, W - 1 + T, C]. `append_inputs` follows.

        `advance` folds (inputs, mask, state) into a state. Settled tokens are folded once there are `fold_after` of them. `behind`:
        how many of the tokens held before are to be returned as well, and not to be folded yet.
        """
        if self.held is None:
            self._make_columns(raw)
        elif max(self.counts) + raw.shape[1] > SLOTS or min(self.committed) >= fold_after:
            old = [max(committed, count - KEPT) for committed, count in zip(self.committed, self.counts, strict=True)]
            self._fold([min(fold, count - behind) for fold, count in zip(old, self.counts, strict=True)], advance)
        assert self.raw is not None
        write(self.raw, [count + self.conv_width - 1 for count in self.counts], raw)
        return columns(self.raw, [count - behind for count in self.counts], self.conv_width - 1 + behind + raw.shape[1])

    def append_inputs(self, inputs: Inputs) -> tuple[Inputs, list[int]]:
        """Append the tokens' inputs [B, T, ...]; returns those of all slots in use and each row's first new slot."""
        if self.held is None:
            self.held = tuple(values.new_zeros(values.shape[0], SLOTS, *values.shape[2:]) for values in inputs)
        firsts, tokens = self.counts, inputs[0].shape[1]
        for buffer, values in zip(self.held, inputs, strict=True):
            write(buffer, firsts, values)
        self.counts, self.seen = [count + tokens for count in firsts], self.seen + tokens
        used = max(self.counts)
        return tuple(buffer[:, :used] for buffer in self.held), firsts

    def look(
        self, q: Tensor, k: Tensor, v: Tensor, sight: Sight, scale: float, mask: Tensor | None = None, tree: Tree | None = None
    ) -> View:
        """What queries [B, T, H, P] see through window and sinks of all keys and values so far, and what not; see `llamba.models.ring`."""
        if self.ring is None:
            self.ring = KeyRing(sight, SLOTS if self.is_recording else 0, k, v)
        elif self.is_recording and not self.ring.spare:
            self.ring.spare_more(SLOTS)
        return self.ring.look(q, k, v, scale, mask, tree)

    def look_once(self, q: Tensor, k: Tensor, v: Tensor, sight: Sight, scale: float) -> View:
        """`look` of one token, given without the time axis: q [B, H, P], k and v [B, G, P]. Nothing is recorded."""
        if self.ring is None or torch.is_grad_enabled():
            return self.look(q[:, None], k[:, None], v[:, None], sight, scale)
        return self.ring.look_once(q, k, v, scale)

    def skip(self, real: Tensor) -> None:
        """Of the tokens held last, those that are absent (real [B, T] False) were put behind the others: forget them."""
        tokens = real.shape[1]
        new = [[self.seen - tokens + t for t, there in enumerate(row) if not there] for row in real.tolist()]
        self.absent = [old + more for old, more in zip(self.absent or [[] for _ in new], new, strict=True)]
        self.counts = [count - len(more) for count, more in zip(self.counts, new, strict=True)]

    def _make_columns(self, raw: Tensor) -> None:
        old, width = self.raw, self.conv_width - 1
        self.raw = raw.new_zeros(raw.shape[0], width + SLOTS, raw.shape[2])
        if old is not None:
            self.raw[:, :width] = old
        self.counts = [0] * raw.shape[0]
        self.committed = self.counts

    def fold_all(self, advance: Advance) -> None:
        """Fold every held token; none of them can be taken back then."""
        if any(self.counts):
            self._fold(self.counts, advance)

    def _fold(self, counts: list[int], advance: Advance) -> None:
        """Fold each row's counts[b] oldest held tokens and move the others to the front."""
        assert self.held is not None and self.raw is not None
        longest, left = max(counts), [count - fold for count, fold in zip(self.counts, counts, strict=True)]
        if longest == 0:
            return
        mask = None
        if min(counts) < longest:
            slots = torch.arange(longest, device=self.raw.device)
            mask = slots < torch.tensor(counts, device=self.raw.device)[:, None]
        self.state = advance(tuple(buffer[:, :longest] for buffer in self.held), mask, self.state)
        for buffer in self.held:
            write(buffer, [0] * len(counts), columns(buffer, counts, max(left)).clone())
        write(self.raw, [0] * len(counts), columns(self.raw, counts, max(left) + self.conv_width - 1).clone())
        self.committed = [max(committed - fold, 0) for committed, fold in zip(self.committed, counts, strict=True)]
        self.counts = left

    def commit(self) -> None:
        """Declare all tokens settled: none of them will be taken back."""
        self.committed = self.counts

    def check_rollback(self, tokens: list[int]) -> None:
        """Raise ValueError unless the last tokens[b] tokens of each row can be taken back. Changes nothing."""
        if len(tokens) != len(self.counts) and any(tokens):
            raise ValueError(f"one count of tokens to take back per row is needed; got {len(tokens)} for {len(self.counts)} rows")
        if min(tokens, default=0) < 0:
            raise ValueError(f"counts of tokens to take back are 0 or more; got {min(tokens)}")
        if any(back > count - committed for back, count, committed in zip(tokens, self.counts, self.committed, strict=False)):
            raise ValueError(
                f"cannot take back {max(tokens)} tokens: a recurrent layer holds at most the last {KEPT} tokens, and only "
                "after cache.activate_past_recording(), which an empty DynamicCache() forgets: make it with config=model.config"
            )

    def rollback(self, tokens: list[int]) -> None:
        """Take back the last tokens[b] tokens of each row. Raises ValueError, and changes nothing, for more than are held."""
        self.check_rollback(tokens)
        if any(tokens):
            self._shorten(tokens)
            if self.ring is not None:
                self.ring.rollback(tokens)

    def _shorten(self, tokens: list[int]) -> None:
        self.counts = [count - back for count, back in zip(self.counts, tokens, strict=True)]

    def check_keep(self, tokens: int, places: list[list[int]]) -> None:
        """Raise ValueError where `keep` would refuse. Changes nothing."""
        check_places(tokens, places)
        self.check_rollback([tokens - len(path) for path in places])
        if tokens > min(self.counts, default=0):
            raise ValueError(f"cannot take back or keep {tokens} tokens: rows hold {self.counts}")

    def keep(self, tokens: int, places: list[list[int]]) -> None:
        """Of each row's last `tokens` tokens keep those at places[b] (rising, from 0), and take back the others.

        Raises ValueError, and changes nothing, where so many are not held or places do not rise.
        """
        self.check_keep(tokens, places)
        firsts = [count - tokens for count in self.counts]
        self._shorten([tokens - len(path) for path in places])
        if self.ring is not None:
            self.ring.keep(tokens, places)
        assert self.raw is not None and self.held is not None
        for buffer in self.held:
            gather(buffer, firsts, places)
        gather(self.raw, [first + self.conv_width - 1 for first in firsts], places)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens of every row (transformers passes a negative count, or 0).

        Raises ValueError, and changes nothing, for more than are held.
        """
        self.rollback(self.check_crop(tokens_to_remove))
        self.seen += tokens_to_remove
        self.absent = [[time for time in row if time < self.seen] for row in self.absent]

    def check_crop(self, tokens_to_remove: int) -> list[int]:
        """Of each row, the tokens that `crop` would take back, absent ones left out. Raises ValueError where it would refuse."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative count of tokens to remove; got {tokens_to_remove}")
        if tokens_to_remove and not self.counts:
            raise ValueError(f"cannot take back {-tokens_to_remove} tokens: the cache holds none")
        seen = self.seen + tokens_to_remove
        gone = [sum(time >= seen for time in row) for row in self.absent or [[]] * len(self.counts)]
        back = [-tokens_to_remove - absent for absent in gone]
        self.check_rollback(back)
        return back

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
        if self.raw is None:
            return
        self.raw = change(self.raw)
        self.state = None if self.state is None else change(self.state)
        self.held = None if self.held is None else tuple(map(change, self.held))
        if self.ring is not None:
            self.ring.map(change)
        rows = change(torch.arange(len(self.counts))).tolist()
        self.counts, self.committed = [self.counts[row] for row in rows], [self.committed[row] for row in rows]
        self.absent = [list(self.absent[row]) for row in rows] if self.absent else []

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in the order of the selected beams."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows only, in this order."""
        self._map(lambda value: value[indices.to(value.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._map(lambda value: value.repeat_interleave(repeats, 0))

    @property
    def batch_size(self) -> int:
        """Rows held, -1 before the first token."""
        return len(self.counts) or -1

    def lazy_initialization(self, *args, **kwargs) -> None:
        """Buffers are made with the first tokens."""

    def update(self, *args, **kwargs):
        """Not for this layer: mixers use `set_state`, `append_conv` and `append_inputs`."""
        raise TypeError("a recurrent layer holds no keys and values; mixers call set_state, append_conv and append_inputs")

    update_conv_state = update_recurrent_state = update
