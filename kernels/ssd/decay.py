"""The decay factors of one block of chunks, with documents cut apart.

Shapes: K chunks, B batch, H query heads, Q tokens of a chunk.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..common import lowest_exponent


class Decay(NamedTuple):
    """What is left of a contribution on its way through a chunk."""

    within: Tensor  # [K, B, H, Q, Q] from token j (last) to token i, 0 for j > i
    enter: Tensor  # [K, B, H, Q] from the state before the chunk to token i
    leave: Tensor  # [K, B, H, Q] from token j to the state after the chunk
    across: Tensor  # [K, B, H] from the state before the chunk to the state after it


def decays(a: Tensor, docs: Tensor | None, before: Tensor | None) -> Decay:
    """The factors for log decays a [K, B, H, Q]; docs [K, B, Q] document numbers, before [K, B] those of the states."""
    lowest = lowest_exponent(a.dtype)
    total = a.double().clamp_(min=2 * lowest).cumsum(-1)
    enter, leave = (t.clamp_(lowest, 0).exp_().to(a.dtype) for t in (total.clone(), total[..., -1:] - total))
    within = _gaps(total, a.dtype).clamp_(lowest, 0).exp_()
    if docs is None or before is None:
        return Decay(within.tril_(), enter, leave, enter[..., -1])
    within.mul_((docs[..., None] == docs[:, :, None]).to(a.dtype).tril_()[:, :, None])
    enter.mul_((docs == before[..., None])[:, :, None])
    leave.mul_((docs == docs[..., -1:])[:, :, None])
    return Decay(within, enter, leave, enter[..., -1])


def _gaps(total: Tensor, dtype: torch.dtype) -> Tensor:
    """Differences total_i - total_j [..., Q, Q] of fp64 sums in `dtype`: whole numbers cancel exactly, then come the rests."""
    whole = total.round()
    rest = (total - whole).to(dtype)
    whole = whole.to(dtype)
    return torch.sub(whole[..., None], whole[..., None, :]).add_(rest[..., None]).sub_(rest[..., None, :])
