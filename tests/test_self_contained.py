"""Folders with their code: they load and compute the same where llamba cannot be imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import ids, student, teacher
from transformers import AutoModelForCausalLM

from llamba.interop.remote_code import export_remote_code
from llamba.models.families import FAMILIES
from llamba.models.self_contained import add_code, flat_files

MIXERS = ("auto", "gated_delta")
ALONE = """
import sys
sys.modules["llamba"] = None  # importing it fails
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
rows = torch.load(sys.argv[1])
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        logits = model(rows).logits
    tokens = model.generate(rows, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    torch.save((logits, tokens), folder + "/seen.pt")
    model.save_pretrained(folder + "/again")
assert [name for name in sys.modules if name.startswith("transformers_modules.")]
"""


def test_mixers_run_without_llamba(tmp_path: Path) -> None:
    models, rows = {}, ids(2, 40)
    torch.save(rows, tmp_path / "rows.pt")
    for mixer in MIXERS:
        models[mixer] = student(mixer, "qwen3" if mixer == "auto" else "llama", dtype=torch.float32).eval()
        models[mixer].save_pretrained(tmp_path / mixer, self_contained=True)
    folders = [str(tmp_path / mixer) for mixer in MIXERS]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path / "rows.pt"), *folders], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    for mixer, model in models.items():
        logits, tokens = torch.load(tmp_path / mixer / "seen.pt")
        with torch.no_grad():
            torch.testing.assert_close(logits, model(rows).logits, atol=1e-5, rtol=1e-5)
        assert tokens.tolist() == model.generate(rows, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0).tolist()
        again = AutoModelForCausalLM.from_pretrained(tmp_path / mixer / "again")  # by llamba itself; the code went along
        assert torch.equal(again.model.layers[0].self_attn.out_proj.weight, model.model.layers[0].self_attn.out_proj.weight)
        assert (tmp_path / mixer / "again" / "modeling_llamba.py").is_file()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_code_is_flat_and_asks_for_nothing_but_torch_and_transformers(family: str) -> None:
    files = flat_files(family)
    assert (
        "Family(" in files["modeling_llamba.py"]
        and not any(other in name for name in files for other in FAMILIES)
        and not any("triton_" in name for name in files)
    )
    for name, text in files.items():
        compile(text, name, "exec")
        assert "llamba." not in "".join(line for line in text.splitlines() if line.lstrip().startswith(("from ", "import "))), name
        assert "import triton" not in text and "from .." not in text, name


def test_the_export_has_a_card_that_says_what_is_known_and_what_is_not(tmp_path: Path, tokenizer) -> None:
    run, name = tmp_path / "run", tmp_path / "teacher"
    name.mkdir()
    (name / "README.md").write_text("---\nlicense: llama3.1\n---\n")
    step = run / "0-convert"
    student(dtype=torch.float32).save_pretrained(step)
    tokenizer.save_pretrained(step)
    (step / "DONE").touch()
    (run / "recipe.json").write_text(json.dumps({"teacher": str(name), "student": {"mixer": "mamba2"}, "stages": [], "seed": 7}))
    (run / "eval").mkdir()
    row = {"benchmark": "mt_bench", "metric": "average", "model": "run", "judge": "a-judge", "value": 7.1, "low": 6.5, "high": 7.6, "n": 80}
    (run / "eval" / "scores.jsonl").write_text(json.dumps(row) + "\n")
    assert "trust_remote_code=True" in str(export_remote_code(run, tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: llama3.1" in card and "7.1 [6.5, 7.6] | a-judge" in card and "2 of 4 layers" in card and "Seed 7" in card
    student(dtype=torch.float32).save_pretrained(tmp_path / "bare")
    assert "no tokenizer files" in str(export_remote_code(tmp_path / "bare", tmp_path / "bare-out"))
    card = (tmp_path / "bare-out" / "README.md").read_text()
    assert "license: other" in card and "No recipe is recorded" in card and "None are recorded" in card


def test_a_teacher_has_no_code_of_ours(tmp_path: Path) -> None:
    teacher(dtype=torch.float32).save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="LlamaForCausalLM"):
        add_code(tmp_path / "teacher")
