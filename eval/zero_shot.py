"""GSM8K and CRUXEval in ZeroEval's form: zero-shot, greedy, the answer as a field of a JSON object after its reasoning.

Prompts and reading of answers follow ZeroEval (github.com/WildEval/ZeroEval), which the papers' numbers come from.
"""

import ast
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llamba.eval import fetch, foreign, sandbox, stats
from llamba.eval.answerer import Settings
from llamba.eval.answers import Question, answer_all, say_what_stopped
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
    """What to do. `run_code`: CRUXEval's answers are also checked by running the function, in a box of the system's unless `unsafe`."""

    benchmark: str
    data: str | None = None
    limit: int | None = None
    run_code: bool = False
    unsafe: bool = False

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit must be at least 1, got {self.limit}")
        if self.unsafe and not self.run_code:
            raise ValueError("--unsafe says how --run-code may run code; give both or neither")

    def runner(self) -> "Runner | None":
        """What runs code; None where none is to be run. Raises ValueError where there is no box to run it in."""
        if not self.run_code:
            return None
        tool = sandbox.find()
        if tool is None and not self.unsafe:
            raise ValueError(
                "--run-code needs bubblewrap, or util-linux's unshare with user namespaces, and neither works here; install bubblewrap, "
                "leave --run-code out, or add --unsafe to run the benchmark's code with limits but without walls"
            )
        return partial(sandbox.run, tool=tool)


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
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def same_number(answer: str, truth: str) -> bool:
    """Whether the first number of both is the same, without $ and thousands' commas."""
    numbers = [_NUMBER.search(_plain(text)) for text in (answer, truth)]
    return all(numbers) and len({float(number.group()) for number in numbers if number}) == 1


def _plain(text: str) -> str:
    return text.replace("$", "").replace(",", "")


def same_literal(answer: str, truth: str) -> bool:
    """Whether two Python literals are equal; an answer without quotes may mean the string, and what is no literal equals its own text."""
    (is_literal, value), (has_value, wanted) = _literal(answer), _literal(truth)
    return truth in (answer, f"'{answer}'") or (is_literal and has_value and bool(value == wanted))


def _literal(text: str) -> tuple[bool, Any]:
    try:
        return True, ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False, None


Row = dict[str, Any]
Runner = Callable[[str], bool]


def gsm8k_row(placed: foreign.LocatedRow) -> Row:
    """A question and its number. Raises ValueError, with file and line, for a row without one: it would count as wrong for everybody."""
    where, row = placed
    answer = row.get("answer")
    last = str(answer).rpartition("####")[2] if isinstance(answer, str) else str(answer) if foreign.number(answer) is not None else ""
    marked = isinstance(answer, str) and "####" in answer
    if not (_NUMBER.search(_plain(last)) if marked else _NUMBER.fullmatch(_plain(last).strip())):
        raise ValueError(f"{where} must have an answer that ends in #### and a number, got {str(answer)[-40:]!r}")
    return {"question": foreign.text(placed, "question"), "answer": last}


def crux_row(placed: foreign.LocatedRow) -> Row:
    """A function, its input and its output. Raises ValueError, with file and line, where one is missing."""
    return {key: foreign.text(placed, key) for key in ("code", "input", "output")}


def gsm8k_right(row: Row, answer: str, run: Runner | None) -> bool:
    """GSM8K: the number after ####."""
    return same_number(answer, row["answer"])


def crux_right(row: Row, answer: str, run: Runner | None) -> bool:
    """CRUXEval: the output as a literal; with `run`, f(input) is compared with the literal's value."""
    if same_literal(answer, row["output"]) or run is None or not _literal(answer)[0]:
        return same_literal(answer, row["output"])
    return run(f"{row['code']}\nimport ast as _ast\nassert f({row['input']}) == _ast.literal_eval({answer!r})")


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's file, what a row of it must hold, its question, and who says what is right."""

    file: str
    row: Callable[[foreign.LocatedRow], Row]
    question: Callable[[Row], str]
    right: Callable[[Row, str, Runner | None], bool]


BENCHMARKS = {
    "gsm8k": Benchmark("gsm8k/test.jsonl", gsm8k_row, lambda row: row["question"], gsm8k_right),
    "cruxeval": Benchmark("cruxeval/cruxeval.jsonl", crux_row, lambda row: CRUX.format(code=row["code"], input=row["input"]), crux_right),
}


def run(name: str, out: Path, settings: Settings, options: Options) -> str:
    """Answer and grade; returns a line. Raises ValueError for an unknown benchmark, missing data, and no box to run code in."""
    if options.benchmark not in BENCHMARKS:
        raise ValueError(f"the benchmark must be one of {', '.join(BENCHMARKS)}, got {options.benchmark}")
    benchmark, model, runner = BENCHMARKS[options.benchmark], model_name(name), options.runner()
    path = fetch.data_file(benchmark.file, options.data)
    rows = [benchmark.row(placed) for placed in foreign.rows(path)][: options.limit]
    if not rows:
        raise ValueError(f"{path} must hold questions, and is empty")
    questions = [Question(i, (PROMPT.format(question=benchmark.question(row)),), 0.0) for i, row in enumerate(rows)]
    answers = answer_all(name, model, questions, settings, out / options.benchmark / f"{model}.jsonl")
    read = [read_answer(answer["choices"][0]["turns"][0]) for answer in answers]
    right: stats.Values = {
        i: [100.0 * (answer is not None and benchmark.right(row, answer, runner))]
        for i, (row, answer) in enumerate(zip(rows, read, strict=True))
    }
    accuracy, silent = stats.share(right), sum(answer is None for answer in read)
    more: dict[str, Any] = {} if options.limit is None else {"limit": len(rows)}
    save(out, [score(options.benchmark, "accuracy", model, accuracy, without_answer=silent, code_was_run=options.run_code, **more)])
    save_items(out, options.benchmark, model, None, right)
    cut = say_what_stopped(answers)
    return f"{options.benchmark} of {model}: {accuracy} % of {accuracy.n}; {silent} without a readable answer" + (f"\n{cut}" if cut else "")
