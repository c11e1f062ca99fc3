"""The selective scan one token at a time: the oracle of the faster form.

Shapes: B batch, T time, C channels, S groups, N state width.
"""

import torch
from torch import Tensor

from ..common import accumulator, document_before


def sequential(
    x: Tensor, dt: Tensor, A: Tensor, b: Tensor, c: Tensor, D: Tensor | None, state: Tensor | None, docs: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The recurrence of `selective_scan`, with dt already 0 at masked tokens; shapes as there, docs [B, T]."""
    (B, T, C), (S, N), acc = x.shape, b.shape[2:], accumulator(x.dtype)
    bs, cs = (t.to(acc).repeat_interleave(C // S, 2) for t in (b, c))  # [B, T, C, N]
    xs, steps = x.to(acc), dt.to(acc)
    decay = torch.exp(steps[..., None] * A.to(acc))  # [B, T, C, N]
    if docs is not None:
        decay = decay * (docs == document_before(docs))[..., None, None]
    h = x.new_zeros(B, C, N, dtype=acc) if state is None else state.to(acc)
    ys = []
    for t in range(T):
        h = decay[:, t] * h + (steps[:, t] * xs[:, t])[..., None] * bs[:, t]  # [B, C, N]
        ys.append((cs[:, t] * h).sum(-1))
    y = torch.stack(ys, 1)  # [B, T, C]
    return (y if D is None else y + D.to(acc) * xs).to(x.dtype), h
