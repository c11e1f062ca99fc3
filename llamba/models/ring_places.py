"""Where a ring's tokens stand: what follows from the lengths of its rows alone, made once for all layers of a model.

Shapes: B batch, T time, M sinks, L slots behind those of the sinks, S = M + L. What is made here outlives the call that made it.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from llamba.kernels.window import Sight, places_in, sees, slot_of

Lengths = tuple[int, ...]


class Slots(NamedTuple):
    """Which tokens stand where: `sinks` M and `turns` L slots of a row."""

    sinks: int
    turns: int

    def of(self, places: Tensor) -> Tensor:
        """The slots of tokens."""
        return slot_of(places, self.sinks, sum(self))

    def places(self, length: Tensor) -> Tensor:
        """Which token stands in each slot of rows with length [B, 1] tokens, [B, S]; negative: none."""
        return places_in(length, self.sinks, sum(self))


@lru_cache(maxsize=16)
def added_to(lengths: Lengths, tokens: int, sight: Sight, slots: Slots, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """What is added to the scores of each row's last `tokens` tokens [B or 1, T, S]; None where they see all slots."""
    with torch.inference_mode(False):
        rows = lengths[:1] if len(set(lengths)) == 1 else lengths
        length = torch.tensor(rows, device=device)[:, None]
        last = length - tokens + torch.arange(tokens, device=device)
        seen = sees(last, torch.zeros_like(last), slots.places(length), sight)
        if bool(seen.all()):
            return None
        return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, torch.finfo(dtype).min)


@lru_cache(maxsize=16)
def counted(lengths: Lengths, tokens: int, whole: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor | None, Tensor, Tensor]:
    """Of each row's last `tokens` tokens: which had read more than `whole` tokens [B or 1, T] (None: all), themselves included, the
    logarithm of how many more, and one part of so many [B or 1, T, 1, 1]."""
    with torch.inference_mode(False):
        rows = lengths[:1] if len(set(lengths)) == 1 else lengths
        count = torch.tensor(rows, device=device)[:, None] - tokens + torch.arange(tokens, device=device) - whole + 1
        some = count.clamp_min(1).to(dtype)
        return None if min(lengths) - tokens >= whole else count > 0, some.log(), some.reciprocal()[..., None, None]


@lru_cache(maxsize=16)
def slots_between(lengths: Lengths, firsts: Lengths, ends: tuple[Lengths, ...], slots: Slots, device: torch.device) -> Tensor:
    """Which slots hold tokens from firsts[b] up to before ends[t][b], [B, T, S] as 0 and 1 in fp64."""
    with torch.inference_mode(False):
        length, first, end = (
            torch.tensor(numbers, device=device).T[..., None] for numbers in ([lengths], [firsts], ends)
        )  # [B, 1 or T, 1]
        place = slots.places(length[:, 0])[:, None]  # [B, 1, S]
        return ((place >= first) & (place < end)).double()


@lru_cache(maxsize=16)
def past_slots(lengths: Lengths, count: int, slots: Slots, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Places [B, M + count] of the sinks and of the last `count` tokens, their slots, and the lengths [B]."""
    with torch.inference_mode(False):
        length = torch.tensor(lengths, device=device)
        recent = length[:, None] - count + torch.arange(count, device=device)
        first = torch.arange(slots.sinks, device=device).expand(len(lengths), -1)
        places = torch.cat((first.masked_fill(first >= length[:, None], -1), recent.masked_fill(recent < slots.sinks, -1)), 1)
        return places, slots.of(places.clamp_min(0)), length


@lru_cache(maxsize=16)
def new_slots(lengths: Lengths, tokens: int, slots: Slots, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows [B, 1] and slots [B, T] of the tokens behind each row."""
    with torch.inference_mode(False):
        place = torch.tensor(lengths, device=device)[:, None] + torch.arange(tokens, device=device)
        return torch.arange(len(lengths), device=device)[:, None], slots.of(place)
