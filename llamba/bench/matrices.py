"""`llamba bench matrices`: how closely structured matrices come to a teacher's attention (MOHAWK, arXiv 2408.10189, Table 3).

Shapes: M matrices, T time, N state width. Attention comes from pieces of real text, from every layer one head drawn at random.
"""

import argparse
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamba.base.provenance import append_row
from llamba.data.sources import rows
from llamba.data.tokens import RowTokenizer
from llamba.models.activations import CAPTURED, capture
from llamba.models.loading import load_model, load_tokenizer, located
from llamba.models.mixers import Recurrence
from llamba.settings import Data
from llamba.training import structured_matrices as structured

STATES = (16, 32, 64)
SWEEPS = 30
AT_ONCE = 8  # matrices fitted together by least squares
FAMILIES = ("Toeplitz", "low-rank", "SSD", "semiseparable")  # in the order in which the paper has their distances fall
BOUND = "low-rank, least squares"
MUCH = 3  # times: what ">>" between Toeplitz and low-rank is taken to mean


def _pieces(sources: Sequence[str], tokenizer: Any, length: int, count: int) -> Tensor:
    """The first `count` pieces [count, T] of the texts, one behind the other."""
    read, ids = RowTokenizer(Data(list(sources), length=2**30), tokenizer, "all"), []
    for source in sources:
        for where, row in rows(source):
            ids += read(where, row)[0] if row.get("text") or row.get("messages") else []
            if len(ids) >= count * length:
                return torch.tensor(ids[: count * length]).view(count, length)
    raise ValueError(f"{', '.join(sources)} must hold at least {count} x {length} = {count * length} tokens; got {len(ids)}")


@torch.no_grad()
def attention_matrices(model: Any, pieces: Tensor, count: int, seed: int) -> Tensor:
    """Attention [M, T, T] of `count` heads: of each piece [T] in turn one of every layer."""
    layers, heads, draw, found = model.config.num_hidden_layers, model.config.num_attention_heads, random.Random(seed), []
    model.set_attn_implementation(CAPTURED)
    for piece in pieces:
        heard = capture(model, {"input_ids": piece[None]}, scores=range(layers))
        for index in range(layers):
            mixing = heard.scores.pop(index).mixing(Recurrence())
            found.append(mixing.rows(mixing.inputs, slice(None))[0, draw.randrange(heads)])
    return torch.stack(found[:count]).float()


def _by_parts(fit: Callable[[Tensor], Tensor], matrices: Tensor) -> Tensor:
    return torch.cat([fit(part) for part in matrices.split(AT_ONCE)])


def measure(matrices: Tensor, states: Sequence[int], steps: int, sweeps: int) -> list[dict[str, Any]]:
    """A row for every N: the mean Frobenius distance of each family, and its standard error."""
    wide, found = matrices.double(), []
    flat, linear = structured.toeplitz(wide), structured.semiseparable(wide, states)
    for N in states:
        low_rank, ssd = structured.low_rank_and_ssd(matrices, N, steps)
        bound = _by_parts(lambda part, N=N: structured.alternating(part, N, sweeps), wide)  # type: ignore[misc]
        row: dict[str, Any] = {"N": N}
        for name, fit in zip((*FAMILIES, BOUND), (flat, low_rank, ssd, linear[N], bound), strict=True):
            errors = structured.distance(fit.double(), wide)
            row |= {name: errors.mean().item(), f"{name}, s.e.": (errors.std() / len(errors) ** 0.5).item()}
        found.append(row)
    return found


def remarks(found: Sequence[dict[str, Any]]) -> list[str]:
    """For every N, where the order of the families is not the paper's."""
    lines = []
    for row in found:
        factors = zip(FAMILIES[:-1], FAMILIES[1:], (MUCH, 1, 1), strict=True)
        wrong = [f"{a} {row[a]:.4g} is not above {times}x {b} {row[b]:.4g}" for a, b, times in factors if row[a] <= times * row[b]]
        lines.append(f"N = {row['N']}: {'; '.join(wrong) or 'Toeplitz >> low-rank > SSD > semiseparable, as in the paper'}")
    return lines


def table(found: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown, mean and standard error."""
    names = (*FAMILIES, BOUND)
    lines = [f"| N | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for row in found:
        cells = [f"{row[name]:.3f} ± {row[name + ', s.e.']:.3f}" for name in names]
        lines.append(f"| {row['N']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found: Sequence[dict[str, Any]], path: Path) -> None:
    """Distance over N for every family."""
    from matplotlib.figure import Figure  # half a second, and only for pictures

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for name in (*FAMILIES, BOUND):
        style = "--" if name == BOUND else "-"
        means, spread = [row[name] for row in found], [row[f"{name}, s.e."] for row in found]
        axes.errorbar([row["N"] for row in found], means, spread, marker="o", linestyle=style, label=name)
    axes.set(xlabel="state width N", ylabel="mean Frobenius distance", xscale="log", yscale="log", title="attention by structured matrices")
    axes.set_xticks([row["N"] for row in found], [str(row["N"]) for row in found])
    axes.legend()
    figure.savefig(path, dpi=150)


def main(args: argparse.Namespace) -> None:
    """Fit, print the table and its remarks; `--picture` draws, `--out` appends the rows to a .jsonl file with what made them."""
    if not args.model or not args.data:
        raise ValueError("llamba bench matrices needs --model and --data, whose attention on which texts is approximated")
    if args.matrices < 2 or args.length <= max(STATES) or args.steps < 2:
        raise ValueError(
            f"llamba bench matrices needs --matrices >= 2 (for an error of the mean), --length > {max(STATES)} and --steps >= 2; "
            f"got {args.matrices}, {args.length} and {args.steps}"
        )
    torch.manual_seed(0)
    folder = located(args.model)
    model = load_model(folder, torch.float32)
    pieces = _pieces(args.data, load_tokenizer(folder), args.length, -(-args.matrices // model.config.num_hidden_layers))
    found = measure(attention_matrices(model, pieces, args.matrices, seed=0), STATES, args.steps, SWEEPS)
    print("\n".join([f"{args.matrices} attention matrices, T = {args.length}", table(found), *remarks(found)]), flush=True)
    if args.picture:
        draw(found, Path(args.picture))
    settings = {"model": args.model, "data": args.data, "matrices": args.matrices, "length": args.length, "steps": args.steps}
    for row in found if args.out else []:
        append_row(args.out, row | settings)
