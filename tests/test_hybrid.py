"""The hybrid model: whole, chunked, stepwise, padded and packed runs agree; generation, saving, Auto classes, errors."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import EVERY_STUDENT, TEACHERS, ids, rms_error, student, teacher
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache

from llamba.models.convert import convert, kept_layers, student_config
from llamba.models.masks import document_numbers

T = 131
DTYPES = {"fp64": (torch.float64, 1e-10), "fp32": (torch.float32, 2e-5)}
precisions = pytest.mark.parametrize("precision", DTYPES)
mixers = pytest.mark.parametrize("mixer", EVERY_STUDENT)


def logits(model: PreTrainedModel, tokens: Tensor, **more) -> Tensor:
    with torch.no_grad():
        return model(tokens, **{"use_cache": False, **more}).logits


@precisions
@mixers
@pytest.mark.parametrize("split", [1, 3, 31, 32, 33, 63, 64, 65, 130])
def test_chunked_prefill_equals_the_whole(mixer: str, precision: str, split: int) -> None:
    dtype, bound = DTYPES[precision]
    model, tokens = student(mixer, dtype=dtype), ids(2, T)
    with torch.no_grad():
        first = model(tokens[:, :split])
        second = model(tokens[:, split:], past_key_values=first.past_key_values)
    assert rms_error(torch.cat((first.logits, second.logits), 1), logits(model, tokens)) < bound


@precisions
@mixers
@pytest.mark.parametrize("name", ["llama", "mistral", "phi", "qwen3"])
def test_stepwise_equals_the_whole(mixer: str, precision: str, name: str) -> None:
    """One token at a time from the first; Mistral's window (16) is shorter than the sequence."""
    dtype, bound = DTYPES[precision]
    model, tokens = student(mixer, name, dtype=dtype), ids(2, 40)
    cache, steps = None, []
    with torch.no_grad():
        for t in range(40):
            out = model(tokens[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    assert rms_error(torch.cat(steps, 1), logits(model, tokens)) < bound


@precisions
@mixers
@pytest.mark.parametrize("side", ["left", "right", "holes"])
@pytest.mark.parametrize("attention", [0.5, 0.0])
def test_padded_rows_equal_single_sequences_and_so_does_what_follows(mixer: str, precision: str, side: str, attention: float) -> None:
    dtype, bound = DTYPES[precision]
    model, tokens = student(mixer, attention=attention, dtype=dtype), ids(2, T)
    lengths = (70, 2)  # the second row is shorter than the convolution
    mask = torch.zeros(2, 80, dtype=torch.long)
    for row, length in enumerate(lengths):
        chosen = {"left": range(80 - length, 80), "right": range(length)}.get(side, torch.randperm(80)[:length].sort().values.tolist())
        mask[row, list(chosen)] = 1
    padded = torch.full((2, 80), 7)
    padded[mask.bool()] = torch.cat([tokens[row, :length] for row, length in enumerate(lengths)])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        first = model(padded, attention_mask=mask, position_ids=positions)
        follow = torch.cat((mask, torch.ones(2, 5, dtype=torch.long)), 1)
        after = torch.stack([tokens[row, length : length + 5] for row, length in enumerate(lengths)])
        second = model(
            after, attention_mask=follow, position_ids=follow.cumsum(1)[:, -5:] - 1, past_key_values=first.past_key_values
        ).logits
    for row, length in enumerate(lengths):
        want = logits(model, tokens[row : row + 1, : length + 5])[0]
        got = torch.cat((first.logits[row][mask[row].bool()], second[row]))
        assert rms_error(got, want) < bound


@precisions
@mixers
@pytest.mark.parametrize("how", ["positions", "seq_idx", "padded"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_packed_documents_equal_single_ones(mixer: str, precision: str, how: str, name: str) -> None:
    dtype, bound = DTYPES[precision]
    model = student(mixer, name, dtype=dtype)
    documents = [ids(1, length, seed=length) for length in (2, 65, 1, 40)]
    packed = torch.cat(documents, 1)
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    numbers = torch.cat([torch.full((d.shape[1],), 5 + i) for i, d in enumerate(documents)])[None]
    if how == "padded":
        padding = torch.zeros(1, 9, dtype=torch.long)
        mask = torch.cat((torch.ones_like(packed), padding), 1)
        got = logits(model, torch.cat((packed, padding), 1), position_ids=torch.cat((positions, padding), 1), attention_mask=mask)
        got = got[:, : packed.shape[1]]
    else:
        more = {"position_ids": positions} if how == "positions" else {"seq_idx": numbers}
        with torch.no_grad():
            got = model(packed, **more).logits  # without use_cache=False: documents switch the cache off
    assert rms_error(got, torch.cat([logits(model, d) for d in documents], 1)) < bound


@mixers
def test_packed_and_padded_gradients_equal_those_of_single_documents(mixer: str) -> None:
    model, first, second = student(mixer), ids(1, 30), ids(1, 9, seed=1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    weight = torch.randn(1, 39, 101, dtype=torch.float64)

    def gradients(value: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(value, parameters))

    want = [
        a + b
        for a, b in zip(
            gradients((model(first).logits * weight[:, :30]).sum()), gradients((model(second).logits * weight[:, 30:]).sum()), strict=True
        )
    ]
    packed = model(torch.cat((first, second), 1), seq_idx=torch.tensor([[0] * 30 + [1] * 9]), use_cache=False).logits
    mask = torch.tensor([[1] * 30, [0] * 21 + [1] * 9])
    rows = torch.cat((first, torch.cat((torch.full((1, 21), 7), second), 1)))
    padded = model(rows, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0), use_cache=False).logits
    padded_value = (padded[0] * weight[0, :30]).sum() + (padded[1, 21:] * weight[0, 30:]).sum()
    for got in (gradients((packed * weight).sum()), gradients(padded_value)):
        for a, b in zip(got, want, strict=True):
            assert (a - b).abs().max() <= 1e-10 * max(b.abs().max(), 1e-3)


def test_documents_start_where_positions_of_real_tokens_do_not_rise() -> None:
    def documents(positions: list[int], mask: list[int] | None = None) -> list[int] | None:
        made = document_numbers(None, torch.tensor([positions]), None if mask is None else torch.tensor([mask]).bool())
        return None if made is None else made[0].tolist()

    assert documents([0, 1, 2, 3]) is None
    assert documents([5, 6, 7]) is None  # a later chunk
    assert documents([0, 1, 0, 1, 2]) == [0, 0, 1, 1, 1]
    assert documents([0, 0, 0]) == [0, 1, 2]
    assert documents([1, 1, 0, 1, 2], [0, 0, 1, 1, 1]) is None  # left padding as `generate` numbers it
    assert documents([0, 1, 1, 1], [1, 0, 0, 1]) is None  # a hole
    assert documents([0, 1, 1, 0, 1], [1, 1, 0, 1, 1]) == [0, 0, 0, 1, 1]
    assert documents([0, 1, 0, 0], [1, 1, 0, 0]) is None  # right padding


def test_packed_documents_with_a_cache_are_refused() -> None:
    model = student()
    cache = model(ids(1, 4)).past_key_values
    with pytest.raises(ValueError, match="use_cache=False"):
        model(ids(1, 4), position_ids=torch.tensor([[0, 1, 0, 1]]), past_key_values=cache)


@mixers
@pytest.mark.parametrize("attention", [0.0, 0.5, 1.0])
def test_generate_with_cache_equals_without(mixer: str, attention: float) -> None:
    model, tokens = student(mixer, attention=attention), ids(2, 11)
    more = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(tokens), "pad_token_id": 0, "eos_token_id": None}
    want = model.generate(tokens, use_cache=False, **more)
    assert torch.equal(model.generate(tokens, **more), want)
    assert torch.equal(model.generate(tokens, num_beams=3, **more), model.generate(tokens, num_beams=3, use_cache=False, **more))
    if attention > 0:
        assert torch.equal(model.generate(tokens, cache_implementation="static", **more), want)


@mixers
def test_generate_left_padded_batch_equals_single_rows(mixer: str) -> None:
    model, tokens = student(mixer), ids(2, 20)
    mask = torch.ones_like(tokens)
    mask[1, :17] = 0
    more = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    both = model.generate(tokens.masked_fill(mask == 0, 0), attention_mask=mask, **more)[:, 20:]
    for row, start in enumerate((0, 17)):
        alone = tokens[row : row + 1, start:]
        assert torch.equal(both[row], model.generate(alone, attention_mask=torch.ones_like(alone), **more)[0, alone.shape[1] :])


def test_hundred_percent_attention_is_the_teacher() -> None:
    for name in TEACHERS:
        source = teacher(name)
        made, tokens = convert(source, attention=1.0), ids(2, 30)
        assert torch.equal(logits(made, tokens), logits(source, tokens)), name


@mixers
def test_cache_of_an_all_recurrent_model_knows_its_length(mixer: str) -> None:
    model = student(mixer, attention=0.0)
    with torch.no_grad():
        cache = model(ids(2, 9)).past_key_values
        model(ids(2, 1), past_key_values=cache)
    assert cache.get_seq_length() == 10
    for layer in cache.layers:
        assert layer.state.dtype == torch.float64 and layer.state.shape[0] == 2
        assert layer.batch_size == 2 and layer.get_seq_length() == 10


def test_state_is_fp32_in_a_bf16_model() -> None:
    model = student(dtype=torch.float32, attention=0.0).to(torch.bfloat16)
    with torch.no_grad():
        cache = model(ids(1, 9)).past_key_values
        model(ids(1, 1), past_key_values=cache)
    assert all(layer.state.dtype == torch.float32 and layer.raw.dtype == torch.bfloat16 for layer in cache.layers)


@mixers
@pytest.mark.parametrize("attention", [0.0, 0.5])
def test_taking_tokens_back(mixer: str, attention: float) -> None:
    """A random walk of steps and rollbacks, over the edge of the rings, ends where a fresh run over the same tokens ends."""
    model, draw = student(mixer, attention=attention), torch.Generator().manual_seed(1)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    kept = ids(2, 45)
    with torch.no_grad():
        model(kept, past_key_values=cache)
        for round_ in range(25):
            count = int(torch.randint(1, 7, (), generator=draw))
            tokens = ids(2, count, seed=round_)
            pieces = tokens.split(1, 1) if round_ % 2 else (tokens,)
            for piece in pieces:
                model(piece, past_key_values=cache)
            back = int(torch.randint(0, count + 1, (), generator=draw))
            cache.crop(-back)
            kept = torch.cat((kept, tokens[:, : count - back]), 1)
        got = model(ids(2, 3, seed=99), past_key_values=cache).logits
    assert rms_error(got, logits(model, torch.cat((kept, ids(2, 3, seed=99)), 1))[:, -3:]) < 1e-10
    assert cache.get_seq_length() == kept.shape[1] + 3


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("attention", [0.0, 0.5, [0, 3]])
def test_a_refused_crop_changes_nothing_in_any_layer(name: str, attention) -> None:
    """Not recording; recording since the prompt, so that only what came later is held; more than a ring holds, or than was read.
    Mistral's window is 16."""
    model = student(name=name, attention=attention)
    for length, later, back in ((14, 0, 5), (40, 3, 5), (0, 60, 33), (0, 9, 10), (40, 0, -1)):
        cache, tokens, kept = DynamicCache(config=model.config), ids(1, length + later), length + later
        with torch.no_grad():
            for piece, record in ((tokens[:, :length], False), (tokens[:, length:], True)):
                if record and later:
                    cache.activate_past_recording()
                if piece.shape[1]:
                    model(piece, past_key_values=cache)
            cache = pickle.loads(pickle.dumps(copy.deepcopy(cache)))
            with pytest.raises(ValueError, match="cannot take back|takes a negative count"):
                cache.crop(-back)
            if later > 1:
                cache.crop(-1)
                kept -= 1
            got = model(ids(1, 4, seed=1), past_key_values=cache).logits
        assert [layer.get_seq_length() for layer in cache.layers] == [kept + 4] * 4
        assert rms_error(got, logits(model, torch.cat((tokens[:, :kept], ids(1, 4, seed=1)), 1))[:, -4:]) < 1e-10


def test_attention_in_a_window_gives_back_no_more_than_it_still_holds() -> None:
    """transformers itself cuts keys that are not there any more."""
    model = student(name="mistral")
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    with torch.no_grad():
        model(ids(1, 40), past_key_values=cache)
        cache.crop(-1)
        with pytest.raises(ValueError, match="attention in a window of 16 holds only the tokens since the last crop"):
            cache.crop(-5)
        got = model(ids(1, 2, seed=1), past_key_values=cache).logits
    assert rms_error(got, logits(model, torch.cat((ids(1, 40)[:, :39], ids(1, 2, seed=1)), 1))[:, -2:]) < 1e-10


def test_what_other_models_filled_is_refused_in_a_sentence() -> None:
    model, x, y = student(), ids(2, 12), ids(2, 3)
    wide = convert(teacher(groups=4), attention=0.5, init="paper")
    with torch.no_grad():
        full = model(x).past_key_values
        foreign = {
            "layer 0 holds keys and values": teacher()(x, use_cache=True).past_key_values,
            "layer 0 is of a mixer with kind='mamba1'": student("mamba1")(x, use_cache=True).past_key_values,
            "layer 1 is recurrent, and this model has attention there": student(attention=0.0)(x).past_key_values,
            "layer 0 is of a mixer with groups=4": wide(x).past_key_values,
            "it has 4 layers and this model has 2": None,
            "such as DynamicCache": ((torch.zeros(1), torch.zeros(1)),),
            "holds 2 rows and 1 are read": full,
        }
        for message, cache in foreign.items():
            reader = two_layers(model) if cache is None else model
            with pytest.raises(ValueError, match=message):
                reader(y[:1] if cache is full else y, past_key_values=full if cache is None else cache)
        got = model(y, past_key_values=full).logits
        unused = model(x, past_key_values=DynamicCache(config=teacher().config)).logits
    assert rms_error(got, logits(model, torch.cat((x, y), 1))[:, -3:]) < 1e-12 and torch.equal(unused, model(x).logits)


def two_layers(model: PreTrainedModel) -> PreTrainedModel:
    config = copy.deepcopy(model.config)
    config.num_hidden_layers, config.layer_types = 2, config.layer_types[:2]
    return type(model)(config).double()


def test_taking_back_more_than_the_rings_hold_is_refused() -> None:
    model = student(attention=0.0)
    with torch.no_grad():
        plain = model(ids(1, 9)).past_key_values
        with pytest.raises(ValueError, match="activate_past_recording"):
            plain.crop(-1)
        lazy = DynamicCache()
        lazy.activate_past_recording()  # of no layers: transformers forgets it
        model(ids(1, 9), past_key_values=lazy)
        with pytest.raises(ValueError, match=r"empty DynamicCache\(\) forgets"):
            lazy.crop(-1)
        cache = DynamicCache(config=model.config)
        cache.activate_past_recording()
        model(ids(1, 60), past_key_values=cache)
        with pytest.raises(ValueError, match="at most the last 32"):
            cache.crop(-33)
        cache.crop(-32)
        static = StaticCache(config=student().config, max_cache_len=16)
        student()(ids(1, 9), past_key_values=static)
        with pytest.raises(ValueError, match="a static cache takes no tokens back"):
            static.crop(-1)


@pytest.mark.filterwarnings("ignore:the draft has")  # a few parameters more than the target
@mixers
def test_assisted_generation_equals_plain(mixer: str) -> None:
    """Hugging Face's own assisted decoding rolls our cache back, with another hybrid as the draft."""
    model, draft, tokens = student(mixer), student(mixer, attention=0.0), ids(1, 7)
    more = {"max_new_tokens": 20, "do_sample": False, "attention_mask": torch.ones_like(tokens), "pad_token_id": 0, "eos_token_id": None}
    want = model.generate(tokens, **more)
    assert torch.equal(model.generate(tokens, assistant_model=draft, **more), want)
    assert torch.equal(model.generate(tokens, prompt_lookup_num_tokens=3, **more), want)


def test_rows_of_a_cache_can_be_selected_and_repeated() -> None:
    model, tokens = student(), ids(3, 9)
    with torch.no_grad():
        cache = model(tokens).past_key_values
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        got = model(ids(4, 2), past_key_values=cache).logits
    assert rms_error(got, logits(model, torch.cat((tokens[[2, 2, 0, 0]], ids(4, 2)), 1))[:, -2:]) < 1e-12


def test_a_static_cache_of_ones_own_and_a_foreign_one() -> None:
    model, tokens = student(), ids(1, 9)
    with torch.no_grad():
        got = model(tokens, past_key_values=StaticCache(config=model.config, max_cache_len=16)).logits
        lazy = model(tokens, past_key_values=DynamicCache()).logits
    assert rms_error(got, logits(model, tokens)) < 1e-12 and torch.equal(lazy, model(tokens).logits)
    foreign = DynamicCache(config=model.config)
    foreign.layers[0].update_conv_state(torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match="filled by another model"):
        model(tokens, past_key_values=foreign)


def test_what_overflows_a_static_cache_is_refused_before_it_is_written() -> None:
    model, tokens = student(), ids(1, 9)
    more = {"attention_mask": torch.ones_like(tokens), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cache = StaticCache(config=model.config, max_cache_len=16)
    with pytest.raises(ValueError, match="the static cache has room for 16 tokens and 17 are needed; make it with max_cache_len=17"):
        model.generate(tokens, past_key_values=cache, max_new_tokens=9, **more)
    full = model.generate(tokens, past_key_values=cache, max_new_tokens=8, **more)
    assert torch.equal(full, model.generate(tokens, max_new_tokens=8, **more))
    with torch.no_grad(), pytest.raises(ValueError, match="room for 16 tokens and 17 are needed"):
        model(tokens[:, :1], past_key_values=cache)


@mixers
def test_gradient_checkpointing_changes_nothing(mixer: str) -> None:
    model, tokens = student(mixer).train(), ids(2, 20)
    model(tokens, labels=tokens).loss.backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    enable = "activation_checkpointing_enable" if "activation_checkpointing_enable" in dir(model) else "gradient_checkpointing_enable"
    getattr(model, enable)({"use_reentrant": False})
    model(tokens, labels=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, want[name], rtol=1e-10, atol=1e-14), name


def test_hidden_states_and_attentions_can_be_asked_for() -> None:
    model = student()
    model.set_attn_implementation("eager")
    out = model(ids(1, 6), output_hidden_states=True, output_attentions=True, use_cache=False)
    assert len(out.hidden_states) == 5 and len(out.attentions) == 2


@pytest.mark.parametrize("name", TEACHERS)
@mixers
def test_saved_folder_loads_with_the_auto_class(mixer: str, name: str, tmp_path: Path) -> None:
    model = student(mixer, name, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"].startswith("llamba_")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert torch.equal(logits(again, ids(1, 9)), logits(model, ids(1, 9)))


@pytest.mark.parametrize(("mixer", "name"), [("mamba1", "llama-3.2"), ("mamba2", "mistral"), ("discrete_mamba2", "phi")])
def test_saved_bf16_folder_loads_alone_in_a_fresh_process(mixer: str, name: str, tmp_path: Path) -> None:
    student(mixer, name, dtype=torch.float32).to(torch.bfloat16).save_pretrained(tmp_path)
    want = logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids(1, 9))
    torch.save(want, tmp_path / "want.pt")
    script = (
        "import sys, torch, llamba\nfrom transformers import AutoModelForCausalLM\ntorch.set_num_threads(1)\n"
        "folder, rows = sys.argv[1], torch.tensor([list(map(int, sys.argv[2].split()))])\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)\n"
        "with torch.no_grad(): got = model(rows, use_cache=False).logits\n"
        "want = torch.load(folder + '/want.pt', weights_only=True)\n"
        "assert (got - want).abs().max() <= 0.02 * want.abs().max(), 'logits differ'\n"
        "wide = {n for n, p in model.named_parameters() if p.dtype == torch.float32}\n"
        "assert wide and all(n.endswith(('A_log', 'self_attn.D', 'dt_bias')) for n in wide), wide\n"
        "assert {p.dtype for n, p in model.named_parameters() if n not in wide} == {torch.bfloat16}\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path), " ".join(map(str, ids(1, 9)[0].tolist()))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={"PATH": "", "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr


def test_the_backbone_alone_and_other_dtypes(tmp_path: Path) -> None:
    model = student(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    backbone = AutoModel.from_pretrained(tmp_path)
    want = model.model(ids(1, 8), use_cache=False).last_hidden_state
    assert torch.equal(backbone(ids(1, 8), use_cache=False).last_hidden_state, want)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    mixer = half.model.layers[0].self_attn
    assert mixer.A_log.dtype == torch.float32 and mixer.in_proj.weight.dtype == torch.bfloat16
    assert torch.equal(mixer.A_log, model.model.layers[0].self_attn.A_log)


def test_the_live_configuration_does_not_point_at_the_teacher(tmp_path: Path) -> None:
    source = teacher(dtype=torch.float32)
    source.save_pretrained(tmp_path)
    model = convert(str(tmp_path))
    assert model.config.model_type == "llamba_llama" and model.config._name_or_path == ""
    assert model.config.architectures == ["LlamaHybridForCausalLM"] and model.config.auto_map == {}


def test_conversion_record_and_progressive_conversion() -> None:
    half = student("mamba2")
    assert half.conversion.kept == [1, 3] and set(half.conversion.layers) == {0, 2}
    sources = {origin.tensor: origin.source for origin in half.conversion.layers[0]}
    assert sources["in_proj.weight[C]"] == "q_proj.weight" and sources["out_proj.weight"] == "o_proj.weight"
    named = {name for name, _ in half.model.layers[0].self_attn.named_parameters()}
    assert {tensor.partition("[")[0] for tensor in sources} == named
    with torch.no_grad():
        for parameter in half.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)  # "training"
    quarter = convert(half, mixer="mamba2", attention=0.25)
    assert quarter.conversion.kept == [3] and set(quarter.conversion.layers) == {1}
    before, after = half.state_dict(), quarter.state_dict()
    for name, value in before.items():
        if not name.startswith("model.layers.1.self_attn"):
            assert torch.equal(after[name], value), name
    assert torch.equal(after["model.layers.1.self_attn.out_proj.weight"], before["model.layers.1.self_attn.o_proj.weight"])
    with pytest.raises(ValueError, match="recurrent in this model already"):
        convert(half, mixer="mamba2", attention=[0, 1])
    with pytest.raises(ValueError, match="must stay"):
        convert(half, mixer="mamba1", attention=0.25)


def test_the_source_is_left_as_it_was() -> None:
    source = teacher()
    before = {name: value.clone() for name, value in source.state_dict().items()}
    made = convert(source)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())


def test_fractions_keep_the_last_of_each_block_and_nest() -> None:
    assert kept_layers(0.5, 8) == [1, 3, 5, 7] and kept_layers(0.25, 8) == [3, 7] and kept_layers(0.125, 32) == [7, 15, 23, 31]
    assert kept_layers(0.75, 8) == [1, 2, 3, 5, 6, 7] and kept_layers(0.0, 8) == [] and kept_layers(1.0, 3) == [0, 1, 2]
    assert kept_layers(0.125, 28) == [7, 15, 23] and kept_layers(1 / 3, 6) == [2, 5] and kept_layers([3, 1], 4) == [1, 3]


@pytest.mark.parametrize("attention", [1.5, -0.1, [4], [0, 0], ["a"], [True], True, "half", None, [-1]])
def test_bad_attention_is_refused(attention) -> None:
    with pytest.raises(ValueError, match="student.attention must"):
        student_config(teacher().config, "mamba2", attention)


def test_bad_teachers_are_refused(tmp_path: Path) -> None:
    from transformers import GPT2Config

    GPT2Config().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="model_type must be one of llama, mistral, phi, qwen2, qwen3; got 'gpt2'"):
        convert(str(tmp_path / "gpt2"))
    teacher().config.save_pretrained(tmp_path / "empty")
    with pytest.raises(ValueError, match="must be a model folder with weights"):
        convert(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="student.mixer must be one of"):
        convert(teacher(), mixer="mamba9")
    with pytest.raises(ValueError, match="student.init must be one of"):
        convert(teacher(), init="best")
    with pytest.raises(ValueError, match="unknown mixer option"):
        convert(teacher(), options={"colour": 1})
