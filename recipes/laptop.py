"""Any small model on a CPU: `python recipes/laptop.py teacher=FOLDER data.train=chats.jsonl [student.attention=0.25 ...]`.

A model folder, a `.gguf` file, a hub name or `package:smollm2-135m-instruct`; conversations as rows of `messages`. Layers are converted,
fitted to attention, and the whole is distilled for about as long as a coffee takes: `--plan` says how many minutes on this
machine, and `stages.distill.tokens=...` changes it. Half of the layers keep attention; `llamba convert --select DATA` or a `Select` stage
chooses them by measurement.
"""

from dataclasses import replace

from llamba import Data, Recipe, Student, launch
from llamba.recipes.smollm2_50pct import distilled

recipe = Recipe(
    teacher="package:smollm2-135m-instruct",
    student=Student(mixer="auto", attention=0.5, calibrate=8192),
    data=Data(train="HuggingFaceTB/smol-smoltalk:train", length=512, packing=True),
    stages=[replace(distilled, tokens=200_000, warmup=0.1, batch=2, micro_batch=2)],
    output="runs/laptop",
)

if __name__ == "__main__":
    launch(recipe)
