"""Every malformed input ends in one clear line and status 2, or in the right result; never in a traceback, in silence or in a hang."""

import contextlib
import io
from pathlib import Path

import pytest
from malformed import RECIPE, Case, World, cases, check

from llamba.cli import main

CASES = cases()
EVERY = 9  # of the cases, one in so many is run each time


@pytest.fixture(scope="module")
def finished(tmp_path_factory, teacher_folder, chat_file) -> Path:
    """A run of one stage, in a folder that its recipe names as `run` beside it."""
    here = tmp_path_factory.mktemp("finished")
    (here / "recipe.py").write_text(RECIPE.format(teacher=str(teacher_folder), train=str(chat_file), output=str(here / "run")))
    with contextlib.redirect_stdout(io.StringIO()):
        main(["run", str(here / "recipe.py")])
    return here / "run"


@pytest.fixture
def world(tmp_path, monkeypatch, teacher_folder, chat_file, finished) -> World:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLAMBA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    return World(Path(teacher_folder), Path(chat_file), finished, tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES[::EVERY], ids=lambda case: case.name)
def test_a_sample(world: World, case: Case) -> None:
    check(case, world)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [case for number, case in enumerate(CASES) if number % EVERY], ids=lambda case: case.name)
def test_the_others(world: World, case: Case) -> None:
    check(case, world)


def test_there_are_enough() -> None:
    assert len(CASES) >= 500 and len({case.name for case in CASES}) == len(CASES) and len(CASES[::EVERY]) >= 60
