"""Attention beside the recurrence: what a window and sinks let a mixer see, and how the two are joined.

Shapes: B batch, T time, D model width, H query heads, G key/value heads, P head width, N state width.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from llamba.kernels.gated_norm import gated_head_norm
from llamba.kernels.window import Sight, hides, turned, window_attention, window_rows
from llamba.models.cache import RecurrentLayer
from llamba.models.mixers.outline import Mixing, Outline, Recurrence


def _both_rows(
    own: Callable[[Sequence[Tensor], slice | Tensor], Tensor], sight: Sight, scale: float, rec: Recurrence, inputs: Sequence[Tensor],
    rows: slice | Tensor,
) -> Tensor:  # fmt: skip
    q, k = (heads.transpose(1, 2) for heads in inputs[:2])
    return own(inputs[2:], rows) + window_rows(q, k, sight, scale, rec.seq_idx, rec.mask, rows)


class Beside(Outline):
    """A mixer with what it sees of attention, where its configuration has a window or sinks."""

    drop_window = 0.0  # share of sequences that do without the window in training
    recurrence_off = False

    def _angles(self, given: tuple[Tensor, Tensor] | None, rows: int, tokens: int) -> dict[str, Tensor]:
        """Cosines and sines of the tokens' positions, where the mixer turns its heads, for every row: [B, T, Q]."""
        if self.sight is None and not self.config.rotary:
            return {}
        if given is None:
            raise ValueError(
                "a mixer with window, sinks or rotary needs position_embeddings, as the model's own layers pass them; got none"
            )
        turns = zip(("cos", "sin"), given, strict=True)
        return {name: part if part.shape[0] == rows else part.expand(rows, tokens, -1) for name, part in turns}

    def attention_heads(self, parts: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The teacher's queries [B, T, H, P], keys and values [B, T, G, P], the first two turned: the rows before the convolution."""
        v, both = self._attention_rows(parts["conv"])
        both = turned(both, parts["cos"], parts["sin"]).to(v.dtype)  # under autocast the angles are wider
        k, q = both.split_with_sizes([self.config.groups, self.config.heads], -2)
        return q, k, v

    def _attention_rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Values [..., G, P], and keys and queries [..., G + H, P], of the rows that pass the convolution."""
        assert self.conv_rows() == ("x", "B", "C"), "of a mixer that reads whole heads"
        c = self.config
        v, both = rows.view(*rows.shape[:-1], -1, c.head_dim).split_with_sizes([c.groups, c.groups + c.heads], -2)
        return v, both

    def _look(self, parts: dict[str, Tensor], rec: Recurrence, layer: RecurrentLayer | None) -> Tensor:
        """What attention sees [B, T, H, P] of the last tokens and the first ones."""
        assert self.sight is not None
        q, k, v = self.attention_heads(parts)
        scale = self.config.head_dim**-0.5
        if layer is None:
            return window_attention(q, k, v, self.sight, scale=scale, seq_idx=rec.seq_idx, mask=rec.mask)
        return layer.look(q, k, v, self.sight, scale, rec.mask, rec.tree)

    def _hides(self, rows: Tensor, rec: Recurrence, layer: RecurrentLayer | None) -> Tensor | bool:
        """Whether something is out of sight of the tokens of rows [B, T, ...], which `_look` has seen: of each [B or 1, T], or of all."""
        assert self.sight is not None
        if layer is None:
            return hides(rows, self.sight, rec.seq_idx, rec.mask)
        assert layer.ring is not None, "it was looked into"
        return layer.ring.hides(rows.shape[1], rec.mask, rec.tree)

    def _joined(self, recurrent: Tensor, seen: Tensor, mass: Tensor, hides: Tensor | bool) -> Tensor:
        """(1 - mass) seen + recurrent: recurrent [B, T, H P] behind norm and gate, seen [B, T, H, P], mass [B, T, H] -> [B, T, H P].

        `mass` stands for the part of softmax's mass that lies on what window and sinks do not see. It starts at 0, as the recurrence's
        weights behind the gate do. Both are trained; without the recurrence nothing is taken from what is seen. Nor is anything taken or
        added where nothing is out of sight (`hides`, as `_hides` says it): what is seen is attention then.
        """
        kept = torch.rand(len(seen), 1, device=seen.device) >= self.drop_window if self.training and self.drop_window else None
        if self.recurrence_off or (hides is False and kept is None):
            return seen.flatten(-2)
        recurrent = recurrent if self.join is None else recurrent * self.join
        if isinstance(hides, Tensor):
            counts = (hides if kept is None else hides | ~kept).unsqueeze(-1).to(seen.dtype)
            recurrent, mass = recurrent * counts, mass * counts
        seen = torch.addcmul(seen, seen, mass.unsqueeze(-1), value=-1).flatten(-2)
        return recurrent + (seen if kept is None else seen * kept.unsqueeze(-1).to(seen.dtype))

    def sides(self, hidden_states: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What the join puts together: the part of attention that window and sinks see (zeros without them), and the recurrence behind
        the gate with weights of 1. Both [B, T, H, P], from [B, T, D]."""
        parts = self._turned_parts(hidden_states, angles)
        y = self._run(parts, Recurrence(), None, None)[0]
        ones = y.new_ones(self.config.inner)
        y = y.flatten(-2) * F.silu(parts["z"]) if self.norm is None else gated_head_norm(y, parts["z"], ones, self.norm.eps)
        y = y.unflatten(-1, (-1, self.config.head_dim))
        return torch.zeros_like(y) if self.sight is None else self._look(parts, Recurrence(), None), y

    def joined_sides(self, hidden_states: Tensor, seen: Tensor, recurrent: Tensor) -> Tensor:
        """What goes into out_proj [B, T, H P], of inputs [B, T, D] whose `sides` these are."""
        recurrent = recurrent.flatten(-2)
        joined = recurrent if self.norm is None else recurrent * self.norm.weight
        if self.sight is not None:
            rows, bias = self.in_proj.weight[-self.config.heads :], self.in_proj.bias
            mass = F.linear(hidden_states, rows, None if bias is None else bias[-self.config.heads :])
            joined = self._joined(joined, seen, mass, self._hides(hidden_states, Recurrence(), None))
        return joined.to(hidden_states.dtype)

    def whole(self, hidden_states: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """The teacher's attention over all tokens of one document [B, T, H, P], from [B, T, D]: what the join should give."""
        heads = self.attention_heads(self._turned_parts(hidden_states, angles))
        reach = self.config.sliding_window if self.layer_idx in (self.config.sliding_layers or ()) else None
        every = Sight(hidden_states.shape[1] if reach is None else reach, 0, reach)
        return window_attention(*heads, every, scale=self.config.head_dim**-0.5)

    def _turned_parts(self, hidden_states: Tensor, angles: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        turns = {name: part.expand(*hidden_states.shape[:2], -1) for name, part in zip(("cos", "sin"), angles, strict=True)}
        return self._project(hidden_states) | turns

    def _with_window(self, own: Mixing, parts: dict[str, Tensor], rec: Recurrence) -> Mixing:
        """The recurrence's matrix and that of the window and the sinks, added."""
        assert self.sight is not None
        q, k, _ = self.attention_heads(parts)
        k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)  # [B, T, H, P]
        rows = partial(_both_rows, own.rows, self.sight, self.config.head_dim**-0.5, rec)
        return Mixing((q.transpose(1, 2), k.transpose(1, 2), *own.inputs), rows)
