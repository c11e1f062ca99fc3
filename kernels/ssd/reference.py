"""SSD one token at a time: the oracle of the faster forms.

Shapes: B batch, T time, H query heads, G key/value heads, R = H // G, P head width, N state width.
"""

import torch
from torch import Tensor

from ..common import accumulator, document_before


def sequential(
    x: Tensor, a: Tensor, b: Tensor, c: Tensor, dt: Tensor | None, D: Tensor | None, state: Tensor | None, docs: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The recurrence of `ssd`, with masked tokens already at a = 0 and dt = 0; shapes as in `ssd`, docs [B, T]."""
    (B, T, G, P), (H, N), acc = x.shape, c.shape[2:], accumulator(x.dtype)
    xs, bs = (t.to(acc).repeat_interleave(H // G, 2) for t in (x, b))  # [B, T, H, P], [B, T, H, N]
    write = xs if dt is None else xs * dt.to(acc)[..., None]
    decay = a.to(acc).exp()
    if docs is not None:
        decay = decay * (docs == document_before(docs))[..., None]
    s = x.new_zeros(B, H, P, N, dtype=acc) if state is None else state.to(acc)
    ys = []
    for t in range(T):
        s = decay[:, t, :, None, None] * s + write[:, t, :, :, None] * bs[:, t, :, None]  # [B, H, P, N]
        ys.append((s * c[:, t, :, None].to(acc)).sum(-1))
    y = torch.stack(ys, 1)  # [B, T, H, P]
    return (y if D is None else y + D.to(acc)[:, None] * xs).to(x.dtype), s
