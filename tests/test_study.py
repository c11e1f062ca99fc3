"""`recipes/study.py`: two steps of every kind of arm on the embedded teacher, and going on; scores and verdicts against sums by hand."""

import json
import math
import random
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llamba.chat.conversation import load
from llamba.recipes import study
from llamba.recipes.real import claims, exam
from llamba.recipes.real.arms import ARMS, FITTED, TEACHER, Budget, Study, slug, starts, trained_tokens
from llamba.recipes.real.exam import DIGITS, PHONE, Size, likelihoods, recalled
from llamba.recipes.real.questions import Question, questions, write_pairs
from llamba.settings import Dpo, Recipe, Sft, Student

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # TRL asks by the old name
ROOT = Path(__file__).parent.parent
EMBEDDED = ROOT / "recipes" / "tiny" / "teacher"
sys.path.insert(0, str(EMBEDDED.parent))

import language  # noqa: E402

LENGTH = 128  # the window sees half of it
BUDGET = Budget(tokens=4 * LENGTH, calibrate=4 * LENGTH, pairs=4, batch=2, length=LENGTH)  # two steps a stage
SIZE = Size(chats=4, text=1, length=LENGTH, questions=2, names=(2,), trials=1, reasoning=4)


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> dict[str, str]:
    """Chats, a text and a question of GSM8K, in files."""
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


def weights(folder: Path) -> set[str]:
    return {path.relative_to(folder).parts[0] for path in folder.rglob("model.safetensors")}


@pytest.mark.slow
def test_two_steps_of_the_whole_path(given, tmp_path: Path, capsys) -> None:
    """Every kind of start and of stage; rows, table, weights that go; a second call that trains nothing, and one with other settings."""
    asked = choices(given, tmp_path, only="teacher,50,25-selected-layers,50-no-mixers-all-trained,50-sft,50-dpo")
    table = study.do(asked, SIZE, BUDGET)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    arms = [row for row in rows if row["measured"] == "claims"]
    assert [row["arm"] for row in arms] == asked.arms() and [row["tokens"] for row in arms] == [0, 512, 512, 512, 768, 512]
    scores = {row["arm"]: row["scores"] for row in arms}
    assert abs(scores["teacher"]["chat KL"]) < 0.02 < scores["50%, no mixers, all trained"]["chat KL"]  # the teacher's is bf16's alone
    assert arms[1]["recurrence_off"]["chat KL"] != scores["50%"]["chat KL"] and not arms[2]["recurrence_off"]
    assert [row["arm"] for row in rows if "GSM8K, %" in row["scores"]] == ["teacher", "50%"]
    assert all(math.isfinite(value) for row in rows for value in row["scores"].values())
    runs = tmp_path / "study" / "arms"
    metrics = [json.loads(line) for line in (runs / "25-selected-layers-0/1-distill/metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["step"] == 2
    assert weights(runs) == {"fitted", "start-0.5", "50-0"}  # the last is made again, for GSM8K
    assert (tmp_path / "study/table.md").read_text() == table and table.count("| not measured |") > 5
    capsys.readouterr()
    assert study.do(asked, SIZE, BUDGET) == table and "chat KL" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="other settings"):
        study.do(asked, SIZE, replace(BUDGET, tokens=8 * LENGTH))


@pytest.fixture
def recipes(monkeypatch, tmp_path: Path) -> dict[str, Recipe]:
    """Every arm's recipe, its start unmade."""
    monkeypatch.setattr(Study, "start", lambda self, arm, seed: tmp_path / arm.start)
    made = Study("org/teacher", BUDGET, "chats.jsonl", "pairs.jsonl", tmp_path, "mamba2")
    return {name: made.recipe(name, seed=9) for name in ARMS}


def test_arms_read_equally_many_tokens(recipes) -> None:
    """Oracle: the sums of the stages' own tokens."""
    for name, recipe in recipes.items():
        trained = [stage for stage in recipe.stages if not isinstance(stage, (Sft, Dpo))]
        assert not trained or sum(stage.tokens for stage in trained) == BUDGET.tokens == trained_tokens(name, BUDGET), name
        assert recipe.seed == 9 and recipe.data.part == (1, 8)
    assert trained_tokens("50% + SFT + DPO", BUDGET) == BUDGET.tokens * 3 // 2
    assert {recipes[name].student.mixer for name in ARMS if ARMS[name].start == TEACHER} == {"mamba2", "none"}
    assert recipes["50%"].student == Student(mixer="auto", attention=1.0)  # its start is a student already
    assert recipes["50% + DPO"].stages[0].data.train == "pairs.jsonl"


def test_weights_go_when_nothing_starts_from_them(tmp_path: Path) -> None:
    made = Study("t", BUDGET, "c", "p", tmp_path)
    files = ["50-0/1-distill", "50-sft-0/1-sft", "25-0/1-distill", "fitted/0-convert", "start-0.5", "50-1/1-distill"]
    for file in files:
        (tmp_path / file).mkdir(parents=True)
        (tmp_path / file / "model.safetensors").touch()
        (tmp_path / file / "stage.json").touch()
    assert starts("50% + SFT + DPO") == ["50% + SFT", "50%", FITTED]
    made.finish(0, ["50% + SFT + DPO", "25%"])
    assert weights(tmp_path) == {"50-0", "50-sft-0", "fitted", "start-0.5", "50-1"}
    made.finish(0, ["0%, not fitted"])
    assert weights(tmp_path) == {"fitted", "start-0.5", "50-1"} and (tmp_path / "25-0/1-distill/stage.json").exists()


def test_likelihoods_are_those_of_the_whole_conversation() -> None:
    """Oracle: the conversation's own log-probabilities, summed token by token."""
    model, tokenizer = load(str(EMBEDDED))
    prompt, answer = language.exam("copy", random.Random(0))
    answers = (answer, " ".join(reversed(answer.split())))
    found = likelihoods(model, tokenizer, Question(prompt, list(answers)), 256)
    opened = tokenizer.apply_chat_template(prompt, tokenize=True, return_dict=False, add_generation_prompt=True)
    for answer, value in zip(answers, found, strict=True):
        ids = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": answer}], tokenize=True, return_dict=False)
        assert ids[: len(opened)] == opened
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        want = [float(logs[place - 1, ids[place]]) for place in range(len(opened), len(ids))]
        assert value == pytest.approx(sum(want) / len(want), abs=1e-4)
    assert found[0] > found[1]
    short = likelihoods(model, tokenizer, Question(prompt * 9, [answer]), 8)  # most of the conversation lies before the window
    assert math.isfinite(short[0])


class Certain(torch.nn.Module):
    """Says the token that follows in `ids`, but at the places `wrong` from the end."""

    def __init__(self, wrong: set[int]) -> None:
        super().__init__()
        self.wrong = wrong

    def forward(self, ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        following = torch.cat((ids[0, 1:], self.last))
        for place in self.wrong:
            following[-place] += 1
        return SimpleNamespace(logits=torch.nn.functional.one_hot(following, 4096)[None].float())


def test_a_number_is_recalled_where_all_of_its_tokens_are(monkeypatch) -> None:
    """Oracle: a model that is right, or wrong in one token of so many."""
    tokenizer, model = load(str(EMBEDDED))[1], Certain(set())
    monkeypatch.setattr(exam, "phone_book", lambda names, rng: ("A 1. What is the number of A?", "7-7"))
    model.last = torch.tensor(tokenizer("7", add_special_tokens=False)["input_ids"][-1:])
    count = len(tokenizer("7-7", add_special_tokens=False)["input_ids"])
    assert recalled(model, tokenizer, (2,), 1) == {PHONE: 100, DIGITS: 100}
    model.wrong = {1}
    assert recalled(model, tokenizer, (2,), 1) == {PHONE: 0, DIGITS: pytest.approx(100 * (count - 1) / count)}


def test_questions_have_the_answer_behind_as_the_worse_one(tmp_path: Path) -> None:
    chats = [[{"role": role, "content": f"{role} {n}.{turn}"} for turn in range(2) for role in ("user", "assistant")] for n in range(3)]
    source = tmp_path / "chats.jsonl"
    source.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    found = questions(source, 9)
    assert len(found) == 3 and found[2] == Question(chats[2][:3], ["assistant 2.1", "assistant 0.1"])
    assert questions(source, 2)[0] == found[0]
    rows = [json.loads(line) for line in write_pairs(tmp_path / "pairs.jsonl", found).read_text().splitlines()]
    assert rows[0]["prompt"] == chats[0][:3] and rows[0]["rejected"] == [{"role": "assistant", "content": "assistant 1.1"}]


@pytest.mark.parametrize(
    "better, worse, typical, equal, want",
    [
        ([0.10, 0.10], [0.20, 0.20], 0.05, False, "agrees"),  # ln 2 = 0.69 against 2 * 0.05
        ([0.20, 0.20], [0.10, 0.10], 0.05, False, "disagrees"),
        ([0.10, 0.10], [0.115, 0.115], 0.08, False, "cannot tell"),  # ln 1.15 = 0.140 against 0.16
        ([0.10, 0.10], [0.12, 0.12], 0.08, False, "agrees"),  # ln 1.2 = 0.182
        ([0.08, 0.13], [0.16, 0.16], 0.05, False, "cannot tell"),  # own spread: 0.343 / 2 ** 0.5 = 0.243, ln 1.57 = 0.45 against 0.49
        ([0.10, 0.10], [0.109, 0.109], 0.0, False, "cannot tell"),  # no noise at all, and less than 10%
        ([0.10], [0.112], 0.0, False, "agrees"),
        ([0.10], [0.20], 0.2, False, "agrees"),  # one seed each: ln 2 = 0.69 against 0.4 * 2 ** 0.5 = 0.57
        ([0.10], [0.20], math.inf, False, "cannot tell"),  # one seed
        ([0.101, 0.101], [0.10, 0.10], 0.001, True, "agrees"),
        ([0.15, 0.15], [0.10, 0.10], 0.05, True, "disagrees"),
        ([0.105], [0.10], 0.0, True, "cannot tell"),  # less than 10%, more than 3%
        ([0.115, 0.115], [0.10, 0.10], 0.08, True, "cannot tell"),
    ],
)
def test_verdicts_by_distance(better, worse, typical: float, equal: bool, want: str) -> None:
    assert claims.by_distance(better, worse, typical, equal) == want


@pytest.mark.parametrize(
    "better, worse, want",
    [
        ([80, 80], [50, 50], "agrees"),
        ([50, 50], [80, 80], "disagrees"),
        ([60, 60], [50, 50], "cannot tell"),
        ([0, 0], [0, 0], "cannot tell"),
    ],
)
def test_verdicts_by_share(better, worse, want: str) -> None:
    """Of 40 questions: two standard errors of 80% against 50% are 20 points, of 60% against 50% are 22."""
    assert claims.by_share(better, worse, 40) == want


def test_claims_in_a_table() -> None:
    assert {arm for claim in claims.CLAIMS for arm in (claim.better, claim.worse)} <= {
        "teacher", *ARMS, *(name + claims.OFF for name, arm in ARMS.items() if arm.window)
    }  # fmt: skip
    assert claims.together(["agrees", "cannot tell"]) == "agrees" and claims.together(["agrees", "disagrees"]) == "cannot tell"
    assert claims.together(["not measured"]) == "not measured" and claims.typical_spread([[0.1], [0.1, 0.1], [0.1, 0.1 * math.e]]) == (
        pytest.approx(math.sqrt(0.5) / 2)
    )
    seeds = [{"chat KL": value, "text KL": 2 * value, "digits of them, %": 80.0} for value in (0.1, 0.1)]
    arms = {"50%": seeds, "25%": [{**one, "chat KL": 3 * one["chat KL"]} for one in seeds], "teacher": [{"chat KL": -1e-6}]}
    lines = claims.claims_table(arms, {"digits of them, %": 40}).splitlines()
    assert len(lines) == 2 + len(claims.CLAIMS)
    row = next(line for line in lines if line.startswith("| 50% | 25% |"))
    assert "MT-Bench 7.32 against 6.74" in row and "chat KL: 0.1 against 0.3, agrees; text KL: 0.2 against 0.2, cannot tell" in row
    assert row.endswith("| agrees |") and "| 50% | 2 | 0.1 ± 0 | 0.2 ± 0 | 80.0 ± 0.0 |" in claims.arms_table(arms)


def test_what_a_study_does_not_take(given, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only must be of teacher, 50, 25, .*, got '51'"):
        choices(given, tmp_path, only="50,51").arms()
    with pytest.raises(ValueError, match="tokens must be a number from 1,024 to 1,000,000,000, got 0"):
        study.Choices(tokens=0)
    with pytest.raises(ValueError, match="math must be a file gsm8k/test.jsonl, got"):
        study.do(choices(given, tmp_path, text="", math=given["text"]), SIZE, BUDGET)
    with pytest.raises(ValueError, match="needed tokens=..., .*got 'hours=2'"):
        study.read(study.Choices, ["hours=2"])
    with pytest.raises(ValueError, match="seeds must be a whole number, got 'two'"):
        study.read(study.Choices, ["seeds=two"])
    assert study.read(study.Choices, ["tokens=9000", "mixer=mamba2"]) == study.Choices(tokens=9000, mixer="mamba2")
    assert all(re.fullmatch(r"[a-z0-9.-]+", slug(name)) for name in ARMS) and len({slug(name) for name in ARMS}) == len(ARMS)
