"""Zephyr-7B on to a quarter and an eighth of its attention, step by step; 6.25% and none at all by override.

Source: Wang, Paliotta, May, Rush, Dao, "The Mamba in the Llama" (arXiv 2408.15237), its Zephyr recipe, as `zephyr_50pct.py` to 50% and then
as `llama3_progressive.py`, which describes the steps and the overrides; DPO on UltraFeedback alone.

Scores there, Mamba-1 (`student.mixer=mamba1`) at 50, 25 and 12.5% attention: MT-Bench 7.31, 7.03, 6.40; AlpacaEval 2 length-controlled
20.66, 17.16, 15.32. Teacher: 7.34 and 13.20. Perplexity before fine-tuning at 50, 25, 6.25 and 0%: 2.09, 2.20, 2.46, 3.36; teacher 2.02.
Cost there: conversions to 50% about 10 hours, each fine-tuning about 3 days, DPO a few hours, on 8 A100 80 GB.
"""

from typing import Any

from llamba import Data, Distill, Dpo, PseudoLabel, Recipe, Sft, Student, launch

PROMPTS = Data(train=["HuggingFaceH4/ultrachat_200k:train_gen", "HuggingFaceH4/ultrafeedback_binarized:train_gen"], template="zephyr")
CHATS = Data(train="JunxiongWang/sftdataset:train", length=2048, packing=True, template="zephyr")
PAIRS = Data(train="HuggingFaceH4/ultrafeedback_binarized:train_prefs", length=2048, template="zephyr")
TUNE: dict[str, Any] = dict(
    data=CHATS, targets="all", lr=2e-5, betas=(0.9, 0.999), clip=1.0, warmup=0.01, batch=64, gradient_checkpointing=True
)

recipe = Recipe(
    teacher="HuggingFaceH4/zephyr-7b-beta",
    student=Student(mixer="mamba2", attention=0.75),
    data=Data(train="stage:pseudo_label", length=2048, template="zephyr"),
    stages=[
        PseudoLabel(data=PROMPTS, turns="all", max_prompt=2000, max_new_tokens=2048, temperature=0.7, top_p=0.95),
        Distill(kl=0.1, ce=1.0, lr=8e-5, betas=(0.9, 0.98), clip=0.1, warmup=188, batch=64),
        Distill(attention=0.5, kl=0.1, ce=1.0, lr=8e-5, betas=(0.9, 0.98), clip=0.1, warmup=188, batch=64),
        Sft(**TUNE),
        Sft(attention=0.25, **TUNE),
        Sft(attention=0.125, **TUNE),
        Sft(attention=0.0625, skip=True, **TUNE),
        Sft(attention=0, skip=True, **TUNE),
        Dpo(data=PAIRS, beta=0.01, lr=5e-7, clip=1.0, warmup=0.1, batch=32, gradient_checkpointing=True),
    ],
    output="runs/zephyr_progressive",
)

if __name__ == "__main__":
    launch(recipe)
