"""How closely families of structured matrices come to given causal matrices (MOHAWK, arXiv 2408.10189, Table 3).

Shapes: M matrices, T time, N state width. All functions take matrices [M, T, T] that are 0 above the diagonal.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llamba.kernels.common import lowest_exponent

NO_DECAY = -10.0  # softplus of it, times 256 tokens: 0.01


def distance(one: Tensor, other: Tensor) -> Tensor:
    """Frobenius distance of each pair [M]."""
    return (one - other).flatten(1).norm(dim=1)


def toeplitz(matrices: Tensor) -> Tensor:
    """The closest causal Toeplitz matrices: the mean of each diagonal."""
    index = torch.arange(matrices.shape[1], device=matrices.device)
    gap = index[:, None] - index  # [T, T]
    below = gap >= 0
    sums = torch.zeros_like(matrices[:, 0]).index_add_(1, gap[below], matrices[:, below])
    return (sums / (len(index) - index))[:, gap.clamp_min(0)].masked_fill(~below, 0)


def semiseparable(matrices: Tensor, states: Sequence[int]) -> dict[int, Tensor]:
    """Causal matrices of a time-varying linear system with N states, for every N of `states`, by balanced truncation.

    The state before time k that keeps every input has reachability Gramian I and observability Gramian H^T H, H = A[k:, :k]; the
    projection keeps H's first N right singular vectors. One decomposition per k serves every N: its vectors are nested.
    """
    T, widest = matrices.shape[1], max(states)
    made = {N: torch.diag_embed(matrices.diagonal(dim1=1, dim2=2)) for N in states}
    inputs: dict[int, Tensor] = {}  # [M, n, k], from the inputs before k to the state
    before = matrices[:, :0, :0]
    for k in range(1, T):
        vectors = torch.linalg.svd(matrices[:, k:, :k], full_matrices=False).Vh[:, :widest].mT  # [M, k, n]
        for N in states:
            V, old = vectors[..., :N], before[..., :N]
            write = V[:, -1, :, None]  # [M, n, 1], of the newest input
            inputs[N] = torch.cat((V[:, :-1].mT @ old @ inputs[N], write), 2) if k > 1 else write
            made[N][:, k, :k] = (matrices[:, k, None, :k] @ V @ inputs[N])[:, 0]
        before = vectors
    return made


def _mask(decay: Tensor | None, T: int, like: Tensor) -> Tensor:
    """Causal mask [T, T], or the products of decays e^(a_(j+1) + ... + a_i) [M, T, T] for a = -softplus(decay) [M, T]."""
    if decay is None:
        return torch.ones(T, T, dtype=like.dtype, device=like.device).tril()
    total = -torch.nn.functional.softplus(decay).cumsum(1)
    return (total[:, :, None] - total[:, None]).clamp(lowest_exponent(like.dtype), 0).exp().tril()


def _descend(matrices: Tensor, start: Sequence[Tensor], steps: int, lr: float) -> list[Tensor]:
    """Q, K [M, T, N] and, where `start` has it, the decays [M, T], after Adam with a cosine schedule on |mask * Q K^T - A|^2."""
    values = [value.clone().requires_grad_() for value in start]
    optimizer = torch.optim.Adam(values, lr=lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        (_product(values) - matrices).square().sum().backward()
        optimizer.step()
        schedule.step()
    return [value.detach() for value in values]


def _product(values: Sequence[Tensor]) -> Tensor:
    queries, keys, *decay = values
    return (queries @ keys.mT) * _mask(decay[0] if decay else None, queries.shape[1], queries)


def low_rank_and_ssd(matrices: Tensor, N: int, steps: int, lr: float = 0.01) -> tuple[Tensor, Tensor]:
    """Causal low-rank matrices tril(Q K^T) and SSD matrices (with one decay per token) near the given ones, by gradient descent.

    Low rank starts from the truncated singular value decomposition and takes `steps` steps. SSD starts from the low-rank fit after
    half of them, without decay, and takes the other half, so that both have the same number.
    """
    half = _descend(matrices, _truncated(matrices, N), steps - steps // 2, lr)
    low_rank = _descend(matrices, half, steps // 2, lr)
    ssd = _descend(matrices, [*half, torch.full_like(matrices[..., 0], NO_DECAY)], steps // 2, lr)
    return _product(low_rank), _product(ssd)


def _truncated(matrices: Tensor, N: int) -> list[Tensor]:
    left, values, right = torch.linalg.svd(matrices)
    root = values[:, None, :N].sqrt()
    return [left[..., :N] * root, right[:, :N].mT * root]  # Q and K [M, T, N]


def alternating(matrices: Tensor, N: int, sweeps: int) -> Tensor:
    """Causal low-rank matrices by alternating least squares: each row of Q, then each row of K, exactly.

    Far closer than gradient descent, with entries of K up to 10^6. It bounds SSD as well: a product of decays that are not 0 is
    e^(s_i) e^(-s_j), which Q and K can hold, so in exact arithmetic no SSD matrix is closer than the closest low-rank one.
    """
    flipped = matrices.mT.flip(1, 2)  # lower triangular again, with the roles of rows and columns exchanged
    queries, keys = _truncated(matrices, N)
    for _ in range(sweeps):
        queries = _best_rows(matrices, keys)
        keys = _best_rows(flipped, queries.flip(1)).flip(1)
    return (queries @ keys.mT).tril()


def _best_rows(matrices: Tensor, keys: Tensor, ridge: float = 1e-9) -> Tensor:
    """Q [M, T, N] such that each row i of Q K^T is closest to that of the matrix in columns 0 .. i."""
    moments = (keys[..., :, None] * keys[..., None, :]).cumsum(1)  # [M, T, N, N]
    size = moments.diagonal(dim1=2, dim2=3).mean(2)[..., None, None]
    moments = moments + ridge * size * torch.eye(keys.shape[2], dtype=keys.dtype, device=keys.device)
    return torch.linalg.solve(moments, (matrices @ keys)[..., None])[..., 0]
