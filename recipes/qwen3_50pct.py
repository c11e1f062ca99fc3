"""Qwen3-0.6B with half of its attention turned into Mamba-2 beside a window and sinks; its q and k norms go into the mixers.

No paper; the order of `best_practice.py`: align every layer, give attention back where it is needed, distil by KL. For one GPU.
`teacher=Qwen/Qwen3-4B` and other sizes alike.
"""

from llamba import Data, Distill, Hidden, Recipe, Select, Student, launch

WEB, CHAT = "HuggingFaceFW/fineweb-edu@sample-10BT:train", "HuggingFaceTB/smol-smoltalk:train"

recipe = Recipe(
    teacher="Qwen/Qwen3-0.6B",
    student=Student(mixer="auto", attention=0),
    data=Data(train=[WEB, CHAT], weights=[0.5, 0.5], length=2048, packing=True, streaming=True),
    stages=[
        Hidden(
            data=Data(train=WEB, length=512, packing=True, streaming=True), tokens=50_000_000, lr=1e-3, warmup=0.02, batch=64, micro_batch=8
        ),
        Select(keep=0.5, method="swap", rows=64, targets="all"),
        Distill(
            tokens=200_000_000, kl=1.0, ce=0.0, targets="all", train="all", lr=3e-4, rest_lr=1e-5, betas=(0.9, 0.95), clip=1.0,
            schedule="wsd", warmup=0.02, batch=32, micro_batch=4, gradient_checkpointing=True,
        ),
    ],
    output="runs/qwen3_50pct",
)  # fmt: skip

if __name__ == "__main__":
    launch(recipe)
