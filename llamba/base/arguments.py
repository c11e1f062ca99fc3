"""Command lines: options anywhere, errors in one line with what to do, and tables of commands. Imports nothing that is slow."""

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

Main = Callable[[list[str]], None]
DTYPES = ("auto", "float32", "bfloat16", "float16")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Values are called by what they are: N a whole number, X a number."""

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        known = {int: "N", float: "X"}
        return known[action.type] if action.type in known else super()._get_default_metavar_for_optional(action)


class Parser(argparse.ArgumentParser):
    """The parser of one command. Options may stand before, between and behind the other arguments."""

    def __init__(self, prog: str, about: str, epilog: str = "", **options: Any) -> None:
        super().__init__(prog=prog, description=about, epilog=epilog, formatter_class=_Help, allow_abbrev=False, **options)

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """The arguments' values. Ends the process at `--help` (status 0) and at a usage error (one line, status 2)."""
        words = list(argv[: argv.index("--")] if "--" in argv else argv)
        if {"-h", "--help"} & set(words):
            self.print_help()
            self.exit()
        known = self._option_string_actions
        unknown = [word for word in words if re.match(r"--\w[\w-]*(=|$)", word) and word.partition("=")[0] not in known]
        if unknown:
            option = unknown[0].partition("=")[0]
            near = nearest(option, known)
            self.error(f"{option} is none of its options{f'; did you mean {near}?' if near else ''}")
        return self.parse_intermixed_args(argv)

    def error(self, message: str) -> NoReturn:
        """One line: what is wrong, and where to read on."""
        fail(f"{self.prog}: {message}; `{self.prog} --help` tells more")


def fail(message: str) -> NoReturn:
    """One line on stderr and exit status 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(2)


def nearest(word: str, known: Sequence[str] | Mapping[str, Any]) -> str | None:
    """The known word that looks most like this one, if any does."""
    return next(iter(difflib.get_close_matches(word, known, n=1)), None)


def table_of(commands: Mapping[str, Main]) -> str:
    """A line per command: its name, and the first line of its docstring."""
    width = max(map(len, commands)) + 2
    return "\n".join(f"  {name:<{width}}{(main.__doc__ or '').strip().splitlines()[0]}" for name, main in commands.items())


def dispatch(prog: str, about: str, commands: Mapping[str, Main], argv: Sequence[str]) -> None:
    """Calls the command that the first argument names with the other arguments; `--help` lists the commands.

    Ends the process with status 2 and one line where the name is missing or not known.
    """
    name, rest = (argv[0], list(argv[1:])) if argv else ("", [])
    if name in ("-h", "--help"):
        print(f"usage: {prog} COMMAND ...   ({prog} COMMAND --help tells more)\n\n{about}\n\n{table_of(commands)}")
    elif name in commands:
        commands[name](rest)
    else:
        near = nearest(name, commands)
        got = f"{name} is none of its commands" if name else "a command is needed"
        fail(f"{prog}: {got}{f'; did you mean {near}?' if near else ''}; `{prog} --help` lists them")


def device_options(parser: Parser, dtype: str = "default: as saved; float32 on a CPU") -> None:
    """Where a model runs and in what numbers; `dtype` says what "auto" means there."""
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help=dtype)
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: the accelerator if there is one)")


def decoding_options(parser: Parser) -> None:
    """Where a model decodes, in what numbers, and with what weights."""
    device_options(parser)
    parser.add_argument(
        "--bits", type=int, choices=(8,), help="8: weights in 8 bits, computed with in bfloat16; on a CPU (default: as --dtype)"
    )
