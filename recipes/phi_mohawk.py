"""Phi-1.5 with all of its attention turned into discrete Mamba-2: matrices, hidden states, then everything.

Source: Bick, Li, Xing, Kolter, Gu, "Transformers to SSMs" (MOHAWK, arXiv 2408.10189), Phi-Mamba: 3.0 B tokens of C4 in three stages.

Scores there (mean of six tasks): 62.7 with all stages and everything trained; 61.4 with all but the mixers frozen in the last stage
(`stages.distill.train=mixers`); 62.3 without the first stage (`stages.matrix.skip=true`). Teacher: 64.9.
Cost: not published; by arithmetic about one day of an H100.

The paper copies nothing from attention. `student.init=attention` does, and later work finds that it saves most of the tokens.
Hyper-parameters are the paper's: AdamW (0.9, 0.95), weight decay 0.1, learning rate 1e-4, 10% linear warm-up, flat, 10% linear
decay to 1e-8; 2^15 tokens a step, 2^19 in the last stage. Its final run lowered the last stage's learning rate to a value that is
not published, and its code leaves gradients unclipped; 1.0 here. Each stage reads on in C4 where the one before stopped. `hidden`
compares outputs of mixers, as the code beside the paper does; `stages.hidden.target=block` those of blocks, as its authors' later
training code. For Mamba-2: `student.mixer=mamba2`.
"""

from typing import Any

from llamba import Data, Distill, Hidden, Matrix, Recipe, Student, launch

MOHAWK: dict[str, Any] = dict(
    targets="all", lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, clip=1.0, schedule="wsd", warmup=0.1, decay=0.1, floor=1e-4
)  # fmt: skip

recipe = Recipe(
    teacher="microsoft/phi-1_5",
    student=Student(mixer="discrete_mamba2", attention=0, init="mohawk"),
    data=Data(train="allenai/c4@en:train", length=2048, packing=True, streaming=True),
    stages=[
        Matrix(tokens=80_000_000, batch=16, **MOHAWK),
        Hidden(tokens=160_000_000, batch=16, **MOHAWK),
        Distill(tokens=2_760_000_000, batch=256, kl=1.0, ce=0.0, train="all", **MOHAWK),
    ],
    output="runs/phi_mohawk",
)

if __name__ == "__main__":
    launch(recipe)
