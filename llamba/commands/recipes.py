"""`llamba plan` and `llamba run`: what a recipe would do, and doing it."""

import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

from llamba.base.arguments import Parser
from llamba.base.errors import one_line_errors
from llamba.settings import Recipe


def _run_file(path: str) -> dict[str, Any]:
    """The names that a recipe file defines; it finds its neighbours, as under `python FILE`. Raises ValueError where it does not run."""
    sys.path.insert(0, str(Path(path).resolve().parent))
    try:
        return runpy.run_path(path, run_name="recipe")
    except (Exception, SystemExit) as error:  # whatever a user's file raises
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        where = path if line is None else f"{path}, line {line}"
        raise ValueError(f"the recipe does not run: {type(error).__name__}: {error} ({where})") from error
    finally:
        del sys.path[0]


def _read(prog: str, about: str, argv: list[str]) -> Recipe:
    from llamba.settings.overrides import override, unreached

    parser = Parser(prog, about)
    parser.add_argument("recipe", help="a recipe file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe; `python RECIPE --help` lists the keys")
    args = parser.read(argv)
    if not Path(args.recipe).is_file():
        raise ValueError(f"a recipe file is needed; got {args.recipe}, which is no file")
    found = _run_file(args.recipe).get("recipe")
    if not isinstance(found, Recipe):
        raise ValueError(f"{args.recipe} must define `recipe = Recipe(...)`; it does not")
    recipe = override(found, args.overrides, args.recipe)
    print("".join(f"note: {line}\n" for line in unreached(recipe, args.overrides)), end="", file=sys.stderr)
    return recipe


def plan(argv: list[str]) -> None:
    """what a recipe would do: layers, parameters, tokens, memory, hours; trains nothing"""
    recipe = _read("llamba plan", "What a recipe would do. Needs neither weights nor network.", argv)
    from llamba.running.plan import plan_here

    print(plan_here(recipe))


def run(argv: list[str]) -> None:
    """run a recipe, or go on with it where it was stopped"""
    recipe = _read("llamba run", "Run a recipe in this process; `accelerate launch RECIPE` runs it in several.", argv)
    from llamba.running.run import run as perform

    with one_line_errors(interrupted="stopped; the same command goes on from here"):
        print(f"done: {perform(recipe)}")
