"""The settings of every stage by its name; a new stage is one entry here and one in `llamba.stages.STAGES`."""

from llamba.settings.aligning import Dpo, Sft
from llamba.settings.common import Stage
from llamba.settings.distilling import Distill, Draft, Hidden, Matrix, PseudoLabel, Select

STAGE_CONFIGS: dict[str, type[Stage]] = {kind.name: kind for kind in (Matrix, Hidden, Distill, Draft, PseudoLabel, Select, Sft, Dpo)}
