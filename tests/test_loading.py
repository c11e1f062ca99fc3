"""The loader: what it takes, what it refuses and how it says so; GGUF files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf_files
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from llamba.models.convert import convert
from llamba.models.loading import load_config, load_model, load_tokenizer, require_model, require_sound
from llamba.models.loading.gguf import _llama3_factors

Weights = dict[str, Tensor]
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path, teacher_folder) -> Path:
    return Path(shutil.copytree(teacher_folder, tmp_path / "model"))


def change_weights(folder: Path, change: Callable[[Weights], Weights]) -> None:
    weights = change(load_file(folder / "model.safetensors"))
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def without(*names: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: value for name, value in weights.items() if name not in names}


def spoilt(value: float) -> Callable[[Weights], Weights]:
    def change(weights: Weights) -> Weights:
        weights[Q_PROJ][3, 5] = value
        return weights

    return change


WEIGHTS = {
    "missing": (without(Q_PROJ), rf"missing {Q_PROJ}"),
    "many missing": (lambda w: {n: v for n, v in w.items() if "mlp" not in n}, r"missing .*down_proj.weight.* and 9 more"),
    "no head": (without("lm_head.weight"), r"missing lm_head.weight"),
    "surplus": (lambda w: {**w, "model.layers.0.extra": torch.ones(2)}, r"without a place model.layers.0.extra"),
    "surplus layer": (lambda w: {**w, Q_PROJ.replace("1", "4"): w[Q_PROJ].clone()}, r"without a place model.layers.4"),
    "shape": (lambda w: {**w, Q_PROJ: w[Q_PROJ][:-1]}, rf"of another shape {Q_PROJ} \[31, 32\] where \[32, 32\] is needed"),
    "NaN": (spoilt(torch.nan), rf"finite numbers, got NaN or infinity in {Q_PROJ}"),
    "infinity": (spoilt(torch.inf), rf"finite numbers, got NaN or infinity in {Q_PROJ}"),
    "integers": (lambda w: {n: (100 * v).to(torch.int8) for n, v in w.items()}, r"stored as BF16, F16, F32, F64, got .*I8.*dequantise"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_do_not_fit(folder: Path, case: str) -> None:
    change, message = WEIGHTS[case]
    change_weights(folder, change)
    with pytest.raises(ValueError, match=message):
        load_model(folder)
    with pytest.raises(ValueError, match=message):  # before a run begins
        require_sound(str(folder))


CONFIGS = {
    "more layers": (dict(num_hidden_layers=6), "num_hidden_layers=6 and the weights hold 4 layers"),
    "far more layers": (dict(num_hidden_layers=10**9), "num_hidden_layers must be a whole number from 1 to 4096"),
    "fewer layers": (dict(num_hidden_layers=3), "without a place model.layers.3"),
    "biases": (dict(attention_bias=True), r"missing .*k_proj.bias"),
    "wide": (dict(intermediate_size=2**20), "of another shape"),
    "text": (dict(hidden_size="32"), "hidden_size must be a whole number"),
    "no heads": (dict(num_attention_heads=0), "num_attention_heads must be a whole number"),
    "odd heads": (dict(num_attention_heads=3), "multiple of the number of attention heads"),
    "activation": (dict(hidden_act="foo"), "KeyError: 'foo'"),
    "rope": (dict(rope_parameters={"rope_type": "foo"}), "foo"),
    "dtype": (dict(dtype="foo"), "foo"),
    "quantised by nobody": (dict(quantization_config={"quant_method": "foo"}), "quantised by 'foo'"),
    "no type": (dict(model_type=None), "model_type must be a text"),
    "unknown type": (dict(model_type="foo"), "foo"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configurations_that_do_not_fit(folder: Path, case: str) -> None:
    change, message = CONFIGS[case]
    change_config(folder, **change)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def damaged(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def cut(size: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:size])

    return change


FILES = {
    "pointer": (damaged("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"), "Git LFS pointer"),
    "empty": (cut(0), "no whole safetensors file"),
    "cut in header": (cut(100), "no whole safetensors file"),
    "cut in data": (cut(20_000), "no whole safetensors file"),
    "gone": (lambda folder: (folder / "model.safetensors").unlink(), r"weights \(\*.safetensors\), found none"),
    "config list": (damaged("config.json", b"[]"), "must hold a JSON object, got list"),
    "config cut": (damaged("config.json", b'{"model'), "config.json must hold a JSON object"),
    "config deep": (damaged("config.json", b"[" * 100_000), "config.json must hold a JSON object"),
    "config bytes": (damaged("config.json", b"\xff\xfe\x00"), "config.json must hold a JSON object"),
}


@pytest.mark.parametrize("case", FILES)
def test_broken_files(folder: Path, case: str) -> None:
    change, message = FILES[case]
    change(folder)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


INDEXES = {
    "a file that is not there": (lambda parts: {**parts, Q_PROJ: "other.safetensors"}, "names other.safetensors, which is not there"),
    "empty": (lambda parts: {}, "weight_map"),
    "numbers": (lambda parts: {name: 1 for name in parts}, "weight_map"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_weight_maps(folder: Path, case: str) -> None:
    change, message = INDEXES[case]
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    load_model(folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "weight_map": change(index["weight_map"])}))
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_a_part_of_the_weight_map(folder: Path) -> None:
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    gone = index["weight_map"][Q_PROJ]
    path.write_text(json.dumps({**index, "weight_map": {n: f for n, f in index["weight_map"].items() if f != gone}}))
    with pytest.raises(ValueError, match="missing .*layers.1"):
        load_model(folder)


def test_what_transformers_ties_or_ignores_is_not_surplus(folder: Path, small, tokenizer) -> None:
    tied = small.llama(len(tokenizer), tie_word_embeddings=True)
    tied.save_pretrained(folder)
    load_model(folder)
    change_weights(folder, lambda w: {**w, "lm_head.weight": w["model.embed_tokens.weight"].clone()})
    change_weights(folder, lambda w: {**w, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert require_model(str(folder)).tie_word_embeddings
    assert torch.equal(load_model(folder).lm_head.weight, tied.lm_head.weight)


def test_edited_layer_types_of_a_hybrid(tmp_path, student_folder) -> None:
    folder = Path(shutil.copytree(student_folder, tmp_path / "student"))
    types = json.loads((folder / "config.json").read_text())["layer_types"]
    change_config(folder, layer_types=types[::-1])
    with pytest.raises(ValueError, match=r"missing .*layers.*without a place .*layers"):
        load_model(folder)


def test_sums_that_overflow_are_not_taken_for_infinity(folder: Path) -> None:
    change_weights(folder, lambda w: {n: v.half() for n, v in w.items()})
    change_weights(folder, lambda w: {**w, Q_PROJ: torch.full_like(w[Q_PROJ], 60_000)})
    assert load_model(folder, torch.float16).dtype == torch.float16


TOKENIZERS = {
    "cut": (lambda folder: (folder / "tokenizer.json").write_text('{"version": '), "the tokenizer of .* cannot be loaded"),
    "other form": (lambda folder: (folder / "tokenizer.json").write_text('{"model": {"type": "foo"}}'), "the tokenizer of"),
    "a list": (
        lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
        "tokenizer_config.json must hold a JSON object, got list",
    ),
    "none": (lambda folder: [path.unlink() for path in folder.glob("*token*")], "has no tokenizer"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_broken_tokenizers(folder: Path, case: str) -> None:
    change, message = TOKENIZERS[case]
    change(folder)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(folder)


def test_no_remote_code(folder: Path) -> None:
    (folder / "modeling.py").write_text("raise SystemExit('executed')")
    change_config(folder, model_type="foo", auto_map={"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"})
    with pytest.raises(ValueError, match="contains custom code"):
        load_model(folder)


@pytest.fixture(scope="session")
def gguf_teacher(small, tokenizer) -> LlamaForCausalLM:
    return small.llama(len(tokenizer), tie_word_embeddings=True, intermediate_size=64)


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LLAMBA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_gguf_gives_the_model_that_was_written(tmp_path, own_cache, gguf_teacher, tokenizer, kind: str) -> None:
    file = gguf_files.write(tmp_path / "small.gguf", gguf_teacher, tokenizer, kind)
    model, tolerance = load_model(file), {"F32": 0.0, "F16": 1e-3, "Q8_0": 1e-2}[kind]
    for name, value in gguf_teacher.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name].float(), value, atol=tolerance, rtol=0)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=model.dtype)
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_gguf_teacher_is_an_ordinary_model(tmp_path, own_cache, gguf_teacher, tokenizer, capsys) -> None:
    gguf_files.write(tmp_path / "a" / "small.gguf" if (tmp_path / "a").mkdir() else tmp_path / "a" / "small.gguf", gguf_teacher, tokenizer)
    student = convert(str(tmp_path / "a"))  # a folder with one file
    assert "dequantising it once" in capsys.readouterr().err
    assert "quantization_config" not in student.config.to_dict() and not getattr(student, "hf_quantizer", None)
    student.save_pretrained(tmp_path / "b")
    again = load_model(tmp_path / "b")
    again.train()(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    assert load_tokenizer(tmp_path / "a")("red cat")["input_ids"] == tokenizer("red cat", add_special_tokens=False)["input_ids"]
    assert load_tokenizer(tmp_path / "a").chat_template == tokenizer.chat_template
    assert "dequantising" not in capsys.readouterr().err


def test_a_model_that_transformers_read_from_gguf(tmp_path, gguf_teacher, tokenizer) -> None:
    gguf_files.write(tmp_path / "small.gguf", gguf_teacher, tokenizer, "Q8_0")
    student = convert(AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="small.gguf"))
    student.save_pretrained(tmp_path / "b")
    assert load_model(tmp_path / "b").dtype == torch.float32


@pytest.mark.parametrize("part", [0.0, 0.001, 0.1, 0.5, 0.99])
def test_damaged_gguf(tmp_path, own_cache, gguf_teacher, tokenizer, part: float) -> None:
    file = gguf_files.write(tmp_path / "small.gguf", gguf_teacher, tokenizer)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(ValueError, match="small.gguf cannot be read as GGUF"):
        load_config(file)
    assert not list(own_cache.glob("gguf/*"))


def test_gguf_with_numbers_that_are_none(tmp_path, own_cache, small, tokenizer) -> None:
    model = small.llama(len(tokenizer))
    model.model.layers[1].self_attn.v_proj.weight.data[0, 0] = torch.nan
    file = gguf_files.write(tmp_path / "small.gguf", model, tokenizer)
    with pytest.raises(ValueError, match="NaN or infinity in model.layers.1.self_attn.v_proj.weight"):
        load_model(file)


def test_gguf_with_the_rotary_scaling_of_llama_3_1(tmp_path, own_cache, small, tokenizer) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192
    model = small.llama(len(tokenizer), head_dim=64, rope_parameters=rope)
    plain = small.llama(len(tokenizer), head_dim=64, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    factors = plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq  # what transformers divides by
    torch.testing.assert_close(_llama3_factors(500000.0, 64, 8.0), factors)
    file = gguf_files.write(tmp_path / "small.gguf", model, tokenizer, more={"rope_freqs.weight": factors.numpy()})
    loaded = load_model(file)
    torch.testing.assert_close(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    file = gguf_files.write(tmp_path / "other.gguf", model, tokenizer, more={"rope_freqs.weight": 1.5 * factors.numpy()})
    with pytest.raises(ValueError, match="rope_freqs are not those of Llama 3.1"):
        load_model(file)


def test_several_gguf_files(tmp_path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.gguf").touch()
    with pytest.raises(ValueError, match="holds 2 GGUF files; name one"):
        load_model(tmp_path)
