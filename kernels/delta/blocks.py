"""One block of chunks of the chunked delta rule, forward and backward, from its decayed products.

Inside a chunk the updates U solve (I + diag(erase) tril(K K^T, -1)) U = write V - erase K S^T (the UT transform, arXiv 2406.06484), and
both sides are linear in the state S before the chunk, so chunk after chunk only S <- S transfer + added remains.
Shapes: K chunks, B batch, Q tokens of a chunk, H query heads, G key/value heads, P head width, N state width.
"""

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


def solve(products: Products, rule: Rule, state: Tensor) -> Solved:
    """The updates of a block and its states, from `state` [B, H, P, N] before it."""
    system = rule.erase[..., None] * products.overlap
    values = _written(rule)
    P, N = values.shape[-1], products.probe.shape[-1]
    right = torch.cat((values, rule.erase[..., None] * products.probe), -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    written, probing = solved.split([P, N], -1)
    added, lost = torch.matmul(solved.mT, products.leave).split([P, N], -2)  # [K, B, H, P, N], [K, B, H, N, N]
    transfer = lost.neg()
    transfer.diagonal(dim1=-2, dim2=-1).add_(products.across)
    states = torch.empty(len(added) + 1, *state.shape, dtype=added.dtype, device=added.device)
    states[0] = state
    for k in range(len(added)):
        torch.baddbmm(added[k].flatten(0, 1), states[k].flatten(0, 1), transfer[k].flatten(0, 1), out=states[k + 1].view(-1, P, N))
    updates = written - torch.matmul(probing, states[:-1].mT)
    return Solved(system, written, probing, transfer, states, updates)


def outputs(products: Products, solved: Solved) -> Tensor:
    """y [K, B, H, Q, P]."""
    return torch.matmul(products.read, solved.states[:-1].mT).add_(torch.matmul(products.mixing, solved.updates))


def backward(products: Products, rule: Rule, solved: Solved, dy: Tensor, dlast: Tensor) -> tuple[Products, Rule, Tensor]:
    """Gradients of products, rule and the state before the block, from dy [K, B, H, Q, P] and dlast [B, H, P, N]."""
    states, updates = solved.states[:-1], solved.updates
    inside = torch.matmul(products.mixing.mT, dy)  # of the updates, through the outputs of their own chunk
    reach = torch.matmul(dy.mT, products.read).sub_(torch.matmul(inside.mT, solved.probing))
    dstates = torch.empty_like(solved.states)
    dstates[-1] = dlast
    for k in reversed(range(len(reach))):
        torch.baddbmm(
            reach[k].flatten(0, 1), dstates[k + 1].flatten(0, 1), solved.transfer[k].flatten(0, 1).mT,
            out=dstates[k].view(-1, *reach.shape[-2:]),
        )  # fmt: skip
    dupdates = inside.add_(torch.matmul(products.leave, dstates[1:].mT))
    dright = torch.linalg.solve_triangular(solved.system.mT, dupdates, upper=True, unitriangular=True)  # of write V - erase K S^T
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
