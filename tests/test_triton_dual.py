"""The dual form of the decode kernel, for chains and trees, in PyTorch and in the interpreter, against whole sequences in fp64."""

from typing import Any

import pytest
import torch
from test_triton_decode import KINDS, H, N, P, W, _tokens, _truth, _weights, only_new_slots_changed
from torch import Tensor
from triton_tools import corrupted, grid_backwards, needs_interpreter, poisoned, rms, within_budget

from llamba.kernels.decode import Branches, Buffers, buffers, commit, cursors, keep_paths, mamba2_steps, plan, triton_dual
from llamba.models.tree import Tree

G, SIZE = 2, 6


def branches_of(tree: Tree) -> Branches:
    return Branches(tree.ancestors, tree.windows(W))


def random_tree(size: int, draw: torch.Generator) -> Tree:
    return Tree((-1, *(int(torch.randint(0, node, (), generator=draw)) for node in range(1, size))))


def walk(
    kind: str, impl: str, dtype: torch.dtype, trees: bool, rounds: int = 8, rows: int = 2, size: int = SIZE, keep: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What rounds of random trees or chains gave, and the truth: the outputs of every node behind the tokens kept, and the last states.

    Three rounds are chains that stay, then each row keeps a path of its own; all that was never written is NaN.
    """
    draw, weights = torch.Generator().manual_seed(6), _weights(kind, dtype)
    held, at = buffers(rows, H, G, P, N, W, size, dtype, "cpu"), cursors(rows, "cpu")
    for buffer in held[1:]:
        buffer.fill_(float("nan"))
    tokens, got, want, longest = [torch.empty(0, dtype=torch.float64)] * rows, [], [], 0
    for turn in range(rounds):
        zxbcdt = _tokens(rows, size, seed=turn).to(dtype)
        tree = random_tree(size, draw) if trees and turn > 2 else Tree(tuple(range(-1, size - 1)))
        new = torch.full((rows,), size) if keep or turn <= 2 else torch.randint(min(turn % 3, 1), size + 1, (rows,), generator=draw)
        plan(at, new, size, held.x.shape[1], keep)
        before, longest = Buffers(*(buffer.clone() for buffer in held)), max(longest, int((at.length - at.folded).max()))
        with poisoned():
            out = mamba2_steps(zxbcdt, weights, held, at, impl=impl, form="dual", branches=branches_of(tree) if trees else None)
        only_new_slots_changed(before, held, at)
        kept, paths = [], torch.zeros(rows, size, dtype=torch.long)
        for row in range(rows):
            assert not out[row, new[row] :].any()
            for node in range(int(new[row])):
                behind = torch.cat((tokens[row].to(zxbcdt), zxbcdt[row, [0, *tree.path(node)]]))
                want.append(_truth(behind[None], weights)[0][0, -1])
            got.append(out[row, : new[row]])
            last = int(new[row]) - 1 if keep or turn <= 2 else int(torch.randint(-1, int(new[row]), (), generator=draw)) if new[row] else -1
            path = [0, *tree.path(last)] if last >= 0 else []
            paths[row, : len(path)] = torch.tensor(path, dtype=torch.long)
            tokens[row] = torch.cat((tokens[row].to(zxbcdt), zxbcdt[row, path]))
            kept.append(len(path))
        keep_paths(held, at, paths)
        commit(at, torch.tensor(kept))
    assert keep or longest > triton_dual.TILE, "the kept tokens fill more than one tile"
    empty = torch.zeros(H, P, N, dtype=torch.float64)
    folded = [_truth(row[None, :count], weights)[1][0] if count else empty for row, count in zip(tokens, at.folded.tolist(), strict=True)]
    return {"y": torch.cat(got), "state": held.state}, {"y": torch.stack(want), "state": torch.stack(folded)}


@pytest.mark.parametrize("trees", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_pytorch_form_equals_the_sequence_on_every_path(kind: str, trees: bool) -> None:
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        got, want = walk(kind, "torch", dtype, trees)
        for name, exact in want.items():
            assert rms(got[name].double() - exact) <= bound * rms(exact), name


@needs_interpreter
@pytest.mark.parametrize(
    ("kind", "trees", "more"),
    [
        ("mamba2", True, {"rows": 1, "rounds": 9}),
        pytest.param("discrete_mamba2", False, {}, marks=pytest.mark.slow),
        ("mamba2", False, {"keep": True, "rounds": 3}),
        pytest.param("mamba2", False, {}, marks=pytest.mark.slow),
        pytest.param("discrete_mamba2", True, {}, marks=pytest.mark.slow),
        pytest.param("mamba2", True, {"size": 20, "rounds": 6}, marks=pytest.mark.slow),
        pytest.param("mamba2", False, {"size": 1, "rounds": 30, "keep": True}, marks=pytest.mark.slow),
    ],
)
def test_the_kernel_is_within_the_error_budget(kind: str, trees: bool, more: dict[str, Any]) -> None:
    got, want = walk(kind, "triton", torch.float32, trees, **more)
    same, _ = walk(kind, "torch", torch.float32, trees, **more)
    assert bool(want["state"].any()) or more.get("size", SIZE) > SIZE, "the walk is long enough to fold, but where a round is"
    within_budget(got, same, want, 1e-5)


@needs_interpreter
def test_programs_in_any_order() -> None:
    forwards, _ = walk("mamba2", "triton", torch.float32, True, rounds=4, rows=1)
    with grid_backwards():
        backwards, _ = walk("mamba2", "triton", torch.float32, True, rounds=4, rows=1)
    assert all(torch.equal(forwards[name], backwards[name]) for name in forwards)


CORRUPTIONS = {
    "ancestors": ("other=0) != 0", "other=0) >= 0"),
    "history": ("gone += tl.sum(old_a, 0)\n    inside", "gone += 0.0 * tl.sum(old_a, 0)\n    inside"),
    "windows": ("mask=real, other=0).to(tl.int32) - (W - 1)", "mask=real, other=0).to(tl.int32) - W"),
    "fold": ("gone += tl.sum(old_a, 0)\n        tl.store", "gone += 0.0 * tl.sum(old_a, 0)\n        tl.store"),
}


@needs_interpreter
@pytest.mark.parametrize("where", ["ancestors", *(pytest.param(one, marks=pytest.mark.slow) for one in ("history", "windows", "fold"))])
def test_a_planted_corruption_is_caught(where: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(triton_dual, "fused_dual", corrupted(triton_dual, *CORRUPTIONS[where], tmp_path).fused_dual)
    got, want = walk("discrete_mamba2", "triton", torch.float32, True, rounds=9 if where in ("history", "fold") else 4, rows=1)
    with pytest.raises(AssertionError, match="worst error|relative RMS error"):
        within_budget(got, want, want, 1e-5)


def test_both_forms_agree_and_what_does_not_fit_is_named() -> None:
    weights, tokens, results = _weights("mamba2", torch.float64), _tokens(1, 3), []
    for form in ("recurrent", "dual"):
        held, at = buffers(1, H, G, P, N, W, 3, torch.float64, "cpu"), cursors(1, "cpu")
        plan(at, torch.tensor([3]), 3, held.x.shape[1], keep=True)
        results.append(mamba2_steps(tokens, weights, held, at, form=form))
    assert rms(results[0] - results[1]) <= 1e-13 * rms(results[0])
    tree = branches_of(Tree((-1, 0, 0)))
    with pytest.raises(ValueError, match='a tree needs form="dual"'):
        mamba2_steps(tokens, weights, held, at, branches=tree)
    with pytest.raises(ValueError, match='form must be "recurrent" or "dual", got \'fast\''):
        mamba2_steps(tokens, weights, held, at, form="fast")
    with pytest.raises(ValueError, match=r"branches.windows must have shape \[3, 4\], got \[3, 3\]"):
        mamba2_steps(tokens, weights, held, at, form="dual", branches=tree._replace(windows=tree.windows[:, 1:]))
