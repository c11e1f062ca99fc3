"""One block of chunks of the chunked delta rule, forward and backward, from its decayed products.

Inside a chunk the updates U solve (I + diag(erase) tril(K K^T, -1)) U = write V - erase K S^T (the UT transform, arXiv 2406.06484), and
both sides are linear in the state S before the chunk, so chunk after chunk only S <- S transfer + added remains.
Shapes: K chunks, B batch, Q tokens of a chunk, H query heads, G key/value heads, P head width, N state width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Products(NamedTuple):
    """What the tokens of each chunk are to each other and to the states, decays included; also the gradients of that."""

    mixing: Tensor  # [K, B, H, Q, Q] c_i . b_j, 0 for j > i
    overlap: Tensor  # [K, B, H, Q, Q] b_i . b_j, 0 for j >= i
    read: Tensor  # [K, B, H, Q, N] c_i towards the state before the chunk
    probe: Tensor  # [K, B, H, Q, N] b_i towards the state before the chunk
    leave: Tensor  # [K, B, H, Q, N] b_j towards the state after it
    across: Tensor  # [K, B, H, N or 1] what is left of the state before in the one after


class Rule(NamedTuple):
    """The values and gates of a block, in the accumulation format; also their gradients."""

    x: Tensor  # [K, B, G, Q, P]
    erase: Tensor  # [K, B, H, Q]
    write: Tensor | None  # [K, B, H, Q]


class Solved(NamedTuple):
    """The updates as functions of the state before each chunk, U = written - probing S^T, and the states."""

    system: Tensor  # [K, B, H, Q, Q] diag(erase) overlap
    written: Tensor  # [K, B, H, Q, P]
    probing: Tensor  # [K, B, H, Q, N]
    transfer: Tensor  # [K, B, H, N, N] across - probing^T leave
    states: Tensor  # [K + 1, B, H, P, N] before each chunk and after the last
    updates: Tensor  # [K, B, H, Q, P]


class Tools(NamedTuple):
    """What a batched product of matrices cannot do."""

    # The solution X of (I + tril(system, -1)) X = right, or of its transposed; system [..., Q, Q], right [..., Q, n]
    solved: Callable[[Tensor, Tensor, bool], Tensor]
    # The states [K + 1, B, H, P, N] of S <- S transfer + added from the first, or from the last backwards by the transposed
    carried: Callable[[Tensor, Tensor, Tensor, bool], Tensor]


def _solved(system: Tensor, right: Tensor, transposed: bool) -> Tensor:
    return torch.linalg.solve_triangular(system.mT if transposed else system, right, upper=transposed, unitriangular=True)


def _carried(added: Tensor, transfer: Tensor, first: Tensor, reverse: bool) -> Tensor:
    K, P, N = len(added), *first.shape[-2:]
    states = torch.empty(K + 1, *first.shape, dtype=added.dtype, device=added.device)
    states[-1 if reverse else 0] = first
    for k in reversed(range(K)) if reverse else range(K):
        before, after = (k + 1, k) if reverse else (k, k + 1)
        step = transfer[k].mT if reverse else transfer[k]
        torch.baddbmm(added[k].flatten(0, 1), states[before].flatten(0, 1), step.flatten(0, 1), out=states[after].view(-1, P, N))
    return states


IN_TORCH = Tools(_solved, _carried)


def solve(products: Products, rule: Rule, state: Tensor, tools: Tools) -> Solved:
    """The updates of a block and its states, from `state` [B, H, P, N] before it."""
    system = rule.erase[..., None] * products.overlap
    values = _written(rule)
    P, N = values.shape[-1], products.probe.shape[-1]
    right = torch.cat((values, rule.erase[..., None] * products.probe), -1)
    solved = tools.solved(system, right, False)
    written, probing = solved.split([P, N], -1)
    added, lost = torch.matmul(solved.mT, products.leave).split([P, N], -2)  # [K, B, H, P, N], [K, B, H, N, N]
    transfer = lost.neg()
    transfer.diagonal(dim1=-2, dim2=-1).add_(products.across)
    states = tools.carried(added, transfer, state, False)
    updates = written - torch.matmul(probing, states[:-1].mT)
    return Solved(system, written, probing, transfer, states, updates)


def outputs(products: Products, solved: Solved) -> Tensor:
    """y [K, B, H, Q, P]."""
    return torch.matmul(products.read, solved.states[:-1].mT).add_(torch.matmul(products.mixing, solved.updates))


def backward(products: Products, rule: Rule, solved: Solved, dy: Tensor, dlast: Tensor, tools: Tools) -> tuple[Products, Rule, Tensor]:
    """Gradients of products, rule and the state before the block, from dy [K, B, H, Q, P] and dlast [B, H, P, N]."""
    states, updates = solved.states[:-1], solved.updates
    inside = torch.matmul(products.mixing.mT, dy)  # of the updates, through the outputs of their own chunk
    reach = torch.matmul(dy.mT, products.read).sub_(torch.matmul(inside.mT, solved.probing))
    dstates = tools.carried(reach, solved.transfer, dlast, True)
    dupdates = inside.add_(torch.matmul(products.leave, dstates[1:].mT))
    dright = tools.solved(solved.system, dupdates, True)  # of write V - erase K S^T
    doverlap = torch.matmul(dright, updates.mT).neg_()
    dprobe = torch.matmul(dright, states).neg_()
    derase = (doverlap * products.overlap).sum(-1).add_((dprobe * products.probe).sum(-1))
    product = states * dstates[1:]  # [K, B, H, P, N]
    dacross = product.sum(-2) if products.across.shape[-1] > 1 else product.sum((-2, -1))[..., None]
    gradients = Products(
        torch.matmul(dy, updates.mT), doverlap.mul_(rule.erase[..., None]), torch.matmul(dy, states),
        dprobe.mul_(rule.erase[..., None]), torch.matmul(updates, dstates[1:]), dacross,
    )  # fmt: skip
    return gradients, _rule_gradients(rule, dright, derase), dstates[0]


def _written(rule: Rule) -> Tensor:
    """write V for every head, [K, B, H, Q, P]."""
    K, B, G, Q, P = rule.x.shape
    values = rule.x[:, :, :, None].expand(K, B, G, rule.erase.shape[2] // G, Q, P).reshape(K, B, -1, Q, P)
    return values if rule.write is None else values * rule.write[..., None]


def _rule_gradients(rule: Rule, dwritten: Tensor, derase: Tensor) -> Rule:
    K, B, G, Q, P = rule.x.shape
    by_head = dwritten.view(K, B, G, -1, Q, P)
    if rule.write is None:
        return Rule(by_head.sum(3), derase, None)
    dwrite = (by_head * rule.x[:, :, :, None]).sum(-1).flatten(2, 3)
    return Rule((by_head * rule.write.view(K, B, G, -1, Q, 1)).sum(3), derase, dwrite)
