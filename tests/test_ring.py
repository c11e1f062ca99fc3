"""What a cache's ring shows and hides on random walks, against one call over each row's whole text."""

import random

import pytest
import torch
from torch import Tensor

from llamba.kernels.window import Held, Sight, View, window_view
from llamba.models.ring import KeyRing
from llamba.models.tree import Tree

H, G, P, SPARE = 4, 2, 4, 12
SIGHTS = [Sight(5, 2), Sight(1, 3), Sight(4), Sight(7, 1, 9), Sight(6, 2, 4), Sight(20, 4)]


class Walk:
    """A ring, and the texts that it stands for."""

    def __init__(self, sight: Sight, spare: int, rows: int, seed: int):
        self.sight, self.draw, self.dice = sight, torch.Generator().manual_seed(seed), random.Random(seed)
        self.ring = KeyRing(sight, spare, *self.tokens(rows, 1)[1:])
        self.texts = [self.tokens(1, 0)] * rows
        self.highest = [0] * rows  # tokens of each row that were ever there at once: what they overwrote is lost

    def tokens(self, rows: int, T: int) -> list[Tensor]:
        """Queries, keys and values of new tokens."""
        return [torch.randn(rows, T, n, P, dtype=torch.float64, generator=self.draw) for n in (H, G, G)]

    def check(self, got: View, real: list[list[int]], texts: list[list[Tensor]]) -> None:
        """Row b's real[b] tokens of `got` are the last of its text."""
        for row, (places, text) in enumerate(zip(real, texts, strict=True)):
            want, T = window_view(*text, self.sight, scale=1.0, impl="sequential"), text[0].shape[1]
            last = slice(T - len(places), T)
            assert torch.allclose(got.seen[row, places], want.seen[0, last], rtol=0, atol=1e-9)
            assert torch.allclose(got.lse[row, places], want.lse[0, last], rtol=0, atol=1e-9)
            if got.more is None:
                assert not want.far[0, last].any()
                continue
            far = torch.ones_like(want.far[0, last]) if got.far is None else got.far.expand(len(real), -1)[row, places]
            assert torch.equal(far, want.far[0, last])
            assert torch.allclose(got.more.expand(len(real), -1)[row, places], want.more[0, last], rtol=0, atol=1e-9)
            assert torch.allclose(got.mean[row, places], want.mean[0, last], rtol=0, atol=1e-9)

    def add(self, real: list[list[int]], new: list[Tensor]) -> None:
        """Append to each row's text its real new tokens."""
        self.texts = [
            [torch.cat((old, part[row : row + 1, places]), 1) for old, part in zip(text, new, strict=True)]
            for row, (text, places) in enumerate(zip(self.texts, real, strict=True))
        ]
        self.highest = [max(old, text[0].shape[1]) for old, text in zip(self.highest, self.texts, strict=True)]

    def look(self, T: int, masked: bool) -> None:
        new, rows = self.tokens(len(self.texts), T), len(self.texts)
        mask = torch.rand(rows, T, generator=self.draw) < 0.6 if masked else None
        real = [list(range(T)) if mask is None else mask[row].nonzero()[:, 0].tolist() for row in range(rows)]
        self.add(real, new)
        self.check(self.ring.look(*new, 1.0, mask, None), real, self.texts)

    def look_once(self) -> None:
        new = self.tokens(len(self.texts), 1)
        self.add([[0]] * len(self.texts), new)
        self.check(self.ring.look_once(*(part[:, 0] for part in new), 1.0), [[0]] * len(self.texts), self.texts)

    def rollback(self) -> None:
        lengths = [text[0].shape[1] for text in self.texts]
        back = [self.dice.randint(0, n - max(high - SPARE, 0)) for n, high in zip(lengths, self.highest, strict=True)]
        self.ring.rollback(back)
        self.texts = [[part[:, : part.shape[1] - count] for part in text] for text, count in zip(self.texts, back, strict=True)]

    def select(self) -> None:
        rows = [self.dice.randrange(len(self.texts)) for _ in self.texts]
        self.ring.map(lambda value: value[torch.tensor(rows)])
        self.texts, self.highest = ([values[row] for row in rows] for values in (self.texts, self.highest))

    def tree(self) -> None:
        """Read a tree in two parts, each node checked behind its ancestors, and keep a path of it."""
        tree, split = Tree((-1, 0, 0, 1, 1, 3, 5, 6)), 3
        new, parents = self.tokens(len(self.texts), len(tree)), tree.parents
        rows, before = range(len(self.texts)), self.texts
        self.highest = [max(high, text[0].shape[1] + len(tree)) for high, text in zip(self.highest, before, strict=True)]
        paths = [[0, *tree.path(node)] for node in range(len(tree))]
        for first, end in ((0, split), (split, len(parents))):
            part = tree.first(end)
            got = self.ring.look(*(value[:, first:end] for value in new), 1.0, None, part)
            for node in range(first, end):
                text = [
                    [torch.cat((old, value[row : row + 1, paths[node]]), 1) for old, value in zip(before[row], new, strict=True)]
                    for row in rows
                ]
                self.check(got, [[node - first]] * len(before), text)
        kept = [paths[self.dice.randrange(len(parents))] for _ in rows]
        self.ring.keep(len(parents), kept)
        self.add(kept, new)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("sight", SIGHTS, ids=str)
def test_random_walks(sight: Sight, seed: int) -> None:
    walk = Walk(sight, SPARE if seed % 3 else 0, 1 + seed % 3, seed)
    longest = 0
    for _ in range(40):
        what = walk.dice.choice(["few", "few", "many", "masked", "once", "once", "once", "select", "graph", "back", "tree", "more"])
        with torch.set_grad_enabled(what == "graph"):
            if what in ("few", "many", "graph", "masked"):
                walk.look(walk.dice.randint(1, 4) if what == "few" else walk.dice.randint(1, 40), what == "masked")
            elif what == "once":
                walk.look_once()
            elif what == "select":
                walk.select()
            elif walk.ring.spare and what == "back":
                walk.rollback()
            elif walk.ring.spare and what == "tree":
                walk.tree()
            elif not walk.ring.spare and what == "more" and seed == 3:
                walk.ring.spare_more(SPARE)
        longest = max(longest, *walk.ring.lengths)
    assert longest > 3 * (sight.sinks + sight.window), "the walk is long enough to turn"
    rows, slots = len(walk.texts), sight.sinks + sight.window + 5
    held = Held(
        *torch.zeros(2, rows + 1, G, slots, P, dtype=torch.float64),
        torch.zeros(rows + 1, G, P, dtype=torch.float64),
        torch.zeros(rows + 1, G, dtype=torch.long),
    )
    walk.ring.copy(held)
    for row, (_, _, v) in enumerate(walk.texts):
        n = v.shape[1]
        assert held.summed[row].tolist() == [max(n - sight.window + 1, sight.sinks)] * G
        assert torch.allclose(held.total[row], v[0, sight.sinks : max(n - sight.window + 1, sight.sinks)].sum(0), rtol=0, atol=1e-9)
