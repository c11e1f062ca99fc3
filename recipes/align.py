"""Supervised fine-tuning and DPO for any model that is converted and distilled already.

    accelerate launch recipes/align.py teacher=runs/mine output=runs/mine_aligned
    accelerate launch recipes/align.py teacher=runs/mine stages.sft.data.train=chats.jsonl stages.dpo.data.train=pairs.jsonl
    python recipes/align.py teacher=runs/mine stages.sft.lora.rank=16 stages.dpo.lora.rank=16      # one GPU

`teacher` is here the model to align: a run folder, a model folder or a hub name; it is not converted further. Templates are Llama
3's (`data.template=llama31`, `llama32`, `zephyr`, a file, or `none` for the tokenizer's own).

The stages are those of Wang, Paliotta, May, Rush, Dao, "The Mamba in the Llama" (arXiv 2408.15237, section 5.1 and table 6: SFT
alone or DPO alone hardly helps a distilled student, SFT and then DPO raises MT-Bench from 5.55 to 6.69). Differences:
* SFT learns answers alone, where the paper learns every token, and packed documents do not see each other.
* Pairs are of up to 2,048 tokens, and those that are longer are left out; the paper cuts at 1,024, prompts at 512.
* The reference is the model that the stage starts from, as in the published code. The paper's equation 4 argues for the original
  teacher: `stages.dpo.reference=meta-llama/Meta-Llama-3-8B-Instruct`.
* beta = 0.01 for one epoch is the published recipe "ep1"; "ep3" is `stages.dpo.beta=0.1 stages.dpo.epochs=3`.
"""

from llamba import Data, Dpo, Recipe, Sft, Student, launch

recipe = Recipe(
    teacher="meta-llama/Meta-Llama-3-8B-Instruct",
    student=Student(attention=1.0),
    data=Data(train="HuggingFaceH4/ultrachat_200k:train_sft", length=2048, packing=True, template="llama3"),
    stages=[
        Sft(lr=2e-5, warmup=0.01, batch=64, epochs=1.0),
        Dpo(
            data=Data(train="HuggingFaceH4/ultrafeedback_binarized:train_prefs", length=2048, template="llama3"),
            beta=0.01,
            lr=5e-7,
            warmup=0.1,
            batch=32,
            epochs=1.0,
        ),
    ],
    output="runs/align",
)

if __name__ == "__main__":
    launch(recipe)
