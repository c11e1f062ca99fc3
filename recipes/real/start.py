"""What a closed-form start is worth on the real teacher: KL on held-out chats as converted and fitted, nothing trained.

    python recipes/real/start.py [tokens=20480] [teacher=...] [data=FILE or ORG/SET:SPLIT]

Students with a window, sinks and Mamba-2 in a quarter, half and all of the layers. Rows go to eval/results/start_cpu.jsonl.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch

from llamba import convert
from llamba.base.errors import one_line_errors
from llamba.base.progress import quiet_libraries
from llamba.base.provenance import append_row
from llamba.chat.conversation import load
from llamba.recipes.real.chats import CHITCHAT, held_out_windows, write_chats
from llamba.recipes.real.measures import LATE, distance, references

TEACHER = "package:smollm2-135m-instruct"
LENGTH, HELD_OUT = 512, 8
RESULTS = Path(__file__).parents[2] / "eval" / "results" / "start_cpu.jsonl"


def students(layers: int) -> dict[str, list[int]]:
    """The layers that keep attention, by what is replaced."""
    fourth = [layer for layer in range(layers) if layer % 4 != 1]
    return {"a quarter": fourth, "half": [layer for layer in range(layers) if layer % 2 == 0], "all": []}


def main(given: dict[str, str]) -> None:
    """Measure every student with and without the fit, print and keep the rows."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    teacher, tokenizer = load(given.get("teacher", TEACHER))
    train, held = write_chats(given.get("data", CHITCHAT), Path("runs/real-data"))
    chats, tokens = references(teacher, held_out_windows(held, tokenizer, LENGTH, HELD_OUT)), int(given.get("tokens", "20480"))
    rows = held_out_windows(train, tokenizer, LENGTH, tokens // LENGTH)
    for name, kept in students(teacher.config.num_hidden_layers).items():
        row: dict[str, Any] = {"measured": "start", "teacher": given.get("teacher", TEACHER), "replaced": name, "tokens": tokens}
        for start, calibrate in (("converted", None), ("fitted", rows)):
            found = distance(convert(teacher, attention=kept, calibrate=calibrate), chats)
            row[start] = {"kl": found.kl, "late": found.late}
            print(f"{name} of the layers, start {start}: KL {found.kl:.4f}, behind token {LATE} {found.late:.4f}", flush=True)
        append_row(RESULTS, row)


if __name__ == "__main__":
    quiet_libraries()
    with one_line_errors():
        main(dict(argument.split("=", 1) for argument in sys.argv[1:]))
