"""Zero-shot grading, the limited process, memory and speed by length, and the report over all scores."""

import csv
import json
import os
import socket
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from uuid import uuid4

import pytest
import torch
from test_mt_bench import TEACHER, fails
from transformers import AutoModelForCausalLM

import llamba
from llamba.cli import main as llamba_main
from llamba.eval import lengths, sandbox, scores, zero_shot
from llamba.eval.answerer import Answered, Answerer
from llamba.eval.commands import main
from llamba.eval.journal import read_lines
from llamba.eval.stats import Interval


def test_answers_are_read_as_zeroeval_reads_them() -> None:
    read = zero_shot.read_answer
    assert read('Sure:\n```json\n{"reasoning": "3 {x} + 4\n= 7", "answer": "7"}\n```') == "7"
    assert read('{"reasoning": "broken "quote"", "answer": "7 apples"}') == "7 apples"
    assert read('{"answer": 1,234}') == "1" and read('{"answer": 12.5}') == "12.5" and read('{"answer": ["a", 1]}') == "['a', 1]"
    assert read("the answer: 42, I think") == "42" and read("I do not know") is None
    assert zero_shot.same_number("$1,234.00 in all", "1234") and not zero_shot.same_number("1235", "1234")
    assert not zero_shot.same_number("none", "1234")
    assert zero_shot.same_literal("abc", "'abc'") and zero_shot.same_literal("{'b': 2, 'a': 1}", "{'a': 1, 'b': 2}")
    assert (
        zero_shot.same_literal('"x"', "'x'") and not zero_shot.same_literal("[1, 2]", "[2, 1]") and not zero_shot.same_literal("f(1)", "2")
    )


def test_an_answer_is_equal_or_it_is_not() -> None:
    """Not by what Python makes of it in the place of an assertion's end, nor because neither is a literal."""
    equal = zero_shot.same_literal
    assert not equal("1, 2", "1") and not equal("None", "float('inf')") and not equal("[]", "Counter()") and equal("Counter()", "Counter()")
    assert not equal("1 or 2", "1") and not equal("{1: [2]", "1") and not equal("{[]: 1}", "1") and not equal("(" * 5000, "1")
    assert equal("None", "None") and equal("(1, 2)", "1, 2") and equal("1.0", "1")
    row, asked = {"code": "def f(x):\n    return x", "input": "1", "output": "1"}, []
    assert not zero_shot.crux_right(row, "f(1)", lambda code: asked.append(code) or True) and not asked  # only literals are run
    box = partial(sandbox.run, tool=None)
    for answer, right in (("1, 2", False), ("1", True), ("2", False), ("True", True), ("'1'", False), (" 1 # one", True), ("1\n", True)):
        assert zero_shot.crux_right(row | {"output": "Unknown()"}, answer, box) == right, answer
    assert not zero_shot.crux_right(row | {"code": "def f(x):\n    raise SystemExit(0)", "output": "?"}, "1", box)


@pytest.mark.parametrize(
    ("benchmark", "row", "what"),
    [
        ("gsm8k", {"question": "How many?"}, "an answer that ends in #### and a number"),
        ("gsm8k", {"question": "How many?", "answer": None}, "an answer that ends"),
        ("gsm8k", {"question": "How many?", "answer": "3 and 4 are 7"}, "an answer that ends"),
        ("gsm8k", {"question": "How many?", "answer": "so #### many"}, "an answer that ends"),
        ("gsm8k", {"answer": "#### 7"}, "a text under 'question'"),
        ("cruxeval", {"code": "def f(x): pass", "input": "1"}, "a text under 'output'"),
        ("cruxeval", {"code": None, "input": "1", "output": "1"}, "a text under 'code'"),
    ],
)
def test_rows_that_nobody_can_answer_are_refused(tmp_path: Path, capsys, benchmark: str, row: dict, what: str) -> None:
    path = tmp_path / zero_shot.BENCHMARKS[benchmark].file
    path.parent.mkdir()
    good = (
        {"question": "1 + 1?", "answer": "#### 2"} if benchmark == "gsm8k" else {"code": "def f(x): return x", "input": "1", "output": "1"}
    )
    path.write_text(json.dumps(good) + "\n" + json.dumps(row))
    error = fails(capsys, ["zero_shot", benchmark, str(TEACHER), "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert what in error and "line 2" in error
    path.write_text("")
    assert "is empty" in fails(capsys, ["zero_shot", benchmark, str(TEACHER), "--data", str(tmp_path), "--out", str(tmp_path / "out")])


def test_gsm8k_answers_may_be_numbers_alone() -> None:
    for answer in (7, 7.0, "7", "$7", "so 3 + 4\n#### 7"):
        assert zero_shot.gsm8k_right(zero_shot.gsm8k_row(("here", {"question": "?", "answer": answer})), "7", None)


@pytest.fixture(params=["a box", "limits alone"])
def tool(request) -> str | None:
    found = sandbox.find()
    if request.param == "a box" and found is None:
        pytest.skip("no bubblewrap and no unshare that works here")
    return found if request.param == "a box" else None


def test_code_runs_within_limits(tmp_path: Path, monkeypatch, tool: str | None) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 1)
    holds = partial(sandbox.run, tool=tool)
    assert holds("assert sum(range(4)) == 6") and not holds("assert False") and not holds("syntax error")
    assert not holds("while True: pass") and not holds("import time; time.sleep(60)")
    assert not holds("x = bytearray(2 << 30)")
    assert not holds("raise SystemExit(0)") and not holds("import os; os._exit(0)")
    target = tmp_path / "written"
    holds(f"open({str(target)!r}, 'w').write('x' * 9)")
    assert not target.exists() or target.stat().st_size == 0
    assert holds("import os; assert set(os.environ) <= {'LC_CTYPE', 'PWD'} and os.listdir('.') == []")
    assert holds("import collections, decimal, hashlib, itertools, json, math, re, statistics, string")


def test_a_box_has_no_files_no_network_and_leaves_nobody(tmp_path: Path) -> None:
    """Harmless attempts at what the limits alone would allow."""
    tool = sandbox.find()
    if tool is None:
        pytest.skip("no bubblewrap and no unshare that works here")
    file, holds = tmp_path / "file", partial(sandbox.run, tool=tool)
    file.write_text("precious")
    named = repr(str(file))
    for code in (f"open({named}).read()", f"open({named}, 'r+').truncate(0)", f"import os; os.rename({named}, {named} + 'x')",
                 f"import os; os.remove({named})", "open('here', 'w')", "import os; os.mkdir('here')", "open('/etc/passwd')",
                 "import os; os.listdir('/proc/1')", "import os; os.setuid(1)",
                 "import ctypes; assert ctypes.CDLL(None).umount2(b'/usr/lib', 2) == 0"):  # fmt: skip
        assert not holds(code), code
    assert file.read_text() == "precious" and list(tmp_path.iterdir()) == [file]
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        assert not holds(f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 2)")
    name = f"left-{uuid4().hex[:8]}"  # a thread's name has 15 characters
    leave = f"import ctypes, os, time\nif os.fork() == 0:\n    os.setsid()\n    ctypes.CDLL(None).prctl(15, b'{name}')\n    time.sleep(%d)"
    sandbox.run(leave % 4, tool=None)
    assert _named(name) or os.getuid(), "without walls it stays, and is found by its name (others than root may not fork at all)"
    while _named(name):
        time.sleep(0.1)
    holds(leave % 60)
    deadline = time.monotonic() + 5
    while _named(name):
        assert time.monotonic() < deadline, "it outlives its box"


def _named(name: str) -> list[Path]:
    return [path for path in Path("/proc").glob("[0-9]*/comm") if _read(path) == f"{name}\n".encode()]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it ended meanwhile
        return b""


def test_code_is_not_run_without_a_box_unless_told(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sandbox, "find", lambda: None)
    argv = ["zero_shot", "cruxeval", str(TEACHER), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert "--run-code needs bubblewrap" in fails(capsys, [*argv, "--run-code"])
    assert "llamba eval fetch cruxeval" in fails(capsys, [*argv, "--run-code", "--unsafe"])  # which is the next thing that is missing
    assert "give both or neither" in fails(capsys, [*argv, "--unsafe"])
    monkeypatch.undo()
    monkeypatch.setattr(sandbox, "TOOLS", ("nothing-of-this-name",))
    assert sandbox.find.__wrapped__() is None


def test_gsm8k_and_cruxeval_are_graded(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "gsm8k").mkdir()
    rows = [{"question": f"What is {i} + 1?", "answer": f"... #### {i + 1}"} for i in range(4)]
    (tmp_path / "gsm8k/test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "cruxeval").mkdir()
    crux = [{"code": "def f(x):\n    return x * 2", "input": str(i), "output": str(2 * i), "id": str(i)} for i in range(3)]
    (tmp_path / "cruxeval/cruxeval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in crux))
    said = iter(
        ['{"answer": "1"}', '{"answer": "3"}', "no", '{"answer": "$4.0"}', '{"answer": "0"}', '{"answer": "2.0"}', '{"answer": "5"}']
    )
    asked: list = []

    def answer(self: Answerer, chats: list, *more: object) -> list[Answered]:
        asked.extend(chat[-1]["content"] for chat in chats)
        return [Answered(next(said), 1, "end") for _ in chats]

    monkeypatch.setattr(Answerer, "__call__", answer)
    common = [str(TEACHER), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    main(["zero_shot", "gsm8k", *common])
    main(["zero_shot", "cruxeval", *common, "--run-code", "--unsafe"])
    found = {row["benchmark"]: row for row in read_lines(tmp_path / "out/scores.jsonl")}
    assert found["gsm8k"]["value"] == 50 and found["gsm8k"]["without_answer"] == 1
    assert found["cruxeval"]["value"] == pytest.approx(200 / 3) and found["cruxeval"]["code_was_run"]
    assert asked[0].startswith("\n## Question: \n\nWhat is 0 + 1?\n\n\n## Instruction \n\nPlease answer this question by first reasoning")
    assert "assert f(2) == ??\n[/PYTHON]" in asked[6]
    assert "llamba eval fetch gsm8k" in fails(
        capsys, ["zero_shot", "gsm8k", str(TEACHER), "--data", str(tmp_path / "no"), "--out", str(tmp_path)]
    )


def test_the_cache_of_a_hybrid_does_not_grow_where_attention_is_gone(teacher_folder: Path) -> None:
    sizes = {}
    for attention in (1.0, 0.5, 0.0):
        model = AutoModelForCausalLM.from_pretrained(teacher_folder).eval()
        model = model if attention == 1.0 else llamba.convert(model, mixer="mamba2", attention=attention).eval()
        sizes[attention] = [lengths._measure_once(model, torch.arange(n)[None] % 250, 1)[2] for n in (64, 128)]
    keys = 4 * 2 * 2 * 8 * 4  # bytes per token: layers, keys and values, heads, width, fp32
    assert sizes[1.0] == [64 * keys, 128 * keys] and sizes[0.0][0] == sizes[0.0][1]
    assert sizes[0.5][1] - sizes[0.5][0] == 64 * keys // 2


@pytest.mark.slow
def test_lengths_are_measured_apart_and_drawn(teacher_folder: Path, tmp_path: Path, capsys) -> None:
    main(
        [
            "lengths",
            str(teacher_folder),
            str(TEACHER),
            "--lengths",
            "64",
            "128",
            "--new-tokens",
            "4",
            "--repeats",
            "1",
            "--out",
            str(tmp_path),
        ]
    )
    rows = read_lines(tmp_path / "scores.jsonl")
    assert len(rows) == 2 * 2 * 4 and all(row["value"] > 0 for row in rows) and (tmp_path / "lengths.png").exists()
    assert "did not fit" not in capsys.readouterr().out


def test_the_report_puts_runs_side_by_side(teacher_folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for name, attention, mean, judge in (("whole", 1.0, 7.0, "a"), ("half", 0.5, 6.0, "a"), ("other", 0.5, 9.0, "b")):
        folder = tmp_path / name
        (folder / "eval").mkdir(parents=True)
        (folder / "eval" / scores.MODELS).write_text(json.dumps({name: {"path": name, "attention": attention}}))
        scores.save(folder / "eval", [scores.score("mt_bench", "average", name, Interval(mean, mean - 1, mean + 1, 80), judge, failed=2)])
        needles = [scores.score("recall/needle", f"{t}, {d}", name, 50.0, cell=[t, d]) for t in (1, 2) for d in (0.0, 1.0)]
        scores.save(folder / "eval", needles)
        scores.save_items(folder / "eval", "mt_bench", name, judge, {q: [mean, mean + q % 2 * (name == "whole")] for q in range(80)})
        for length in (64, 128):
            named = [f"{what} at {length}" for what in ("prefill, tokens/s", "decode, tokens/s", "peak MiB", "cache MiB")]
            scores.save(folder / "eval", [scores.score("lengths", metric, name, 5.0, length=length) for metric in named])
    scores.save(tmp_path / "whole/eval", [scores.score("mt_bench", "average", "whole", Interval(7.5, 7, 8, 80), "a")])  # replaces
    part = scores.score("lm_eval/mmlu_law", "acc", "half", 1.0, part_of="mmlu", limit=3)
    scores.save(tmp_path / "half/eval", [part, part | {"benchmark": "lm_eval/mmlu", "part_of": None}])
    llamba_main(["report", "whole", "half", "other", "--out", "together"])
    printed = capsys.readouterr().out
    by_a = printed.partition("judged by a\n")[2].partition("\n\n")[0]
    assert "whole  7.50 [7.00, 8.00]" in by_a and "half   6.00" in by_a and "other" not in by_a and "(2 failed)" in by_a
    assert "Zephyr-7B (published)" in printed.partition("judged by gpt-4 (retired)\n")[2]
    assert "whole - half = 1.25 [" in printed and "better on 80, worse on 0, equal on 0" in printed and "whole - other" not in printed
    assert "mmlu_law" not in printed and "1.00 (first 3 only)" in printed
    assert "  half: " in printed.partition("made by\n")[2]
    with open("together/scores.csv") as file:
        rows = list(csv.DictReader(file))
    ours = next(row for row in rows if row["model"] == "half" and row["benchmark"] == "mt_bench")
    assert ours["judge"] == "a" and ours["attention"] == "0.5" and all(ours[key] for key in ("command", "versions", "hardware", "date"))
    assert {row["source"] for row in rows if row["judge"] == "gpt-4 (retired)"} == {"Mamba-in-Llama (arXiv 2408.15237), Table 2"}
    assert "## mt_bench, judged by a" in Path("together/scores.md").read_text()
    assert all(Path("together", name).read_bytes()[:4] == b"\x89PNG" for name in ("attention.png", "needle.png", "lengths.png"))
    assert lengths.read_curves(read_lines(Path("half/eval/scores.jsonl")))["half"][128] == lengths.Measured(5.0, 5.0, 5.0, 5.0)
