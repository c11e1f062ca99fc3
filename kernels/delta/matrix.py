"""The mixing matrix of the delta rule with one decay per head, written out.

Shapes: B batch, T time, H query heads, G key/value heads, N state width, I rows asked for.
"""

import torch
from torch import Tensor

from ..ssd.matrix import matrix as additive


def matrix(
    a: Tensor, b: Tensor, c: Tensor, erase: Tensor, write: Tensor | None, docs: Tensor | None, mask: Tensor | None, rows: slice | Tensor
) -> Tensor:
    """Rows of tril(C B^T) (I + diag(erase) tril(B B^T, -1))^-1 diag(write), each product decayed; arguments as in `delta_matrix`."""
    H = c.shape[2]
    keys = b.repeat_interleave(H // b.shape[2], 2)
    overlap = additive(a, b, keys, None, docs, mask, slice(None)).tril(-1)
    system = erase.to(overlap.dtype).transpose(1, 2)[..., None] * overlap
    reads = additive(a, b, c, None, docs, mask, rows)  # [B, H, I, T]
    made = torch.linalg.solve_triangular(system, reads, upper=False, left=False, unitriangular=True)
    return made if write is None else made * write.to(made.dtype).transpose(1, 2)[:, :, None]
