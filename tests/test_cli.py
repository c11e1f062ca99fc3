"""The command line: convert, chat over a pipe, generate, errors as one line."""

import io
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llamba import cli
from llamba.base import progress
from llamba.chat.conversation import Chat, Sampling, _require_int8, load_draft, talk
from llamba.cli import main
from llamba.speculative.packed import Int8Linear, to_int8

ROOT = Path(__file__).parent.parent


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
    assert "must be one of" in fails(capsys, "convert", str(teacher_folder), new, "--mixer", "mamba9")
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


def test_decoding_in_8_bits(student: Path, capsys) -> None:
    """`--bits 8` is the model whose matrices were put into 8 bits, with drafts too; what cannot be so is refused in a line."""
    main(["generate", str(student), "hello", "--max-new-tokens", "6", "--bits", "8"])
    printed, tokenizer = capsys.readouterr().out, AutoTokenizer.from_pretrained(student)
    model = to_int8(AutoModelForCausalLM.from_pretrained(student, dtype=torch.bfloat16))
    prompt = tokenizer(tokenizer.bos_token + "hello", return_tensors="pt", add_special_tokens=False).input_ids
    new = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)[0, prompt.shape[1] :]
    assert printed == tokenizer.decode(new, skip_special_tokens=True) + "\n"
    main(["generate", str(student), "hello", "--max-new-tokens", "6", "--bits", "8", "--draft", str(student)])
    assert "drafted tokens accepted" in capsys.readouterr().err
    assert sum(type(module) is Int8Linear for module in load_draft(str(student), model, 8).modules()) > 4
    assert "invalid choice: 4" in fails(capsys, "chat", str(student), "--bits", "4")
    assert "--bits 8 computes in bfloat16, got --dtype float32" in fails(capsys, "chat", str(student), "--bits", "8", "--dtype", "float32")
    with pytest.raises(ValueError, match="there is no such product for cuda; give --device cpu, or leave --bits out"):
        _require_int8("auto", "cuda")


COMMANDS_WITHOUT_WORK = """
import contextlib, io, runpy, sys
from llamba import cli
from llamba.commands.bench import BENCHES
from llamba.eval.commands import COMMANDS
lines = [[], ["--help"], ["--version"], ["nothing"], ["bench"], ["eval"], ["bench", "--help"], ["eval", "--help"], ["plan", "nowhere.py"]]
lines += [["plan", "recipes/llama3_50pct.py", "nothing=1"], ["plan", "recipes/llama3_50pct.py", "data.length=many"]]
lines += [[name, word] for name in cli.COMMANDS for word in ("--help", "--wrong")]
groups = [("bench", BENCHES), ("eval", COMMANDS)]
lines += [[group, name, word] for group, names in groups for name in names for word in ("--help", "--wrong")]
for line in lines:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main(line)
            status = 0
        except SystemExit as end:
            status = end.code or 0
    if line[1:2] == ["lm_eval"] and line[2] == "--wrong":
        continue  # a model's name as far as this parser knows
    asked = line[-1:] in (["--help"], ["--version"])
    assert status == (0 if asked else 2), (line, status, err.getvalue())
    assert len(err.getvalue().splitlines()) == (0 if asked else 1) and bool(out.getvalue()) == asked, (line, err.getvalue())
sys.argv = ["recipes/llama3_50pct.py", "--help"]
with contextlib.redirect_stdout(io.StringIO()):
    runpy.run_path(sys.argv[0], run_name="__main__")
slow = {"torch", "transformers", "numpy", "datasets", "accelerate", "matplotlib"} & set(sys.modules)
assert not slow, slow
"""


def test_help_and_usage_errors_import_nothing_slow() -> None:
    done = subprocess.run([sys.executable, "-c", COMMANDS_WITHOUT_WORK], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


FIRST = """
import pickle, sys
import llamba
assert llamba.Recipe and llamba.Distill and not {"torch", "transformers", "numpy"} & set(sys.modules), "the recipe's values are light"
from transformers import AutoConfig
config = AutoConfig.from_pretrained(sys.argv[1])
assert type(config).__name__ == "LlamaHybridConfig", config
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
pickle.dump((config, model), open(sys.argv[2], "wb"))
assert llamba.convert and llamba.generate and llamba.speculative and llamba.launch and llamba.plan and llamba.run and llamba.__version__
"""
SECOND = """
import pickle, sys
from transformers import AutoModelForCausalLM
import llamba
assert "llamba.models.families" not in sys.modules
assert type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__ == "LlamaHybridForCausalLM"
config, model = pickle.load(open(sys.argv[2], "rb"))
assert type(model).__name__ == "LlamaHybridForCausalLM" and config.to_dict() == model.config.to_dict()
"""


def test_hybrids_load_whichever_is_imported_first(student: Path, tmp_path: Path) -> None:
    """llamba before transformers, and transformers before llamba; pickles too."""
    for script in (FIRST, SECOND):
        done = subprocess.run([sys.executable, "-c", script, str(student), str(tmp_path / "pickle")], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_public_names_are_what_they_say() -> None:
    import llamba

    assert set(llamba.__all__) <= set(dir(llamba)) and all(getattr(llamba, name) is not None for name in llamba.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        llamba.nothing  # noqa: B018


def test_options_may_stand_anywhere(student: Path, capsys) -> None:
    main(["generate", str(student), "--chat", "--max-new-tokens", "3", "hello"])
    first = capsys.readouterr().out
    main(["generate", "--max-new-tokens", "3", str(student), "hello", "--chat"])
    assert capsys.readouterr().out == first
    main(["generate", str(student), "--max-new-tokens", "3", "--", "--hello"])
    assert capsys.readouterr().out


def test_a_wrong_option_names_the_nearest(capsys) -> None:
    assert "did you mean --mixer?" in fails(capsys, "convert", "teacher", "out", "--mixr", "mamba1")
    assert "did you mean convert?" in fails(capsys, "convrt")
    assert "did you mean speculative?" in fails(capsys, "bench", "speculativ")


def test_a_full_memory_is_a_users_error_with_a_remedy(capsys, monkeypatch) -> None:
    def plan(argv: list[str]) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB")

    monkeypatch.setitem(cli.COMMANDS, "plan", plan)
    assert "20.00 GiB" in fails(capsys, "plan")
    assert "micro_batch" in fails(capsys, "plan")


def test_a_recipe_that_does_not_run(tmp_path: Path, capsys) -> None:
    (tmp_path / "neighbour.py").write_text("from llamba import Recipe\n")
    path = tmp_path / "recipe.py"
    path.write_text("from neighbour import Recipe\n\nrecipe = Recipe(1 / 0)\n")
    assert f"ZeroDivisionError: division by zero ({path}, line 3)" in fails(capsys, "plan", str(path))
    path.write_text("recipe = (\n")
    assert "SyntaxError" in fails(capsys, "run", str(path)) and f"{path}, line 1" in fails(capsys, "run", str(path))
    path.write_text("import nobody_has_this\n")
    assert "No module named 'nobody_has_this'" in fails(capsys, "plan", str(path))


def test_output_that_nobody_reads_ends_quietly() -> None:
    talk = "lambda argv: [print('line', n, flush=True) for n in range(10**6)]"
    script = f"from llamba import cli; cli.COMMANDS['plan'] = {talk}; cli.main(['plan'])"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "line 0\n"
    process.stdout.close()
    assert process.wait(timeout=60) == 141 and process.stderr and process.stderr.read() == ""
    process.stderr.close()


def test_a_defect_is_one_line_too(capsys, monkeypatch) -> None:
    def plan(argv: list[str]) -> None:
        raise KeyError("a\nkey")

    monkeypatch.setitem(cli.COMMANDS, "plan", plan)
    with pytest.raises(SystemExit) as stopped:
        main(["plan"])
    (line,) = capsys.readouterr().err.splitlines()
    status = stopped.value.code
    assert status == 1 and line.startswith("internal error: KeyError: ") and "test_cli.py:" in line and "LLAMBA_TRACEBACK=1" in line
    monkeypatch.setenv("LLAMBA_TRACEBACK", "1")
    with pytest.raises(KeyError):
        main(["plan"])


def test_ctrl_c_is_one_line_and_status_130() -> None:
    wait = "lambda argv: (print('on', flush=True), time.sleep(60))"
    heard = "signal.signal(signal.SIGINT, signal.default_int_handler)"  # whatever this process does with it
    script = f"import signal, time; {heard}; from llamba import cli; cli.COMMANDS['plan'] = {wait}; cli.main(['plan'])"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "on\n"
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and err.strip() == "stopped"


def test_python_m_llamba() -> None:
    done = subprocess.run([sys.executable, "-m", "llamba", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and "llamba 0." in done.stdout and "torch 2." in done.stdout


def test_progress_is_a_line_now_and_then_outside_a_terminal(capsys, monkeypatch) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    assert list(progress.progress([1, 2, 3], "counting", "numbers")) == [1, 2, 3]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["counting: 1 of 3 numbers", "counting: 2 of 3 numbers"]
    assert list(progress.progress(iter("ab"), "counting", "letters")) == ["a", "b"]
    assert "of" not in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert list(progress.progress([1, 2], "counting", "numbers")) == [1, 2] and not capsys.readouterr().err
