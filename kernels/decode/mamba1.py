"""Tokens of a Mamba-1 mixer between its projections: one launch, behind the product of matrices that makes the steps.

The steps come from rows of in_proj through dt_proj, which stands beside the convolution and not behind it; so it can go first.
Shapes: B batch, T time, C = H P channels, G P channels of B (and of x) before the GQA repeat, X channels of the convolution: G P, or C
where it stands behind the repeat, N state width, W conv width, L slots of kept inputs, R slots of raw convolution inputs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..choice import Obstacle, choose
from ..common import check_positive, check_rank, check_shape
from .reference_mamba1 import mamba1_in_torch
from .rounds import Buffers, Cursors, check_room, power_of_2

TRITON_WIDEST = 256  # entries of N that a program holds


class Mamba1Weights(NamedTuple):
    """The parameters of a mixer between its projections."""

    conv: Tensor  # [X, W]
    conv_bias: Tensor | None  # [X]
    dt_bias: Tensor  # [C]
    A_log: Tensor  # [C, N]
    D: Tensor  # [C]
    block: int  # channels that the GQA repeat takes together: P, or N in published weights
    silu: bool = True  # behind the convolution


def mamba1_buffers(
    B: int, C: int, shared: int, X: int, N: int, W: int, rounds: int, dtype: torch.dtype, device: torch.device | str
) -> Buffers:
    """Empty buffers as `buffers` makes them, for shared = G P channels of B."""
    slots, raw = power_of_2(4 * rounds), torch.zeros(B, power_of_2(W - 1 + rounds), X, dtype=dtype, device=device)
    state = torch.zeros(B, C, N, dtype=torch.promote_types(dtype, torch.float32), device=device)
    return Buffers(state, raw, *(torch.zeros(B, slots, width, dtype=dtype, device=device) for width in (X, shared, C)))


def mamba1_steps(zxbc: Tensor, dt: Tensor, weights: Mamba1Weights, held: Buffers, at: Cursors, impl: str = "auto") -> Tensor:
    """Evaluate at.new[b] of the T tokens zxbc [B, T, C + X + G P + C or more], rows z | x | B | C as in_proj leaves them.

    What stands behind them, the low-rank steps, is not read: dt [B, T, C] is what dt_proj made of it, before bias and softplus. Where
    the convolution stands behind the GQA repeat, x comes repeated; B never does.
    Changes the slots of the new tokens, and the state of rows whose `fold_to` is behind `folded`; the cursors stay (`commit`).
    Returns what out_proj takes, [B, T, C] in the dtype of zxbc, 0 from new[b] on.
    Raises `ValueError` for shapes that do not fit, for too few slots, and for an `impl` that is unknown or cannot run here.
    """
    _check(zxbc, dt, weights, held, at)
    if choose("decode", impl, ("torch", "triton"), zxbc, _obstacle(held)) == "triton":
        from .triton_op import fused_mamba1

        return fused_mamba1(zxbc, dt, weights, held, at)
    return mamba1_in_torch(zxbc, dt, weights, held, at)


def _obstacle(held: Buffers) -> Obstacle:
    N = held.state.shape[2]
    return f"its kernel holds N up to {TRITON_WIDEST}, got {N}" if N > TRITON_WIDEST else None


def _check(zxbc: Tensor, dt: Tensor, weights: Mamba1Weights, held: Buffers, at: Cursors) -> None:
    check_rank("zxbc", zxbc, "BTE")
    (B, C, N), (_, L, shared), (X, W), T = held.state.shape, held.b.shape, weights.conv.shape, zxbc.shape[1]
    check_positive("T", T)
    if C % N or C % shared or shared % weights.block or X not in (shared, C):
        raise ValueError(
            f"C must be a multiple of N and of G P, G P of the block, and X one of C and G P; got C = {C}, N = {N}, G P = {shared}, "
            f"block = {weights.block}, X = {X}"
        )
    shapes: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "zxbc": (zxbc, (B, T, max(zxbc.shape[2], 2 * C + X + shared))), "dt of the tokens": (dt, (B, T, C)),
        "conv_bias": (weights.conv_bias, (X,)), "dt_bias": (weights.dt_bias, (C,)), "A_log": (weights.A_log, (C, N)),
        "D": (weights.D, (C,)), "raw": (held.raw, (B, held.raw.shape[1], X)), "x": (held.x, (B, L, X)), "b": (held.b, (B, L, shared)),
        "dt": (held.dt, (B, L, C)),
    }  # fmt: skip
    for name, (tensor, shape) in shapes.items():
        check_shape(name, tensor, *shape)
    check_room(held, at, T, W)
