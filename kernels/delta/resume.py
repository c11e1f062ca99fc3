"""The delta rule for a few tokens behind others whose updates are known: outputs without a new state, and a state without outputs.

Shapes: B batch, S tokens of the sequence, T tokens asked for, H query heads, G key/value heads, P head width, N state width.
"""

import torch
from torch import Tensor

from ..common import accumulator, lowest_exponent
from ..ssd.resume import visible


def resume(
    x: Tensor, a: Tensor, b: Tensor, c: Tensor, erase: Tensor, u: Tensor, firsts: Tensor | int, write: Tensor | None, state: Tensor | None,
    ancestors: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y and u of the tokens; arguments as in `delta_resume`. In a tree a token sees its ancestors, and decays add up along its path."""
    (B, T, G, _), S, H, acc = x.shape, b.shape[1], c.shape[2], accumulator(x.dtype)
    slots = torch.arange(S, device=x.device)
    at = torch.as_tensor(firsts, device=x.device).view(-1, 1) + slots[:T]  # [1 or B, T]
    if ancestors is None:
        seen = slots <= at[..., None]  # [1 or B, T, S]
        path = (slots <= slots[:, None])[None]
    else:
        path = visible(slots, at[:, -1:] + 1 - len(ancestors), ancestors)
        seen = path.gather(1, at[..., None].expand(-1, -1, S))
    here = at.expand(B, T)
    keys = b.to(acc).repeat_interleave(H // G, 2)  # [B, S, H, N]
    rows = torch.arange(B, device=x.device)[:, None]
    near, queries = keys[rows, here], c.to(acc)  # [B, T, H, N]
    old = seen & (slots < at[:, :1, None])
    new = seen.expand(B, T, S).gather(2, here[:, None].expand(B, T, T))  # [B, T, T] among the tokens themselves
    scores, overlap, enter = _products(queries, near, keys, a, path, here)
    held = u.to(acc).masked_fill(~(slots < at[:, :1]).view(-1, S, 1, 1), 0)  # [B, S, H, P]
    values = x.to(acc).repeat_interleave(H // G, 2)  # [B, T, H, P]
    values = values if write is None else values * write.to(acc)[..., None]
    right = values - erase.to(acc)[..., None] * _read(overlap, old, held, near, enter, state)
    among = here[:, None, None].expand(B, H, T, T)
    eye = torch.eye(T, dtype=torch.bool, device=x.device)
    system = erase.to(acc).transpose(1, 2)[..., None] * overlap.gather(3, among).masked_fill(~(new & ~eye)[:, None], 0)
    update = torch.linalg.solve_triangular(system, right.transpose(1, 2), upper=False, unitriangular=True)  # [B, H, T, P]
    y = _read(scores, old, held, queries, enter, state).transpose(1, 2)
    y = y + torch.matmul(scores.gather(3, among).masked_fill(~new[:, None], 0), update)
    return y.transpose(1, 2).to(x.dtype), update.transpose(1, 2)


def _products(queries: Tensor, near: Tensor, keys: Tensor, a: Tensor, path: Tensor, here: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decayed products of the tokens' queries and keys with all keys [B, H, T, S], and decays from the state [B, T, H, 1 or N].

    Between tokens of which one does not see the other they are meaningless, but finite.
    """
    acc = keys.dtype
    lowest = lowest_exponent(acc)
    steps = a.double().clamp_min(2 * lowest)
    sums = torch.matmul(path.to(steps.dtype), steps.flatten(2)).view_as(steps)  # [B, S, H, ...]
    rows = torch.arange(len(steps), device=a.device)[:, None]
    total = sums[rows, here]  # [B, T, H, ...]
    enter = total.clamp_min(lowest).exp().to(acc)
    gap = (total[:, :, None] - sums[:, None]).clamp(lowest, 0).exp().to(acc)  # [B, T, S, H, ...]
    if a.ndim == 3:
        gap = gap.permute(0, 3, 1, 2)  # [B, H, T, S]
        scores, overlap = (torch.einsum("bthn,bshn->bhts", t, keys).mul_(gap) for t in (queries, near))
        return scores, overlap, enter[..., None]
    scores, overlap = (torch.einsum("bthn,bshn,btshn->bhts", t, keys, gap) for t in (queries, near))
    return scores, overlap, enter


def _read(scores: Tensor, old: Tensor, held: Tensor, probes: Tensor, enter: Tensor, state: Tensor | None) -> Tensor:
    """What stands under the probes [B, T, H, N] before the tokens: [B, T, H, P]."""
    y = torch.matmul(scores.masked_fill(~old[:, None], 0), held.transpose(1, 2)).transpose(1, 2)
    if state is None:
        return y
    return y + torch.matmul((probes * enter).transpose(1, 2), state.to(y.dtype).mT).transpose(1, 2)


def fold(u: Tensor, a: Tensor, b: Tensor, state: Tensor | None) -> Tensor:
    """The state behind updates; arguments as in `delta_fold`."""
    H, acc = u.shape[2], accumulator(u.dtype)
    lowest = lowest_exponent(acc)
    steps = (a if a.ndim == 4 else a[..., None]).double().clamp_min(2 * lowest)  # [B, S, H, N or 1]
    sums = steps.cumsum(1)
    leave = (sums[:, -1:] - sums).clamp(lowest, 0).exp().to(acc)
    keys = b.to(acc).repeat_interleave(H // b.shape[2], 2) * leave
    new = torch.einsum("bshp,bshn->bhpn", u.to(acc), keys)
    return new if state is None else new.addcmul_(state.to(acc), sums[:, -1].clamp_min(lowest).exp().to(acc)[:, :, None])
