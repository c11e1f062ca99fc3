"""Tokens of a mixer between its projections, one launch for one token or for the few of a speculative round.

A round advances the state over the tokens that were kept since it was written, evaluates T new ones, and writes no state between
them (Mamba-in-Llama, arXiv 2408.15237, Algorithm 2). The numbers of tokens are integers on the device: one kernel, and one CUDA graph,
serve every round, and T = 1 does bit for bit what T > 1 does. Taking tokens back is arithmetic on the cursors. The dual form evaluates the
T tokens in matrix products instead of one after another, and takes trees (arXiv 2405.21060; STree, arXiv 2505.14969).
Shapes: B batch, T time, H query heads, G key/value heads, P head width, N state width, W conv width, C = G P + G N + H N channels,
L slots of kept inputs, R slots of raw convolution inputs. The token at position p stands in slot p mod L, or p mod R.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..choice import Obstacle, choose
from ..common import check_positive, check_rank, check_shape
from .dual import Branches, dual_in_torch, keep_paths
from .mamba1 import Mamba1Weights, mamba1_buffers, mamba1_steps
from .reference import steps_in_torch
from .rounds import Buffers, Cursors, check_room, commit, cursors, plan, power_of_2

__all__ = [
    "Branches", "Buffers", "Cursors", "Mamba1Weights", "Weights", "buffers", "commit", "cursors", "keep_paths", "mamba1_buffers",
    "mamba1_steps", "mamba2_steps", "plan",
]  # fmt: skip

TRITON_WIDEST = 128  # entries of P and of N that a program holds


class Weights(NamedTuple):
    """The parameters of a mixer between its projections."""

    conv: Tensor  # [C, W]
    conv_bias: Tensor | None  # [C]
    dt_bias: Tensor  # [H]
    A_log: Tensor | None  # [H]; None: discrete Mamba-2, decay exp(-softplus(dt + dt_bias)) and writes that are not scaled
    D: Tensor  # [H]
    norm: Tensor | None  # [H P], RMSNorm over each head behind the gate; None: the gate alone
    eps: float = 1e-5
    silu: bool = True  # behind the convolution


def buffers(B: int, H: int, G: int, P: int, N: int, W: int, rounds: int, dtype: torch.dtype, device: torch.device | str) -> Buffers:
    """Empty buffers for rounds of up to `rounds` tokens in the model's `dtype`; the slot counts are powers of 2."""
    slots, wide = power_of_2(4 * rounds), torch.promote_types(dtype, torch.float32)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(B, *shape, dtype=dtype, device=device)

    raw, state = zeros(power_of_2(W - 1 + rounds), G * P + G * N + H * N), torch.zeros(B, H, P, N, dtype=wide, device=device)
    return Buffers(state, raw, zeros(slots, G, P), zeros(slots, G, N), zeros(slots, H))


def mamba2_steps(
    zxbcdt: Tensor,
    weights: Weights,
    held: Buffers,
    at: Cursors,
    impl: str = "auto",
    form: str = "recurrent",
    branches: Branches | None = None,
    angles: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Evaluate at.new[b] of the T tokens zxbcdt [B, T, H P + C + H], rows z | x | B | C | dt as in_proj leaves them.

    form: "recurrent" reads the tokens one after another, which suits few rows; "dual" takes them together in matrix products of at least
    16 rows, for large batches; which is faster where has not been measured on a GPU, and compiled for more than 16 tokens "dual" spills
    registers. `branches`, with "dual" alone: the tokens are a tree, and the state is written nowhere behind the kept ones (`plan` without
    `keep`).
    `angles`, in the recurrent form alone: cosines and sines [B, T, Q] by which the first Q <= N coordinates of b and c are turned, behind
    the convolution and halves as in Llama.
    Changes the slots of the new tokens, and the state of rows whose `fold_to` is behind `folded`; the cursors stay (`commit`).
    Returns what out_proj takes, [B, T, H P] in the dtype of zxbcdt, 0 from new[b] on.
    Raises `ValueError` for shapes that do not fit, for too few slots, for a tree in the recurrent form, and for a `form` or an `impl` that
    is unknown or cannot run here.
    """
    _check(zxbcdt, weights, held, at)
    _check_form(zxbcdt.shape[1], weights.conv.shape[1], form, branches)
    if angles is not None:
        if form == "dual":
            raise ValueError('angles need form="recurrent": the dual form does not turn heads')
        for name, part in zip(("cosines", "sines"), angles, strict=True):
            check_shape(name, part, *zxbcdt.shape[:2], angles[0].shape[-1])
    chosen = choose("decode", impl, ("torch", "triton"), zxbcdt, _obstacle(held))
    if form == "dual":
        if chosen == "torch":
            return dual_in_torch(zxbcdt, weights, held, at, branches)
        from .triton_dual import fused_dual

        return fused_dual(zxbcdt, weights, held, at, branches)
    if chosen == "triton":
        from .triton_op import fused

        return fused(zxbcdt, weights, held, at, angles)
    return steps_in_torch(zxbcdt, weights, held, at, angles)


def _obstacle(held: Buffers) -> Obstacle:
    widest = max(held.state.shape[2:])
    return f"its kernel holds P and N up to {TRITON_WIDEST}, got {widest}" if widest > TRITON_WIDEST else None


def _check_form(T: int, W: int, form: str, branches: Branches | None) -> None:
    if form not in ("recurrent", "dual"):
        raise ValueError(f'form must be "recurrent" or "dual", got {form!r}')
    if branches is None:
        return
    if form == "recurrent":
        raise ValueError('a tree needs form="dual": the recurrent form reads a chain')
    check_shape("branches.ancestors", branches.ancestors, T, T)
    check_shape("branches.windows", branches.windows, T, W)


def _check(zxbcdt: Tensor, weights: Weights, held: Buffers, at: Cursors) -> None:
    check_rank("zxbcdt", zxbcdt, "BTE")
    (B, H, P, N), (_, L, G, _), T = held.state.shape, held.x.shape, zxbcdt.shape[1]
    check_positive("T", T)
    C, R, W = G * P + G * N + H * N, held.raw.shape[1], weights.conv.shape[1]
    shapes: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "zxbcdt": (zxbcdt, (B, T, H * P + C + H)), "conv": (weights.conv, (C, W)), "conv_bias": (weights.conv_bias, (C,)),
        "dt_bias": (weights.dt_bias, (H,)), "A_log": (weights.A_log, (H,)), "D": (weights.D, (H,)), "norm": (weights.norm, (H * P,)),
        "raw": (held.raw, (B, R, C)), "x": (held.x, (B, L, G, P)), "b": (held.b, (B, L, G, N)), "dt": (held.dt, (B, L, H)),
    }  # fmt: skip
    for name, (tensor, shape) in shapes.items():
        check_shape(name, tensor, *shape)
    check_room(held, at, T, W)
