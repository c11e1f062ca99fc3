"""SSD by other packages' kernels, which run where they are asked for.

Shapes: B batch, T time, H query heads, G key/value heads, P head width, N state width, S documents of all rows.
"""

import torch
from torch import Tensor

from ..choice import Obstacle, load
from ..common import document_before


def obstacles(x: Tensor, a: Tensor, b: Tensor) -> dict[str, Obstacle]:
    """Why each package cannot take these arguments of `ssd`, None where it can."""
    odd = x.element_size() == 2 and (x.shape[-1] % 2 or b.shape[-1] % 2)
    rates = "mamba-ssm takes one rate a head, a [H] with the log decay a dt; got a log decay of its own for every token, a [B, T, H]"
    return {
        "mamba_ssm": None if a.ndim == 1 else rates,
        "fla": f"in 16 bit it takes even P and N, got P = {x.shape[-1]} and N = {b.shape[-1]}" if odd else None,
    }


def by_mamba_ssm(
    x: Tensor, rate: Tensor, b: Tensor, c: Tensor, dt: Tensor, D: Tensor | None, state: Tensor | None, docs: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """`mamba_chunk_scan_combined`, whose every head has x and every group b and c: both are repeated for all query heads.

    rate [H], at most 0; the rest as in `ssd`, with dt = 0 at masked tokens; docs [B, T].
    """
    scan = load("ssd", "mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")
    values, keys = for_every_head(x, c.shape[2]), for_every_head(b.to(x.dtype), c.shape[2])
    seq_idx = None if docs is None else docs.to(torch.int32).contiguous()
    return scan(
        values, dt, rate, keys, c.to(x.dtype), _power_of_2(chunk), D=D, initial_states=state, seq_idx=seq_idx, return_final_states=True
    )


def by_fla(
    x: Tensor, a: Tensor, b: Tensor, c: Tensor, dt: Tensor | None, D: Tensor | None, state: Tensor | None, docs: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """`chunk_simple_gla` with queries c, keys b, values dt x, gates a and scale 1; its states are [N, P]. Arguments as in `by_mamba_ssm`.

    Its rows are whole sequences: documents are laid end to end in one row, and `state` goes to those of number 0 that begin a row.
    """
    run = load("ssd", "fla.ops.simple_gla", "chunk_simple_gla")
    (B, T, H, _), P = c.shape, x.shape[3]
    values, keys = for_every_head(x, H), for_every_head(b.to(x.dtype), H)
    write = values if dt is None else (values * dt[..., None]).to(x.dtype)
    inputs, first, named = [c.to(x.dtype), keys, write], None if state is None else state.transpose(2, 3), {}
    if docs is not None:
        places, final = sequences(docs)  # [S] among the B T tokens, [B] among the S sequences
        named["cu_seqlens"] = torch.nn.functional.pad(places, (0, 1), value=B * T)
        inputs, a = [t.reshape(1, B * T, H, -1) for t in inputs], a.reshape(1, B * T, H)
        if first is not None:
            other = (places % T != 0) | (docs.flatten()[places] != 0)
            first = first[places // T].masked_fill(other[:, None, None, None], 0)
    first = None if first is None else first.contiguous()
    y, last = run(*inputs, g=a, scale=1.0, initial_state=first, output_final_state=True, chunk_size=_power_of_2(chunk), **named)
    y, last = y.view(B, T, H, P), (last if docs is None else last[final]).transpose(2, 3)
    return (y if D is None else torch.addcmul(y, values, D[:, None])).to(x.dtype), last


def for_every_head(shared: Tensor, H: int) -> Tensor:
    """[B, T, G, ...] -> [B, T, H, ...]."""
    return shared if shared.shape[2] == H else shared.repeat_interleave(H // shared.shape[2], 2)


def _power_of_2(chunk: int) -> int:
    return 1 << (max(chunk, 16) - 1).bit_length()


def sequences(docs: Tensor) -> tuple[Tensor, Tensor]:
    """First tokens [S] of all documents among the B T tokens, and the last document of each row [B] among them; waits for the device."""
    new = docs != document_before(docs)
    new[:, 0] = True
    return new.flatten().nonzero().squeeze(1), new.sum(1).cumsum(0) - 1
