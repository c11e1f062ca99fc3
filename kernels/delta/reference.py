"""The gated delta rule one token at a time: the oracle of the faster forms.

Shapes: B batch, T time, H query heads, G key/value heads, P head width, N state width.
"""

import torch
from torch import Tensor

from ..common import accumulator, document_before


def sequential(
    x: Tensor, a: Tensor, b: Tensor, c: Tensor, erase: Tensor, write: Tensor | None, state: Tensor | None, docs: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """The recurrence of `delta_rule`, with masked tokens already at a = erase = write = 0; shapes as in `delta_rule`, docs [B, T]."""
    (B, T, G, P), (H, N), acc = x.shape, c.shape[2:], accumulator(x.dtype)
    xs, bs = (t.to(acc).repeat_interleave(H // G, 2) for t in (x, b))  # [B, T, H, P], [B, T, H, N]
    values = xs if write is None else xs * write.to(acc)[..., None]
    decay = (a if a.ndim == 4 else a[..., None]).to(acc).exp()  # [B, T, H, N or 1]
    if docs is not None:
        decay = decay * (docs == document_before(docs))[..., None, None]
    s = x.new_zeros(B, H, P, N, dtype=acc) if state is None else state.to(acc)
    ys = []
    for t in range(T):
        s = s * decay[:, t, :, None]
        held = (s * bs[:, t, :, None]).sum(-1)  # [B, H, P] what stands under the key
        u = values[:, t] - erase[:, t, :, None].to(acc) * held
        s = s + u[..., None] * bs[:, t, :, None]
        ys.append((s * c[:, t, :, None].to(acc)).sum(-1))
    return torch.stack(ys, 1).to(x.dtype), s
