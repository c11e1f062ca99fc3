"""A draft for a Llama-3-8B hybrid: four layers of the teacher, for speculative decoding. Goes on with the run of `llama3_50pct.py`.

Source: Wang, Paliotta, May, Rush, Dao, "The Mamba in the Llama" (arXiv 2408.15237), section 4.3 and Table 5: layers 0, 10, 20 and 31 with
the teacher's embeddings and head, about 3 epochs on OpenHermes 2.5, cross-entropy on the answers. Published for 50 % attention: 1.6 times
as fast as plain decoding on an RTX 3090 (2.7 tokens a round with 3 drafted). Two values differ here:
* The draft learns from the student (`kl=1`), which is what decides whether its tokens stand; `stages.draft.kl=0 stages.draft.ce=1` is
  the paper's form.
* Its head keeps the 32,768 most frequent tokens: the paper names the head (525 M of the draft's parameters) as what limits Llama-3.
  `stages.draft.head=null` keeps all 128,256.
"""

from dataclasses import replace

from llamba import Data, Draft, launch
from llamba.recipes.llama3_50pct import recipe as distilled

recipe = replace(
    distilled,
    stages=[
        *distilled.stages,
        Draft(
            data=Data(train="teknium/OpenHermes-2.5:train", length=2048, template="llama3"),
            layers=4,
            head=32_768,
            kl=1.0,
            ce=0.0,
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
