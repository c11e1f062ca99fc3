"""`recipes/study.py`: two steps of every kind of arm on the embedded teacher, going on, verdicts against margins worked out by hand."""

import json
import math
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llamba.recipes import study
from llamba.recipes.real import claims
from llamba.recipes.real.arms import ARMS, SELECTED, TEACHER, Budget, Study, slug, starts
from llamba.recipes.real.exam import Size, likelihoods
from llamba.recipes.real.questions import Question, pairs, questions
from llamba.settings import Distill, Dpo, Hidden, Sft

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # TRL asks by the old name
ROOT = Path(__file__).parent.parent
EMBEDDED = ROOT / "recipes" / "tiny" / "teacher"
sys.path.insert(0, str(EMBEDDED.parent))

import language  # noqa: E402

LENGTH = 64
BUDGET = Budget(tokens=4 * LENGTH, aligned=4 * LENGTH, pairs=4, batch=2, length=LENGTH)  # two steps a stage
SIZE = Size(chats=4, text=2, length=LENGTH, questions=3, names=(2,), trials=2, new_tokens=4, reasoning=4)


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> dict[str, str]:
    """Chats, a text and GSM8K's file, small."""
    folder, rng = tmp_path_factory.mktemp("given"), random.Random(0)
    rows = [{"messages": language.conversation(rng, 160)} for _ in range(240)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "text.txt").write_text(" ".join(message["content"] for row in rows[:20] for message in row["messages"]))
    (folder / "gsm8k").mkdir()
    (folder / "gsm8k" / "test.jsonl").write_text(json.dumps({"question": "What is 2 + 2?", "answer": "It is 4.\n#### 4"}) + "\n")
    return {"data": str(folder / "chats.jsonl"), "text": str(folder / "text.txt"), "math": str(folder / "gsm8k" / "test.jsonl")}


def choices(given: dict[str, str], out: Path, **more) -> study.Choices:
    own = dict(teacher=str(EMBEDDED), output=str(out / "study"), results=str(out / "rows.jsonl"), seeds=1, questions=1)
    return study.Choices(**own | given | more)


def test_two_steps_of_the_whole_path(given, tmp_path: Path, capsys) -> None:
    """Every kind of start and of stage; rows, table, weights that go; and a second call that trains nothing."""
    only = "teacher,50,25-selected-layers,50-no-mixers-all-trained,25-no-alignment-by-steps,50-sft,50-dpo"
    asked = choices(given, tmp_path, only=only)
    table = study.do(asked, BUDGET, SIZE)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["arm"] for row in rows] == asked.arms() and all(row["commit"] and row["hardware"] for row in rows)
    by_name = {name: scores for row in rows for name, scores in row["scores"].items()}
    assert abs(by_name["teacher"]["chat KL"]) < 0.02 < by_name["50%, no mixers, all trained"]["chat KL"]  # the teacher's: bf16 alone
    assert by_name["50%, recurrence off"]["chat KL"] != by_name["50%"]["chat KL"] and "GSM8K, %" in by_name["50%"]
    assert all(math.isfinite(value) for scores in by_name.values() for value in scores.values())
    metrics = [json.loads(line) for line in (tmp_path / "study/arms/50-0/1-distill/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics if "loss" in line] == [1, 2]
    left = {path.parent.parent.name for path in (tmp_path / "study/arms").glob("*/*/model.safetensors")}
    assert left == {"aligned-0", "50-sft-0"}  # other arms, not done here, start from these; and from "50%", of which the third ...
    assert (tmp_path / "study/table.md").read_text() == table and table.count("| not measured |") > 5
    capsys.readouterr()
    assert study.do(asked, BUDGET, SIZE) == table and "chat KL" not in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"holds a study with mixer=auto, not mamba2"):
        study.do(replace(asked, mixer="mamba2"), BUDGET, SIZE)
