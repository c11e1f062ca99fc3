"""The SSD mixing matrix, written out.

Shapes: B batch, T time, H query heads, G key/value heads, R = H // G, N state width, I rows asked for.
"""

import torch
from torch import Tensor

from ..common import accumulator, lowest_exponent


def matrix(a: Tensor, b: Tensor, c: Tensor, dt: Tensor | None, docs: Tensor | None, mask: Tensor | None, rows: slice | Tensor) -> Tensor:
    """Rows `rows` of the matrix of `ssd_matrix`, [B, H, I, T]; docs [B, T] has absent tokens filled in."""
    (_, T, G, _), H, acc = b.shape, c.shape[2], accumulator(b.dtype)
    if mask is not None:
        a = a.masked_fill(~mask[..., None], 0)
    lowest = lowest_exponent(acc)
    total = a.double().clamp(min=2 * lowest).cumsum(1).transpose(1, 2)  # [B, H, T], fp64: differences of long sums keep fp32 accuracy
    gap = (total[:, :, rows, None] - total[:, :, None]).to(acc)  # [B, H, I, T]
    weight = gap.clamp(lowest, 0).exp().masked_fill(~_visible(docs, mask, T, rows, a.device), 0)
    if dt is not None:
        weight = weight * dt.to(acc).transpose(1, 2)[:, :, None]
    queries = c[:, rows].to(acc).unflatten(2, (G, H // G)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, G, R * I, N]
    scores = queries @ b.to(acc).permute(0, 2, 3, 1)  # [B, G, R * I, T]
    return scores.view(weight.shape) * weight


def _visible(docs: Tensor | None, mask: Tensor | None, T: int, rows: slice | Tensor, device: torch.device) -> Tensor:
    """Where row i may see column j, [B or 1, 1, I, T] bool."""
    index = torch.arange(T, device=device)
    seen = (index[rows, None] >= index)[None, None]
    if docs is not None:
        seen = seen & (docs[:, None, rows, None] == docs[:, None, None])
    if mask is not None:
        seen = seen & mask[:, None, rows, None] & mask[:, None, None]
    return seen
