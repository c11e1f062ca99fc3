"""lm-eval with our models: task sets named after the papers' tables, PubMedQA from its own repository, all of lm-eval's options.

lm-eval loads models by their `model_type`; importing llamba makes ours known to transformers, and nothing else is needed.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llamba.base.folders import resolve_model
from llamba.eval import fetch
from llamba.eval.journal import read_lines
from llamba.eval.scores import model_name, need, save, save_items, score
from llamba.eval.stats import Interval
from llamba.eval.task_sets import PUBMEDQA, TASK_SETS

_FRACTIONS = ("acc", "acc_norm", "exact_match", "f1", "mc1", "mc2")
_PUBMEDQA_YAML = """task: {name}
task_alias: pubmedqa
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "Abstract: {{{{context}}}}\\nQuestion: {{{{question}}}}\\nAnswer:"
doc_to_target: final_decision
doc_to_choice: ["yes", "no", "maybe"]
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def tasks_of(named: str) -> tuple[str, ...]:
    """The tasks of a set, or a comma-separated list of lm-eval's own."""
    return TASK_SETS[named] if named in TASK_SETS else tuple(filter(None, named.split(",")))


def write_pubmedqa(folder: Path, data: str | None) -> None:
    """PubMedQA's 500 labelled test questions as an lm-eval task, with lm-eval's own prompt. Raises ValueError where data is missing."""
    labelled = json.loads(fetch.data_file("pubmedqa/ori_pqal.json", data).read_text(encoding="utf-8"))
    test = json.loads(fetch.data_file("pubmedqa/test_ground_truth.json", data).read_text(encoding="utf-8"))
    if missing := [name for name in test if name not in labelled]:
        raise ValueError(f"pubmedqa/ori_pqal.json must hold every test question; {len(missing)} are missing, e.g. {missing[0]}")
    rows = [
        {"context": "\n".join(labelled[name]["CONTEXTS"]), "question": labelled[name]["QUESTION"], "final_decision": decision}
        for name, decision in test.items()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / "pubmedqa.jsonl").resolve()
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "pubmedqa.yaml").write_text(_PUBMEDQA_YAML.format(name=PUBMEDQA, data=json.dumps(str(file))))


def _rows(results: dict[str, Any], model: str, task_set: str) -> list[dict[str, Any]]:
    """Score rows of lm-eval's results: fractions in per cent, 95% intervals from its standard errors."""
    made, groups, limit = [], _groups(results), results.get("config", {}).get("limit")
    for task, values in results["results"].items():
        counts = results.get("n-samples", {}).get(task, {})
        more = {"part_of": groups[task]} if task in groups else {}
        more |= {} if limit is None else {"limit": limit}
        more |= {"task_set": task_set, "shots": results.get("n-shot", {}).get(task), "task_version": results.get("versions", {}).get(task)}
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, float):
                continue
            scale = 100 if metric in _FRACTIONS else 1
            error = values.get(f"{metric}_stderr,{kind}")
            number: Interval | float = scale * value
            if isinstance(error, float):
                number = Interval(scale * value, scale * (value - 1.96 * error), scale * (value + 1.96 * error), counts.get("effective", 0))
            made.append(score(f"lm_eval/{task}", metric if kind == "none" else f"{metric} ({kind})", model, number, **more))
    return made


def _scored(values: dict[str, Any]) -> bool:
    return any("," in metric and isinstance(value, float) for metric, value in values.items())


def _groups(results: dict[str, Any]) -> dict[str, str]:
    """The group of each task, for groups that have scores of their own (MMLU's 57 subjects)."""
    listed = results.get("group_subtasks", {}).items()
    return {task: group for group, tasks in listed if _scored(results["results"].get(group, {})) for task in tasks}


def _tasks_in(name: str, results: dict[str, Any]) -> list[str]:
    inside = results.get("group_subtasks", {}).get(name)
    return [task for part in inside for task in _tasks_in(part, results)] if inside else [name]


def items(results: Path) -> dict[tuple[str, str], dict[str, list[float]]]:
    """Task (or group) and metric -> question -> its value in per cent, from lm-eval's files of samples beside its results file.

    A group's questions are those of its tasks; a question is its text, its place and the number of shots.
    """
    found, stamp = json.loads(results.read_text()), results.stem.partition("_")[2]
    groups = _groups(found)
    made: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(dict)
    for name in (name for name, values in found["results"].items() if name not in groups and _scored(values)):
        for task in _tasks_in(name, found):
            shots = found.get("n-shot", {}).get(task)
            for sample in read_lines(results.with_name(f"samples_{task}_{stamp}.jsonl")):
                for metric in set(sample.get("metrics", ())) & set(_FRACTIONS):
                    kind, value = sample["filter"], sample[metric]
                    if isinstance(value, (int, float)):
                        question = f"{task}/{shots}/{sample['doc_id']}/{sample['doc_hash'][:8]}"
                        made[name, metric if kind == "none" else f"{metric} ({kind})"][question] = [100.0 * value]
    return dict(made)


def run(name: str, out: Path, task_set: str, options: Sequence[str], data: str | None) -> Path:
    """Run lm-eval's own command line on a model, and put what it found into scores.jsonl; returns lm-eval's results file.

    Raises ValueError for missing data, and lets lm-eval's own errors through.
    """
    need("lm_eval")
    from lm_eval.__main__ import cli_evaluate

    path, tasks = resolve_model(name), tasks_of(task_set)
    folder = out / "lm_eval"
    arguments = ["run", "--model", "hf", "--model_args", f"pretrained={path}", "--tasks", ",".join(tasks)]
    results = folder / "results" / model_name(name)
    arguments += ["--output_path", str(results), "--log_samples", *options]
    if PUBMEDQA in tasks:
        write_pubmedqa(folder / "tasks", data)
        arguments += ["--include_path", str(folder / "tasks")]
    earlier, before = set(results.rglob("results_*.json")), sys.argv
    sys.argv = ["lm_eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
    found = set(results.rglob("results_*.json")) - earlier
    if not found:
        raise ValueError(f"lm-eval left no results in {results}; its messages above say why")
    newest = max(found)
    save(out, _rows(json.loads(newest.read_text()), model_name(name), task_set))
    for (task, metric), values in items(newest).items():
        save_items(out, f"lm_eval/{task}, {metric}", model_name(name), None, values)
    return newest
