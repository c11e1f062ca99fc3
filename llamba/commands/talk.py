"""`llamba chat` and `llamba generate`: talk to a model, or let it complete a text."""

import argparse
import sys
from typing import Any

from llamba.base.arguments import Parser, decoding_options


def _parser(prog: str, about: str) -> Parser:
    parser = Parser(prog, about)
    parser.add_argument("model", help="run folder, model folder or hub name")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longest answer (default 512)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this probability (default 1: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default 0)")
    parser.add_argument(
        "--draft", help='a smaller model of the same vocabulary (or the run that made it) drafts, or "lookup"; the output stays the same'
    )
    parser.add_argument("--lookahead", type=_lookahead, help="tokens drafted at a time, or auto (default)")
    decoding_options(parser)
    return parser


def _lookahead(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def _sampling(args: argparse.Namespace) -> Any:
    from llamba.chat.conversation import Sampling

    return Sampling(args.max_new_tokens, args.temperature, args.top_p, args.seed)


def _speculation(args: argparse.Namespace, model: Any) -> Any:
    from llamba.chat.conversation import Speculation, load_draft
    from llamba.speculative import Auto

    if args.draft is None:
        if args.lookahead is not None:
            raise ValueError('--lookahead needs --draft, a smaller model or "lookup"; got none')
        return None
    return Speculation(load_draft(args.draft, model, args.bits), Auto() if args.lookahead in (None, "auto") else args.lookahead)


def chat(argv: list[str]) -> None:
    """talk to a model"""
    parser = _parser("llamba chat", "Talk to a model, on a terminal or over a pipe. /help lists what may be said to the program.")
    parser.add_argument("--system", help="system message")
    args = parser.read(argv)
    from llamba.chat.conversation import Chat, load, talk

    model, tokenizer = load(args.model, args.dtype, args.device, args.bits)
    talk(Chat(model, tokenizer, _sampling(args), args.system, speculation=_speculation(args, model)))


def generate(argv: list[str]) -> None:
    """complete a text, or answer one message"""
    parser = _parser("llamba generate", "Complete a text or, with --chat, answer one message.")
    parser.add_argument("prompt", nargs="?", help="default: standard input")
    parser.add_argument("--chat", action="store_true", help="take the prompt as a user's message")
    args = parser.read(argv)
    import torch

    from llamba.chat.conversation import Chat, load, stream

    sampling = _sampling(args)
    model, tokenizer = load(args.model, args.dtype, args.device, args.bits)
    speculation = _speculation(args, model)
    prompt = args.prompt if args.prompt is not None else sys.stdin.read()
    torch.manual_seed(sampling.seed)
    if args.chat:
        Chat(model, tokenizer, sampling, speculation=speculation).answer(prompt, sys.stdout)
    else:
        stream(model, tokenizer, (tokenizer.bos_token or "") + prompt, sampling, sys.stdout, speculation)
