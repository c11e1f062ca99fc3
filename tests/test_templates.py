"""Chat templates: they write what the originals write, and mark the assistant's words, all of them and nothing else."""

import itertools
from pathlib import Path

import pytest
import trl
from transformers import AutoTokenizer

from llamba.data.tokens import TEMPLATES, Tokenizer
from llamba.settings import Data

STORED = Path(trl.__file__).parent / "chat_templates"
TEACHER = Path(__file__).parent.parent / "recipes" / "tiny" / "teacher"
ZEPHYR = (  # as the published tokenizer has it
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
ORIGINALS = {
    "llama3": (STORED / "llama3.jinja").read_text(),
    "llama31": (STORED / "llama3_1.jinja").read_text(),
    "llama32": (STORED / "llama3_2.jinja").read_text(),
    "zephyr": ZEPHYR,
}
END = {"llama3": "<|eot_id|>", "llama31": "<|eot_id|>", "llama32": "<|eot_id|>", "zephyr": "</s>"}
SPECIAL = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"]

SYSTEM = {"role": "system", "content": " be brief\n"}
ASKED, ANSWERED = {"role": "user", "content": " red or green? "}, {"role": "assistant", "content": "the big green tree \n"}
AGAIN, LAST = {"role": "user", "content": "a cat\n\na dog"}, {"role": "assistant", "content": "bird <|user|> sings"}
CHATS = [[ASKED, ANSWERED], [SYSTEM, ASKED, ANSWERED], [ASKED, ANSWERED, AGAIN, LAST], [SYSTEM, ASKED, ANSWERED, AGAIN, LAST], [ASKED]]
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"where": "tree"}}}]}
TOOL = {"type": "function", "function": {"name": "look", "description": "looks", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def llama(small):
    """A tokenizer with the special tokens of Llama 3; the end-of-turn token of Zephyr's is its `</s>`."""
    made = small.tokenizer()
    made.add_special_tokens({"additional_special_tokens": SPECIAL})
    return made


def ours(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text()


def test_every_template_is_held_to_its_original():
    assert {path.stem for path in TEMPLATES.glob("*.jinja")} == set(ORIGINALS)


@pytest.mark.parametrize("name", ORIGINALS)
@pytest.mark.parametrize("prompt", [False, True])
def test_text_is_the_originals(llama, name, prompt):
    for chat in CHATS:
        texts = [llama.apply_chat_template(chat, chat_template=template, tokenize=False, add_generation_prompt=prompt)
                 for template in (ours(name), ORIGINALS[name])]  # fmt: skip
        assert texts[0] == texts[1] and len(texts[0]) > 20


@pytest.mark.parametrize("name", ["llama31", "llama32"])
def test_text_with_tools_is_the_originals(llama, name):
    choices = itertools.product([{}, {"builtin_tools": ["look", "code_interpreter"]}], [{}, {"tools": [TOOL]}], [True, False])
    for builtin, tools, in_message in choices:
        chat = [SYSTEM, ASKED, CALL, {"role": "tool", "content": "nest"}, ANSWERED]
        settings = {**builtin, **tools, "tools_in_user_message": in_message, "date_string": "1 Jan 2026"}
        texts = [llama.apply_chat_template(chat, chat_template=template, tokenize=False, **settings)
                 for template in (ours(name), ORIGINALS[name])]  # fmt: skip
        assert texts[0] == texts[1] and "look" in texts[0]


@pytest.mark.parametrize("name", ORIGINALS)
def test_the_assistants_tokens_are_marked_and_no_others(llama, name):
    """The marked runs decode to the answers with their end-of-turn tokens; unmarked runs hold the rest."""
    for chat in CHATS[:4]:
        plain = llama.apply_chat_template(chat, chat_template=ORIGINALS[name], tokenize=False)
        ids, targets = Tokenizer(Data(train="x", template=name), retemplated(llama, name), "assistant")("here", {"messages": chat})
        assert llama.decode(ids) == plain
        runs = [(mark, llama.decode(run)) for mark, run in groups(ids, targets)]
        strip = str if name == "zephyr" else str.strip
        answers = [strip(message["content"]) + END[name] for message in chat if message["role"] == "assistant"]
        assert [text for mark, text in runs if mark] == answers
        assert not any(answer in text for mark, text in runs if not mark for answer in answers)


def retemplated(tokenizer, name):
    tokenizer.chat_template = ORIGINALS[name]
    return tokenizer


def test_tool_calls_are_the_assistants(llama):
    made = llama.apply_chat_template(
        [ASKED, CALL, {"role": "tool", "content": "nest"}, ANSWERED], chat_template=ours("llama31"), return_dict=True,
        return_assistant_tokens_mask=True,
    )  # fmt: skip
    marked = llama.decode([token for token, mark in zip(made["input_ids"], made["assistant_masks"], strict=True) if mark])
    assert marked == '{"name": "look", "parameters": {"where": "tree"}}<|eot_id|>the big green tree<|eot_id|>'


def test_the_embedded_teacher_marks_its_own_answers():
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    chat = [{"role": "user", "content": "copy: red cat"}, {"role": "assistant", "content": "red cat"}] * 2
    ids, targets = Tokenizer(Data(train="x"), tokenizer, "assistant")("here", {"messages": chat})
    marked = [tokenizer.decode(run) for mark, run in groups(ids, targets) if mark]
    assert marked == ["red cat<|end|>"] * 2
    bare = tokenizer.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert ids == tokenizer.apply_chat_template(chat, chat_template=bare)["input_ids"]


def groups(ids, targets):
    for mark, run in itertools.groupby(zip(ids, targets, strict=True), key=lambda pair: pair[1]):
        yield mark, [token for token, _ in run]
