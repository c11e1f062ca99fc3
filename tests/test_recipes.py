"""The recipe files: each through its own command line, two steps of every stage, with a small teacher of the same family."""

from pathlib import Path

from llamba import run
from llamba.plan import plan
from llamba.recipe import Recipe, Student
from llamba.settings import Data, Distill

ROOT = Path(__file__).parent.parent


def test_a_stage_can_be_left_out(tmp_path, teacher_folder, chat_file):
    """Its conversion is left out, too, and the numbers of the others stay."""
    short = dict(batch=4, micro_batch=4, steps=1, warmup=0, precision="fp32")
    stages = [Distill(**short), Distill(**short, attention=0.25, skip=True), Distill(**short)]
    recipe = Recipe(str(teacher_folder), Student(), Data(train=str(chat_file), length=48), stages, str(tmp_path))
    assert run.run(recipe).name == "3-distill"
    assert sorted(path.name for path in tmp_path.glob("?-*")) == ["0-convert", "1-distill", "3-distill"]
    assert "stage 2   distill: left out" in str(plan(recipe))
