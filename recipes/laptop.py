"""Any small model on a CPU: `python recipes/laptop.py teacher=FOLDER data.train=chats.jsonl [student.attention=0.25 ...]`.

A model folder, a `.gguf` file, a hub name or `package:smollm2-135m-instruct`; conversations as rows of `messages`. Layers are converted,
aligned and distilled for about as long as a coffee takes: `--plan` says how many minutes on this machine, and
`stages.0.tokens=... stages.1.tokens=...` change it. Half of the layers keep attention; `llamba convert --select DATA` or a `Select` stage
chooses them by measurement.
"""

from llamba import Data, Distill, Hidden, Recipe, Student, launch

recipe = Recipe(
    teacher="package:smollm2-135m-instruct",
    student=Student(mixer="auto", attention=0.5),
    data=Data(train="HuggingFaceTB/smol-smoltalk:train", length=512, packing=True),
    stages=[
        Hidden(tokens=100_000, lr=3e-3, warmup=0.05, batch=4, micro_batch=4),
        Distill(tokens=150_000, kl=1.0, ce=0.0, targets="all", lr=1e-3, clip=1.0, warmup=0.05, batch=4, micro_batch=2),
    ],
    output="runs/laptop",
)

if __name__ == "__main__":
    launch(recipe)
