"""The commands whose scores a judge gives: MT-Bench, AlpacaEval, and judgments that exist already."""

import argparse
import json
from typing import Any

from llamba.base.arguments import Parser
from llamba.eval.options import answer_options, settings_of

JUDGE_HELP = """
the judge:
  Any endpoint that speaks OpenAI's /chat/completions, or a Hugging Face model in this process. OpenAI retired the judges of the
  papers (gpt-4, gpt-4-1106-preview) in October 2026; scores under different judges cannot be compared, so the judge stands beside
  every score and never in one column with another.
    OpenAI               --judge gpt-4.1                                    (key in OPENAI_API_KEY)
    vLLM, llama.cpp, …   --judge NAME --judge-url http://127.0.0.1:8000/v1  (no key needed on this machine)
    in this process      --judge-url local:FOLDER
  Models that refuse temperature or max_tokens: --judge-parameters '{"temperature": null, "max_tokens": null,
  "max_completion_tokens": 4096}' (null leaves a parameter out; for AlpacaEval 16 do).

what it costs:
  Before the first request the number of judgments and tokens is printed; with --price IN OUT (dollars per million tokens) the
  dollars too. --max-cost refuses, and stops in the middle, above that (each run has its own budget). --estimate makes the answers,
  prints, and asks nothing.

stopping and going on:
  Answers are kept batch by batch, replies of the judge one by one. Stop it with Ctrl-C, and give the same command again: it asks
  for what is missing and for failures, and for nothing else.
"""

MT_BENCH = """Score a chat model on MT-Bench: answer its 80 two-turn questions, have a judge grade both answers from 1 to 10, report.

MODEL may also be a file of answers in FastChat's format (NAME.jsonl), to be judged alone.

first time:
  pip install --constraint constraints.txt -e '.[eval]'
  llamba eval fetch mt_bench           (or --data DIR with a copy of FastChat's three files)
  eval/run_mtbench.sh runs/llama3_50pct --judge gpt-4.1 --price 2 8 --max-cost 5

against the teacher, both orders of every pair:
  eval/run_mtbench.sh runs/llama3_50pct --judge gpt-4.1 --mode pairwise --against meta-llama/Meta-Llama-3-8B-Instruct
"""

MT_BENCH_FILES = """
what is left where (OUT is MODEL/eval for a run folder, else runs/eval/NAME):
  OUT/data/mt_bench/model_answer/      answers, in FastChat's format
  OUT/data/mt_bench/model_judgment/    judgments, in FastChat's format; *_failed.jsonl: those that could not be read, and why
  OUT/scores.jsonl                     every score with its interval, judge, commit, command, versions, hardware and date
  cd OUT && python -m fastchat.llm_judge.show_result --judge-model JUDGE    reads them (JUDGE as the files are called)
  llamba report RUN…                   puts runs side by side
"""

ALPACA = """Score a chat model on AlpacaEval 2: answer 805 instructions, have a judge choose between each answer and GPT-4 Turbo's.

The judge must return log-probabilities; the first request finds out. Reported are the win rate and the length-controlled win rate,
which says what would be left if both answers were equally long; it needs all 805 instructions in the official order.

first time:
  pip install --constraint constraints.txt -e '.[eval]'
  llamba eval fetch alpaca_eval        (or --data DIR with a copy; the data is CC BY-NC 4.0)
  eval/run_alpaca.sh runs/llama3_50pct --judge gpt-4.1 --price 2 8 --max-cost 5
"""

ALPACA_FILES = """
what is left where (OUT is MODEL/eval for a run folder, else runs/eval/NAME):
  OUT/alpaca_eval/NAME/model_outputs.json      answers, in alpaca_eval's format
  OUT/alpaca_eval/NAME/JUDGE/annotations.json  preferences, in alpaca_eval's format
  OUT/scores.jsonl                             both win rates with intervals, judge, commit, command, versions, hardware and date
  llamba report RUN…                           puts runs side by side
"""


def _parameters(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object such as '{{\"temperature\": null}}', got {text}")
    return found


def _judge_options(parser: Parser) -> None:
    parser.add_argument("--judge", help="the judge's model name, as its endpoint knows it")
    parser.add_argument("--judge-url", default="https://api.openai.com/v1", help="its endpoint, or local:FOLDER (default OpenAI)")
    parser.add_argument("--key-env", default="OPENAI_API_KEY", help="environment variable with the key (default OPENAI_API_KEY)")
    parser.add_argument(
        "--judge-parameters", type=_parameters, default={}, metavar="JSON", help="override request parameters; null removes"
    )
    parser.add_argument("--concurrency", type=int, default=8, help="requests at once (default 8)")
    parser.add_argument("--retries", type=int, default=10, help="tries of one request after 429, 5xx or a lost connection (default 10)")
    parser.add_argument("--price", type=float, nargs=2, metavar=("IN", "OUT"), help="dollars per million input and output tokens")
    parser.add_argument("--max-cost", type=float, help="dollars; needs --price")
    parser.add_argument("--estimate", action="store_true", help="answer, print what judging would take, and ask nothing")
    parser.add_argument("--max-failed", type=float, default=0.05, help="end with an error above this share of failures (default 0.05)")


def _judge(args: argparse.Namespace) -> Any:
    from llamba.eval.judge import Judge

    name = args.judge or (args.judge_url.removeprefix("local:") if args.judge_url.startswith("local:") else None)
    if name is None:
        raise ValueError("--judge NAME is needed (a model of the endpoint), or --judge-url local:FOLDER; --help tells more")
    price = None if args.price is None else (args.price[0], args.price[1])
    return Judge(name, args.judge_url, args.key_env, args.judge_parameters, args.concurrency, args.retries, 120.0, price, args.max_cost)


def mt_bench(argv: list[str]) -> None:
    """MT-Bench (`run_mtbench.sh`)."""
    parser = Parser("run_mtbench.sh", MT_BENCH, JUDGE_HELP + MT_BENCH_FILES)
    answer_options(parser, 8, 1024)
    _judge_options(parser)
    parser.add_argument("--mode", default="single", choices=("single", "pairwise"), help="grade answers, or compare with --against")
    parser.add_argument("--against", metavar="MODEL", help="pairwise: the other model, or a FastChat answer file (.jsonl)")
    parser.add_argument("--judge-repeats", type=int, default=1, help="judge everything so many times, and report the spread")
    args = parser.read(argv)
    from pathlib import Path

    from llamba.eval.mt_bench import Options, run
    from llamba.eval.scores import results_folder, slug

    made = args.model.endswith(".jsonl")  # answers, and no model
    out = Path(args.out or f"runs/eval/{slug(Path(args.model).stem)}") if made else results_folder(args.model, args.out)
    options = Options(args.mode, args.against, args.data, args.limit, args.judge_repeats, args.max_failed, args.estimate)
    print(run(args.model, out, settings_of(args), _judge(args), options))


JUDGMENTS = """Judgments that exist already, as scores with intervals: FastChat's single and pairwise files, AlpacaEval's annotations.json.

Every judge has a table of its own; two are never averaged. Rows without a rating from 0 to 10, or a preference from 1 to 2, are
counted and said; of duplicates the last that can be read counts. With --out the scores are kept beside one's own, and models are
compared question by question.

example: llamba eval judgments FastChat/data/mt_bench/model_judgment --out runs/llama3_50pct
"""


def judgments(argv: list[str]) -> None:
    """Judgments that exist already: FastChat's and AlpacaEval's files."""
    parser = Parser("llamba eval judgments", JUDGMENTS)
    parser.add_argument(
        "path", metavar="FILE or FOLDER", help="*_single.jsonl, *_pair.jsonl, annotations.json, or a folder with such files"
    )
    parser.add_argument("--out", help="a run, or any folder, that the scores are put into (default: printed alone)")
    parser.add_argument("--data", help="folder with the benchmarks' files, for categories and length control (default: what was fetched)")
    args = parser.read(argv)
    from llamba.eval.existing import run

    print(run(args.path, args.out, args.data))


def alpaca(argv: list[str]) -> None:
    """AlpacaEval 2 (`run_alpaca.sh`)."""
    parser = Parser("run_alpaca.sh", ALPACA, JUDGE_HELP + ALPACA_FILES)
    answer_options(parser, 8, 2048)
    _judge_options(parser)
    parser.add_argument("--temperature", type=float, default=0.7, help="of the answers (default 0.7; 0 is greedy)")
    parser.add_argument("--outputs", metavar="FILE", help="outputs in alpaca_eval's format, in the place of MODEL's; MODEL is then a name")
    parser.add_argument("--win-rate-only", action="store_true", help="no length control: for subsets, and without df_gamed.csv")
    args = parser.read(argv)
    from pathlib import Path

    from llamba.eval.alpaca import Options, run
    from llamba.eval.scores import results_folder, slug

    out = Path(args.out or f"runs/eval/{slug(args.model)}") if args.outputs else results_folder(args.model, args.out)
    options = Options(args.data, args.outputs, args.limit, args.temperature, args.win_rate_only, args.max_failed, args.estimate)
    print(run(args.model, out, settings_of(args), _judge(args), options))
