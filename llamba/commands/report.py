"""`llamba report`: runs side by side."""

from pathlib import Path

from llamba.base.arguments import Parser


def report(argv: list[str]) -> None:
    """runs' training (report.png in each folder) and scores, side by side"""
    parser = Parser("llamba report", "Runs side by side: training (report.png in each folder) and scores, with paired differences.")
    parser.add_argument("--out", help="folder for scores.md, scores.csv and pictures (default: the first run)")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    args = parser.read(argv)
    from llamba.eval import report as scores
    from llamba.training.curves import report as trained

    curves = [trained(run) for run in args.runs if any(Path(run).glob("*-*/metrics.jsonl")) or scores.folder_of(run) is None]
    table = scores.report(args.runs, args.out or Path(args.runs[0]))
    print("\n\n".join([*curves, *([table] if table else [])]))
