"""What is out of sight: how many tokens, and the mean of their values. Sinks never are.

Shapes: B batch, T time, G key/value heads, P head width, S tokens of the past.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..common import accumulator, traced
from .sight import NO_LIMIT, Past, Sight


def gone(v: Tensor, sight: Sight, start: Tensor | None, past: Past | None) -> tuple[Tensor, Tensor, Tensor]:
    """The last three parts of a `View` of real tokens with values v [B, T, G, P], whose documents start at `start` [B, T] (None: at 0).
    What only `reach` hides is not counted."""
    T, wide = v.shape[1], v.to(accumulator(v.dtype))
    place = torch.arange(T, device=v.device)[None]
    if sight.whole == NO_LIMIT:
        return place < 0, torch.zeros_like(place, dtype=wide.dtype), torch.zeros_like(v)
    if past is not None:
        place = past.length[:, None] + place
        sums = _behind_past(wide, sight, place, past)
    elif start is None and not traced(T):
        sums = _shifted(wide[:, sight.sinks :], sight.window, T)
    else:
        first = (torch.zeros_like(place) if start is None else start) + sight.sinks
        sums = _between(wide, first, place - sight.window + 1)
    count = (place - sight.window + 1 - sight.sinks - (0 if start is None else start)).clamp_min(0)
    some = count.clamp_min(1)
    return count > 0, some.to(wide.dtype).log(), (sums / some[..., None, None]).to(v.dtype)


def _shifted(values: Tensor, window: int, tokens: int) -> Tensor:
    """Sums of the values [B, K, G, P] of the last K of `tokens` tokens that stand `window` tokens back or further, [B, tokens, G, P]."""
    left = values[:, : max(values.shape[1] - window, 0)].cumsum(1)
    return pad(left, (0, 0, 0, 0, tokens - left.shape[1], 0))


def _between(values: Tensor, first: Tensor, end: Tensor) -> Tensor:
    """Sums of values [B, T, G, P] from first [B or 1, T] up to before end [B or 1, T]."""
    rows, T = torch.arange(values.shape[0], device=values.device)[:, None], values.shape[1]
    before = pad(values.cumsum(1), (0, 0, 0, 0, 1, 0))  # [B, T + 1, G, P]
    sums = before[rows, end.clamp_min(0)] - before[rows, first.clamp_max(T)]
    return sums * (end > first)[..., None, None]


def _behind_past(values: Tensor, sight: Sight, place: Tensor, past: Past) -> Tensor:
    new = values * (place >= sight.sinks)[..., None, None]
    far = (place[..., None] - past.places[:, None] >= sight.window) & (past.places >= sight.sinks)[:, None]  # [B, T, S]
    held = torch.einsum("bts,bsgp->btgp", far.expand(values.shape[0], -1, -1).to(values.dtype), past.values.to(values.dtype))
    return past.gone[:, None] + held + _shifted(new, sight.window, values.shape[1])
