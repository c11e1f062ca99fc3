"""What a recipe is made of: data and stages, as frozen values that are checked against annotation and range when made.

`batch` counts sequences per optimizer step over all processes, `micro_batch` those in one forward pass of one process;
`warmup`, `save_every` and `log_every` count optimizer steps; a `warmup` below 1 is a part of all steps.
"""

from llamba.settings.aligning import DPO_LOSSES, Aligning, Dpo, Lora, Sft
from llamba.settings.common import Attention, Data, Stage, TokenTraining, Training, check_attention, check_types, require
from llamba.settings.distilling import Distill, Draft, Hidden, Matrix, PseudoLabel, Select
from llamba.settings.recipe import Recipe, Student, layers_of
from llamba.settings.stages import STAGE_CONFIGS

__all__ = [
    "DPO_LOSSES", "STAGE_CONFIGS", "Aligning", "Attention", "Data", "Distill", "Dpo", "Draft", "Hidden", "Lora", "Matrix", "PseudoLabel",
    "Recipe", "Select", "Sft", "Stage", "Student", "TokenTraining", "Training", "check_attention", "check_types", "layers_of", "require",
]  # fmt: skip
