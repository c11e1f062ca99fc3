"""SmolLM2-135M-Instruct without any attention over the whole context: a window, sinks and Mamba-2 in every layer.

No paper. As `smollm2_50pct.py`, without giving attention back: memory by context length is constant.
"""

from dataclasses import replace

from llamba import Distill, launch
from llamba.recipes.smollm2_50pct import recipe as half

recipe = replace(
    half,
    stages=[
        Distill(
            tokens=6_000_000,
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
        ),
    ],
    output="runs/smollm2_0pct",
)

if __name__ == "__main__":
    launch(recipe)
