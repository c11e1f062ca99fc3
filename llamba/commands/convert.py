"""`llamba convert`: a teacher becomes a student, untrained, in a new folder."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from llamba.base.arguments import Parser
from llamba.settings.overrides import read_options


def _attention(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--attention must be a fraction or a list like [1,3]; got {text}") from error


def convert(argv: list[str]) -> None:
    """convert a teacher, and print where every tensor came from"""
    parser = Parser("llamba convert", "Convert a teacher into an untrained student, and print where every tensor came from.")
    parser.add_argument("teacher", help="run folder, model folder, GGUF file or hub name")
    parser.add_argument("out", help="new folder for the student")
    parser.add_argument(
        "--mixer", default="auto", help="auto (default: the best that we know), mamba2, mamba1, ...; docs/convert.md has them all"
    )
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="of the mixer, e.g. window=64 (repeat for more)"
    )
    parser.add_argument("--attention", default="0.5", help="fraction of layers that keep attention, or a list like [1,3] (default 0.5)")
    parser.add_argument("--init", default="attention", help="attention (default), paper, mohawk, random or linear_attention")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.read(argv)
    from llamba.models.convert import convert as make
    from llamba.models.loading import has_tokenizer, load_tokenizer, located

    teacher, out, options = located(args.teacher), Path(args.out), read_options(args.option)
    partial = out.with_name(out.name + ".partial")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"the output must be a new or empty folder; {out} is a file, or has files")
    tokenizer = load_tokenizer(teacher) if has_tokenizer(teacher) else None
    student = make(teacher, mixer=args.mixer, attention=_attention(args.attention), init=args.init, seed=args.seed, options=options)
    print(student.conversion)
    try:
        student.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"saved: {out}" + ("" if tokenizer else f" (without a tokenizer: {args.teacher} has none)"))
