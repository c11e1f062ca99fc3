"""Llama-3-8B-Instruct, one layer after the other turned into Mamba-2, each trained on a part of the teacher's answers.

Source: the code beside Wang, Paliotta, May, Rush, Dao, "The Mamba in the Llama" (arXiv 2408.15237), `mamba2_llama_stepwise`: 32 steps,
even layers first, then 1, 5, ..., then 3, 11, 19, 27, then 7, 23, 15, 31; step k learns from the k-th of 32 parts of the answers.
Its authors advise the order 0, 1, 2, ... where all attention is to go (`ORDER` below).

Scores there are of two conversions against one (Zephyr, perplexity, Table 7): at 25% attention 2.20 stepwise and 2.29 in one shot; 2.09 at
50%. Cost: not published. Every step leaves a model, so the run may be stopped wherever enough is converted: after 16 steps half
is. `student.mixer=mamba1` for Mamba-1. Hyper-parameters as `llama3_50pct.py`, with the warm-up of 1,500 scheduler steps in every step.

SFT and DPO as in `llama3_50pct.py` follow the last step; no scores of theirs after steps were published (without attention, but converted
by ratios: MT-Bench 5.64, AlpacaEval 2 length-controlled 14.49). To stop at half: `stages.17.skip=true` ... `stages.32.skip=true`.
"""

from llamba import Data, Distill, PseudoLabel, Recipe, Student, launch
from llamba.recipes.llama3_50pct import recipe as published

ORDER = [*range(0, 32, 2), *range(1, 32, 4), *range(3, 32, 8), 7, 23, 15, 31]
PROMPTS = Data(train=["HuggingFaceH4/ultrachat_200k:train_gen", "HuggingFaceH4/ultrafeedback_binarized:train_gen"], template="llama3")


def step(number: int) -> Distill:
    """Convert the layer of this step, and train on its part of the answers."""
    data = Data(train="stage:pseudo_label", length=2048, part=(number, len(ORDER)), template="llama3")
    return Distill(
        data=data, attention=sorted(ORDER[number + 1 :]), kl=0.1, ce=1.0, lr=8e-5, betas=(0.9, 0.98), clip=0.1, warmup=188, batch=64
    )


recipe = Recipe(
    teacher="meta-llama/Meta-Llama-3-8B-Instruct",
    student=Student(mixer="mamba2", attention=sorted(ORDER[1:])),
    data=Data(train="stage:pseudo_label", length=2048, template="llama3"),
    stages=[
        PseudoLabel(data=PROMPTS, turns="all", max_prompt=2000, max_new_tokens=2048, temperature=0.6, top_p=0.9),
        *(step(number) for number in range(len(ORDER))),
        *published.stages[-2:],
    ],
    output="runs/llama3_stepwise",
)

if __name__ == "__main__":
    launch(recipe)
