"""A round of new tokens over keys and values in slots, with cursors on the device: only device work, which a CUDA graph can hold.

Shapes: B batch, T time, H query heads, G key/value heads, P head width, M sinks, L slots behind those, S = M + L.
A row's token number n stands in slot n where n < M, and in slot M + (n - M) mod L else; L is at least window + T. Taking tokens back is
arithmetic on the cursors, as far as the slots hold what is seen then. The values of tokens whose slots a round takes are summed before:
they are out of sight of whatever can still be read.
"""

from typing import Any

import torch
from torch import Tensor

from .rotation import turned
from .sight import Held, Rest, Sight, sees
from .slots import attend_slots


def steps_in_torch(
    heads: Tensor, scores: Tensor, y: Tensor, rest: Rest, cos: Tensor, sin: Tensor, held: Held, at: Any, sight: Sight, scale: float
) -> Tensor:
    """`window_steps`; arguments as there."""
    (B, T, _, P), (_, G, S, _), wide = heads.shape, held.keys.shape, held.total.dtype
    v, k, q = heads.split([G, G, heads.shape[2] - 2 * G], 2)
    q, k = turned(q, cos, sin), turned(k, cos, sin)
    start = at.length[:, None].long()
    place = start + torch.arange(T, device=heads.device)
    _settle(held, start, T, sight)
    rows, slots = torch.arange(B, device=heads.device)[:, None], slot_of(place, sight.sinks, S)
    held.keys[rows, :, slots], held.values[rows, :, slots] = k.to(held.keys.dtype), v.to(held.values.dtype)
    stands = places_in(start + T, sight.sinks, S)  # [B, S]
    seen = sees(place, torch.zeros_like(place), stands, sight)
    added = torch.zeros(seen.shape, dtype=wide, device=q.device).masked_fill_(~seen, torch.finfo(wide).min)
    look, lse = attend_slots(q, held.keys, held.values, added, scale)

    far = (place[..., None] - stands[:, None] >= sight.window) & (stands >= held.summed[:, :1])[:, None]  # [B, T, S]
    sums = held.total[:, None] + torch.einsum("bts,bgsp->btgp", far.to(wide), held.values.to(wide))
    count = (place - sight.whole + 1).clamp_min(0)[..., None]
    mean = (sums / count.clamp_min(1)[..., None]).unsqueeze(3)  # [B, T, G, 1, P]
    mass = torch.sigmoid(scores.to(wide) + rest.bias + rest.growth * count.clamp_min(1).to(wide).log() - lse) * (count > 0)
    value = y.to(wide) + (mean * rest.share.view(G, -1, P)).flatten(2)
    joined = torch.lerp(look.to(wide), value.view(look.shape), mass[..., None]).flatten(2).to(y.dtype)
    return joined.masked_fill((torch.arange(T, device=q.device) >= at.new[:, None])[..., None], 0)


def _settle(held: Held, length: Tensor, tokens: int, sight: Sight) -> None:
    """Sum the values whose slots `tokens` tokens behind rows with length [B, 1] tokens take."""
    slots = held.keys.shape[2]
    stands, end = places_in(length, sight.sinks, slots), length + tokens - (slots - sight.sinks)
    leaves = (stands >= held.summed[:, :1]) & (stands >= sight.sinks) & (stands < end)  # [B, S]
    held.total.add_(torch.einsum("bs,bgsp->bgp", leaves.to(held.total.dtype), held.values.to(held.total.dtype)))
    held.summed.copy_(torch.maximum(held.summed, end.clamp_min(sight.sinks)))


def slot_of(places: Tensor, sinks: int, slots: int) -> Tensor:
    """The slot, of `slots`, of each token."""
    return torch.where(places < sinks, places, sinks + (places - sinks) % (slots - sinks))


def places_in(length: Tensor, sinks: int, slots: int) -> Tensor:
    """Which token stands in each slot of rows with length [B, 1] tokens, [B, S]; negative: none."""
    newest, slot = length - 1 - sinks, torch.arange(slots - sinks, device=length.device)
    behind = newest - (newest - slot) % (slots - sinks) + sinks  # the newest of the tokens that share the slot
    first = torch.arange(sinks, device=length.device).expand(len(length), -1)
    return torch.cat((first.masked_fill(first >= length, -1), behind.masked_fill(behind < sinks, -1)), 1)
