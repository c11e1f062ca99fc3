"""Benchmark data: checked on arrival and in the cache, and a sentence that says what to do offline."""

import hashlib
from pathlib import Path

import pytest

from llamba.eval import fetch


@pytest.fixture
def file(tmp_path: Path, monkeypatch) -> Path:
    """A benchmark whose home is a file on this machine."""
    home = tmp_path / "home.jsonl"
    home.write_text('{"a": 1}\n')
    entry = fetch.File("made/made.jsonl", home.as_uri(), home.stat().st_size, hashlib.sha256(home.read_bytes()).hexdigest())
    monkeypatch.setitem(fetch.FILES, "made", (entry,))
    monkeypatch.setenv("LLAMBA_CACHE", str(tmp_path / "cache"))
    return home


def test_a_file_is_fetched_once_and_checked(file: Path) -> None:
    (line,) = fetch.fetch(["made"])
    path = fetch.data_file("made/made.jsonl", None)
    assert "SHA-256 checked" in line and path.read_bytes() == file.read_bytes() and fetch.identity(path)["published"]
    file.unlink()
    fetch.fetch(["made"])  # from the cache
    path.write_text('{"a": 2}\n')
    with pytest.raises(ValueError, match="must have SHA-256.*delete it"):
        fetch.fetch(["made"])


def test_a_changed_home_keeps_nothing(file: Path) -> None:
    file.write_text('{"a": 3}\n')
    with pytest.raises(ValueError, match="nothing was kept"):
        fetch.fetch(["made"])
    file.write_text("short")
    with pytest.raises(ValueError, match="must have 9 bytes, got 5"):
        fetch.fetch(["made"])
    assert not fetch.cache().exists() or not list(fetch.cache().rglob("*.jsonl*"))


def test_offline_says_what_to_do(file: Path) -> None:
    file.unlink()
    with pytest.raises(ValueError, match="put it at .*made.jsonl and run this again, or pass --data DIR"):
        fetch.fetch(["made"])
    with pytest.raises(ValueError, match="the benchmarks are mt_bench"):
        fetch.fetch(["nothing"])


def test_public_copies_are_the_pinned_files(public_data: Path) -> None:
    for entry in (*fetch.FILES["mt_bench"], fetch.FILES["alpaca_eval"][0]):
        assert fetch._what_is_wrong(entry, (public_data / entry.path).read_bytes()) is None
