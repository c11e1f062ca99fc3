"""Chat templates that mark the assistant's words: those that the library brings, and which of them writes what a tokenizer's own writes."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from llamba.base.foreign import reading
from llamba.settings import Data

TEMPLATES = Path(__file__).parent / "templates"
AUTO = "auto"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_START, _END = "<|im_start|>", "<|im_end|>"

_SYSTEM = {"role": "system", "content": " be brief\n"}
_ASKED, _ANSWERED = {"role": "user", "content": " red or green? "}, {"role": "assistant", "content": "the big green tree \n"}
_THOUGHT = {"role": "assistant", "content": "<think>\nred?\n</think>\n\nred"}
PROBES = (
    [_ASKED],
    [_ASKED, _ANSWERED],
    [_SYSTEM, _ASKED],
    [_SYSTEM, _ASKED, _ANSWERED, {"role": "user", "content": "a cat\n\na dog"}, {"role": "assistant", "content": "bird"}],
    [_ASKED, _THOUGHT, _ASKED, _THOUGHT],
)


class Template(NamedTuple):
    """A chat template and where it comes from: "the tokenizer's own", a bundled name, or a file."""

    name: str
    text: str


def marks_answers(template: str | None) -> bool:
    """Whether a chat template marks the assistant's words with `{% generation %}`."""
    return bool(template and _GENERATION.search(template))


def _written(tokenizer: Any, template: str | None, chat: list[dict[str, str]], opened: bool) -> str | None:
    """A conversation as a template writes it (None: the tokenizer's own), None where the template refuses it."""
    try:
        with reading("the chat template"):
            return str(tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False, add_generation_prompt=opened))
    except ValueError:
        return None


def writes_alike(tokenizer: Any, template: str) -> bool:
    """Whether a template writes what the tokenizer's own writes, on conversations with and without system message, turns and thoughts."""
    cases = [(chat, opened) for chat in PROBES for opened in (False, True)]
    pairs = ((_written(tokenizer, template, *case), _written(tokenizer, None, *case)) for case in cases)
    return all(one == other for one, other in pairs) and _written(tokenizer, template, [_ASKED], False) is not None


def _filled(text: str, tokenizer: Any) -> str:
    """A bundled template with what it leaves to the tokenizer's own one: the opening and the default system message of ChatML."""
    if "default_system" not in text or not tokenizer.chat_template:
        return text
    plain, asked = _written(tokenizer, None, [_ASKED], False) or "", _written(tokenizer, None, [_SYSTEM, _ASKED], False) or ""
    found = {"opening": asked.partition(_START)[0]}
    head, _, rest = plain.partition(f"{_START}system\n")
    if rest and head == found["opening"]:
        found["default_system"] = rest.partition(_END)[0]
    return "".join(f"{{%- set {name} = {json.dumps(value)} -%}}" for name, value in found.items() if value) + text


def bundled() -> dict[str, str]:
    """The library's templates by name."""
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(TEMPLATES.glob("*.jinja"))}


def named(name: str, tokenizer: Any | None = None) -> Template:
    """The bundled template of that name, or the file. Raises ValueError where it is neither, and for a file that is no text."""
    known = bundled()
    if name in known:
        return Template(name, known[name] if tokenizer is None else _filled(known[name], tokenizer))
    if not Path(name).is_file():
        raise ValueError(f"data.template must be {AUTO!r}, a file or one of {sorted(known)}, got {name!r}")
    with reading(f"the chat template {name}"):
        return Template(name, Path(name).read_text(encoding="utf-8"))


def fitting(tokenizer: Any) -> Template | None:
    """The bundled template that writes what the tokenizer's own writes, None where there is none."""
    if not tokenizer.chat_template:
        return None
    found = (Template(name, _filled(text, tokenizer)) for name, text in bundled().items())
    return next((template for template in found if writes_alike(tokenizer, template.text)), None)


def chosen(data: Data, tokenizer: Any) -> Template | None:
    """The template to tokenise with: the one that the data name; else the tokenizer's own, if it marks the assistant's words; else the
    bundled one that writes the same and marks them; else the tokenizer's own. None where there is none at all.

    Raises ValueError for a name that means no template.
    """
    if data.template not in (None, AUTO):
        return named(str(data.template), tokenizer)
    own = Template("the tokenizer's own", tokenizer.chat_template) if tokenizer.chat_template else None
    if own is None or data.template is None or marks_answers(own.text):
        return own
    return fitting(tokenizer) or own


def require_marks(template: Template | None, key: str = "data.template") -> Template:
    """Raises ValueError, with what to do, for a template that does not say which words are the assistant's."""
    names = ", ".join(bundled())
    if template is None:
        raise ValueError(
            f"the tokenizer has no chat template, and what is learnt are the assistant's words (targets='assistant'): set {key} to the one "
            f"of the model's training ({names}, or a file), or use targets='all'"
        )
    if not marks_answers(template.text):
        raise ValueError(
            f"{template.name} chat template does not mark the assistant's words with {{% generation %}}, and none of the bundled ones "
            f"({names}) writes the same: set {key} to a copy of it with {{% generation %}} and {{% endgeneration %}} around the answers, "
            "or use targets='all'"
        )
    return template


def require_fit(template: Template | None, tokenizer: Any, key: str = "data.template") -> None:
    """Raises ValueError for a template that writes a plain conversation differently from the tokenizer's own, naming one that does not."""
    own = tokenizer.chat_template
    if template is None or not own or template.text == own:
        return
    mine, theirs = (_written(tokenizer, text, [_ASKED, _ANSWERED], False) for text in (template.text, own))
    if mine != theirs:
        better = fitting(tokenizer)
        which = (
            f"{better.name!r} fits" if better else "none of the bundled ones does" if not marks_answers(own) else "its own marks answers"
        )
        raise ValueError(
            f"{key} {template.name!r} writes chats differently from the tokenizer's own template; {which} ({key}={AUTO} takes what fits)"
        )
