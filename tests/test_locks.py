"""Locks name their holder, are given back by a process that dies, and refuse in one line."""

import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llamba.base.locks import LOCK, folder_lock
from llamba.cli import main
from llamba.eval.journal import Journal, read_lines

HOLD = """
import sys
from pathlib import Path
from {module} import {name}
with {name}(Path(sys.argv[1])):
    print("held", flush=True)
    input()
"""
FOLDER = {"module": "llamba.base.locks", "name": "folder_lock"}
JOURNAL = {"module": "llamba.eval.journal", "name": "Journal"}


@contextmanager
def holder(path: Path, kind: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a lock until it is killed."""
    command = [sys.executable, "-c", HOLD.format(**kind), str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def names(process: subprocess.Popen[str], path: Path) -> str:
    """A pattern: who holds it, by process, machine, time and command."""
    return rf"in use: process {process.pid} on {re.escape(platform.node())} since \d{{4}}-.* \(-c {re.escape(str(path))}\) works in it"


def test_a_folder_says_who_works_in_it_and_is_free_when_he_is_killed(tmp_path: Path) -> None:
    with holder(tmp_path, FOLDER) as other:
        with pytest.raises(ValueError, match=names(other, tmp_path)), folder_lock(tmp_path):
            pass
    assert (tmp_path / LOCK).exists()  # a killed process tidies nothing
    with folder_lock(tmp_path):
        assert (tmp_path / LOCK).exists()
    assert not (tmp_path / LOCK).exists()


def test_a_run_refuses_a_folder_in_use_in_one_line(recipe_file, capsys) -> None:
    path = recipe_file("steps=1")
    folder = path.parent / "run"
    with holder(folder, FOLDER) as other, pytest.raises(SystemExit) as caught:
        main(["run", str(path), f"output={folder}"])
    assert caught.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert re.search(names(other, folder), line) and "choose another output" in line


def test_outputs_of_an_evaluation_say_who_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "judge.jsonl"
    path.write_text('{"a": 1}\n{"a"')
    with holder(path, JOURNAL) as other:
        with pytest.raises(ValueError, match=names(other, path) + ".* choose another --out"):
            Journal(path)
    with Journal(path) as journal:  # what a killed process left is no obstacle
        journal.append({"a": 2})
    assert read_lines(path) == [{"a": 1}, {"a": 2}] and list(tmp_path.iterdir()) == [path]


def test_a_journal_that_cannot_be_read_gives_its_lock_back(tmp_path: Path) -> None:
    path = tmp_path / "judge.jsonl"
    path.write_text("broken\n")
    for _ in range(2):
        with pytest.raises(ValueError, match="line 1 must be a JSON object"):
            Journal(path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_lock_without_a_holders_name_is_a_lock(tmp_path: Path) -> None:
    with holder(tmp_path, FOLDER):
        (tmp_path / LOCK).write_text("")
        with pytest.raises(ValueError, match="in use: another process works in it"), folder_lock(tmp_path):
            pass
