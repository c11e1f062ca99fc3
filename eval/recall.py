"""Recall, which chat scores hide: what a state of fixed size loses first.

    mqar       multi-query associative recall (Zoology, arXiv 2312.04927): N key-value pairs of single tokens, then every key again
    phone      a phone book of N names, one is asked for (Jelassi et al., arXiv 2402.01032)
    needle     one sentence in a text of T tokens at a depth from 0 (start) to 1 (end); a heat map

All of it is made here from seeds; `needle` takes any text as its haystack. Greedy, exact match of the number asked for.
"""

import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llamba.eval import stats
from llamba.eval.answerer import Answerer, Settings
from llamba.eval.scores import model_name, save, save_items, score

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "  # arXiv 2305.16300
CITIES = "Paris Oslo Rome Lima Cairo Delhi Tokyo Quito Accra Dakar Hanoi Milan Turin Basel Leeds Miami Perth Sofia Tunis Minsk".split()
FIRST = "Ada Ben Cara Dan Ella Finn Gina Hugo Ida Jack Kate Leo Mara Nina Omar Petra Rosa Sam Tara Vera".split()
LAST = "Adler Brook Carter Dunn Ellis Frost Grant Hale Innes Jones Keller Lane Marsh North Olsen Price Quinn Reed Stone Wells".split()
TASKS = ("mqar", "phone", "needle")

Cell = tuple[Any, ...]  # (pairs,), (names,) or (length, depth)
Results = dict[Cell, list[float]]  # cell -> 100 or 0 per trial


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


@torch.inference_mode()
def mqar(answerer: Answerer, pairs: int, trials: int, seed: int) -> list[float]:
    """Per trial, the per cent of N queries at which the most likely next token is the value: [bos] k1 v1 ... kN vN, k v k v ...

    The queries come in another order than the pairs. Raises ValueError where the vocabulary or the context is too small.
    """
    words = ordinary_tokens(answerer.tokenizer)
    if 4 * pairs + 1 > answerer.context or 2 * pairs > len(words):
        raise ValueError(f"{pairs} pairs need a context of {4 * pairs + 1} tokens and {2 * pairs} words; the model has "
                         f"{answerer.context} and {len(words)}")  # fmt: skip
    found = []
    for trial in range(trials):
        rng = random.Random(f"{seed}/{pairs}/{trial}")
        drawn = rng.sample(words, 2 * pairs)
        book = list(zip(drawn[:pairs], drawn[pairs:], strict=True))
        asked = rng.sample(book, pairs)
        bos = [] if answerer.tokenizer.bos_token_id is None else [answerer.tokenizer.bos_token_id]
        ids = bos + [token for pair in [*book, *asked] for token in pair]
        logits = answerer.model(torch.tensor([ids], device=answerer.model.device), use_cache=False).logits[0]  # [T, V]
        where = torch.arange(len(bos) + 2 * pairs, len(ids), 2, device=logits.device)  # positions of the queried keys
        right = logits[where].argmax(-1).cpu() == torch.tensor([value for _, value in asked])
        found.append(100 * right.float().mean().item())
    return found


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
    sentence = f"The special magic number of {city} is {number}. "
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


def beyond(answerer: Answerer, options: Options) -> dict[str, list[Cell]]:
    """The cells of each task whose questions, with room for an answer, do not fit the model's context: they say nothing about recall."""
    found: dict[str, list[Cell]] = {task: [] for task in options.tasks}
    bos, most = answerer.tokenizer.bos_token_id is not None, answerer.settings.max_new_tokens
    for task in options.tasks:
        if task == "mqar":
            found[task] = [(n,) for n in options.pairs if 4 * n + bos > answerer.context]
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


def measure(answerer: Answerer, options: Options) -> dict[str, Results]:
    """Every task's cells, but for those `beyond` the model's context."""
    found: dict[str, Results] = defaultdict(dict)
    seed, far = answerer.settings.seed, beyond(answerer, options)
    text = _haystack(options)
    for task in options.tasks:
        if task == "mqar":
            found[task] = {(n,): mqar(answerer, n, options.trials, seed) for n in options.pairs if (n,) not in far[task]}
        elif task == "phone":
            for n in (n for n in options.names if (n,) not in far[task]):
                found[task][(n,)] = _ask(answerer, [phone_book(n, random.Random(f"{seed}/{n}/{i}")) for i in range(options.trials)])
        else:
            for length, depth in ((length, depth) for length in options.lengths for depth in options.depths):
                if (length, depth) not in far[task]:
                    rngs = [random.Random(f"{seed}/{length}/{depth}/{i}") for i in range(options.trials)]
                    found[task][length, depth] = _ask(answerer, [needle(answerer, length, depth, rng, text) for rng in rngs])
    return {task: results for task, results in found.items() if results}


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


def run(name: str, out: Path, settings: Settings, options: Options) -> str:
    """Measure a model, draw its needle heat map, and put every cell into scores.jsonl; returns the table.

    Raises ValueError as `Answerer` and `mqar` do.
    """
    answerer = Answerer(name, settings)
    found, far = measure(answerer, options), beyond(answerer, options)
    if not found:
        raise ValueError(f"everything asked for is beyond the model's context of {answerer.context} tokens; ask for fewer or shorter ones")
    model, rows, lines = model_name(name), [], [f"recall of {model_name(name)}, % found"]
    for task, results in found.items():
        for cell, values in results.items():
            interval = stats.share({trial: [value] for trial, value in enumerate(values)})
            rows.append(score(f"recall/{task}", cell_name(task, cell), model, interval, cell=list(cell)))
            lines.append(f"  {task:<8}{cell_name(task, cell):<28}{interval.mean:6.1f}  [{interval.low:.0f}, {interval.high:.0f}]")
        save_items(
            out, f"recall_{task}", model, None, {f"{cell}/{i}": [v] for cell, values in results.items() for i, v in enumerate(values)}
        )
    for task, cells in far.items():
        lines += [f"  {task:<8}{cell_name(task, cell):<28}not measured: beyond the model's context of {answerer.context}" for cell in cells]
    save(out, rows)
    if "needle" in found:
        picture = out / "needle.png"
        draw_needle({model: found["needle"]}, picture)
        lines.append(f"picture: {picture}")
    return "\n".join(lines)


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
                axes.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
