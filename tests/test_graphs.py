"""Decoding in rounds of device work alone: the same tokens as plain decoding, and no look at the device between two mails."""

import json

import pytest
import torch
from models import ids, student, teacher
from test_speculative import PROMPT, SETTINGS, chi_square, draft_of, eight_tokens, exact_joint, noisy, plain, ragged, sample
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList, PreTrainedModel, RepetitionPenaltyLogitsProcessor
from triton_tools import needs_interpreter

from llamba.bench.decode import round_call, weight_bytes
from llamba.kernels.decode import mamba2_steps
from llamba.speculative import generate, graphs, steps
from llamba.speculative.graphs import Decoder
from llamba.speculative.sampling import Sampler

NEW = 12
CASES = [
    ("mamba2", 0.5),
    ("mamba2-window", 0.5),
    ("mamba2-window", 0.0),
    ("discrete_mamba2-window", 0.5),
    ("mamba2", 0.0),
    ("discrete_mamba2", 0.25),
    ("mamba1", 0.5),
]


def check_every_draft(model: PreTrainedModel, kinds: tuple[str, ...], mixer: str = "mamba2", new: int = NEW) -> None:
    """Rows of 9, 1 and 2 tokens with each draft, without an end token and with one inside a block; and without a draft."""
    rows, batch, mask = ragged((9, 1, 2))
    want = [plain(model, row, new) for row in rows]
    end = want[0][new - 4]
    cut = [row[: row.index(end) + 1] if end in row else row for row in want]
    options = {"attention_mask": mask, "max_new_tokens": new, "engine": "graphs"}
    for kind in kinds:
        draft = draft_of(kind, model, mixer)
        got = generate(model, batch, draft=draft, eos_token_id=None, lookahead=3, **options)
        assert got.new == want, kind
        assert got.accepted == got.drafted > 0 if kind == "self" else 0 <= got.accepted < got.drafted, kind
        assert generate(model, batch, draft=draft, eos_token_id=end, lookahead=4, **options).new == cut, kind
    assert generate(model, batch, eos_token_id=None, **options).new == want
    assert generate(model, batch, eos_token_id=[end, 1000], **options).new == cut


@pytest.mark.filterwarnings("ignore:the draft has")
@pytest.mark.parametrize(("mixer", "attention"), CASES)
def test_hybrids(mixer: str, attention: float) -> None:
    check_every_draft(student(mixer, attention=attention), ("llama", "hybrid", "self", "noisy"), mixer)


def test_pure_attention() -> None:
    check_every_draft(teacher(), ("self", "noisy"))


@pytest.mark.filterwarnings("ignore:the draft has")
@pytest.mark.parametrize("name", ["phi", "qwen3", pytest.param("llama-3.2", marks=pytest.mark.slow)])
def test_other_families(name: str) -> None:
    """Rotary angles of a part of a head, norms of queries and keys in attention and mixers, tied embeddings."""
    check_every_draft(student("mamba2", name), ("noisy",), new=8)


@pytest.mark.parametrize(
    ("mixer", "options"), [("mamba2", {}), pytest.param("mamba1", {"double_dt_bias": True, "block_gqa": True, "state": 4}, id="mamba1")]
)
def test_a_convolution_behind_the_repeat(mixer: str, options: dict) -> None:
    check_every_draft(student(mixer, options={"conv_after_repeat": True} | options), ("noisy",), mixer, new=8)


def test_attention_past_its_window() -> None:
    """Mistral's window (16) is shorter than the sequence, and than one of the prompts."""
    model = student("mamba2", "mistral")
    rows, batch, mask = ragged((30, 5))
    options = {"attention_mask": mask, "max_new_tokens": 30, "eos_token_id": None, "engine": "graphs"}
    want = [plain(model, row, 30) for row in rows]
    got = generate(model, batch, draft=noisy(model), **options)
    assert got.new == want and 0 < got.accepted < got.drafted
    assert generate(model, batch, **options).new == want


def test_the_number_of_drafts_may_change_from_round_to_round() -> None:
    model = student("mamba2")
    rows, batch, mask = ragged((9, 4))
    options = {"attention_mask": mask, "max_new_tokens": 30, "eos_token_id": None, "engine": "graphs"}
    got = generate(model, batch, draft=noisy(model), lookahead="auto", **options)
    assert got.new == [plain(model, row, 30) for row in rows]


def test_one_decoder_serves_many_prompts_and_hears_of_new_weights() -> None:
    """Same shapes: the same buffers (and on CUDA the same graphs), with nothing left of the last prompt."""
    model = student("mamba2")
    for seed in range(3):
        if seed == 2:
            with torch.no_grad():
                model.lm_head.weight.neg_()
        prompt = ids(7 - seed, seed=seed)
        got = generate(model, prompt[None], max_new_tokens=6, eos_token_id=None, engine="graphs")
        assert got.new == [plain(model, prompt, 6)]
        assert len(graphs._decoders[model]) == 1
    model.to(torch.float32)
    generate(model, prompt[None], max_new_tokens=6, eos_token_id=None, engine="graphs")
    assert len(graphs._decoders[model]) == 2, "weights elsewhere: another decoder"


def test_streaming_and_counts_are_those_of_the_eager_loop() -> None:
    model, prompt = student("mamba2"), ids(1, 7)

    class Heard(list):
        def put(self, value):
            self.extend(value.flatten().tolist())

        def end(self):
            self.append("end")

    heard, made = {}, {}
    for engine in ("eager", "graphs"):
        heard[engine] = Heard()
        options = {"draft": noisy(model), "lookahead": 3, "max_new_tokens": 16, "streamer": heard[engine], "engine": engine}
        made[engine] = generate(model, prompt, eos_token_id=None, **options)
    assert heard["graphs"] == heard["eager"] and torch.equal(made["graphs"].sequences, made["eager"].sequences)
    counts = {engine: (one.rounds, one.drafted, one.accepted) for engine, one in made.items()}
    assert counts["graphs"] == counts["eager"]


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["plain", "top_p", "top_k"])
def test_joint_distribution_of_three_tokens(setting: str) -> None:
    """chi^2 at 0.001 against enumeration, with drafts drawn from another model."""
    model, draft = eight_tokens(0, "mamba2"), eight_tokens(1, None)
    counts = sample(model, draft, PROMPT, SETTINGS[setting] | {"engine": "graphs"}, 1)
    statistic, df, critical = chi_square(counts, exact_joint(model, PROMPT, SETTINGS[setting]))
    assert statistic < critical, (statistic, df, critical)


def test_the_same_noise_draws_the_same_tokens_as_the_eager_loop() -> None:
    model, draft = eight_tokens(0, "mamba2"), eight_tokens(1, None)
    common = {"temperature": 1.3, "top_k": 5, "eos_token_id": None}
    for options, same in (({"draft": draft, "lookahead": 2, "max_new_tokens": 3}, 1), ({"max_new_tokens": 8}, 8)):
        for seed in range(8):
            made = [
                generate(model, PROMPT[None], generator=torch.Generator().manual_seed(seed), engine=engine, **common, **options).new[0]
                for engine in ("eager", "graphs")
            ]
            assert made[0][:same] == made[1][:same]


# --- what a graph can hold ------------------------------------------------------------------------------------------------------------

SAMPLING = Sampler(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01)


def fake_rounds(model: PreTrainedModel, draft: PreTrainedModel | None, sampler: Sampler) -> None:
    """Rounds on tensors without content: whoever asks for a number of theirs gets an error."""
    with torch.inference_mode(), FakeTensorMode(allow_non_fake_inputs=True):
        made = Decoder(model, draft, 2, 64, 2, sampler, 8)
        for part in made.round(2 if draft is not None else 0):
            part()


@pytest.mark.parametrize(
    ("kind", "sampler"), [("mamba2", SAMPLING), ("discrete_mamba2", Sampler()), ("mistral", Sampler()), ("attention", SAMPLING)]
)
def test_a_round_reads_nothing_on_the_host(kind: str, sampler: Sampler) -> None:
    models = {"mistral": lambda: student("mamba2", "mistral"), "attention": teacher}
    model = models.get(kind, lambda: student(kind))()
    for draft in (None, model):
        fake_rounds(model, draft, sampler)


@pytest.mark.parametrize("where", ["accept", "accept_greedy"])
def test_a_look_at_the_device_would_be_noticed(where: str, monkeypatch) -> None:
    rule = getattr(graphs, where)

    def looking(*arguments):
        stand, token = rule(*arguments)
        return stand + int(stand.max() < 0), token

    monkeypatch.setattr(graphs, where, looking)
    with pytest.raises(DataDependentOutputException):
        fake_rounds(student("mamba2"), None, SAMPLING if where == "accept" else Sampler())


@needs_interpreter
def test_the_triton_kernel_decodes_the_same_tokens(monkeypatch) -> None:
    """Without Triton, with it, and by the eager loop, in fp32."""
    model, prompt = student("mamba2", attention=[1, 2, 3], dtype=torch.float32), ids(1, 4)
    options = {"max_new_tokens": 6, "eos_token_id": None, "draft": noisy(model), "lookahead": 2}
    want = generate(model, prompt, engine="eager", **options).new
    assert generate(model, prompt, engine="graphs", **options).new == want
    launches = []

    def in_triton(*arguments, **named):
        launches.append(1)
        return mamba2_steps(*arguments, impl="triton", **named)

    monkeypatch.setattr(steps, "mamba2_steps", in_triton)
    assert generate(model, prompt, engine="graphs", **options).new == want and launches


# --- bad input ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mixer", "arguments", "message"),
    [
        ("mamba2", {"draft": "lookup"}, "cannot serve: the draft must be a model"),
        ("mamba2", {"logits_processor": LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3)])}, "look at every token on the host"),
        ("low_rank", {}, "of the model: its mixer LowRank has no decode kernel"),
        ("mamba2", {"engine": "fast"}, "engine must be one of auto, eager, graphs; got 'fast'"),
    ],
)
def test_what_graphs_cannot_serve_is_one_clear_message(mixer: str, arguments: dict, message: str) -> None:
    model = student(mixer)
    with pytest.raises(ValueError, match=message):
        generate(model, ids(1, 5), **{"engine": "graphs", "max_new_tokens": 2, **arguments})
    if "engine" not in arguments:
        assert len(generate(model, ids(1, 5), **{"max_new_tokens": 2, "eos_token_id": None, **arguments}).new[0]) == 2, "auto serves it"
        assert model not in graphs._decoders


def test_a_text_that_overflows_the_static_cache_is_refused() -> None:
    model = student("mamba2")
    with torch.inference_mode():
        made = Decoder(model, None, 1, 16, 0, Sampler(), 8)
        with pytest.raises(ValueError, match="the static cache has 16 slots a row; prompt, new tokens and a round need 20"):
            made.start(model, None, [[5] * 10], 10, set())


def test_the_bench_of_decoding_starts(tmp_path, capsys) -> None:
    from llamba.cli import main

    rows = tmp_path / "rows.jsonl"
    main("bench decode --device cpu --shrink 32 --dtype float32 --tokens 4 --repeats 1".split() + ["--out", str(rows)])
    said, row = capsys.readouterr().out, json.loads(rows.read_text())
    assert "of 5 tokens" in said and row["bench"] == "decode" and row["tokens_per_second"] > 0 < row["verify_ms"]


def test_the_bench_of_speculation_measures_rounds_of_this_engine(monkeypatch) -> None:
    """On CUDA both sides and the costs v and c come from graphs; here they are made to."""
    from llamba.bench import speculative as bench

    model, made, prompt = student("mamba2"), [], ids(6).tolist()
    monkeypatch.setattr(bench, "round_call", lambda *arguments: made.append(arguments) or round_call(*arguments))
    seconds = bench.step_seconds({"one": (model, 1, False), "three": (model, 3, True)}, prompt, 2, "graphs")
    assert seconds["one"] > 0 < seconds["three"] and made == [(model, prompt, 0, 4), (model, prompt, 2, 4)]
    assert bench.step_seconds({"one": (model, 1, False)}, prompt, 2)["one"] > 0 and len(made) == 2, "auto is eager on a CPU"


def test_the_bytes_of_a_token_are_counted() -> None:
    """All weights but the embedding, and one row of that; a head that is the embedding is read whole."""
    config = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    layer, norm, table = 4 * 16 * 16 + 3 * 16 * 20 + 2 * 16, 16, 50 * 16
    for tied in (False, True):
        model = LlamaForCausalLM(LlamaConfig(**config, num_key_value_heads=2, tie_word_embeddings=tied))
        assert weight_bytes(model) == 4 * (layer + norm + table + (0 if tied else 16))
