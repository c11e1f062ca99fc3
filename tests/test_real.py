"""`make real` from chats to its table, in a few steps on the embedded teacher; then again, where everything is there already."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch

TINY = Path(__file__).parent.parent / "recipes" / "tiny"
sys.path.insert(0, str(TINY))

from language import conversation  # noqa: E402

from llamba.chat.conversation import load  # noqa: E402
from llamba.recipes.real import measures, real  # noqa: E402

SMALLER = {
    "LENGTH": 128, "ANSWERED": 2, "HELD_OUT": 4, "HEAD": 256, "DRAFT_TOKENS": 512, "SELECT_ROWS": 2,
    "CALIBRATED": 512, "TOKENS_A_MINUTE": {"half": 2_500, "none": 1_700},
    "QUESTIONS": ("How are you?",),
}  # fmt: skip


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """Rows of the embedded teacher's language, long enough to hold some out."""
    path = tmp_path / "chats.jsonl"
    rows = [{"messages": conversation(random.Random(f"real/{index}"), 256)} for index in range(100)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_from_chats_to_the_table_and_again_from_what_is_there(chats: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    for name, value in SMALLER.items():
        monkeypatch.setattr(real, name, value)
    monkeypatch.setattr(measures, "CONTEXTS", (64,))
    monkeypatch.setattr(real, "CONTEXTS", (64,))
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # the other tests' too
    out = tmp_path / "real"
    monkeypatch.setattr(sys, "argv", ["real.py", "minutes=1", f"data={chats}", f"output={out}", f"teacher={TINY / 'teacher'}"])
    real.main()
    first = capsys.readouterr().out
    assert "KL to the teacher" in first and "with the draft" in first and f"llamba chat {out}" in first
    report = json.loads((out / "report.json").read_text())["models"]
    assert list(report) == ["teacher", "50%, untrained", "50%", "0%, untrained", "0%"]
    assert report["50%"]["KL to the teacher"] < report["0%, untrained"]["KL to the teacher"]
    assert (out / "kl.png").stat().st_size > 10_000
    theirs, tokenizer = load(str(TINY / "teacher"))
    texts = torch.tensor([tokenizer(chats.read_text(), truncation=True, max_length=100)["input_ids"]])
    for folder in (out, Path(f"{out}-0pct")):
        with torch.no_grad():
            apart = (load(str(folder))[0](texts).logits - theirs(texts).logits)[0].abs().amax(-1)  # [T]
        assert apart[:68].max() < 1e-3 and apart[68:].max() > 1e-2, "what window and sinks see is answered as by the teacher"
    weights = sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors"))
    real.main()
    assert sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")) == weights, "nothing is trained twice"
    with pytest.raises(ValueError, match="minutes must be a number from 1 to 10,000, got 0"):
        real.read(real.Choices, ["minutes=0"])
