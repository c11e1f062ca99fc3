"""Data: sources and their errors, tokenising, what is counted, order, batches."""

import gzip
import json

import numpy as np
import pytest

from llamba.data import sources
from llamba.data.batches import Ordered, Rows, collate
from llamba.data.tokens import RowTokenizer, check_unchanged, pack, tokenize
from llamba.settings import Data
from llamba.training.losses import IGNORE

CHAT = {"messages": [{"role": "user", "content": "red"}, {"role": "assistant", "content": "green blue"}]}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepared(tmp_path, tokenizer, rows, targets="assistant", **data):
    tmp_path.mkdir(exist_ok=True)
    path = write_rows(tmp_path / "in.jsonl", rows)
    manifest = tokenize(Data(train=str(path), **data), tokenizer, targets, tmp_path / "out")
    return Rows(tmp_path / "out" / "train"), manifest["train"][0]


def test_formats_hold_the_same_rows(small, tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = small.chats(5)
    write_rows(tmp_path / "a.jsonl", rows)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet"):
        assert [row for _, row in sources.rows(str(tmp_path / name))] == rows
    assert [row for _, row in sources.rows(str(tmp_path))] == rows * 3


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"messages": [', "needed one JSON object in UTF-8"),
        ("[1, 2]", "needed an object with 'messages' or 'text', got list"),
        ('{"prompt": "x"}', "needed 'messages' (a list), 'text' (a string) or 'prompt', 'chosen', 'rejected', got keys ['prompt']"),
        ('{"text": 3}', "needed 'messages' (a list), 'text' (a string)"),
        ('{"conversations": [{"from": "robot", "value": "x"}]}', "turn 0 must be"),
        ('{"prompt": "x", "chosen": 3, "rejected": "y"}', "'chosen' must be a list"),
        ('{"messages": "hi"}', "'messages' must be a list, got str"),
        ('{"messages": [{"role": "user"}]}', "message 0 must be"),
        (b"\xff\xfe", "needed one JSON object in UTF-8"),
    ],
)
def test_broken_line_is_named(tmp_path, line, words):
    path = tmp_path / "in.jsonl"
    path.write_bytes(json.dumps(CHAT).encode() + b"\n\n" + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(ValueError) as caught:
        list(sources.rows(str(path)))
    assert str(caught.value).startswith(f"{path}:3: ") and words in str(caught.value)


def test_cut_off_gzip_is_named(small, tmp_path):
    whole = gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in small.chats(200)))
    (tmp_path / "in.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="broken gzip file after line"):
        list(sources.rows(str(tmp_path / "in.jsonl.gz")))


@pytest.mark.parametrize("name", ["missing.jsonl", "./folder", "a/b/c", "text"])
def test_missing_source(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="does not exist; needed a file, a folder, or a hub set"):
        list(sources.rows(name))


def test_other_formats_and_empty_folders(tmp_path):
    (tmp_path / "in.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match="must end in"):
        sources.files(str(tmp_path / "in.csv"))
    with pytest.raises(ValueError, match="found none"):
        sources.files(str(tmp_path))
    (tmp_path / "in.parquet").write_text("no")
    with pytest.raises(ValueError, match="needed a parquet file"):
        list(sources.rows(str(tmp_path / "in.parquet")))


def test_hub_set(monkeypatch):
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, **more: asked.append((name, config, more)) or [CHAT])
    assert list(sources.rows("org/set:part")) == [("org/set:part: row 0", CHAT)]
    list(sources.rows("org/set@en", streaming=True))
    assert asked == [("org/set", None, {"split": "part", "streaming": False}), ("org/set", "en", {"split": "train", "streaming": True})]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "red", "chosen": "green blue", "rejected": "no"},
        {"prompt": CHAT["messages"][:1], "chosen": CHAT["messages"][1:], "rejected": [{"role": "assistant", "content": "no"}]},
        {"prompt": "red", "chosen": CHAT["messages"], "rejected": [CHAT["messages"][0], {"role": "assistant", "content": "no"}]},
    ],
)
def test_preference_pairs(tmp_path, row):
    (found,) = (found for _, found in sources.rows(str(write_rows(tmp_path / "pairs.jsonl", [row]))))
    assert sources.messages(found) == CHAT["messages"]
    assert found["rejected"] == [{"role": "assistant", "content": "no"}]


def test_sharegpt_rows(tmp_path):
    row = {"conversations": [{"from": "human", "value": "red"}, {"from": "gpt", "value": "green blue"}]}
    assert [found for _, found in sources.rows(str(write_rows(tmp_path / "a.jsonl", [row])))] == [CHAT]


def test_licence_of_a_folder(tmp_path):
    write_rows(tmp_path / "a.jsonl", [CHAT])
    assert sources.licence(str(tmp_path)) is None
    (tmp_path / "LICENSE").write_text("CC BY 4.0\n\nlong text")
    assert sources.licence(str(tmp_path)) == "CC BY 4.0"


def test_pack_fills_sequences():
    lengths = np.random.default_rng(0).integers(1, 60, 200).tolist()
    packs = pack(lengths, 64)
    assert sorted(index for pack in packs for index in pack) == list(range(200))
    sums = [sum(lengths[index] for index in pack) for pack in packs]
    assert max(sums) <= 64 and len(packs) <= 1.05 * sum(lengths) / 64 + 1


def test_packed_rows_restart_their_positions(tmp_path, tokenizer, small):
    rows, count = prepared(tmp_path, tokenizer, small.chats(40), length=64, packing=True)
    assert count["rows"] == 40 and count["sequences"] == len(rows) < 30
    alone, _ = prepared(tmp_path / "alone", tokenizer, small.chats(40), length=64)
    documents = []
    for item in (rows[index] for index in range(len(rows))):
        starts = [*np.flatnonzero(item["position_ids"] == 0).tolist(), len(item["input_ids"])]
        assert len(item["input_ids"]) <= 64
        for first, end in zip(starts, starts[1:], strict=False):
            assert item["position_ids"][first:end].tolist() == list(range(end - first)) and item["labels"][first] == IGNORE
            documents.append((item["input_ids"][first:end].tolist(), item["labels"][first:end].tolist()))
    assert sorted(documents) == sorted((item["input_ids"].tolist(), item["labels"].tolist()) for item in map(alone.__getitem__, range(40)))


def test_packing_splits_long_texts(tmp_path, tokenizer):
    rows, count = prepared(tmp_path, tokenizer, [{"text": " ".join(["red"] * 100)}], targets="all", length=16, packing=True)
    assert count["cut"] == 0 and count["rows"] == 1 and rows.lengths.sum() == count["tokens"] >= 100


def test_padding_of_packed_rows_is_a_document():
    item = {"input_ids": np.arange(1, 4), "labels": np.arange(1, 4), "position_ids": np.array([0, 1, 0])}
    longer = {"input_ids": np.arange(5), "labels": np.arange(5), "position_ids": np.arange(5)}
    batch = collate([item, longer], 0)
    assert batch["position_ids"].tolist() == [[0, 1, 0, 0, 1], [0, 1, 2, 3, 4]] and "attention_mask" not in batch
    assert batch["labels"][0].tolist() == [1, 2, 3, IGNORE, IGNORE]


def test_mixture_keeps_its_shares(tmp_path, tokenizer, small):
    paths = [str(small.write_rows(tmp_path / f"{name}.jsonl", small.chats(size))) for name, size in (("a", 60), ("b", 7))]
    tokenize(Data(train=paths, weights=[3.0, 1.0], length=64), tokenizer, "assistant", tmp_path / "out")
    rows = Rows(tmp_path / "out" / "train")
    order = Ordered(rows, 4, 0, epochs=1.0, steps=50, tokens=None)
    share = rows.lengths[order.order[order.order >= 60]].sum() / order.seen[-1]
    assert share == pytest.approx(0.25, abs=0.01)  # although the second source is a tenth of the rows
    again = Ordered(rows, 8, 0, epochs=1.0, steps=25, tokens=None)
    assert (again.order == order.order).all()
    assert set(order.order.tolist()) >= set(range(60, 67))
    budget = Ordered(rows, 4, 0, epochs=1.0, steps=None, tokens=2000)
    assert budget.seen[-1] >= 2000 > budget.seen[-5]


def test_streaming_reads_what_the_stage_needs(tmp_path, tokenizer, small):
    path = small.write_rows(tmp_path / "in.jsonl", small.chats(400))
    data = Data(train=str(path), streaming=True, length=64)
    found = tokenize(data, tokenizer, "assistant", tmp_path / "out", limit=1000)["train"][0]
    assert 1000 <= found["tokens"] < 1064 and found["rows"] < 400


def test_parts_are_disjoint_and_whole_together(tmp_path, tokenizer, small):
    """Parts split the training rows of every source; held-out rows stay whole."""
    path = write_rows(tmp_path / "rows.jsonl", small.chats(11))
    whole = [where for where, _ in sources.rows(str(path))]
    parts = [[where for where, _ in sources.rows(str(path), part=(k, 3))] for k in range(3)]
    assert [len(part) for part in parts] == [4, 4, 3] and sorted(sum(parts, [])) == sorted(whole)
    manifest = tokenize(Data(train=str(path), eval=str(path), part=(1, 3), length=64), tokenizer, "assistant", tmp_path / "out")
    assert (manifest["train"][0]["rows"], manifest["eval"][0]["rows"]) == (4, 11)
    assert Data(train="a", part=[1, 3]).part == (1, 3)
    with pytest.raises(ValueError, match=r"data.part must be \(k, n\) with 0 <= k < n, got \(3, 3\)"):
        Data(train="a", part=(3, 3))


def test_assistant_targets(tmp_path, tokenizer):
    rows, count = prepared(tmp_path, tokenizer, [CHAT])
    row = rows[0]
    assert tokenizer.decode(row["input_ids"]) == "<s><|user|>red</s><|assistant|>green blue</s>"
    assert tokenizer.decode(row["labels"][row["labels"] != IGNORE]) == "green blue</s>"
    assert (count["rows"], count["tokens"]) == (1, len(row["input_ids"]))
    assert count["target_tokens"] == (row["labels"] != IGNORE).sum()


def test_all_targets_leave_the_first_token_out(tmp_path, tokenizer):
    rows, count = prepared(tmp_path, tokenizer, [CHAT], targets="all")
    assert rows[0]["labels"][0] == IGNORE and (rows[0]["labels"][1:] == rows[0]["input_ids"][1:]).all()


@pytest.mark.parametrize("text", ["red green", "<s>red green", "<s>red green</s>"])
def test_text_has_one_start_and_one_end(tmp_path, tokenizer, text):
    rows, _ = prepared(tmp_path, tokenizer, [{"text": text}], targets="all")
    assert tokenizer.decode(rows[0]["input_ids"]) == "<s>red green</s>"


def test_doubled_start_in_a_template_is_made_one(small, tmp_path):
    tokenizer = small.tokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    rows, _ = prepared(tmp_path, tokenizer, [CHAT])
    assert tokenizer.decode(rows[0]["input_ids"]).startswith("<s><|user|>")


def test_skips_and_cuts_are_counted(tmp_path, tokenizer, capsys):
    asked_only = {"messages": [{"role": "user", "content": "red"}]}
    late = {"messages": [{"role": "user", "content": "red " * 40}, {"role": "assistant", "content": "blue"}]}
    long = {"messages": [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue " * 40}]}
    rows, count = prepared(tmp_path, tokenizer, [CHAT, {"messages": []}, {"text": ""}, asked_only, late, long], length=16)
    assert len(rows) == 2 and rows.lengths.max() == 16
    assert count["skipped"] == {"empty": 2, "no_targets": 1, "too_long": 1} and count["cut"] == 1
    told = capsys.readouterr().out
    assert "2 of 6 rows (1 of them cut at the limit)" in told and "1 whose first answer begins beyond the limit" in told


def test_nothing_left(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="no row with anything to learn"):
        prepared(tmp_path, tokenizer, [{"messages": []}])


def test_template_without_marks(small, tmp_path):
    tokenizer = small.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="own chat template does not mark .* none of the bundled .* data.template .* targets='all'"):
        prepared(tmp_path, tokenizer, [CHAT])
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="in.jsonl:1: messages need a chat template"):
        prepared(tmp_path, tokenizer, [CHAT], targets="all")


def test_text_has_no_assistant(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"in.jsonl:2: a text row has no assistant's words; use targets='all'"):
        prepared(tmp_path, tokenizer, [CHAT, {"text": "red"}])


def test_template_that_refuses(small, tmp_path):
    tokenizer = small.tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}{% generation %}{% endgeneration %}"
    with pytest.raises(ValueError, match="in.jsonl:1: the chat template refuses these messages: roles must alternate"):
        prepared(tmp_path, tokenizer, [CHAT])


def test_template_by_file_must_write_what_the_model_reads(small, tmp_path, tokenizer):
    marked = tmp_path / "marked.jinja"
    plain = small.tokenizer()
    marked.write_text(plain.chat_template)
    plain.chat_template = plain.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    rows, _ = prepared(tmp_path, plain, [CHAT], template=str(marked))
    assert tokenizer.decode(rows[0]["labels"][rows[0]["labels"] != IGNORE]) == "green blue</s>"
    marked.write_text(marked.read_text().replace("bos_token", "''"))
    with pytest.raises(ValueError, match="differently from the tokenizer's own template"):
        RowTokenizer(Data(train="x", template=str(marked)), plain, "assistant")("here", CHAT)
    with pytest.raises(ValueError, match=r"data.template must be 'auto', a file or one of \['chatml', .*'zephyr'\], got 'llama9'"):
        RowTokenizer(Data(train="x", template="llama9"), plain, "assistant")


def test_llama3_template_is_llama3s_own(small):
    """Against the template that the published tokenizer carries."""
    tokenizer = small.tokenizer()
    tokenizer.chat_template = (
        "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] + "
        "'<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
        "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' if add_generation_prompt else '' }}"
    )
    reader = RowTokenizer(Data(train="x", template="llama3"), tokenizer, "assistant")
    for row in ({"messages": [{"role": "system", "content": " big "}, *turns["messages"]]} for turns in small.chats(3)):
        ids, targets = reader("here", row)
        assert ids == tokenizer.apply_chat_template(row["messages"])["input_ids"]
        learnt = tokenizer.decode([token for token, mark in zip(ids, targets, strict=True) if mark])
        assert learnt == "".join(turn["content"] + "<|eot_id|>" for turn in row["messages"] if turn["role"] == "assistant")
        reader.own = False


def test_interrupted_preparation_leaves_nothing(tmp_path, tokenizer):
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps(CHAT) + "\n{broken\n")
    with pytest.raises(ValueError, match="in.jsonl:2"):
        tokenize(Data(train=str(path)), tokenizer, "assistant", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    write_rows(path, [CHAT])
    manifest = tokenize(Data(train=str(path)), tokenizer, "assistant", tmp_path / "out")
    assert len(Rows(tmp_path / "out" / "train")) == 1
    check_unchanged(manifest)
    write_rows(path, [CHAT, CHAT])
    with pytest.raises(ValueError, match="in.jsonl is not what it was when this run began"):
        check_unchanged(manifest)


def rows_of(small, tmp_path, tokenizer, number=10) -> Rows:
    return prepared(tmp_path, tokenizer, small.chats(number))[0]


def test_order(small, tmp_path, tokenizer):
    rows = rows_of(small, tmp_path, tokenizer)
    ordered = Ordered(rows, 4, seed=1, epochs=2.0, steps=None, tokens=None)
    assert ordered.steps == 5 and len(ordered) == 20
    assert sorted(ordered.order[:10]) == sorted(ordered.order[10:]) == list(range(10))
    assert list(ordered.order[:10]) != list(ordered.order[10:])
    longer = Ordered(rows, 4, seed=1, epochs=1.0, steps=50, tokens=None)
    assert len(longer) == 200 and list(longer.order[:20]) == list(ordered.order)
    assert Ordered(rows, 64, seed=1, epochs=1.0, steps=None, tokens=None).steps == 1
    assert ordered.tokens_at(0) == 0 and ordered.tokens_at(5) == 2 * rows.lengths.sum()
    assert (ordered[7]["input_ids"] == rows[ordered.order[7]]["input_ids"]).all()


def test_budget_in_tokens(small, tmp_path, tokenizer):
    rows = rows_of(small, tmp_path, tokenizer)
    for budget in (1, 100, int(rows.lengths.sum()), 1000):
        ordered = Ordered(rows, 3, seed=0, epochs=1.0, steps=None, tokens=budget)
        assert ordered.tokens_at(ordered.steps) >= budget and ordered.tokens_at(ordered.steps - 1) < budget


def test_collate(small, tmp_path, tokenizer):
    rows = rows_of(small, tmp_path, tokenizer)
    items = [rows[index] for index in range(3)]
    batch = collate(items, pad=2)
    for number, item in enumerate(items):
        length = len(item["input_ids"])
        assert (batch["input_ids"][number, :length].numpy() == item["input_ids"]).all()
        assert (batch["labels"][number, :length].numpy() == item["labels"]).all()
        assert (batch["input_ids"][number, length:] == 2).all() and (batch["labels"][number, length:] == IGNORE).all()
        assert batch["attention_mask"][number].tolist() == [1] * length + [0] * (batch["input_ids"].shape[1] - length)
    assert batch["input_ids"].dtype.is_signed and np.asarray(batch["labels"]).dtype == np.int64
