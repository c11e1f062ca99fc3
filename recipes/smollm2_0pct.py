"""SmolLM2-135M-Instruct without any attention over the whole context: a window, sinks and Mamba-2 in every layer.

No paper. As `smollm2_50pct.py`, without giving attention back: memory by context length is constant.
"""

from dataclasses import replace

from llamba import launch
from llamba.recipes.smollm2_50pct import distilled
from llamba.recipes.smollm2_50pct import recipe as half

recipe = replace(
    half,
    stages=[replace(distilled, tokens=6_000_000)],
    output="runs/smollm2_0pct",
)

if __name__ == "__main__":
    launch(recipe)
