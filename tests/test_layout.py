"""The shape of the project: rooms, arrows between them, the `kernels` hazard, and words that do not belong in product code."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("kernels", "eval", "speculative", "recipes")
PRODUCT = sorted(p for top in ("llamba", "kernels", "eval", "speculative") for p in (ROOT / top).rglob("*.py"))

# Each room and the rooms it may import; what is not listed may not be imported.
ARROWS: dict[str, set[str]] = {
    "kernels": set(),
    "base": set(),
    "models": {"kernels", "base"},
    "speculative": {"models", "kernels"},
    "chat": {"speculative", "models", "base"},
    "settings": {"base"},
    "data": {"settings", "base"},
    "training": {"data", "settings", "models", "kernels", "base"},
    "stages": {"training", "data", "settings", "chat", "models", "base"},
    "running": {"interop", "stages", "training", "data", "settings", "chat", "models", "base"},
    "eval": {"data", "chat", "speculative", "models", "base"},
    "bench": {"interop", "running", "stages", "training", "data", "settings", "chat", "speculative", "models", "kernels", "base"},
    "interop": {"models", "base"},
    "commands": {"eval", "bench", "interop", "running", "stages", "training", "settings", "chat", "speculative", "models", "base"},
}
TOP = ("__init__", "__main__", "cli")  # the files beside the rooms


def room_of(path: Path) -> str:
    """The room of a file: the part below llamba/, or the top-level folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "llamba" else parts[0]


def imported_rooms(path: Path) -> set[str]:
    """Rooms of llamba that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "llamba" else [node.module]
        found |= {name.split(".")[1] for name in names if name.startswith("llamba.")}
    return found


@pytest.mark.parametrize("path", PRODUCT, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_point_one_way(path: Path) -> None:
    room = room_of(path)
    if room in TOP:
        return
    assert room in ARROWS, f"{room} is a new room: say in ARROWS what it may import"
    assert imported_rooms(path) - {room} <= ARROWS[room]


def test_there_are_few_rooms_and_hardly_a_file_beside_them() -> None:
    assert len(ARROWS) <= 14
    assert {path.stem for path in (ROOT / "llamba").glob("*.py")} == set(TOP)


def test_arrows_have_no_cycle() -> None:
    left = {room: set(to) for room, to in ARROWS.items()}
    while left:
        free = [room for room, to in left.items() if not to & set(left)]
        assert free, f"a cycle among {sorted(left)}"
        for room in free:
            del left[room]


def test_kernels_import_only_torch_and_each_other() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level and node.module:
                assert node.module.split(".")[0] in {"torch", *sys.stdlib_module_names}, (path, node.module)


def test_only_triton_files_import_triton() -> None:
    """A door imports them inside the function that needs them, so that a CPU box needs no triton."""
    for path in (ROOT / "kernels").rglob("*.py"):
        names = {
            alias.name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        assert "triton" not in names or path.name.startswith("triton_") or path.name == "launch.py", path
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("triton_", "launch")):
                assert path.name.startswith("triton_"), path


def test_the_kernels_folder_has_no_init_and_the_rooms_are_links() -> None:
    """With kernels/__init__.py on sys.path, Hugging Face's own `kernels` package is shadowed and transformers breaks."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    for room in ROOMS:
        link = ROOT / "llamba" / room
        assert link.is_symlink() and link.readlink() == Path("..") / room


def test_transformers_imports_from_the_root_of_the_checkout() -> None:
    done = subprocess.run([sys.executable, "-c", "from transformers import LlamaForCausalLM"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", [*PRODUCT, *sorted((ROOT / "recipes").glob("*.py"))], ids=lambda p: str(p.relative_to(ROOT)))
def test_product_code_knows_no_toys(path: Path) -> None:
    assert not re.search(r"\b(tiny|toy|dummy|demo)\b|_(tiny|toy|dummy|demo)\b", path.read_text(), re.IGNORECASE)


MAY_CATCH = {
    "kernels/choice.py": {"ImportError"},  # a package that does not load
    "llamba/commands/recipes.py": {"Exception"},  # whatever a user's recipe file raises
    "llamba/base/foreign.py": {"BaseException"},  # whatever a library raises over a user's file becomes a line that names the file
    "llamba/base/errors.py": {"Exception"},  # the last resort of a command: one line, and a status that says so
}


@pytest.mark.parametrize("path", PRODUCT, ids=lambda p: str(p.relative_to(ROOT)))
def test_product_code_neither_probes_nor_swallows(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name):
            assert node.id != "hasattr", node.lineno
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else ""
            here = MAY_CATCH.get(path.relative_to(ROOT).as_posix(), set())
            assert caught and not ({"Exception", "BaseException", "ImportError"} - here) & set(re.findall(r"\w+", caught)), node.lineno


def test_models_come_in_by_the_loader_alone() -> None:
    """Whatever reads a model, a configuration or a tokenizer by name goes through its checks."""
    others = ("laptop.py", "cold.py")  # benches: in other checkouts, which have no such loader; against a bare transformers script
    for path in PRODUCT:
        if path.parent.name != "loading" and path.name not in others:
            assert "from_pretrained(" not in path.read_text(), path


def test_library_never_imports_recipes_or_the_command() -> None:
    for path in PRODUCT:
        assert not {"recipes", "cli"} & imported_rooms(path) or path.name in ("cli.py", "__main__.py"), path


def listed_files() -> list[str]:
    """The files of docs/structure.md as paths, a folder by its __init__.py."""
    found, folder = [], ""
    for line in (ROOT / "docs" / "structure.md").read_text().splitlines():
        if line.startswith("## "):
            folder = line[3:] if line.endswith("/") else ""
        elif folder and (name := re.match(r"- `([^`]+)` \S", line)):
            inner = "" if name[1] == Path(folder).name + "/" else name[1]
            found.append(folder + (inner + "__init__.py" if not inner or inner.endswith("/") else inner))
    return found


def test_the_structure_lists_every_file_once_and_no_other() -> None:
    listed = listed_files()
    there = {str(path.relative_to(ROOT)) for path in PRODUCT + sorted((ROOT / "recipes").rglob("*.py"))}
    assert sorted(listed) == sorted(set(listed)), "a file is listed twice"
    assert set(listed) == there, "docs/structure.md: a line `- `NAME` what it is` per file, in its folder's section"


def test_package_carries_what_it_needs() -> None:
    assert importlib.util.find_spec("llamba.kernels.ssd") is not None
    text = (ROOT / "pyproject.toml").read_text()
    listed = subprocess.run(["git", "ls-files", "llamba", *ROOMS], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for suffix in {Path(name).suffix for name in listed} - {"", ".py"}:  # "": the links
        assert f'"*{suffix}"' in text, suffix
