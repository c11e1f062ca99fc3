"""Chat templates: they write what the originals write, and mark the assistant's words, all of them and nothing else."""

import itertools
from pathlib import Path

import pytest
import trl
from transformers import AutoTokenizer

from llamba.data.chat_templates import TEMPLATES, chosen, fitting, writes_alike
from llamba.data.tokens import RowTokenizer
from llamba.running.plan import plan
from llamba.running.preflight import _check_template
from llamba.settings import Data, Distill, Recipe, Sft, Student
from llamba.settings.overrides import override, unreached

STORED = Path(trl.__file__).parent / "chat_templates"
TEACHER = Path(__file__).parent.parent / "recipes" / "tiny" / "teacher"
ZEPHYR = (  # as the published tokenizer has it
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
HERMES = (  # as Hermes 2 has it, without a start of text
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM2 = (  # as SmolLM2-Instruct has it
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI "
    "assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN2 = SMOLLM2.replace("You are a helpful AI assistant named SmolLM, trained by Hugging Face", "You are a helpful assistant.")
ORIGINALS = {
    "llama3": (STORED / "llama3.jinja").read_text(),
    "llama31": (STORED / "llama3_1.jinja").read_text(),
    "llama32": (STORED / "llama3_2.jinja").read_text(),
    "chatml": HERMES,
    "qwen25": (STORED / "qwen2_5.jinja").read_text(),
    "qwen3": (STORED / "qwen3.jinja").read_text(),
    "zephyr": ZEPHYR,
}
END = dict.fromkeys(("llama3", "llama31", "llama32"), "<|eot_id|>") | {"zephyr": "</s>"}
END |= dict.fromkeys(("chatml", "qwen25", "qwen3"), "<|im_end|>")
SPECIAL = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>", "<|im_start|>", "<|im_end|>"]

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
        ids, targets = RowTokenizer(Data(train="x", template=name), retemplated(llama, name), "assistant")("here", {"messages": chat})
        assert llama.decode(ids) == plain
        runs = [(mark, llama.decode(run)) for mark, run in groups(ids, targets)]
        strip = str.strip if name.startswith("llama") else str
        answers = [strip(message["content"]) + END[name] for message in chat if message["role"] == "assistant"]
        assert [text for mark, text in runs if mark] == answers
        assert not any(answer in text for mark, text in runs if not mark for answer in answers)


def retemplated(tokenizer, name):
    tokenizer.chat_template = ORIGINALS.get(name, name)
    return tokenizer


THOUGHT = {"role": "assistant", "content": "<think>\nred?\n\ngreen?\n</think>\n\nred"}
REASONED = {"role": "assistant", "content": "red", "reasoning_content": "green?\n"}
CALLS = {"role": "assistant", "content": "I look", "tool_calls": [CALL["tool_calls"][0], CALL["tool_calls"][0]["function"]]}
FOUND = {"role": "tool", "content": "nest"}
QUOTED = {"role": "user", "content": "<tool_response>x</tool_response>"}


@pytest.mark.parametrize("name", ["qwen25", "qwen3"])
def test_text_with_tools_and_thoughts_is_qwens(llama, name):
    chats = [
        [ASKED, CALLS, FOUND, FOUND, ANSWERED], [SYSTEM, ASKED, CALLS, FOUND, ANSWERED, AGAIN], [ASKED, THOUGHT],
        [ASKED, THOUGHT, AGAIN, THOUGHT], [ASKED, REASONED, AGAIN, REASONED], [ASKED, QUOTED, THOUGHT], [SYSTEM, SYSTEM, ASKED],
        [ASKED, {**CALLS, "content": ""}, FOUND, LAST, THOUGHT],
    ]  # fmt: skip
    for chat, tools, opened, thinks in itertools.product(chats, [None, [TOOL]], [False, True], [{}, {"enable_thinking": False}]):
        more = {"tools": tools, "add_generation_prompt": opened, **thinks}
        texts = [llama.apply_chat_template(chat, chat_template=template, tokenize=False, **more)
                 for template in (ours(name), ORIGINALS[name])]  # fmt: skip
        assert texts[0] == texts[1]


def test_thoughts_are_the_assistants_and_an_empty_block_is_not(llama):
    template = ours("qwen3")
    for answer in (THOUGHT, LAST):
        made = llama.apply_chat_template([ASKED, answer], chat_template=template, return_dict=True, return_assistant_tokens_mask=True)
        pairs = zip(made["input_ids"], made["assistant_masks"], strict=True)
        assert llama.decode([token for token, mark in pairs if mark]) == answer["content"] + "<|im_end|>"


FITS = {
    "llama3": "llama3", "llama31": "llama31", "zephyr": "zephyr", "qwen3": "qwen3", HERMES: "chatml", SMOLLM2: "chatml", QWEN2: "chatml",
    "{{ bos_token }}" + HERMES: "chatml",
}  # fmt: skip


@pytest.mark.parametrize("own", FITS, ids=lambda own: own[:60])
def test_auto_takes_what_writes_the_same(llama, own):
    tokenizer = retemplated(llama, own)
    found = chosen(Data(train="x"), tokenizer)
    assert found.name == FITS[own]
    for chat in CHATS:
        texts = [tokenizer.apply_chat_template(chat, chat_template=text, tokenize=False) for text in (found.text, tokenizer.chat_template)]
        assert texts[0] == texts[1]
    assert chosen(Data(train="x", template=found.name), tokenizer).text == found.text


def test_qwen25_by_its_name_is_its_own(llama):
    tokenizer = retemplated(llama, "qwen25")
    assert fitting(tokenizer).name in ("chatml", "qwen25")
    assert writes_alike(tokenizer, chosen(Data(train="x", template="qwen25"), tokenizer).text)


def test_auto_where_nothing_fits_says_what_to_do(llama):
    tokenizer = retemplated(llama, HERMES.replace("<|im_end|>", "<|eot_id|>"))
    with pytest.raises(ValueError, match=r"does not mark the assistant's words .* none of the bundled ones .*chatml.* writes the same"):
        RowTokenizer(Data(train="x"), tokenizer, "assistant")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="the tokenizer has no chat template, and what is learnt are the assistant's words"):
        RowTokenizer(Data(train="x"), tokenizer, "assistant")


def test_a_row_that_auto_does_not_fit_names_no_setting_as_made(llama):
    """Templates that write the probes alike, and a row with a code word differently."""
    tokenizer = retemplated(llama, HERMES.replace("message['content']", "message['content'] | replace('xyzzy', 'plugh')"))
    chat = {"messages": [{"role": "user", "content": "xyzzy"}, ANSWERED]}
    with pytest.raises(
        ValueError, match=r"^here: the tokenizer's own template writes .* 'chatml', .*: set data.template to a copy"
    ) as said:
        RowTokenizer(Data(train="x"), tokenizer, "assistant")("here", chat)
    assert "auto" not in str(said.value)
    with pytest.raises(ValueError, match="^here: data.template writes this chat differently .* data.template=auto takes what fits"):
        RowTokenizer(Data(train="x", template="chatml"), tokenizer, "assistant")("here", chat)


def test_the_tokenizers_own_template_is_kept_where_it_marks(small):
    tokenizer = small.tokenizer()
    assert chosen(Data(train="x"), tokenizer).text == tokenizer.chat_template


def test_an_override_that_does_not_reach_a_stage_is_said():
    recipe = Recipe(
        teacher="t", student=Student(), data=Data(train="x"), stages=[Sft(data=Data(train="y", length=64)), Distill()], output="o"
    )
    changed = override(recipe, ["data.length=32", "seed=1"], "r.py")
    said = "data.length is for stages without data of their own; as they were: stages.0.data.length=64"
    assert unreached(changed, ["data.length=32", "seed=1"]) == [said]
    assert not unreached(override(recipe, ["data.length=64"], "r.py"), ["data.length=64"])


def test_the_plan_says_that_a_template_does_not_fit_and_which_does(small, tmp_path):
    tokenizer = small.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    folder = tmp_path / "teacher"
    small.llama(len(tokenizer)).save_pretrained(folder)
    retemplated(tokenizer, SMOLLM2).save_pretrained(folder)
    recipe = Recipe(teacher=str(folder), student=Student(), data=Data(train="x", template="llama3"), stages=[Distill()], output="o")
    said = "data.template 'llama3' writes chats differently from the tokenizer's own template; 'chatml' fits"
    assert f"template  does not fit: {said}" in str(plan(recipe))
    assert "template  chatml" in str(plan(override(recipe, ["data.template=auto"], "r.py")))
    own = override(override(recipe, ["data.template=auto"], "r.py"), ["stages.0.data.template=llama3"], "r.py")
    assert f"template  does not fit: stages.0.{said}" in str(plan(own))
    with pytest.raises(ValueError, match="'chatml' fits"):
        _check_template(recipe, 1, recipe.stages[0])
    with pytest.raises(ValueError, match="^stages.0.data.template 'llama3'"):
        _check_template(own, 1, own.stages[0])


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
    ids, targets = RowTokenizer(Data(train="x"), tokenizer, "assistant")("here", {"messages": chat})
    marked = [tokenizer.decode(run) for mark, run in groups(ids, targets) if mark]
    assert marked == ["red cat<|end|>"] * 2
    bare = tokenizer.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert ids == tokenizer.apply_chat_template(chat, chat_template=bare)["input_ids"]


def groups(ids, targets):
    for mark, run in itertools.groupby(zip(ids, targets, strict=True), key=lambda pair: pair[1]):
        yield mark, [token for token, _ in run]
