"""A draft for the embedded teacher's student: two layers of the teacher, trained on the answers. Goes on with the run of `make demo`.

python recipes/tiny/draft.py [key=value ...]
llamba bench speculative --model runs/demo --draft runs/demo/2-draft --prompts runs/demo-data/held_out.jsonl
"""

import json
import random
from dataclasses import replace
from pathlib import Path

from demo import CONVERSATIONS, LENGTH, write_conversations
from demo import recipe as demo
from language import conversation

from llamba import Draft, launch

PROMPTS = Path("runs/demo-data/held_out.jsonl")

recipe = replace(
    demo,
    stages=[
        *demo.stages,
        Draft(layers=2, kl=0.0, ce=1.0, lr=3e-3, clip=1.0, warmup=30, batch=8, micro_batch=8, steps=1500, precision="fp32",
              save_every=500, log_every=20),
    ],
)  # fmt: skip


def write_prompts(path: Path, count: int = 40) -> None:
    """New conversations of the kind trained on, each up to its last answer, as rows of `messages`; made once."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [conversation(random.Random(f"held out/{number}"), LENGTH // 4)[:-1] for number in range(count)]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))


if __name__ == "__main__":
    write_conversations(Path("runs/demo-data/train.jsonl"), CONVERSATIONS, LENGTH)
    write_prompts(PROMPTS)
    launch(recipe)
