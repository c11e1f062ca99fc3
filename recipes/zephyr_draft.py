"""A draft for a Zephyr-7B hybrid: two layers of the teacher, for speculative decoding. Goes on with the run of `zephyr_50pct.py`.

Source: Wang, Paliotta, May, Rush, Dao, "The Mamba in the Llama" (arXiv 2408.15237), section 4.3 and Table 5: layers 0 and 31 (or 0, 10, 20
and 31: `stages.draft.layers=4`) with the teacher's embeddings and head, about 3 epochs on OpenHermes 2.5, cross-entropy on the answers.
Published for 50 % attention with Mamba-1 on an RTX 3090: 1.8 times as fast as plain decoding, 2.48 tokens a round with 4 drafted.
The draft learns from the student here (`kl=1`); `stages.draft.kl=0 stages.draft.ce=1` is the paper's form.
"""

from dataclasses import replace

from llamba import Data, Draft, launch
from llamba.recipes.zephyr_50pct import recipe as distilled

recipe = replace(
    distilled,
    stages=[
        *distilled.stages,
        Draft(
            data=Data(train="teknium/OpenHermes-2.5:train", length=2048, template="zephyr"),
            layers=2,
            lr=1e-4,
            betas=(0.9, 0.95),
            clip=1.0,
            warmup=500,
            batch=64,
            micro_batch=1,
            epochs=3.0,
        ),
    ],
)

if __name__ == "__main__":
    launch(recipe)
