"""Llama-3.2-3B-Instruct with half of its attention turned into Mamba-2 in one shot, distilled by KL from Llama-3.1-8B-Instruct.

Source: Wang, Paliotta, May, Rush, Dao, "The Mamba in the Llama" (arXiv 2408.15237), its Llama-3.2 recipe, as `llama31_8b_kl.py`. The
published 3B models come from a 70B or an 8B teacher; `stages.distill.teacher=meta-llama/Llama-3.1-70B-Instruct` takes the larger.

Scores there at 50% attention, without DPO: MT-Bench 6.5, AlpacaEval 2 length-controlled 12.61, mean of ten zero-shot tasks 56.49 with
Mamba-2; 6.9, 13.57, 58.36 with Mamba-1 (`student.mixer=mamba1`). Llama-3.2-3B-Instruct: zero-shot mean 57.83.
Cost there: about 3 days on 8 A100 80 GB with the 8B teacher.
"""

from llamba.recipe import Data, Recipe, Student
from llamba.run import launch
from llamba.settings import Distill

recipe = Recipe(
    teacher="meta-llama/Llama-3.2-3B-Instruct",
    student=Student(mixer="mamba2", attention=0.5),
    data=Data(train="JunxiongWang/sftdatasetv3:train", length=2048, packing=True),
    stages=[
        Distill(
            teacher="meta-llama/Llama-3.1-8B-Instruct", kl=1.0, ce=0.0, train="all", targets="all", lr=2e-5, betas=(0.9, 0.999), clip=1.0,
            warmup=0.01, batch=64, gradient_checkpointing=True,
        ),
    ],
    output="runs/llama32_3b_kl",
)  # fmt: skip

if __name__ == "__main__":
    launch(recipe)
