"""How tokens are chosen from logits: transformers' processors and warpers over several positions at once.

Shapes: B batch, T positions, V vocabulary.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from llamba.speculative.accept import draw


@dataclass(frozen=True)
class Sampler:
    """`temperature` 0 is greedy, and the limits then do not apply; `top_k` 0, `top_p` 1 and `min_p` 0 do not limit.

    `processors` are transformers' logits processors (repetition penalty, banned words, ...); they see what stands before each position.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)

    def __post_init__(self) -> None:
        for name, fits, needed in (
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (no limit) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p < 1, "at least 0 and below 1"),
        ):
            if not fits:
                raise ValueError(f"{name} must be {needed}; got {getattr(self, name)}")

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken."""
        return self.temperature == 0

    def _warpers(self) -> LogitsProcessorList:
        found: list[Any] = [] if self.temperature == 1 else [TemperatureLogitsWarper(float(self.temperature))]
        found += [TopKLogitsWarper(self.top_k)] if self.top_k else []
        found += [TopPLogitsWarper(self.top_p)] if self.top_p < 1 else []
        found += [MinPLogitsWarper(self.min_p)] if self.min_p > 0 else []
        return LogitsProcessorList(found)

    def scores(self, logits: Tensor, rows: list[list[int]], following: Tensor, paths: list[list[int]] | None = None) -> Tensor:
        """Processed logits [B, T, V]. Position t stands behind rows[b] and following[b, :t] ([B, T - 1] or longer).

        `paths`: in a tree, behind rows[b] and the nodes paths[t], of which node n is following[b, n - 1].
        """
        if not self.processors:
            return logits
        logits, later = logits.to(torch.promote_types(logits.dtype, torch.float32)), following.tolist()
        processors: Any = self.processors

        def behind(b: int, t: int) -> list[int]:
            return later[b][:t] if paths is None else [later[b][node - 1] for node in paths[t]]

        made = [
            processors(torch.tensor([row + behind(b, t)], device=logits.device), logits[b, t][None])
            for b, row in enumerate(rows)
            for t in range(logits.shape[1])
        ]
        return torch.cat(made).view(logits.shape)

    def probabilities(self, scores: Tensor) -> Tensor:
        """The distributions that tokens are drawn from [B, T, V], in at least fp32."""
        flat = scores.to(torch.promote_types(scores.dtype, torch.float32)).flatten(0, 1)
        unused: Any = None  # warpers look at no tokens
        return self._warpers()(unused, flat).softmax(-1).view(scores.shape)

    def sample(self, scores: Tensor, noise: Tensor) -> tuple[Tensor, Tensor | None]:
        """One token [B] from processed logits [B, V], and the distribution it was drawn from [B, V] (None: it was certain)."""
        if self.greedy:
            return scores.argmax(-1), None
        weights = self.probabilities(scores[:, None])[:, 0]
        return draw(weights, noise), weights

    def sample_several(self, scores: Tensor, count: int, noise: Tensor) -> tuple[Tensor, Tensor | None]:
        """`count` different tokens for each of T positions [B, T count], the likeliest ones or drawn without replacement.

        scores [B, T, V] processed logits; noise [B, T count]. Also returns what each token was drawn from [B, T count, V], given the
        earlier ones of its position (None: they were certain; all 0: nothing was left, and the token means nothing).
        """
        if self.greedy:
            best = scores.argmax(-1, keepdim=True)  # of equals the one that `pick` takes comes first: topk may return another
            return scores.scatter(-1, best, torch.inf).topk(count, -1).indices.flatten(1), None
        left, uniform = self.probabilities(scores).flatten(0, 1), noise.unflatten(1, (-1, count)).flatten(0, 1)  # [B T, V], [B T, count]
        tokens, weights = list[Tensor](), list[Tensor]()
        for place in range(count):
            weights.append(left / left.sum(-1, keepdim=True).clamp_min(torch.finfo(left.dtype).smallest_normal))
            tokens.append(draw(left, uniform[:, place]))
            left = left.scatter(1, tokens[-1][:, None], 0.0)
        shape = len(scores), -1
        return torch.stack(tokens, 1).view(shape), torch.stack(weights, 1).view(*shape, left.shape[-1])
