"""Llama-3-8B-Instruct on to a quarter and an eighth of its attention, step by step; 6.25% and none at all by override.

Source: Wang, Paliotta, May, Rush, Dao, "The Mamba in the Llama" (arXiv 2408.15237), its progressive recipe: as `llama3_50pct.py` to
50%, then supervised fine-tuning of the whole model; at each further ratio the fine-tuned model is converted and fine-tuned again; DPO
ends it. Nothing that was trained is reset (the published code resets embeddings, final norm and head at each conversion).

Scores there with Mamba-2 at 50, 25, 12.5 and 0% attention: MT-Bench 7.32, 6.74, 6.48, 5.64; AlpacaEval 2 length-controlled 26.78, 22.75,
20.25, 14.49. With Mamba-1 (`student.mixer=mamba1`) at 50, 25, 12.5%: 7.35, 6.86, 6.46 and 29.61, 25.85, 20.76. Teacher: 8.00 and 22.90.
Cost there: conversions to 50% about 10 hours, each fine-tuning about 4 days, DPO a few hours, on 8 A100 80 GB.

Further: `stages.6.skip=false` adds 6.25% (the last of each 16 layers), `stages.7.skip=false` no attention. To stop earlier:
`stages.5.skip=true` ends at 25%.

Fine-tuning as published: AdamW (0.9, 0.999), 2e-5, cosine, 1% warm-up, 64 sequences of 2,048 packed tokens, cross-entropy on all tokens,
one epoch. DPO: beta 0.01, 5e-7, 10% warm-up, 32 pairs, one epoch; there pairs were cut at 1,024
tokens, here those of more than 2,048 are left out. The rest as `llama3_50pct.py` says.
"""

from typing import Any

from llamba import Data, Distill, Dpo, PseudoLabel, Recipe, Sft, Student, launch

PROMPTS = Data(train=["HuggingFaceH4/ultrachat_200k:train_gen", "HuggingFaceH4/ultrafeedback_binarized:train_gen"], template="llama3")
CHATS = Data(train="JunxiongWang/sftdataset:train", length=2048, packing=True, template="llama3")
PAIRS = Data(
    train=[
        "HuggingFaceH4/ultrafeedback_binarized:train_prefs",
        "HuggingFaceH4/orca_dpo_pairs:train_prefs",
        "JunxiongWang/llama3-ultrafeedback-armorm:train",
    ],
    length=2048,
    template="llama3",
)
TUNE: dict[str, Any] = dict(
    data=CHATS, targets="all", lr=2e-5, betas=(0.9, 0.999), clip=1.0, warmup=0.01, batch=64, gradient_checkpointing=True
)

recipe = Recipe(
    teacher="meta-llama/Meta-Llama-3-8B-Instruct",
    student=Student(mixer="mamba2", attention=0.75),
    data=Data(train="stage:pseudo_label", length=2048, template="llama3"),
    stages=[
        PseudoLabel(data=PROMPTS, turns="all", max_prompt=2000, max_new_tokens=2048, temperature=0.6, top_p=0.9),
        Distill(kl=0.1, ce=1.0, lr=8e-5, betas=(0.9, 0.98), clip=0.1, warmup=188, batch=64),
        Distill(attention=0.5, kl=0.1, ce=1.0, lr=8e-5, betas=(0.9, 0.98), clip=0.1, warmup=63, batch=64),
        Sft(**TUNE),
        Sft(attention=0.25, **TUNE),
        Sft(attention=0.125, **TUNE),
        Sft(attention=0.0625, skip=True, **TUNE),
        Sft(attention=0, skip=True, **TUNE),
        Dpo(data=PAIRS, beta=0.01, lr=5e-7, clip=1.0, warmup=0.1, batch=32, gradient_checkpointing=True),
    ],
    output="runs/llama3_progressive",
)

if __name__ == "__main__":
    launch(recipe)
