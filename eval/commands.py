"""`llamba eval …`, and what the shell scripts of this folder call: one parser per benchmark."""

import argparse
import errno
import json
import sys
from typing import Any

from llamba.base.arguments import Main, Parser, decoding_options, device_options, dispatch
from llamba.base.errors import one_line_errors
from llamba.base.progress import quiet_libraries

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

LM_EVAL = """Run lm-evaluation-harness on a model, with its own command line and our task sets.

usage: run_lm_eval.sh MODEL [TASKS] [--out OUT] [--data DIR] [lm-eval options …]

TASKS is a set of a paper's table (default: mohawk_table1) or a comma-separated list of lm-eval's tasks:
{sets}

Everything else goes to lm-eval as it is: --batch_size 8, --device cuda, --limit 100, --num_fewshot 5, --apply_chat_template,
--model_args dtype=bfloat16, --log_samples, --use_cache PREFIX, --seed 0, … (`lm_eval run --help` lists them).

first time:
  pip install --constraint constraints.txt -e '.[eval]'
  llamba eval fetch pubmedqa           (only for Mamba-in-Llama's Table 3: lm-eval's own PubMedQA no longer loads;
                                        its home publishes no checksum, so sizes alone are checked)
  eval/run_lm_eval.sh runs/phi_mohawk mohawk_table1 --batch_size 16

The tasks' data comes from the Hugging Face hub, once; offline, HF_HOME must hold it and HF_HUB_OFFLINE=1 keeps lm-eval from asking.
Scores move in the last digit with the batch size (sums of floats in another order): use one batch size for one table.

what is left where (OUT is MODEL/eval for a run folder, else runs/eval/NAME):
  OUT/lm_eval/results/     lm-eval's own files, with every sample
  OUT/scores.jsonl         every metric with its interval, commit, command, versions, hardware and date; both acc and acc_norm
  llamba report RUN…       puts runs side by side, with paired differences
"""


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def _parameters(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object such as '{{\"temperature\": null}}', got {text}")
    return found


def _answer_options(parser: Parser, batch: int, most: int, questions: bool = True) -> None:
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
        parser.add_argument("--limit", type=_count, help="only so many questions: a try, not a score")


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


def _settings(args: argparse.Namespace) -> Any:
    from llamba.eval.answerer import Settings

    return Settings(args.batch, args.max_new_tokens, args.seed, args.dtype, args.device, args.draft, args.system, args.bits)


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
    _answer_options(parser, 8, 1024)
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
    print(run(args.model, out, _settings(args), _judge(args), options))


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
    _answer_options(parser, 8, 2048)
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
    print(run(args.model, out, _settings(args), _judge(args), options))


def lm_eval(argv: list[str]) -> None:
    """lm-evaluation-harness (`run_lm_eval.sh`)."""
    from llamba.eval.task_sets import ABOUT

    if not argv or {"-h", "--help"} & set(argv):
        sets = "\n".join(f"  {name:<22} {about}" for name, about in ABOUT.items())
        return print(LM_EVAL.format(sets=sets))
    parser = Parser("run_lm_eval.sh", "", add_help=False)
    parser.add_argument("model")
    parser.add_argument("--out")
    parser.add_argument("--data")
    tasks = argv[1:2] if argv[1:] and not argv[1].startswith("-") else []
    args, rest = parser.parse_known_args([argv[0], *argv[1 + len(tasks) :]])
    from llamba.eval.harness import run
    from llamba.eval.scores import results_folder

    print(run(args.model, results_folder(args.model, args.out), (tasks or ["mohawk_table1"])[0], rest, args.data))


RECALL = """What chat scores hide: recall by the number of facts and the length of the text. No data, no network and no judge needed.

  mqar    N key-value pairs of single tokens, then every key again (multi-query associative recall)
  phone   a phone book of N names, one is asked for
  needle  one sentence in a text of T tokens, at a depth from 0 (start) to 1 (end); drawn as a heat map

Each is also told by the distance between fact and question, and for mixers with a window by facts wholly beyond window and sinks.
--recurrence both measures again with the recurrence off: what window and attention do alone.

example: llamba eval recall runs/llama3_50pct --tasks needle --lengths 4096 16384 --trials 10 --batch 1
"""


def recall(argv: list[str]) -> None:
    """Associative recall, phone book, needle in a haystack."""
    parser = Parser("llamba eval recall", RECALL)
    _answer_options(parser, 4, 24, questions=False)
    parser.add_argument("--tasks", nargs="+", default=["mqar", "phone", "needle"], help="mqar, phone, needle (default: all)")
    parser.add_argument("--pairs", type=int, nargs="+", help="mqar: numbers of pairs")
    parser.add_argument("--names", type=int, nargs="+", help="phone: numbers of names")
    parser.add_argument("--lengths", type=int, nargs="+", help="needle: lengths in tokens")
    parser.add_argument("--depths", type=float, nargs="+", help="needle: depths from 0 to 1")
    parser.add_argument("--trials", type=int, default=20, help="per cell (default 20)")
    parser.add_argument("--haystack", metavar="FILE", help="plain text to hide the needle in (default: a filler)")
    _recurrence_option(parser)
    args = parser.read(argv)
    from llamba.eval.recall import Options, run
    from llamba.eval.scores import results_folder

    given: dict[str, Any] = {key: tuple(value) for key in ("tasks", "pairs", "names", "lengths", "depths") if (value := getattr(args, key))}
    options = Options(**given, trials=args.trials, haystack=args.haystack, recurrence=args.recurrence)
    print(run(args.model, results_folder(args.model, args.out), _settings(args), options))


PERPLEXITY = """Perplexity of a model on a plain text or on the answers of chats, and with --teacher its distance to the teacher.

A text is read in windows that do not overlap, each after BOS. Chats are written in the checkpoint's own template; the tokens of the
assistant's answers alone count, and a chat that is too long is cut after its last whole answer. Everything is also told by position.
--recurrence both measures again with the recurrence off: what window and attention do alone.

examples: llamba eval perplexity runs/llama3_50pct --text book.txt --teacher meta-llama/Meta-Llama-3-8B-Instruct
          llamba eval perplexity runs/llama3_50pct --chat held_out.jsonl --length 512 --recurrence both
"""


def _recurrence_option(parser: Parser) -> None:
    parser.add_argument(
        "--recurrence", default="on", choices=("on", "off", "both"), help="measure with the mixers' recurrence, without, both"
    )


def perplexity(argv: list[str]) -> None:
    """Perplexity on a text or on chats, and KL to the teacher."""
    parser = Parser("llamba eval perplexity", PERPLEXITY)
    parser.add_argument("model", metavar="MODEL", help="run folder (its last finished stage), model folder, or hub name")
    parser.add_argument("--text", metavar="FILE", help="plain text")
    parser.add_argument("--chat", metavar="DATA", help="conversations: .jsonl, .jsonl.gz or .parquet, a folder of those, or a hub set")
    parser.add_argument("--teacher", metavar="MODEL", help="also KL(teacher || model) in nats per token, and how often both choose alike")
    parser.add_argument("--length", type=int, default=1024, help="most tokens of a window or a chat (default 1024)")
    parser.add_argument("--windows", type=int, help="at most so many windows or chats")
    parser.add_argument("--positions", type=int, nargs="*", default=[256], help="where ranges of positions end (default: 256)")
    _recurrence_option(parser)
    decoding_options(parser)
    parser.add_argument("--out", help="where scores.jsonl goes (default: MODEL/eval, or runs/eval/NAME)")
    args = parser.read(argv)
    from llamba.eval.perplexity import Options, run
    from llamba.eval.scores import results_folder

    measured = (args.chat, args.recurrence, tuple(args.positions), args.bits)
    options = Options(args.text, args.teacher, args.length, args.windows, args.dtype, args.device, *measured)
    print(run(args.model, results_folder(args.model, args.out), options))


def zero_shot(argv: list[str]) -> None:
    """GSM8K or CRUXEval, zero-shot and greedy."""
    about = (
        "GSM8K or CRUXEval in ZeroEval's zero-shot greedy form. Data: `llamba eval fetch gsm8k cruxeval`, or --data DIR.\n"
        "CRUXEval's home publishes no checksum: its file is used as it comes."
    )
    parser = Parser("llamba eval zero_shot", about)
    parser.add_argument("benchmark", choices=("gsm8k", "cruxeval"))
    _answer_options(parser, 8, 2048)
    run = "CRUXEval: also accept literals that running the benchmark's function confirms, in a box without files, network or neighbours"
    parser.add_argument("--run-code", action="store_true", help=run)
    parser.add_argument("--unsafe", action="store_true", help="--run-code also where there is no such box: with limits, but without walls")
    args = parser.read(argv)
    from llamba.eval.scores import results_folder
    from llamba.eval.zero_shot import Options
    from llamba.eval.zero_shot import run as answer

    options = Options(args.benchmark, args.data, args.limit, args.run_code, args.unsafe)
    print(answer(args.model, results_folder(args.model, args.out), _settings(args), options))


def lengths(argv: list[str]) -> None:
    """Memory and tokens per second by context length."""
    parser = Parser("llamba eval lengths", "Memory and tokens per second by context length, e.g. of a student and its teacher.")
    parser.add_argument("models", nargs="+", metavar="MODEL", help="run folders, model folders or hub names")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384, 65536], help="tokens (default: 1k to 64k)")
    parser.add_argument("--new-tokens", type=int, default=32, help="decoded after each (default 32)")
    parser.add_argument("--repeats", type=int, default=3)
    device_options(parser)
    parser.add_argument("--out", help="where scores.jsonl and the picture go (default: the first model's)")
    args = parser.read(argv)
    from llamba.eval.lengths import Options, run
    from llamba.eval.scores import results_folder

    options = Options(tuple(args.lengths), args.new_tokens, args.repeats, args.dtype, args.device)
    print(run(args.models, results_folder(args.models[0], args.out), options))


def fetch(argv: list[str]) -> None:
    """Get benchmark data."""
    from llamba.eval.fetch import FILES
    from llamba.eval.fetch import fetch as get

    parser = Parser("llamba eval fetch", "Get benchmark data from its public homes into the cache, checked by size and SHA-256.")
    parser.add_argument("names", nargs="*", help=f"{', '.join(FILES)} (default: all)")
    print("\n".join(get(parser.read(argv).names or tuple(FILES))))


COMMANDS: dict[str, Main] = {
    "mt_bench": mt_bench,
    "judgments": judgments,
    "alpaca": alpaca,
    "lm_eval": lm_eval,
    "recall": recall,
    "perplexity": perplexity,
    "zero_shot": zero_shot,
    "lengths": lengths,
    "fetch": fetch,
}


def evaluate(argv: list[str]) -> None:
    """benchmarks: MT-Bench, AlpacaEval, lm-eval, recall, perplexity and more"""
    with one_line_errors(interrupted="stopped; what was answered and judged so far is kept, and the same command goes on from here"):
        try:
            dispatch("llamba eval", "What a model is worth.", COMMANDS, argv)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                done = "what was answered and judged so far is kept: make room and give the same command again"
                raise ValueError(f"the disk is full ({error}); {done}") from error
            raise


def main(argv: list[str] | None = None) -> None:
    """Run one command: what the shell scripts of this folder call."""
    quiet_libraries()
    evaluate(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    main()
