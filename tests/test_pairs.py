"""Preference pairs: what becomes of a row's text, and every row that cannot be used. And conversations for fine-tuning."""

import json

import pytest

from llamba.data import sources
from llamba.data.batches import Rows
from llamba.data.chat_templates import TEMPLATES
from llamba.data.pairs import Pairs, tokenize_pairs
from llamba.data.tokens import check_unchanged, tokenize
from llamba.settings import Data, Dpo, Lora, Recipe, Sft, Student
from llamba.settings.overrides import from_dict, override, to_dict


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


PAIR = {"prompt": [user("red")], "chosen": [assistant("cat dog")], "rejected": [assistant("tree")]}
FORMS = {
    "lists": PAIR,
    "texts": {"prompt": "red", "chosen": "cat dog", "rejected": "tree"},
    "the prompt in both": {"chosen": [user("red"), assistant("cat dog")], "rejected": [user("red"), assistant("tree")]},
    "UltraFeedback": {
        "prompt": "red", "prompt_id": "1", "messages": [user("red"), assistant("cat dog")], "score_chosen": 8.0,
        "chosen": [user("red"), assistant("cat dog")], "rejected": [user("red"), assistant("tree")],
    },
}  # fmt: skip


def tokenised(tmp_path, tokenizer, rows, **data) -> tuple[Pairs, dict]:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = tokenize_pairs(Data(train=str(source), **data), tokenizer, "pairs", tmp_path / "set")
    return Pairs(tmp_path / "set" / "train"), manifest


@pytest.mark.parametrize("form", FORMS)
def test_one_start_and_whole_answers(tmp_path, tokenizer, form):
    """The tokenizer puts a BOS before every text; there is one, at the prompt's start, and none before an answer."""
    rows, manifest = tokenised(tmp_path, tokenizer, [FORMS[form]])
    texts = {name: tokenizer.decode(ids) for name, ids in rows[0].items()}
    assert texts == {"prompt_ids": "<s><|user|>red</s><|assistant|>", "chosen_ids": "cat dog</s>", "rejected_ids": "tree</s>"}
    both = [tokenizer.apply_chat_template([user("red"), assistant(text)])["input_ids"] for text in ("cat dog", "tree")]
    assert [rows[0]["prompt_ids"] + rows[0][side] for side in ("chosen_ids", "rejected_ids")] == both
    count = manifest["train"][0]
    assert (count["rows"], count["tokens"]) == (1, sum(map(len, both))) and rows.lengths.tolist() == [count["tokens"]]
    check_unchanged(manifest)


def test_zephyrs_line_end_is_no_answer(tmp_path, small):
    """Its answers end with `</s>` and a line's end, which the model need not say."""
    tokenizer = small.tokenizer()
    tokenizer.chat_template = (TEMPLATES / "zephyr.jinja").read_text()
    rows, _ = tokenised(tmp_path, tokenizer, [PAIR])
    assert tokenizer.decode(rows[0]["prompt_ids"]) == "<|user|>\nred</s>\n<|assistant|>\n"
    assert tokenizer.decode(rows[0]["chosen_ids"]) == "cat dog</s>"


def test_doubled_start_is_made_one(tmp_path, small):
    tokenizer = small.tokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    rows, _ = tokenised(tmp_path, tokenizer, [PAIR])
    assert tokenizer.decode(rows[0]["prompt_ids"]) == "<s><|user|>red</s><|assistant|>"


def test_a_template_without_marks(tmp_path, small):
    tokenizer = small.tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    rows, _ = tokenised(tmp_path, tokenizer, [PAIR])
    assert tokenizer.decode(rows[0]["rejected_ids"]) == "tree</s>"


def test_pairs_that_are_skipped_are_counted(tmp_path, tokenizer, capsys):
    same = {**PAIR, "rejected": [assistant(" cat dog ")]}
    silent, unasked = {**PAIR, "chosen": [assistant(" ")]}, {**PAIR, "prompt": []}
    long = {**PAIR, "rejected": [assistant("tree " * 40)]}
    rows, manifest = tokenised(tmp_path, tokenizer, [same, PAIR, silent, unasked, long], length=24)
    assert len(rows) == 1 and manifest["train"][0]["skipped"] == {"empty": 2, "identical": 1, "too_long": 1}
    assert "1 of 5 rows" in (printed := capsys.readouterr().out) and "2 empty, 1 identical, 1 whose first answer begins beyond" in printed


@pytest.mark.parametrize(
    "row, words",
    [
        ({"messages": [user("red"), assistant("cat")]}, r"in.jsonl:2: needed 'prompt', 'chosen' and 'rejected', got \['messages'\]"),
        ({"prompt": "red", "chosen": "cat"}, "in.jsonl:2: needed .*'prompt', 'chosen', 'rejected', got keys"),
        ({"prompt": "red", "chosen": 3, "rejected": "cat"}, "in.jsonl:2: 'chosen' must be a list, got int"),
        (
            {"chosen": [user("red"), assistant("cat")], "rejected": [user("blue"), assistant("dog")]},
            "in.jsonl:2: 'chosen' and 'rejected' must differ in the last message alone",
        ),
    ],
)
def test_rows_that_are_no_pairs_are_named(tmp_path, tokenizer, row, words):
    with pytest.raises(ValueError, match=words):
        tokenised(tmp_path, tokenizer, [PAIR, row])
    assert not (tmp_path / "set").exists()


def test_nothing_left(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"no pair to learn from in .*left out: 1 identical"):
        tokenised(tmp_path, tokenizer, [{**PAIR, "rejected": PAIR["chosen"]}])
    with pytest.raises(ValueError, match="data.packing and data.streaming do not go with preference pairs"):
        tokenised(tmp_path, tokenizer, [PAIR], packing=True)


def test_templates_that_cannot_serve(tmp_path, small):
    tokenizer = small.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="in.jsonl:1: the chat template must open the assistant's answer where add_generation_prompt"):
        tokenised(tmp_path, tokenizer, [PAIR])
    tokenizer.chat_template = "{% if add_generation_prompt %}x{% endif %}{{ raise_exception('no') if messages | length > 1 }}"
    with pytest.raises(ValueError, match="in.jsonl:1: the chat template refuses these messages: no"):
        tokenised(tmp_path, tokenizer, [PAIR])
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="in.jsonl:1: pairs need a chat template"):
        tokenised(tmp_path, tokenizer, [PAIR])


def test_mixed_sources_keep_their_weights(tmp_path, tokenizer):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(PAIR) + "\n")
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(PAIR) + "\n" + json.dumps(FORMS["texts"]) + "\n")
    tokenize_pairs(Data(train=[str(source), str(other)], weights=[1.0, 3.0]), tokenizer, "pairs", tmp_path / "set")
    assert Pairs(tmp_path / "set" / "train").mixture.tolist() == [[2, 1], [1, 3]]


def test_conversations_of_pairs_for_distillation(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(FORMS["UltraFeedback"]) + "\n")
    assert [sources.messages(row) for _, row in sources.rows(str(source))] == [[user("red"), assistant("cat dog")]]


def test_long_conversations_end_with_a_whole_answer(tmp_path, small, tokenizer, capsys):
    """Two turns that do not fit end after the first; an answer that does not fit, and an empty one, are counted."""
    ask, short, long = user("red"), assistant("cat"), assistant("dog " * 60)
    rows = [[ask, short, ask, long], [ask, long], [ask, short], [ask, assistant(" ")], [ask, assistant(""), ask, short]]
    source = small.write_rows(tmp_path / "in.jsonl", [{"messages": row} for row in rows])
    for packing in (False, True):
        folder = tmp_path / str(packing)
        tokenize(Data(train=str(source), length=48, packing=packing), tokenizer, "answers", folder)
        tokens = Rows(folder / "train").tokens
        assert tokenizer.decode(tokens) == "<s><|user|>red</s><|assistant|>cat</s>" * 2
        assert "2 of 5 rows (1 of them cut at the limit)" in (printed := capsys.readouterr().out)
        assert "left out: 2 empty, 1 whose first answer begins beyond the limit" in printed


def test_fine_tuning_wants_conversations(tmp_path, small, tokenizer):
    source = small.write_rows(tmp_path / "in.jsonl", [{"text": "red"}])
    with pytest.raises(ValueError, match="in.jsonl:1: a text row has no assistant's words"):
        tokenize(Data(train=str(source)), tokenizer, "answers", tmp_path / "set")


def test_stages_survive_json_and_overrides():
    stages = [Sft(data=Data(train="a.jsonl", packing=True)), Dpo(loss=["sigmoid", "sft"], lora=Lora(rank=4))]
    recipe = Recipe(teacher="t", student=Student(), data=Data(train="b.jsonl"), stages=stages, output="o")
    assert from_dict(to_dict(recipe)) == recipe
    keys = [
        "stages.dpo.beta=0.01",
        "stages.sft.lora.rank=8",
        "stages.dpo.data.train=c.jsonl",
        "stages.dpo.reference=teacher",
        "stages.sft.warmup=0.1",
    ]
    changed = override(recipe, keys, "recipe.py")
    assert changed.stages[0].lora == Lora(rank=8) and changed.stages[0].data == stages[0].data and changed.stages[0].warmup == 0.1
    assert (changed.stages[1].beta, changed.stages[1].reference, changed.stages[1].data.train) == (0.01, "teacher", "c.jsonl")
    with pytest.raises(ValueError, match="lora.bits must be 4 or none"):
        override(recipe, ["stages.sft.lora.bits=3"], "recipe.py")
