"""What a layer remembers between the rounds of decoding, and the cursors that say where each row stands.

Shapes as in `kernels.decode` and, for Mamba-1, in `kernels.decode.mamba1`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..common import check_shape


class Buffers(NamedTuple):
    """What one layer remembers; behind the bar, Mamba-1's."""

    state: Tensor  # [B, H, P, N] at position `folded`, at least fp32 | [B, C, N]
    raw: Tensor  # [B, R, C] | [B, R, X]
    x: Tensor  # [B, L, G, P] behind the convolution | [B, L, X]
    b: Tensor  # [B, L, G, N] behind the convolution | [B, L, G P] before the GQA repeat
    dt: Tensor  # [B, L, H] before bias and softplus | [B, L, C]


class Cursors(NamedTuple):
    """Positions of each row, [B] integers on the device, the same for every layer."""

    length: Tensor  # tokens that are kept
    folded: Tensor  # tokens in `state`
    new: Tensor  # of the T tokens of this round, how many are real
    fold_to: Tensor  # where this round writes the state: up to length + new; nothing is written unless it is behind `folded`


def cursors(B: int, device: torch.device | str) -> Cursors:
    """Cursors before the first token."""
    return Cursors(*torch.zeros(4, B, dtype=torch.int32, device=device).unbind())


def plan(at: Cursors, new: Tensor, rounds: int, slots: int, keep: bool) -> None:
    """Set the cursors for a round of new[b] <= `rounds` tokens; only device work, which a CUDA graph can hold.

    keep: the new tokens stay, so the state is written behind them. Else it is written, at `length`, only where the kept inputs would not
    leave room for this round and the next in `slots`.
    """
    at.new.copy_(new)
    if keep:
        at.fold_to.copy_(at.length + new)
    else:
        at.fold_to.copy_(torch.where(at.length - at.folded + 2 * rounds > slots, at.length, at.folded))


def commit(at: Cursors, kept: Tensor) -> None:
    """Keep the first kept[b] <= new[b] tokens of the round; only device work."""
    at.folded.copy_(torch.maximum(at.folded, at.fold_to))
    at.length.add_(kept)


def check_room(held: Buffers, at: Cursors, T: int, W: int) -> None:
    """Raise `ValueError` unless the cursors fit the rows of `held`, and its slots a round of T tokens with convolutions of width W."""
    for name, cursor in at._asdict().items():
        check_shape(name, cursor, len(held.state))
    R, L = held.raw.shape[1], held.x.shape[1]
    if R < W - 1 + T or L < 2 * T:
        raise ValueError(f"{T} tokens need W - 1 + T = {W - 1 + T} raw slots and 2 T = {2 * T} slots; got {R} and {L}")


def power_of_2(least: int) -> int:
    """The smallest power of 2 that is at least `least`."""
    return 1 << (least - 1).bit_length()
