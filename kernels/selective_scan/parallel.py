"""The selective scan without a loop over the length, so that one traced graph serves every length (torch.export, torch.compile).

Its gradient is autograd's, and it holds all states at once. Shapes: B batch, T time, C channels, S groups, N state width, K chunks, Q
tokens of a chunk.
"""

from torch import Tensor
from torch.nn.functional import pad

from ..common import accumulator, document_before, doubled

CHUNK = 64  # 2^6 tokens
LONGEST = 20  # 2^20 chunks


def parallel(
    x: Tensor, dt: Tensor, A: Tensor, b: Tensor, c: Tensor, D: Tensor | None, state: Tensor | None, docs: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The recurrence of `selective_scan`, with dt already 0 at masked tokens; shapes as there, docs [B, T]."""
    (B, T, C), (S, N), acc = x.shape, b.shape[2:], accumulator(x.dtype)
    K = (T + CHUNK - 1) // CHUNK
    step = dt.to(acc)
    kept = (step[..., None] * A.to(acc)).exp()  # [B, T, C, N]
    if docs is not None:
        kept = kept * (docs == document_before(docs))[..., None, None]
    added = (step * x.to(acc))[..., None] * b.to(acc).repeat_interleave(C // S, 2)
    left = (0, 0, 0, 0, 0, K * CHUNK - T)
    kept = pad(kept, left, value=1.0).reshape(B * K, CHUNK, C, N)  # what fills the last chunk keeps the state
    added = pad(added, left).reshape(B * K, CHUNK, C, N)
    inside = doubled(kept, added, CHUNK.bit_length() - 1)  # from a state of 0 before each chunk
    so_far = kept.cumprod(1)
    first = added.new_zeros(B, 1, C, N) if state is None else state.to(acc)[:, None]
    ends = inside[:, -1].reshape(B, K, C, N)
    across = pad(so_far[:, -1].reshape(B, K, C, N), (0, 0, 0, 0, 1, 0))
    before = doubled(across, pad(ends, (0, 0, 0, 0, 1, 0)) + pad(first, (0, 0, 0, 0, 0, K)), LONGEST)  # [B, K + 1, C, N]
    states = (inside + so_far * before[:, :-1].reshape(B * K, 1, C, N)).reshape(B, K * CHUNK, C, N)[:, :T]
    y = (states * c.to(acc).repeat_interleave(C // S, 2)).sum(-1)
    if D is not None:
        y = y + D.to(acc) * x.to(acc)
    return y.to(x.dtype), before[:, -1]
