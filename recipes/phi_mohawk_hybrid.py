"""Phi-1.5 with attention left in blocks 4, 10, 16 and 22, discrete Mamba-2 in the others.

Source: Bick, Li, Xing, Kolter, Gu, "Transformers to SSMs" (MOHAWK, arXiv 2408.10189), Hybrid-Phi-Mamba: 5 B tokens of C4. The paper's code
aligns all blocks and then puts the teacher's four back; as blocks are aligned one by one, leaving them out from the start is the same.

Scores there (mean of five tasks, without LAMBADA): 66.0; Phi-Mamba without attention 65.1, teacher 67.2. Cost: not published.
How the 5 B tokens were split is not published: here as in `phi_mohawk.py`, the rest in the last stage.
`student.mixer=mamba2` and `student.init=attention` as there.
"""

from typing import Any

from llamba import Data, Distill, Hidden, Matrix, Recipe, Student, launch

MOHAWK: dict[str, Any] = dict(
    targets="all", lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, clip=1.0, schedule="wsd", warmup=0.1, decay=0.1, floor=1e-4
)  # fmt: skip

recipe = Recipe(
    teacher="microsoft/phi-1_5",
    student=Student(mixer="discrete_mamba2", attention=[4, 10, 16, 22], init="mohawk"),
    data=Data(train="allenai/c4@en:train", length=2048, packing=True, streaming=True),
    stages=[
        Matrix(tokens=80_000_000, batch=16, **MOHAWK),
        Hidden(tokens=160_000_000, batch=16, **MOHAWK),
        Distill(tokens=4_760_000_000, batch=256, kl=1.0, ce=0.0, train="all", **MOHAWK),
    ],
    output="runs/phi_mohawk_hybrid",
)

if __name__ == "__main__":
    launch(recipe)
