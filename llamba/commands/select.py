"""`llamba select`: which layers need attention."""

from pathlib import Path

from llamba.base.arguments import Parser
from llamba.settings import Data, Select
from llamba.settings.overrides import read_options


def select(argv: list[str]) -> None:
    """rank layers by how much they need attention; writes what student.attention accepts"""
    parser = Parser("llamba select", "Rank layers by how much they need attention. Writes what `student.attention=FILE` accepts.")
    parser.add_argument("teacher", help="run folder, model folder or hub name")
    parser.add_argument("--student", help="the teacher with mixers in every layer (default: converted here, untrained)")
    parser.add_argument("--mixer", default="auto", help="of a student that is converted here (default auto, the best that we know)")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of that mixer, e.g. window=64")
    parser.add_argument("--data", required=True, nargs="+", help="files, folders or hub sets to measure on")
    parser.add_argument("--keep", type=float, default=0.25, help="part of layers that keep attention (default 0.25)")
    parser.add_argument("--method", choices=("restore", "swap"), default="restore", help="put attention back (default), or take it away")
    parser.add_argument("--heads", action="store_true", help="rank heads, too, to look at: attention is kept by whole layers alone")
    parser.add_argument("--rows", type=int, default=64, help="sequences to measure on (default 64)")
    parser.add_argument("--batch", type=int, default=1, help="sequences in one forward pass (default 1)")
    parser.add_argument("--per-row", type=int, default=128, help="target tokens of a sequence that are compared (default 128)")
    parser.add_argument("--length", type=int, default=2048, help="tokens at which sequences are cut (default 2048)")
    parser.add_argument("--targets", choices=("assistant", "all"), default="assistant", help="tokens that count")
    parser.add_argument("--template", default="auto", help="chat template that marks the assistant's words, e.g. llama3 (default: auto)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, help="JSON file to write; the picture stands beside it")
    args = parser.read(argv)
    stage = Select(
        keep=args.keep, method=args.method, heads=args.heads, rows=args.rows, micro_batch=args.batch, targets=args.targets,
        per_row=args.per_row,
    )  # fmt: skip
    data = Data(train=args.data, length=args.length, template=args.template, streaming=True)
    from llamba.stages.select import select as rank

    rank(args.teacher, args.student, data, stage, Path(args.out), args.mixer, args.seed, read_options(args.option))
