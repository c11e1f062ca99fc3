"""SmolLM2-135M-Instruct without any attention over the whole context: a window, sinks and Mamba-2 in every layer.

No paper. As `smollm2_50pct.py`, without giving attention back: memory by context length is constant.
"""

from dataclasses import replace

from llamba import Distill, launch
from llamba.recipes.smollm2_50pct import recipe as half

recipe = replace(
    half,
    stages=[
        half.stages[0],
        Distill(tokens=4_000_000, kl=1.0, ce=0.0, targets="all", lr=1e-3, clip=1.0, warmup=0.02, batch=8, micro_batch=4),
    ],
    output="runs/smollm2_0pct",
)

if __name__ == "__main__":
    launch(recipe)
