"""The commands that need no judge: lm-eval, recall, perplexity, zero-shot benchmarks, and memory and speed by length."""

from typing import Any

from llamba.base.arguments import Parser, decoding_options, device_options
from llamba.eval.options import answer_options, settings_of

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
    answer_options(parser, 4, 24, questions=False)
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
    print(run(args.model, results_folder(args.model, args.out), settings_of(args), options))


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
    answer_options(parser, 8, 2048)
    run = "CRUXEval: also accept literals that running the benchmark's function confirms, in a box without files, network or neighbours"
    parser.add_argument("--run-code", action="store_true", help=run)
    parser.add_argument("--unsafe", action="store_true", help="--run-code also where there is no such box: with limits, but without walls")
    args = parser.read(argv)
    from llamba.eval.scores import results_folder
    from llamba.eval.zero_shot import Options
    from llamba.eval.zero_shot import run as answer

    options = Options(args.benchmark, args.data, args.limit, args.run_code, args.unsafe)
    print(answer(args.model, results_folder(args.model, args.out), settings_of(args), options))


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
