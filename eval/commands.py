"""`llamba eval …`, and what the shell scripts of this folder call: one parser per benchmark."""

import argparse
import json
import sys
from typing import Any

from llamba.errors import one_line_errors

JUDGE_HELP = """
the judge:
  Any endpoint that speaks OpenAI's /chat/completions, or a Hugging Face model in this process. OpenAI retired the judges of the
  papers (gpt-4, gpt-4-1106-preview) in October 2026; scores under different judges cannot be compared, so the judge stands beside
  every score and never in one column with another.
    OpenAI               --judge gpt-4.1                                    (key in OPENAI_API_KEY)
    vLLM, llama.cpp, …   --judge NAME --judge-url http://127.0.0.1:8000/v1  (no key needed on this machine)
    in this process      --judge-url local:FOLDER
  Models that refuse temperature or max_tokens: --judge-parameters '{"temperature": null, "max_tokens": null,
  "max_completion_tokens": 4096}' (null leaves a parameter out).

what it costs:
  Before the first request the number of judgments and tokens is printed; with --price IN OUT (dollars per million tokens) the
  dollars too. --max-cost refuses, and stops in the middle, above that. --estimate prints and asks nothing.

stopping and going on:
  Answers are kept batch by batch, replies of the judge one by one. Stop it with Ctrl-C, and give the same command again: it asks
  for what is missing and for failures, and for nothing else.
"""

MT_BENCH = """Score a chat model on MT-Bench: answer its 80 two-turn questions, have a judge grade both answers from 1 to 10, report.

first time:
  pip install --constraint constraints.txt -e '.[eval]'
  llamba eval fetch mt_bench           (or --data DIR with a copy of FastChat's three files)
  eval/run_mtbench.sh runs/llama3_50pct --judge gpt-4.1 --price 2 8 --max-cost 5
"""

MT_BENCH_FILES = """
what is left where (OUT is MODEL/eval for a run folder, else runs/eval/NAME):
  OUT/data/mt_bench/model_answer/      answers, in FastChat's format
  OUT/data/mt_bench/model_judgment/    judgments, in FastChat's format; *_failed.jsonl: those that could not be read, and why
  OUT/scores.jsonl                     every score with its interval, judge, commit, command, versions, hardware and date
  cd OUT && python -m fastchat.llm_judge.show_result --judge-model JUDGE    reads them (JUDGE as the files are called)
  llamba report RUN…                   puts runs side by side
"""


def _parser(name: str, about: str, epilog: str = "") -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=name, description=about, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def _answer_options(parser: argparse.ArgumentParser, batch: int, most: int) -> None:
    parser.add_argument("model", metavar="MODEL", help="run folder (its last finished stage), model folder, or hub name")
    parser.add_argument("--out", help="where everything goes (default: MODEL/eval, or runs/eval/NAME)")
    parser.add_argument("--data", help="a folder with the benchmark's files (default: what `llamba eval fetch` got)")
    parser.add_argument(
        "--batch", type=int, default=batch, help=f"questions answered at once (default {batch}); part of the result's identity"
    )
    parser.add_argument("--max-new-tokens", type=int, default=most, help=f"longest answer (default {most})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--draft", help="a smaller model that speculates; the answers stay the same")
    parser.add_argument("--system", help="system message")
    parser.add_argument("--limit", type=int, help="only so many questions: a try, not a score")


def _judge_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--judge", help="the judge's model name, as its endpoint knows it")
    parser.add_argument("--judge-url", default="https://api.openai.com/v1", help="its endpoint, or local:FOLDER (default OpenAI)")
    parser.add_argument("--key-env", default="OPENAI_API_KEY", help="environment variable with the key (default OPENAI_API_KEY)")
    parser.add_argument("--judge-parameters", type=json.loads, default={}, metavar="JSON", help="override request parameters; null removes")
    parser.add_argument("--concurrency", type=int, default=8, help="requests at once (default 8)")
    parser.add_argument("--retries", type=int, default=10, help="tries of one request after 429, 5xx or a lost connection (default 10)")
    parser.add_argument("--price", type=float, nargs=2, metavar=("IN", "OUT"), help="dollars per million input and output tokens")
    parser.add_argument("--max-cost", type=float, help="dollars; needs --price")
    parser.add_argument("--estimate", action="store_true", help="print what judging would take, and ask nothing")
    parser.add_argument("--max-failed", type=float, default=0.05, help="end with an error above this share of failures (default 0.05)")


def _settings(args: argparse.Namespace) -> Any:
    from llamba.eval.answers import Settings

    return Settings(args.batch, args.max_new_tokens, args.seed, args.dtype, args.device, args.draft, args.system)


def _judge(args: argparse.Namespace) -> Any:
    from llamba.eval.judge import Judge

    name = args.judge or (args.judge_url.removeprefix("local:") if args.judge_url.startswith("local:") else None)
    if name is None:
        raise ValueError("--judge NAME is needed (a model of the endpoint), or --judge-url local:FOLDER; --help tells more")
    price = None if args.price is None else (args.price[0], args.price[1])
    return Judge(name, args.judge_url, args.key_env, args.judge_parameters, args.concurrency, args.retries, 120.0, price, args.max_cost)


def mt_bench(argv: list[str]) -> None:
    """`run_mtbench.sh`."""
    parser = _parser("run_mtbench.sh", MT_BENCH, JUDGE_HELP + MT_BENCH_FILES)
    _answer_options(parser, 8, 1024)
    _judge_options(parser)
    parser.add_argument("--mode", default="single", choices=("single", "pairwise"), help="grade answers, or compare with --against")
    parser.add_argument("--against", metavar="MODEL", help="pairwise: the other model, or a FastChat answer file (.jsonl)")
    parser.add_argument("--judge-repeats", type=int, default=1, help="judge everything so many times, and report the spread")
    args = parser.parse_args(argv)
    from llamba.eval.mt_bench import Options, run
    from llamba.eval.scores import results_folder

    options = Options(args.mode, args.against, args.data, args.limit, args.judge_repeats, args.max_failed, args.estimate)
    print(run(args.model, results_folder(args.model, args.out), _settings(args), _judge(args), options))


def fetch(argv: list[str]) -> None:
    """`llamba eval fetch`."""
    from llamba.eval.fetch import FILES
    from llamba.eval.fetch import fetch as get

    parser = _parser("llamba eval fetch", "Get benchmark data from its public homes into the cache, checked by size and SHA-256.")
    parser.add_argument("names", nargs="*", help=f"{', '.join(FILES)} (default: all)")
    print("\n".join(get(parser.parse_args(argv).names or tuple(FILES))))


COMMANDS = {"mt_bench": mt_bench, "fetch": fetch}


def main(argv: list[str] | None = None) -> None:
    """Run one command. A user's error ends as one line on stderr and exit status 2."""
    from transformers.utils.logging import disable_progress_bar

    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in COMMANDS:
        known = "\n".join(f"  {name:<12} {(action.__doc__ or '').strip()}" for name, action in COMMANDS.items())
        print(f"llamba eval COMMAND …   (COMMAND --help tells more)\n\n{known}")
        sys.exit(0 if argv in (["-h"], ["--help"]) else 2)
    disable_progress_bar()
    with one_line_errors():
        COMMANDS[argv[0]](argv[1:])


if __name__ == "__main__":
    main()
