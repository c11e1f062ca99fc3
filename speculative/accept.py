"""Which drafted tokens stand, and what follows them: the lossless rule as pure functions.

Shapes: B batch, K drafted tokens, V vocabulary. Row b drafted counts[b] <= K tokens; what stands behind them is ignored. A tree has
M = K + 1 nodes: node 0 is the token before all drafts, node n > 0 is drafted token n - 1.
Sources: Leviathan, Kalman, Matias 2023 (arXiv 2211.17192), Algorithm 1; Chen et al. 2023 (arXiv 2302.01318), Theorem 1; for trees Miao
et al. 2023 (SpecInfer, arXiv 2305.09781), section 4.3, with children drawn without replacement as in Jeon et al. 2024 (arXiv 2402.14160).
"""

import torch
from torch import Tensor

from llamba.models.tree import Tree


def accept_greedy(best: Tensor, drafts: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The rule where the target's distributions have one token each.

    best [B, K + 1]: the target's tokens; drafts [B, K]; counts [B]. Returns how many drafts stand [B], 0 .. counts[b], and the token
    that follows them [B].
    """
    fits = _prefix(best[:, :-1] == drafts, counts)
    return fits, best.gather(1, fits[:, None])[:, 0]


def accept(target: Tensor, draft: Tensor | None, drafts: Tensor, counts: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Accept draft x at position i if u_i q_i(x) < p_i(x); at the first rejection draw from `residual`, else from p_{counts[b]}.

    target [B, K + 1, V]: p, after temperature, top-k and the like; draft [B, K, V]: q, the distributions that `drafts` [B, K] were drawn
    from (None: each draft was certain); counts [B]; noise [B, K + 1]: independent and uniform in [0, 1). Returns how many drafts
    stand [B] and the token that follows them [B]; the tokens are then distributed as if drawn from the target alone.
    """
    p = target[:, :-1].gather(-1, drafts[..., None])[..., 0]  # [B, K]
    q = torch.ones_like(p) if draft is None else draft.gather(-1, drafts[..., None])[..., 0]
    fits = _prefix(noise[:, :-1] * q < p, counts)
    rows = torch.arange(len(fits), device=fits.device)
    last = target[rows, fits]  # [B, V]
    if drafts.shape[1]:  # without a look at the numbers, so that a CUDA graph can hold it
        rejected = fits < counts
        at = fits.clamp_max(drafts.shape[1] - 1)
        guess = torch.zeros_like(last).scatter_(1, drafts[rows, at, None], 1.0) if draft is None else draft[rows, at]
        last = torch.where(rejected[:, None], residual(last, guess), last)
    return fits, draw(last, noise[:, -1])


def accept_tree_greedy(best: Tensor, drafts: Tensor, tree: Tree) -> tuple[Tensor, Tensor]:
    """The rule for a tree where the target's distributions have one token each.

    best [B, M]: the target's token behind each node; drafts [B, K]. Returns the deepest node that stands [B], 0 if none does, and
    the token that follows it [B].
    """
    wrong = best[:, list(tree.parents[1:])] != drafts
    fallen = (torch.nn.functional.pad(wrong, (1, 0))[:, None] & tree.ancestors).any(-1)  # [B, M]
    here = (tree.depths + 1).masked_fill(fallen, 0).argmax(1)
    return here, best.gather(1, here[:, None])[:, 0]


def accept_tree(target: Tensor, draft: Tensor, drafts: Tensor, tree: Tree, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Try the children of a node in order: child x stands if u q(x) < p(x); if not, `residual` takes the place of p for the next one.

    target [B, M, V]: p behind each node; draft [B, K, V]: q, from which a child was drawn when its earlier siblings were known (all 0:
    there was nothing left to draw, and the child never stands); drafts [B, K]; noise [B, M]: independent and uniform in [0, 1).
    Returns the deepest node that stands [B], 0 if none does, and the token that follows it [B]; the tokens are then distributed as if
    drawn from the target alone.
    """
    here, p = torch.zeros_like(drafts[:, 0]), target[:, 0]
    for node, parent in enumerate(tree.parents):
        asked = here == parent
        if not node or not bool(asked.any()):
            continue
        q, token = draft[:, node - 1], drafts[:, node - 1, None]
        chance = q.gather(1, token)[:, 0]
        stands = asked & (chance > 0) & (noise[:, node - 1] * chance < p.gather(1, token)[:, 0])
        left = residual(p, q)
        left = left / left.sum(-1, keepdim=True)
        p = torch.where(stands[:, None], target[:, node], torch.where(asked[:, None], left, p))
        here = torch.where(stands, node, here)
    return here, draw(p, noise[:, -1])


def residual(target: Tensor, draft: Tensor) -> Tensor:
    """max(p - q, 0), not normalised [B, V]. Without mass, which only rounding can cause (p = q rejects nothing), p itself."""
    left = (target - draft).clamp_min(0)
    return torch.where(left.sum(-1, keepdim=True) > 0, left, target)


def draw(weights: Tensor, noise: Tensor) -> Tensor:
    """One index [B] for each row of weights [B, V] >= 0, in proportion to them; noise [B] is uniform in [0, 1)."""
    steps = weights.double().cumsum(-1)
    found = torch.searchsorted(steps, noise.double()[:, None] * steps[:, -1:], right=True)[:, 0]
    last = weights.shape[-1] - 1 - (weights > 0).flip(-1).int().argmax(-1)  # rounding never leads behind the last possible token
    return torch.minimum(found, last)


def _prefix(fits: Tensor, counts: Tensor) -> Tensor:
    """Length of the run of True at the start of each row [B, K], of its first counts[b] entries."""
    inside = torch.arange(fits.shape[1], device=fits.device) < counts[:, None]
    return (fits & inside).long().cumprod(1).sum(1)
