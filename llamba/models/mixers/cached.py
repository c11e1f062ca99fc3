"""A mixer's way through a cache: tokens are folded into the state, or held so that they can be taken back, or come one at a time.

Shapes: B batch, T time, D model width, H query heads, G key/value heads, P head width, N state width, S slots.
"""

import torch
from torch import Tensor

from llamba.kernels.conv1d import causal_conv1d_span, causal_conv1d_step
from llamba.kernels.window import View, turned_each
from llamba.models.cache import KEPT, RecurrentLayer, columns, write
from llamba.models.mixers.beside import Beside
from llamba.models.mixers.outline import Recurrence
from llamba.models.tree import Tree


class Cached(Beside):
    """A mixer with a `RecurrentLayer` behind it."""

    fold_after = 16  # settled tokens that are replayed from the cache before they are folded into the state

    def _cached_run(self, parts: dict[str, Tensor], rec: Recurrence, layer: RecurrentLayer) -> Tensor:
        tokens = parts["conv"].shape[1]
        recent = min(tokens, KEPT) if layer.is_recording else 0
        done = []
        if recent < tokens:
            early = {name: part[:, : tokens - recent] for name, part in parts.items()}
            layer.fold_all(self._advance)
            done.append(self._folded_run(early, Recurrence(None if rec.mask is None else rec.mask[:, : tokens - recent]), layer))
        if recent:
            late = {name: part[:, tokens - recent :] for name, part in parts.items()}
            mask = None if rec.mask is None else rec.mask[:, tokens - recent :]
            done.append(self._held_run(late, layer, rec.tree) if mask is None else self._held_run_with_holes(late, mask, layer))
        return done[0] if len(done) == 1 else torch.cat(done, 1)

    def _folded_run(self, parts: dict[str, Tensor], rec: Recurrence, layer: RecurrentLayer) -> Tensor:
        y, state, window = self._run(parts, rec, layer.window(), layer.state)
        layer.set_state(window, state, y.shape[1])
        return y

    def _held_run(self, parts: dict[str, Tensor], layer: RecurrentLayer, tree: Tree | None) -> Tensor:
        tokens = parts["conv"].shape[1]
        behind = 0 if tree is None else len(tree) - tokens
        span = layer.append_conv(self._conv_in(parts), self._advance, self.fold_after, behind)
        windows = None if tree is None else tree.windows(self.config.conv_width)[behind:]
        conv_out = self.conv1d(span, causal_conv1d_span, activation=self.config.conv_activation, windows=windows)
        x, b, c = self._turned_heads(conv_out, parts)
        return self.append_inputs(x, b, c, parts["dt"], layer, tree)

    def _held_run_with_holes(self, parts: dict[str, Tensor], mask: Tensor, layer: RecurrentLayer) -> Tensor:
        """As `_held_run` for tokens of which some are absent: they stand behind the others, and are forgotten."""
        order = (~mask).long().argsort(dim=1, stable=True)  # [B, T]
        packed = {name: part.gather(1, order[..., None].expand_as(part)) for name, part in parts.items()}
        y = self._held_run(packed, layer, None)
        layer.skip(mask)
        there = order.argsort(1)[..., None, None].expand_as(y)
        return y.gather(1, there).masked_fill(~mask[..., None, None], 0)

    def append_inputs(self, x: Tensor, b: Tensor, c: Tensor, dt: Tensor, layer: RecurrentLayer, tree: Tree | None) -> Tensor:
        """Output [B, T, H, P] of new tokens, whose inputs the cache holds from now on; `tree`: they are its last T nodes."""
        inputs, firsts = layer.append_inputs((x, b, dt))
        return self.resume(inputs, c, layer.state, firsts, tree)

    def resume(self, inputs: tuple[Tensor, ...], c: Tensor, state: Tensor | None, firsts: list[int], tree: Tree | None = None) -> Tensor:
        """Output [B, T, H, P] of the tokens that stand in slots firsts[b] .. firsts[b] + T - 1.

        `inputs`: x, B and dt of the slots [B, S, ...] in order; c [B, T, ...] of the tokens; `state` before slot 0. What stands behind a
        row's tokens is garbage and changes nothing. `tree`: the tokens are its last T nodes; one state for each node is made on the way.
        """
        x, b, dt = inputs
        if tree is not None:
            return self._resume_tree(inputs, c, state, [first - len(tree) + c.shape[1] for first in firsts], tree)
        read = c.new_zeros(x.shape[0], x.shape[1], *c.shape[2:])
        write(read, firsts, c)
        return columns(self.scan(x, b, read, dt, state, Recurrence())[0], firsts, c.shape[1])

    def _resume_tree(self, inputs: tuple[Tensor, ...], c: Tensor, state: Tensor | None, roots: list[int], tree: Tree) -> Tensor:
        """`resume` by one step for each node, from the state of its parent; row b's root stands in slot roots[b]."""
        slots = torch.arange(inputs[0].shape[1], device=c.device)
        states = [self._advance(inputs, slots < torch.tensor(roots, device=c.device)[:, None], state)]  # that before the root, then theirs
        x, b, dt = (columns(held, roots, len(tree)) for held in inputs)
        read = torch.cat((c.new_zeros(len(c), len(tree) - c.shape[1], *c.shape[2:]), c), 1)
        outputs = []
        for node, parent in enumerate(tree.parents):
            y, after = self.step(x[:, node], b[:, node], read[:, node], dt[:, node], states[parent + 1])
            states.append(after)
            outputs.append(y)
        return torch.stack(outputs[-c.shape[1] :], 1)

    def _cached_step(self, parts: dict[str, Tensor], layer: RecurrentLayer) -> tuple[Tensor, View | None]:
        """Of one token: the recurrence's output [B, 1, H, P], and what attention sees where there is a window."""
        window = layer.window()
        assert window is not None and layer.state is not None, "a layer with a state has a window"
        rest = {name: part.select(1, 0) for name, part in parts.items() if name not in ("z", "rest", "cos", "sin")}
        conv_out, window = self.conv1d(self._conv_in(rest), causal_conv1d_step, activation=self.config.conv_activation, state=window)
        x, b, c = self.heads_of(conv_out, rest)
        b, c, view = self._step_heads(b, c, rest["conv"], parts, layer)
        y, state = self.step(x, b, c, rest["dt"], layer.state)
        layer.set_state(window, state, 1)
        return y.unsqueeze(1), view

    def _step_heads(
        self, b: Tensor, c: Tensor, rows: Tensor, parts: dict[str, Tensor], layer: RecurrentLayer
    ) -> tuple[Tensor, Tensor, View | None]:
        """B and C of one token turned, and what its attention sees: in one turn, as a call costs more than its arithmetic.

        `rows`: those before the convolution, without the time axis.
        """
        parted, view = [b, c] if self.config.rotary else [], None
        if self.sight is not None:
            v, both = self._attention_rows(rows)
            parted.append(both)
        if not parted:
            return b, c, None
        every = turned_each(torch.cat(parted, 1), parts["cos"], parts["sin"])  # [B, 1, Q]
        made = every.split_with_sizes([heads.shape[1] for heads in parted], 1)
        if self.sight is not None:
            k, q = made[-1].to(v.dtype).split_with_sizes([self.config.groups, self.config.heads], 1)
            view = layer.look_once(q, k, v, self.sight, self.config.head_dim**-0.5)
        return (made[0], made[1], view) if self.config.rotary else (b, c, view)

    def _advance(self, inputs: tuple[Tensor, ...], mask: Tensor | None, state: Tensor | None) -> Tensor:
        x, b, dt = inputs
        return self.scan(x, b, None, dt, state, Recurrence(mask))[1]
