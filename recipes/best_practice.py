"""Llama-3.1-8B-Instruct as we would convert it today: align every layer, measure which need attention, distil, lengthen the context.

Sources, by stage:
* `hidden`: the outputs of all mixers towards attention's, layers in parallel, 100 M tokens in short sequences, learning rate 1e-3 to
  1e-5 (RADLADS, arXiv 2505.03005; the gain of aligning first is that of MOHAWK, arXiv 2408.10189, Table 2: +7.8 points).
* `select`: attention back in the quarter of layers whose mixers hurt most, each measured alone, without training (HALO, arXiv
  2601.22156; `stages.select.method=restore` ranks as KL-guided selection, arXiv 2512.20569).
* `distill`: forward KL, everything trained at two learning rates, 1e-4 for mixers and 1e-5 for the rest (RADLADS; Llamba, arXiv
  2502.14458), on web text and chat.
* `distill` at 16,384 tokens with the teacher (HyLo, arXiv 2604.24715: RULER at 64K 0.8 without such a stage, 40.8 with it).

Published neighbours, not this recipe's own scores, which nobody has measured: RADLADS Qwen2.5-7B MMLU 68.2 of 71.7 without any
attention; HALO Qwen3-1.7B with a quarter of attention 94.1 on needles at 32K, uniform placement 68.2. Cost: by arithmetic, see --plan.
The budget of the last stage, its data and the share of chat are our choice. `student.mixer=discrete_mamba2` or `mamba1` for others.
"""

from typing import Any

from llamba import Data, Distill, Hidden, Recipe, Select, Student, launch

WEB, CHAT, BOOKS = "HuggingFaceFW/fineweb-edu@sample-10BT:train", "HuggingFaceH4/ultrachat_200k:train_sft", "emozilla/pg19:train"
KL: dict[str, Any] = dict(
    kl=1.0, ce=0.0, train="all", targets="all", lr=1e-4, rest_lr=1e-5, betas=(0.9, 0.95), clip=1.0, schedule="wsd", warmup=0.02,
    gradient_checkpointing=True,
)  # fmt: skip

recipe = Recipe(
    teacher="meta-llama/Llama-3.1-8B-Instruct",
    student=Student(attention=0),
    data=Data(train=[WEB, CHAT], weights=[0.7, 0.3], length=4096, packing=True, streaming=True),
    stages=[
        Hidden(
            data=Data(train=WEB, length=512, packing=True, streaming=True), tokens=100_000_000, targets="all", lr=1e-3, floor=0.01,
            betas=(0.9, 0.95), clip=1.0, warmup=0.02, batch=64,
        ),
        Select(keep=0.25, method="swap", rows=128, targets="all"),
        Distill(tokens=800_000_000, batch=96, **KL),
        Distill(data=Data(train=BOOKS, length=16_384, packing=True, streaming=True), tokens=200_000_000, batch=16, **KL),
    ],
    output="runs/best_practice",
)  # fmt: skip

if __name__ == "__main__":
    launch(recipe)
