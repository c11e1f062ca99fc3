"""Speculative decoding: what comes out is the model's own, token for token and in distribution, whatever is drafted."""

import copy
import itertools
import math
from statistics import NormalDist
from typing import Any

import pytest
import torch
import transformers
from models import LATER, SHAPE, STUDENTS, ids, student, teacher
from packaging.version import Version
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    MambaConfig,
    MambaForCausalLM,
    MaxLengthCriteria,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
)

from llamba.models.convert import convert
from llamba.speculative import Auto, Lookup, generate
from llamba.speculative import accept as rule
from llamba.speculative.lookahead import MEMORY
from llamba.speculative.proposers import Proposal
from llamba.speculative.sampling import Sampler

NEW = 16
DRAFTS = ("llama", "hybrid", "self", "noisy", "adversarial", "lookup")


def noisy(model: PreTrainedModel, amount: float = 0.3) -> PreTrainedModel:
    """A copy that often, but not always, agrees."""
    made, draw = copy.deepcopy(model), torch.Generator().manual_seed(5)
    with torch.no_grad():
        weight = made.lm_head.weight
        weight.add_(torch.randn(weight.shape, generator=draw).to(weight.dtype) * amount * weight.std())
    return made


def opposed(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that proposes what the model likes least."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        made.lm_head.weight.neg_()
    return made


def draft_of(kind: str, model: PreTrainedModel, mixer: str = "mamba2"):
    """A draft of each kind for a model."""
    makers = {
        "llama": teacher, "hybrid": lambda: student(mixer, attention=0.0, seed=7), "self": lambda: model, "noisy": lambda: noisy(model),
        "adversarial": lambda: opposed(model), "lookup": lambda: "lookup",
    }  # fmt: skip
    return makers[kind]()


def plain(model: PreTrainedModel, row: Tensor, new: int = NEW, **more) -> list[int]:
    """What transformers' own greedy decoding of one row adds."""
    more = {"eos_token_id": None, "pad_token_id": 0, **more}
    out = model.generate(row[None], attention_mask=torch.ones_like(row[None]), max_new_tokens=new, do_sample=False, **more)
    return out[0, len(row) :].tolist()


def ragged(lengths: tuple[int, ...]) -> tuple[list[Tensor], Tensor, Tensor]:
    """Rows of these lengths, and the left-padded batch of them with its mask."""
    rows = [ids(length, seed=length) for length in lengths]
    batch, mask = torch.zeros(len(rows), max(lengths), dtype=torch.long), torch.zeros(len(rows), max(lengths), dtype=torch.long)
    for number, row in enumerate(rows):
        batch[number, len(batch[0]) - len(row) :], mask[number, len(batch[0]) - len(row) :] = row, 1
    return rows, batch, mask


CASES = list(itertools.product((*STUDENTS, *LATER, "gated_delta-window"), (0.5, 0.25, 0.0)))
FAST = (("mamba2", 0.5), ("mamba2-window", 0.5), ("kda", 0.25), ("discrete_mamba2", 0.25), ("mamba1", 0.0))
every_case = pytest.mark.parametrize(
    ("mixer", "attention"), [pytest.param(*case, marks=() if case in FAST else pytest.mark.slow) for case in CASES]
)


@pytest.mark.filterwarnings("ignore:the draft has")
@every_case
def test_ragged_batches_equal_plain_decoding_of_each_row(mixer: str, attention: float) -> None:
    """Prompts shorter than the convolution (1 and 2 tokens) and a longer one; every kind of draft; an end token inside a block."""
    model = student(mixer, attention=attention)
    rows, batch, mask = ragged((9, 1, 2))
    want = [plain(model, row) for row in rows]
    end = want[0][10]  # ends the first row inside a block
    for kind in DRAFTS:
        draft = draft_of(kind, model, mixer)
        got = generate(model, batch, attention_mask=mask, draft=draft, max_new_tokens=NEW, eos_token_id=None)
        assert got.new == want, kind
        assert 0 < got.accepted < got.drafted if kind == "noisy" else got.accepted == {"self": got.drafted}.get(kind, got.accepted), kind
        if kind in ("noisy", "self"):  # an end token inside a block: what stood behind it does not count
            cut = generate(model, batch, attention_mask=mask, draft=draft, max_new_tokens=NEW, eos_token_id=end, lookahead=7)
            assert cut.new == [row[: row.index(end) + 1] if end in row else row for row in want], kind
            assert cut.accepted <= cut.tokens, kind
    assert generate(model, batch, attention_mask=mask, max_new_tokens=NEW, eos_token_id=None).new == want


@pytest.mark.filterwarnings("ignore:the draft has")
@every_case
def test_hugging_faces_assisted_generation_equals_plain(mixer: str, attention: float) -> None:
    model, prompt = student(mixer, attention=attention), ids(6)
    want = plain(model, prompt)
    for kind in DRAFTS:
        draft = draft_of(kind, model, mixer)
        more = {"prompt_lookup_num_tokens": 3} if isinstance(draft, str) else {"assistant_model": draft}
        assert plain(model, prompt, **more) == want, kind
        assert plain(model, prompt[:2], **more) == plain(model, prompt[:2]), kind
        assert plain(model, prompt, eos_token_id=want[7], **more) == want[: want.index(want[7]) + 1], kind


@pytest.mark.filterwarnings("ignore:the draft has")
@pytest.mark.parametrize("attention", [0.0, 0.5])
def test_hugging_faces_assisted_generation_goes_on_behind_a_filled_cache(attention: float) -> None:
    """transformers' own loop reads the whole text again, with plain Llama too."""
    model, draft, text = student(attention=attention), student(attention=0.0), ids(1, 19)
    model.generation_config.eos_token_id = None
    more = {"max_new_tokens": 16, "do_sample": False, "attention_mask": torch.ones_like(text), "pad_token_id": 0}
    want = model.generate(text, **more)
    ways: list[dict[str, Any]] = [{}, {"assistant_model": draft}, {"assistant_model": teacher()}, {"prompt_lookup_num_tokens": 3}]
    for seen in (1, 14, 18):
        for way in ways:
            with torch.no_grad():
                cache = model(text[:, :seen]).past_key_values
            assert torch.equal(model.generate(text, past_key_values=cache, **more, **way), want), (seen, way)
    with torch.no_grad():
        cache = model(text).past_key_values
    for way in ways:
        with pytest.raises(ValueError, match="the cache has read 19 tokens and the prompt has 19; pass all that was read and at least one"):
            model.generate(text, past_key_values=cache, **more, **way)
    new, mask = ids(1, 22, seed=1), torch.ones(1, 41, dtype=torch.long)
    whole = model.generate(torch.cat((text, new), 1), **more | {"attention_mask": mask})
    got = model.generate(new, past_key_values=cache, **more | {"attention_mask": mask})  # the new tokens alone
    assert torch.equal(got[:, 22:], whole[:, 41:])
    with torch.no_grad():
        cache = model(text).past_key_values
    with pytest.raises(ValueError, match="needs the whole text; got 22 tokens and a mask of 41"):
        model.generate(new, past_key_values=cache, assistant_model=draft, **more | {"attention_mask": mask})


def test_attention_past_its_window_goes_back_too() -> None:
    """Mistral's window (16) is shorter than the sequence."""
    model = student("mamba2", "mistral")
    rows, batch, mask = ragged((30, 5))
    want = [plain(model, row, 40) for row in rows]
    draft = noisy(model)
    got = generate(model, batch, attention_mask=mask, draft=draft, max_new_tokens=40, eos_token_id=None)
    assert got.new == want and 0 < got.accepted < got.drafted
    assert plain(model, rows[1], 40, prompt_lookup_num_tokens=4) == want[1]


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.18"), reason="transformers 5.17 fails there with its own models too")
def test_attention_past_its_window_in_hugging_faces_assisted_generation() -> None:
    model, prompt = student("mamba2", "mistral"), ids(30)
    assert plain(model, prompt, 40, assistant_model=noisy(model)) == plain(model, prompt, 40)


@pytest.mark.parametrize("name", ["phi", "qwen2", "qwen3", "llama-3.2"])
def test_other_families(name: str) -> None:
    model = student("mamba2", name)
    rows, batch, mask = ragged((9, 4))
    want = [plain(model, row, 10) for row in rows]
    assert generate(model, batch, attention_mask=mask, draft=noisy(model), max_new_tokens=10, eos_token_id=None).new == want


def test_eager_attention_takes_the_same_masks() -> None:
    model = student("mamba2")
    rows, batch, mask = ragged((9, 4))
    want = [plain(model, row, 10) for row in rows]
    model.set_attn_implementation("eager")
    assert generate(model, batch, attention_mask=mask, draft="lookup", max_new_tokens=10, eos_token_id=None).new == want


def first_difference(model: PreTrainedModel, prompt: Tensor, got: list[int], want: list[int]) -> float | None:
    """None if equal; else plain decoding's gap between its top two tokens where they part (infinite for a token not among them)."""
    place = next((i for i, pair in enumerate(zip(got, want, strict=True)) if pair[0] != pair[1]), None)
    if place is None:
        return None
    with torch.no_grad():
        logits = model(torch.cat((prompt, torch.tensor(want[:place], dtype=torch.long)))[None], use_cache=False).logits[0, -1].float()
    top = logits.topk(2)
    return (top.values[0] - top.values[1]).item() if got[place] in top.indices.tolist() else math.inf


def test_first_difference_knows_a_near_tie_from_another_token() -> None:
    model, prompt = student("mamba2"), ids(6)
    want = plain(model, prompt, 3)
    logits = model(torch.cat((prompt, torch.tensor(want[:1])))[None]).logits[0, -1]
    best, second, third = logits.topk(3).indices.tolist()
    assert best == want[1] and first_difference(model, prompt, want, want) is None
    assert first_difference(model, prompt, [want[0], second, 7], want) == pytest.approx((logits[best] - logits[second]).item(), rel=1e-5)
    assert first_difference(model, prompt, [want[0], third, 7], want) == math.inf


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_lower_precision_differs_only_at_near_ties(dtype: torch.dtype, bound: float, record_property) -> None:
    """Of 12 runs of 40 tokens (3 prompts, 4 drafts); the number of differences is reported as `differences` (junit), and small."""
    model = student("mamba2", dtype=torch.float32).to(dtype)
    gaps = []
    for seed in range(3):
        prompt = ids(8, seed=seed)
        want = generate(model, prompt[None], max_new_tokens=40, eos_token_id=None).new[0]
        for kind in ("noisy", "self", "adversarial", "lookup"):
            got = generate(model, prompt[None], draft=draft_of(kind, model), max_new_tokens=40, eos_token_id=None).new[0]
            gaps.append(first_difference(model, prompt, got, want))
    different = [gap for gap in gaps if gap is not None]
    record_property("differences", len(different))
    print(f"{dtype}: {len(different)} of {len(gaps)} runs differ, at gaps {different}")
    assert all(gap < bound for gap in different)


# --- sampling -----------------------------------------------------------------------------------------------------------------------

V, DRAWS, AT_ONCE = 8, 20_480, 4_096
SETTINGS = {
    "plain": {"temperature": 1.0}, "temperature": {"temperature": 0.6}, "top_k": {"temperature": 1.3, "top_k": 4},
    "top_p": {"temperature": 0.8, "top_p": 0.8}, "min_p": {"temperature": 1.0, "min_p": 0.2},
}  # fmt: skip


def eight_tokens(seed: int, mixer: str | None) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(**{**SHAPE, "vocab_size": V, "num_hidden_layers": 2, "hidden_size": 16}, num_key_value_heads=2)
    made = LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(4 if weight.ndim == 2 else 1)
        made.lm_head.weight.mul_(2.5)
    return made.eval() if mixer is None else convert(made, mixer=mixer, attention=0.5, init="paper")


def allowed(p: list[float], temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> list[float]:
    """The distribution after temperature and limits, from log-probabilities, one number at a time."""
    weights = [math.exp(value / temperature) for value in p]
    weights = [w / sum(weights) for w in weights]
    order = sorted(range(len(p)), key=lambda i: -weights[i])
    keep = set(order[: top_k or len(order)])
    inside = sum(weights[i] for i in keep)
    total = 0.0
    for i in [i for i in order if i in keep]:
        if total / inside >= top_p:
            keep.discard(i)
        total += weights[i]
    keep = {i for i in keep if weights[i] >= min_p * max(weights)}
    return [weights[i] / sum(weights[j] for j in keep) if i in keep else 0.0 for i in range(len(p))]


def exact_joint(model: PreTrainedModel, prompt: Tensor, settings: dict) -> list[float]:
    """Probability of each of the 512 continuations of three tokens."""

    def after(*tokens: int) -> list[float]:
        with torch.no_grad():
            row = torch.cat((prompt, torch.tensor(tokens, dtype=torch.long)))[None]
            return allowed(model(row, use_cache=False).logits[0, -1].double().log_softmax(-1).tolist(), **settings)

    first = after()
    second = {a: after(a) for a in range(V)}
    third = {(a, b): after(a, b) for a in range(V) for b in range(V)}
    return [first[a] * second[a][b] * third[a, b][c] for a, b, c in itertools.product(range(V), repeat=3)]


def chi_square(counts: Tensor, joint: list[float]) -> tuple[float, int, float]:
    """Statistic, degrees of freedom and the critical value at 0.001; cells that expect fewer than 5 draws are pooled."""
    expected = torch.tensor(joint, dtype=torch.float64) * counts.sum()
    assert int(counts[expected == 0].sum()) == 0, "a token that the limits forbid was drawn"
    small = expected < 5
    want = torch.cat((expected[~small], expected[small].sum()[None]))
    got = torch.cat((counts[~small], counts[small].sum()[None])).double()
    want, got = want[want > 0], got[want > 0]
    df = len(want) - 1
    critical = df * (1 - 2 / (9 * df) + NormalDist().inv_cdf(0.999) * math.sqrt(2 / (9 * df))) ** 3  # Wilson and Hilferty
    return ((got - want) ** 2 / want).sum().item(), df, critical


def sample(model: PreTrainedModel, draft, prompt: Tensor, settings: dict, seed: int) -> Tensor:
    """How often each continuation of three tokens came, of DRAWS."""
    counts, generator = torch.zeros(V**3, dtype=torch.long), torch.Generator().manual_seed(seed)
    batch = prompt[None].expand(AT_ONCE, -1)
    for _ in range(DRAWS // AT_ONCE):
        made = generate(model, batch, draft=draft, lookahead=2, max_new_tokens=3, eos_token_id=None, generator=generator, **settings)
        new = torch.tensor(made.new)
        counts += torch.bincount(new[:, 0] * V * V + new[:, 1] * V + new[:, 2], minlength=V**3)
    return counts


PROMPT = torch.tensor([3, 5, 6, 3, 5])


@pytest.mark.parametrize(
    "setting", [pytest.param(name, marks=pytest.mark.slow if name in ("temperature", "min_p") else ()) for name in SETTINGS]
)
def test_joint_distribution_of_three_tokens_is_the_models_own(setting: str, monkeypatch) -> None:
    """chi^2 at 0.001 against enumeration; with a uniform residual the same test rejects, with power of at least 0.99."""
    model, draft, settings = eight_tokens(0, "mamba2"), eight_tokens(1, None), SETTINGS[setting]
    joint = exact_joint(model, PROMPT, settings)
    statistic, df, critical = chi_square(sample(model, draft, PROMPT, settings, 1), joint)
    assert statistic < critical, (statistic, df, critical)
    if setting == "plain":
        monkeypatch.setattr(rule, "residual", lambda target, draft: torch.ones_like(target))
        wrong, df, critical = chi_square(sample(model, draft, PROMPT, settings, 2), joint)
        shift = wrong - df - 3 * math.sqrt(2 * df + 4 * max(wrong - df, 0))  # a low estimate of the non-centrality
        assert NormalDist(df + shift, math.sqrt(2 * (df + 2 * shift))).cdf(critical) < 0.01


def test_joint_distribution_with_drafts_that_are_certain() -> None:
    """Lookup drafts, and a greedy draft: their distribution is a single token."""
    model, settings = eight_tokens(0, "mamba1"), SETTINGS["plain"]
    joint = exact_joint(model, PROMPT, settings)

    class Certain(Lookup):
        def propose(self, rows, count, noise):
            counts = [number % (count + 1) for number in range(len(rows))]  # of every length, 0 too
            return Proposal(torch.full((len(rows), count), joint.index(max(joint)) // V**2), counts, None)

    for draft in ("lookup", Certain()):
        statistic, df, critical = chi_square(sample(model, draft, PROMPT, settings, 3), joint)
        assert statistic < critical, (draft, statistic, df, critical)


def test_the_rule_on_numbers_that_can_be_checked_by_hand() -> None:
    p = torch.tensor([[[0.5, 0.5, 0.0], [0.2, 0.3, 0.5], [0.0, 0.0, 1.0]]]).expand(4, 3, 3)
    q = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]]]).expand(4, 2, 3)
    drafts = torch.tensor([[0, 1]] * 4)
    noise = torch.tensor([[0.4, 0.5, 0.9], [0.6, 0.0, 0.0], [0.4, 0.7, 0.99], [0.4, 0.5, 0.0]])
    counts = torch.tensor([2, 2, 2, 1])
    stand, token = rule.accept(p, q, drafts, counts, noise)
    assert stand.tolist() == [2, 0, 1, 1]
    assert token.tolist() == [2, 1, 0, 0]  # bonus; max(p - q, 0) = [0, 0.5, 0]; [0.2, 0, 0]; row 4 drafted one token: drawn from p_1
    assert rule.accept_greedy(torch.tensor([[5, 6, 7]]), torch.tensor([[5, 9]]), torch.tensor([2])) == (1, 6)
    zero = torch.tensor([[0.0, 0.0, 1.0]])
    assert rule.draw(zero, torch.tensor([0.0])).item() == 2 and rule.draw(zero.flip(-1), torch.tensor([1 - 2**-53])).item() == 0
    assert torch.equal(rule.residual(zero, zero), zero)
    certain = rule.accept(p[:1], None, torch.tensor([[2, 0]]), torch.tensor([2]), torch.tensor([[0.0, 0.0, 0.9]]))
    assert certain[0].tolist() == [0] and certain[1].tolist() == [1]  # a draft of probability 0 never stands, not even at u = 0


# --- the rest of generate -------------------------------------------------------------------------------------------------------------


class Heard:
    """A streamer that remembers."""

    def __init__(self) -> None:
        self.tokens, self.ended = [], 0

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended += 1


def test_streaming_processors_and_stopping_criteria_are_those_of_plain_decoding() -> None:
    model, prompt = student("mamba2"), ids(7)
    penalty = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3)])
    want = plain(model, prompt, repetition_penalty=1.3)
    heard = Heard()
    for draft in (noisy(model), "lookup", None):
        got = generate(model, prompt[None], draft=draft, max_new_tokens=NEW, eos_token_id=None, logits_processor=penalty, streamer=heard)
        assert got.new[0] == want
        assert torch.equal(got.sequences[0], torch.cat((prompt, torch.tensor(want))))
        stop = StoppingCriteriaList([MaxLengthCriteria(len(prompt) + 8)])
        assert generate(model, prompt[None], draft=draft, logits_processor=penalty, stopping_criteria=stop).new[0] == want[:8]
    assert heard.tokens == (prompt.tolist() + want) * 3 and heard.ended == 3


def test_the_padding_and_the_counts_of_a_generation() -> None:
    model = student("mamba2")
    _, batch, mask = ragged((5, 3))
    want = generate(model, batch, attention_mask=mask, max_new_tokens=9, eos_token_id=None)
    end = want.new[0][3]
    got = generate(model, batch, attention_mask=mask, draft=model, max_new_tokens=9, eos_token_id=end)
    longest = max(map(len, got.new))
    assert got.sequences.shape == (2, 5 + longest) and got.tokens == sum(map(len, got.new)) and got.rounds < want.rounds == 9
    for row, new in enumerate(got.new):
        assert got.sequences[row, 5:].tolist() == new + [0] * (longest - len(new))
    assert 0 < got.acceptance <= 1 and "accepted" in str(got) and "accepted" not in str(want)


@pytest.mark.parametrize(("rate", "slope"), [(0.9, 0.05), (0.7, 0.1), (0.2, 0.6)])
def test_auto_lookahead_finds_the_fastest_number(rate: float, slope: float) -> None:
    """Within 5 % of the best fixed number, by equation 1 of Leviathan et al., though every tenth round is held up by other work."""

    def speed(count: int) -> float:
        return (1 - rate ** (count + 1)) / (1 - rate) / (1 + slope * count)

    auto, draw, counts = Auto(), torch.Generator().manual_seed(0), []
    for number in range(300):
        counts.append(auto.next())
        stood = int((torch.rand(counts[-1], generator=draw) < rate).long().cumprod(0).sum()) if counts[-1] else 0
        auto.learn(counts[-1], [stood], [counts[-1]], (1.0 + slope * counts[-1]) * (10 if number % 10 == 0 else 1))
    late = [speed(count) for count in counts[100:]]
    assert sum(late) / len(late) > 0.95 * max(map(speed, range(13)))


def test_auto_lookahead_learns_what_comes_in_short_answers() -> None:
    """All drafts stand until a text of six tokens ends: five are worth drafting, and no more, which no single rate can tell."""
    auto = Auto()
    for _ in range(100):
        count = auto.next()
        auto.learn(count, [min(count, 5)], [count], 1 + 0.2 * count)
    assert auto.next() == 5


class Noted(Auto):
    """Notes how many tokens each round drafted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.counts: list[int] = []

    def learn(self, count: int, accepted: list[int], drafted: list[int], seconds: float) -> None:
        self.counts.append(count)
        super().learn(count, accepted, drafted, seconds)


def test_auto_lookahead_goes_on_learning_over_calls() -> None:
    model, auto, rounds = student("mamba2"), Noted(), 0
    for seed in range(3):
        more = {"max_new_tokens": 9, "eos_token_id": None}
        got = generate(model, ids(1, 5, seed=seed), draft=noisy(model), lookahead=auto, **more)
        assert got.new == generate(model, ids(1, 5, seed=seed), **more).new
        rounds += got.rounds
        assert len(auto.counts) == rounds and len(auto.trials) == max(3 - rounds, 0)
    drafted = [count > 0 for count in auto.counts]
    assert auto.counts[0] == 4 and rounds > 3
    assert auto.offered[0] == pytest.approx(sum(MEMORY**age for age, some in enumerate(reversed(drafted)) if some))


def test_lookup_copies_what_followed_the_newest_longest_match() -> None:
    lookup = Lookup(longest=2)
    row = [5, 6, 7, 8, 6, 9, 5, 6]
    lookup.start([row])
    assert lookup.propose([row], 3, torch.empty(1, 3)).tokens.tolist() == [[7, 8, 6]]  # behind [5, 6], not behind the newer [6]
    row += [9]
    assert lookup.propose([row], 2, torch.empty(1, 2)).tokens.tolist() == [[5, 6]]  # [6, 9] at its first place
    assert lookup.propose([[1, 2]], 2, torch.empty(1, 2)).counts == [0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lookahead": 0}, "lookahead must be 1 to 31"),
        ({"lookahead": 32}, "the cache holds the last 32 tokens"),
        ({"lookahead": "fast"}, "lookahead must be"),
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_new_tokens": 600}, "fit the model's context of 512 tokens; they need 605"),
        ({"draft": "n-gram"}, 'draft must be a loaded model, "lookup" or None'),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 0]])}, "padding must stand on the left"),
    ],
)
def test_bad_arguments_are_one_clear_message(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(student("mamba2"), ids(1, 5), **arguments)


def test_drafts_that_cannot_serve_are_refused_by_name() -> None:
    model, prompt = student("mamba2"), ids(1, 5)
    foreign = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "vocab_size": 40}, num_key_value_heads=2))
    with pytest.raises(ValueError, match="must share a vocabulary; got 101 and 40 tokens; with two tokenizers use model.generate"):
        generate(model, prompt, draft=foreign)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=101, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(ValueError, match="that of MambaForCausalLM cannot"):
        generate(model, prompt, draft=mamba)
    with pytest.raises(ValueError, match="that of MambaForCausalLM cannot"):
        model.generate(prompt, assistant_model=mamba, attention_mask=torch.ones_like(prompt), max_new_tokens=5)
    larger = student("mamba2", attention=0.0)
    with pytest.warns(UserWarning, match="the draft has .* parameters, more than the target's"):
        generate(model, prompt, draft=larger, max_new_tokens=2)
    with pytest.warns(UserWarning, match="the draft has .* parameters, more than the target's"):
        model.generate(prompt, assistant_model=larger, attention_mask=torch.ones_like(prompt), max_new_tokens=2, eos_token_id=None)


def test_hugging_faces_loop_may_ask_for_more_than_can_be_taken_back() -> None:
    """40 copied tokens at once, of which few stand."""
    model, prompt = student("mamba2"), ids(12).repeat(5)
    assert plain(model, prompt, 30, prompt_lookup_num_tokens=40, max_matching_ngram_size=1) == plain(model, prompt, 30)


def test_without_attention_there_is_no_context_to_overflow() -> None:
    assert len(generate(student("mamba2", attention=0.0), ids(1, 505), max_new_tokens=20, eos_token_id=None).new[0]) == 20


def test_choice_leaves_what_needs_no_warping() -> None:
    scores = torch.randn(2, 3, 7, dtype=torch.float64)
    assert torch.allclose(Sampler(temperature=1.0).probabilities(scores), scores.softmax(-1))
    assert Sampler(temperature=1.0, top_k=2).probabilities(scores).count_nonzero(-1).unique().tolist() == [2]
