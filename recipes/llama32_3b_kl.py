"""Llama-3.2-3B-Instruct with half of its attention turned into Mamba-2 in one shot, distilled by KL from Llama-3.1-8B-Instruct.

Source: Wang, Paliotta, May, Rush, Dao, "The Mamba in the Llama" (arXiv 2408.15237), its Llama-3.2 recipe, as `llama31_8b_kl.py`. The
published 3B models come from a 70B or an 8B teacher; `stages.distill.teacher=meta-llama/Llama-3.1-70B-Instruct` takes the larger.

Scores there at 50% attention, without DPO: MT-Bench 6.5, AlpacaEval 2 length-controlled 12.61, mean of ten zero-shot tasks 56.49 with
Mamba-2; 6.9, 13.57, 58.36 with Mamba-1 (`student.mixer=mamba1`). Llama-3.2-3B-Instruct: zero-shot mean 57.83.
Cost there: about 3 days on 8 A100 80 GB with the 8B teacher.

Hyper-parameters, and what was not published, as `llama31_8b_kl.py` says.

The published models with DPO (beta 0.01, 5e-7, 10% warm-up, 32 pairs, one epoch) have it after distillation: `stages.dpo.skip=false`.
Zero-shot mean with it: 60.78 with Mamba-2, 60.88 with Mamba-1.
"""

from llamba import Data, Distill, Dpo, Recipe, Student, launch

PAIRS = Data(
    train=[
        "HuggingFaceH4/ultrafeedback_binarized:train_prefs",
        "HuggingFaceH4/orca_dpo_pairs:train_prefs",
        "JunxiongWang/llama3-ultrafeedback-armorm:train",
    ],
    length=2048,
    template="llama32",
)

recipe = Recipe(
    teacher="meta-llama/Llama-3.2-3B-Instruct",
    student=Student(mixer="mamba2", attention=0.5),
    data=Data(train="JunxiongWang/sftdatasetv3:train", length=2048, packing=True),
    stages=[
        Distill(
            teacher="meta-llama/Llama-3.1-8B-Instruct", kl=1.0, ce=0.0, train="all", targets="all", lr=2e-5, betas=(0.9, 0.999), clip=1.0,
            warmup=0.01, batch=64, gradient_checkpointing=True,
        ),
        Dpo(data=PAIRS, beta=0.01, lr=5e-7, warmup=0.1, batch=32, gradient_checkpointing=True, skip=True),
    ],
    output="runs/llama32_3b_kl",
)  # fmt: skip

if __name__ == "__main__":
    launch(recipe)
