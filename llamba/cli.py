"""The `llamba` command."""

import argparse
import json
import runpy
import sys
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from llamba.base.errors import one_line_errors
from llamba.settings import Recipe


def _recipe(path: str, overrides: list[str]) -> Recipe:
    from llamba.settings.overrides import override

    if not Path(path).is_file():
        raise ValueError(f"a recipe file is needed; got {path}, which is no file")
    found = runpy.run_path(path, run_name="recipe").get("recipe")
    if not isinstance(found, Recipe):
        raise ValueError(f"{path} must define `recipe = Recipe(...)`; it does not")
    return override(found, overrides, path)


def _plan(args: argparse.Namespace) -> None:
    from llamba.running.plan import plan

    print(plan(_recipe(args.recipe, args.overrides)))


def _run(args: argparse.Namespace) -> None:
    from llamba.running.run import run

    print(f"done: {run(_recipe(args.recipe, args.overrides))}")


def _attention(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--attention must be a fraction or a list like [1,3]; got {text}") from error


def _convert(args: argparse.Namespace) -> None:
    from llamba.models.convert import convert
    from llamba.models.loading import load_tokenizer, located

    teacher = located(args.teacher)
    if Path(args.out).exists() and any(Path(args.out).iterdir()):
        raise ValueError(f"the output must be a new or empty folder; {args.out} has files")
    student = convert(teacher, mixer=args.mixer, attention=_attention(args.attention), init=args.init, seed=args.seed)
    print(student.conversion)
    student.save_pretrained(args.out)
    load_tokenizer(teacher).save_pretrained(args.out)
    print(f"saved: {args.out}")


def _sampling(args: argparse.Namespace) -> Any:
    from llamba.chat.conversation import Sampling

    return Sampling(args.max_new_tokens, args.temperature, args.top_p, args.seed)


def _lookahead(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def _speculation(args: argparse.Namespace, model: Any) -> Any:
    from llamba.chat.conversation import Speculation, load_draft
    from llamba.speculative import Auto

    if args.draft is None:
        if args.lookahead is not None:
            raise ValueError('--lookahead needs --draft, a smaller model or "lookup"; got none')
        return None
    return Speculation(load_draft(args.draft, model), Auto() if args.lookahead in (None, "auto") else args.lookahead)


def _chat(args: argparse.Namespace) -> None:
    from llamba.chat.conversation import Chat, load, talk

    model, tokenizer = load(args.model, args.dtype, args.device)
    talk(Chat(model, tokenizer, _sampling(args), args.system, speculation=_speculation(args, model)))


def _generate(args: argparse.Namespace) -> None:
    import torch

    from llamba.chat.conversation import Chat, load, stream

    sampling = _sampling(args)
    model, tokenizer = load(args.model, args.dtype, args.device)
    speculation = _speculation(args, model)
    prompt = args.prompt if args.prompt is not None else sys.stdin.read()
    torch.manual_seed(sampling.seed)
    if args.chat:
        Chat(model, tokenizer, sampling, speculation=speculation).answer(prompt, sys.stdout)
    else:
        stream(model, tokenizer, (tokenizer.bos_token or "") + prompt, sampling, sys.stdout, speculation)


def _bench(args: argparse.Namespace) -> None:
    from llamba.bench import BENCHES

    BENCHES[args.what](args)


def _eval(args: argparse.Namespace) -> None:
    from llamba.eval.commands import main

    main(args.arguments)


def _select(args: argparse.Namespace) -> None:
    from llamba.settings import Data, Select
    from llamba.stages.select import select

    stage = Select(keep=args.keep, method=args.method, heads=args.heads, rows=args.rows, micro_batch=args.batch, targets=args.targets)
    data = Data(train=args.data, length=args.length, template=args.template, streaming=True)
    select(args.teacher, args.student, data, stage, Path(args.out), args.mixer, args.seed)


def _report(args: argparse.Namespace) -> None:
    from llamba.eval import report as scores
    from llamba.training.curves import report

    trained = [run for run in args.runs if any(Path(run).glob("*-*/metrics.jsonl")) or scores.folder_of(run) is None]
    parts = [report(run) for run in trained]
    table = scores.report(args.runs, args.out or Path(args.runs[0]))
    print("\n\n".join([*parts, *([table] if table else [])]))


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="run folder, model folder or hub name")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--draft", help='a smaller model of the same vocabulary (or the run that made it) drafts, or "lookup"; the output stays the same'
    )
    parser.add_argument("--lookahead", type=_lookahead, help="tokens drafted at a time, or auto (default)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: the accelerator if there is one)")


def _matrices_options(group: Any) -> None:
    group.add_argument("--data", nargs="+", help="files, folders or hub sets with texts or messages")
    group.add_argument("--matrices", type=int, default=32, help="how many, one head of every layer in turn (default 32)")
    group.add_argument("--length", type=int, default=256, help="tokens of each (default 256)")
    group.add_argument("--steps", type=int, default=2000, help="of gradient descent, for low-rank and SSD (default 2000)")
    group.add_argument("--picture", help="draw the table to this file (of multistep, too)")


def _speculative_options(group: Any) -> None:
    group.add_argument("--draft", help='with --model and --prompts: a smaller model of the same vocabulary, or "lookup"')
    group.add_argument("--prompts", help="a .jsonl file of rows with messages, which end with the user's question")
    group.add_argument("--preset", help="instead of a model: table1, table5, or a row of them; random weights of its shapes")
    group.add_argument("--acceptance", type=float, help="of a preset's drafts (default: what its published row implies)")
    group.add_argument("--shrink", type=int, default=1, help="divide widths, layers and tokens by this (to try it out)")
    group.add_argument("--lookahead", default="1,2,3,4,5,6,7,8", help="drafted tokens or trees (3x2x1), with commas (default 1 to 8)")
    group.add_argument("--tokens", type=int, default=128, help="new tokens per prompt (default 128)")
    group.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    group.add_argument("--device", default="auto")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llamba", description="Pretrained transformers into Mamba hybrids.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, action, text in (("plan", _plan, "what a recipe would do; trains nothing"), ("run", _run, "run a recipe, or go on with it")):
        command = commands.add_parser(name, help=text)
        command.add_argument("recipe", help="a recipe file")
        command.add_argument("overrides", nargs="*", help="key=value")
        command.set_defaults(action=action)
    command = commands.add_parser("convert", help="convert a teacher and print where every tensor came from")
    command.add_argument("teacher", help="run folder, model folder or hub name")
    command.add_argument("out", help="new folder for the student")
    command.add_argument(
        "--mixer", default="mamba2", help="mamba1, mamba2 (default), discrete_mamba2; for ablations low_rank, toeplitz, none, attention"
    )
    command.add_argument("--attention", default="0.5", help="fraction of layers that keep attention, or a list like [1,3] (default 0.5)")
    command.add_argument("--init", default="attention", help="attention (default), paper, random or linear_attention")
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(action=_convert)
    command = commands.add_parser("chat", help="talk to a model")
    _model_options(command)
    command.add_argument("--system", help="system message")
    command.set_defaults(action=_chat)
    command = commands.add_parser("generate", help="complete a text, or answer one message")
    _model_options(command)
    command.add_argument("prompt", nargs="?", help="default: standard input")
    command.add_argument("--chat", action="store_true", help="take the prompt as a user's message")
    command.set_defaults(action=_generate)
    command = commands.add_parser("bench", help="benchmarks against peers, in one process")
    command.add_argument("what", choices=("decode", "losses", "matrices", "mfu", "multistep", "ops", "speculative", "train"))
    command.add_argument("--repeats", type=int, default=5)
    command.add_argument("--compile", action="store_true", help="also time ours under torch.compile")
    command.add_argument("--out", help="append the rows to this .jsonl file")
    command.add_argument("--mixer", default="mamba2", choices=("mamba2", "mamba1"), help="of multistep and train (default mamba2)")
    command.add_argument("--model", help="of matrices and speculative: run folder, model folder or hub name")
    _matrices_options(command.add_argument_group("matrices"))
    _speculative_options(command.add_argument_group("speculative"))
    command.set_defaults(action=_bench)
    command = commands.add_parser("eval", help="benchmarks: MT-Bench, AlpacaEval, lm-eval and more", add_help=False)
    command.add_argument("arguments", nargs=argparse.REMAINDER)
    command.set_defaults(action=_eval)
    command = commands.add_parser("select", help="rank layers by how much they need attention; writes what student.attention accepts")
    command.add_argument("teacher", help="run folder, model folder or hub name")
    command.add_argument("--student", help="the teacher with mixers in every layer (default: converted here, untrained)")
    command.add_argument("--mixer", default="mamba2", help="of a student that is converted here (default mamba2)")
    command.add_argument("--data", required=True, nargs="+", help="files, folders or hub sets to measure on")
    command.add_argument("--keep", type=float, default=0.25, help="part of layers that keep attention (default 0.25)")
    command.add_argument("--method", choices=("restore", "swap"), default="restore", help="put attention back (default), or take it away")
    command.add_argument("--heads", action="store_true", help="rank heads, too, to look at: attention is kept by whole layers alone")
    command.add_argument("--rows", type=int, default=64, help="sequences to measure on (default 64)")
    command.add_argument("--batch", type=int, default=1, help="sequences in one forward pass (default 1)")
    command.add_argument("--length", type=int, default=2048, help="tokens at which sequences are cut (default 2048)")
    command.add_argument("--targets", choices=("assistant", "all"), default="assistant", help="tokens that count")
    command.add_argument("--template", help="chat template that marks the assistant's words, e.g. llama3")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--out", required=True, help="JSON file to write; the picture stands beside it")
    command.set_defaults(action=_select)
    command = commands.add_parser("report", help="runs' training (report.png in each folder) and scores, side by side")
    command.add_argument("--out", help="folder for scores.md, scores.csv and pictures (default: the first run)")
    command.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    command.set_defaults(action=_report)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point. A user's error ends as one line on stderr and exit status 2."""
    args = _parser().parse_args(argv)
    disable_progress_bar()
    with one_line_errors():
        args.action(args)


if __name__ == "__main__":
    main()
