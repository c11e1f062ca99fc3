"""Speculative against plain decoding with the same code: tokens per second, and where the time goes.

For each number K of drafted tokens: tokens a round E, acceptance a, the verify overhead v (reading K + 1 tokens instead of one) and the
draft's cost c (one token), both as parts of the time that plain decoding takes for a token; the speed-up that they predict,
S = E / (1 + v + c K), and the one measured. Shapes with random weights get the acceptance that is set: by grafting (`llamba.bench.graft`)
where the draft's layers fit into the target, else by a draft that is told what the target will say.
"""

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamba.base.devices import meant
from llamba.base.provenance import append_row
from llamba.bench.decode import round_call
from llamba.bench.graft import can_graft, graft
from llamba.bench.shapes import Preset, Published, build, chosen
from llamba.chat.conversation import load, load_draft
from llamba.speculative import Auto, Generation, generate
from llamba.speculative.graphs import runs_in_graphs
from llamba.speculative.proposers import ModelDraft, Proposal, Rows
from llamba.speculative.rewind import Rewindable
from llamba.speculative.sampling import Sampler

Row = dict[str, Any]
CAPACITY = 64


class ScriptedDraft(ModelDraft):
    """A draft that costs what the model costs and is right with a set probability: it knows what the target will say."""

    def __init__(self, model: Any, capacity: int, script: list[int], acceptance: float):
        super().__init__(model, capacity, Sampler())
        self.script, self.acceptance = torch.tensor(script), acceptance
        self.draw = torch.Generator().manual_seed(0)

    def propose(self, rows: Rows, count: int, noise: Tensor) -> Proposal:
        """The model's drafts are made, and replaced: by the script's tokens, or, from the first miss on, by others."""
        made = super().propose(rows, count, noise)
        told = self.script[len(rows[0]) : len(rows[0]) + count].to(made.tokens.device)
        miss = (torch.rand(len(told), generator=self.draw) >= self.acceptance).cumsum(0) > 0
        tokens = torch.where(miss.to(told.device), told + 1, told)  # not what the target says: any other token does
        return Proposal(tokens[None] % self.reader.model.config.vocab_size, [len(told)], None)


def _reads(model: Any, tokens: int, record: bool, prompt: list[int], calls: int, engine: str) -> Callable[[], None]:
    """A call that reads `tokens` tokens behind a prompt; with `record` half of them are taken back, as in a round.

    `engine`: as of `generate`; in graphs, what stands is kept and the rest is taken back.
    """
    if runs_in_graphs(engine, model, None, Sampler(), None, False):
        return round_call(model, prompt, tokens - 1, calls)
    reader = Rewindable(model, len(prompt) + calls * tokens + CAPACITY)
    reader.start([prompt])
    if record:
        reader.record()
    new, back = torch.tensor([prompt[-1:] * tokens], device=model.device), tokens // 2 if record else 0

    def read() -> None:
        reader.read(new, tokens)
        reader.rollback([back])
        reader.commit()

    return read


@torch.inference_mode()
def step_seconds(steps: dict[Any, tuple[Any, int, bool]], prompt: list[int], repeats: int = 20, engine: str = "auto") -> dict[Any, float]:
    """Median seconds of each step by this engine: a model, how many tokens it reads, and whether they may be taken back.

    They are taken in turns, so that a slow moment of the machine meets all alike, after two turns to warm up.
    """
    reads = {name: (step[0].device.type, _reads(*step, prompt, repeats + 2, engine)) for name, step in steps.items()}
    times: dict[Any, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 2):
        for name, (device, read) in reads.items():
            started = time.perf_counter()
            read()
            if device != "cpu":
                torch.accelerator.synchronize()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(found[2:]) for name, found in times.items()}


def _total(runs: list[Generation]) -> Generation:
    """Several generations as one."""
    new = [row for run in runs for row in run.new]
    sums = {name: sum(getattr(run, name) for run in runs) for name in ("rounds", "drafted", "accepted", "seconds")}
    return Generation(torch.empty(0), new, **sums)


def _decode(model: Any, prompts: list[list[int]], tokens: int, draft: Callable[[int], Any], **more: Any) -> Generation:
    """All prompts one by one, as one generation. `draft` gives the draft for a prompt's number."""
    if _is_tree(more.get("lookahead")):
        more["tree"] = [int(children) for children in more.pop("lookahead").split("x")]
    runs = []
    for number, prompt in enumerate(prompts):
        ids = torch.tensor([prompt], device=model.device)
        runs.append(generate(model, ids, max_new_tokens=tokens, draft=draft(number), **more))
    return _total(runs)


def measure(
    model: Any,
    draft: Any,
    prompts: list[list[int]],
    lookaheads: list[Any],
    tokens: int,
    repeats: int,
    acceptance: float | None = None,
    endless: bool = False,
) -> list[Row]:
    """One row per number of drafted tokens, behind one for plain decoding. `acceptance`: rehearsed drafts instead of the draft's own.

    `endless`: no token ends a text. `same` says whether both decoded the same tokens, which in low precision near ties may undo.
    """
    same: dict[str, Any] = {"eos_token_id": None} if endless else {}
    if isinstance(draft, str) or acceptance is not None:
        same["engine"] = "eager"  # the only one that takes such drafts, so plain decoding takes it too
    plain = _decode(model, prompts, tokens, lambda number: None, **same)

    def source(number: int) -> Any:
        if acceptance is None:
            return draft
        return ScriptedDraft(draft, len(prompts[number]) + tokens + CAPACITY, prompts[number] + plain.new[number], acceptance)

    best: dict[Any, Generation] = {0: plain}
    paces = {count: Auto() if count == "auto" else count for count in lookaheads}  # "auto" goes on learning from prompt to prompt
    for _ in range(repeats):  # in turns, so that a slow moment of the machine meets all alike
        for count in (0, *lookaheads):
            asked: dict[str, Any] = {"draft": source, "lookahead": paces[count]} if count else {"draft": lambda number: None}
            made = _decode(model, prompts, tokens, **asked, **same)
            best[count] = min(made, best.get(count, made), key=lambda run: run.seconds)
    plain = best[0]
    rows: list[Row] = [{"lookahead": 0, "tokens_per_second": plain.tokens_per_second, "tokens": plain.tokens}]
    steps: dict[Any, tuple[Any, int, bool]] = {0: (model, 1, False)}
    steps |= {count: (model, count + 1, True) for count in lookaheads if isinstance(count, int)}
    steps |= {} if isinstance(draft, str) else {"draft": (draft, 1, True)}
    cost = step_seconds(steps, prompts[0], engine=same.get("engine", "auto"))
    for count in lookaheads:
        made = best[count]
        row: Row = {
            "lookahead": count,
            "tokens_per_second": made.tokens_per_second,
            "tokens": made.tokens,
            "tokens_per_round": made.tokens / made.rounds,
            "acceptance": made.acceptance,
            "speedup": made.tokens_per_second / plain.tokens_per_second,
            "same": made.new == plain.new,
        }
        if isinstance(count, int):
            overhead, drafting = cost[count] / cost[0] - 1, cost.get("draft", 0.0) / cost[0]
            row |= {"verify_overhead": overhead, "draft_cost": drafting}
            row["predicted"] = row["tokens_per_round"] / (1 + overhead + drafting * count)
        rows.append(row)
    return rows


def _line(row: Row, published: Published | None) -> str:
    text = f"{row['lookahead'] or 'plain':>5}  {row['tokens_per_second']:8.1f}"
    if row["lookahead"]:
        text += f"  {row['tokens_per_round']:6.2f}  {row['acceptance']:6.0%}"
        known = "predicted" in row
        text += f"  {row['verify_overhead']:5.2f}  {row['draft_cost']:5.2f}  {row['predicted']:9.2f}" if known else " " * 25
        text += f"  {row['speedup']:8.2f}  {'yes' if row['same'] else 'no':>4}"
    if published is not None:
        each = f", {published.tokens_per_second:.0f} tok/s" if published.tokens_per_second else ""
        text += f"   published on {published.gpu}: {published.tokens_per_round} tokens a round, {published.speedup} x{each}"
    return text


HEAD = f"{'K':>5}  {'tok/s':>8}  {'E':>6}  {'accept':>6}  {'v':>5}  {'c':>5}  {'predicted':>9}  {'measured':>8}  same"


def _questions(path: str, tokenizer: Any) -> list[list[int]]:
    """The prompts of a .jsonl file of rows with messages, as tokens."""
    if not Path(path).is_file():
        raise ValueError(f"--prompts must be a .jsonl file of rows with messages; got {path}, which is no file")
    rows = [json.loads(line)["messages"] for line in Path(path).read_text().splitlines() if line.strip()]
    texts = [tokenizer.apply_chat_template(row, add_generation_prompt=True, tokenize=False) for row in rows]
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def _lookaheads(text: str) -> list[Any]:
    parts = text.split(",")
    if not all(part.isdigit() or part == "auto" or _is_tree(part) for part in parts):
        raise ValueError(f'--lookahead must be numbers, trees such as 3x2x1, or "auto", with commas; got {text}')
    return [int(part) if part.isdigit() else part for part in parts]


def _is_tree(lookahead: Any) -> bool:
    return isinstance(lookahead, str) and re.fullmatch(r"\d+(x\d+)+", lookahead) is not None


def _of_models(args: argparse.Namespace) -> list[Row]:
    if args.draft is None or args.prompts is None:
        raise ValueError("bench speculative needs --model with --draft and --prompts, or --preset")
    model, tokenizer = load(args.model, args.dtype, args.device)
    draft = load_draft(args.draft, model)
    rows = measure(model, draft, _questions(args.prompts, tokenizer), _lookaheads(args.lookahead), args.tokens, args.repeats)
    print(HEAD)
    for row in rows:
        print(_line(row, None), flush=True)
    return [{"model": args.model, "draft": args.draft} | row for row in rows]


def _of_preset(name: str, preset: Preset, args: argparse.Namespace, dtype: torch.dtype, device: str) -> list[Row]:
    found: list[Row] = []
    model, draft = (build(config, args.shrink, dtype, device) for config in (preset.target, preset.draft))
    grafted = graft(model, draft) if can_graft(model, draft) else None
    prompt = torch.randint(3, model.config.vocab_size, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    print(f"{name}{f', shrunk by {args.shrink}' if args.shrink > 1 else ''}, {'grafted' if grafted else 'rehearsed'} drafts\n{HEAD}")
    for published in preset.rows:
        rate = published.acceptance if args.acceptance is None else args.acceptance
        if grafted is not None:
            grafted.tune(rate, prompt, args.tokens)
        script = rate if grafted is None else None
        rows = measure(model, draft, [prompt], [published.lookahead], args.tokens, args.repeats, script, endless=True)
        for row in rows[bool(found) :]:
            print(_line(row, published if row["lookahead"] else None), flush=True)
            made = {"preset": name, "shrink": args.shrink, "set_acceptance": rate, "grafted": grafted is not None}
            found.append(made | {"published": vars(published)} | row)
    return found


def _of_presets(args: argparse.Namespace) -> list[Row]:
    device = meant(args.device)
    dtype = (torch.float32 if device == "cpu" else torch.bfloat16) if args.dtype == "auto" else getattr(torch, args.dtype)
    return [row for name, preset in chosen(args.preset).items() for row in _of_preset(name, preset, args, dtype, device)]


def main(args: argparse.Namespace) -> None:
    """Print the table; with `--out`, append the rows to a .jsonl file with what made them. Raises ValueError for options that clash."""
    if (args.model is None) == (args.preset is None):
        raise ValueError("bench speculative needs either --model (with --draft and --prompts) or --preset")
    rows = _of_presets(args) if args.model is None else _of_models(args)
    for row in rows if args.out else []:
        append_row(args.out, row)
