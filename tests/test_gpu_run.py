"""`make gpu`: parts with limits of their own, rows that are kept, and going on. Quick stand-ins here; the real dry run is slow."""

import importlib
import json
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

from llamba.bench import gpu
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
    return made


def test_a_failing_part_takes_no_other_with_it_and_a_rerun_skips_what_passed(parts, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    assert not gpu.run(out, dry=True, minutes=1)
    rows = _rows(out)
    assert [(row["part"], row.get("status")) for row in rows] == [
        ("good", None), ("good", "passed"), ("bad", "failed"), ("slow", "out of time"), ("last", "passed"),
    ]  # fmt: skip
    assert rows[0]["value"] == 3 and all(row["dry"] for row in rows)
    assert "the whole reason" in rows[2]["printed"]
    out.write_text(out.read_text() + '{"bench": "part", "sta')  # as a kill leaves it
    parts["bad"] = parts["slow"] = _part("pass")
    assert gpu.run(out, dry=True, minutes=1)
    assert [row["part"] for row in _rows(out)[5:]] == ["bad", "slow"]
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
    assert sorted(ended) == sorted(gpu.PARTS) and "passed before" in done.stdout
    assert {row.get("bench") for row in _rows(out)} >= {"smoke", "decode", "train", "mfu"}
    assert {row["part"] for row in _rows(out) if row.get("bench") != "part"} >= {"smoke", "decode", "speculative", "train", "mfu"}


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
