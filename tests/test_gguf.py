"""Students for llama.cpp: heads that do nothing, exactly; refusals by name; and, with the engine itself, its own tokens."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ids
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llamba.interop.exporting import destinations, export
from llamba.interop.gguf import export_gguf, gguf_obstacle, padded_config, padded_tensors, pre_tokenizer
from llamba.interop.stock import BAMBA, Source, write_stock
from llamba.models.convert import convert, student_config

ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16}  # fmt: skip


def a_student(folder: Path, vocabulary: int = 101, bias: bool = False, attention: float = 0.5, **changes: Any) -> Path:
    shape = dict(vocab_size=vocabulary, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2, bos_token_id=0, eos_token_id=1,
                 pad_token_id=2)  # fmt: skip
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(LlamaConfig(**{**shape, **changes}))
    init = "attention" if bias else "paper"  # which opens the gate by a bias, and which has none that is not zero
    convert(teacher, mixer="mamba2", attention=attention, init=init, options={"proj_bias": bias}).save_pretrained(folder)
    return folder


def test_heads_that_do_nothing_change_nothing(tmp_path: Path) -> None:
    source = Source(a_student(tmp_path / "own"))
    config = padded_config(source.config)
    assert (config["mamba_expand"], config["mamba_n_heads"]) == (2, 8)
    (tmp_path / "bamba").mkdir()
    write_stock(source, tmp_path / "bamba", BAMBA, config, padded_tensors(source, 4))
    own, wide = (AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32) for name in ("own", "bamba"))
    with torch.no_grad():
        torch.testing.assert_close(wide(ids(2, 40)).logits, own(ids(2, 40)).logits, atol=1e-4, rtol=0)


def test_what_llama_cpp_cannot_hold_is_refused_by_name(tmp_path: Path, tokenizer) -> None:
    biased = a_student(tmp_path / "biased", bias=True)
    with pytest.raises(ValueError, match="no place for the bias"):
        export(biased, tmp_path / "out.gguf")
    llama = LlamaConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4)
    free = {"proj_bias": False}
    assert gguf_obstacle(student_config(llama, "mamba2", 0.5, free)) is None
    assert "no layer has attention" in (gguf_obstacle(student_config(llama, "mamba2", 0.0, free)) or "")
    assert "width of a head" in (
        gguf_obstacle(student_config(LlamaConfig(**llama.to_dict() | {"head_dim": 32}), "mamba2", 0.5, free)) or ""
    )
    with pytest.raises(ValueError, match="llama-quantize"):
        export_gguf(biased, tmp_path / "out.gguf", "q4_k_m")
    (tmp_path / "there.gguf").touch()
    with pytest.raises(ValueError, match="exists"):
        export_gguf(biased, tmp_path / "there.gguf")
    with pytest.raises(ValueError, match="must be one of granite"):
        export(biased, tmp_path / "out", "onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["biased", "there.gguf"]


def test_where_a_student_can_go_is_said_without_weights() -> None:
    llama = LlamaConfig(num_hidden_layers=2)
    plain = destinations(student_config(llama, "mamba2", 0.5))
    assert [reason is None for reason in plain.values()] == [True, True, True, False]
    assert "bias" in (plain["llama.cpp (GGUF)"] or "")
    assert all(destinations(student_config(llama, "mamba1", 0.5)).values())
    assert all(reason is None for reason in destinations(student_config(llama, "mamba2", 0.5, {"proj_bias": False})).values())


def test_byte_level_pre_tokenizers_are_known_by_what_they_do(tmp_path: Path) -> None:
    byte = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    cases = [(byte, "gpt-2"), ({"type": "Sequence", "pretokenizers": [digits, byte]}, "smollm"), ({"type": "Whitespace"}, "-"), (None, "-")]
    for found, name in cases:
        (tmp_path / "tokenizer.json").write_text(json.dumps({"pre_tokenizer": found}))
        assert pre_tokenizer(tmp_path) == name


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"rope_parameters": ROPE}, {"tie_word_embeddings": True}], ids=["plain", "llama3-rope", "tied"])
def test_llama_cpp_generates_what_transformers_does(tmp_path: Path, tokenizer, changes: dict[str, Any]) -> None:
    folder = a_student(tmp_path / "own", len(tokenizer), **changes)
    with pytest.raises(ValueError, match="no tokenizer files"):
        export(folder, tmp_path / "out.gguf")
    tokenizer.save_pretrained(folder)
    said = str(export(folder, tmp_path / "out.gguf"))
    assert "64 of 64 greedy tokens" in said and (tmp_path / "out.gguf").stat().st_size > 100_000
    assert "q8_0 beside fp32" in str(export(folder, tmp_path / "small.gguf", gguf_type="q8_0"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "own", "small.gguf"]
