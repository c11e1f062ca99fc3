"""GSM8K and CRUXEval in ZeroEval's form: zero-shot, greedy, the answer as a field of a JSON object after its reasoning.

Prompts and reading of answers follow ZeroEval (github.com/WildEval/ZeroEval), which the papers' numbers come from.
"""

import ast
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamba.eval import fetch, stats
from llamba.eval.answerer import Settings
from llamba.eval.answers import Question, answer_all, say_what_stopped
from llamba.eval.sandbox import holds
from llamba.eval.scores import model_name, save, save_items, score

PROMPT = """
## Question: 

{question}


## Instruction 

Please answer this question by first reasoning and then providing your answer.
Present your reasoning and solution in the following json format. 
Please show your final answer in the `answer` field, e.g.,`"answer": "42"`.

```json
{{
    "reasoning": "___",
    "answer": "___"
}}
```
"""  # noqa: W291  ZeroEval's template, spaces included
CRUX = """You are given a Python function and an assertion containing an input to the function. Complete the assertion with a literal \
(no unsimplified expressions, no function calls) containing the output when executing the provided code on the given input, even if \
the function is incorrect or incomplete. 

[PYTHON]
{code}
assert f({input}) == ??
[/PYTHON]"""  # noqa: W291
_NUMBER = re.compile(r"-?\d+(\.\d+)?")


@dataclass(frozen=True)
class Options:
    """What to do. `run_code`: CRUXEval's answers are also checked by running the function in a limited process."""

    benchmark: str
    data: str | None = None
    limit: int | None = None
    run_code: bool = False


def read_answer(text: str) -> str | None:
    """The `answer` of the first JSON object in a text, or of something like one; None where there is none."""
    start, depth = None, 0
    for place, letter in enumerate(text):
        if letter == "{":
            start, depth = place if depth == 0 else start, depth + 1
        elif letter == "}" and depth:
            depth -= 1
            if depth == 0 and start is not None:
                found = _object(text[start : place + 1])
                if found is not None and "answer" in found:
                    return str(found["answer"])
                break
    for pattern in (r'"answer"\s*:\s*"(.*?)"', r'"answer"\s*:\s*([^,\s]+)', r"answer\s*:\s*([^,\s]+)"):
        if match := re.search(pattern, text, re.DOTALL):
            return match.group(1)
    return None


def _object(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text.replace("\n", ""))
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None


def same_number(answer: str, truth: str) -> bool:
    """Whether the first number of both is the same, without $ and thousands' commas."""
    numbers = [_NUMBER.search(text.replace("$", "").replace(",", "")) for text in (answer, truth)]
    return all(numbers) and len({float(number.group()) for number in numbers if number}) == 1


def same_literal(answer: str, truth: str) -> bool:
    """Whether two Python literals are equal; an answer without quotes may mean the string."""
    return truth in (answer, f"'{answer}'") or _literal(answer) == (True, _literal(truth)[1])


def _literal(text: str) -> tuple[bool, Any]:
    try:
        return True, ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False, None


Row = dict[str, Any]


def gsm8k_right(row: Row, answer: str, run_code: bool) -> bool:
    """GSM8K: the number after ####."""
    return same_number(answer, row["answer"].rpartition("####")[2])


def crux_right(row: Row, answer: str, run_code: bool) -> bool:
    """CRUXEval: the output as a literal; with `run_code`, f(input) is compared with it in a limited process."""
    if same_literal(answer, row["output"]) or not run_code:
        return same_literal(answer, row["output"])
    return _literal(answer)[0] and holds(f"{row['code']}\nassert f({row['input']}) == {answer}")


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's file, its question, and who says what is right."""

    file: str
    question: Callable[[Row], str]
    right: Callable[[Row, str, bool], bool]


BENCHMARKS = {
    "gsm8k": Benchmark("gsm8k/test.jsonl", lambda row: row["question"], gsm8k_right),
    "cruxeval": Benchmark("cruxeval/cruxeval.jsonl", lambda row: CRUX.format(code=row["code"], input=row["input"]), crux_right),
}


def run(name: str, out: Path, settings: Settings, options: Options) -> str:
    """Answer and grade; returns a line. Raises ValueError for an unknown benchmark or missing data."""
    if options.benchmark not in BENCHMARKS:
        raise ValueError(f"the benchmark must be one of {', '.join(BENCHMARKS)}, got {options.benchmark}")
    benchmark, model = BENCHMARKS[options.benchmark], model_name(name)
    rows = fetch.read_json_rows(fetch.data_file(benchmark.file, options.data))[: options.limit]
    questions = [Question(i, (PROMPT.format(question=benchmark.question(row)),), 0.0) for i, row in enumerate(rows)]
    answers = answer_all(name, model, questions, settings, out / options.benchmark / f"{model}.jsonl")
    read = [read_answer(answer["choices"][0]["turns"][0]) for answer in answers]
    right: stats.Values = {
        i: [100.0 * (answer is not None and benchmark.right(row, answer, options.run_code))]
        for i, (row, answer) in enumerate(zip(rows, read, strict=True))
    }
    accuracy, silent = stats.bootstrap(right), sum(answer is None for answer in read)
    more: dict[str, Any] = {} if options.limit is None else {"limit": len(rows)}
    save(out, [score(options.benchmark, "accuracy", model, accuracy, without_answer=silent, code_was_run=options.run_code, **more)])
    save_items(out, options.benchmark, model, None, right)
    cut = say_what_stopped(answers)
    return f"{options.benchmark} of {model}: {accuracy} % of {accuracy.n}; {silent} without a readable answer" + (f"\n{cut}" if cut else "")
