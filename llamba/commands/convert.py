"""`llamba convert`: a teacher becomes a student, untrained, in a new folder."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from llamba.base.arguments import Parser
from llamba.settings.overrides import read_options

LENGTH = 512  # tokens of a sequence that layers are measured on


def _attention(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--attention must be a fraction or a list like [1,3]; got {text}") from error


def _selected(teacher: str, attention: Any, args: Any, options: dict[str, Any], out: Path) -> list[int]:
    """The layers that need attention most, as many as the fraction `attention` means; their scores are left beside the student."""
    if isinstance(attention, list):
        raise ValueError(f"--select finds the layers itself and needs --attention as a fraction; got {args.attention}")
    from llamba.settings import Data, Select
    from llamba.stages.select import select

    stage = Select(keep=float(attention), method="swap", rows=args.rows, targets="all")
    data = Data(train=args.select, length=LENGTH, template=args.template, streaming=True)
    return select(teacher, None, data, stage, out.with_name(out.name + ".layers.json"), args.mixer, args.seed, options)


def _calibration(teacher: str, args: Any) -> list[Any] | None:
    """Rows of token ids for --calibrate; none without it."""
    if not args.calibrate:
        return None
    from llamba.running.run import calibration_rows
    from llamba.settings import Data

    if args.tokens < 1:
        raise ValueError(f"--tokens must be at least 1, got {args.tokens}")
    data = Data(train=args.calibrate, length=LENGTH, template=args.template, streaming=True)
    return calibration_rows(data, teacher, args.tokens)


def _warn_of_first(attention: Any) -> None:
    """Say it where a fraction, which looks at no layer, takes attention from the first one: by far the worst to replace."""
    if not isinstance(attention, list) and 0 < attention <= 0.5:
        print(
            f"note: --attention {attention} converts every layer but each {round(1 / attention)}th, layer 0 too, whose attention is missed "
            "most in every model measured; --select DATA measures which layers need theirs, in minutes",
            file=sys.stderr,
        )


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
    parser.add_argument(
        "--select", nargs="+", metavar="DATA", help="files, folders, hub sets: measure on them which layers need attention most, and keep "
        "it in those, as many as --attention says"
    )  # fmt: skip
    parser.add_argument("--rows", type=int, default=8, help="sequences to measure on, of up to 512 tokens (default 8)")
    parser.add_argument(
        "--calibrate", nargs="+", metavar="DATA", help="files, folders, hub sets: fit on them, without a gradient, what stands for all "
        "that a window does not see"
    )  # fmt: skip
    parser.add_argument("--tokens", type=int, default=8192, help="of the data to --calibrate on (default 8192)")
    parser.add_argument("--template", help="chat template of the data for --select and --calibrate, where the model's own does not serve")
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
    attention: Any = _attention(args.attention)
    if args.select:
        attention = _selected(teacher, attention, args, options, out)
    rows = _calibration(teacher, args)
    student = make(teacher, mixer=args.mixer, attention=attention, init=args.init, seed=args.seed, options=options, calibrate=rows)
    print(student.conversion)
    if not args.select:
        _warn_of_first(attention)
    try:
        student.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"saved: {out}" + ("" if tokenizer else f" (without a tokenizer: {args.teacher} has none)"))
