"""Teachers that count other tokens: spans of text against a brute force over bytes, their loss against whole logits, and training."""

import json
import math
import random
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from llamba.data.batches import Rows, collate
from llamba.data.spans import NONE, Paired, Pairing, boundaries, common_spans
from llamba.data.tokens import StageData, tokenize
from llamba.models.convert import convert
from llamba.running import preflight
from llamba.running import run as running
from llamba.running.plan import plan
from llamba.settings import Data, Distill, PseudoLabel, Recipe, Student
from llamba.stages import distill
from llamba.training.losses import Aligned, head_sums, span_divergence, span_sums

ROOT = Path(__file__).parent.parent
TEACHER = ROOT / "recipes/tiny/teacher"
BYTES = {character: byte for byte, character in bytes_to_unicode().items()}
SHORT = dict(batch=4, micro_batch=2, steps=2, warmup=0, precision="fp32", log_every=1)


@pytest.fixture(scope="module")
def other(small) -> PreTrainedTokenizerFast:
    """Another vocabulary than the fixtures' tokenizer: other words, other merges, another template."""
    made = small.tokenizer("sing a reddish tree and smallest bigger é日本 runs  catalogue dogs".split(), 330)
    made.chat_template = made.chat_template.replace("{{ bos_token }}", "{{ bos_token + 'chat:' }}").replace("'|>' }}", "'|>\\n' }}")
    return made


def words(number: int, seed: int) -> str:
    pool = ["red", "cat", "dogs", " ", "  ", "\n", "é", "日本", "🙂", "tree", "runs", "catalogue", "x1"]
    return " ".join(random.Random(seed).choices(pool, k=number))


def byte_ends(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[int]:
    """Bytes before the end of each token, specials without any, by the tokens' own spelling."""
    sizes = [
        0 if token in tokenizer.all_special_tokens else len(bytes(BYTES[c] for c in token))
        for token in tokenizer.convert_ids_to_tokens(ids)
    ]
    return [sum(sizes[: i + 1]) for i in range(len(sizes))]


def by_bytes(text: str, sides: list[tuple[PreTrainedTokenizerFast, list[int]]]) -> list[tuple[range, range]]:
    """The oracle: every byte between two characters that ends a token on both sides is a boundary; spans lie between two of them."""
    between = {len(text[:place].encode()) for place in range(len(text) + 1)}
    ends = [byte_ends(*side) for side in sides]
    common = sorted(between & {0, *ends[0]} & {0, *ends[1]})

    def last(side: list[int], at: int) -> int:
        return max((index for index, end in enumerate(side) if end == at), default=-1)  # before the first token

    return [tuple(range(last(side, left) + 1, last(side, right) + 1) for side in ends) for left, right in pairwise(common)]


@pytest.mark.parametrize("which", ["small", "embedded", "smollm2"])
def test_spans_are_those_of_a_brute_force_over_bytes(which, tokenizer, other, request):
    second = {"small": other, "embedded": None, "smollm2": None}[which]
    if which == "embedded":
        second = AutoTokenizer.from_pretrained(TEACHER)
    if which == "smollm2":
        folder = request.getfixturevalue("public_data") / "smollm2"
        if not folder.is_dir():
            pytest.skip("needs smollm2/ (its tokenizer's files) in LLAMBA_TEST_DATA")
        second = AutoTokenizer.from_pretrained(folder)
    longest = 0
    for seed in range(40):
        text = words(30, seed)
        found = [one(text, return_offsets_mapping=True) for one in (tokenizer, second)]
        got = list(common_spans(*(each["offset_mapping"] for each in found), [(0, 0, len(text))]))
        want = by_bytes(text, [(one, each["input_ids"]) for one, each in zip((tokenizer, second), found, strict=True)])
        assert got == want, seed
        longest = max(longest, *(len(pair[0]) for pair in got), *(len(pair[1]) for pair in got))
    assert longest > 2


def test_boundaries_by_hand():
    """Overlapping tokens (bytes of one character), a gap before a word, an empty token, and words that begin inside a token."""
    offsets = [(0, 0), (0, 2), (2, 3), (2, 3), (4, 6), (6, 6), (5, 9)]
    assert boundaries(offsets, 0, 9) == {0: 0, 2: 1, 3: 3, 9: 6}
    assert boundaries(offsets, 2, 1) == {0: 1, 1: 3}
    assert boundaries([(0, 0), (0, 3), (0, 0)], 0, 3) == {0: 0, 3: 1}  # a BOS and an EOS
    assert boundaries([(0, 3), (3, 5)], 1, 4) == {2: 0, 4: 1}
    assert list(common_spans([(0, 3), (3, 5)], [(0, 1), (1, 5)], [(0, 0, 5)])) == [(range(0, 2), range(0, 2))]


def pieces(tokenizer, ids: list[int], spans: list[int]) -> list[str]:
    """The text of each span, in order."""
    return [tokenizer.decode([t for t, span in zip(ids, spans, strict=True) if span == n]) for n in range(max(spans, default=-1) + 1)]


def test_answers_of_chats_behind_either_template(tokenizer, other):
    """Spans say the same words on both sides, cover every answer, and end with the tokens that end it."""
    said = ["cat", "red cat?", " a reddish tree 日本", "and", "runs  runs"]
    roles = ["system", "user", "assistant", "user", "assistant"]
    chat = [{"role": role, "content": words} for role, words in zip(roles, said, strict=True)]
    pair = Pairing(Data(train="x"), tokenizer, other, 1000)
    paired = pair("here", {"messages": chat})
    own = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    mine, theirs = pieces(tokenizer, own, paired.own), pieces(other, paired.ids, paired.other)
    assert mine == theirs and "".join(mine) == " a reddish tree 日本</s>runs  runs</s>"
    assert paired.ids == other.apply_chat_template(chat, return_dict=True)["input_ids"]
    text = pair("here", {"text": "a reddish tree"})
    ids = [*tokenizer("a reddish tree")["input_ids"], tokenizer.eos_token_id]
    assert pieces(tokenizer, ids, text.own) == pieces(other, text.ids, text.other) and len(text.own) == len(ids)
    one = [{"role": "assistant", "content": "cat"}]
    ids = tokenizer.apply_chat_template(one, return_dict=True)["input_ids"]
    assert "".join(pieces(tokenizer, ids, pair("", {"messages": one}).own)) == "cat</s>"


def test_cut(tokenizer, other):
    """Every piece of a document: spans of it alone, in order, saying the same on both sides, none with a first token of a piece."""
    text = words(60, 1)
    whole = Pairing(Data(train="x"), tokenizer, other, 10**6)("here", {"text": text})
    own = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    for start, stop in ((0, len(own)), (0, 20), (20, 40), (33, 34), (40, len(own))):
        part = whole.cut(start, stop)
        assert len(part.own) == stop - start and len(part.ids) == len(part.other) >= 1 and part.own[0] == part.other[0] == NONE
        kept = sorted(set(part.own) - {NONE})
        assert sorted(set(part.other) - {NONE}) == kept
        full = {n for n in set(whole.own) - {NONE} if all(start <= i < stop for i, number in enumerate(whole.own) if number == n)}
        assert set(kept) <= full and len(full) - len(kept) <= (2 if start else 0)
        for number in kept:
            said = [tokenizer.decode([t for t, n in zip(own[start:stop], part.own, strict=True) if n == number])]
            said.append(other.decode([t for t, n in zip(part.ids, part.other, strict=True) if n == number]))
            assert said[0] == said[1]
    short = Paired(whole.own, whole.ids, whole.other, 12).cut(0, len(own))
    assert len(short.ids) <= 12 and set(short.own) == set(short.other) and max(short.own) >= 2


def plain_divergence(p: float, q: float, kind: str, beta: float) -> float:
    """Between two Bernoulli distributions, written out."""

    def kl(a: float, b: float) -> float:
        return sum(x * math.log(x / y) for x, y in ((a, b), (1 - a, 1 - b)))

    m = beta * p + (1 - beta) * q
    return {"forward_kl": kl(p, q), "reverse_kl": kl(q, p), "jsd": beta * kl(p, m) + (1 - beta) * kl(q, m)}[kind]


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 7.0, 1e4])
def test_the_divergence_of_two_outcomes(kind, temperature):
    student, teacher = torch.tensor([-0.3, -4.0, -11.0]).double(), torch.tensor([-0.1, -6.0, -11.0]).double()
    want = sum(
        temperature * plain_divergence(*(float(torch.exp(x / temperature)) for x in (t, s)), kind, 0.3)
        for s, t in zip(student, teacher, strict=True)
    )
    assert float(span_divergence(student, teacher, temperature, kind, 0.3)) == pytest.approx(want, rel=1e-6, abs=1e-9)
    if (kind, temperature) == ("forward_kl", 1e4):  # its limit, of surprisals
        p, q = -teacher, -student
        assert float((p * (p / q).log() + q - p).sum()) == pytest.approx(want, rel=1e-3)
    certain = span_divergence(torch.zeros(1, requires_grad=True), torch.zeros(1), 100.0, kind, 0.5)
    assert abs(float(certain.detach())) < 1e-5


def made_batch() -> tuple[Aligned, Aligned, torch.Tensor]:
    """Two rows; spans of one to three tokens, one of them missing in the second row; tokens that are targets and in no span."""
    torch.manual_seed(0)
    spans = torch.tensor([[-1, -1, 0, 0, 1, 2], [-1, 0, -1, 1, 1, -1]])
    theirs = torch.tensor([[-1, 0, 1, 1, 1, 2, -1], [-1, 0, 0, 1, -1, -1, -1]])
    ids, labels = torch.randint(0, 11, (2, 6)), torch.full((2, 6), -100)
    labels[0, 1:], labels[1, 1:5] = ids[0, 1:], ids[1, 1:5]
    student = Aligned(torch.randn(2, 6, 5).double().requires_grad_(), ids, spans)
    teacher = Aligned(torch.randn(2, 7, 4).double(), torch.randint(0, 13, (2, 7)), theirs)
    return student, teacher, labels


def whole(
    student: Aligned, teacher: Aligned, head: nn.Linear, teacher_head: nn.Linear, labels: torch.Tensor, settings: dict
) -> torch.Tensor:
    """The loss in plain loops over spans, on whole logits."""

    def likelihoods(side: Aligned, logits: torch.Tensor) -> dict[tuple[int, int], torch.Tensor]:
        found = {}
        for row, place in (side.spans >= 0).nonzero().tolist():
            key = row, int(side.spans[row, place])
            found[key] = found.get(key, 0) + logits[row, place - 1].log_softmax(-1)[side.ids[row, place]]
        return found

    logits = head(student.hidden)
    own, other = likelihoods(student, logits), likelihoods(teacher, teacher_head(teacher.hidden))
    assert own.keys() == other.keys()
    apart = sum(
        span_divergence(own[key][None], other[key][None], settings["temperature"], settings["divergence"], settings["beta"]) for key in own
    )
    cross = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    return settings["kl"] * apart + settings["ce"] * cross


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_gradients_are_those_of_whole_logits(kind, bias, monkeypatch):
    monkeypatch.setattr("llamba.training.losses.fused.LOGITS_AT_ONCE", {"cpu": 33})  # three tokens at a time
    student, teacher, labels = made_batch()
    head, teacher_head = nn.Linear(5, 11, bias=bias).double(), nn.Linear(4, 13).double()
    settings = dict(kl=0.7, ce=0.2, temperature=20.0, divergence=kind, beta=0.4)
    made = span_sums(student, teacher, head, teacher_head, labels, **settings)
    want = whole(student, teacher, head, teacher_head, labels, settings)
    leaves = [student.hidden, *head.parameters()]
    torch.testing.assert_close(made.loss, want)
    assert made.targets == 9 and not made.kl.requires_grad
    torch.testing.assert_close(made.loss.detach(), 0.7 * made.kl + 0.2 * made.ce)
    for got, exact in zip(torch.autograd.grad(3 * made.loss, leaves), torch.autograd.grad(3 * want, leaves), strict=True):
        torch.testing.assert_close(got, exact)
    with torch.no_grad():
        torch.testing.assert_close(span_sums(student, teacher, head, teacher_head, labels, **settings).loss, want.detach())
    nothing = torch.full_like(labels, -100)
    none = span_sums(
        *(side._replace(spans=torch.full_like(side.spans, -1)) for side in (student, teacher)), head, teacher_head, nothing, **settings
    )
    assert none.loss == 0 and none.targets == 0


@pytest.fixture(scope="module")
def foreign(tmp_path_factory, small, other) -> Path:
    """A random teacher with the other tokenizer, of another width."""
    folder = tmp_path_factory.mktemp("foreign")
    small.llama(len(other), seed=3, hidden_size=48, num_hidden_layers=2).save_pretrained(folder)
    other.save_pretrained(folder)
    return folder


def pairing(student: Path, teacher: Path, data: Data) -> Pairing:
    most = AutoModelForCausalLM.from_pretrained(teacher).config.max_position_embeddings
    return Pairing(data, AutoTokenizer.from_pretrained(student), AutoTokenizer.from_pretrained(teacher), most)


def test_packed_rows_give_the_loss_of_rows_apart(tmp_path, student_folder, foreign, chat_file, tokenizer):
    """Sums over all rows: padded ones, and packed ones in which neither model sees over a boundary."""
    stage, found = Distill(kl=1.0, ce=0.5, match="spans", **SHORT), []
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder).double() for folder in (student_folder, foreign))
    for packing in (False, True):
        data = Data(train=str(chat_file), length=60, packing=packing)
        folder = tmp_path / str(packing)
        tokenize(data, tokenizer, "assistant", folder, pair=pairing(student_folder, foreign, data))
        rows = Rows(folder / "train")
        batches = [collate([rows[i] for i in range(first, min(first + 4, len(rows)))], 0) for first in range(0, len(rows), 4)]
        assert all(int(batch["spans"].max()) == int(batch["teacher_spans"].max()) >= 0 for batch in batches)
        with torch.no_grad():
            sums = [distill.objective_of_spans(stage, student, teacher, batch) for batch in batches]
        found.append([sum(values).item() for values in zip(*sums, strict=True)])
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_the_same_tokens_are_compared_as_ever(tmp_path, student_folder, teacher_folder, data, monkeypatch):
    """Where both models count the same tokens, match='spans' is match='tokens', bit by bit: the default, from hidden states in chunks."""
    calls = []
    monkeypatch.setattr(distill, "head_sums", lambda *args, **more: (calls.append(more), head_sums(*args, **more))[1])
    assert Distill().match == "tokens"
    results = [
        distill.run(Distill(match=match, ce=0.1, **SHORT), student_folder, str(teacher_folder), data, tmp_path / match)
        for match in ("tokens", "spans")
    ]
    assert len(calls) >= 2 * 2 * 2  # stages, steps, micro-batches
    assert results[0]["kl"] == results[1]["kl"] and results[0]["loss"] == results[1]["loss"]
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / match).state_dict() for match in ("tokens", "spans"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_spans_of_single_tokens_compare_likelihoods_of_tokens(student_folder, teacher_folder):
    """Same tokens, each a span: the summed divergence is below the whole distributions' KL, which sees every outcome, at temperature 1."""
    torch.manual_seed(1)
    ids = torch.randint(3, 200, (2, 12))
    labels, spans = torch.cat((torch.full((2, 1), -100), ids[:, 1:]), 1), torch.arange(-1, 11).expand(2, -1)
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder).double() for folder in (student_folder, teacher_folder))
    with torch.no_grad():
        sides = [Aligned(model.base_model(ids).last_hidden_state, ids, spans) for model in (student, teacher)]
        heads = student.lm_head, teacher.lm_head
        two = span_sums(*sides, *heads, labels, kl=1.0, ce=0.0, temperature=1.0, divergence="forward_kl", beta=0.5)
        every = head_sums(sides[0].hidden, sides[1].hidden, *heads, labels, kl=1.0, ce=0.0)
    assert 0 < two.kl < every.kl and two.ce == pytest.approx(float(every.ce)) and two.targets == every.targets == 22


@pytest.mark.parametrize("which", ["small", "smollm2"])
def test_a_student_learns_from_a_teacher_with_other_tokens(tmp_path, student_folder, chat_file, tokenizer, which, request, small):
    """The embedded teacher, and a student with another tokenizer: the divergence of spans falls, and cross-entropy was not in the loss."""
    folder = student_folder
    if which == "smollm2":
        found = request.getfixturevalue("public_data") / "smollm2"
        if not found.is_dir():
            pytest.skip("needs smollm2/ (its tokenizer's files) in LLAMBA_TEST_DATA")
        tokenizer, folder = AutoTokenizer.from_pretrained(found), str(tmp_path / "student")
        convert(small.llama(len(tokenizer)), mixer="mamba2").save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    config = Data(train=str(chat_file), length=64)
    tokenize(config, tokenizer, "assistant", tmp_path / "data", pair=pairing(folder, TEACHER, config))
    settings = dict(steps=32, batch=8, micro_batch=8, lr=2e-2, clip=1.0, schedule="constant")
    stage = Distill(kl=1.0, ce=0.0, match="spans", train="all", **{**SHORT, **settings})
    distill.run(stage, folder, str(TEACHER), StageData(config, 0, tmp_path / "data"), tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    losses = [line["kl"] for line in lines if "kl" in line]
    assert len(losses) == 32 and sum(losses[-8:]) < 0.5 * sum(losses[:8])  # the first and the last epoch


def test_a_whole_run_with_a_teacher_that_counts_other_tokens(tmp_path, teacher_folder, foreign, chat_file, tokenizer):
    """Labels by it, and spans with it; the answers are re-tokenised by the student's tokenizer."""
    stages = [
        PseudoLabel(teacher=str(foreign), engine="transformers", max_new_tokens=6, temperature=0.0, unfinished="keep", rows=8),
        Distill(teacher=str(foreign), match="spans", data=Data(train="stage:pseudo_label", length=64, packing=True), **SHORT),
        Distill(teacher=str(foreign), match="spans", targets="all", **SHORT),
    ]
    recipe = Recipe(str(teacher_folder), Student(), Data(train=str(chat_file), length=48), stages, str(tmp_path / "run"))
    last = running.run(recipe)
    assert last.name == "3-distill" and len(list((tmp_path / "run/data").iterdir())) == 2
    told = str(plan(recipe))
    assert told.count(f"    teacher {foreign}: ") == told.count("it counts other tokens: spans of text at temperature 100") == 2
    rows = [json.loads(line) for line in (tmp_path / "run/1-pseudo_label/rows/rows-00000.jsonl").read_text().splitlines()]
    sets = [Rows(folder / "train") for folder in (tmp_path / "run/data").iterdir()]
    packed = next(one for one in sets if one.packed)
    learnt = "".join(tokenizer.decode([token for token in packed[i]["labels"] if token >= 0]) for i in range(len(packed)))
    answers = [message["content"].strip() for row in rows for message in row["messages"] if message["role"] == "assistant"]
    assert len(answers) > len(rows) == 8  # chats have earlier answers, which are learnt too
    assert sorted(learnt.split("</s>")) == sorted([*answers, ""])


def refused(recipe: Recipe, tmp_path: Path, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        preflight.check(recipe, tmp_path / "run")


def test_what_is_refused_before_the_run(tmp_path, teacher_folder, foreign, chat_file):
    def recipe(**more) -> Recipe:
        stage = Distill(**{"teacher": str(foreign), "match": "spans", **more}, **SHORT)
        return Recipe(str(teacher_folder), Student(), Data(train=str(chat_file), length=48), [stage], str(tmp_path / "run"))

    preflight.check(recipe(), tmp_path / "run")
    refused(recipe(match="tokens"), tmp_path, r"share a vocabulary, got .*; distill.match='spans' compares spans of text")
    refused(recipe(temperature=2.0), tmp_path, "spans have distill.span_temperature; got 2.0 with match='spans'")
    plain = shutil.copytree(foreign, tmp_path / "plain")
    tokenizer = AutoTokenizer.from_pretrained(foreign)
    tokenizer.chat_template = tokenizer.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    (plain / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(plain)
    said = f"teacher's own template, and {plain} has none that marks the assistant's words: put a chat_template.jinja"
    refused(recipe(teacher=str(plain)), tmp_path, said)
    refused(recipe(teacher=str(plain), data=Data(train=str(chat_file), length=48, template=None)), tmp_path, said)
    for values in ({"offline": 4}, {"reduction": "batchmean_legacy"}):
        with pytest.raises(ValueError, match="asks the teacher step by step and needs offline=none and reduction='token_mean'"):
            Distill(match="spans", **values)
    with pytest.raises(ValueError, match="span_temperature must be a number > 0"):
        Distill(span_temperature=0.0)
