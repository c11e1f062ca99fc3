"""How many tokens fit into a study's minutes on this machine: by one forward pass of its teacher, timed."""

import time

import torch

from llamba.models.loading import load_model, located
from llamba.recipes.real.arms import ARMS, Budget

FORWARDS = 4.0  # what a trained token costs, in forward passes of the teacher
SCORED = 12_000  # forward tokens of an arm's scores
SECONDS_AN_ARM = 10.0  # of converting, loading and saving
TOKENS_OF_ALL = 17.5  # of a seed's arms, in those distilled by one that starts from aligned layers
ALIGNED = 0.5  # of these tokens: the alignment's
MOST = 2_000_000


@torch.inference_mode()
def forward_rate(teacher: str, length: int = 512, repeats: int = 3) -> float:
    """Tokens a second of the teacher's forward pass in bf16, the fastest of a few."""
    model = load_model(located(teacher), torch.bfloat16)
    tokens, spent = torch.zeros(1, length, dtype=torch.long), []
    for _ in range(repeats):
        begun = time.perf_counter()
        model(tokens, use_cache=False)
        spent.append(time.perf_counter() - begun)
    return length / min(spent)


def seconds(budget: Budget, seeds: int, rate: float) -> float:
    """What a study of all arms takes, at so many forward tokens a second."""
    arms = (len(ARMS) + 1) * (SECONDS_AN_ARM + SCORED / rate)
    return seeds * (arms + TOKENS_OF_ALL * budget.tokens * FORWARDS / rate)


def budget(minutes: float, seeds: int, rate: float) -> Budget:
    """Tokens of an arm, such that all arms take so many minutes. Raises ValueError where their scores alone take longer."""
    scores = seconds(Budget(0, 0, 0), seeds, rate)
    each = (60 * minutes - scores) / (seconds(Budget(1, 0, 0), seeds, rate) - scores)
    tokens = min(MOST, int(each) // 1_024 * 1_024)
    if tokens < 2_048:
        least = seconds(Budget(2_048, 0, 0), seeds, rate) / 60
        raise ValueError(f"minutes must be at least {least:.0f} for {seeds} seeds on this machine, got {minutes:g}; or give fewer seeds")
    return Budget(tokens=tokens, aligned=int(ALIGNED * tokens), pairs=max(8, min(800, tokens // 200)))
