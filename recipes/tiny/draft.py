"""A draft for the embedded teacher's student: two layers of the teacher, trained towards the student. Goes on with the run of `make demo`.

python recipes/tiny/draft.py [key=value ...]
llamba bench speculative --model runs/demo --draft runs/demo/2-draft --prompts runs/demo-data/held_out.jsonl
"""

import json
import random
from dataclasses import replace
from pathlib import Path

from demo import CONVERSATIONS, LENGTH, write_conversations
from demo import recipe as demo
from language import SKILLS, exam

from llamba.run import launch
from llamba.settings import Draft

PROMPTS = Path("runs/demo-data/held_out.jsonl")

recipe = replace(
    demo,
    stages=[
        *demo.stages,
        Draft(layers=2, kl=1.0, ce=0.0, lr=3e-3, clip=1.0, warmup=30, batch=8, micro_batch=8, steps=600, precision="fp32",
              save_every=300, log_every=20),
    ],
)  # fmt: skip


def write_prompts(path: Path, per_skill: int = 4) -> None:
    """Held-out questions of every skill as rows of `messages`, made once."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [exam(skill, random.Random(f"1/{skill}/{number}"))[0] for number in range(per_skill) for skill in SKILLS]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))


if __name__ == "__main__":
    write_conversations(Path("runs/demo-data/train.jsonl"), CONVERSATIONS, LENGTH)
    write_prompts(PROMPTS)
    launch(recipe)
