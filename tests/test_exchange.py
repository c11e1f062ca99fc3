"""The commands `export` and `import`: what they print, and a user's error as one line."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from llamba.cli import main
from llamba.models.convert import convert


@pytest.fixture(scope="module")
def student_folder(tmp_path_factory, teacher_folder: Path, tokenizer) -> str:
    folder = tmp_path_factory.mktemp("student")
    convert(str(teacher_folder), mixer="mamba2").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def fails(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(list(argv))
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: ")
    return error[0]


def test_a_student_goes_out_by_the_command(student_folder: str, tmp_path: Path, capsys) -> None:
    main(["export", student_folder, str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "saved: " in printed and "GraniteMoeHybridForCausalLM" in printed and "left-padded" in printed
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).__name__ == "GraniteMoeHybridForCausalLM"
    main(["export", student_folder, str(tmp_path / "code"), "--format", "remote-code"])
    assert (tmp_path / "code" / "README.md").is_file() and (tmp_path / "code" / "modeling_llamba.py").is_file()


def test_errors_are_one_line(student_folder: str, teacher_folder: Path, tmp_path: Path, capsys) -> None:
    new = str(tmp_path / "new")
    assert "has files" in fails(capsys, "export", student_folder, str(teacher_folder))
    assert "must be one of granite, bamba, gguf, remote-code" in fails(capsys, "export", student_folder, new, "--format", "onnx")
    assert "ordinary llama" in fails(capsys, "export", str(teacher_folder), new)
    assert "no place for the bias" in fails(capsys, "export", student_folder, f"{new}.gguf")
    assert "known format" in fails(capsys, "import", str(teacher_folder), new)
    assert "student of llamba already" in fails(capsys, "import", student_folder, new)
    assert "none" in fails(capsys, "import", str(tmp_path / "nowhere"), new)
    assert not Path(new).exists()
