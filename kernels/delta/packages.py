"""The delta rule by flash-linear-attention, which runs where it is asked for.

Shapes: B batch, T time, H query heads, G key/value heads, P head width, N state width, S documents of all rows.
"""

from typing import Any

import torch
from torch import Tensor

from ..choice import Obstacle, load
from ..ssd.packages import for_every_head, sequences

LEAST_ERASE = 1e-6  # its one gate is ours to erase; what is written is divided by it


def obstacles(x: Tensor, b: Tensor) -> dict[str, Obstacle]:
    """Why the package cannot take these arguments of `delta_rule`, None where it can."""
    odd = x.element_size() == 2 and (x.shape[-1] % 2 or b.shape[-1] % 2)
    return {"fla": f"in 16 bit it takes even P and N, got P = {x.shape[-1]} and N = {b.shape[-1]}" if odd else None}


def by_fla(
    x: Tensor, a: Tensor, b: Tensor, c: Tensor, erase: Tensor, write: Tensor | None, state: Tensor | None, docs: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """`chunk_gated_delta_rule`, or `chunk_kda` for decays per channel: S <- S' + beta (v - S' k) k^T, with states [N, P].

    beta is `erase`, and v is write x / erase, so that the gradient of `erase` is a difference of larger numbers. Its rows are whole
    sequences: documents are laid end to end in one row, and `state` goes to those of number 0 that begin a row. Arguments as in
    `delta_rule`, with a = erase = write = 0 at masked tokens.
    """
    name = "gated_delta_rule" if a.ndim == 3 else "kda"
    run = load("delta_rule", f"fla.ops.{name}", f"chunk_{name}")
    (B, T, H, _), P = c.shape, x.shape[3]
    write = torch.ones_like(erase) if write is None else write
    beta = torch.where((erase == 0) & (write == 0), erase, erase.clamp_min(LEAST_ERASE))
    share = torch.where(beta == 0, beta, write / beta.clamp_min(LEAST_ERASE))
    values = (for_every_head(x, H) * share[..., None]).to(x.dtype)
    inputs = [c.to(x.dtype), for_every_head(b.to(x.dtype), H), values, a, beta]
    first, named = None if state is None else state.transpose(2, 3), dict[str, Any]()
    if docs is not None:
        places, final = sequences(docs)  # [S] among the B T tokens, [B] among the S sequences
        named["cu_seqlens"] = torch.nn.functional.pad(places, (0, 1), value=B * T)
        inputs = [t.reshape(1, B * T, *t.shape[2:]) for t in inputs]
        if first is not None:
            other = (places % T != 0) | (docs.flatten()[places] != 0)
            first = first[places // T].masked_fill(other[:, None, None, None], 0)
    q, k, v, g, beta = inputs
    first = None if first is None else first.contiguous()
    y, last = run(q=q, k=k, v=v, g=g, beta=beta, scale=1.0, initial_state=first, output_final_state=True, **named)
    return y.view(B, T, H, P).to(x.dtype), (last if docs is None else last[final]).transpose(2, 3)
