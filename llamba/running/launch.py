"""The last line of every recipe file: the command line's overrides, then the plan or the run."""

import json
import os
import sys
from collections.abc import Sequence

from llamba.base.errors import one_line_errors
from llamba.base.progress import quiet_libraries
from llamba.settings import Recipe, overrides


def _help(recipe: Recipe, source: str) -> str:
    listed = "\n".join(f"  {key}={json.dumps(value)}" for key, (value, _) in overrides.keys(recipe).items())
    return (
        f"python {source} [--plan] [key=value ...]\naccelerate launch [--config_file FILE] {source} [key=value ...]\n\n"
        f"--plan prints what the run would do and does nothing. LLAMBA_TRACEBACK=1 shows where an error came from.\n\n{listed}"
    )


def _main(recipe: Recipe, arguments: Sequence[str], source: str) -> None:
    flags = [argument for argument in arguments if argument.startswith("-")]
    if {"-h", "--help"} & set(flags):
        return print(_help(recipe, source))
    if set(flags) - {"--plan"}:
        raise ValueError(f"needed --plan, --help or key=value, got {flags[0]}")
    assignments = [argument for argument in arguments if argument not in flags]
    recipe = overrides.override(recipe, assignments, source)
    if os.environ.get("RANK", "0") == "0":
        print("".join(f"note: {line}\n" for line in overrides.unreached(recipe, assignments)), end="", file=sys.stderr)
    if flags:
        from llamba.running.plan import plan_here

        return print(plan_here(recipe))
    import torch

    from llamba.running.run import run

    last = run(recipe)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if os.environ.get("RANK", "0") == "0":
        print(f"done: {last}")


def launch(recipe: Recipe) -> None:
    """Run a recipe file's recipe with the command line's overrides; the last line of every recipe file.

    A user's error ends as one line on stderr and exit status 2, Ctrl-C with 130, a defect with 1.
    """
    quiet_libraries()
    with one_line_errors(interrupted="stopped; the same command goes on from here"):
        _main(recipe, sys.argv[1:], sys.argv[0])
