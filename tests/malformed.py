"""Malformed inputs: overrides, data, model folders, run folders, command lines, evaluation files. Each is a command line and what must come
of it: one clear line and status 2, or (`right`) the right result.

Everything is made from nothing here; `cases()` is the same list every time. `World` holds what the cases damage copies of.
"""

import contextlib
import gzip
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_origin

import torch
from safetensors.torch import load_file, save_file

from llamba.cli import main
from llamba.settings import Data, Distill, Dpo, Recipe, Sft, Student, overrides

RECIPE = """
from llamba import Data, Distill, Dpo, Recipe, Sft, Student
recipe = Recipe(
    teacher={teacher!r}, student=Student(mixer="mamba2"), data=Data(train={train!r}, length=48), output={output!r},
    stages=[Distill(steps=1, batch=2, precision="fp32"), Sft(skip=True), Dpo(skip=True)],
)
"""


@dataclass(frozen=True)
class World:
    """A teacher's folder, a chat file, a finished run of one stage, and an empty folder for a case."""

    teacher: Path
    rows: Path
    run: Path
    here: Path

    def recipe(self, text: str | None = None) -> str:
        path = self.here / "recipe.py"
        path.write_text(text or RECIPE.format(teacher=str(self.teacher), train=str(self.rows), output=str(self.here / "run")))
        return str(path)

    def model(self) -> Path:
        return Path(shutil.copytree(self.teacher, self.here / "model"))

    def ran(self) -> Path:
        return Path(shutil.copytree(self.run, self.here / "run"))


@dataclass(frozen=True)
class Case:
    """`command(world)` makes the input and returns a command line. `words`: a pattern of the one line that refuses it; None: the result
    must be right, and `shows` is a pattern of what standard output then says."""

    name: str
    command: Callable[[World], list[str]]
    words: str | None = ""
    shows: str = ""


def check(case: Case, world: World) -> None:
    """Run a case in this process. AssertionError: a traceback, more than a line, silence, or the other outcome."""
    out, err = io.StringIO(), io.StringIO()
    command = case.command(world)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(command)
            status: Any = 0
        except SystemExit as end:
            status = end.code or 0
    told = [line for line in err.getvalue().splitlines() if line.startswith(("error", "internal error"))]
    said = f"{case.name}: {command} ended with {status}: {err.getvalue()[-600:]}"
    assert "Traceback" not in err.getvalue() and "internal error" not in err.getvalue(), said
    if case.words is None:
        assert status == 0 and not told and re.search(case.shows, out.getvalue()), said + out.getvalue()[-600:]
    else:
        assert status == 2 and len(told) == 1 and 8 < len(told[0]) < 1200, said
        assert re.search(case.words, told[0]), said


def _wrong_texts(kind: Any) -> list[str]:
    """Texts that are no value of a type."""
    if kind is str:
        return []
    numbers = ["@", "1,2", "1e", "nan", "--1"] if kind in (int, float) else ["@?", "1:2:3", "{}"]
    return numbers if get_origin(kind) is None or "str" not in str(kind) else []


def _overrides() -> Iterator[Case]:
    shown = Recipe("t", Student(), Data(train="x"), [Distill(), Sft(), Dpo()], "o")
    for key, (_, kind) in overrides.keys(shown).items():
        if not key.startswith(("stages.distill", "stages.sft", "stages.dpo")):  # the same as stages.0, .1 and .2
            for text in _wrong_texts(kind):
                yield Case(
                    f"override {key}={text}", lambda w, k=key, t=text: ["plan", w.recipe(), f"{k}={t}"], re.escape(key.split(".")[-1])
                )
    ranges = {
        "student.attention": ["2", "-1", "[0,0]", "[9]", "[-1]", "nowhere.json"], "student.mixer": ["mamba9", ""], "student.init": ["best"],
        "data.length": ["0", "1", "-5"], "data.template": ["llama9"], "data.weights": ["[0]", "[1,2]", "[-1]"], "data.part": ["[3,2]", "[1,1]"],
        "seed": ["-1", "4294967296", "1e3"], "output": [""], "teacher": ["", "./nowhere", "/nowhere/at/all"],
        "stages.0.steps": ["0", "-1", "1e23", "100000000000000000000000"], "stages.0.lr": ["0", "-1", "inf", "nan"], "stages.0.batch": ["0", "-2"],
        "stages.0.epochs": ["0", "1e23", "inf"], "stages.0.betas": ["[1,1]", "[0.9]"], "stages.0.floor": ["1", "-1"], "stages.0.decay": ["2"],
        "stages.0.precision": ["fp8"], "stages.0.train": ["some"], "stages.0.temperature": ["0", "-1"], "stages.0.schedule": ["sine"],
        "stages.2.loss": ["[]", "sigmoid2", "[sigmoid,foo]"], "stages.2.beta": ["-1"], "stages.2.loss_weights": ["[1,2]"], "data.train": ["[]"],
    }  # fmt: skip
    for key, texts in ranges.items():
        for text in texts:
            yield Case(f"range {key}={text}", lambda w, k=key, t=text: ["run", w.recipe(), f"{k}={t}"], "must|unknown|no such|found|needs")
    for key in ("lr", "stage.0.lr", "stages.9.lr", "stages.0.lrr", "student", "data.", ".", "stages", "stages.0", "é", "a b", "seed.x"):
        yield Case(f"unknown key {key}", lambda w, k=key: ["plan", w.recipe(), f"{k}=1"], "unknown key")
    for text in ("lr", "=", "--seed", "seed"):
        yield Case(f"no assignment {text!r}", lambda w, t=text: ["plan", w.recipe(), t], "key=value|unknown|none of its options|needed")
    for text in ("seed=7", "data.length=64", "student.attention=0.25", "student.attention=[1,3]", "stages.0.steps=2", "stages.0.lr=1e-3"):
        yield Case(f"right {text}", lambda w, t=text: ["plan", w.recipe(), t], None)
    late = {
        "stages.0.offline=100000": "vocabulary", "data.length=100000": "context of 256", "student.attention=1.0": "train='mixers'",
        "data.packing=maybe": "packing",
    }  # fmt: skip
    for text, words in late.items():
        yield Case(f"before the first stage {text}", lambda w, t=text: ["run", w.recipe(), t], words)
    streamed = "data.streaming=true"  # the stage's steps say how much to read
    yield Case(f"before the first stage {streamed}", lambda w: ["run", w.recipe(), streamed], None, "step 1/1.*\ndone: ")


def _jsonl(content: bytes, name: str = "x.jsonl") -> Callable[[World], list[str]]:
    def command(world: World) -> list[str]:
        (world.here / name).write_bytes(content)
        return ["select", str(world.teacher), "--data", str(world.here / name), "--rows", "1", "--out", str(world.here / "layers.json")]

    return command


def _data() -> Iterator[Case]:
    chat = {"messages": [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue"}]}
    lines: dict[str, bytes] = {
        "cut": b'{"messages": [', "list": b"[1]", "number": b"3", "null": b"null", "text": b'"x"', "empty object": b"{}", "no JSON": b"hello",
        "deep": b"[" * 200_000, "deep object": b'{"a":' * 100_000, "not UTF-8": b'{"text": "\xff\xfe"}', "NUL": b"\x00\x00", "two": b"{} {}",
        "half surrogate": b'{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "x"}]}',
        "half surrogate 2": b'{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "\\udfff y"}]}',
        "messages text": b'{"messages": "x"}', "messages number": b'{"messages": 3}', "messages of text": b'{"messages": ["x"]}',
        "no role": b'{"messages": [{"content": "x"}]}', "no content": b'{"messages": [{"role": "user"}]}', "role 3": b'{"messages": [{"role": 3, "content": "x"}]}',
        "content list": b'{"messages": [{"role": "user", "content": ["x"]}]}', "content null": b'{"messages": [{"role": "user", "content": null}]}',
        "conversations text": b'{"conversations": "x"}', "from nobody": b'{"conversations": [{"from": "tool", "value": "x"}]}',
        "value 3": b'{"conversations": [{"from": "human", "value": 3}]}', "text 3": b'{"text": 3}', "prompt alone": b'{"prompt": "x"}',
        "chosen alone": b'{"chosen": "x"}', "chosen 3": b'{"chosen": 3, "rejected": "x", "prompt": "y"}', "text row": b'{"text": "red"}',
        "prompts differ": b'{"chosen": [{"role":"user","content":"a"},{"role":"assistant","content":"b"}], "rejected": [{"role":"user","content":"c"},{"role":"assistant","content":"d"}]}',
        "infinite": b'{"messages": Infinity}', "empty messages only": b'{"messages": []}', "user only": b'{"messages": [{"role": "user", "content": "x"}]}',
    }  # fmt: skip
    for name, line in lines.items():
        for place, before in (("first", b""), ("third", (json.dumps(chat) + "\n").encode() * 2)):
            words: str | None = rf"x.jsonl:{1 if place == 'first' else 3}"
            if name in ("empty messages only", "user only"):  # rows without a target are counted and left out
                words = "no row with anything to learn" if place == "first" else None
            yield Case(f"row {name}, {place}", _jsonl(before + line + b"\n"), words, "" if words else "layers.json")
    whole = gzip.compress(json.dumps(chat).encode() * 500)
    for name, content in {
        "cut": whole[: len(whole) // 2], "header only": whole[:10], "flipped": whole[:30] + bytes(b ^ 255 for b in whole[30:60]) + whole[60:],
        "no gzip": b"hello", "crc": whole[:-8] + b"\x00" * 8,
    }.items():  # fmt: skip
        yield Case(f"gzip {name}", _jsonl(content, "x.jsonl.gz"), "x.jsonl.gz")
    for name, content in {"empty": b"", "no parquet": b"hello", "magic alone": b"PAR1", "ends": b"PAR1" + b"\x00" * 40 + b"PAR1"}.items():
        yield Case(f"parquet {name}", _jsonl(content, "x.parquet"), "x.parquet")
    yield Case("empty file", _jsonl(b""), "no row with anything to learn")
    yield Case("blank lines", _jsonl(b"\n\n \n"), "no row with anything to learn")
    for name in ("x.csv", "x.json", "x"):
        yield Case(f"file {name}", _jsonl(b"x", name), "must end in")
    for source in ("nowhere.jsonl", "./nowhere", "a b c", "", "/nowhere/x.parquet"):
        yield Case(
            f"source {source!r}",
            lambda w, s=source: ["select", str(w.teacher), "--data", s, "--out", str(w.here / "l.json")],
            "does not exist|must hold",
        )
    yield Case("right rows", _jsonl((json.dumps(chat) + "\n").encode() * 2), None)


def _asked(change: Callable[[Path], object], *more: str) -> Callable[[World], list[str]]:
    def command(world: World) -> list[str]:
        folder = world.model()
        change(folder)
        return ["generate", str(folder), "red", "--max-new-tokens", "1", *more]

    return command


def _config(**values: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def _weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], object]:
    def rewrite(folder: Path) -> None:
        made = change(load_file(folder / "model.safetensors"))
        save_file({name: value.contiguous() for name, value in made.items()}, folder / "model.safetensors", metadata={"format": "pt"})

    return rewrite


def _bytes(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def _generation(**values: object) -> Callable[[Path], object]:
    return lambda folder: (folder / "generation_config.json").write_text(json.dumps(values))


_CONFIG_WORDS = {  # what a line says where it does not name the key
    "attention_bias": "missing .*proj.bias", "mlp_bias": "missing .*proj.bias", "pad_token_id": "Padding_idx",
    "quantization_config": "quantised", "model_type": "missing (transformer|bert)",
}  # fmt: skip
SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")


def _models() -> Iterator[Case]:
    for key in SIZES:
        for value in ("x", -1, 0, 2.5, [], {}, True, 10**12, 3, 7, 1000):
            yield Case(f"config {key}={value!r}", _asked(_config(**{key: value})), f"{key}|hidden size|the weights do not fit config.json")
    for key, values in {
        "model_type": (None, 3, "foo", "", [], "gpt2", "bert", "llamba_foo"), "hidden_act": ("foo", 3, None), "rms_norm_eps": ("x", None),
        "rope_parameters": ([], "x", {"rope_type": "foo"}, {"rope_type": "yarn"}), "dtype": ("foo", 3), "attention_bias": ("x", True),
        "tie_word_embeddings": ("x",), "quantization_config": ({}, "x", {"quant_method": "foo"}, {"quant_method": "gptq", "bits": 4}, []),
        "max_position_embeddings": (-1, "x", 0, 2.5), "architectures": ("x", 3, ["Foo"]), "mlp_bias": (True, "x"), "initializer_range": ("x",),
        "layer_types": (["foo"] * 4, ["full_attention"], "x", 3), "eos_token_id": ("x", -1, 10**9, [[]]), "pad_token_id": ("x", 10**9),
    }.items():  # fmt: skip
        for value in values:
            words = _CONFIG_WORDS.get(key, "") + f"|{key}|model/config.json|config.json does not describe|/model cannot be loaded"
            found = None if key == "architectures" else words.strip("|")
            yield Case(f"config {key}={value!r}", _asked(_config(**{key: value})), found)
    for ends in ("x", -1, 10**9, [[]], [0, 10**9], True, 1.5):
        yield Case(f"generation_config.json ends={ends!r}", _asked(_generation(eos_token_id=ends)), "generation_config.json: eos_token_id")
    yield Case("generation_config.json ends=[0, 1]", _asked(_generation(eos_token_id=[0, 1])), None)
    for name, content in {
        "empty": b"",
        "cut": b'{"model_type": "llama"',
        "list": b"[]",
        "null": b"null",
        "text": b'"x"',
        "bytes": b"\xff\xfe",
        "deep": b"[" * 99999,
    }.items():
        yield Case(f"config.json {name}", _asked(_bytes("config.json", lambda _, c=content: c)), "config.json")
        yield Case(f"tokenizer.json {name}", _asked(_bytes("tokenizer.json", lambda _, c=content: c)), "tokenizer of")
        for file in ("tokenizer_config.json", "generation_config.json"):
            yield Case(f"{file} {name}", _asked(_bytes(file, lambda _, c=content: c)), f"{file} must hold a JSON object")
    for size in (0, 1, 7, 8, 9, 100, 1000, 5000, -1, -100):
        yield Case(f"weights cut at {size}", _asked(_bytes("model.safetensors", lambda b, s=size: b[:s])), "no whole safetensors file")
    yield Case("weights longer", _asked(_bytes("model.safetensors", lambda b: b + b"x")), "no whole safetensors file")
    yield Case("weights zeros", _asked(_bytes("model.safetensors", lambda b: bytes(len(b)))), "no whole safetensors file")
    yield Case("weights pointer", _asked(_bytes("model.safetensors", lambda b: b"version https://git-lfs.github.com/spec/v1\n")), "Git LFS")
    yield Case("weights HTML", _asked(_bytes("model.safetensors", lambda b: b"<!doctype html><html>" * 40)), "no whole safetensors file")
    q_proj = "model.layers.1.self_attn.q_proj.weight"
    names = (
        q_proj,
        "model.norm.weight",
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.3.input_layernorm.weight",
    )
    for name in names:
        yield Case(f"without {name}", _asked(_weights(lambda t, n=name: {k: v for k, v in t.items() if k != n})), f"missing .*{name}")
        for number in (float("nan"), float("inf"), float("-inf")):
            yield Case(
                f"{number} in {name}", _asked(_weights(lambda t, n=name, x=number: {**t, n: torch.full_like(t[n], x)})), f"finite.*{name}"
            )
        yield Case(f"transposed {name}", _asked(_weights(lambda t, n=name: {**t, n: t[n].new_zeros(t[n].numel(), 2)})), f"shape.*{name}")
        yield Case(f"renamed {name}", _asked(_weights(lambda t, n=name: {f"x.{k}" if k == n else k: v for k, v in t.items()})), "missing")
        yield Case(f"integers in {name}", _asked(_weights(lambda t, n=name: {**t, n: t[n].to(torch.int32)})), "stored as")
    for name in (
        "model.layers.4.input_layernorm.weight",
        "foo",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_proj.weight.absmax",
    ):
        yield Case(f"surplus {name}", _asked(_weights(lambda t, n=name: {**t, n: torch.ones(3)})), "without a place")
    yield Case("no weights", _asked(lambda folder: (folder / "model.safetensors").unlink()), "found none")
    yield Case("no config", _asked(lambda folder: (folder / "config.json").unlink()), "config.json")
    yield Case("no tokenizer", _asked(lambda folder: [path.unlink() for path in folder.glob("token*")]), "no tokenizer")
    yield Case(
        "pickle of nothing",
        _asked(lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin")),
        "cannot be loaded|must",
    )
    for template in (
        "{% if %}",
        "{{ messages[9].content }}",
        "{{ 1 / 0 }}",
        "{{ raise_exception('no') }}",
        "{{ messages + 1 }}",
        "{% for %}",
        "{{ x.y.z }}",
        "{{ 'a' * 'b' }}",
    ):
        path = "chat_template.jinja"
        yield Case(
            f"template {template}", _asked(lambda folder, t=template, p=path: (folder / p).write_text(t), "--chat"), "chat template refuses"
        )
    yield Case("old buffers", _asked(_weights(lambda t: {**t, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})), None)
    for name in ("x.gguf", "y.gguf"):
        for content in (b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 40, b"hello" * 99):
            yield Case(
                f"{name} of {content[:12]!r}", lambda w, n=name, c=content: ["convert", str(_written(w, n, c)), str(w.here / "out")], "GGUF"
            )


def _written(world: World, name: str, content: bytes) -> Path:
    (world.here / name).write_bytes(content)
    return world.here / name


def _in_run(name: str, content: bytes | None, *command: str) -> Callable[[World], list[str]]:
    def make(world: World) -> list[str]:
        path = world.ran() / name
        path.unlink(missing_ok=True) if content is None else path.write_bytes(content)
        return [part.replace("RUN", str(world.here / "run")) for part in command] if command else ["run", world.recipe()]

    return make


def _runs() -> Iterator[Case]:
    broken = {
        "empty": b"",
        "cut": b'{"a": ',
        "list": b"[]",
        "null": b"null",
        "number": b"3",
        "bytes": b"\xff\xfe\x00",
        "deep": b"[" * 99999,
        "object": b"{}",
    }
    for name, content in broken.items():
        yield Case(f"recipe.json {name}", _in_run("recipe.json", content), "recipe.json")
        words = r"metrics.jsonl:1 must (be a JSON object|have a step)"
        yield Case(f"metrics {name}", _in_run("1-distill/metrics.jsonl", content + b"\n", "report", "RUN"), words)
        yield Case(f"stage.json {name}", _in_run("1-distill/stage.json", content, "report", "RUN"), "stage.json")
        yield Case(
            f"config.json {name}",
            _in_run("1-distill/config.json", content, "generate", "RUN", "red", "--max-new-tokens", "1"),
            "config.json",
        )
    line = {"step": 1, "loss": 1.0, "tokens": 5, "tokens_per_s": 1.0}
    for wrong in (
        {"step": "x"}, {"step": -1}, {"step": None}, {"tokens": "x"}, {"tokens": None}, {"layers": 3}, {"layers": {"x": 1.0}}, {"layers": None},
    ):  # fmt: skip
        content = json.dumps(line | wrong).encode() + b"\n"
        yield Case(
            f"metrics with {wrong}", _in_run("1-distill/metrics.jsonl", content, "report", "RUN"), "metrics.jsonl:1 must have a step"
        )
    for fine in (
        {"loss": float("nan")},
        {"loss": float("-inf")},
        {"loss": 0},
        {"lr": "x"},
        {"layers": {}},
        {"layers": {"0": 0.5, "1": None}},
    ):
        content = json.dumps(line | fine).encode() + b"\n"
        yield Case(f"metrics with {fine}", _in_run("1-distill/metrics.jsonl", content, "report", "RUN"), None, "1-distill +1 +5 ")
    yield Case(
        "a line of metrics that was cut off",
        _in_run("1-distill/metrics.jsonl", content + b'{"step"', "report", "RUN"),
        None,
        "1-distill +1 ",
    )
    for seconds in ("x", None, [], {}):
        content = json.dumps({"stage": "distill", "seconds": seconds}).encode()
        yield Case(
            f"stage.json of {seconds} seconds", _in_run("1-distill/stage.json", content, "report", "RUN"), "stage.json must say how many"
        )
    for changed in (
        {"stages": 3},
        {"stages": [3]},
        {"student": []},
        {"data": None},
        {"teacher": 3},
        {"foo": 1},
        {"stages": [{"stage": "x"}]},
        {"seed": "x"},
        {"output": None},
    ):

        def make(world: World, changed: dict[str, Any] = changed) -> list[str]:
            path = world.ran() / "recipe.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | changed))
            return ["run", world.recipe()]

        yield Case(f"recipe.json with {changed}", make, "recipe|must|unknown")
    yield Case("a finished run", lambda w: [str(w.ran()), "run", w.recipe()][1:], None)
    yield Case("weights of a finished step gone", _in_run("1-distill/model.safetensors", None, "generate", "RUN", "red"), "found none")
    yield Case("the folder is a file", lambda w: [(w.here / "run").write_text("x"), "run", w.recipe()][1:], "run")
    yield Case(
        "files of others",
        lambda w: [(w.here / "run").mkdir(), (w.here / "run" / "x").write_text("x"), "run", w.recipe()][2:],
        "which has files",
    )
    for text in (
        "recipe = 3",
        "",
        "1 / 0",
        "raise SystemExit(3)",
        "def (",
        "import nowhere_at_all",
        "recipe = None",
        "from llamba import Nothing",
        "while",
        "\x00",
    ):
        yield Case(f"recipe file {text!r}", lambda w, t=text: ["plan", w.recipe(t or " ")], "recipe")


def _command_lines() -> Iterator[Case]:
    one = "{teacher}"
    lines = [
        "nothing", "--wrong", "plan", "plan nowhere.py", "plan {teacher}", "run", "run nowhere.py", "convert", "convert {teacher}", "convert nowhere out",
        "convert ./nowhere out", "convert {teacher} {teacher}", "convert {teacher} out --mixer foo", "convert {teacher} out --init foo", "convert {teacher} out --attention x",
        "convert {teacher} out --attention 2", "convert {teacher} out --attention -1", "convert {teacher} out --attention [9]", "convert {teacher} out --attention {{}}",
        "convert {teacher} out --attention null", "convert {teacher} out --attention true", 'convert {teacher} out --attention "x"', "convert {teacher} out --attention [[1]]",
        "convert {teacher} out --seed x", "convert {rows} out", "convert {teacher} {rows}", "convert {teacher} out extra", "convert {teacher} out --wrong 1",
        "generate", "generate nowhere", "generate ./nowhere x", "generate {rows} x", "generate {teacher} x --max-new-tokens 0", "generate {teacher} x --max-new-tokens x",
        "generate {teacher} x --temperature -1", "generate {teacher} x --temperature x", "generate {teacher} x --top-p 0", "generate {teacher} x --top-p 2",
        "generate {teacher} x --seed x", "generate {teacher} x --dtype foo", "generate {teacher} x --device foo", "generate {teacher} x --device cuda",
        "generate {teacher} x --device cuda:7", "generate {teacher} x --device mps", "generate {teacher} x --lookahead 3", "generate {teacher} x --draft ./nowhere",
        "generate {teacher} x --draft lookup --lookahead x", "generate {teacher} x --draft lookup --lookahead 99", "generate {teacher} x --draft {rows}",
        "chat", "chat ./nowhere", "chat {teacher} extra", "select", "select {teacher}", "select {teacher} --data {rows}", "select {teacher} --data {rows} --out {teacher}",
        "select {teacher} --data {rows} --out o --keep x", "select {teacher} --data {rows} --out o --keep 2", "select {teacher} --data {rows} --out o --method x",
        "select {teacher} --data {rows} --out o --rows 0", "select {teacher} --data {rows} --out o --batch 0", "select {teacher} --data {rows} --out o --length 0",
        "select {teacher} --data {rows} --out o --targets some", "select {teacher} --data {rows} --out o --template foo", "select {teacher} --data {rows} --out o --mixer foo",
        "select {teacher} --data {rows} --out o --student {teacher}", "select ./nowhere --data {rows} --out o", "report", "report nowhere", "bench", "bench nothing",
        "eval", "eval nothing", "eval perplexity", "eval perplexity {teacher}", "eval perplexity {teacher} --text nowhere", "eval perplexity {teacher} --text {rows} --length 1",
        "eval perplexity {teacher} --text {rows} --windows 0", "eval perplexity ./nowhere --text {rows}", "eval judgments", "eval judgments nowhere", "eval zero_shot foo {teacher}",
        "eval recall {teacher} --tasks foo", "eval recall {teacher} --trials x", "eval lengths", "eval lengths ./nowhere", "eval mt_bench", "eval fetch nothing",
    ]  # fmt: skip
    for line in lines:

        def make(world: World, line: str = line) -> list[str]:
            (world.here / "o").mkdir()
            words = line.replace("{{}}", "{}").split()
            named = {
                one: str(world.teacher),
                "{rows}": str(world.rows),
                "out": str(world.here / "out"),
                "o": str(world.here / "o" / "layers.json"),
            }
            return [named.get(word, word) for word in words]

        yield Case(f"line {line}", make, "--length must be at least 2" if line.endswith("--length 1") else "")


def _evaluation_files() -> Iterator[Case]:
    row = {
        "question_id": 81,
        "model": "m",
        "judge": ["gpt-4", "single-v1"],
        "score": 7,
        "turn": 1,
        "tstamp": 1.0,
        "judgment": "[[7]]",
        "user_prompt": "x",
    }
    broken = {
        "cut": b'{"question_id": 81', "list": b"[]\n", "null": b"null\n", "bytes": b"\xff\xfe\n", "deep": b"[" * 99999 + b"\n", "number": b"3\n",
    }  # fmt: skip
    damages: dict[str, tuple[dict[str, Any], str]] = {
        "no model": ({"model": None}, "line 1 must have a text under 'model'"), "model 3": ({"model": 3}, "line 1 must have a text under 'model'"),
        "turn text": ({"turn": "x"}, "line 1 must have a turn"), "turn 0": ({"turn": 0}, "line 1 must have a turn"),
        "judge 3": ({"judge": 3}, "line 1 must have its judge"), "judge []": ({"judge": []}, "line 1 must have its judge"),
        "question [1]": ({"question_id": [1]}, "line 1 must have a name or a number"),
    }  # fmt: skip
    for name, content in broken.items():
        words = "must be text in UTF-8" if name == "bytes" else "line 1 must be (JSON|a JSON object)"
        yield Case(f"judgments {name}", _judgments(content), words)
        yield Case(f"scores {name}", _in_run("scores.jsonl", content, "report", "RUN"), words)
    yield Case("judgments empty", _judgments(b""), "must hold judgments, and is empty")
    yield Case("scores empty", _in_run("scores.jsonl", b"", "report", "RUN"), None, "picture: ")
    for name, (damage, words) in damages.items():
        yield Case(f"judgments {name}", _judgments(json.dumps(row | damage).encode()), words)
    unscored = json.dumps({key: value for key, value in row.items() if key != "score"}).encode()
    yield Case("judgments no score", _judgments(unscored), "line 1 must be a judgment")
    for value in ("x", float("nan"), 1e9, -5, [1], None, True):  # counted as failures, as FastChat's -1 is
        told = r"1 judgments failed \(1: a score that is no number from 0 to 10\)\n  nothing could be read"
        yield Case(f"judgments score {value!r}", _judgments(json.dumps(row | {"score": value}).encode()), None, told)
    two = "".join(json.dumps(row | {"judge": [judge, "v1"], "score": score}) + "\n" for judge, score in (("a", 8), ("b", 2)))
    yield Case(
        "judgments of two judges", _judgments(two.encode()), None, r"judged by a\n  average +8.00(.|\n)*judged by b\n  average +2.00"
    )
    yield Case("judgments without the last newline", _judgments(two.strip().encode()), None, r"judged by b\n  average +2.00")
    yield from _score_rows()


def _judgments(content: bytes) -> Callable[[World], list[str]]:
    return lambda world: ["eval", "judgments", str(_written(world, "x_single.jsonl", content))]


def _score_rows() -> Iterator[Case]:
    """Rows of scores.jsonl, in which one thing is wrong."""
    row = {"benchmark": "mt_bench", "metric": "average", "model": "m", "judge": "j", "value": 5.5, "low": 5.0, "high": 6.0, "n": 80}
    damages: dict[str, tuple[dict[str, Any], str]] = {
        "benchmark 3": ({"benchmark": 3}, "text under 'benchmark'"), "metric null": ({"metric": None}, "text under 'metric'"),
        "model []": ({"model": []}, "text under 'model'"), "judge 3": ({"judge": 3}, "name its judge"), "value x": ({"value": "x"}, "number under 'value'"),
        "value true": ({"value": True}, "number under 'value'"), "value [1]": ({"value": [1]}, "number under 'value'"), "low x": ({"low": "x"}, "number under 'low'"),
        "high null": ({"high": None}, "number under 'high'"), "failed x": ({"failed": "x"}, "number under 'failed'"), "limit x": ({"limit": "x"}, "number under 'limit'"),
        "cell 3": ({"cell": 3}, "numbers under 'cell'"), "cell x": ({"cell": ["x"]}, "numbers under 'cell'"),
    }  # fmt: skip
    for name, (damage, words) in damages.items():
        content = json.dumps(row).encode() + b"\n" + json.dumps(row | damage).encode()
        yield Case(f"scores {name}", _in_run("scores.jsonl", content, "report", "RUN"), f"scores.jsonl line 2 must .*{words}")
    lone = json.dumps({key: value for key, value in row.items() if key != "high"}).encode()
    yield Case("scores low alone", _in_run("scores.jsonl", lone, "report", "RUN"), "must have both low and high")
    fine = {
        "right": {},
        "no number": {"value": float("nan")},
        "versions 3": {"command": ["x"], "versions": 3, "hardware": None},
        "n x": {"n": "x"},
    }
    for name, more in fine.items():
        content = json.dumps(row | more).encode()  # without its newline
        yield Case(f"scores {name}", _in_run("scores.jsonl", content, "report", "RUN"), None, "mt_bench, judged by j(.|\n)*5.00, 6.00")


def cases() -> list[Case]:
    """All cases, in a fixed order."""
    found = [*_overrides(), *_data(), *_models(), *_runs(), *_command_lines(), *_evaluation_files()]
    seen: dict[str, Case] = {}
    for case in found:
        seen.setdefault(case.name, case)
    return list(seen.values())
