"""Students as stock architectures: the same logits and the same greedy tokens in a process that has no llamba, and refusals by name."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import ids, student, teacher
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GraniteMoeHybridConfig, LlamaConfig, LlamaForCausalLM, MistralConfig

from llamba.interop.folders import Weights, save_weights, whole_folder
from llamba.interop.stock import BAMBA, GRANITE, LAYOUTS, export_stock, obstacle
from llamba.models.convert import convert, student_config

NEW = 16  # tokens that both generate
STOCK = """
import sys
sys.modules["llamba"] = None  # importing it fails
import torch
from transformers import AutoModelForCausalLM
prompt = torch.load(sys.argv[1])
for folder in sys.argv[2:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    with torch.no_grad():
        logits = model.eval()(prompt, use_cache=False).logits
    tokens = model.generate(prompt, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    torch.save((type(model).__name__, logits, tokens), folder + "/seen.pt")
""".replace("NEW", str(NEW))
# name -> (teacher's name in models.py or changes of a Llama, key/value groups, attention kept)
CASES: dict[str, tuple[str | dict[str, Any], int, float]] = {
    "gqa1": ("llama", 4, 0.5),
    "gqa2-tied-llama3-rope": ("llama-3.2", 2, 0.25),
    "gqa3": ({"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 48}, 1, 0.5),
    "qwen2": ("qwen2", 2, 0.5),
    "llama-biased": ("llama-biased", 2, 0.25),
    "no-attention": ("llama", 2, 0.0),
}


def trained(model: Any, steps: int = 20) -> Any:
    """Every tensor moves away from where conversion put it."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
    for step in range(steps):
        rows = ids(2, 24, seed=step)
        logits = model(rows).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def a_teacher(what: str | dict[str, Any], groups: int) -> Any:
    if isinstance(what, str):
        return teacher(what, groups, dtype=torch.float32)
    shape = {"vocab_size": 101, "intermediate_size": 64, "num_hidden_layers": 4, "initializer_range": 0.15, "pad_token_id": 0}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**shape, **what})).eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> SimpleNamespace:
    """Every case trained, exported in both layouts, and run by transformers alone, in one process for all."""
    home = tmp_path_factory.mktemp("exported")
    prompt, models, folders = ids(2, 40), {}, []
    torch.save(prompt, home / "prompt.pt")
    for name, (what, groups, attention) in CASES.items():
        models[name] = trained(convert(a_teacher(what, groups), mixer="mamba2", attention=attention, init="paper"))
        models[name].save_pretrained(home / name)
        for layout in LAYOUTS:
            export_stock(home / name, home / f"{name}-{layout}", LAYOUTS[layout])
            folders.append(str(home / f"{name}-{layout}"))
    done = subprocess.run([sys.executable, "-c", STOCK, str(home / "prompt.pt"), *folders], cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(home=home, prompt=prompt, models=models)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_transformers_alone_computes_the_same(exported: SimpleNamespace, name: str, layout: str) -> None:
    kind, logits, tokens = torch.load(exported.home / f"{name}-{layout}" / "seen.pt")
    model = exported.models[name]
    assert kind == LAYOUTS[layout].architecture
    with torch.no_grad():
        want = model(exported.prompt).logits
    assert (logits - want).abs().max() <= 1e-4
    own = model.generate(exported.prompt, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert tokens.tolist() == own.tolist() and len(set(own[:, -NEW:].flatten().tolist())) > 4


def test_the_folder_says_what_engines_ask(exported: SimpleNamespace) -> None:
    config = json.loads((exported.home / "gqa3-granite" / "config.json").read_text())
    assert config["layer_types"] == ["mamba", "attention"] * 2  # llama.cpp's converter knows only these words
    assert config["position_embedding_type"] == "rope" and config["attention_multiplier"] == 16**-0.5
    assert config["mamba_n_groups"] == config["mamba_n_heads"] == 3 and config["transformers_version"] == "5.23.0"
    weights = Weights(exported.home / "gqa3-granite")
    assert weights["model.layers.0.mamba.A_log"].dtype == torch.float32  # vLLM keeps it so, in any folder
    bamba = json.loads((exported.home / "gqa3-bamba" / "config.json").read_text())
    assert bamba["rope_parameters"]["partial_rotary_factor"] == 1.0 and bamba["attn_layer_indices"] == [1, 3]
    assert json.loads((exported.home / "no-attention-granite" / "config.json").read_text())["use_cache"] is False


def test_a_bias_that_is_zero_or_only_the_steps_is_no_bias(tmp_path: Path) -> None:
    """The step's bias goes into dt_bias, exactly; what is left decides whether the folder has biases (which llama.cpp cannot take)."""
    model = convert(a_teacher("llama", 2), mixer="mamba2", init="paper")
    with torch.no_grad():
        for i in (0, 2):
            bias = model.model.layers[i].self_attn.in_proj.bias
            bias.zero_()
            bias[-4:].normal_()
    model.save_pretrained(tmp_path / "own")
    notes = str(export_stock(tmp_path / "own", tmp_path / "out"))
    assert "biases" not in notes and "no tokenizer files" in notes and "5.23.0 or later" in notes
    with torch.no_grad():
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert stock.config.mamba_proj_bias is False
        torch.testing.assert_close(stock(ids(1, 30)).logits, model(ids(1, 30)).logits, atol=1e-4, rtol=0)


def test_16_bit_folders_keep_what_decides_the_decay(tmp_path: Path) -> None:
    model = convert(a_teacher("llama", 2), mixer="mamba2", init="paper").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "own")
    export_stock(tmp_path / "own", tmp_path / "out")
    weights = Weights(tmp_path / "out")
    assert {weights[f"model.layers.0.mamba.{name}"].dtype for name in ("A_log", "dt_bias", "D")} == {torch.float32}
    assert weights["model.layers.0.mamba.in_proj.weight"].dtype == torch.bfloat16
    with torch.no_grad():
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
        ours, theirs = model(ids(2, 40)).logits.float(), stock(ids(2, 40)).logits.float()
        wide = convert(a_teacher("llama", 2), mixer="mamba2", init="paper")(ids(2, 40)).logits
    assert (theirs - wide).abs().mean() <= 2 * (ours - wide).abs().mean()


def sliding() -> Any:
    return student_config(MistralConfig(num_hidden_layers=2, sliding_window=16), "mamba2", 0.5)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "qwen3": (lambda: student(name="qwen3").config, "qwen3"),
    "phi": (lambda: student(name="phi").config, "LayerNorm"),
    "mamba1": (lambda: student("mamba1").config, 'mixer="mamba1"'),
    "discrete": (lambda: student("discrete_mamba2").config, 'mixer="discrete_mamba2"'),
    "delta": (lambda: student("gated_delta").config, "Qwen3-Next"),
    "window": (lambda: student(options={"window": 8}).config, "mixer.window=8 has no place there"),
    "rotation": (lambda: student(options={"rotary": True}).config, "mixer.rotary=True has no place there"),
    "sliding": (sliding, "sliding window"),
    "linear convolution": (lambda: student(options={"conv_activation": None}).config, "conv_activation"),
    "no norm": (lambda: student(options={"out_norm": False}).config, "out_norm"),
    "other epsilon": (lambda: student(options={"norm_eps": 1e-3}).config, "epsilon"),
    "width": (lambda: student_config(LlamaConfig(num_hidden_layers=2, hidden_size=80, num_attention_heads=4, head_dim=24), "mamba2", 0.5),
              "4 x 24 = 96"),
    "teacher": (lambda: teacher().config, "model_type 'llama'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_go_is_refused_by_name(name: str) -> None:
    make, reason = REFUSED[name]
    found = obstacle(make())
    assert found is not None and reason in found and "\n" not in found


def test_granite_has_no_place_for_biases_of_the_mlp_and_bamba_has() -> None:
    config = student_config(LlamaConfig(num_hidden_layers=2, mlp_bias=True), "mamba2", 0.5)
    assert "MLP" in (obstacle(config, GRANITE) or "") and obstacle(config, BAMBA) is None


def test_a_refused_or_broken_student_leaves_nothing(tmp_path: Path) -> None:
    student("mamba1", dtype=torch.float32).save_pretrained(tmp_path / "one")
    with pytest.raises(ValueError, match="GraniteMoeHybridForCausalLM cannot hold this student"):
        export_stock(tmp_path / "one", tmp_path / "out")
    student(dtype=torch.float32).save_pretrained(tmp_path / "two")
    tensors = {name: Weights(tmp_path / "two")[name] for name in Weights(tmp_path / "two")}
    lost = tensors.pop("model.layers.0.self_attn.D")
    save_weights(tmp_path / "two", iter(tensors.items()))
    with pytest.raises(ValueError, match=r"1 missing \(model.layers.0.self_attn.D\)"):
        export_stock(tmp_path / "two", tmp_path / "out")
    save_weights(tmp_path / "two", iter((tensors | {"model.layers.0.self_attn.D": lost, "more": lost.clone()}).items()))
    with pytest.raises(ValueError, match=r"1 surplus \(more\)"):
        export_stock(tmp_path / "two", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("one", "two")] == []


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="has files"), whole_folder(tmp_path / "full"):
        pass
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "new") as made:
        (made / "half").touch()
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_weights_in_shards_are_what_hugging_face_writes(tmp_path: Path) -> None:
    model = convert(a_teacher("llama", 2), mixer="mamba2", init="paper")
    model.save_pretrained(tmp_path / "own")
    own = Weights(tmp_path / "own")
    save_weights(tmp_path, ((name, own[name]) for name in own), shard_bytes=20_000)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 3
    (tmp_path / "config.json").write_text((tmp_path / "own" / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))
    with pytest.raises(ValueError, match="names files elsewhere"):
        Weights(tmp_path)


def test_the_stock_configuration_is_one_that_transformers_accepts() -> None:
    """Published shapes: the strict validation of the stock configuration, without weights."""
    from llamba.interop.stock import stock_config
    from llamba.models.published import KNOWN

    fits = {name for name, (kind, values) in KNOWN.items() if obstacle(student_config(kind(**values), "mamba2", 0.5)) is None}
    assert fits == {"meta-llama-3-8b", "llama-3.1-8b", "llama-3.1-70b", "llama-3.2-1b", "llama-3.2-3b", "qwen2.5-0.5b", "qwen2.5-1.5b",
                    "qwen2.5-7b", "smollm2-135m"}  # fmt: skip
    for name in fits:
        kind, values = KNOWN[name]
        made = stock_config(student_config(kind(**values), "mamba2", 0.5), GRANITE, False)
        GraniteMoeHybridConfig(**{key: value for key, value in made.items() if key != "model_type"}).validate()
