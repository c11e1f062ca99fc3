"""The `llamba` command: a table of commands, and how each of them ends.

A new command is a function in a file of `llamba/commands/`, whose docstring's first line is its help, and one entry in COMMANDS.
Nothing here imports torch or transformers: help and usage errors come at once.
"""

import sys
from collections.abc import Sequence

from llamba.base.arguments import Main, dispatch
from llamba.base.errors import one_line_errors
from llamba.base.progress import quiet_libraries
from llamba.commands.bench import bench
from llamba.commands.convert import convert
from llamba.commands.exchange import export, import_
from llamba.commands.recipes import plan, run
from llamba.commands.report import report
from llamba.commands.select import select
from llamba.commands.serve import serve
from llamba.commands.talk import chat, generate
from llamba.eval.commands import evaluate

COMMANDS: dict[str, Main] = {
    "plan": plan,
    "run": run,
    "convert": convert,
    "select": select,
    "chat": chat,
    "generate": generate,
    "eval": evaluate,
    "serve": serve,
    "export": export,
    "import": import_,
    "report": report,
    "bench": bench,
}
ABOUT = """Pretrained transformers into Mamba hybrids: convert, distil, align, decode, evaluate.

`llamba --version` prints versions. LLAMBA_TRACEBACK=1 shows where an error came from."""


def _version() -> str:
    from llamba.base.provenance import versions

    found = versions()
    return "\n".join(f"{name} {found[name]}" for name in sorted(found, key=lambda name: name != "llamba"))


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exit status 2: a user's error; 1: a defect; 130: Ctrl-C; each is one line on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    quiet_libraries()
    with one_line_errors():
        if list(argv) == ["--version"]:
            print(_version())
        else:
            dispatch("llamba", ABOUT, COMMANDS, argv)


if __name__ == "__main__":
    main()
