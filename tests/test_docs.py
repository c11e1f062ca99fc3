"""README, AGENTS.md and docs/: every command in them runs here on a small model, or says what it needs; numbers stand where they belong."""

import importlib.util
import io
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llamba import cli
from llamba.base.arguments import Parser
from llamba.eval.commands import COMMANDS as EVALUATIONS
from llamba.models.convert import convert
from llamba.running import run
from llamba.settings import Data, Distill, Draft, Recipe, Student
from llamba.settings.overrides import override

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "AGENTS.md", *sorted((ROOT / "docs").glob("*.md"))]
MEASURED = ("results.md", "gpu.md")  # the pages of numbers
SCRIPTS = {"eval/run_mtbench.sh": "mt_bench", "eval/run_alpaca.sh": "alpaca", "eval/run_lm_eval.sh": "lm_eval"}
NEEDS = re.compile(r"# needs (a GPU|a key|the network|fetched data|much memory|llama\.cpp|vLLM|the wheels)")
SMALLER = {  # what makes a command fit into a test; what it says is run as it stands
    "bench speculative": "--tokens 8 --repeats 1 --device cpu",
    "eval recall": "--tasks mqar --pairs 4 --trials 2 --device cpu",
    "eval perplexity": "--length 16 --device cpu",
    "eval lengths": "--lengths 16 --new-tokens 2 --repeats 1 --device cpu",
    "select": "--rows 2 --length 48",
    "chat": "--max-new-tokens 4",
}
ELSEWHERE = {  # benchmarks that another test runs, small
    "bench train": "test_bench.py", "bench ops": "test_bench.py", "bench mfu": "test_bench.py", "bench multistep": "test_triton_decode.py",
    "bench matrices": "test_structured.py", "serve": "test_serving.py", "import": "test_import.py",
}  # fmt: skip
TEACHER = re.compile(r"(meta-llama/[\w.-]+|recipes/tiny/teacher)")


class Parsed(Exception):
    """Raised in place of work: the arguments are right."""


def blocks(page: Path, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    return [line for block in blocks(page, "bash") for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, teacher_folder: Path, chat_file: Path) -> Path:
    """A run of two short stages, distillation and a draft."""
    out = tmp_path_factory.mktemp("docs") / "run"
    short = dict(batch=2, micro_batch=2, steps=1, warmup=0, precision="fp32")
    stages = [Distill(**short), Draft(layers=1, **short)]
    run.run(Recipe(str(teacher_folder), Student(mixer="mamba2"), Data(train=str(chat_file), length=48), stages, str(out)))
    return out


@pytest.fixture
def here(tmp_path: Path, finished_run: Path, chat_file: Path, monkeypatch) -> Path:
    """A folder in which the documents' commands find what they name."""
    for name in ("recipes", "eval", "kernels", "docs", "Makefile"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("demo", "plain", "llama3_50pct", "quarter"):
        shutil.copytree(finished_run, tmp_path / "runs" / name)
    (tmp_path / "runs" / "demo-data").mkdir()
    for name in ("chats.jsonl", "runs/demo-data/train.jsonl", "runs/demo-data/held_out.jsonl"):
        (tmp_path / name).write_text("".join(chat_file.read_text().splitlines(keepends=True)[:4]))
    (tmp_path / "runs/demo-data/held_out.jsonl").write_text('{"messages": [{"role": "user", "content": "a red cat"}]}\n')
    (tmp_path / "book.txt").write_text("the big cat sings and the small dog runs " * 40)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe_of(words: list[str]) -> None:
    """A recipe's line: every key in it is one of the recipe's, with a value that it takes; `--plan` and `--help` are done."""
    path = next(word for word in words if word.endswith(".py"))
    rest = words[words.index(path) + 1 :]
    flags = [word for word in rest if word.startswith("-")]
    for before, word in zip(words, words[1:], strict=False):
        assert before != "--config_file" or Path(word).is_file(), word
    recipe = runpy.run_path(path, run_name="recipe").get("recipe")
    if recipe is None:  # a script with a command line of its own, which the line must say that it cannot be run here
        assert "real/" in path
        return
    override(recipe, [word for word in rest if word not in flags], path)
    if flags:
        sys.argv = [path, *rest]
        runpy.run_path(path, run_name="__main__")


def name_of(words: list[str]) -> str:
    return " ".join(words[: 2 if words[0] in ("bench", "eval") else 1])


def llamba(words: list[str], runs: bool) -> None:
    """A line of the command: run, made small, or read as far as its arguments go."""
    name = name_of(words)
    if runs:
        cli.main([*words, *SMALLER.get(name, "").split()])
    else:
        with pytest.raises(Parsed):
            cli.main(words)


def performed(line: str) -> bool:
    """Whether a line is run here, and not only read."""
    words = shlex.split(line, comments=True)
    named = ELSEWHERE.get(name_of(words[1:])) if words[0] == "llamba" else None
    assert named is None or re.search(name_of(words[1:]).replace(" ", r"\W+"), (ROOT / "tests" / named).read_text()), line
    return NEEDS.search(line) is None and named is None


def perform(line: str, teacher: Path, monkeypatch) -> None:
    runs = performed(line)
    words = shlex.split(re.sub(r" --template \w+", "", TEACHER.sub(str(teacher), line)) if runs else line, comments=True)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
    elif words[0] in ("pip", "export", "pytest"):
        for extra in re.findall(r"\.\[(\w+)\]", line):
            assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE), line
    elif words[0] in ("accelerate", "python") and any(word.startswith("recipes/") and word.endswith(".py") for word in words):
        recipe_of(words)
    elif words[0] in SCRIPTS:
        assert Path(words[0]).is_file() and not runs, line
        llamba(["eval", SCRIPTS[words[0]], *words[1:]], runs)
    elif words[0] in ("llamba", ".venv/bin/llamba"):
        llamba(words[1:], runs)
    elif "-m" in words and not runs:
        assert importlib.util.find_spec(words[words.index("-m") + 1]) is not None, line
    else:
        raise AssertionError(f"no test knows what to do with: {line}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_runs_or_says_what_it_needs(page: Path, here: Path, teacher_folder: Path, monkeypatch, capsys) -> None:
    read: Callable = Parser.read

    def only_read(parser: Parser, argv: list[str]) -> None:
        read(parser, argv)
        raise Parsed

    for line in commands(page):
        with monkeypatch.context() as patch:
            if not performed(line):
                patch.setattr(Parser, "read", only_read)
                patch.setenv("LLAMBA_TRACEBACK", "1")
                patch.setitem(EVALUATIONS, "lm_eval", lambda argv: (_ for _ in ()).throw(Parsed()))
            perform(line, teacher_folder, patch)
    capsys.readouterr()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_block_runs(page: Path, here: Path, teacher_folder: Path) -> None:
    if blocks(page, "python"):
        convert(str(teacher_folder)).save_pretrained("runs/mine")
    for block in blocks(page, "python"):
        exec(compile(TEACHER.sub(str(teacher_folder), block), str(page), "exec"), {"__name__": "block"})


def prose(page: Path) -> str:
    """A page without its code, tables, links and pictures."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    text = "\n".join(line for line in text.splitlines() if not line.startswith(("|", "- `")))  # tables, lists of files
    return re.sub(r"`[^`]*`|\]\([^)]*\)", "", text)


def test_the_readme_is_short_and_its_numbers_stand_in_tables() -> None:
    readme = ROOT / "README.md"
    assert len(readme.read_text().splitlines()) <= 180
    names = r"Mamba-\d|Llama[- ]\d(\.\d)?(-\d+B[-\w]*)?|Apache-2\.0|\(?(arXiv )?\d{4}\.\d{5}\)?"
    assert not re.findall(r".*\d.*", re.sub(names, "", prose(readme)))


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in MEASURED], ids=lambda page: page.name)
def test_measured_numbers_stand_on_the_pages_of_results(page: Path) -> None:
    units = r"(x|×|%|ms|s|seconds|hours|[KMG]i?B|tokens/s|TFLOP/s|points|nats)"
    assert not re.findall(rf"[^\n]*\b(?!(0|95|100)%)\d[\d.,]*\s*{units}(?![\w-]).*", prose(page))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if not path.startswith("http"):
            found = page.parent / path if path else page
            assert found.exists(), f"{page.name} links to {target}"
            heads = [
                re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
                for line in found.read_text().splitlines()
                if line.startswith("#")
            ]
            assert not anchor or anchor in heads, f"{page.name} links to {target}; there are {heads}"


@pytest.mark.parametrize("script", sorted((ROOT / "docs" / "figures").glob("*.py")), ids=lambda path: path.stem)
def test_figures_are_what_their_scripts_draw(script: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / "made.svg")])
    runpy.run_path(str(script), run_name="__main__")
    made, kept = ((path).read_text() for path in (tmp_path / "made.svg", script.with_suffix(".svg")))
    drawn = re.compile(r"<!-- (.+) -->")  # every text of a picture, in order
    assert drawn.findall(made) == drawn.findall(kept) and len(drawn.findall(made)) > 5
