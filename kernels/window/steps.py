"""A round of new tokens over keys and values in slots, with cursors on the device: only device work, which a CUDA graph can hold.

Shapes: B batch, T time, H query heads, G key/value heads, P head width, M sinks, L slots behind those, S = M + L.
A row's token number n stands in slot n where n < M, and in slot M + (n - M) mod L else; L is at least window + T. Taking tokens back is
arithmetic on the cursors.
"""

from typing import Any

import torch
from torch import Tensor

from .rotation import turned
from .sight import Sight, sees
from .slots import attend_slots


def steps_in_torch(
    heads: Tensor, mass: Tensor, y: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, at: Any, sight: Sight, scale: float
) -> Tensor:
    """`window_steps`; arguments as there."""
    (B, T), G = heads.shape[:2], keys.shape[1]
    v, k, q = heads.split([G, G, heads.shape[2] - 2 * G], 2)
    q, k = turned(q, cos, sin), turned(k, cos, sin)
    place = at.length[:, None].long() + torch.arange(T, device=heads.device)
    rows, slots = torch.arange(B, device=heads.device)[:, None], slot_of(place, sight.sinks, keys.shape[2])
    keys[rows, :, slots], values[rows, :, slots] = k.to(keys.dtype), v.to(values.dtype)
    seen = sees(place, torch.zeros_like(place), places_in(at.length[:, None].long() + T, sight.sinks, keys.shape[2]), sight)
    added = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, torch.finfo(q.dtype).min)
    look = attend_slots(q, keys, values, added, scale)
    hides = (place >= sight.whole)[..., None]
    joined = y * hides + (look * (1 - (mass * hides)[..., None])).flatten(2)
    return joined.masked_fill((torch.arange(T, device=q.device) >= at.new[:, None])[..., None], 0)


def slot_of(places: Tensor, sinks: int, slots: int) -> Tensor:
    """The slot, of `slots`, of each token."""
    return torch.where(places < sinks, places, sinks + (places - sinks) % (slots - sinks))


def places_in(length: Tensor, sinks: int, slots: int) -> Tensor:
    """Which token stands in each slot of rows with length [B, 1] tokens, [B, S]; negative: none."""
    newest, slot = length - 1 - sinks, torch.arange(slots - sinks, device=length.device)
    behind = newest - (newest - slot) % (slots - sinks) + sinks  # the newest of the tokens that share the slot
    first = torch.arange(sinks, device=length.device).expand(len(length), -1)
    return torch.cat((first.masked_fill(first >= length, -1), behind.masked_fill(behind < sinks, -1)), 1)
