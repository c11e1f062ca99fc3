"""Where drafts come from: a small model, or the text itself.

Shapes: B batch, K drafted tokens, V vocabulary. Tokens of a row are a list of ints: prompt and what was generated so far.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llamba.models.hybrid import check_draft
from llamba.models.tree import Tree, grow
from llamba.speculative.choose import Choice
from llamba.speculative.rewind import Rewindable

Rows = list[list[int]]


class Proposal(NamedTuple):
    """Drafted tokens [B, K], how many of them count [B], and what they were drawn from [B, K, V] (None: they were certain).

    With a `tree` token n - 1 is node n; without one the tokens are a chain.
    """

    tokens: Tensor
    counts: list[int]
    probabilities: Tensor | None
    tree: Tree | None = None

    def path(self, node: int) -> list[int]:
        """The drafted tokens up to token node - 1, which is the last of them, as nodes: 1, ... , node in a chain."""
        return list(range(1, node + 1)) if self.tree is None else self.tree.path(node)


class Drafter(Protocol):
    """Proposes tokens behind every row, hears how many of them stand, and forgets rows that are finished."""

    def start(self, rows: Rows) -> None:
        """Get ready for these prompts."""

    def propose(self, rows: Rows, count: int, noise: Tensor) -> Proposal:
        """Up to `count` tokens behind each row; noise [B, count] is uniform in [0, 1)."""

    def settle(self, accepted: list[int]) -> None:
        """Row b keeps accepted[b] of the tokens proposed last; of a tree, the path to node accepted[b]."""

    def select(self, rows: list[int]) -> None:
        """Keep these rows only."""


class ModelDraft:
    """Drafts of a small model: any of ours, or a Llama-type model of transformers. Its cache goes back as the target's does."""

    def __init__(self, model: PreTrainedModel, capacity: int, choice: Choice):
        self.reader, self.choice, self.ahead = Rewindable(model, capacity), choice, 0

    def start(self, rows: Rows) -> None:
        """Read the prompts but for their last tokens."""
        self.reader.start([row[:-1] for row in rows])
        self.reader.record()

    def propose(self, rows: Rows, count: int, noise: Tensor) -> Proposal:
        """Read what was added since, then `count` tokens one after the other."""
        logits = self._catch_up(rows)
        tokens, weights = list[Tensor](), list[Tensor | None]()
        for place in range(count):
            if self.choice.processors:
                drafted = torch.stack(tokens, 1).tolist() if tokens else [[] for _ in rows]
                extended = [row + more for row, more in zip(rows, drafted, strict=True)]
                logits = self.choice.scores(logits[:, None], extended, logits.new_empty(len(rows), 0))[:, 0]
            token, weight = self.choice.pick(logits, noise[:, place])
            tokens.append(token)
            weights.append(weight)
            if place + 1 < count:
                logits = self.reader.read(token[:, None], 1)[:, -1]
        self.ahead = count - 1
        drawn = None if self.choice.greedy else torch.stack([weight for weight in weights if weight is not None], 1)
        return Proposal(torch.stack(tokens, 1), [count] * len(rows), drawn)

    def _catch_up(self, rows: Rows) -> Tensor:
        """Read the tokens not read yet; returns the logits [B, V] behind each row's last token."""
        missing = [row[length:] for row, length in zip(rows, self.reader.lengths, strict=True)]
        longest = max(map(len, missing))
        tokens = torch.tensor([new + [0] * (longest - len(new)) for new in missing], device=self.reader.device)
        ragged = any(len(new) < longest for new in missing)
        logits = self.reader.read(tokens, longest if ragged else 1)
        if ragged:
            self.reader.take_back([longest - len(new) for new in missing])
            logits = torch.stack([logits[b, len(new) - 1] for b, new in enumerate(missing)])[:, None]
        self.reader.pin()
        return logits[:, -1]

    def settle(self, accepted: list[int]) -> None:
        """Take back what was rejected; the last drafted token was never read."""
        self.reader.take_back([self.ahead - min(count, self.ahead) for count in accepted])

    def select(self, rows: list[int]) -> None:
        """Keep these rows only."""
        self.reader.select(rows)


class TreeDraft(ModelDraft):
    """Trees of a small model's drafts, in which a node at depth d has branching[d] different children. It reads level by level."""

    def __init__(self, model: PreTrainedModel, capacity: int, choice: Choice, branching: tuple[int, ...]):
        super().__init__(model, capacity, choice)
        self.branching = branching

    def propose(self, rows: Rows, count: int, noise: Tensor) -> Proposal:
        """A tree of depth `count`; noise has a number for each of its nodes but the root."""
        self.tree = tree = grow(self.branching[:count], self.reader.device)
        logits, first, last = self._catch_up(rows)[:, None], 0, 1  # behind the nodes first .. last - 1, a level
        tokens, weights = list[Tensor](), list[Tensor | None]()
        for children in self.branching[:count]:
            if tokens:
                logits = self.reader.read(tokens[-1], last - first, tree.first(last))
            drafted = torch.cat(tokens, 1) if tokens else noise.new_empty(len(rows), 0)
            scores = self.choice.scores(logits, rows, drafted, [tree.path(node) for node in range(first, last)])
            end = last + (last - first) * children
            token, weight = self.choice.pick_several(scores, children, noise[:, last - 1 : end - 1])
            tokens.append(token)
            weights.append(weight)
            first, last = last, end
        self.ahead = first  # nodes that were read, the root included
        drawn = None if self.choice.greedy else torch.cat([weight for weight in weights if weight is not None], 1)
        return Proposal(torch.cat(tokens, 1), [last - 1] * len(rows), drawn, tree)

    def settle(self, accepted: list[int]) -> None:
        """Keep the paths, as far as they were read."""
        self.reader.keep(self.ahead, [[0] + [step for step in self.tree.path(node) if step < self.ahead] for node in accepted])


@dataclass
class Lookup:
    """Drafts from the row itself: what followed the newest earlier occurrence of its last tokens (prompt lookup, n-gram drafts).

    The longest of `longest` .. 1 last tokens that occurs earlier decides.
    """

    longest: int = 3

    def __post_init__(self) -> None:
        if self.longest < 1:
            raise ValueError(f"Lookup.longest must be at least 1 token; got {self.longest}")

    def start(self, rows: Rows) -> None:
        """Index every run of up to `longest` tokens by the place behind it."""
        self.places: list[dict[tuple[int, ...], int]] = [{} for _ in rows]
        self.indexed = [0] * len(rows)
        self.pad = 0

    def _index(self, number: int, row: list[int]) -> None:
        places = self.places[number]
        for end in range(max(self.indexed[number], 1), len(row)):
            for size in range(1, min(self.longest, end) + 1):
                places[tuple(row[end - size : end])] = end
        self.indexed[number] = len(row)

    def _guess(self, number: int, row: list[int], count: int) -> list[int]:
        self._index(number, row)
        for size in range(min(self.longest, len(row) - 1), 0, -1):
            found = self.places[number].get(tuple(row[-size:]))
            if found is not None:
                return row[found : found + count]
        return []

    def propose(self, rows: Rows, count: int, noise: Tensor) -> Proposal:
        """Up to `count` tokens a row, perhaps none."""
        guesses = [self._guess(number, row, count) for number, row in enumerate(rows)]
        width = max(map(len, guesses))
        tokens = torch.tensor([guess + [self.pad] * (width - len(guess)) for guess in guesses], dtype=torch.long, device=noise.device)
        return Proposal(tokens.view(len(rows), width), list(map(len, guesses)), None)

    def settle(self, accepted: list[int]) -> None:
        """Nothing to take back: rows are indexed as they are when asked."""

    def select(self, rows: list[int]) -> None:
        """Keep these rows only."""
        self.places, self.indexed = [self.places[row] for row in rows], [self.indexed[row] for row in rows]


def check_pair(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    """Raises ValueError for a draft that cannot serve, and warns of one that cannot pay."""
    check_draft(target, draft)
    sizes = [model.config.get_text_config().vocab_size for model in (target, draft)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"target and draft must share a vocabulary; got {sizes[0]} and {sizes[1]} tokens; with two tokenizers use "
            "model.generate(ids, assistant_model=draft, tokenizer=..., assistant_tokenizer=...)"
        )


def drafter(target: PreTrainedModel, draft: Any, capacity: int, choice: Choice, branching: tuple[int, ...] | None) -> Drafter | None:
    """The drafter that a user's `draft` means: a model, "lookup", or a drafter of one's own; None drafts nothing.

    Raises ValueError for trees (`branching`) of anything but a model.
    """
    if isinstance(draft, PreTrainedModel):
        check_pair(target, draft)
        return ModelDraft(draft, capacity, choice) if branching is None else TreeDraft(draft, capacity, choice, branching)
    if branching is not None:
        raise ValueError(f"tree needs a draft model, which rates several continuations; got draft={draft!r}; use lookahead instead")
    if isinstance(draft, str):
        if draft != "lookup":
            raise ValueError(f'draft must be a loaded model, "lookup" or None; got {draft!r}')
        return Lookup()
    return draft
