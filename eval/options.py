"""What the commands that have a model answer questions share: their options, and the settings these make."""

import argparse
from typing import Any

from llamba.base.arguments import Parser, decoding_options


def count(text: str) -> int:
    """An option's whole number of at least 1. Raises argparse.ArgumentTypeError for what is none."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def answer_options(parser: Parser, batch: int, most: int, questions: bool = True) -> None:
    """Give a parser the model and how it answers, with these defaults; `questions`: those of a benchmark, which has files of its own."""
    parser.add_argument("model", metavar="MODEL", help="run folder (its last finished stage), model folder, or hub name")
    parser.add_argument("--out", help="where everything goes (default: MODEL/eval, or runs/eval/NAME)")
    parser.add_argument(
        "--batch", type=int, default=batch, help=f"questions answered at once (default {batch}); part of the result's identity"
    )
    parser.add_argument("--max-new-tokens", type=int, default=most, help=f"longest answer (default {most})")
    parser.add_argument("--seed", type=int, default=0, help="of the answers' random numbers (default 0)")
    decoding_options(parser)
    parser.add_argument(
        "--draft", metavar="MODEL", help='a smaller model of the same vocabulary that speculates, or "lookup"; only rounding may differ'
    )
    parser.add_argument("--system", help="system message (default: none)")
    if questions:
        parser.add_argument("--data", help="a folder with the benchmark's files (default: what `llamba eval fetch` got)")
        parser.add_argument("--limit", type=count, help="only so many questions: a try, not a score")


def settings_of(args: argparse.Namespace) -> Any:
    """How a model answers, as the options of `answer_options` say."""
    from llamba.eval.answerer import Settings

    return Settings(args.batch, args.max_new_tokens, args.seed, args.dtype, args.device, args.draft, args.system, args.bits)
