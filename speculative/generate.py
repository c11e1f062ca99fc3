"""Lossless speculative decoding in batches; without a draft the same code decodes plainly.

Shapes: B batch, T time, K drafted tokens, V vocabulary. A round reads the last token and K drafted ones at once, keeps those that stand and
adds one; of a tree of drafts one path stands. (Mamba-in-Llama, arXiv 2408.15237, section 4; for the rules see `accept`.)
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from llamba.models.cache import KEPT
from llamba.models.hybrid import RECURRENT
from llamba.models.tree import grow
from llamba.speculative.accept import accept, accept_greedy, accept_tree, accept_tree_greedy
from llamba.speculative.choose import Choice
from llamba.speculative.graphs import Decoded, decode, serves
from llamba.speculative.lookahead import Auto, Fixed, schedule
from llamba.speculative.proposers import Drafter, Proposal, Rows, drafter
from llamba.speculative.rewind import Rewindable, kinds_of


@dataclass
class Generation:
    """What was generated, and how fast.

    `sequences` [B, T]: prompts as given and new tokens, padded behind the end; `new` the new tokens of each row. `rounds` counts calls
    of the target after the prompt, `drafted` tokens over all rows and those of them that stood and came out (`accepted`), `seconds` all
    but the reading of the prompt.
    """

    sequences: Tensor
    new: list[list[int]]
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    seconds: float = 0.0

    @property
    def tokens(self) -> int:
        """New tokens of all rows."""
        return sum(map(len, self.new))

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows per second of decoding."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that stood; 0 without drafts."""
        return self.accepted / self.drafted if self.drafted else 0.0

    def __str__(self) -> str:
        text = f"{self.tokens} tokens, {self.tokens_per_second:.1f} tokens/s"
        if not self.drafted:
            return text
        rounds = f"{self.rounds} round{'s'[: self.rounds > 1]}"
        return f"{text}, {self.accepted} of {self.drafted} drafted tokens accepted ({self.acceptance:.0%}) in {rounds}"


def generate(
    model: PreTrainedModel,
    ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    draft: PreTrainedModel | Drafter | Literal["lookup"] | None = None,
    lookahead: int | Literal["auto"] | Auto = 4,
    tree: Sequence[int] | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    eos_token_id: int | Iterable[int] | None | Literal["model"] = "model",
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    streamer: Any = None,
    generator: torch.Generator | None = None,
    engine: Literal["auto", "eager", "graphs"] = "auto",
) -> Generation:
    """Continue `ids` [B, T] with `model`, faster where `draft` guesses well; what comes out is the model's own, whatever is drafted.

    attention_mask [B, T]: 0 for padding on the left. `draft`: a model with the same vocabulary (a Llama-type model of transformers, or
    one of ours), "lookup" (copies from the text so far), or an object with the methods of `Drafter`. `lookahead`: tokens drafted a
    round, or "auto"; an `Auto` keeps what it has learnt for the next call. `tree`, instead of `lookahead`: several continuations from a
    draft model, of which every token at depth d has tree[d]; (3, 2, 1) drafts 3 + 6 + 6 tokens a round, (1, 1, 1) what lookahead=3 does.
    `temperature` 0 is greedy. `eos_token_id`: "model" takes those of the model's generation configuration, None does not stop.
    `logits_processor`, `stopping_criteria` and `streamer` are transformers'; they are called for every token. The random numbers come
    from `generator` (on the CPU; None: torch's own).
    `engine`: "graphs" decodes in rounds that are device work alone, on CUDA in captured graphs (see `graphs`); "eager" goes from call to
    call; "auto" takes graphs on CUDA where they serve. They do not serve trees, drafts that are no models, processors and criteria.
    Raises ValueError for arguments out of range, a draft that cannot serve, and where prompt and new tokens overflow a context.
    """
    choice = Choice(temperature, top_k, top_p, min_p, logits_processor or LogitsProcessorList())
    rows = _rows(ids, attention_mask)
    branching = None if tree is None else _branching(tree, model.config.get_text_config().vocab_size)
    count = schedule(lookahead) if branching is None else Fixed(len(branching))
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
    if streamer is not None and len(rows) > 1:
        raise ValueError(f"a streamer takes one row; got {len(rows)}")
    longest = max(map(len, rows)) + max_new_tokens
    source = drafter(model, draft, longest + KEPT, choice, branching)
    for name, one in (("model", model), ("draft", draft)):
        if isinstance(one, PreTrainedModel):
            _check_context(name, one, longest)
    stops = _Stops(_ends(model, eos_token_id), stopping_criteria, max_new_tokens, [len(row) for row in rows])
    with torch.inference_mode():
        if serves(engine, model, draft, choice, stopping_criteria, branching is not None):
            assert draft is None or isinstance(draft, PreTrainedModel)
            made = decode(model, draft, rows, max_new_tokens, choice, stops.ends, count, streamer, generator)
            return _result(ids, made.new, made, stops.ends, model)
        job = _Job(Rewindable(model, longest + KEPT), source, choice, count, branching, stops, rows, streamer, generator)
        done = job.run()
    return _result(ids, [row[start:] for row, start in zip(done, stops.prompts, strict=True)], job, stops.ends, model)


@dataclass
class _Stops:
    """When a row ends: an end token, the caller's criteria, or enough new tokens."""

    ends: set[int]
    criteria: StoppingCriteriaList | None
    most: int
    prompts: list[int]  # length of each prompt, by number

    def cut(self, number: int, row: list[int], new: list[int], scores: Tensor) -> tuple[list[int], bool]:
        """The part of `new` tokens behind `row` that stays, and whether the row is finished. scores [T, V] of the new tokens."""
        for place, token in enumerate(new):
            upto = new[: place + 1]
            if token in self.ends or len(row) + len(upto) - self.prompts[number] >= self.most:
                return upto, True
            if self.criteria is not None:
                sequence: Any = torch.tensor([row + upto], device=scores.device)
                scored: Any = scores[place][None]
                if bool(self.criteria(sequence, scored).all()):
                    return upto, True
        return new, False

    def left(self, number: int, row: list[int]) -> int:
        """New tokens that the row may still get."""
        return self.most - (len(row) - self.prompts[number])


@dataclass
class _Job:
    """One call of `generate`: the rows that are not finished, and the two models at their places."""

    target: Rewindable
    source: Drafter | None
    choice: Choice
    lookahead: Fixed | Auto
    branching: tuple[int, ...] | None
    stops: _Stops
    rows: Rows
    streamer: Any
    generator: torch.Generator | None
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    seconds: float = 0.0
    done: dict[int, list[int]] = field(default_factory=dict)

    def run(self) -> list[list[int]]:
        """Rounds until every row is finished; returns the rows, prompts included, in their order."""
        numbers = list(range(len(self.rows)))
        self.target.start([row[:-1] for row in self.rows])
        if self.source is not None:
            self.source.start(self.rows)
            self.target.record()
        if self.streamer is not None:
            self.streamer.put(torch.tensor(self.rows))
        started = time.perf_counter()
        while numbers:
            numbers = self._round(numbers)
        self.seconds = time.perf_counter() - started
        if self.streamer is not None:
            self.streamer.end()
        return [self.done[number] for number in sorted(self.done)]

    def _round(self, numbers: list[int]) -> list[int]:
        """One round over the rows with these numbers; returns the numbers of those that go on."""
        started = time.perf_counter()
        most = max(self.stops.left(number, row) for number, row in zip(numbers, self.rows, strict=True)) - 1
        count = min(self.lookahead.next(), most) if self.source is not None else 0
        proposal = self._propose(count)
        stand, last, scores = self._verify(proposal)
        fates, kept, drafts, paths = [], list[int](), proposal.tokens.tolist(), list(map(proposal.path, stand))
        for place, (number, row) in enumerate(zip(numbers, self.rows, strict=True)):
            new = [*(drafts[place][node - 1] for node in paths[place]), last[place]]
            new, finished = self.stops.cut(number, row, new, scores[place, [0, *paths[place]]])
            row += new
            fates.append(finished)
            kept.append(min(len(paths[place]), len(new)))
            if self.streamer is not None:
                self.streamer.put(torch.tensor(new))
        self.rounds += 1
        self.drafted, self.accepted = self.drafted + sum(proposal.counts), self.accepted + sum(kept)
        self._go_back(count, proposal, stand, paths)
        self.lookahead.learn(count, kept, proposal.counts, time.perf_counter() - started)
        return self._keep(numbers, fates)

    def _propose(self, count: int) -> Proposal:
        device = self.target.device
        if self.source is None or count == 0:
            return Proposal(torch.empty(len(self.rows), 0, dtype=torch.long, device=device), [0] * len(self.rows), None)
        tokens = count if self.branching is None else len(grow(self.branching[:count], device)) - 1
        return self.source.propose(self.rows, count, self._noise(tokens))

    def _noise(self, count: int) -> Tensor:
        """Uniform random numbers [B, count]; greedy decoding needs none."""
        shape = (len(self.rows), count)
        if self.choice.greedy:
            return torch.empty(shape, device=self.target.device)
        return torch.rand(shape, generator=self.generator).to(self.target.device)

    def _verify(self, proposal: Proposal) -> tuple[list[int], list[int], Tensor]:
        """How many drafts stand in each row (of a tree: the deepest node that does), what follows them, and the scores [B, K + 1, V]."""
        drafts, device, tree = proposal.tokens, proposal.tokens.device, proposal.tree
        tokens = torch.cat((torch.tensor([row[-1:] for row in self.rows], device=device), drafts), 1)
        paths = None if tree is None else list(map(tree.path, range(len(tree))))
        scores = self.choice.scores(self.target.read(tokens, tokens.shape[1], tree), self.rows, drafts, paths)
        both = torch.stack(self._stand(scores, proposal)).tolist()
        return both[0], both[1], scores

    def _stand(self, scores: Tensor, proposal: Proposal) -> tuple[Tensor, Tensor]:
        """What the rule says: see `accept`."""
        drafts, tree, counts = proposal.tokens, proposal.tree, torch.tensor(proposal.counts, device=scores.device)
        if self.choice.greedy:
            best = scores.argmax(-1)
            return accept_greedy(best, drafts, counts) if tree is None else accept_tree_greedy(best, drafts, tree)
        p, q, noise = self.choice.probabilities(scores), proposal.probabilities, self._noise(drafts.shape[1] + 1)
        if tree is None:
            return accept(p, q, drafts, counts, noise)
        assert q is not None, "children that were drawn have distributions"
        return accept_tree(p, q, drafts, tree, noise)

    def _go_back(self, count: int, proposal: Proposal, stand: list[int], paths: list[list[int]]) -> None:
        """Leave both models behind the tokens that stand."""
        if self.source is None:
            return
        if proposal.tree is None:
            self.target.take_back([proposal.tokens.shape[1] - kept for kept in stand])
        else:
            self.target.keep(len(proposal.tree), [[0, *path] for path in paths])
        self.target.pin()
        if count:
            self.source.settle(stand)

    def _keep(self, numbers: list[int], finished: list[bool]) -> list[int]:
        if not any(finished):
            return numbers
        self.done |= {number: row for number, row, end in zip(numbers, self.rows, finished, strict=True) if end}
        kept = [place for place, end in enumerate(finished) if not end]
        self.rows = [self.rows[place] for place in kept]
        if kept:
            self.target.select(kept)
            if self.source is not None:
                self.source.select(kept)
        return [numbers[place] for place in kept]


def _rows(ids: Tensor, mask: Tensor | None) -> Rows:
    """The real tokens of each prompt."""
    if ids.ndim != 2 or not ids.shape[1]:
        raise ValueError(f"ids must be [B, T] with at least one token; got shape {list(ids.shape)}")
    if mask is None:
        return ids.tolist()
    if mask.shape != ids.shape or not bool((mask.bool().long().diff(dim=1) >= 0).all()) or not bool(mask[:, -1].all()):
        raise ValueError("attention_mask must have the shape of ids, and padding must stand on the left (tokenizer.padding_side = 'left')")
    return [[token for token, real in zip(*pair, strict=True) if real] for pair in zip(ids.tolist(), mask.tolist(), strict=True)]


def _branching(given: Sequence[int], vocabulary: int) -> tuple[int, ...]:
    branching = tuple(given)
    if not branching or any(not isinstance(children, int) or not 1 <= children <= vocabulary for children in branching):
        raise ValueError(f"tree must have a number of children for every depth, such as (3, 2, 1), each 1 to {vocabulary}; got {given!r}")
    tokens = sum(accumulate(branching, mul))
    if tokens >= KEPT:
        raise ValueError(f"tree must have at most {KEPT - 1} tokens (the cache holds the last {KEPT}); {branching} has {tokens}")
    return branching


def _check_context(name: str, model: PreTrainedModel, length: int) -> None:
    context = model.config.get_text_config().max_position_embeddings
    if set(kinds_of(model)) != {RECURRENT} and length > context:
        raise ValueError(
            f"prompt and new tokens must fit the {name}'s context of {context} tokens; they need {length}; lower max_new_tokens or shorten "
            "the prompt"
        )


def _ends(model: PreTrainedModel, given: int | Iterable[int] | str | None) -> set[int]:
    if given == "model":
        settings: Any = model.generation_config
        given = settings.eos_token_id
    if given is None:
        return set()
    assert not isinstance(given, str), "end tokens are numbers"
    return {given} if isinstance(given, int) else set(given)


def _result(ids: Tensor, new: Rows, made: _Job | Decoded, ends: set[int], model: PreTrainedModel) -> Generation:
    longest = max(map(len, new))
    settings: Any = model.generation_config
    pad = settings.pad_token_id if settings.pad_token_id is not None else min(ends, default=0)
    tail = torch.tensor([tokens + [pad] * (longest - len(tokens)) for tokens in new], device=ids.device)
    return Generation(torch.cat((ids, tail), 1), new, made.rounds, made.drafted, made.accepted, made.seconds)
