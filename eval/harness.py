"""lm-eval with our models: task sets named after the papers' tables, PubMedQA from its own repository, all of lm-eval's options.

lm-eval loads models by their `model_type`; importing llamba makes ours known to transformers, and nothing else is needed.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llamba.eval import fetch
from llamba.eval.scores import model_name, need, save, score
from llamba.eval.stats import Interval
from llamba.folders import resolve_model

PUBMEDQA = "pubmedqa_labelled"  # lm-eval's own `pubmedqa` wants a script dataset, which datasets no longer runs
TASK_SETS: dict[str, tuple[str, ...]] = {
    "mamba_in_llama_table3": (
        "winogrande", "piqa", "hellaswag", "arc_easy", "arc_challenge", "mmlu", "openbookqa", "truthfulqa", PUBMEDQA, "race",
    ),
    "mamba_in_llama_table4": ("openllm",),
    "mamba_in_llama_table8": ("lambada_openai", "mmlu", "arc_challenge", "truthfulqa_mc2", "hellaswag"),
    "mohawk_table1": ("winogrande", "arc_easy", "arc_challenge", "piqa", "hellaswag", "lambada_openai"),
}  # fmt: skip
ABOUT = {
    "mamba_in_llama_table3": "zero-shot; the paper's numbers are acc_norm for HellaSwag, ARC-C and OpenBookQA, acc for the rest",
    "mamba_in_llama_table4": "lm-eval's `openllm`: ARC 25 shots, HellaSwag 10, TruthfulQA 0, MMLU 5, WinoGrande 5, GSM8K 5",
    "mamba_in_llama_table8": "zero-shot, with LAMBADA's perplexity",
    "mohawk_table1": "zero-shot; the paper's numbers are acc_norm for ARC-C and HellaSwag",
}
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
    made = []
    for task, values in results["results"].items():
        counts = results.get("n-samples", {}).get(task, {})
        more = {"task_set": task_set, "shots": results.get("n-shot", {}).get(task), "task_version": results.get("versions", {}).get(task)}
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


def run(name: str, out: Path, task_set: str, options: Sequence[str], data: str | None) -> Path:
    """Run lm-eval's own command line on a model, and put what it found into scores.jsonl; returns lm-eval's results file.

    Raises ValueError for missing data, and lets lm-eval's own errors through.
    """
    need("lm_eval")
    from lm_eval.__main__ import cli_evaluate

    path, tasks = resolve_model(name), tasks_of(task_set)
    folder = out / "lm_eval"
    arguments = ["run", "--model", "hf", "--model_args", f"pretrained={path}", "--tasks", ",".join(tasks)]
    arguments += ["--output_path", str(folder / "results" / model_name(name)), *options]
    if PUBMEDQA in tasks:
        write_pubmedqa(folder / "tasks", data)
        arguments += ["--include_path", str(folder / "tasks")]
    shutil.rmtree(folder / "results" / model_name(name), ignore_errors=True)
    before = sys.argv
    sys.argv = ["lm_eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
    found = sorted((folder / "results" / model_name(name)).rglob("results_*.json"))
    if not found:
        raise ValueError(f"lm-eval left no results in {folder / 'results'}; its messages above say why")
    save(out, _rows(json.loads(found[-1].read_text()), model_name(name), task_set))
    return found[-1]
