"""The command line: convert, chat over a pipe, generate, errors as one line."""

import io
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from llamba.chat.conversation import Chat, Sampling, talk
from llamba.cli import main


@pytest.fixture(scope="module")
def student(teacher_folder: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("student") / "half"
    main(["convert", str(teacher_folder), str(out), "--attention", "0.5"])
    return out


def fails(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(list(argv))
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: ")
    return error[0]


def test_convert_prints_what_it_did(teacher_folder: Path, tmp_path: Path, capsys) -> None:
    main(["convert", str(teacher_folder), str(tmp_path / "new"), "--mixer", "mamba1", "--attention", "[1]"])
    printed = capsys.readouterr().out
    assert "attention kept in layers 1" in printed and "in_proj.weight[C]" in printed and "q_proj.weight" in printed
    assert AutoTokenizer.from_pretrained(tmp_path / "new").chat_template


def test_errors_are_one_line(teacher_folder: Path, student: Path, tmp_path: Path, capsys) -> None:
    new = str(tmp_path / "new")
    assert "from 0 to 1" in fails(capsys, "convert", str(teacher_folder), new, "--attention", "1.5")
    assert "layer indices from 0 to 3" in fails(capsys, "convert", str(teacher_folder), new, "--attention", "[7]")
    assert "must be one of mamba1, mamba2" in fails(capsys, "convert", str(teacher_folder), new, "--mixer", "mamba3")
    assert "has files" in fails(capsys, "convert", str(teacher_folder), str(student))
    (tmp_path / "empty").mkdir()
    assert "config.json" in fails(capsys, "chat", str(tmp_path / "empty"))
    assert "temperature" in fails(capsys, "generate", str(student), "x", "--temperature", "-1")
    assert "recipe file" in fails(capsys, "plan", "nowhere.py")


def run(student: Path, stdin: str, *argv: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "llamba.cli", "chat", str(student), "--max-new-tokens", "4", *argv]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120)


def test_chat_over_a_pipe(student: Path) -> None:
    done = run(student, "hello\n/system be brief\nhello\n/reset\n")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 2 and "system message set" in done.stderr and "forgotten" in done.stderr


def test_chat_takes_turns_and_forgets(student: Path, monkeypatch) -> None:
    chat = Chat(AutoModelForCausalLM.from_pretrained(student), AutoTokenizer.from_pretrained(student), Sampling(max_new_tokens=3))
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nhello again\n"))
    talk(chat, out)
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    assert out.getvalue() == "".join(m["content"] + "\n" for m in chat.messages if m["role"] == "assistant")
    chat.command("/system be brief")
    assert chat.system == "be brief" and chat.messages == []
    assert "/reset" in chat.command("/help")


def test_a_conversation_that_does_not_fit_is_refused(student: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(student)
    model.config.max_position_embeddings = 8
    chat = Chat(model, AutoTokenizer.from_pretrained(student), Sampling(max_new_tokens=3))
    with pytest.raises(ValueError, match="context of 8 tokens"):
        chat.answer("hello " * 20, io.StringIO())


def test_ctrl_c_stops_the_answer_and_not_the_program(student: Path) -> None:
    command = [sys.executable, "-u", "-m", "llamba.cli", "chat", str(student), "--max-new-tokens", "100000"]
    script = "import sys; from llamba import cli; from llamba.chat import conversation as chat; chat.Sampling.arguments = lambda self: dict(max_new_tokens=100000, do_sample=False, eos_token_id=None); cli.main(sys.argv[1:])"  # noqa: E501
    command = [sys.executable, "-u", "-c", script, *command[4:]]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdin and process.stdout
    process.stdin.write("hello\n")
    process.stdin.flush()
    assert process.stdout.read(1)  # it is answering
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate("/reset\n", timeout=120)
    assert process.returncode == 0, err
    assert "forgotten" in err


def test_generate(student: Path, capsys) -> None:
    main(["generate", str(student), "hello", "--max-new-tokens", "3"])
    plain = capsys.readouterr().out
    main(["generate", str(student), "hello", "--max-new-tokens", "3", "--chat"])
    assert plain.endswith("\n") and capsys.readouterr().out.endswith("\n")
    main(["generate", str(student), "hello", "--max-new-tokens", "6", "--temperature", "1.5", "--seed", "1"])
    first = capsys.readouterr().out
    main(["generate", str(student), "hello", "--max-new-tokens", "6", "--temperature", "1.5", "--seed", "1"])
    assert capsys.readouterr().out == first
