"""`recipes/study.py`: two steps of every kind of arm on the embedded teacher, and going on; scores and verdicts against sums by hand."""

import json
import math
import random
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llamba.chat.conversation import load
from llamba.recipes import study
from llamba.recipes.real import claims, pace
from llamba.recipes.real.arms import ALIGNED, ARMS, TEACHER, Budget, Study, slug, starts
from llamba.recipes.real.exam import Size, digits, likelihoods
from llamba.recipes.real.questions import Question, split_pairs, write_pairs
from llamba.settings import Dpo, Recipe, Sft, Student

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # TRL asks by the old name
ROOT = Path(__file__).parent.parent
EMBEDDED = ROOT / "recipes" / "tiny" / "teacher"
sys.path.insert(0, str(EMBEDDED.parent))

import language  # noqa: E402

LENGTH = 128  # the window sees half of it
BUDGET = Budget(tokens=4 * LENGTH, aligned=4 * LENGTH, pairs=8, batch=2, length=LENGTH)  # two steps a stage
SIZE = Size(chats=4, text=1, length=LENGTH, questions=2, names=(2,), trials=1, new_tokens=4, reasoning=4)


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


def test_two_steps_of_the_whole_path(given, tmp_path: Path, capsys) -> None:
    """Every kind of start and of stage; rows, table, weights that go; and a second call that trains nothing."""
    asked = choices(given, tmp_path, only="teacher,50,25-selected-layers,50-no-mixers-all-trained,50-sft,50-dpo")
    table = study.do(asked, SIZE, BUDGET)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["arm"] for row in rows] == asked.arms() and all(row["hardware"] and row["settings"]["tokens"] == 512 for row in rows)
    scores = {name: found for row in rows for name, found in row["scores"].items()}
    assert abs(scores["teacher"]["chat KL"]) < 0.02 < scores["50%, no mixers, all trained"]["chat KL"]  # the teacher's is bf16's alone
    assert scores["50%, recurrence off"]["chat KL"] != scores["50%"]["chat KL"] and "GSM8K, %" in scores["50%"]
    assert all(math.isfinite(value) for found in scores.values() for value in found.values())
    arms = tmp_path / "study" / "arms"
    metrics = [json.loads(line) for line in (arms / "50-0/1-distill/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics if "loss" in line] == [1, 2]
    assert weights(arms) == {"aligned-0", "start-0.5-0", "50-0", "50-sft-0"}  # what arms that are not done start from
    assert (tmp_path / "study/table.md").read_text() == table and table.count("| not measured |") > 5
    capsys.readouterr()
    assert study.do(asked, SIZE, BUDGET) == table and "chat KL" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds a study with mixer=auto, not mamba2; give the old values, or another output"):
        study.do(replace(asked, mixer="mamba2"), SIZE, BUDGET)


@pytest.fixture
def recipes(monkeypatch, tmp_path: Path) -> dict[str, Recipe]:
    """Every arm's recipe, its start unmade."""
    monkeypatch.setattr(Study, "start", lambda self, arm, seed: tmp_path / arm.start)
    made = Study("org/teacher", BUDGET, "chats.jsonl", "sft.jsonl", "pairs.jsonl", tmp_path, "mamba2")
    return {name: made.recipe(name, seed=9) for name in ARMS} | {ALIGNED: made.aligned(9)}


def test_arms_read_equally_many_tokens(recipes) -> None:
    """Oracle: the sums of the stages' own tokens, with those of the alignment that an arm starts from."""
    for name, recipe in recipes.items():
        trained = [stage for stage in recipe.stages if not isinstance(stage, (Sft, Dpo)) and stage.name != "select"]
        before = recipes[ALIGNED].stages[0].tokens if name in ARMS and recipe.teacher.endswith(("aligned", "selected")) else 0
        want = BUDGET.aligned if name == ALIGNED else BUDGET.tokens + BUDGET.aligned
        assert not trained or before + sum(stage.tokens for stage in trained) == want, name
        assert recipe.seed == 9 and recipe.data.part == (1, 8)
    assert {recipes[name].student.mixer for name in ARMS if ARMS[name].start == TEACHER} == {"mamba2", "none"}
    assert recipes["50%"].student == Student(mixer="auto", attention=1.0)  # its start is a student already
    assert recipes["50% + DPO"].stages[0].data.train == "pairs.jsonl" and recipes["50% + SFT"].stages[0].data.train == "sft.jsonl"


@pytest.mark.parametrize("minutes, seeds, rate", [(35, 2, 900), (90, 2, 900), (60, 1, 5000)])
def test_a_study_takes_the_minutes_that_it_is_given(recipes, minutes: float, seeds: int, rate: float) -> None:
    """Oracle: tokens and arms counted one by one."""
    made = pace.budget(minutes, seeds, rate)
    study_of = Study("org/teacher", made, "chats.jsonl", "sft.jsonl", "pairs.jsonl", Path("x"))
    stages = [stage for name in ARMS for stage in study_of.recipe(name, 0).stages] + list(study_of.aligned(0).stages)
    tokens = sum(getattr(stage, "tokens", None) or 0 for stage in stages)
    tokens += sum(stage.steps * stage.batch * 200 for stage in stages if isinstance(stage, Dpo))  # pairs of some 200 tokens
    seconds = seeds * (tokens * pace.FORWARDS / rate + (len(ARMS) + 1) * (pace.SECONDS_AN_ARM + pace.SCORED / rate))
    assert 0.85 * minutes < seconds / 60 < 1.05 * minutes
    with pytest.raises(ValueError, match="minutes must be at least [0-9]+ for 2 seeds on this machine, got 5; or give fewer seeds"):
        pace.budget(5, 2, 900)


def test_the_speed_is_that_of_this_machine() -> None:
    assert 100 < pace.forward_rate(str(EMBEDDED), length=64, repeats=2) < 1e8


def test_weights_go_when_nothing_starts_from_them(tmp_path: Path) -> None:
    made = Study("t", BUDGET, "c", "s", "p", tmp_path)
    files = ["50-0/1-distill", "50-sft-0/1-sft", "25-0/1-distill", "aligned-0/1-hidden", "start-0.5-0", "50-1/1-distill"]
    for file in files:
        (tmp_path / file).mkdir(parents=True)
        (tmp_path / file / "model.safetensors").touch()
        (tmp_path / file / "stage.json").touch()
    assert starts("50% + SFT + DPO") == ["50% + SFT", "50%", ALIGNED]
    made.finish(0, ["50% + SFT + DPO", "25%"])
    assert weights(tmp_path) == {"50-0", "50-sft-0", "aligned-0", "start-0.5-0", "50-1"}
    made.finish(0, ["0%, no alignment"])
    assert weights(tmp_path) == {"50-1"} and (tmp_path / "25-0/1-distill/stage.json").exists()


def test_likelihoods_and_digits_are_those_of_the_whole_conversation() -> None:
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
    assert 0 <= digits(model, tokenizer, (2,), 2) <= 100


def test_pairs_are_held_out_and_written_once(tmp_path: Path) -> None:
    chats = [[{"role": role, "content": f"{role} {n}.{turn}"} for turn in range(2) for role in ("user", "assistant")] for n in range(3)]
    source = tmp_path / "chats.jsonl"
    source.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    train, held = split_pairs("", source, source)
    assert train == held and train[2] == Question(chats[2][:3], ["assistant 2.1", "assistant 0.1"])
    path = write_pairs(tmp_path / "pairs.jsonl", train)
    learnt, asked = split_pairs(str(path), source, source)
    assert asked == train[:1] and learnt == train[1:]
    with pytest.raises(ValueError, match="must be a pair with 'prompt', 'chosen' and 'rejected', got messages"):
        split_pairs(str(source), source, source)


@pytest.mark.parametrize(
    "better, worse, typical, equal, want",
    [
        ([0.10, 0.10], [0.20, 0.20], 0.05, False, "agrees"),  # ln 2 = 0.69 against 2 * 0.05
        ([0.20, 0.20], [0.10, 0.10], 0.05, False, "disagrees"),
        ([0.10, 0.10], [0.11, 0.11], 0.05, False, "cannot tell"),  # ln 1.1 = 0.095 against 0.1
        ([0.10, 0.10], [0.112, 0.112], 0.05, False, "agrees"),  # ln 1.12 = 0.113
        ([0.08, 0.13], [0.16, 0.16], 0.05, False, "cannot tell"),  # own spread: 0.343 / 2 ** 0.5 = 0.243, ln 1.57 = 0.45 against 0.49
        ([0.10, 0.10], [0.102, 0.102], 0.0, False, "cannot tell"),  # no noise at all, and less than 3%
        ([0.10], [0.20], math.inf, False, "cannot tell"),  # one seed
        ([0.101, 0.101], [0.10, 0.10], 0.001, True, "agrees"),
        ([0.15, 0.15], [0.10, 0.10], 0.05, True, "disagrees"),
        ([0.108, 0.108], [0.10, 0.10], 0.05, True, "cannot tell"),
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
    with pytest.raises(ValueError, match="minutes must be a number from 1 to 100,000, got 0"):
        study.Choices(minutes=0)
    with pytest.raises(ValueError, match="math must be a file gsm8k/test.jsonl, got"):
        study.do(choices(given, tmp_path, math=given["text"]), SIZE, BUDGET)
    with pytest.raises(ValueError, match="needed minutes=..., .*got 'hours=2'"):
        study.read(study.Choices, ["hours=2"])
    with pytest.raises(ValueError, match="seeds must be a whole number, got 'two'"):
        study.read(study.Choices, ["seeds=two"])
    assert study.read(study.Choices, ["minutes=90", "mixer=mamba2"]) == study.Choices(minutes=90.0, mixer="mamba2")
    assert all(re.fullmatch(r"[a-z0-9.-]+", slug(name)) for name in ARMS) and len({slug(name) for name in ARMS}) == len(ARMS)
