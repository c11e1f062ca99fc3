"""What masks, positions and lengths say to a recurrent layer: which tokens are real, and which document each belongs to.

While a graph is traced no value is looked at: nothing is left out as trivial, and what cannot be obeyed is refused when the graph runs.
Shapes: B batch, T time of this call, S tokens of the past, H heads.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.functional import pad

HIDDEN = -1e4  # what is added to hidden scores is at most this


class Said(NamedTuple):
    """True = real [B, T], or None where all are; and document numbers [B, T] counted from 0, or None where there is one."""

    mask: Tensor | None
    documents: Tensor | None


def said(
    attention_mask: Any, position_ids: Tensor | None, seq_idx: Tensor | None, lengths: Tensor | None, rows: int, tokens: int, seen: int
) -> Said:
    """What the arguments of a call of `rows` x `tokens` tokens behind `seen` others say to recurrent layers.

    `attention_mask`: [B, S + T] (or [B, T]) with 0 at padding, or [B, 1 or H, T, S + T or more], bool or added to the scores. `lengths`:
    cu_seq_lens [documents + 1] of one packed row. Documents come from a 4-D mask, else from seq_idx, else from `lengths`, else from
    `position_ids` that restart.
    Raises ValueError for a mask of another kind or shape, and for a 4-D one that says more than padding and documents.
    """
    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        raise ValueError(f"recurrent layers need an attention_mask with 2 or 4 dimensions; got {type(attention_mask).__name__}")
    if attention_mask is not None and attention_mask.ndim == 4:
        return _of_four(attention_mask, rows, tokens, seen)
    if attention_mask is not None and (attention_mask.ndim != 2 or attention_mask.shape[1] < tokens):
        raise ValueError(f"attention_mask must be [B, tokens so far] or have 4 dimensions; got shape {list(attention_mask.shape)}")
    mask = padding_mask(attention_mask, tokens)
    if seq_idx is None and lengths is not None:
        seq_idx = _of_lengths(lengths, rows, tokens)
    return Said(mask, document_numbers(seq_idx, position_ids, mask) if tokens > 1 else None)


def padding_mask(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """True = real [B, T] for the last `length` tokens of a mask [B, S + T], or None where nothing is padded."""
    if attention_mask is None:
        return None
    mask = attention_mask[:, -length:].bool()
    return None if not is_compiling() and bool(mask.all()) else mask


def document_numbers(seq_idx: Tensor | None, position_ids: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Document number of each token [B, T], counted from 0, or None where there is one document.

    `seq_idx` [B, T] labels documents directly. Otherwise a document starts where `position_ids` [B, T] does not go on rising
    over real tokens; padded positions (`mask` [B, T] False) say nothing.
    """
    if seq_idx is not None:
        starts = seq_idx[:, 1:] != seq_idx[:, :-1]
    elif position_ids is not None:
        real = torch.ones_like(position_ids, dtype=torch.bool) if mask is None else mask.expand(position_ids.shape)
        last = torch.where(real, position_ids, -1).cummax(1).values if mask is not None else position_ids
        starts = real[:, 1:] & (position_ids[:, 1:] <= last[:, :-1])
        if mask is not None and (is_compiling() or bool(starts.any())):
            starts = _restarts(position_ids, real)
    else:
        return None
    return _numbered(starts)


def _numbered(starts: Tensor) -> Tensor | None:
    """Document numbers [B, T] from which tokens but the first start one [B, T - 1]."""
    if not is_compiling() and not bool(starts.any()):
        return None
    return pad(starts, (1, 0)).cumsum(1)


def _restarts(position_ids: Tensor, real: Tensor) -> Tensor:
    """True [B, T - 1] at real tokens whose position does not exceed that of the real token before."""
    previous = _previous(real)
    before = position_ids.gather(1, previous.clamp_min(0))
    return real[:, 1:] & (previous >= 0) & (position_ids[:, 1:] <= before)


def _previous(real: Tensor) -> Tensor:
    """Index of the last real token before each token but the first [B, T - 1], -1 where there is none."""
    index = torch.arange(real.shape[1], device=real.device)
    return torch.where(real, index, -1).cummax(1).values[:, :-1]


def _of_lengths(lengths: Tensor, rows: int, tokens: int) -> Tensor:
    """Document numbers [1, T] of one packed row from where its documents end, [0, ..., T]."""
    rises = lengths.ndim == 1 and len(lengths) > 1
    if rises and not is_compiling():
        rises = bool((lengths[1:] > lengths[:-1]).all()) and lengths[0].item() == 0 and lengths[-1].item() == tokens
    if rows != 1 or not rises:
        raise ValueError(
            f"cu_seq_lens must rise from 0 to the {tokens} tokens of one packed row; got {lengths.tolist() if not is_compiling() else ''} "
            f"for {rows} rows; pass position_ids that restart, or seq_idx"
        )
    return torch.searchsorted(lengths[1:].contiguous(), torch.arange(tokens, device=lengths.device), right=True)[None]


def _of_four(attention_mask: Tensor, rows: int, tokens: int, seen: int) -> Said:
    """Padding and documents of a mask [B, 1 or H, T, S + T or more]."""
    if attention_mask.shape[2] != tokens or attention_mask.shape[3] < seen + tokens:
        raise ValueError(
            f"a 4-D attention_mask must be [B, 1, {tokens}, {seen + tokens}] for {tokens} tokens behind {seen}; got "
            f"{list(attention_mask.shape)}"
        )
    sees = _seen(attention_mask)[:, 0].expand(rows, -1, -1)  # [B, T, S + T or more]
    _refuse(sees[:, :, seen + tokens :], "it shows tokens that are not there yet")
    past, own = sees[:, :, :seen], sees[:, :, seen : seen + tokens]
    opened = own.all(-1) & (torch.arange(tokens, device=own.device) < tokens - 1)
    real = (own & ~opened[..., None]).any(1) & ~opened  # rows without anything to see are sometimes opened as a whole
    previous = _previous(real)
    before = own[:, 1:].gather(2, previous.clamp_min(0)[..., None])[..., 0]  # [B, T - 1] whether a token sees the real one before it
    starts = real[:, 1:] & (previous >= 0) & ~before
    documents = pad(starts, (1, 0)).cumsum(1)
    can = (documents[:, :, None] == documents[:, None]) & real[:, None] & torch.ones_like(own[0]).tril()
    _refuse((own != can) & real[..., None], "it says more than padding and documents in a row")
    _refuse(~past & real[..., None], "it hides tokens that the cache has read; pass a 2-D mask with a cache")
    if is_compiling():
        return Said(real, documents)
    return Said(None if bool(real.all()) else real, documents if bool(starts.any()) else None)


def _seen(mask: Tensor) -> Tensor:
    """Which scores a mask [B, 1 or H, T, S] leaves as they are, [B, 1, T, S] bool."""
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"a 4-D attention_mask must be bool, or numbers that are added to the scores; got {mask.dtype}")
    sees = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool:
        _refuse((mask != 0) & (mask > HIDDEN), "it adds biases")
    _refuse(sees != sees[:, :1], "it differs between heads")
    return sees[:, :1]


def _refuse(wrong: Tensor, why: str) -> None:
    """Raise ValueError (RuntimeError out of a traced graph) where any of `wrong` [B, ...] is True."""
    sentence = f"recurrent layers cannot obey this 4-D attention_mask: {why}"
    if is_compiling():
        torch._assert_async(~wrong.any(), sentence)
    elif bool(wrong.any()):
        place = wrong.nonzero()[0].tolist()
        raise ValueError(f"{sentence} (row {place[0]}, token {place[-2]})")
