"""One block of chunks of the chunked SSD: its layout and its forward pass.

Shapes: B batch, T time, K chunks, Q tokens of a chunk, H query heads, G key/value heads, R = H // G, P head width, N state
width; Z = K * B * G, the batch of the grouped matrix products.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..common import accumulator
from .decay import Decay, decays


class Inputs(NamedTuple):
    """The arguments of `ssd`; docs has absent tokens filled in, before is the document of the state before each token."""

    x: Tensor  # [B, T, G, P]
    a: Tensor  # [B, T, H]
    b: Tensor  # [B, T, G, N]
    c: Tensor  # [B, T, H, N]
    dt: Tensor | None  # [B, T, H]
    D: Tensor | None  # [H]
    docs: Tensor | None  # [B, T]
    before: Tensor | None  # [B, T]


class Span(NamedTuple):
    """The tokens of one block: `chunks` chunks of `size` tokens from `start` on."""

    start: int
    chunks: int
    size: int

    def view(self, tensor: Tensor) -> Tensor:
        """The tokens of [B, T, ...] as [K, B, Q, ...]."""
        tokens = tensor[:, self.start : self.start + self.chunks * self.size]
        return tokens.view(len(tokens), self.chunks, self.size, *tokens.shape[2:]).transpose(0, 1)


class Block(NamedTuple):
    """The inputs of one block, each chunk and head a contiguous matrix in the accumulation format."""

    x: Tensor  # [K, B, G, Q, P]
    b: Tensor  # [K, B, G, Q, N]
    c: Tensor  # [K, B, H, Q, N]
    dt: Tensor | None  # [K, B, H, Q]
    decay: Decay

    @property
    def strength(self) -> Tensor:
        """The weight [K, B, H, Q] with which a token reaches the state after its chunk."""
        return self.decay.leave if self.dt is None else self.decay.leave * self.dt


def heads_first(tensor: Tensor, span: Span) -> Tensor:
    """Copy the tokens of [B, T, heads, ...] to [K, B, heads, Q, ...] in the accumulation format."""
    view = span.view(tensor).transpose(2, 3)
    return torch.empty(view.shape, dtype=accumulator(tensor.dtype), device=tensor.device).copy_(view)


def tokens_first(block: Tensor, out: Tensor, span: Span) -> None:
    """Copy [K, B, heads, Q, ...] to its tokens of `out` [B, T, heads, ...]."""
    span.view(out).copy_(block.transpose(2, 3))


def cut(inputs: Inputs, span: Span) -> Block:
    """Lay out the tokens of `span` and work out their decays."""
    x, a, b, c = (heads_first(t, span) for t in inputs[:4])
    dt = None if inputs.dt is None else heads_first(inputs.dt, span)
    if inputs.docs is None or inputs.before is None:
        return Block(x, b, c, dt, decays(a, None, None))
    return Block(x, b, c, dt, decays(a, span.view(inputs.docs), span.view(inputs.before)[:, :, 0]))


def per_group(tensor: Tensor, G: int) -> Tensor:
    """View [K, B, H, Q, width] as the stacked queries [Z, R * Q, width] of each group."""
    K, B, H, Q, width = tensor.shape
    return tensor.view(K * B * G, H // G * Q, width)


def per_key(tensor: Tensor) -> Tensor:
    """View [K, B, G, Q, width] as [Z, Q, width]."""
    return tensor.flatten(0, 2)


def weighted_values(block: Block) -> Tensor:
    """The values, weighted for each query head by their strength in the state after the chunk: [Z, Q, R * P]."""
    G, Q, P = block.x.shape[2:]
    weight = block.strength.unflatten(2, (G, -1)).transpose(3, 4).contiguous()  # [K, B, G, Q, R]
    return (weight[..., None] * block.x[:, :, :, :, None]).reshape(-1, Q, weight.shape[-1] * P)


def carry(block: Block, values: Tensor, state: Tensor) -> Tensor:
    """The states before each chunk and after the last [K + 1, B, H, P, N], from `state` [B, H, P, N] before the first."""
    added = torch.bmm(values.transpose(1, 2), per_key(block.b)).view(len(block.x), *state.shape)
    states = torch.empty(len(added) + 1, *state.shape, dtype=added.dtype, device=added.device)
    states[0] = state
    across = block.decay.across[..., None, None]
    for k in range(len(added)):
        torch.mul(states[k], across[k], out=states[k + 1]).add_(added[k])
    return states


def scores(block: Block) -> Tensor:
    """The mixing matrices inside the chunks [K, B, H, Q, Q], without dt and D."""
    products = torch.bmm(per_group(block.c, block.x.shape[2]), per_key(block.b).transpose(1, 2))
    return products.view(block.decay.within.shape).mul_(block.decay.within)


def add_skip(mixing: Tensor, D: Tensor | None) -> Tensor:
    """Add D [H] to the diagonals of mixing [K, B, H, Q, Q], in place."""
    if D is not None:
        mixing.diagonal(dim1=-2, dim2=-1).add_(D.to(mixing.dtype)[:, None])
    return mixing


def block_forward(block: Block, D: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs [K, B, H, Q, P] of a block and the state [B, H, P, N] after it."""
    G = block.x.shape[2]
    states = carry(block, weighted_values(block), state)
    y = torch.matmul(block.c, states[:-1].transpose(-1, -2)).mul_(block.decay.enter[..., None])
    mixing = scores(block) if block.dt is None else scores(block).mul_(block.dt[..., None, :])
    per_group(y, G).baddbmm_(per_group(add_skip(mixing, D), G), per_key(block.x))
    return y, states[-1]
