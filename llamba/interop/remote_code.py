"""Self-contained folders: a student with the code that loads it where llamba is not installed, and a model card."""

import shutil
from pathlib import Path

from llamba.base.folders import resolve_model
from llamba.interop.card import card
from llamba.interop.folders import TOKENIZER_FILES, whole_folder
from llamba.interop.stock import Exported, Source
from llamba.models.self_contained import add_code

OWN_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES)


def export_remote_code(folder: str | Path, out: str | Path) -> Exported:
    """Write a student with `auto_map`, the code and a model card; loads with `trust_remote_code=True`, in PyTorch forms.

    Raises ValueError for what is no student, for weights that are not those of the configuration, and where `out` has files.
    """
    source = Source(folder)
    with whole_folder(out) as made:
        for path in sorted(Path(resolve_model(folder)).iterdir()):
            if path.name in OWN_FILES or path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json"):
                shutil.copyfile(path, made / path.name)
        code = add_code(made)
        (made / "README.md").write_text(card(Path(folder), source.config))
        tokenizer = (made / "tokenizer_config.json").is_file()
    notes = [f"{len(code)} files of code beside the weights; load it with trust_remote_code=True, PyTorch forms only"]
    notes += [] if tokenizer else ["no tokenizer files were found; the folder holds none"]
    return Exported(Path(out), str(source.config.architectures[0] if source.config.architectures else "a student"), notes)
