"""`llamba eval …`, and what the shell scripts of this folder call: all benchmarks by name, and where their data is got."""

import errno
import sys

from llamba.base.arguments import Main, Parser, dispatch
from llamba.base.errors import one_line_errors
from llamba.base.progress import quiet_libraries
from llamba.eval.judged import alpaca, judgments, mt_bench
from llamba.eval.unjudged import lengths, lm_eval, perplexity, recall, zero_shot


def fetch(argv: list[str]) -> None:
    """Get benchmark data."""
    from llamba.eval.fetch import FILES
    from llamba.eval.fetch import fetch as get

    parser = Parser("llamba eval fetch", "Get benchmark data from its public homes into the cache, checked by size and SHA-256.")
    parser.add_argument("names", nargs="*", help=f"{', '.join(FILES)} (default: all)")
    print("\n".join(get(parser.read(argv).names or tuple(FILES))))


COMMANDS: dict[str, Main] = {
    "mt_bench": mt_bench,
    "judgments": judgments,
    "alpaca": alpaca,
    "lm_eval": lm_eval,
    "recall": recall,
    "perplexity": perplexity,
    "zero_shot": zero_shot,
    "lengths": lengths,
    "fetch": fetch,
}


def evaluate(argv: list[str]) -> None:
    """benchmarks: MT-Bench, AlpacaEval, lm-eval, recall, perplexity and more"""
    with one_line_errors(interrupted="stopped; what was answered and judged so far is kept, and the same command goes on from here"):
        try:
            dispatch("llamba eval", "What a model is worth.", COMMANDS, argv)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                done = "what was answered and judged so far is kept: make room and give the same command again"
                raise ValueError(f"the disk is full ({error}); {done}") from error
            raise


def main(argv: list[str] | None = None) -> None:
    """Run one command: what the shell scripts of this folder call."""
    quiet_libraries()
    evaluate(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    main()
