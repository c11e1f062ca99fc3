"""Zephyr-7B with half of its attention turned into Mamba-2, distilled on the teacher's own answers.

Source: Wang, Paliotta, May, Rush, Dao, "The Mamba in the Llama" (arXiv 2408.15237), its Zephyr recipe; as `llama3_50pct.py`, with a
warm-up of 1,500 scheduler steps (188 optimizer steps on 8 processes) before both conversions.

Scores there, Mamba-1 (`student.mixer=mamba1`) at 50% attention after supervised fine-tuning and DPO: MT-Bench 7.31 (DPO of three epochs;
7.12 after one) and AlpacaEval 2 length-controlled 20.66 (DPO of one epoch). Teacher: 7.34 and 13.20.
Cost there: both conversions about 10 hours, fine-tuning about 3 days, everything less than 5 days, on 8 A100 80 GB.

One-shot conversion, without the step at 25%: `student.attention=0.5 stages.2.skip=true`.
The balance of KL and CE, and the sampling of the answers, are translated as `llama3_50pct.py` says.

After distillation: SFT (2e-5, 1% warm-up, 64 sequences of 2,048 packed tokens, one epoch, 55,064 steps there, cross-entropy on all tokens;
`stages.sft.targets=answers` learns the answers alone) and DPO (beta 0.01, 5e-7, 10% warm-up, 32 pairs, one epoch; the published recipe of
three epochs is `stages.dpo.beta=0.1 stages.dpo.epochs=3`). Here pairs of more than 2,048 tokens are left out; there they were cut at 1,024,
prompts at 512. Packed documents do not see each other here; there they did.
"""

from llamba import Data, Distill, Dpo, PseudoLabel, Recipe, Sft, Student, launch

PROMPTS = Data(train=["HuggingFaceH4/ultrachat_200k:train_gen", "HuggingFaceH4/ultrafeedback_binarized:train_gen"], template="zephyr")
CHATS = Data(train="JunxiongWang/sftdataset:train", length=2048, packing=True, template="zephyr")
PAIRS = Data(train="HuggingFaceH4/ultrafeedback_binarized:train_prefs", length=2048, template="zephyr")

recipe = Recipe(
    teacher="HuggingFaceH4/zephyr-7b-beta",
    student=Student(mixer="mamba2", attention=0.75),
    data=Data(train="stage:pseudo_label", length=2048, template="zephyr"),
    stages=[
        PseudoLabel(data=PROMPTS, turns="all", max_prompt=2000, max_new_tokens=2048, temperature=0.7, top_p=0.95),
        Distill(kl=0.1, ce=1.0, lr=8e-5, betas=(0.9, 0.98), clip=0.1, warmup=188, batch=64),
        Distill(attention=0.5, kl=0.1, ce=1.0, lr=8e-5, betas=(0.9, 0.98), clip=0.1, warmup=188, batch=64),
        Sft(data=CHATS, targets="all", lr=2e-5, warmup=0.01, batch=64, gradient_checkpointing=True),
        Dpo(data=PAIRS, beta=0.01, lr=5e-7, warmup=0.1, batch=32, gradient_checkpointing=True),
    ],
    output="runs/zephyr_50pct",
)

if __name__ == "__main__":
    launch(recipe)
