"""Families of structured matrices: each finds its own members, and beats what is not the best."""

import argparse
import json
import random
from pathlib import Path

import pytest
import torch
from language import conversation

from llamba.bench import matrices as bench
from llamba.cli import main
from llamba.kernels.ssd import ssd_matrix
from llamba.training.structured_matrices import alternating, distance, low_rank_and_ssd, semiseparable, toeplitz

T = 24
TEACHER = Path(__file__).parent.parent / "recipes" / "tiny" / "teacher"


def softmax_attention(count: int = 3) -> torch.Tensor:
    torch.manual_seed(0)
    scores = torch.randn(count, T, 6, dtype=torch.float64) @ torch.randn(count, 6, T, dtype=torch.float64)
    return scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(-1)


def ssd_members(states: int) -> torch.Tensor:
    """Matrices of the SSD recurrence with `states` coordinates."""
    torch.manual_seed(1)
    a = -torch.rand(3, T, 1, dtype=torch.float64) * 0.5
    b, c = (torch.randn(3, T, 1, states, dtype=torch.float64) for _ in range(2))
    return ssd_matrix(a, b, c)[:, 0]


def test_toeplitz_is_the_least_squares_fit() -> None:
    """Oracle: least squares on the basis of shifted diagonals."""
    wanted = softmax_attention()
    basis = torch.stack([torch.diag(torch.ones(T - k), -k).flatten() for k in range(T)], 1).double()
    best = torch.linalg.lstsq(basis, wanted.flatten(1).mT).solution
    assert torch.allclose(toeplitz(wanted), (basis @ best).mT.view(3, T, T), atol=1e-12)


def test_semiseparable_finds_its_members_and_nears_others_as_states_grow() -> None:
    members = ssd_members(4)
    made = semiseparable(members, (3, 4, 8))
    assert distance(made[4], members).max() < 1e-10 and distance(made[8], members).max() < 1e-10
    assert distance(made[3], members).min() > 1e-2
    wanted = softmax_attention()
    errors = [distance(fit, wanted) for fit in semiseparable(wanted, (1, 2, 4, 12)).values()]
    assert all(bool((more > less).all()) for more, less in zip(errors, errors[1:], strict=False)) and errors[-1].max() < 1e-10
    assert torch.equal(semiseparable(wanted, (2,))[2], semiseparable(wanted, (2, 12))[2])
    for N, fit in semiseparable(wanted, (2, 5)).items():  # what it makes is what it says: no block below the diagonal has more than rank N
        assert all(int(torch.linalg.matrix_rank(fit[0, k:, :k], rtol=1e-9)) <= N for k in range(1, T))
        assert torch.equal(fit.triu(1), torch.zeros_like(fit))


def test_low_rank_finds_its_members() -> None:
    torch.manual_seed(0)
    members = (torch.randn(3, T, 3).double() @ torch.randn(3, 3, T).double()).tril()
    assert (distance(alternating(members, 3, 60), members) < 1e-3 * members.flatten(1).norm(dim=1)).all()
    fits = low_rank_and_ssd(members, 3, 3000, lr=0.05)
    assert all((distance(fit, members) < 0.02 * members.flatten(1).norm(dim=1)).all() for fit in fits)


def test_ssd_forgets_where_low_rank_cannot() -> None:
    """Members of SSD with strong decay: with the same number of steps from the same start, decays help."""
    members = ssd_members(2)
    low_rank, ssd = low_rank_and_ssd(members, 2, 1000, lr=0.03)
    assert distance(ssd, members).mean() < 0.8 * distance(low_rank, members).mean()
    assert torch.equal(ssd.triu(1), torch.zeros_like(ssd))


def test_least_squares_falls_with_every_sweep_and_is_closer_than_descent() -> None:
    wanted = softmax_attention()
    errors = [distance(alternating(wanted, 4, sweeps), wanted) for sweeps in (1, 2, 5, 20)]
    assert all(bool((more >= less - 1e-9).all()) for more, less in zip(errors, errors[1:], strict=False))
    assert (errors[-1] < distance(low_rank_and_ssd(wanted, 4, 200)[0], wanted)).all()


def test_the_command_prints_the_table_and_says_where_the_order_differs(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(bench, "STATES", (2, 4))
    monkeypatch.setattr(bench, "SWEEPS", 2)
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps({"messages": conversation(random.Random(index), 96)}) + "\n" for index in range(4)))
    options = [
        "--matrices",
        "9",
        "--length",
        "40",
        "--steps",
        "6",
        "--picture",
        str(tmp_path / "x.png"),
        "--out",
        str(tmp_path / "x.jsonl"),
    ]
    main(["bench", "matrices", "--model", str(TEACHER), "--data", str(data), *options])
    printed = capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [line["N"] for line in lines] == [2, 4] and lines[0]["matrices"] == 9 and lines[0]["Toeplitz"] == lines[1]["Toeplitz"]
    assert f"| 4 | {lines[1]['Toeplitz']:.3f} ±" in printed and printed.count("N = ") == 2
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_remarks_name_what_differs() -> None:
    row = {"N": 16, "Toeplitz": 9.0, "low-rank": 1.0, "SSD": 0.5, "semiseparable": 0.2}
    assert bench.remarks([row]) == ["N = 16: Toeplitz >> low-rank > SSD > semiseparable, as in the paper"]
    assert bench.remarks([row | {"SSD": 1.5}]) == ["N = 16: low-rank 1 is not above 1x SSD 1.5"]
    assert "Toeplitz 2 is not above 3x low-rank 1" in bench.remarks([row | {"Toeplitz": 2.0}])[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [({"model": None}, "needs --model and --data"), ({"length": 64}, "--length > 64"), ({"steps": 1}, "--steps >= 2")],
)
def test_bad_arguments(change: dict, words: str) -> None:
    given = {"model": str(TEACHER), "data": ["x.jsonl"], "matrices": 1, "length": 65, "steps": 2, "picture": None, "out": None}
    with pytest.raises(ValueError, match=words):
        bench.main(argparse.Namespace(**(given | change)))
