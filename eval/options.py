"""What the commands that have a model answer questions share: their options, and the settings these make."""

import argparse
import json
from typing import Any

from llamba.base.arguments import Parser, decoding_options


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def parameters_of(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object such as '{{\"temperature\": null}}', got {text}")
    return found


def answer_options(parser: Parser, batch: int, most: int, questions: bool = True) -> None:
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
    from llamba.eval.answerer import Settings

    return Settings(args.batch, args.max_new_tokens, args.seed, args.dtype, args.device, args.draft, args.system, args.bits)
