"""Absent tokens of the convolution: moved behind the real ones, and back; and the window that is handed on.

Shapes: B batch, T time, C channels, W conv width.
"""

import torch
from torch import Tensor

from ..common import traced


def pack(x: Tensor, seq_idx: Tensor | None, mask: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Move the real tokens of each row to its front, in order: x [B, T, C], their documents [B, T], their old places [B, T]."""
    order = mask.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    packed = x.gather(1, order[..., None].expand_as(x))
    return packed, None if seq_idx is None else seq_idx.gather(1, order), order


def unpack(y: Tensor, order: Tensor, mask: Tensor) -> Tensor:
    """Move y [B, T, C] back to the places `order` [B, T], with 0 for absent tokens."""
    back = order.argsort(dim=1)[..., None].expand_as(y)
    return y.gather(1, back).masked_fill(~mask[..., None], 0)


def final_window(x: Tensor, state: Tensor, docs: Tensor | None, mask: Tensor | None) -> Tensor:
    """The last W - 1 real inputs [B, W - 1, C] of `state` followed by packed x [B, T, C], of the last document alone."""
    (B, T, C), kept = x.shape, state.shape[1]
    tail = torch.full((B,), T, device=x.device) if mask is None else mask.sum(1)  # real tokens of each row
    if mask is None and docs is None:
        recent = x if traced(T) else x[:, max(0, T - kept) :]
        return torch.cat([state, recent], 1)[:, -kept:].clone() if kept else state
    places = tail[:, None] + torch.arange(kept, device=x.device)  # [B, W - 1] in the row [state, x]
    window = torch.cat([state, x], 1).gather(1, places[..., None].expand(B, kept, C))
    if docs is None:
        return window
    all_docs = torch.nn.functional.pad(docs, (kept, 0))
    last = torch.nn.functional.pad(docs, (1, 0)).gather(1, tail[:, None])  # document of the last real token, 0 if none
    return window.masked_fill((all_docs.gather(1, places) != last)[..., None], 0)
