"""Attention beside the recurrence: what a window and sinks let a mixer see, and what stands for the rest.

All that is out of sight is one more entry of the softmax, whose score and value the mixer makes itself: y = (1 - m) seen + m rest with
m = sigmoid(score - lse), lse the logarithm of the softmax's denominator over what is seen. The score is a row of in_proj for each head, a
bias, and a factor of log n where n tokens are out of sight; the value is the recurrence behind gate and norm, and a weight for each
channel of the mean of the values out of sight.
Shapes: B batch, T time, D model width, H query heads, G key/value heads, P head width, N state width.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from llamba.kernels.gated_norm import gated_head_norm
from llamba.kernels.window import Sight, View, turned, window_rows, window_view
from llamba.models.cache import RecurrentLayer
from llamba.models.mixers.outline import Mixing, Outline, Recurrence
from llamba.models.mixers.parts import at_least_fp32

LEAST_FAR = 1e-6  # part of the softmax's denominator below which its logarithm is rounding


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

    def _look(self, parts: dict[str, Tensor], rec: Recurrence, layer: RecurrentLayer | None) -> View:
        """What attention sees of the last tokens and the first ones, and what not."""
        assert self.sight is not None
        q, k, v = self.attention_heads(parts)
        scale = self.config.head_dim**-0.5
        if layer is None:
            return window_view(q, k, v, self.sight, scale=scale, seq_idx=rec.seq_idx, mask=rec.mask)
        return layer.look(q, k, v, self.sight, scale, rec.mask, rec.tree)

    def rest_score(self, rows: Tensor, more: Tensor) -> Tensor:
        """The rest's score [B, T, H], at least fp32: rows [B, T, H] of in_proj, more [B or 1, T] the logarithm of how many tokens it is."""
        bias, growth = at_least_fp32(self.rest_bias), at_least_fp32(self.rest_growth)
        return at_least_fp32(rows) + torch.addcmul(bias, more.unsqueeze(-1), growth)

    def rest_value(self, recurrent: Tensor, mean: Tensor) -> Tensor:
        """The rest's value [B, T, H P]: recurrent [B, T, H P] behind norm and gate, mean [B, T, G, P] of the values out of sight."""
        recurrent = recurrent if self.join is None else recurrent * self.join
        B, T, G, P = mean.shape
        share = self.rest_mean.to(mean.dtype).view(G, -1, P)
        return torch.addcmul(recurrent.to(mean.dtype).reshape(B, T, G, -1, P), mean.unsqueeze(3), share).view(B, T, -1)

    def _joined(self, recurrent: Tensor, view: View, rows: Tensor) -> Tensor:
        """What goes into out_proj [B, T, H P]: recurrent [B, T, H P] behind norm and gate, rows [B, T, H] of the rest's score.

        Where nothing is out of sight what is seen is attention, and all of it. Sequences that do without the window have the rest alone.
        """
        dropped = (
            torch.rand(len(recurrent), 1, 1, device=recurrent.device) < self.drop_window if self.training and self.drop_window else None
        )
        if self.recurrence_off or view.more is None or view.mean is None:
            return view.seen.flatten(-2)
        mass = torch.sigmoid(self.rest_score(rows, view.more) - view.lse)
        mass = mass if view.far is None else mass * view.far.unsqueeze(-1)
        mass = (mass if dropped is None else mass.masked_fill(dropped, 1)).to(view.seen.dtype).unsqueeze(-1)
        rest = self.rest_value(recurrent, view.mean).to(view.seen.dtype).view(view.seen.shape)
        return torch.lerp(view.seen, rest, mass).flatten(-2)

    def sides(self, hidden_states: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[View | None, Tensor]:
        """What is put together of inputs [B, T, D]: what window and sinks see (None without them), and the recurrence behind the gate
        with weights of 1, [B, T, H, P]."""
        parts = self._turned_parts(hidden_states, angles)
        y = self._run(parts, Recurrence(), None, None)[0]
        ones = y.new_ones(self.config.inner)
        y = y.flatten(-2) * F.silu(parts["z"]) if self.norm is None else gated_head_norm(y, parts["z"], ones, self.norm.eps)
        y = y.unflatten(-1, (-1, self.config.head_dim))
        return None if self.sight is None else self._look(parts, Recurrence(), None), y

    def joined_sides(self, hidden_states: Tensor, view: View | None, recurrent: Tensor) -> Tensor:
        """What goes into out_proj [B, T, H P], of inputs [B, T, D] whose `sides` these are."""
        recurrent = recurrent.flatten(-2)
        joined = recurrent if self.norm is None else recurrent * self.norm.weight
        if view is not None:
            rows, bias = self.in_proj.weight[-self.config.heads :], self.in_proj.bias
            joined = self._joined(joined, view, F.linear(hidden_states, rows, None if bias is None else bias[-self.config.heads :]))
        return joined.to(hidden_states.dtype)

    def whole(self, hidden_states: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The teacher's attention over all tokens of one document [B, T, H, P], what the mixer should give, and the logarithm of the
        part of its softmax's denominator [B, T, H] that a window and sinks do not see; from [B, T, D]."""
        q, k, v = self.attention_heads(self._turned_parts(hidden_states, angles))
        reach = self.config.sliding_window if self.layer_idx in (self.config.sliding_layers or ()) else None
        every = Sight(hidden_states.shape[1] if reach is None else reach, 0, reach)
        R, scale = self.config.heads // self.config.groups, self.config.head_dim**-0.5
        views = [  # a group at a time, as the whole matrix of scores is large
            window_view(q[:, :, R * g : R * (g + 1)], k[:, :, g : g + 1], v[:, :, g : g + 1], every, scale=scale)
            for g in range(self.config.groups)
        ]
        y, lse = torch.cat([view.seen for view in views], 2), torch.cat([view.lse for view in views], 2)
        if self.sight is None:
            return y, lse
        near = window_view(q, k, v, self.sight, scale=scale).lse
        return y, lse + torch.log(-torch.expm1((near - lse).clamp_max(-LEAST_FAR)))

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
