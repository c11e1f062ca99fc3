"""Recall, which chat scores hide: what a state of fixed size loses first; by number of facts, by distance, with the recurrence and without.

    mqar       multi-query associative recall (Zoology, arXiv 2312.04927): N key-value pairs of single tokens, then every key again
    phone      a phone book of N names, one is asked for (Jelassi et al., arXiv 2402.01032)
    needle     one sentence in a text of T tokens at a depth from 0 (start) to 1 (end); a heat map

All of it is made here from seeds; `needle` takes any text as its haystack. Greedy, exact match of the number asked for.
"""

import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llamba.eval import stats
from llamba.eval.answerer import Answerer, Settings
from llamba.eval.distances import Asked, Sight, by_distance, draw, out_of_sight, sight_of
from llamba.eval.recurrence import switched
from llamba.eval.scores import model_name, save, save_items, score
from llamba.models.mixers import without_recurrence

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "  # arXiv 2305.16300
CITIES = "Paris Oslo Rome Lima Cairo Delhi Tokyo Quito Accra Dakar Hanoi Milan Turin Basel Leeds Miami Perth Sofia Tunis Minsk".split()
FIRST = "Ada Ben Cara Dan Ella Finn Gina Hugo Ida Jack Kate Leo Mara Nina Omar Petra Rosa Sam Tara Vera".split()
LAST = "Adler Brook Carter Dunn Ellis Frost Grant Hale Innes Jones Keller Lane Marsh North Olsen Price Quinn Reed Stone Wells".split()
_NEEDLE = "The special magic number of "
TASKS = ("mqar", "phone", "needle")

Cell = tuple[Any, ...]  # (pairs,), (names,) or (length, depth)


@dataclass(frozen=True)
class Options:
    """What to measure; `trials` per cell."""

    tasks: tuple[str, ...] = TASKS
    pairs: tuple[int, ...] = (4, 8, 16, 32, 64, 128)
    names: tuple[int, ...] = (10, 20, 50, 100, 200)
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    trials: int = 20
    haystack: str | None = None
    recurrence: str = "on"

    def __post_init__(self) -> None:
        if unknown := set(self.tasks) - set(TASKS):
            raise ValueError(f"--tasks must be among {', '.join(TASKS)}, got {', '.join(sorted(unknown))}")
        if any(not 1 <= number <= len(FIRST) * len(LAST) for number in self.names) or min(self.pairs + self.lengths) < 1:
            raise ValueError(f"--names must be from 1 to {len(FIRST) * len(LAST)}, --pairs and --lengths at least 1")
        if self.trials < 1 or any(depth < 0 or depth > 1 for depth in self.depths):
            raise ValueError("--trials must be at least 1, and every depth from 0 (start of the text) to 1 (its end)")


def ordinary_tokens(tokenizer: Any) -> list[int]:
    """Ids of tokens that are plain words or pieces of words."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    ids = (i for i in range(len(tokenizer)) if i not in special)
    return [i for i in ids if re.fullmatch(r" ?[A-Za-z0-9]+", tokenizer.decode([i]))]


def mqar(answerer: Answerer, pairs: int, trials: int, seed: int) -> list[float]:
    """Per trial, the per cent of N queries at which the most likely next token is the value: [bos] k1 v1 ... kN vN, k v k v ...

    The queries come in another order than the pairs. Raises ValueError where the vocabulary or the context is too small.
    """
    return [_mean(trial) for trial in mqar_trials(answerer, pairs, trials, seed)]


@torch.inference_mode()
def mqar_trials(answerer: Answerer, pairs: int, trials: int, seed: int) -> list[list[Asked]]:
    """The queries of each trial of `mqar`."""
    words = ordinary_tokens(answerer.tokenizer)
    if 4 * pairs + 1 > answerer.context or 2 * pairs > len(words):
        raise ValueError(f"{pairs} pairs need a context of {4 * pairs + 1} tokens and {2 * pairs} words; the model has "
                         f"{answerer.context} and {len(words)}")  # fmt: skip
    found = []
    for trial in range(trials):
        rng = random.Random(f"{seed}/{pairs}/{trial}")
        drawn = rng.sample(words, 2 * pairs)
        book = list(zip(drawn[:pairs], drawn[pairs:], strict=True))
        order = rng.sample(range(pairs), pairs)
        bos = [] if answerer.tokenizer.bos_token_id is None else [answerer.tokenizer.bos_token_id]
        ids = bos + [token for pair in [*book, *(book[i] for i in order)] for token in pair]
        logits = answerer.model(torch.tensor([ids], device=answerer.model.device), use_cache=False).logits[0]  # [T, V]
        where = torch.arange(len(bos) + 2 * pairs, len(ids), 2, device=logits.device)  # positions of the queried keys
        right = (logits[where].argmax(-1).cpu() == torch.tensor([book[i][1] for i in order])).tolist()
        starts = [len(bos) + 2 * i for i in order]  # of the pairs that were asked for
        asked = zip(right, starts, where.tolist(), strict=True)
        found.append([Asked(100.0 * yes, start, query - start - 1) for yes, start, query in asked])
    return found


def _mean(trial: Sequence[Asked]) -> float:
    return sum(asked.value for asked in trial) / len(trial)


def phone_book(names: int, rng: random.Random) -> tuple[str, str]:
    """A question over a phone book, and the number that answers it. At most 400 names."""
    people = rng.sample([f"{first} {last}" for first in FIRST for last in LAST], names)
    book = {name: f"{rng.randrange(1000):03}-{rng.randrange(10000):04}" for name in people}
    lines = "\n".join(f"{name}: {number}" for name, number in book.items())
    asked = rng.choice(people)
    return f"Here is a phone book.\n{lines}\nWhat is the number of {asked}? Answer with the number alone.", book[asked]


def needle(answerer: Answerer, length: int, depth: float, rng: random.Random, haystack: str) -> tuple[str, str]:
    """A question over a text of about `length` tokens in which one sentence stands at `depth`, and its answer."""
    city, number = rng.choice(CITIES), str(rng.randrange(10_000, 100_000))
    sentence = f"{_NEEDLE}{city} is {number}. "
    question = f"\nWhat is the special magic number of {city}? Answer with the number alone."
    tokenizer = answerer.tokenizer
    frame = len(tokenizer(sentence + question, add_special_tokens=False)["input_ids"]) + 24  # and the template
    once = tokenizer(haystack, add_special_tokens=False)["input_ids"]
    room = max(0, length - frame)
    ids = (once * (room // max(1, len(once)) + 1))[:room]
    cut = round(depth * len(ids))
    return tokenizer.decode(ids[:cut]) + " " + sentence + tokenizer.decode(ids[cut:]) + question, number


def _ask(answerer: Answerer, made: Sequence[tuple[str, str]]) -> list[float]:
    """100 or 0 for each question: whether the number stands in the answer."""
    found: list[float] = []
    for start in range(0, len(made), answerer.settings.batch):
        part = made[start : start + answerer.settings.batch]
        chats = [[{"role": "user", "content": question}] for question, _ in part]
        answers = answerer(chats, [0.0] * len(part), [""] * len(part))
        found += [100.0 * (number in re.sub(r"[\s.,]", "", answer.text)) for (_, number), answer in zip(part, answers, strict=True)]
    return found


def placed(answerer: Answerer, question: str, number: str, value: float) -> Asked:
    """Where the fact with a number stands in a question as the model is asked it: from the beginning of its line or sentence on."""
    text = answerer.text(question)
    end = text.index(number) + len(number)
    start = max(text.rfind(mark, 0, end) for mark in ("\n", _NEEDLE))
    if not answerer.tokenizer.is_fast:  # to a token or so
        before, after = (len(answerer.tokenizer(part, add_special_tokens=False)["input_ids"]) for part in (text[:start], text[end:]))
        return Asked(value, before, after)
    spans = answerer.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    last = max(i for i, (left, _) in enumerate(spans) if left < end)
    first = min(i for i, (_, right) in enumerate(spans) if right > start)
    return Asked(value, first, len(spans) - 1 - last)


def beyond(answerer: Answerer, options: Options) -> dict[str, list[Cell]]:
    """The cells of each task whose questions, with room for an answer, do not fit the model's context or vocabulary: they say nothing
    about recall."""
    found: dict[str, list[Cell]] = {task: [] for task in options.tasks}
    bos, most = answerer.tokenizer.bos_token_id is not None, answerer.settings.max_new_tokens
    for task in options.tasks:
        if task == "mqar":
            words = len(ordinary_tokens(answerer.tokenizer))
            found[task] = [(n,) for n in options.pairs if 4 * n + bos > answerer.context or 2 * n > words]
        elif task == "phone":
            found[task] = [(n,) for n in options.names if answerer.length(phone_book(n, random.Random("0"))[0]) + most > answerer.context]
        else:
            long = [length for length in options.lengths if _needle_tokens(answerer, length, options) + most > answerer.context]
            found[task] = [(length, depth) for length in long for depth in options.depths]
    return found


def _needle_tokens(answerer: Answerer, length: int, options: Options) -> int:
    """Tokens of a question about a text of about `length`, the template's included."""
    if length > answerer.context:
        return length
    return answerer.length(needle(answerer, length, 0.5, random.Random("0"), _haystack(options))[0])


def cells(task: str, options: Options) -> list[Cell]:
    """What is asked of a task."""
    if task == "needle":
        return [(length, depth) for length in options.lengths for depth in options.depths]
    return [(n,) for n in (options.pairs if task == "mqar" else options.names)]


def measure(answerer: Answerer, options: Options) -> dict[str, dict[Cell, list[list[Asked]]]]:
    """Trials of every task's cells, but for those `beyond` the model's context."""
    far, text = beyond(answerer, options), _haystack(options)
    todo = [(task, cell) for task in options.tasks for cell in cells(task, options) if cell not in far[task]]
    found: dict[str, dict[Cell, list[list[Asked]]]] = defaultdict(dict)
    for task, cell in (bar := tqdm(todo, desc="recall", unit="cell", disable=None)):
        bar.set_postfix_str(f"{task}, {cell_name(task, cell)}")
        found[task][cell] = _trials(answerer, task, cell, options, text)
    return dict(found)


def _trials(answerer: Answerer, task: str, cell: Cell, options: Options, text: str) -> list[list[Asked]]:
    seed = answerer.settings.seed
    if task == "mqar":
        return mqar_trials(answerer, cell[0], options.trials, seed)
    rngs = [random.Random("/".join(map(str, (seed, *cell, i)))) for i in range(options.trials)]
    made = [phone_book(cell[0], rng) if task == "phone" else needle(answerer, cell[0], cell[1], rng, text) for rng in rngs]
    right = _ask(answerer, made)
    return [[placed(answerer, question, number, value)] for (question, number), value in zip(made, right, strict=True)]


def _haystack(options: Options) -> str:
    """The text that hides the needle. Raises ValueError for a file that is none, or empty."""
    if options.haystack is None:
        return FILLER
    path = Path(options.haystack)
    if not path.is_file():
        raise ValueError(f"--haystack must be a file of plain text, got {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--haystack must be text in UTF-8, and {path} is not: {error}") from error
    if not text.strip():
        raise ValueError(f"--haystack must hold text, and {path} is empty")
    return text


UNITS = {"mqar": ("pairs",), "phone": ("names",), "needle": ("tokens", "depth")}


def cell_name(task: str, cell: Cell) -> str:
    """A cell in words: "16 pairs", "4096 tokens, depth 0.5"."""
    number, *depth = cell
    return f"{number} {UNITS[task][0]}" + "".join(f", depth {d}" for d in depth)


OFF = ", recurrence off"


def run(name: str, out: Path, settings: Settings, options: Options) -> str:
    """Measure a model, draw its needle heat map and its recall by distance, and put every cell into scores.jsonl; returns the table.

    Raises ValueError as `Answerer` does, where nothing fits the context, and for a recurrence switched off in a model that has none.
    """
    answerer = Answerer(name, settings)
    far, sight, model = beyond(answerer, options), sight_of(answerer.model), model_name(name)
    if all(set(cells(task, options)) <= set(far[task]) for task in options.tasks):
        raise ValueError(f"everything asked for is beyond the model's context of {answerer.context} tokens; ask for fewer or shorter ones")
    lines, rows = [f"recall of {model}, % found"], list[dict[str, Any]]()
    curves, needles = dict[str, dict[tuple[int, int], stats.Interval]](), dict[str, dict[Cell, list[float]]]()
    for off in switched(answerer.model, options.recurrence):
        with without_recurrence(answerer.model) if off else nullcontext():
            found = measure(answerer, options)
        suffix = OFF if off else ""
        lines += ["with the recurrence off"] if off else []
        for task, results in found.items():
            own, text = _table(task, results, model, suffix, sight)
            rows, lines = rows + own, lines + text
            values = {f"{cell}/{i}": [_mean(trial)] for cell, trials in results.items() for i, trial in enumerate(trials)}
            save_items(out, f"recall_{task}{suffix}", model, None, values)
            if task != "needle":
                curves[task + suffix] = by_distance(_flat(results))
            else:
                needles[model + suffix] = {cell: [_mean(trial) for trial in trials] for cell, trials in results.items()}
    for task, beyond_it in far.items():
        why = f"not measured: beyond the model's context of {answerer.context} tokens or its words"
        lines += [f"  {task:<8}{cell_name(task, cell):<28}{why}" for cell in beyond_it]
    save(out, rows)
    if needles:
        draw_needle(needles, out / "needle.png")
    if curves:
        draw(curves, out / "distance.png", sight)
    pictures = [str(out / f"{name}.png") for name, drawn in (("needle", needles), ("distance", curves)) if drawn]
    return "\n".join([*lines, f"picture: {', '.join(pictures)}"])


def _flat(results: Mapping[Cell, Sequence[Sequence[Asked]]]) -> dict[tuple[Any, ...], Sequence[Asked]]:
    return {(*cell, i): trial for cell, trials in results.items() for i, trial in enumerate(trials)}


def _table(
    task: str, results: Mapping[Cell, Sequence[Sequence[Asked]]], model: str, suffix: str, sight: Sight | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Score rows and lines of a task: by cell, by distance, and beyond window and sinks."""
    made = {cell: stats.share({i: [_mean(t)] for i, t in enumerate(trials)}) for cell, trials in results.items()}
    rows = [score(f"recall/{task}{suffix}", cell_name(task, cell), model, one, cell=list(cell)) for cell, one in made.items()]
    apart = [(f"{low} to {high} tokens back", interval) for (low, high), interval in by_distance(_flat(results)).items()]
    if sight is not None and (unseen := out_of_sight(_flat(results), sight)) is not None:
        apart.append((f"wholly beyond {sight}", unseen))
    rows += [score(f"recall/{task} by distance{suffix}", metric, model, interval) for metric, interval in apart]
    shown = [(cell_name(task, cell), one) for cell, one in made.items()] + [(f"  {metric}", one) for metric, one in apart]
    return rows, [f"  {task:<8}{metric:<40}{one.mean:6.1f}  [{one.low:.0f}, {one.high:.0f}]" for metric, one in shown]


def draw_needle(models: Mapping[str, Mapping[Cell, Sequence[float]]], path: Path, unit: str = "tokens") -> None:
    """One heat map per model: length along x in `unit`, depth along y, per cent found."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(models), 3.6), layout="constrained")
    for axes, (model, cells) in zip(figure.subplots(1, len(models), squeeze=False)[0], models.items(), strict=True):
        lengths, depths = (sorted({cell[place] for cell in cells}) for place in (0, 1))
        means = [[sum(cells[length, depth]) / len(cells[length, depth]) for length in lengths] for depth in depths]
        axes.imshow(means, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
        axes.set(title=model, xlabel=unit, ylabel="depth of the needle")
        axes.set_xticks(range(len(lengths)), lengths)
        axes.set_yticks(range(len(depths)), depths)
        for y, line in enumerate(means):
            for x, value in enumerate(line):
                dark = value < 15 or value > 85
                axes.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize="small", color="white" if dark else "black")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
