"""The window and the sinks in blocks of queries: O(T window) time and memory.

A block of Q queries sees keys of its own block, of the one before it (Q >= window - 1), and the sinks of the document that its first
query belongs to: the sinks of any other document of the block stand in those two blocks themselves.
Shapes: B batch, T time, H query heads, G key/value heads, P head width, n blocks, M sinks.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..common import traced
from .sight import Past, Sight, sees
from .slots import Seen, attend

LEAST = 32  # queries of a block


def blocked(q: Tensor, k: Tensor, v: Tensor, sight: Sight, scale: float, start: Tensor | None, past: Past | None) -> Seen:
    """What real tokens see, whose documents start at `start` [B, T] (None: at 0)."""
    T, Q = q.shape[1], max(-(-(sight.window - 1) // 16) * 16, LEAST)
    place = torch.arange(T, device=q.device)[None]
    if past is not None:
        place = past.length[:, None] + place
        head = _with_past(q[:, :Q], k[:, :Q], v[:, :Q], sight, scale, place[:, :Q], past)
        if T <= Q:
            return head
        y, lse = (
            torch.cat(parts, 1) for parts in zip(head, _behind_past(q[:, Q:], k, v, sight, scale, place[:, Q:], past, Q), strict=True)
        )
        return y, lse
    if traced(T) or T <= 2 * Q:  # blocks of a length that is not known cannot be traced
        return attend(q, k, v, sees(place, torch.zeros_like(place) if start is None else start, place, sight), scale)
    more, first = (0, 0, 0, 0, 0, -T % Q), torch.zeros_like(place) if start is None else start
    place, first = pad(place, more[4:], value=T), pad(first, more[4:])
    sinks = first[:, ::Q, None] + torch.arange(sight.sinks, device=q.device)  # [1 or B, n, M]
    at = sinks[:, :1] if start is None else sinks  # one document: the same sinks for all blocks
    rows = torch.arange(len(at), device=q.device)[:, None, None]
    front = (0, 0, 0, 0, Q, more[-1])
    (far_keys, k), (far_values, v) = (
        (heads[rows, at.clamp_max(T - 1)] if len(at) > 1 or start is not None else heads[:, at[0].clamp_max(T - 1)], pad(heads, front))
        for heads in (k, v)
    )
    y, lse = _in_blocks(pad(q, more), far_keys, k, far_values, v, sight, scale, place, first, sinks, Q)
    return y[:, :T], lse[:, :T]


def _with_past(q: Tensor, k: Tensor, v: Tensor, sight: Sight, scale: float, place: Tensor, past: Past) -> Seen:
    keys = torch.cat((past.places.expand(len(place), -1), place), 1)
    seen = sees(place, torch.zeros_like(place), keys, sight)
    return attend(q, torch.cat((past.keys, k), 1), torch.cat((past.values, v), 1), seen, scale)


def _behind_past(q: Tensor, k: Tensor, v: Tensor, sight: Sight, scale: float, place: Tensor, past: Past, Q: int) -> Seen:
    """Queries from the second block on: what they see of the past are sinks."""
    T, M = q.shape[1], sight.sinks
    more = (0, 0, 0, 0, 0, -T % Q)
    place = torch.cat((place, place[:, -1:] + torch.arange(1, more[-1] + 1, device=q.device)), 1)
    sinks = torch.arange(M, device=q.device).expand(len(place), place.shape[1] // Q, M)
    held = torch.cat((past.places.expand(len(place), -1), past.length[:, None] + torch.arange(M, device=q.device)), 1)
    index = (held[:, :, None] == torch.arange(M, device=q.device)).to(torch.uint8).argmax(1)  # [1 or B, M] where each sink stands
    rows = torch.arange(len(q), device=q.device)[:, None]
    pairs = ((torch.cat((old, new[:, :M]), 1)[rows, index][:, None], pad(new, more)) for old, new in ((past.keys, k), (past.values, v)))
    (sink_keys, k), (sink_values, v) = pairs
    y, lse = _in_blocks(pad(q, more), sink_keys, k, sink_values, v, sight, scale, place, torch.zeros_like(place), sinks, Q)
    return y[:, :T], lse[:, :T]


def _in_blocks(
    q: Tensor, sink_keys: Tensor, k: Tensor, sink_values: Tensor, v: Tensor, sight: Sight, scale: float,
    place: Tensor, first: Tensor, sinks: Tensor, Q: int,
) -> Seen:  # fmt: skip
    """q [B, n Q, H, P]; k and v [B, (n + 1) Q, G, P] from the block before on; sinks [1 or B, n, M] are the places of sink_keys
    [B, 1 or n, M, G, P]; place and first [1 or B, n Q] those of the queries and of their documents' starts."""
    B, n = len(q), q.shape[1] // Q
    at, first = place.unflatten(1, (n, Q)), first.unflatten(1, (n, Q))
    local = at[:, :, :1] + torch.arange(-Q, Q, device=q.device)  # [1 or B, n, 2 Q]
    rows = max(len(at), len(first))
    extra = sinks.masked_fill(sinks >= local[:, :, :1], -1)  # a local key is seen once
    seen = sees(at, first, torch.cat((extra.expand(rows, -1, -1), local.expand(rows, -1, -1)), 2), sight)  # [1 or B, n, Q, M + 2 Q]
    k, v = (_blocks(far, near, n, Q) for far, near in ((sink_keys, k), (sink_values, v)))
    y, lse = attend(q.reshape(B * n, Q, *q.shape[2:]), k, v, seen.expand(B, -1, -1, -1).flatten(0, 1), scale)
    return y.reshape(B, n * Q, *q.shape[2:]), lse.reshape(B, n * Q, -1)


def _blocks(sinks: Tensor, heads: Tensor, n: int, Q: int) -> Tensor:
    """What each block can see: sinks [B, 1 or n, M, G, P], the block before and its own: [B n, M + 2 Q, G, P]."""
    by_block = heads.unflatten(1, (n + 1, Q))
    return torch.cat((sinks.expand(-1, n, -1, -1, -1), by_block[:, :-1], by_block[:, 1:]), 2).flatten(0, 1)
