"""Rounds of decoding as device work alone, captured in CUDA graphs; elsewhere the same functions run as they are.

Shapes: B batch, T = K + 1 tokens of a round, K drafted tokens, V vocabulary, M the most that K may be. A round drafts K tokens one after
the other, evaluates the last token and them at once, keeps what stands, and writes what it emitted to `mail`, the one thing that the host
reads. Rows that are done go on with nothing. There are two graphs for each (batch, K): the draft's steps, and all the rest.
"""

import logging
import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llamba.speculative import static
from llamba.speculative.accept import accept, accept_greedy
from llamba.speculative.lookahead import Auto, Fixed
from llamba.speculative.sampling import Sampler
from llamba.speculative.static import Static

ENGINES = ("auto", "eager", "graphs")
KEPT_DECODERS = 6  # of a model, with their caches and graphs; the oldest leaves
LEAST_SLOTS = 256

logger = logging.getLogger("llamba.speculative")


def power_of_2(least: int) -> int:
    """The smallest power of 2 that is at least `least`."""
    return 1 << max(least - 1, 0).bit_length()


def capture(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """`run` as a CUDA graph, after two runs that compile and allocate; on other devices `run` itself."""
    if device.type != "cuda":
        return run
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        run()
        run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


class Decoder:
    """`model`, and perhaps a `draft`, with room for B rows of up to `slots` tokens and rounds of up to `most` drafted ones."""

    def __init__(
        self, model: PreTrainedModel, draft: PreTrainedModel | None, rows: int, slots: int, most: int, sampler: Sampler, ends: int
    ):
        self.device, self.sampler, self.most, self.slots = model.device, sampler, most, slots
        self.target = Static(model, rows, slots, most + 1)
        self.draft = None if draft is None else Static(draft, rows, slots, most + 1)

        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=self.device)

        self.last, self.left, self.done = zeros(rows), zeros(rows), zeros(rows, dtype=torch.bool)
        self.done.fill_(True)
        self.ends, self.noise = zeros(ends).fill_(-1), zeros(rows, 2 * most + 1, dtype=torch.float32)
        self.unread, self.missing = zeros(rows, 2), zeros(rows) + 1  # tokens that the draft has not read, and how many they are
        self.drafts, self.mail = zeros(rows, most), zeros(rows, most + 5)
        self.drawn: Tensor | None = None  # [B, M, V] what drafts were drawn from
        if draft is not None and not sampler.greedy:
            wide = torch.promote_types(model.dtype, torch.float32)
            self.drawn = zeros(rows, most, model.config.get_text_config().vocab_size, dtype=wide)
        self.rounds: dict[int, list[Callable[[], None]]] = {}

    def round(self, count: int) -> list[Callable[[], None]]:
        """What a round of `count` drafted tokens calls, captured when it is first asked for."""
        if count not in self.rounds:
            before = self.done.clone()
            self.done.fill_(True)  # a round without rows changes nothing
            parts = [lambda: self._propose(count)] if count and self.draft is not None else []
            self.rounds[count] = [capture(part, self.device) for part in (*parts, lambda: self._verify(count))]
            self.done.copy_(before)
        return self.rounds[count]

    def start(self, model: PreTrainedModel, draft: PreTrainedModel | None, prompts: list[list[int]], new: int, ends: set[int]) -> None:
        """Read the prompts but for their last tokens. Raises ValueError where they and `new` tokens overflow the static cache."""
        longest = max(map(len, prompts)) + new
        if longest + self.most > self.slots and (self.target.placed or (self.draft is not None and self.draft.placed)):
            raise ValueError(
                f"the static cache has {self.slots} slots a row; prompt, new tokens and a round need {longest + self.most}; lower "
                "max_new_tokens, shorten the prompt, or make a cache with more slots"
            )
        self.target.start(model, [prompt[:-1] for prompt in prompts])
        if self.draft is not None and draft is not None:
            self.draft.start(draft, [prompt[:-1] for prompt in prompts])
        count = len(prompts)
        self.last[:count] = self.unread[:count, 0] = torch.tensor([prompt[-1] for prompt in prompts], device=self.device)
        self.missing.fill_(1)
        self.left.fill_(new)
        self.done.fill_(False)[count:] = True
        self.ends.fill_(-1)[: len(ends)] = torch.tensor(sorted(ends), dtype=torch.long, device=self.device)

    def _propose(self, count: int) -> None:
        """Draft `count` tokens a row into `drafts`. Only device work."""
        assert self.draft is not None
        live = (~self.done).long()
        logits = self.draft.read(self.unread, self.missing * live, keep=True)  # [B, 2, V]
        self.draft.commit(self.missing * live)
        logits = logits.gather(1, (self.missing - 1)[:, None, None].expand(-1, 1, logits.shape[-1]))[:, 0]
        for place in range(count):
            token, weights = self.sampler.sample(logits, self.noise[:, place])
            self.drafts[:, place] = token
            if weights is not None and self.drawn is not None:
                self.drawn[:, place] = weights
            if place + 1 < count:
                logits = self.draft.read(token[:, None], live, keep=False)[:, -1]
                self.draft.commit(live)

    def _verify(self, count: int) -> None:
        """Evaluate the last token and `count` drafts, keep what stands, and note it in `mail`. Only device work."""
        before, live, drafts = self.target.at.length.clone(), ~self.done, self.drafts[:, :count]
        logits = self.target.read(torch.cat((self.last[:, None], drafts), 1), live * (count + 1), keep=count == 0)
        offered = torch.minimum(live * count, (self.left - 1).clamp_min(0))  # no row gets more than it may
        if self.sampler.greedy:
            stand, token = accept_greedy(logits.argmax(-1), drafts, offered)
        else:
            drawn = None if self.drawn is None else self.drawn[:, :count]
            stand, token = accept(self.sampler.probabilities(logits), drawn, drafts, offered, self.noise[:, count : 2 * count + 1])
        emitted = torch.cat((drafts, token[:, None]), 1).scatter(1, stand[:, None], token[:, None])  # [B, T]
        kept, ended = self._cut(emitted, stand + 1)
        kept = kept * live
        self.target.commit(kept)
        self._settle_draft(count, before, stand, emitted, live)
        self.last.copy_(torch.where(live, token, self.last))
        self.left.sub_(kept)
        self.done.logical_or_(ended | (self.left <= 0))
        self.mail[:, : count + 1] = emitted
        self.mail[:, -4:] = torch.stack((kept, stand * live, offered, self.done.long()), 1)

    def _cut(self, emitted: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """How many of each row's `size` tokens remain: up to the first end token; and whether there was one."""
        counts = torch.arange(emitted.shape[1], device=self.device)
        is_end = (emitted[..., None] == self.ends).any(-1) & (counts < size[:, None])  # [B, T]
        first = torch.where(is_end, counts, emitted.shape[1]).amin(1)
        return torch.minimum(size, first + 1), is_end.any(1)

    def _settle_draft(self, count: int, before: Tensor, stand: Tensor, emitted: Tensor, live: Tensor) -> None:
        """Put the draft's cursor behind what it has read of the tokens that stand, and note what it has not read."""
        if self.draft is None or not count:
            return
        every = stand == count  # then it has read neither its last draft nor what follows
        read = before + 1 + stand.clamp_max(count - 1)
        self.draft.at.length.copy_(torch.where(live, read, self.draft.at.length))
        places = torch.stack((stand - every.long(), stand), 1)
        self.unread.copy_(torch.where(live[:, None], emitted.gather(1, places), self.unread))
        self.missing.copy_(torch.where(live, 1 + every.long(), self.missing))

    def throw(self, rows: int, count: int, generator: torch.Generator | None) -> None:
        """Uniform random numbers for a round: those of the drafts, then those of the rule; made on the CPU, as plain decoding does."""
        made = torch.cat([torch.rand(rows, width, generator=generator) for width in (count, count + 1) if width], 1)
        made = made.pin_memory() if self.device.type == "cuda" else made
        self.noise[:rows, : made.shape[1]].copy_(made, non_blocking=True)

    def post(self) -> Callable[[], list[list[int]]]:
        """The mail on its way to the host; calling what is returned waits for it and opens it."""
        if self.device.type != "cuda":
            sent = self.mail.clone()
            return sent.tolist
        box, there = torch.empty(self.mail.shape, dtype=torch.long, pin_memory=True), torch.cuda.Event()
        box.copy_(self.mail, non_blocking=True)
        there.record()

        def opened() -> list[list[int]]:
            there.synchronize()
            return box.tolist()

        return opened


_decoders: weakref.WeakKeyDictionary[PreTrainedModel, dict[Any, Decoder]] = weakref.WeakKeyDictionary()


def _addresses(model: PreTrainedModel | None) -> tuple[int, ...]:
    return () if model is None else tuple(parameter.data_ptr() for parameter in model.parameters())


def decoder(
    model: PreTrainedModel, draft: PreTrainedModel | None, rows: int, tokens: int, most: int, sampler: Sampler, ends: int
) -> Decoder:
    """A decoder with room for B rows of `tokens` tokens: one used before, where it fits and the weights are where they were."""
    most = power_of_2(most) if most else 0
    shape = power_of_2(rows), max(power_of_2(tokens + most), LEAST_SLOTS), most
    options = sampler.temperature, sampler.top_k, sampler.top_p, sampler.min_p, max(power_of_2(ends), 8)
    key = (*shape, *options, None if draft is None else weakref.ref(draft), _addresses(model), _addresses(draft))
    known = _decoders.setdefault(model, {})
    found = known.pop(key, None) or Decoder(model, draft, *shape, sampler, options[-1])
    known[key] = found
    while len(known) > KEPT_DECODERS:
        del known[next(iter(known))]
    return found


@dataclass
class Decoded:
    """New tokens of each row, and counts as in `Generation`."""

    new: list[list[int]]
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    seconds: float = 0.0

    def take(self, mail: list[list[int]], streamer: Any) -> bool:
        """Note the mail of a round; returns whether every row is done."""
        for row, (*tokens, kept, stand, offered, _) in zip(self.new, mail, strict=True):
            row += tokens[:kept]
            self.drafted, self.accepted = self.drafted + offered, self.accepted + stand
            if streamer is not None and kept:
                streamer.put(torch.tensor(tokens[:kept]))
        self.rounds += any(row[-4] for row in mail)
        return all(row[-1] for row in mail)


def obstacle(model: PreTrainedModel, draft: Any, sampler: Sampler, criteria: Any) -> str | None:
    """Why rounds on the device cannot serve these arguments of `generate`, or None."""
    if draft is not None and not isinstance(draft, PreTrainedModel):
        return "the draft must be a model: other drafts look at tokens on the host"
    if sampler.processors or criteria:
        return "logits_processor and stopping_criteria look at every token on the host"
    if draft is not None and draft.device != model.device:
        return f"model and draft must be on one device; got {model.device} and {draft.device}"
    for name, one in (("model", model), ("draft", draft)):
        reason = None if one is None else static.obstacle(one)
        if reason is not None:
            return f"of the {name}: {reason}"
    return None


def runs_in_graphs(engine: str, model: PreTrainedModel, draft: Any, sampler: Sampler, criteria: Any, tree: bool) -> bool:
    """Whether `decode` is what `engine` means for these arguments of `generate`.

    Raises ValueError for an unknown engine, and for "graphs" where they cannot serve.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}; got {engine!r}")
    if engine == "eager" or (engine == "auto" and model.device.type != "cuda"):
        return False
    reason = "its rounds hold chains of drafts, no trees" if tree else obstacle(model, draft, sampler, criteria)
    if reason is not None and engine == "graphs":
        raise ValueError(f'engine="graphs" cannot serve: {reason}; use engine="eager"')
    if reason is not None:
        logger.info("decoding without CUDA graphs: %s", reason)
    return reason is None


def decode(
    model: PreTrainedModel, draft: PreTrainedModel | None, prompts: list[list[int]], new: int, sampler: Sampler, ends: set[int],
    lookahead: Fixed | Auto, streamer: Any = None, generator: torch.Generator | None = None,
) -> Decoded:  # fmt: skip
    """`generate` by a `Decoder`. With a fixed `lookahead` the host reads the mail of a round while the next one runs."""
    with torch.cuda.device(model.device) if model.device.type == "cuda" else nullcontext():
        most = 0 if draft is None else lookahead.most
        made = decoder(model, draft, len(prompts), max(map(len, prompts)) + new, most, sampler, len(ends))
        made.start(model, draft, prompts, new, ends)
        if streamer is not None:
            streamer.put(torch.tensor(prompts))
        out = _rounds(made, Decoded([[] for _ in prompts]), lookahead if most else Fixed(0), streamer, generator)
        if streamer is not None:
            streamer.end()
        return out


def _rounds(made: Decoder, out: Decoded, lookahead: Fixed | Auto, streamer: Any, generator: torch.Generator | None) -> Decoded:
    """Rounds until every row is done."""
    adapts, done, waiting, rows = isinstance(lookahead, Auto), False, None, len(out.new)
    made.round(max(lookahead.next(), 1) if adapts else lookahead.next())  # captured before the clock runs
    started = time.perf_counter()
    while not done:
        count = max(lookahead.next(), 1) if adapts else lookahead.next()  # a draft that pauses would fall behind
        parts, begun = made.round(count), time.perf_counter()
        if not made.sampler.greedy:
            made.throw(rows, count, generator)
        for part in parts:
            part()
        sent = made.post()
        opened, waiting = (sent, None) if adapts else (waiting, sent)
        if opened is not None:
            mail = opened()[:rows]
            done = out.take(mail, streamer)
            lookahead.learn(count, [row[-3] for row in mail], [row[-2] for row in mail], time.perf_counter() - begun)
    out.seconds = time.perf_counter() - started
    return out
