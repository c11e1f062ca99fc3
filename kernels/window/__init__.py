"""Softmax attention to the last tokens and to the first ones: a window, and sinks at the start of each document; and what is out of sight.

Shapes: B batch, T time, H query heads, G key/value heads (head h reads group h // R, R = H // G), P head width, S tokens of the past.
Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023 (arXiv 2309.17453).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..choice import choose
from ..common import check_rank, check_shape, documents, no_autocast
from .blocked import blocked
from .gone import gone
from .reference import dense, dense_gone
from .rotation import turned, turned_each
from .sight import Held, Past, Rest, Sight, View, sees
from .slots import attend, attend_slots
from .steps import places_in, slot_of, steps_in_torch

__all__ = [
    "Held",
    "Past",
    "Rest",
    "Sight",
    "View",
    "attend",
    "attend_slots",
    "places_in",
    "sees",
    "slot_of",
    "turned",
    "turned_each",
    "window_attention",
    "window_rows",
    "window_steps",
    "window_view",
]

FORMS = ("torch", "sequential")


class _Packed(NamedTuple):
    """A row's real tokens brought to the front: where each came from [B, T], and which places hold one [B, T]."""

    order: Tensor
    real: Tensor

    def bring(self, values: Tensor) -> Tensor:
        """Values [B, T, ...] in that order."""
        return values.gather(1, self.order.view(*self.order.shape, *[1] * (values.ndim - 2)).expand_as(values))

    def back(self, values: Tensor) -> Tensor:
        """Values [B, T, ...] where they came from, 0 at absent tokens."""
        kept = values.masked_fill(~self.real.view(*self.real.shape, *[1] * (values.ndim - 2)), 0)
        order = self.order.argsort(1)
        return kept.gather(1, order.view(*order.shape, *[1] * (values.ndim - 2)).expand_as(kept))


def window_view(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sight: Sight,
    *,
    scale: float,
    seq_idx: Tensor | None = None,
    mask: Tensor | None = None,
    past: Past | None = None,
    impl: str = "auto",
) -> View:
    """softmax(scale q k) v over what `sight` lets each token see, in the dtype of q, and what it does not show: see `View`.

    q [B, T, H, P]; k and v [B, T, G, P]. seq_idx [B, T]: non-decreasing document numbers; a document sees itself alone and has sinks of
    its own. mask [B, T] bool, True for real tokens: the others are not seen, not counted, and their row of every part is 0.
    `past`: tokens before these, whose documents go on; not with seq_idx. impl: see `kernels.choice`; "torch" takes blocks of queries,
    O(T window), and "sequential" is the oracle, with one full mask.
    Raises `ValueError` for shapes that do not fit together and for an `impl` that is unknown or cannot run here.
    """
    form = choose("window", impl, FORMS, q)
    _check(q, k, v, seq_idx, mask, past)
    packed = None if mask is None else _packed(mask)
    docs = documents(seq_idx, mask)
    if packed is not None:
        q, k, v = map(packed.bring, (q, k, v))
        docs = None if docs is None else packed.bring(docs)
    start = None if docs is None else _starts(docs)
    with no_autocast(q):
        seen, lse = (dense if form == "sequential" else blocked)(q, k, v, sight, scale, start, past)
        far, more, mean = (dense_gone if form == "sequential" else gone)(v, sight, start, past)
    if packed is None:
        return View(seen, lse, far, more, mean)
    far, more = (packed.back(part.expand(seen.shape[:2])) for part in (far, more))
    return View(packed.back(seen), packed.back(lse), far, more, packed.back(mean))


def window_attention(q: Tensor, k: Tensor, v: Tensor, sight: Sight, **how: Any) -> Tensor:
    """What `window_view` sees [B, T, H, P]; arguments as there."""
    return window_view(q, k, v, sight, **how).seen


def window_steps(
    heads: Tensor,
    scores: Tensor,
    y: Tensor,
    rest: Rest,
    angles: tuple[Tensor, Tensor],
    held: Held,
    at: Any,
    sight: Sight,
    scale: float,
    impl: str = "auto",
) -> Tensor:
    """(1 - m) of what the at.new[b] new tokens of each row see, and m (y + share mean) for the rest, [B, T, H P]; 0 from new[b] on.

    m = sigmoid(scores + bias + growth log n - lse) where n tokens are out of sight, `mean` that of their values; where none is, what is
    seen alone. heads [B, T, 2 G + H, P]: values, keys and queries, not turned; scores [B, T, H]; y [B, T, H P]; angles: cosines and sines
    [B, T, Q] of the tokens' positions; held: slots (see `steps`), into which the keys and values of the T tokens go; at: cursors as
    `kernels.decode` has them. Raises `ValueError` for shapes that do not fit, too few slots, and an `impl` that cannot run here.
    """
    check_rank("heads", heads, "BTEP")
    (B, T, _, P), (_, G, S, _), H = heads.shape, held.keys.shape, scores.shape[-1]
    for name, tensor, shape in (
        ("heads", heads, (B, T, 2 * G + H, P)), ("scores", scores, (B, T, H)), ("y", y, (B, T, H * P)), ("keys", held.keys, (B, G, S, P)),
        ("values", held.values, (B, G, S, P)), ("total", held.total, (B, G, P)), ("summed", held.summed, (B, G)),
        ("bias", rest.bias, (H,)), ("growth", rest.growth, (H,)), ("share", rest.share, (H * P,)),
        ("cosines", angles[0], (B, T, angles[0].shape[-1])), ("sines", angles[1], angles[0].shape),
    ):  # fmt: skip
        check_shape(name, tensor, *shape)
    if S < sight.sinks + sight.window + T:
        raise ValueError(f"{T} tokens need sinks + window + T = {sight.sinks + sight.window + T} slots; got {S}")
    form = choose("window decode", impl, ("torch", "triton"), heads, None if P <= 128 else f"its kernel holds P up to 128, got {P}")
    if form == "triton":
        from .triton_op import fused_steps

        return fused_steps(heads, scores, y, rest, *angles, held, at, sight, scale)
    return steps_in_torch(heads, scores, y, rest, *angles, held, at, sight, scale)


def window_rows(
    q: Tensor, k: Tensor, sight: Sight, scale: float, seq_idx: Tensor | None, mask: Tensor | None, rows: slice | Tensor
) -> Tensor:
    """The rows [B, H, I, T] of the matrix that `window_attention` multiplies v by; arguments as there, absent tokens' rows 0."""
    T, R = q.shape[1], q.shape[2] // k.shape[2]
    real = torch.ones(len(q), T, dtype=torch.bool, device=q.device) if mask is None else mask
    docs = documents(seq_idx, mask)
    rank, start = _ranks(real, docs)
    seen = sees(rank[:, rows], start[:, rows], rank.masked_fill(~real, -1), sight)  # [B, I, T]
    if docs is not None:
        seen = seen & (docs[:, rows, None] == docs[:, None])
    scores = torch.einsum("bihp,bjhp->bhij", q[:, rows], k.repeat_interleave(R, 2)) * scale
    weights = scores.masked_fill(~seen[:, None], torch.finfo(scores.dtype).min).softmax(-1)
    return weights.masked_fill(~(seen & real[:, rows, None])[:, None], 0)


def _ranks(real: Tensor, docs: Tensor | None) -> tuple[Tensor, Tensor]:
    """How many real tokens of its row stand before each token, and before its document: both [B, T]."""
    rank = real.long().cumsum(1) - 1
    return rank, torch.zeros_like(rank) if docs is None else rank.gather(1, _starts(docs)).clamp_min(0)  # -1 where a row begins absent


def _packed(mask: Tensor) -> _Packed:
    order = mask.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    return _Packed(order, mask.gather(1, order))


def _starts(docs: Tensor) -> Tensor:
    """Where the document of each token starts [B, T]."""
    begins = torch.nn.functional.pad(docs[:, 1:] != docs[:, :-1], (1, 0))
    return torch.where(begins, torch.arange(docs.shape[1], device=docs.device), 0).cummax(1).values


def _check(q: Tensor, k: Tensor, v: Tensor, seq_idx: Tensor | None, mask: Tensor | None, past: Past | None) -> None:
    check_rank("q", q, "BTHP")
    check_rank("k", k, "BTGP")
    (B, T, H, P), G = q.shape, k.shape[2]
    if H % G:
        raise ValueError(f"q needs a multiple of k's {G} heads, got {H}")
    for name, tensor in (("k", k), ("v", v)):
        check_shape(name, tensor, B, T, G, P)
    check_shape("seq_idx", seq_idx, B, T)
    check_shape("mask", mask, B, T)
    if past is not None:
        if seq_idx is not None:
            raise ValueError("seq_idx and past exclude each other: documents that go on are not told apart")
        S = past.keys.shape[1]
        for name, tensor in (("past.keys", past.keys), ("past.values", past.values)):
            check_shape(name, tensor, B, S, G, P)
        check_shape("past.gone", past.gone, B, G, P)
