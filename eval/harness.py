"""lm-eval with our models: task sets named after the papers' tables, PubMedQA from its own repository, all of lm-eval's options.

lm-eval loads models by their `model_type`; importing llamba makes ours known to transformers, and nothing else is needed.
"""

import json
import math
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llamba.eval import fetch
from llamba.eval.foreign import document, number, text, texts
from llamba.eval.journal import read_lines
from llamba.eval.scores import model_name, require_packages, save, save_items, score
from llamba.eval.stats import Interval, share, wilson
from llamba.eval.task_sets import PUBMEDQA, TASK_SETS
from llamba.models.loading import located, require_sound

_FRACTIONS = ("exact_match", "em", "f1", "mc1", "mc2", "pass@1")
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
    labelled = document(fetch.data_file("pubmedqa/ori_pqal.json", data))
    test = document(fetch.data_file("pubmedqa/test_ground_truth.json", data))
    if missing := [name for name in test if name not in labelled]:
        raise ValueError(f"pubmedqa/ori_pqal.json must hold every test question; {len(missing)} are missing, e.g. {missing[0]}")
    rows = [_pubmedqa_row(name, labelled[name], decision) for name, decision in test.items()]
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / "pubmedqa.jsonl").resolve()
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "pubmedqa.yaml").write_text(_PUBMEDQA_YAML.format(name=PUBMEDQA, data=json.dumps(str(file))))


def _pubmedqa_row(name: str, row: Any, decision: Any) -> dict[str, str]:
    where = f"pubmedqa/ori_pqal.json, question {name},"
    if not isinstance(row, dict) or decision not in ("yes", "no", "maybe"):
        raise ValueError(f"{where} must be an object and answered by yes, no or maybe, got {str(decision)[:40]!r}")
    contexts = texts(where, row.get("CONTEXTS"), 1, "CONTEXTS")
    return {"context": "\n".join(contexts), "question": text((where, row), "QUESTION"), "final_decision": decision}


def is_fraction(metric: str) -> bool:
    """Whether a metric of lm-eval is a share of questions, from 0 to 1, which we give in per cent."""
    return metric in _FRACTIONS or metric.startswith("acc") or metric.endswith("_acc")


def interval(metric: str, value: float, error: float | None, n: int, values: Mapping[str, list[float]]) -> Interval | float:
    """A metric's 95% interval, never beyond its scale; the bare value where there is nothing to make one of.

    A share of questions: from the questions' own `values`, Wilson's where they are right or wrong, bootstrapped where they are in between;
    without them (or where lm-eval weighs its tasks otherwise) Wilson's with lm-eval's count. Perplexities: lm-eval's standard error on the
    scale of logarithms. Other metrics: lm-eval's standard error.
    """
    if is_fraction(metric):
        found = share(values) if values else None
        if found is not None and abs(found.mean - 100 * value) < 1e-6:
            return found
        if n > 0 and 0 <= value <= 1:
            low, high = wilson(value, n)
            return Interval(100 * value, 100 * low, 100 * high, n)
        return 100 * value
    if error is None:
        return value
    if "perplexity" in metric and value > 0:
        wide = math.exp(1.96 * error / value)
        return Interval(value, max(value / wide, min(1.0, value)), value * wide, n)
    return Interval(value, value - 1.96 * error, value + 1.96 * error, n)


def _rows(
    results: dict[str, Any], model: str, task_set: str, values: Mapping[tuple[str, str], Mapping[str, list[float]]] | None = None
) -> list[dict[str, Any]]:
    """Score rows of lm-eval's results: fractions in per cent, intervals as `interval` makes them, of the questions' `values` if given."""
    made, groups, limit = [], _groups(results), results.get("config", {}).get("limit")
    for task, metrics in results["results"].items():
        counts = results.get("n-samples", {}).get(task, {})
        more = {"part_of": groups[task]} if task in groups else {}
        more |= {} if limit is None else {"limit": limit}
        more |= {"task_set": task_set, "shots": results.get("n-shot", {}).get(task), "task_version": results.get("versions", {}).get(task)}
        for key, value in metrics.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or number(value) is None:
                continue
            shown = metric if kind == "none" else f"{metric} ({kind})"
            error, n = number(metrics.get(f"{metric}_stderr,{kind}")), int(number(counts.get("effective")) or 0)
            found = interval(metric, float(value), error, n, (values or {}).get((task, shown), {}))
            made.append(score(f"lm_eval/{task}", shown, model, found, **more))
    return made


def _scored(values: dict[str, Any]) -> bool:
    return any("," in metric and number(value) is not None for metric, value in values.items())


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
    found, stamp = document(results), results.stem.partition("_")[2]
    groups = _groups(found)
    made: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(dict)
    for name in (name for name, values in found["results"].items() if name not in groups and _scored(values)):
        for task in _tasks_in(name, found):
            shots = found.get("n-shot", {}).get(task)
            for sample in read_lines(results.with_name(f"samples_{task}_{stamp}.jsonl")):
                for metric in filter(is_fraction, sample.get("metrics", ())):
                    kind, value = sample["filter"], sample[metric]
                    value = number(float(value) if isinstance(value, bool) else value)
                    if value is not None:
                        question = f"{task}/{shots}/{sample['doc_id']}/{sample['doc_hash'][:8]}"
                        made[name, metric if kind == "none" else f"{metric} ({kind})"][question] = [100.0 * value]
    return dict(made)


def run(name: str, out: Path, task_set: str, options: Sequence[str], data: str | None) -> Path:
    """Run lm-eval's own command line on a model, and put what it found into scores.jsonl; returns lm-eval's results file.

    Raises ValueError for missing data, and lets lm-eval's own errors through.
    """
    require_packages("lm_eval")
    from lm_eval.__main__ import cli_evaluate

    path, tasks = located(name), tasks_of(task_set)
    require_sound(path)  # lm-eval loads it, and would go on with random values for what is missing
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
    found_items = items(newest)
    save(out, _rows(document(newest), model_name(name), task_set, found_items))
    for (task, metric), values in found_items.items():
        save_items(out, f"lm_eval/{task}, {metric}", model_name(name), None, values)
    return newest
