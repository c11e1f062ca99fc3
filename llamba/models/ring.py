"""Keys and values of the tokens that a window and sinks can see, in slots that tokens share by turns.

Shapes: B batch, T time, G key/value heads, P head width, M sinks, L slots behind those of the sinks, S = M + L.
Row b's token number n stands in slot n where n < M, and in slot M + (n - M) mod L else. Taking tokens back is arithmetic on `lengths`: L is
the window and as many tokens more as can be taken back, so that what was overwritten is out of sight.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from llamba.kernels.window import Past, Sight, attend, sees, window_attention
from llamba.models.tree import Tree


class KeyRing:
    """What one mixer's attention can see of the past, `lengths[b]` tokens of row b; absent tokens are not counted."""

    def __init__(self, sight: Sight, spare: int, keys: Tensor, values: Tensor):
        """Empty, for heads like keys and values [B, T, G, P]; `spare` tokens can be taken back."""
        self.sight, self.spare = sight, spare
        shape = len(keys), self.slots, *keys.shape[2:]
        self.keys, self.values = keys.new_zeros(shape), values.new_zeros(shape)
        self.lengths = [0] * len(keys)

    @property
    def slots(self) -> int:
        """Slots of a row, S."""
        return self.sight.sinks + self.sight.window + self.spare

    def look(self, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, tree: Tree | None) -> Tensor:
        """Append keys and values [B, T, G, P] and return what queries [B, T, H, P] see of them and of the past: [B, T, H, P].

        mask [B, T]: True at real tokens. `tree`: the tokens are its last T nodes, and the nodes before those were appended last.
        """
        if tree is not None:
            return self._look_from_tree(q, k, v, scale, tree)
        if q.shape[1] == 1 and mask is None and not torch.is_grad_enabled():
            return self._look_from_last(q, k, v, scale)
        past = self._past(self.lengths, self.sight.window - 1) if any(self.lengths) else None
        y = window_attention(q, k, v, self.sight, scale=scale, mask=mask, past=past)
        if mask is None:
            self._append(k, v, [q.shape[1]] * len(q))
        else:
            order = mask.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[..., None, None]
            self._append(k.gather(1, order.expand_as(k)), v.gather(1, order.expand_as(v)), mask.sum(1).tolist())
        return y

    def _look_from_last(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        self._append(k, v, [1] * len(q))
        places = self._places(self.lengths)
        last = torch.tensor([[length - 1] for length in self.lengths], device=q.device)
        return attend(q, self.keys, self.values, sees(last, torch.zeros_like(last), places, self.sight), scale)

    def _look_from_tree(self, q: Tensor, k: Tensor, v: Tensor, scale: float, tree: Tree) -> Tensor:
        T, M = q.shape[1], len(tree)
        self._append(k, v, [T] * len(q))
        roots = [length - M for length in self.lengths]
        past = self._past(roots, self.sight.window - 1)
        nodes = self._slots(torch.tensor(roots, device=q.device)[:, None] + torch.arange(M, device=q.device))
        rows, root = torch.arange(len(q), device=q.device)[:, None], past.length[:, None]
        keys, values = (torch.cat((old, now[rows, nodes]), 1) for old, now in ((past.keys, self.keys), (past.values, self.values)))
        at = root + tree.depths
        places = torch.cat((past.places, at), 1)
        seen = sees(at[:, M - T :], torch.zeros_like(at[:, M - T :]), places, self.sight)  # [B, T, S + M]
        seen[:, :, -M:] &= tree.ancestors[M - T :]
        return attend(q, keys, values, seen, scale)

    def _slots(self, places: Tensor) -> Tensor:
        M = self.sight.sinks
        return torch.where(places < M, places, M + (places - M) % (self.slots - M))

    def _places(self, lengths: list[int]) -> Tensor:
        """Which token stands in each slot, [B, S]; negative: none."""
        M = self.sight.sinks
        L, length = self.slots - M, torch.tensor(lengths, device=self.keys.device)[:, None]
        slot = torch.arange(L, device=self.keys.device)
        newest = length - 1 - M
        behind = newest - (newest - slot) % L + M  # the newest of the tokens that share the slot
        first = torch.arange(M, device=self.keys.device).expand(len(lengths), -1)
        return torch.cat((first.masked_fill(first >= length, -1), behind.masked_fill(behind < M, -1)), 1)

    def _past(self, lengths: list[int], count: int) -> Past:
        """The sinks and the last `count` tokens of rows with so many tokens; a copy."""
        M, length = self.sight.sinks, torch.tensor(lengths, device=self.keys.device)
        recent = length[:, None] - count + torch.arange(count, device=self.keys.device)
        first = torch.arange(M, device=self.keys.device).expand(len(lengths), -1)
        places = torch.cat((first.masked_fill(first >= length[:, None], -1), recent.masked_fill(recent < M, -1)), 1)
        rows, slots = torch.arange(len(lengths), device=self.keys.device)[:, None], self._slots(places.clamp_min(0))
        return Past(self.keys[rows, slots], self.values[rows, slots], places, length)

    def _append(self, k: Tensor, v: Tensor, counts: list[int]) -> None:
        """Store the first counts[b] of each row's T tokens."""
        k, v, M, L = k.detach(), v.detach(), self.sight.sinks, self.slots - self.sight.sinks
        if k.shape[1] == 1 and counts == [1] * len(counts) and min(self.lengths) == max(self.lengths):
            n = self.lengths[0]
            at = n if n < M else M + (n - M) % L
            self.keys[:, at], self.values[:, at] = k[:, 0], v[:, 0]
            self.lengths = [n + 1] * len(counts)
            return
        if k.shape[1] <= L and counts == [k.shape[1]] * len(counts):
            place = torch.tensor(self.lengths, device=k.device)[:, None] + torch.arange(k.shape[1], device=k.device)
            rows, slot = torch.arange(len(k), device=k.device)[:, None], self._slots(place)
            self.keys[rows, slot], self.values[rows, slot] = k.to(self.keys.dtype), v.to(self.values.dtype)
            self.lengths = [length + k.shape[1] for length in self.lengths]
            return
        count, start = (torch.tensor(numbers, device=k.device)[:, None] for numbers in (counts, self.lengths))
        token = torch.arange(k.shape[1], device=k.device)
        place = start + token  # [B, T]
        stays = (token < count) & ((place < M) | (token >= count - L))  # one token for each slot
        row, column = stays.nonzero(as_tuple=True)
        slot = self._slots(place)[row, column]
        self.keys[row, slot], self.values[row, slot] = k[row, column].to(self.keys.dtype), v[row, column].to(self.values.dtype)
        self.lengths = [length + more for length, more in zip(self.lengths, counts, strict=True)]

    def take_back(self, tokens: list[int]) -> None:
        """Forget the last tokens[b] tokens of each row."""
        assert max(tokens) <= self.spare, "the layer has checked what can be taken back"
        self.lengths = [length - back for length, back in zip(self.lengths, tokens, strict=True)]

    def keep(self, tokens: int, paths: list[list[int]]) -> None:
        """Of each row's last `tokens` tokens keep those at paths[b] (rising, from 0)."""
        pairs = [
            (row, length - tokens + new, length - tokens + old)
            for row, (length, path) in enumerate(zip(self.lengths, paths, strict=True))
            for new, old in enumerate(path)
        ]
        rows, to, place = (torch.tensor(part, device=self.keys.device) for part in zip(*pairs, strict=True))
        for buffer in (self.keys, self.values):
            buffer[rows, self._slots(to)] = buffer[rows, self._slots(place)]
        self.lengths = [length - tokens + len(path) for length, path in zip(self.lengths, paths, strict=True)]

    def spare_more(self, spare: int) -> None:
        """From now on `spare` tokens can be taken back."""
        past = self._past(self.lengths, self.sight.window)
        self.spare = max(spare, self.spare)
        shape = len(self.keys), self.slots, *self.keys.shape[2:]
        old, slots = (past.keys, past.values), self._slots(past.places.clamp_min(0))
        self.keys, self.values = self.keys.new_zeros(shape), self.values.new_zeros(shape)
        row, column = (past.places >= 0).nonzero(as_tuple=True)
        for buffer, held in zip((self.keys, self.values), old, strict=True):
            buffer[row, slots[row, column]] = held[row, column]

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change the rows as `change` does along the first axis."""
        self.keys, self.values = change(self.keys), change(self.values)
        self.lengths = [self.lengths[row] for row in change(torch.arange(len(self.lengths))).tolist()]
