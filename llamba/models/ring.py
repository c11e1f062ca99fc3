"""Keys and values of the tokens that a window and sinks can see, in slots that tokens share by turns.

Shapes: B batch, T time, G key/value heads, P head width, M sinks, L slots behind those of the sinks, S = M + L.
Row b's token number n stands in slot n where n < M, and in slot M + (n - M) mod L else. Taking tokens back is arithmetic on `lengths`: L is
the window and as many tokens more as can be taken back, so that what was overwritten is out of sight. Of what is out of sight for good the
values are summed: those of the tokens M .. summed[b] - 1.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from llamba.kernels.common import accumulator
from llamba.kernels.window import Held, Past, Sight, View, attend, attend_slots, sees, slot_of, window_view
from llamba.models.ring_places import Lengths, Slots, added_to, counted, new_slots, past_slots, slots_between
from llamba.models.tree import Tree


class KeyRing:
    """What one mixer's attention can see of the past, `lengths[b]` tokens of row b; absent tokens are not counted.

    `keys` and `values` [B, G, S, P]; `total` [B, G, P] what is summed, at least fp32.
    """

    def __init__(self, sight: Sight, spare: int, keys: Tensor, values: Tensor):
        """Empty, for heads like keys and values [B, T, G, P]; `spare` tokens can be taken back."""
        self.sight, self.spare, self.slots = sight, spare, Slots(sight.sinks, sight.window + spare)
        self.lengths, self.summed = [0] * len(keys), [sight.sinks] * len(keys)
        self.total = keys.new_zeros(len(keys), *keys.shape[2:], dtype=accumulator(keys.dtype))
        self._latest: tuple[int, Tensor] | None = None  # a length of even rows, and the sum of what is out of sight of its last token
        self._make(keys.transpose(1, 2), values.transpose(1, 2))

    @property
    def is_even(self) -> bool:
        """Whether all rows have as many tokens."""
        return self.lengths.count(self.lengths[0]) == len(self.lengths)

    @property
    def sees_all(self) -> bool:
        """Whether every slot holds a token that the last one sees."""
        return not self.spare and self.sight.reach is None and min(self.lengths) >= sum(self.slots)

    def _make(self, keys: Tensor, values: Tensor) -> None:
        shape = *keys.shape[:2], sum(self.slots), keys.shape[3]
        self.keys, self.values = keys.new_zeros(shape), values.new_zeros(shape)

    def look(self, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, tree: Tree | None) -> View:
        """Append keys and values [B, T, G, P] and return what queries [B, T, H, P] see of them and of the past, and what they do not.

        mask [B, T]: True at real tokens. `tree`: the tokens are its last T nodes, and the nodes before those were appended last.
        """
        T = q.shape[1]
        if tree is not None:
            return self._look_from_tree(q, k, v, scale, tree)
        if mask is None and T <= self.spare + 1 and not torch.is_grad_enabled():  # what they see is not overwritten
            self._settle([min(length, length + T - self.spare) for length in self.lengths])
            self._append(k, v)
            return View(*attend_slots(q, self.keys, self.values, self._added(q, T), scale), *self._out_of_sight(T, v.dtype))
        past = self._past(self.lengths) if any(self.lengths) else None
        view = window_view(q, k, v, self.sight, scale=scale, mask=mask, past=past)
        if mask is not None:
            order = mask.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[..., None, None]
            k, v = k.gather(1, order.expand_as(k)), v.gather(1, order.expand_as(v))
        self._append_some(k, v, [T] * len(q) if mask is None else mask.sum(1).tolist())
        return view

    def look_once(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> View:
        """`look` of one token, given without the time axis, without gradient: q [B, H, P], k and v [B, G, P]; parts [B, 1, ...]."""
        if not self.is_even:
            return self.look(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), scale, None, None)
        self._settle([self.lengths[0] + min(0, 1 - self.spare)] * len(self.lengths))
        self._append_once(k, v)
        return View(*attend_slots(q.unsqueeze(1), self.keys, self.values, self._added(q, 1), scale), *self._out_of_sight(1, v.dtype))

    def _out_of_sight(self, tokens: int, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The last three parts of a `View` of each row's last tokens."""
        if max(self.lengths) <= self.sight.whole:
            return None, None, None
        far, more, part = counted(tuple(self.lengths), tokens, self.sight.whole, self.total.dtype, self.keys.device)
        if tokens == 1 and self.is_even:
            sums = self._sum_of_latest()[:, None]
        else:
            sums = self._total(tuple(tuple(n - tokens + t + 1 - self.sight.window for n in self.lengths) for t in range(tokens)))
        return far, more, (sums * part).to(dtype)

    def _sum_of_latest(self) -> Tensor:
        """The sum of what is out of sight of even rows' last token [B, G, P]: that of the token before, and one more."""
        n = self.lengths[0]
        end = n - self.sight.window
        if self.summed == [end] * len(self.lengths):
            return self.total
        if self._latest is None or self._latest[0] != n - 1 or not self.spare:
            self._latest = n, self._total(((end,) * len(self.lengths),))[:, 0]
        else:
            self._latest = n, self._latest[1].add_(self.values.select(2, self._slot(end - 1)))
        return self._latest[1]

    def _slot(self, token: int) -> int:
        sinks, turns = self.slots
        return token if token < sinks else sinks + (token - sinks) % turns

    def _total(self, ends: tuple[Lengths, ...]) -> Tensor:
        """Sums of the values of the tokens from the sinks up to before ends[t][b], [B, T, G, P]; the slots hold those not summed yet."""
        which = slots_between(tuple(self.lengths), tuple(self.summed), ends, self.slots, self.keys.device).to(self.total.dtype)
        return self.total[:, None] + torch.einsum("bts,bgsp->btgp", which, self.values.to(self.total.dtype))

    def _settle(self, lengths: list[int]) -> None:
        """Sum what is out of sight of all tokens behind rows that are at least so long."""
        ends = [max(length - self.sight.window + 1, old) for length, old in zip(lengths, self.summed, strict=True)]
        if ends == self.summed:
            return
        if ends == [self.summed[0] + 1] * len(ends) and self.summed == [self.summed[0]] * len(ends) and self.is_even:
            self.total.add_(self.values.select(2, self._slot(self.summed[0])))
        else:
            self.total = self._total((tuple(ends),))[:, 0]
        self.summed = ends

    def _added(self, q: Tensor, tokens: int) -> Tensor | None:
        """What is added to the scores of each row's last tokens [B or 1, T, S]; None where they see all slots."""
        if self.sees_all:
            return None
        return added_to(tuple(self.lengths), tokens, self.sight, self.slots, q.dtype, q.device)

    def _look_from_tree(self, q: Tensor, k: Tensor, v: Tensor, scale: float, tree: Tree) -> View:
        T, M = q.shape[1], len(tree)
        self._settle([length + T - self.spare for length in self.lengths])
        self._append(k, v)
        roots = [length - M for length in self.lengths]
        past = self._past(roots)
        rows, nodes = new_slots(tuple(roots), M, self.slots, q.device)
        keys, values = (torch.cat((old, now[rows, :, nodes]), 1) for old, now in ((past.keys, self.keys), (past.values, self.values)))
        at = past.length[:, None] + tree.depths
        node, places = at[:, M - T :], torch.cat((past.places, at), 1)
        seen = sees(node, torch.zeros_like(node), places, self.sight)  # [B, T, S + M]
        seen[:, :, -M:] &= tree.ancestors[M - T :]
        y, lse = attend(q, keys, values, seen, scale)
        if max(self.lengths) <= self.sight.whole:
            return View(y, lse, None, None, None)
        far = (node[..., None] - places[:, None] >= self.sight.window) & (places >= self.sight.sinks)[:, None]
        far[:, :, -M:] &= tree.ancestors[M - T :]
        sums = past.gone[:, None] + torch.einsum("bts,bsgp->btgp", far.to(past.gone.dtype), values.to(past.gone.dtype))
        some = (node - self.sight.whole + 1).clamp_min(1).to(sums.dtype)
        return View(y, lse, node >= self.sight.whole, some.log(), (sums / some[..., None, None]).to(v.dtype))

    def _past(self, lengths: list[int]) -> Past:
        """The sinks and what else a token behind rows with so many tokens can see; a copy."""
        places, slots, length = past_slots(tuple(lengths), self.sight.window - 1, self.slots, self.keys.device)
        rows = torch.arange(len(lengths), device=self.keys.device)[:, None]
        gone = self._total((tuple(length - self.sight.window + 1 for length in lengths),))[:, 0]
        return Past(self.keys[rows, :, slots], self.values[rows, :, slots], places, length, gone)

    def _append(self, k: Tensor, v: Tensor) -> None:
        """Store T tokens of each row, each in a slot of its own."""
        if k.shape[1] == 1 and self.is_even:
            self._append_once(k.detach()[:, 0], v.detach()[:, 0])
            return
        rows, index = new_slots(tuple(self.lengths), k.shape[1], self.slots, k.device)
        self.keys[rows, :, index], self.values[rows, :, index] = k.detach().to(self.keys.dtype), v.detach().to(self.values.dtype)
        self.lengths = [length + k.shape[1] for length in self.lengths]

    def _append_once(self, k: Tensor, v: Tensor) -> None:
        """Store one token of each row, [B, G, P], where all have as many."""
        n, slot = self.lengths[0], self._slot(self.lengths[0])
        self.keys.select(2, slot).copy_(k)
        self.values.select(2, slot).copy_(v)
        self.lengths = [n + 1] * len(self.lengths)

    def _append_some(self, k: Tensor, v: Tensor, counts: list[int]) -> None:
        """Store the first counts[b] of each row's tokens, and sum those that leave for good; of those that share a slot, the last stays."""
        new = [length + more for length, more in zip(self.lengths, counts, strict=True)]
        ends = [max(length - self.spare - self.sight.window + 1, old) for length, old in zip(new, self.summed, strict=True)]
        self._settle([min(end, length) + self.sight.window - 1 for end, length in zip(ends, self.lengths, strict=True)])
        count, start, end, first = (
            torch.tensor(numbers, device=k.device)[:, None] for numbers in (counts, self.lengths, ends, self.summed)
        )
        token = torch.arange(k.shape[1], device=k.device)
        place = start + token  # [B, T]
        leaves = (place >= first) & (place < end)
        self.total = self.total + torch.einsum("bt,btgp->bgp", leaves.to(self.total.dtype), v.detach().to(self.total.dtype))
        stays = (token < count) & ((place < self.slots.sinks) | (token >= count - self.slots.turns))
        row, column = stays.nonzero(as_tuple=True)
        slot = self.slots.of(place)[row, column]
        self.keys[row, :, slot] = k.detach()[row, column].to(self.keys.dtype)
        self.values[row, :, slot] = v.detach()[row, column].to(self.values.dtype)
        self.lengths, self.summed = new, ends

    def rollback(self, tokens: list[int]) -> None:
        """Forget the last tokens[b] tokens of each row."""
        assert max(tokens) <= self.spare, "the layer has checked what can be taken back"
        self._latest = None
        self.lengths = [length - back for length, back in zip(self.lengths, tokens, strict=True)]

    def keep(self, tokens: int, paths: list[list[int]]) -> None:
        """Of each row's last `tokens` tokens keep those at paths[b] (rising, from 0)."""
        self._latest = None
        pairs = [
            (row, length - tokens + new, length - tokens + old)
            for row, (length, path) in enumerate(zip(self.lengths, paths, strict=True))
            for new, old in enumerate(path)
        ]
        rows, to, place = (torch.tensor(part, device=self.keys.device) for part in zip(*pairs, strict=True))
        for buffer in (self.keys, self.values):
            buffer[rows, :, self.slots.of(to)] = buffer[rows, :, self.slots.of(place)]
        self.lengths = [length - tokens + len(path) for length, path in zip(self.lengths, paths, strict=True)]

    def spare_more(self, spare: int) -> None:
        """From now on `spare` tokens can be taken back; before, none could."""
        assert not self.spare, "else some tokens that are out of sight are not summed, and do not come along"
        more = Slots(self.sight.sinks, self.sight.window + spare)
        shape = *self.keys.shape[:2], sum(more), self.keys.shape[3]
        keys, values = self.keys.new_zeros(shape), self.values.new_zeros(shape)
        self._copy(keys, values)
        self.keys, self.values, self.spare, self.slots = keys, values, spare, more

    def copy(self, held: Held) -> None:
        """Put what can be seen, and what is summed, into the first of other rows, whose slots may be more."""
        rows, ends = len(self.lengths), tuple(length - self.sight.window + 1 for length in self.lengths)
        self._copy(held.keys, held.values)
        held.total[:rows] = self._total((ends,))[:, 0]
        held.summed[:rows] = torch.tensor(ends, device=held.summed.device).clamp_min(self.sight.sinks)[:, None]

    def _copy(self, keys: Tensor, values: Tensor) -> None:
        places, slots, _ = past_slots(tuple(self.lengths), self.sight.window, self.slots, self.keys.device)
        row, column = (places >= 0).nonzero(as_tuple=True)
        slot, to = slots[row, column], slot_of(places[row, column], self.sight.sinks, keys.shape[2])
        keys[row, :, to], values[row, :, to] = self.keys[row, :, slot], self.values[row, :, slot]

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change the rows as `change` does along the first axis."""
        self.keys, self.values, self.total, self._latest = change(self.keys), change(self.values), change(self.total), None
        rows = change(torch.arange(len(self.lengths))).tolist()
        self.lengths, self.summed = ([numbers[row] for row in rows] for numbers in (self.lengths, self.summed))
