"""FastChat's own judge prompts, matches and parsing (fschat 0.2.36, untouched), asked through our journal.

FastChat picks its client by the judge's name and calls it deep inside; here that name carries the client.
"""

import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

from llamba.eval.judge import Messages
from llamba.eval.scores import require_packages

Complete = Callable[[Messages], str]


class JudgeName(str):
    """A judge's name that answers for the judge."""

    complete: Complete

    def __new__(cls, name: str, complete: Complete) -> "JudgeName":
        made = super().__new__(cls, name)
        made.complete = complete
        return made


class _Everyone(list):
    def __contains__(self, name: object) -> bool:
        return True


def modules() -> tuple[Any, Any]:
    """`fastchat.llm_judge.common` and `.gen_judgment`, with our client in the place of openai 0.28's."""
    require_packages("fschat", "openai")
    if "anthropic" not in sys.modules and importlib.util.find_spec("anthropic") is None:
        sys.modules["anthropic"] = types.ModuleType("anthropic")  # imported by FastChat at its top, used for no judge of ours
    from fastchat.conversation import get_conv_template
    from fastchat.llm_judge import common, gen_judgment

    common.OPENAI_MODEL_LIST = _Everyone()
    common.get_conversation_template = lambda name: get_conv_template("chatgpt")
    common.chat_completion_openai = lambda model, conv, temperature, max_tokens: model.complete(conv.to_openai_api_messages())
    return common, gen_judgment
