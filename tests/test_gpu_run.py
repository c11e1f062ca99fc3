"""`make gpu`: parts with limits of their own, rows that are kept, and going on. Quick stand-ins here; the real dry run is slow."""

import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_hopper import launched
from triton_tools import needs_interpreter

from llamba.bench import gpu, pieces, teacher
from llamba.bench.smoke_cases import cases
from llamba.cli import main


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _part(code: str, seconds: int = 20, rows: bool = False) -> gpu.Part:
    command = (sys.executable, "-c", code)
    return gpu.Part("stand-in", command, command, seconds, seconds, rows)


@pytest.fixture
def parts(monkeypatch):
    writes = "import sys, json; open(sys.argv[2], 'w').write(json.dumps({'bench': 'x', 'value': 3}) + '\\n')"
    made = {
        "good": _part(writes, rows=True),
        "bad": _part("print('the whole reason'); raise SystemExit(3)"),
        "slow": _part("import time; time.sleep(60)", seconds=1),
        "last": _part("print('done')"),
    }
    monkeypatch.setattr(gpu, "PARTS", made)
    monkeypatch.setattr(gpu, "TEACHER", _part("print('taught')"))
    return made


def test_a_failing_part_takes_no_other_with_it_and_a_rerun_skips_what_passed(parts, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    assert not gpu.run(out, dry=True, minutes=1)
    rows = _rows(out)
    assert [(row["part"], row.get("status")) for row in rows] == [
        ("good", None), ("good", "passed"), ("bad", "failed"), ("slow", "out of time"), ("last", "passed"),
        ("teacher", "passed"),
    ]  # fmt: skip
    assert rows[0]["value"] == 3 and all(row["dry"] for row in rows)
    assert "the whole reason" in rows[2]["printed"]
    out.write_text(out.read_text() + '{"bench": "part", "sta')  # as a kill leaves it
    parts["bad"] = parts["slow"] = _part("pass")
    assert gpu.run(out, dry=True, minutes=1)
    assert [row["part"] for row in _rows(out)[6:]] == ["bad", "slow"]
    assert not gpu.run(out, dry=False, minutes=0.05), "dry rows are not rows"


def test_without_a_gpu_it_says_what_to_do(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "gpu"])
    assert ended.value.code == 2 and "--dry" in capsys.readouterr().err


@pytest.mark.slow
def test_dry_run_killed_and_gone_on_with(tmp_path: Path) -> None:
    out, command = tmp_path / "rows.jsonl", [sys.executable, "-m", "llamba", "bench", "gpu", "--dry", "--out", str(tmp_path / "rows.jsonl")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, start_new_session=True)
    while not (out.exists() and '"status"' in out.read_text()) and process.poll() is None:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    ended = [row["part"] for row in _rows(out) if row.get("bench") == "part" and row["status"] == "passed"]
    assert sorted(ended) == sorted([*gpu.PARTS, "teacher"]) and "passed before" in done.stdout
    assert {row.get("bench") for row in _rows(out)} >= {"smoke", "decode", "train", "mfu", "teacher"}
    assert {row["part"] for row in _rows(out) if row.get("bench") != "part"} >= {
        "smoke",
        "decode",
        "speculative",
        "train",
        "mfu",
        "teacher",
    }


@needs_interpreter
def test_smoke_launches_every_kernel(monkeypatch) -> None:
    """Kernels that only note their launch: what they would have written does not matter here."""
    kernels, seen = launched(Path(__file__).parent.parent / "kernels"), set()

    class Noted:
        def __init__(self, name: str):
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]):
            return lambda *args, **named: seen.add(self.name)

    for path in (Path(__file__).parent.parent / "kernels").rglob("triton_*.py"):
        module = importlib.import_module(f"llamba.kernels.{path.parent.name}.{path.stem}")
        for name in kernels & set(vars(module)):
            monkeypatch.setattr(module, name, Noted(name))
    for case in cases(torch.float32, "cpu").values():
        case()
    assert seen == kernels


# --- the second call: a teacher and its chats, carried there ---------------------------------------------------------------------------


def test_a_pack_is_a_call_of_its_own_for_all_of_the_time(parts) -> None:
    assert list(gpu.parts(True, 6, None)) == [*parts, "teacher"] and list(gpu.parts(False, 6, None)) == list(parts)
    chosen = gpu.parts(False, 8, ["a/1", "a/2"])
    assert list(chosen) == ["teacher"] and chosen["teacher"].seconds == 480
    asked = " ".join(chosen["teacher"].command)
    assert asked.endswith("--pack a/1 a/2 --minutes 7.67"), "the rest is for its last row"


def _packed(folder: Path) -> list[Path]:
    (folder / "content" / "rows").mkdir(parents=True)
    (folder / "content" / "model").write_bytes(os.urandom(5000))
    (folder / "content" / "rows" / "tokens").write_bytes(b"tokens")
    return pieces.split(folder / "content", folder / "out", 2000)


def test_pieces_are_small_and_make_the_whole_again(tmp_path: Path) -> None:
    made = _packed(tmp_path)
    assert len(made) == 3 and max(path.stat().st_size for path in made) <= 2000
    whole = pieces.joined([tmp_path / "out" / number for number in "213"], tmp_path / "again")
    for name in ("model", "rows/tokens"):
        assert (whole / name).read_bytes() == (tmp_path / "content" / name).read_bytes()


def test_pieces_that_are_missing_or_damaged_are_one_line(tmp_path: Path) -> None:
    made = _packed(tmp_path)
    with pytest.raises(ValueError, match="all pieces of one whole are needed .*; got .*piece-1-of-3"):
        pieces.joined([tmp_path / "out" / "1", tmp_path / "out" / "3"], tmp_path / "again")
    made[1].write_bytes(bytes(len(made[1].read_bytes())))
    with pytest.raises(ValueError, match="the pieces must have SHA-256 .* together, got .*carry them again"):
        pieces.joined([tmp_path / "out" / number for number in "123"], tmp_path / "again")


def test_the_learning_rate_follows_the_clock() -> None:
    rates = [teacher.share_of_rate(passed) for passed in (0, 0.015, 0.03, 0.5, 1, 1.2)]
    assert rates == pytest.approx([0, 0.5, 1, 0.05 + 0.95 * (1 + math.cos(math.pi * 0.47 / 0.97)) / 2, 0.05, 0.05])


def test_a_teacher_is_distilled_for_the_time_given_and_each_row_is_kept(tmp_path: Path, small) -> None:
    """On random tokens a student learns nothing but these, so that the held-out rows are the trained ones."""
    made = small.llama(64)
    teacher.random_rows(tmp_path, 64, 200, 4)  # longer than the window, within which a fresh student is its teacher
    rows = {split: teacher.Rows(tmp_path / "train") for split in ("train", "eval")}
    seen: list[dict] = []
    teacher.train(made, rows, teacher.Plan(time.perf_counter() + 8, 2, 8, 2.0, torch.float32, "cpu"), seen.append)
    assert [row["phase"] for row in seen][0] == "untrained" and {row["phase"] for row in seen} == {"untrained", "hidden", "distill"}
    assert [row["tokens"] for row in seen] == sorted(row["tokens"] for row in seen) and seen[-1]["seconds"] < 12
    assert seen[-1]["held_out_kl"] < 0.9 * seen[0]["held_out_kl"]
    assert all(row["loss"] > 0 for row in seen[1:])
