"""Trees of drafts: what comes out is the model's own, token for token and in distribution, and states are those of the path that stood."""

import itertools
import math
from collections.abc import Iterator
from statistics import NormalDist
from typing import Any

import pytest
import torch
from models import DELTA_RULES, STUDENTS, ids, rms_error, student, teacher
from test_speculative import DRAWS, NEW, PROMPT, SETTINGS, V, chi_square, draft_of, eight_tokens, exact_joint, noisy, plain, ragged
from torch import Tensor

from llamba.kernels.conv1d import causal_conv1d_span
from llamba.kernels.ssd import ssd, ssd_resume
from llamba.models import tree as module
from llamba.models.convert import convert
from llamba.models.tree import Tree, grow
from llamba.speculative import accept as rule
from llamba.speculative import generate
from llamba.speculative.choose import Choice
from llamba.speculative.rewind import Rewindable

CPU = torch.device("cpu")
WIDE, DEEP = (2, 1, 2), (3, 2, 1, 1)
# root -> 1, 2, 3; 1 -> 4, 5; 3 -> 6; 4 -> 7; 6 -> 8; the levels are not in order
ODD = Tree((-1, 0, 0, 0, 1, 1, 3, 4, 6, 0))


def test_a_tree_knows_its_paths_and_windows() -> None:
    assert grow((3, 2), CPU).parents == (-1, 0, 0, 0, 1, 1, 2, 2, 3, 3)
    assert ODD.path(7) == [1, 4, 7] and ODD.path(0) == [] and ODD.levels == [0, 1, 1, 1, 2, 2, 2, 3, 3, 1]
    assert [node for node, seen in enumerate(ODD.ancestors[8].tolist()) if seen] == [0, 3, 6, 8]
    windows = ODD.windows(4).tolist()  # node i in column i + 3
    assert windows[0] == [0, 1, 2, 3] and windows[1] == [1, 2, 3, 4] and windows[8] == [3, 6, 9, 11] and windows[9] == [1, 2, 3, 12]
    assert ODD.windows(1).tolist() == [[node] for node in range(10)]
    assert ODD.first(4) == grow((3,), CPU)


CASES = [*itertools.product((*STUDENTS, *DELTA_RULES, "gated_delta-window"), (0.5, 0.25, 0.0))]
FAST = (("mamba2", 0.5), ("mamba2-window", 0.5), ("gated_delta", 0.5), ("discrete_mamba2", 0.25), ("mamba2", 0.0), ("mamba1", 0.5))


@pytest.mark.filterwarnings("ignore:the draft has")
@pytest.mark.parametrize(("mixer", "attention"), [pytest.param(*case, marks=() if case in FAST else pytest.mark.slow) for case in CASES])
def test_ragged_batches_equal_plain_decoding_of_each_row(mixer: str, attention: float) -> None:
    """Prompts shorter than the convolution and a longer one; drafts that always, often and never agree; an end token on a path."""
    model = student(mixer, attention=attention)
    rows, batch, mask = ragged((9, 1, 2))
    want = [plain(model, row) for row in rows]
    end = want[0][10]
    for kind, shape in (("noisy", WIDE), ("noisy", DEEP), ("self", DEEP), ("adversarial", WIDE), ("llama", DEEP), ("hybrid", WIDE)):
        draft = draft_of(kind, model, mixer)
        got = generate(model, batch, attention_mask=mask, draft=draft, tree=shape, max_new_tokens=NEW, eos_token_id=None)
        assert got.new == want, (kind, shape)
        if kind in ("noisy", "self"):
            assert got.rounds < NEW - 3 and 0 < got.accepted < got.drafted
            cut = generate(model, batch, attention_mask=mask, draft=draft, tree=shape, max_new_tokens=NEW, eos_token_id=end)
            assert cut.new == [row[: row.index(end) + 1] if end in row else row for row in want], (kind, shape)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "llama-3.2"])
def test_pure_attention_and_windows(name: str) -> None:
    """A teacher is the target; Mistral's window (16) is shorter than the sequence. With "eager" the masks are added."""
    model = teacher(name)
    rows, batch, mask = ragged((30, 5))
    want = [plain(model, row, 24) for row in rows]
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        got = generate(model, batch, attention_mask=mask, draft=noisy(model), tree=(3, 2, 1, 1), max_new_tokens=24, eos_token_id=None)
        assert got.new == want and 0 < got.accepted < got.drafted


@pytest.mark.parametrize("mixer", ["mamba2", "mamba1"])
def test_a_chain_is_the_tree_with_one_child_each(mixer: str) -> None:
    model = student(mixer)
    _, batch, mask = ragged((9, 4))
    made = [
        generate(model, batch, attention_mask=mask, draft=noisy(model), max_new_tokens=NEW, eos_token_id=None, **how)
        for how in ({"tree": (1, 1, 1)}, {"lookahead": 3})
    ]
    assert made[0].new == made[1].new
    for count in ("rounds", "drafted", "accepted"):
        assert getattr(made[0], count) == getattr(made[1], count)


def test_of_equal_scores_the_first_child_is_the_one_that_plain_decoding_takes() -> None:
    flat = torch.zeros(2, 3, V)
    flat[0, 1, 5] = flat[0, 1, 6] = flat[1, 2, 2] = flat[1, 2, 7] = 1.0
    for count in (1, 3, V):
        tokens = Choice().pick_several(flat, count, torch.empty(2, 3 * count))[0].view(2, 3, count)
        assert torch.equal(tokens[..., 0], flat.argmax(-1))
        assert all(len(set(children)) == count for children in tokens.flatten(0, 1).tolist())


def test_a_model_as_its_own_draft_needs_the_rounds_of_a_chain_where_all_scores_are_equal() -> None:
    """With a token embedded as zeros and no attention layers all logits behind it are 0."""
    model, prompt = student("mamba2", attention=0.0), ids(9)
    with torch.no_grad():
        model.get_input_embeddings().weight[[0, plain(model, prompt)[5]]] = 0
    chain, tree = (
        generate(model, prompt[None], draft=model, max_new_tokens=NEW, eos_token_id=None, **how)
        for how in ({"lookahead": 3}, {"tree": (2, 1, 2)})
    )
    assert chain.new[0][-4:] == [0] * 4, "the prompt leads to the case"
    assert chain.new == tree.new and chain.rounds == tree.rounds == NEW // 4


def test_siblings_save_rounds() -> None:
    model, prompt = student("mamba2"), ids(1, 9)
    draft = noisy(model, 0.6)
    chain, tree = (
        generate(model, prompt, draft=draft, tree=shape, max_new_tokens=48, eos_token_id=None) for shape in ((1, 1, 1), (4, 2, 1))
    )
    assert chain.new == tree.new and tree.rounds < chain.rounds


def test_processors_see_the_path_before_each_node() -> None:
    from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

    model, prompt = student("mamba2"), ids(7)
    penalty: Any = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3)])
    want = plain(model, prompt, repetition_penalty=1.3)
    for draft in (noisy(model), model):
        got = generate(model, prompt[None], draft=draft, tree=(2, 2), max_new_tokens=NEW, eos_token_id=None, logits_processor=penalty)
        assert got.new[0] == want
    assert got.rounds == math.ceil(NEW / 3)  # its own draft agrees in all rounds: processors there see the same


# --- states -------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    "mixer",
    ["mamba2", "mamba2-window", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("discrete_mamba2", "mamba1", *DELTA_RULES))],
)
def test_a_random_walk_over_paths_of_trees_equals_reading_them_from_scratch(mixer: str, rounds: int = 100) -> None:
    """Random trees, read at once or in two parts; rows keep paths of their own. Logits and all states are compared at every round."""
    model, draw = student(mixer, attention=[1]), torch.Generator().manual_seed(3)
    reader = Rewindable(model, 512)
    kept = [[5, 6], [7]]
    reader.start(kept)
    reader.record()
    for round_ in range(rounds):
        count = int(torch.randint(1, 12, (), generator=draw))
        tree = Tree((-1, *(int(torch.randint(0, node, (), generator=draw)) for node in range(1, count))))
        tokens, part = ids(2, count, seed=round_), int(torch.randint(1, count + 1, (), generator=draw))
        logits = reader.read(tokens[:, :part], part, tree.first(part))
        if part == 1:  # as drafts do: the root stays in any case
            reader.pin()
        if part < count:
            logits = torch.cat((logits, reader.read(tokens[:, part:], count - part, tree)), 1)
        ends = torch.randint(0, count, (2,), generator=draw).tolist()
        paths = [[0, *tree.path(end)] for end in ends]
        for row, (end, path) in enumerate(zip(ends, paths, strict=True)):
            kept[row] = kept[row] + tokens[row, path].tolist()
            _same_as_from_scratch(model, kept[row], logits[row, end], round_)
        reader.keep(count, paths)
        if round_ % 20 < 15:
            reader.pin()
        for row in range(2):
            _same_states(model, reader, kept[row], row)
        if max(map(len, kept)) > 40:  # a new pair of rows; what was held before is garbage to them
            kept = [kept[0][-3:], kept[1][-1:]]
            reader = Rewindable(model, 512)
            reader.start(kept)
            reader.record()


def _same_as_from_scratch(model: Any, row: list[int], logits: Tensor, round_: int) -> None:
    assert rms_error(logits, model(torch.tensor([row]), use_cache=False).logits[0, -1]) < 1e-11, round_


def _same_states(model: Any, reader: Rewindable, tokens: list[int], row: int) -> None:
    fresh = model(torch.tensor([tokens]), use_cache=True).past_key_values
    assert reader.lengths[row] == len(tokens)
    for layer, want, block in zip(reader.cache.layers, fresh.layers, model.model.layers, strict=True):
        if layer in reader.recurrent:
            held = tuple(buffer[row : row + 1, : layer.counts[row]] for buffer in layer.held)
            state = layer.state if layer.state is None else layer.state[row : row + 1]
            got = block.self_attn._advance(held, None, state) if layer.counts[row] else state
            assert rms_error(got, want.state) < 1e-11
        else:
            assert rms_error(layer.keys[row, :, : len(tokens)], want.keys[0]) < 1e-11


@pytest.mark.parametrize("roots", [3, [0, 5]])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_dual_form_of_a_tree_equals_the_recurrence_on_every_path(roots: Any, scaled: bool, dtype: torch.dtype, bound: float) -> None:
    draw, asked = torch.Generator().manual_seed(0), 6
    B, S, H, G, P, N, M = 2, 16, 4, 2, 3, 5, len(ODD)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    x, b, c, state, skip = random(B, S, G, P), random(B, S, G, N), random(B, M, H, N), random(B, H, P, N), random(H)
    a, dt = -random(B, S, H).abs(), random(B, S, H).abs() if scaled else None
    starts = roots if isinstance(roots, list) else [roots] * B
    firsts = [root + M - asked for root in starts]
    slots = max(starts) + M
    got = ssd_resume(
        x[:, :slots], a[:, :slots], b[:, :slots], c[:, M - asked :], firsts=torch.tensor(firsts) if isinstance(roots, list) else firsts[0],
        dt=None if dt is None else dt[:, :slots], D=skip, state=state, ancestors=ODD.ancestors,
    )  # fmt: skip
    for row, node in itertools.product(range(B), range(M - asked, M)):
        path = [*range(starts[row]), *(starts[row] + step for step in (0, *ODD.path(node)))]
        own = [tensor[row : row + 1, path].double() for tensor in (x, a, b)]
        read = c[row, node].double().expand(1, len(path), H, N)
        strength = None if dt is None else dt[row : row + 1, path].double()
        want = ssd(*own, read, dt=strength, D=skip.double(), state=state[row : row + 1].double(), impl="sequential")[0][0, -1]
        assert rms_error(got[row, node - M + asked], want) < bound, (row, node)


@torch.no_grad()
@pytest.mark.parametrize("attention", [0.0, 0.5, 1.0])
def test_a_refusal_to_go_back_changes_nothing(attention: float) -> None:
    model = student(attention=attention)
    prompts = [ids(7).tolist(), ids(9).tolist()]
    reader = Rewindable(model, 64)
    reader.start(prompts)
    reader.record()
    reader.read(ids(2, 4, seed=1), 1)
    refused = [[1], [-1, 0], [99, 0]]
    for back in refused if attention == 1 else [*refused, [5, 0], [0, 5]]:
        with pytest.raises(ValueError, match=r"take"):
            reader.take_back(back)
    for tokens, paths in ((4, [[0, 2, 1], [0]]), (4, [[0, 4], [0]]), (99, [[0], [0]]), (4, [[0]])):
        with pytest.raises(ValueError, match=r"take|places to keep"):
            reader.keep(tokens, paths)
    got = reader.read(ids(2, 2, seed=2), 2)
    for row, prompt in enumerate(prompts):
        whole = torch.cat((torch.tensor(prompt), ids(2, 4, seed=1)[row], ids(2, 2, seed=2)[row]))
        assert rms_error(got[row], model(whole[None]).logits[0, -2:]) < 1e-11


def test_what_does_not_fit_a_tree_is_named() -> None:
    x, a, b, c = torch.zeros(1, 3, 2, 4), torch.zeros(1, 3, 4), torch.zeros(1, 3, 2, 4), torch.zeros(1, 2, 4, 4)
    with pytest.raises(ValueError, match="a row for each of the 2 tokens, got 1"):
        ssd_resume(x, a, b, c, firsts=1, ancestors=torch.ones(1, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"windows must have shape \[2, 4\], got \[2, 3\]"):
        causal_conv1d_span(torch.zeros(1, 5, 6), torch.zeros(6, 4), windows=torch.zeros(2, 3, dtype=torch.long))


@pytest.fixture
def forgotten_trees() -> Iterator[None]:
    """Trees that were made meanwhile are not kept for others."""
    yield
    for made in (module.grow, module._first, module._windows):
        made.cache_clear()


@pytest.mark.parametrize("what", ["ancestors", "windows", "depths", "path"])
def test_a_planted_corruption_is_caught(what: str, monkeypatch, forgotten_trees) -> None:
    """A node that takes its uncle for its parent, in each thing that is computed from the tree."""
    model, prompt = student("mamba2"), ids(1, 9)
    draft, want = noisy(model, 0.6), plain(student("mamba2"), ids(1, 9)[0], 32)
    assert generate(model, prompt, draft=draft, tree=(3, 2, 2), max_new_tokens=32, eos_token_id=None).new == [want]
    wrong = {
        "ancestors": lambda tree, old: old.roll(1, 0).tril() | torch.eye(len(tree)).bool(),
        "windows": lambda tree, old: old.sub((torch.arange(old.shape[1]) == old.shape[1] - 2).long()),
        "depths": lambda tree, old: old + (old > 1).long(),
        "path": lambda tree, old: [*old[:-1], old[-1] - 1] if len(old) > 1 else old,
    }[what]
    sound = Tree.__dict__[what]
    if what in ("ancestors", "depths"):
        monkeypatch.setattr(Tree, what, property(lambda tree: wrong(tree, sound.func(tree))))
    elif what == "windows":
        monkeypatch.setattr(Tree, what, lambda tree, width: wrong(tree, sound(tree, width)))
    else:
        monkeypatch.setattr(Tree, what, lambda tree, node: wrong(tree, sound(tree, node)))
    assert generate(model, prompt, draft=draft, tree=(3, 2, 2), max_new_tokens=32, eos_token_id=None).new != [want]


# --- sampling -----------------------------------------------------------------------------------------------------------------------


def tables(seed: int, spread: float) -> list[Tensor]:
    """Random distributions of the first, second and third token, given those before: [V], [V, V], [V, V, V]."""
    draw = torch.Generator().manual_seed(seed)
    return [(torch.randn(*[V] * (order + 1), generator=draw) * spread).softmax(-1) for order in range(3)]


def drawn_by_the_rule(branching: tuple[int, ...], p: list[Tensor], q: list[Tensor], seed: int) -> Tensor:
    """How often each continuation of three tokens came, of DRAWS; what a round leaves open is drawn from p."""
    noise, tree = torch.Generator().manual_seed(seed), grow(branching, CPU)
    choice, level, tokens, weights = Choice(temperature=1.0), [0], list[Tensor](), list[Tensor]()

    def behind(nodes: list[int], of: list[Tensor]) -> Tensor:
        """The distributions behind these nodes [DRAWS, len(nodes), V]."""
        drafted = torch.cat(tokens, 1) if tokens else torch.empty(DRAWS, 0, dtype=torch.long)
        return torch.stack([of[len(tree.path(n))][tuple(drafted[:, step - 1] for step in tree.path(n))].expand(DRAWS, V) for n in nodes], 1)

    for children in branching:
        token, weight = choice.pick_several(behind(level, q).log(), children, torch.rand(DRAWS, len(level) * children, generator=noise))
        tokens.append(token)
        weights.append(weight)
        level = [node for node, parent in enumerate(tree.parents) if parent in level]
    drafts = torch.cat(tokens, 1)
    uniform = torch.rand(DRAWS, len(tree), generator=noise)
    here, last = rule.accept_tree(behind(list(range(len(tree))), p), torch.cat(weights, 1), drafts, tree, uniform)
    rows = [
        [int(drafts[row, step - 1]) for step in tree.path(node)] + [token]
        for row, (node, token) in enumerate(zip(here.tolist(), last.tolist(), strict=True))
    ]
    counts, later = torch.zeros(V**3, dtype=torch.long), torch.rand(DRAWS, 3, generator=noise)
    for row, uniforms in zip(rows, later, strict=True):
        while len(row) < 3:
            row.append(int(rule.draw(p[len(row)][tuple(row)][None], uniforms[len(row), None])))
        counts[row[0] * V * V + row[1] * V + row[2]] += 1
    return counts


def joint_of(p: list[Tensor]) -> list[float]:
    exact = [table.double() for table in p]
    return (exact[0][:, None, None] * exact[1][:, :, None] * exact[2]).flatten().tolist()


def power(statistic: float, df: int, critical: float) -> float:
    """A low estimate of the power of the test against what gave this statistic."""
    shift = statistic - df - 3 * math.sqrt(2 * df + 4 * max(statistic - df, 0))
    return 1 - NormalDist(df + shift, math.sqrt(max(2 * (df + 2 * shift), 1.0))).cdf(critical)


@pytest.mark.parametrize("branching", [(3, 2), (8,)])
def test_the_rule_alone_draws_from_the_target(branching: tuple[int, ...], monkeypatch) -> None:
    """chi^2 at 0.001 against the product of the tables; it rejects a uniform residual, and one from which siblings are not taken."""
    p, q = tables(0, 1.0), tables(1, 1.5)
    statistic, df, critical = chi_square(drawn_by_the_rule(branching, p, q, 1), joint_of(p))
    assert statistic < critical, (statistic, df, critical)
    if branching == (8,):  # every token is tried
        return
    for wrong in (lambda target, draft: torch.ones_like(target), lambda target, draft: target):
        monkeypatch.setattr(rule, "residual", wrong)
        assert power(*chi_square(drawn_by_the_rule(branching, p, q, 2), joint_of(p))) > 0.99


@pytest.mark.parametrize(
    ("setting", "shape"),
    [pytest.param(*case, marks=pytest.mark.slow) for case in (("plain", (3, 2)), ("top_k", (6, 1)), ("top_p", (4, 2)))],
)
def test_joint_distribution_of_three_tokens_is_the_models_own(setting: str, shape: tuple[int, ...]) -> None:
    """With top_k = 4 and six children a node, two of them have nothing to be drawn from."""
    model, draft, settings = eight_tokens(0, "mamba2"), eight_tokens(1, None), SETTINGS[setting]
    joint = exact_joint(model, PROMPT, settings)
    counts, generator = torch.zeros(V**3, dtype=torch.long), torch.Generator().manual_seed(1)
    for _ in range(DRAWS // 4096):
        made = generate(
            model,
            PROMPT[None].expand(4096, -1),
            draft=draft,
            tree=shape,
            max_new_tokens=3,
            eos_token_id=None,
            generator=generator,
            **settings,
        )
        new = torch.tensor(made.new)
        counts += torch.bincount(new[:, 0] * V * V + new[:, 1] * V + new[:, 2], minlength=V**3)
    statistic, df, critical = chi_square(counts, joint)
    assert statistic < critical, (statistic, df, critical)


def test_the_rules_on_numbers_that_can_be_checked_by_hand() -> None:
    tree = grow((2, 1), CPU)  # root -> 1, 2; 1 -> 3; 2 -> 4
    best, drafts = torch.tensor([[7, 5, 8, 9, 9], [6, 5, 8, 9, 9], [4, 5, 8, 9, 9]]), torch.tensor([[6, 7, 5, 8]] * 3)
    assert [got.tolist() for got in rule.accept_tree_greedy(best, drafts, tree)] == [[4, 3, 0], [9, 9, 4]]
    p = torch.tensor([[0.1, 0.6, 0.3]]).expand(4, 5, 3)
    q = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]).expand(4, 4, 3)
    drafts = torch.tensor([[0, 2, 1, 1]] * 4)
    # child 0 stands for u < 0.1; else p = [0, 0.6, 0.3] / 0.9, and child 2, q = 0.5, stands for u < 2/3; else p = [0, 1/6, 0] / (1/6)
    noise = torch.tensor([[0.05, 0, 0, 0, 0.99], [0.2, 0.6, 0, 0.7, 0.0], [0.2, 0.6, 0, 0.5, 0.99], [0.2, 0.7, 0, 0, 0.99]])
    here, last = rule.accept_tree(p, q, drafts, tree, noise)
    # row 0: node 3 had nothing to be drawn from and falls; row 1: node 4 (q = 1) falls at 0.7, and p = [0.1, 0, 0.3] / 0.4
    assert here.tolist() == [1, 2, 4, 0] and last.tolist() == [2, 0, 2, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tree": ()}, r"tree must have a number of children for every depth, such as \(3, 2, 1\), each 1 to 101; got \(\)"),
        ({"tree": (2, 0)}, "each 1 to 101"),
        ({"tree": (2, 102)}, "each 1 to 101"),
        ({"tree": (4, 4, 2)}, r"at most 31 tokens \(the cache holds the last 32\); \(4, 4, 2\) has 52"),
        ({"tree": (2, 1), "draft": "lookup"}, "tree needs a draft model, .* got draft='lookup'"),
        ({"tree": (2, 1), "draft": None}, "tree needs a draft model"),
    ],
)
def test_bad_trees_are_one_clear_message(arguments: dict, message: str) -> None:
    model = student("mamba2")
    with pytest.raises(ValueError, match=message):
        generate(model, ids(1, 5), **{"draft": model, **arguments})


def test_all_mixers_of_the_ablations_take_trees() -> None:
    for mixer in ("low_rank", "toeplitz", "none"):
        model = convert(teacher(), mixer=mixer, attention=0.5, init="paper" if mixer != "none" else "attention")
        want = plain(model, ids(9), 12)
        got = generate(model, ids(9)[None], draft=noisy(model), tree=(2, 2, 1), max_new_tokens=12, eos_token_id=None)
        assert got.new == [want] and got.accepted, mixer
