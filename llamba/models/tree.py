"""A tree of tokens behind a sequence, several continuations at once.

Shapes: M nodes, W convolution width. Node 0, the root, is the last token of the sequence; node i > 0 follows node parents[i] < i.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tree:
    """`parents` of all nodes, -1 for the root. What is computed from them stands on `device`."""

    parents: tuple[int, ...]
    device: torch.device = torch.device("cpu")

    def __post_init__(self) -> None:
        assert self.parents[0] == -1 and all(0 <= parent < node for node, parent in enumerate(self.parents) if node), self.parents

    def __len__(self) -> int:
        return len(self.parents)

    def first(self, count: int) -> "Tree":
        """The tree of the first `count` nodes."""
        return self if count == len(self) else _first(self, count)

    def path(self, node: int) -> list[int]:
        """The nodes from the one behind the root to `node`; none for the root."""
        return [] if node == 0 else [*self.path(self.parents[node]), node]

    @cached_property
    def levels(self) -> list[int]:
        """Depth of every node, 0 for the root."""
        return [len(self.path(node)) for node in range(len(self))]

    @cached_property
    def depths(self) -> Tensor:
        """`levels` as a tensor [M]."""
        return self._tensor(self.levels)

    @cached_property
    def ancestors(self) -> Tensor:
        """Whether node j is node i or stands on the way to it, [M, M] bool."""
        nodes = range(len(self))
        return self._tensor([[other in (0, *self.path(node)) for other in nodes] for node in nodes])

    def windows(self, width: int) -> Tensor:
        """Which columns the convolution of each node sees, oldest first [M, W]; node i stands in column i + W - 1, behind the
        W - 1 tokens before the root."""
        return _windows(self, width)

    def _tensor(self, values: list) -> Tensor:
        with torch.inference_mode(False):  # it outlives the call
            return torch.tensor(values, device=self.device)


@lru_cache(maxsize=64)
def grow(branching: Sequence[int], device: torch.device) -> Tree:
    """The tree in which every node at depth d has branching[d] children, level by level."""
    parents, level = [-1], [0]
    for children in branching:
        first = len(parents)
        parents += [parent for parent in level for _ in range(children)]
        level = list(range(first, len(parents)))
    return Tree(tuple(parents), device)


@lru_cache(maxsize=256)
def _first(tree: Tree, count: int) -> Tree:
    return Tree(tree.parents[:count], tree.device)


@lru_cache(maxsize=256)
def _windows(tree: Tree, width: int) -> Tensor:
    seen: list[list[int]] = []
    for node, parent in enumerate(tree.parents):
        before = seen[parent][1:] if node else list(range(width - 1))
        seen.append([*before, node + width - 1] if width > 1 else [node])
    return tree._tensor(seen)
