"""The causal convolution as W shifted multiply-adds over blocks of tokens, with a hand-written gradient.

A block fits the cache, so the memory is read and written once; the input of SiLU is computed again for the gradient.
Shapes: B batch, T time, C channels, W conv width, L tokens of a block.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common import accumulator, traced

BLOCK_NUMBERS = {"cpu": 1 << 17}  # numbers in a block, by kind of device
BLOCK_NUMBERS_ELSEWHERE = 1 << 26


def shifted(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, state: Tensor, docs: Tensor | None) -> Tensor:
    """`causal_conv1d` where every token is real; shapes as there, y [B, T, C] alone."""
    if docs is not None:
        docs = torch.nn.functional.pad(docs, (state.shape[1], 0))  # [B, W - 1 + T]
    if traced(x.shape[1]):
        w, offset = _parameters(x, weight, bias)
        out = _convolve(_shifts(x, state, docs, 0, x.shape[1]), w, offset)
        return (out if activation is None else torch.nn.functional.silu(out)).to(x.dtype)
    return _Shifted.apply(x, weight, bias, state, docs, activation == "silu")


def _blocks(x: Tensor) -> Iterator[tuple[int, int]]:
    """First and last + 1 token of each block."""
    B, T, C = x.shape
    size = max(16, BLOCK_NUMBERS.get(x.device.type, BLOCK_NUMBERS_ELSEWHERE) // (B * C))
    return ((start, min(start + size, T)) for start in range(0, T, size))


def _shifts(x: Tensor, state: Tensor, docs: Tensor | None, start: int, stop: int) -> list[Tensor]:
    """What each of the W taps sees at tokens start to stop, [B, L, C] each, in the accumulation format."""
    kept, size = state.shape[1], stop - start
    row = torch.cat([state[:, start:], x[:, max(0, start - kept) : stop]], 1) if start < kept else x[:, start - kept : stop]
    row = row.to(accumulator(x.dtype))
    taps = [row[:, k : k + size] for k in range(kept + 1)]
    if docs is None:
        return taps
    return [tap * same for tap, same in zip(taps, _same(docs, kept, start, stop), strict=True)]


def _same(docs: Tensor, kept: int, start: int, stop: int) -> list[Tensor]:
    """Whether each of the W taps stays inside the document of its token, [B, L, 1] bool each."""
    here = docs[:, start + kept : stop + kept]
    return [(docs[:, start + k : stop + k] == here)[..., None] for k in range(kept + 1)]


def _convolve(taps: list[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    """Sum of taps [B, L, C] times weight [W, C], plus bias [C]."""
    out = taps[0] * weight[0] if bias is None else torch.addcmul(bias, taps[0], weight[0])
    for tap, w in zip(taps[1:], weight[1:], strict=True):
        out.addcmul_(tap, w)
    return out


class _Shifted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, docs: Tensor | None, silu: bool) -> Tensor:
        ctx.save_for_backward(x, weight, bias, state, docs)
        ctx.silu = silu
        w, offset = _parameters(x, weight, bias)
        y = torch.empty_like(x)
        for start, stop in _blocks(x):
            out = _convolve(_shifts(x, state, docs, start, stop), w, offset)
            y[:, start:stop] = torch.nn.functional.silu(out, inplace=True) if silu else out
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, state, docs = ctx.saved_tensors
        kept, (w, offset) = state.shape[1], _parameters(x, weight, bias)
        dw, dbias = torch.zeros_like(w), torch.zeros_like(w[0])
        drow = w.new_zeros(x.shape[0], kept + x.shape[1], x.shape[2])  # [B, W - 1 + T, C]
        for start, stop in _blocks(x):
            taps = _shifts(x, state, docs, start, stop)
            dz = dy[:, start:stop].to(w.dtype)
            if ctx.silu:
                dz = torch.ops.aten.silu_backward(dz, _convolve(taps, w, offset))
            dbias += dz.sum((0, 1))
            dw += torch.stack([(dz * tap).sum((0, 1)) for tap in taps])
            for k in range(kept + 1):
                reached = dz if docs is None else dz * _same(docs, kept, start, stop)[k]
                drow[:, start + k : stop + k].addcmul_(reached, w[k])
        dx, dstate = drow[:, kept:].to(x.dtype), drow[:, :kept].to(state.dtype)
        return dx, dw.t().to(weight.dtype), None if bias is None else dbias.to(bias.dtype), dstate, None, None


def _parameters(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """weight as [W, C] and bias in the accumulation format of x."""
    acc = accumulator(x.dtype)
    return weight.to(acc).t().contiguous(), None if bias is None else bias.to(acc)
