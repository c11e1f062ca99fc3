"""The code that a model's folder needs where llamba is not installed: this room and its kernels' PyTorch forms, as flat files.

transformers loads such code from beside the weights with `trust_remote_code=True`; it follows relative imports of plain files in one
folder alone. So `llamba.models.mixers.base` becomes `models_mixers_base.py`, and imports are rewritten; nothing else is.
"""

import ast
import importlib.util
import json
from pathlib import Path

FAMILIES, ENTRY_FILE = "llamba.models.families", "modeling_llamba"  # where the entry modules are, one for each family, and its file
LEFT_OUT = ("llamba.models.self_contained",)  # what only an installed llamba can do
REFUSAL = 'raise ValueError("the code beside these weights has the PyTorch forms alone; this needs llamba to be installed")'
# Behind the code of a module: what it must do otherwise where there is nothing but these files.
BEHIND = {
    "llamba.kernels.choice": (
        "\n\ndef _triton_obstacle(example: Tensor, obstacle: Obstacle) -> Obstacle:\n"
        '    return "the code beside these weights has the PyTorch forms alone; install llamba for Triton\'s"\n'
    ),
}


def add_code(folder: str | Path) -> list[str]:
    """Write the code beside a saved student, and tell its config.json (`auto_map`); returns the files' names.

    Raises ValueError for a folder whose model is no student of llamba.
    """
    place = Path(folder)
    config = json.loads((place / "config.json").read_text())
    causal_lm = (config.get("architectures") or [""])[0]
    if not causal_lm.endswith("HybridForCausalLM"):
        raise ValueError(f"the code is that of a converted model; {folder} holds {causal_lm or 'no architecture'}")
    name = causal_lm.removesuffix("ForCausalLM")
    classes = {"AutoConfig": f"{name}Config", "AutoModel": f"{name}Model", "AutoModelForCausalLM": causal_lm}
    config["auto_map"] = {auto: f"{ENTRY_FILE}.{own}" for auto, own in classes.items()}
    (place / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    files = flat_files(str(config["model_type"]).removeprefix("llamba_"))
    for file, text in files.items():
        (place / file).write_text(text)
    return sorted(files)


def flat_files(family: str) -> dict[str, str]:
    """File names and texts of a family's module and of all modules of llamba that it imports."""
    texts: dict[str, str] = {}
    waiting = [f"{FAMILIES}.{family}"]
    while waiting:
        module = waiting.pop()
        if f"{_flat(module)}.py" not in texts:
            texts[f"{_flat(module)}.py"], needed = _rewritten(module)
            waiting += needed
    return texts


def _flat(module: str) -> str:
    return (
        ENTRY_FILE
        if module.rpartition(".")[0] == FAMILIES and module != f"{FAMILIES}.base"
        else module.removeprefix("llamba.").replace(".", "_")
    )


def _rewritten(module: str) -> tuple[str, list[str]]:
    """A module's text with the imports of flat files, and which modules of llamba it imports."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, module
    text, package = Path(spec.origin).read_text(), module if spec.submodule_search_locations else module.rpartition(".")[0]
    lines, needed = text.splitlines(keepends=True), list[str]()
    for node in _of_llamba(ast.parse(text)):
        target = _absolute(node, package)
        indent = lines[node.lineno - 1][: node.col_offset]
        end = node.end_lineno or node.lineno
        if _is_left_out(target):
            assert node.col_offset, f"{module} imports {target} at its top; flat files have no place for it"
            lines[node.lineno - 1 : end] = [f"{indent}{REFUSAL}\n"] + ["\n"] * (end - node.lineno)
            continue
        if node.module is None:  # `from . import part`: files next to each other, which transformers must see
            parts = {alias.name: f"{target}.{alias.name}" for alias in node.names}
            lines[node.lineno - 1 : end] = [f"{indent}{_module_itself(name, part)}\n" for name, part in parts.items()]
            lines[node.lineno - 1] = f"{indent}import sys\n\n" + lines[node.lineno - 1]
            needed += parts.values()
            continue
        needed.append(target)
        lines[node.lineno - 1] = lines[node.lineno - 1].replace("." * node.level + (node.module or ""), f".{_flat(target)}", 1)
    return "".join(lines) + BEHIND.get(module, ""), needed


def _module_itself(name: str, module: str) -> str:
    """A line that gives `name` the flat file of a module; `from . import` is not seen by transformers."""
    return f"from .{_flat(module)} import __name__ as _{name}; {name} = sys.modules[_{name}]"


def _of_llamba(tree: ast.Module) -> list[ast.ImportFrom]:
    """The imports to rewrite, the last one first, so that line numbers stay right."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    mine = [node for node in found if node.level or (node.module or "").startswith("llamba.")]
    return sorted(mine, key=lambda node: -node.lineno)


def _absolute(node: ast.ImportFrom, package: str) -> str:
    return importlib.util.resolve_name("." * node.level + (node.module or ""), package) if node.level else str(node.module)


def _is_left_out(module: str) -> bool:
    """Whether a module stays behind: Triton's files, which import triton at their top, and what needs the whole of llamba."""
    return module in LEFT_OUT or module.rpartition(".")[2].startswith("triton_") or module.endswith(".launch")
