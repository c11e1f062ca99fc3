"""SSD in chunks without a loop over the length, so that one traced graph serves every length (torch.export, torch.compile).

Its gradient is autograd's. Shapes: B batch, T time, K chunks, Q tokens of a chunk, H query heads, G key/value heads, R = H // G, P head
width, N state width.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..common import accumulator, document_before, doubled, lowest_exponent

LONGEST = 20  # 2^20 chunks


def parallel(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    dt: Tensor | None,
    D: Tensor | None,
    state: Tensor | None,
    docs: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """The recurrence of `ssd`, with masked tokens already at a = 0 and dt = 0; shapes as in `ssd`, docs [B, T]."""
    (B, T, G, P), (H, N), acc = x.shape, c.shape[2:], accumulator(x.dtype)
    K = (T + chunk - 1) // chunk
    left = K * chunk - T  # absent tokens that fill the last chunk

    def cut(tensor: Tensor) -> Tensor:  # [B, T, heads, ...] -> [B, K, heads, Q, ...]
        filled = pad(tensor.to(acc), (0, 0) * (tensor.ndim - 2) + (0, left))
        return filled.reshape(B, K, chunk, *tensor.shape[2:]).transpose(2, 3)

    values = x if dt is None else x.repeat_interleave(H // G, 2).to(acc) * dt.to(acc)[..., None]
    xs, bs, cs = cut(values), cut(b), cut(c)  # [B, K, G or H, Q, P or N]
    every = H // xs.shape[2], H // G
    xs, bs = xs.repeat_interleave(every[0], 2), bs.repeat_interleave(every[1], 2)
    total = cut(a).double().cumsum(-1)  # [B, K, H, Q]
    within, enter, leave = _decays(total, _documents(docs, left, chunk), acc)
    added = torch.matmul((xs * leave[..., None]).transpose(3, 4), bs)  # [B, K, H, P, N]
    first = xs.new_zeros(B, H, P, N) if state is None else state.to(acc)
    states = carried(enter[..., -1], added, first)  # [B, K + 1, H, P, N]
    y = torch.matmul(torch.matmul(cs, bs.transpose(3, 4)) * within, xs)
    y = y + torch.matmul(cs, states[:, :-1].transpose(3, 4)) * enter[..., None]  # [B, K, H, Q, P]
    y = y.transpose(2, 3).reshape(B, K * chunk, H, P)[:, :T]
    if D is not None:
        y = y + D.to(acc)[:, None] * x.to(acc).repeat_interleave(H // G, 2)
    return y.to(x.dtype), states[:, -1]


def _documents(docs: Tensor | None, left: int, chunk: int) -> tuple[Tensor, Tensor] | None:
    """Document of every token [B, K, 1, Q], and of the state before every chunk [B, K, 1, 1]; what fills belongs to the last one."""
    if docs is None:
        return None
    last = docs[:, -1:].expand(-1, left)
    both = (torch.cat((part, last), 1).unflatten(1, (-1, chunk))[:, :, None] for part in (docs, document_before(docs)))
    here, before = both
    return here, before[..., :1]


def _decays(total: Tensor, docs: tuple[Tensor, Tensor] | None, acc: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """What is left on the way inside a chunk [B, K, H, Q, Q], from the state before it and to that after it [B, K, H, Q]."""
    lowest = lowest_exponent(acc)
    causal = torch.ones(total.shape[-1], total.shape[-1], dtype=torch.bool, device=total.device).tril()
    within = (total[..., None] - total[..., None, :]).clamp(lowest, 0).exp().to(acc) * causal
    enter, leave = (t.clamp(lowest, 0).exp().to(acc) for t in (total, total[..., -1:] - total))
    if docs is None:
        return within, enter, leave
    here, before = docs
    return within * (here[..., None] == here[..., None, :]), enter * (here == before), leave * (here == here[..., -1:])


def carried(across: Tensor, added: Tensor, first: Tensor) -> Tensor:
    """States before each chunk and after the last [B, K + 1, H, P, N]: S_(k+1) = across_k S_k + added_k; across [B, K, H]."""
    kept = pad(across, (0, 0, 1, 0))[..., None, None]  # [B, K + 1, H, 1, 1]; before the first state there is nothing
    return doubled(kept, torch.cat((first[:, None], added), 1), LONGEST)
