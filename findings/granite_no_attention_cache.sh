#!/usr/bin/env bash
# transformers 5.23.0: a GraniteMoeHybrid in which every layer is "mamba" (a valid configuration, and the default layer_types) cannot
# generate: its cache has no attention layer to ask for its length. With use_cache=False it generates.
# Seen: "ValueError: `get_seq_length` can only be called on Attention layers ...". Fails when that is no longer so.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet numpy==2.4.6 torch==2.13.0 transformers==5.23.0
cat > "$folder/generate.py" <<'PY'
import torch
from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

model = GraniteMoeHybridForCausalLM(GraniteMoeHybridConfig(
    vocab_size=101, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, shared_intermediate_size=64, num_local_experts=0,
    num_experts_per_tok=0, mamba_n_heads=4, mamba_n_groups=4, mamba_d_head=16, mamba_d_state=16, pad_token_id=0,
)).eval()
row = torch.arange(5, 13)[None]
print("use_cache=False:", model.generate(row, max_new_tokens=2, do_sample=False, use_cache=False).shape)
try:
    model.generate(row, max_new_tokens=2, do_sample=False)
except ValueError as error:
    print("ValueError:", error)
    assert "get_seq_length" in str(error), "another error"
else:
    raise SystemExit("the behaviour has changed: it generates")
PY
"$folder/env/bin/python" "$folder/generate.py"
