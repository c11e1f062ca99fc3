"""lm-eval on a hybrid, offline: a paper's task set on local files, PubMedQA repaired, padding and batch size without influence."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import llamba
from llamba.eval import harness, task_sets
from llamba.eval.commands import main
from llamba.eval.journal import read_lines, write_lines
from llamba.eval.report import differences

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

ARC = [
    {
        "id": str(i),
        "question": f"the {w}?",
        "choices": {"text": ["cat", "dog", "bird"], "label": ["A", "B", "C"]},
        "answerKey": "ABC"[i % 3],
    }
    for i, w in enumerate(("red", "green", "blue", "big"))
]
HELLASWAG = [
    {"ind": i, "activity_label": "sings", "ctx_a": f"a {w} cat", "ctx_b": "the bird", "ctx": "", "endings": "runs sleeps sings or".split(),
     "label": str(i % 4)}
    for i, w in enumerate(("red", "green", "blue", "big"))
]  # fmt: skip
PIQA = [
    {"goal": f"the {w} tree", "sol1": "runs", "sol2": "sleeps and sings", "label": i % 2} for i, w in enumerate(("red", "big", "small"))
]
WINOGRANDE = [
    {"sentence": f"the {w} _ runs", "option1": "cat", "option2": "dog", "answer": "12"[i % 2]} for i, w in enumerate(("red", "big"))
]
LAMBADA = [{"text": f"the {w} cat and the dog"} for w in ("red", "green", "blue")]
OPENBOOK = [
    {"id": str(i), "question_stem": f"the {w} cat", "answerKey": "B",
     "choices": {"text": "runs sleeps sings or".split(), "label": list("ABCD")}}
    for i, w in enumerate(("red", "big"))
]  # fmt: skip
TRUTHFUL = [{"question": f"the {w} dog?", "mc1_targets": {"choices": ["runs", "sings"], "labels": [1, 0]},
             "mc2_targets": {"choices": ["runs", "sleeps", "sings"], "labels": [1, 1, 0]}} for w in ("red", "big")]  # fmt: skip
TRUTHFUL_GEN = [{"type": "x", "category": "y", "question": f"the {w} dog?", "best_answer": "it runs", "correct_answers": ["it runs"],
                 "incorrect_answers": ["it sings"], "source": "z"} for w in ("red", "big")]  # fmt: skip
RACE = [{"article": f"the {w} cat sings", "problems": str([{"question": "who?", "answer": "A", "options": "cat dog bird tree".split()}])}
        for w in ("red", "big")]  # fmt: skip
MMLU = [
    {"question": f"the {w}?", "subject": "virology", "choices": "cat dog bird tree".split(), "answer": i}
    for i, w in enumerate(("red", "big"))
]
DATA = {
    "allenai/openbookqa": {"main": ("test", OPENBOOK)},
    "truthfulqa/truthful_qa": {"multiple_choice": ("validation", TRUTHFUL), "generation": ("validation", TRUTHFUL_GEN)},
    "EleutherAI/race": {"high": ("test", RACE)},
    "cais/mmlu": {"virology": ("test", MMLU)},
    "allenai/ai2_arc": {"ARC-Easy": ("test", ARC), "ARC-Challenge": ("test", ARC[:2])},
    "Rowan/hellaswag": {"default": ("validation", HELLASWAG)},
    "baber/piqa": {"default": ("validation", PIQA)},
    "allenai/winogrande": {"winogrande_xl": ("validation", WINOGRANDE)},
    "EleutherAI/lambada_openai": {"default": ("test", LAMBADA)},
}


@pytest.fixture(scope="module")
def student(teacher_folder: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hybrid")
    llamba.convert(str(teacher_folder), mixer="mamba2", attention=0.5).save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher_folder).save_pretrained(folder)
    return folder


@pytest.fixture
def few_tasks(monkeypatch) -> None:
    """lm-eval indexes its thousands of task files at every start, for ten seconds; here those of the sets under test."""
    import lm_eval.tasks

    names = "arc hellaswag lambada mmlu/default openbookqa piqa race truthfulqa winogrande".split()
    folders = [str(Path(lm_eval.tasks.__file__).parent / name) for name in names]
    whole = lm_eval.tasks.TaskManager.__init__

    def few(self, verbosity=None, include_path=None, include_defaults=True, **more) -> None:
        own = [] if include_path is None else [include_path] if isinstance(include_path, str) else list(include_path)
        whole(self, include_path=[*folders, *own], include_defaults=False, **more)

    monkeypatch.setattr(lm_eval.tasks.TaskManager, "__init__", few)


@pytest.fixture
def local(tmp_path: Path, monkeypatch) -> Path:
    """A working directory whose folders are what the tasks' dataset names mean."""
    for name, configs in DATA.items():
        listed = []
        for config, (split, rows) in configs.items():
            file = tmp_path / name / config / f"{split}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            files = [{"split": name, "path": f"{config}/{split}.jsonl"} for name in {split, "train", "validation", "dev"}]
            listed.append({"config_name": config, "data_files": files})
        (tmp_path / name / "README.md").write_text(f"---\nconfigs: {json.dumps(listed)}\n---\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def scores(out: Path) -> dict[tuple[str, str], dict]:
    return {(row["benchmark"], row["metric"]): row for row in read_lines(out / "scores.jsonl")}


def test_a_papers_task_set_runs_on_local_files_whatever_the_batch(student: Path, local: Path, few_tasks: None) -> None:
    for batch in ("1", "3"):
        main(["lm_eval", str(student), "mohawk_table1", "--out", f"out{batch}", "--batch_size", batch, "--device", "cpu"])
    one, three = scores(local / "out1"), scores(local / "out3")
    assert {name.partition("/")[2] for name, _ in one} == set(harness.TASK_SETS["mohawk_table1"])
    for key, row in one.items():
        assert three[key]["value"] == pytest.approx(row["value"], rel=1e-5) and (
            key[1] == "perplexity" or three[key]["value"] == row["value"]
        )
    arc = one["lm_eval/arc_easy", "acc_norm"]
    assert arc["n"] == 4 and arc["shots"] == 0 and arc["task_set"] == "mohawk_table1" and arc["value"] % 25 == 0
    assert [path.name for path in sorted((local / "out1/items").glob("*arc_easy*"))] == [
        "lm_eval_arc_easy_acc--hybrid0.json", "lm_eval_arc_easy_acc_norm--hybrid0.json"]  # fmt: skip
    values = json.loads((local / "out1/items/lm_eval_arc_easy_acc_norm--hybrid0.json").read_text())["values"]
    assert len(values) == 4 and sum(v for (v,) in values.values()) / 4 == arc["value"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(student), AutoTokenizer.from_pretrained(student)
    right = [predict(model, tokenizer, row) == row["answerKey"] for row in ARC]
    assert one["lm_eval/arc_easy", "acc"]["value"] == 100 * sum(right) / len(right)


def test_models_are_compared_question_by_question(student: Path, teacher_folder: Path, local: Path, few_tasks: None) -> None:
    """In one folder; a second run leaves the first one's files; a run with --limit is marked and compared on what both answered."""
    for model, more in ((teacher_folder, []), (student, ["--limit", "3"]), (student, [])):
        main(["lm_eval", str(model), "arc_easy", "--out", "both", "--batch_size", "4", "--device", "cpu", *more])
        if more:
            assert scores(local / "both")["lm_eval/arc_easy", "acc"]["limit"] == 3
    rows = [row for row in read_lines(local / "both/scores.jsonl") if row["metric"] == "acc"]
    assert len(rows) == 2 and not any("limit" in row for row in rows)
    assert len(list((local / "both/lm_eval/results").rglob("results_*.json"))) == 3
    gap = next(line for line in differences([local / "both"]) if "arc_easy, acc:" in line)
    assert f"= {rows[0]['value'] - rows[1]['value']:.2f} [" in gap.replace("= -0.00", "= 0.00") and gap.endswith("of 4 questions")


def test_a_groups_questions_are_those_of_its_tasks(tmp_path: Path) -> None:
    """As lm-eval writes MMLU, nested groups, and TruthfulQA, whose group has no score."""
    results = {
        "results": {
            "g": {"acc,none": 0.6}, "inner": {"acc,none": 0.5}, "a": {"acc,none": 0.5}, "b": {"acc,none": 0.5}, "c": {"acc,none": 1.0},
            "open": {"alias": "open"}, "d": {"exact_match,strict": 1.0, "exact_match,loose": 0.0},
        },
        "group_subtasks": {"g": ["inner", "c"], "inner": ["a", "b"], "open": ["d"]},
        "n-shot": {},
    }  # fmt: skip
    (tmp_path / "results_now.json").write_text(json.dumps(results))
    for task, values in {"a": [1, 0], "b": [0, 1], "c": [1]}.items():
        rows = [{"doc_id": i, "doc_hash": "x" * 9, "filter": "none", "metrics": ["acc"], "acc": float(v)} for i, v in enumerate(values)]
        write_lines(tmp_path / f"samples_{task}_now.jsonl", rows)
    strict = {"doc_id": 0, "doc_hash": "y", "filter": "strict", "metrics": ["exact_match"], "exact_match": 1.0}
    write_lines(tmp_path / "samples_d_now.jsonl", [strict, strict | {"filter": "loose", "exact_match": 0.0}])
    found = harness.items(tmp_path / "results_now.json")
    assert set(found) == {("g", "acc"), ("d", "exact_match (strict)"), ("d", "exact_match (loose)")}
    assert len(found["g", "acc"]) == 5 and sum(v for (v,) in found["g", "acc"].values()) == 300
    parts = {row["benchmark"]: row.get("part_of") for row in harness._rows(results, "m", "s")}
    assert parts == {
        "lm_eval/g": None,
        "lm_eval/inner": "g",
        "lm_eval/a": "inner",
        "lm_eval/b": "inner",
        "lm_eval/c": "g",
        "lm_eval/d": None,
    }


@torch.inference_mode()
def predict(model, tokenizer, row: dict) -> str:
    """ARC's answer by the likelihood of each choice, computed one by one."""
    found = []
    for choice in row["choices"]["text"]:
        context = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
        whole = tokenizer(f"Question: {row['question']}\nAnswer: {choice}")["input_ids"]
        logp = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        found.append(sum(float(logp[i - 1, whole[i]]) for i in range(len(context), len(whole))))
    return row["choices"]["label"][max(range(len(found)), key=found.__getitem__)]


@pytest.mark.parametrize("mixer", ["mamba2", "mamba1"])
@torch.inference_mode()
def test_padding_and_batch_do_not_move_log_likelihoods(teacher_folder: Path, mixer: str) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = llamba.convert(str(teacher_folder), mixer=mixer, attention=0.5, init="paper").eval()
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    texts = [
        ("the red cat", " runs and sings or sleeps"),
        ("a", " bird"),
        ("the big blue tree and the small house", " sings"),
        ("dog or", " the"),
    ]
    instances = [Instance("loglikelihood", {}, text, i) for i, text in enumerate(texts)]
    found = [
        [
            value
            for value, _ in HFLM(pretrained=model, tokenizer=tokenizer, batch_size=b, device="cpu").loglikelihood(
                instances, disable_tqdm=True
            )
        ]
        for b in (1, 4)
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    rows = [tokenizer(a + b, return_tensors="pt")["input_ids"][0] for a, b in texts]
    alone = [model(row[None]).logits[0].log_softmax(-1) for row in rows]
    longest = max(map(len, rows))
    for side in ("left", "right"):
        ids, mask = torch.zeros(4, longest, dtype=torch.long), torch.zeros(4, longest, dtype=torch.long)
        for i, row in enumerate(rows):
            where = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
            ids[i, where], mask[i, where] = row, 1
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        together = model(ids, attention_mask=mask, position_ids=positions).logits.log_softmax(-1)
        for i, row in enumerate(rows):
            mine = together[i, longest - len(row) :] if side == "left" else together[i, : len(row)]
            assert (mine - alone[i]).gather(1, row.roll(-1)[:, None]).abs().max() <= 1e-5


def write_pubmedqa(folder: Path) -> None:
    (folder / "pubmedqa").mkdir()
    rows = {
        str(i): {"QUESTION": f"does {w} run?", "CONTEXTS": ["the cat", "a dog"], "final_decision": "no"}
        for i, w in enumerate(("a", "b", "c"))
    }
    (folder / "pubmedqa/ori_pqal.json").write_text(json.dumps(rows))
    (folder / "pubmedqa/test_ground_truth.json").write_text(json.dumps({"0": "yes", "2": "maybe"}))


def test_pubmedqa_is_lm_evals_prompt_over_the_labelled_test_questions(student: Path, tmp_path: Path, few_tasks: None) -> None:
    write_pubmedqa(tmp_path)
    main(
        [
            "lm_eval",
            str(student),
            harness.PUBMEDQA,
            "--out",
            str(tmp_path / "out"),
            "--data",
            str(tmp_path),
            "--device",
            "cpu",
            "--log_samples",
        ]
    )
    assert scores(tmp_path / "out")[f"lm_eval/{harness.PUBMEDQA}", "acc"]["n"] == 2
    sample = read_lines(next((tmp_path / "out").rglob("samples_*.jsonl")))[0]
    assert sample["arguments"]["gen_args_0"]["arg_0"] == "Abstract: the cat\na dog\nQuestion: does a run?\nAnswer:"
    assert [sample["arguments"][f"gen_args_{i}"]["arg_1"] for i in range(3)] == [" yes", " no", " maybe"]


@pytest.mark.parametrize("named", ["mamba_in_llama_table3", "mamba_in_llama_table8"])
def test_the_other_papers_sets_run_on_local_files(student: Path, local: Path, few_tasks: None, monkeypatch, named: str) -> None:
    """MMLU by one of its 57 subjects, which differ in nothing but their name. (Table 4 is lm-eval's own group.)"""
    tasks = tuple("mmlu_virology" if task == "mmlu" else task for task in harness.TASK_SETS[named])
    monkeypatch.setitem(harness.TASK_SETS, named, tasks)
    write_pubmedqa(local)
    more = ["--batch_size", "4", "--device", "cpu", "--gen_kwargs", "max_gen_toks=16"]  # the model's context is 256
    main(["lm_eval", str(student), named, "--out", "out", "--data", str(local), *more])
    found = {name.partition("/")[2] for name, _ in scores(local / "out")}
    meant = set(tasks) - {"truthfulqa"} | ({f"truthfulqa_{kind}" for kind in ("gen", "mc1", "mc2")} if "truthfulqa" in tasks else set())
    assert found == meant
    if "lambada_openai" in tasks:
        assert scores(local / "out")["lm_eval/lambada_openai", "perplexity"]["value"] > 1


@pytest.mark.slow
def test_every_set_names_tasks_that_lm_eval_has() -> None:
    from lm_eval.tasks import TaskManager

    known = set(TaskManager().all_tasks) | {harness.PUBMEDQA}
    assert set(harness.TASK_SETS) == set(task_sets.ABOUT)
    for tasks in harness.TASK_SETS.values():
        assert set(tasks) <= known
