"""A model's next messages: its own chat template, batched, drafted or not, the same whoever the neighbours are.

Shapes: B rows of a batch, T tokens, V vocabulary. A row's randomness depends on its own seed and position alone, not on its neighbours,
nor on speculation: sampling is a greedy choice among scores with noise (Gumbel), so a draft that guesses the noisy choice is right.
"""

import hashlib
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)

from llamba.chat.conversation import load, load_draft
from llamba.eval.judge import digest
from llamba.speculative import generate

Message = dict[str, str]
LOOKUP = "lookup"
LOOKAHEAD = 4  # tokens drafted a round; fixed, since one that follows the clock would give other sums on every run


@dataclass(frozen=True)
class Settings:
    """How answers are made. `draft` names a smaller model that speculates, or "lookup"; the answers stay the same but for rounding.
    `bits` 8 answers with 8-bit weights.
    """

    batch: int = 8
    max_new_tokens: int = 1024
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    draft: str | None = None
    system: str | None = None
    bits: int | None = None

    def __post_init__(self) -> None:
        if self.batch < 1 or self.max_new_tokens < 1:
            raise ValueError(f"--batch and --max-new-tokens must be at least 1, got {self.batch} and {self.max_new_tokens}")


@dataclass(frozen=True)
class Answered:
    """One answer. `stopped`: "end" (the model ended it), "length" (max_new_tokens), "context" (no room; the text may be empty)."""

    text: str
    tokens: int
    stopped: str


class Gumbel(LogitsProcessor):
    """Turns greedy choice into sampling: scores / temperature + Gumbel noise (Gumbel-max trick), noise from (seed, position).

    scores [B, V]. Rows at temperature 0 stay greedy. `width`: prompt tokens of the batch.
    """

    def __init__(self, temperatures: Sequence[float], seeds: Sequence[str], width: int) -> None:
        self.temperatures, self.seeds, self.width = temperatures, seeds, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        scores = scores.float().clone()
        for row, temperature in enumerate(self.temperatures):
            if temperature > 0:
                scores[row] = scores[row] / temperature + self._noise(row, input_ids.shape[1] - self.width, scores)
        return scores

    def _noise(self, row: int, position: int, scores: Tensor) -> Tensor:
        seed = hashlib.sha256(f"{self.seeds[row]}/{position}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(seed[:8]) >> 1)
        uniform = torch.rand(scores.shape[-1], generator=generator, dtype=torch.float64).clamp_min(1e-300)
        return -torch.log(-torch.log(uniform)).to(scores)


class GumbelOfRows(LogitsProcessor):
    """`Gumbel` for rows that come one at a time, each with its own tokens so far (`llamba.speculative`); told apart by their prompts.

    No prompt may begin with another.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], temperatures: Sequence[float], seeds: Sequence[str]) -> None:
        self.one = {tuple(p): Gumbel([t], [s], len(p)) for p, t, s in zip(prompts, temperatures, seeds, strict=True)}
        self.widths = sorted({len(prompt) for prompt in self.one})

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        tokens = tuple(input_ids[0].tolist())
        return next(self.one[tokens[:width]] for width in self.widths if tokens[:width] in self.one)(input_ids, scores)


class Room(StoppingCriteria):
    """Stops each row where its own context is full. `limits` [B]: new tokens that fit."""

    def __init__(self, limits: Tensor, width: int) -> None:
        self.limits, self.width = limits, width

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return (input_ids.shape[1] - self.width >= self.limits).to(input_ids.device)


class Answerer:
    """A loaded model that answers batches. Raises ValueError for a tokenizer without a chat template, or a draft of another vocabulary."""

    def __init__(self, name: str, settings: Settings) -> None:
        self.settings = settings
        self.model, self.tokenizer = load(name, settings.dtype, settings.device, settings.bits)
        if self.tokenizer.chat_template is None:
            raise ValueError(f"{name} needs a tokenizer with a chat template to be asked questions; its tokenizer has none")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.draft = self._load_draft(settings.draft)
        self.context = self.model.config.max_position_embeddings
        self.drafted = self.accepted = 0  # tokens
        logging.getLogger(MaxLengthCriteria.__module__).setLevel(logging.ERROR)  # it takes padding for context; `Room` does not

    def _load_draft(self, name: str | None) -> Any:
        if name is None:
            return None
        draft = load_draft(name, self.model, self.settings.bits)
        if draft != LOOKUP and draft.config.vocab_size != self.model.config.vocab_size:
            raise ValueError(f"--draft must share the model's vocabulary of {self.model.config.vocab_size}, got {draft.config.vocab_size}")
        return draft

    def text(self, question: str) -> str:
        """A question as the model is asked it, in its template."""
        return self._texts([[{"role": "user", "content": question}]])[0]

    def length(self, question: str) -> int:
        """Tokens of a question as the model is asked it."""
        return len(self.tokenizer(self.text(question), add_special_tokens=False, verbose=False)["input_ids"])

    def _texts(self, chats: Sequence[list[Message]]) -> list[str]:
        system = [] if self.settings.system is None else [{"role": "system", "content": self.settings.system}]
        return [self.tokenizer.apply_chat_template(system + chat, tokenize=False, add_generation_prompt=True) for chat in chats]

    def template(self) -> str:
        """Hash of the chat template."""
        return digest(self.tokenizer.chat_template)[:16]

    def __call__(
        self, chats: Sequence[list[Message]], temperatures: Sequence[float], seeds: Sequence[str], max_new_tokens: int | None = None
    ) -> list[Answered]:
        """The next assistant message of each chat; a chat that does not fit the context gets an empty one."""
        prompts = self.tokenizer(self._texts(chats), add_special_tokens=False, verbose=False)["input_ids"]
        fits = [row for row, prompt in enumerate(prompts) if len(prompt) < self.context]
        made = [Answered("", 0, "context")] * len(chats)
        if fits:
            wanted, way = max_new_tokens or self.settings.max_new_tokens, self._plainly if self.draft is None else self._drafted
            new = way([prompts[r] for r in fits], [temperatures[r] for r in fits], [seeds[r] for r in fits], wanted)
            for row, ids in zip(fits, new, strict=True):
                made[row] = self._read(ids, wanted)
        return made

    @torch.inference_mode()
    def _plainly(self, prompts: list[list[int]], temperatures: list[float], seeds: list[str], wanted: int) -> list[list[int]]:
        """New tokens of each row, by transformers' generation."""
        ids, mask = self._padded(prompts)
        width, room = ids.shape[1], self.context - mask.sum(1)  # [B]
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=GenerationConfig(
                max_new_tokens=min(wanted, int(room.max())),
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=self._ends(),
            ),
            logits_processor=LogitsProcessorList([Gumbel(temperatures, seeds, width)] if any(temperatures) else []),
            stopping_criteria=StoppingCriteriaList([Room(room, width)]),
        )[:, width:]
        return [ids.tolist()[: int(left)] for ids, left in zip(out, room, strict=True)]

    def _drafted(self, prompts: list[list[int]], temperatures: list[float], seeds: list[str], wanted: int) -> list[list[int]]:
        """The same with drafts, in batches of rows that may get equally many tokens."""
        made: list[list[int]] = [[] for _ in prompts]
        for (most, drafted, _), rows in self._alike(prompts, wanted).items():
            ids, mask = self._padded([prompts[r] for r in rows])
            noise = GumbelOfRows([prompts[r] for r in rows], [temperatures[r] for r in rows], [seeds[r] for r in rows])
            found = generate(
                self.model, ids, attention_mask=mask, draft=self.draft if drafted else None, lookahead=LOOKAHEAD, max_new_tokens=most,
                eos_token_id=self._ends(), logits_processor=LogitsProcessorList([noise] if any(temperatures) else []),
            )  # fmt: skip
            self.drafted, self.accepted = self.drafted + found.drafted, self.accepted + found.accepted
            for row, new in zip(rows, found.new, strict=True):
                made[row] = new
        return made

    def _alike(self, prompts: list[list[int]], wanted: int) -> dict[tuple[int, bool, int], list[int]]:
        """Rows by new tokens that they may get and by whether the draft's context holds them; a prompt that begins another goes apart."""
        groups: dict[tuple[int, bool, int], list[int]] = defaultdict(list)
        holds = self.context if self.draft == LOOKUP else self.draft.config.max_position_embeddings
        for row, prompt in enumerate(prompts):
            most, apart = min(wanted, self.context - len(prompt)), 0
            kind = most, len(prompt) + most <= holds
            while any(all(a == b for a, b in zip(prompt, prompts[other], strict=False)) for other in groups[*kind, apart]):
                apart += 1
            groups[*kind, apart].append(row)
        return groups

    def _padded(self, prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Prompts as ids and mask [B, T], padded on the left."""
        longest, pad = max(map(len, prompts)), self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        return ids.to(self.model.device), mask.to(self.model.device)

    def _ends(self) -> list[int]:
        own = self.model.generation_config.eos_token_id
        listed = [] if own is None else [own] if isinstance(own, int) else list(own)
        return sorted({*listed, self.tokenizer.eos_token_id} - {None})

    def _read(self, ids: list[int], wanted: int) -> Answered:
        ends = self._ends()
        end = next((place for place, token in enumerate(ids) if token in ends), None)
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=True).strip()
        stopped = "end" if end is not None else "length" if len(ids) >= wanted else "context"
        return Answered(text, len(ids) if end is None else end, stopped)
