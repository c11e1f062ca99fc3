"""What a judge's server sent, as a reply. Every reader here is total: whatever came back is a reply, with `why` where it has no text.

Servers put text into lists of parts, thoughts into fields of their own, errors under status 200, and numbers into strings.
"""

import json
import math
import re
import unicodedata
from typing import Any

Reply = dict[str, Any]  # text, why, finish, logprobs, input_tokens, output_tokens, served_by; stranger, no_money, body where they are so
_HALVES = re.compile("[\ud800-\udfff]")
_KEPT = 20_000  # characters of a body without text that are kept
_NO_MONEY = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "insufficient_balance", "insufficient_credits")
_TAGS = r"think|thinking|thought|thoughts|reasoning|seed:think"
_BLOCKS = (
    re.compile(rf"<(?P<tag>{_TAGS})\b[^<>]*>.*?</(?P=tag)\s*>", re.DOTALL | re.IGNORECASE),
    re.compile(r"\[THINK\].*?\[/THINK\]|◁think▷.*?◁/think▷|<\|begin_of_thought\|>.*?<\|end_of_thought\|>", re.DOTALL),
    re.compile(r"<\|channel\|>(?:analysis|commentary)\b.*?(?=<\|channel\|>final|$)", re.DOTALL),
)
_CLOSED = re.compile(rf"^.*(?:(?i:</(?:{_TAGS})\s*>)|\[/THINK\]|◁/think▷|<\|end_of_thought\|>)", re.DOTALL)
_OPEN = re.compile(rf"(?:(?i:<(?:{_TAGS})\b[^<>]*>)|\[THINK\]|◁think▷|<\|begin_of_thought\|>).*$", re.DOTALL)
_BRACKETED = re.compile(r"(?<=\[)\d+\.?\d*(?=\])")


def short(said: object, most: int = 160) -> str:
    """The beginning of what was said, on one line, without halves of surrogate pairs."""
    return _HALVES.sub("\ufffd", " ".join(str(said).split()))[:most]


def parse(text: str) -> Any:
    """JSON as a value; None for what is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def read_reply(body: str) -> Reply:
    """The body of a /chat/completions answer with status 200 as a reply."""
    found = parse(body)
    if not isinstance(found, dict):
        return _reply(
            why=f"the answer is no JSON object: {short(body, 80)!r}", input_tokens=0, output_tokens=0, stranger=True, body=body[:_KEPT]
        )
    reply = _reply(**_usage(found), served_by=found["model"] if isinstance(found.get("model"), str) else None)
    choices = found.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else None
    if error := found.get("error") or (choice or {}).get("error"):
        nothing = {"input_tokens": reply["input_tokens"] or 0, "output_tokens": reply["output_tokens"] or 0}
        return (
            reply
            | nothing
            | {"why": f"an error in the place of a reply: {short(_message(error))}", "body": body[:_KEPT]}
            | ({"no_money": True} if has_no_money(error) else {})
        )
    if choice is None:
        unlike = {} if "choices" in found or "usage" in found else {"stranger": True}
        return reply | unlike | {"why": f"the reply holds no choices: {short(body, 80)}", "body": body[:_KEPT]}
    message = choice.get("message")
    message = message if isinstance(message, dict) else {}
    reply["finish"] = choice["finish_reason"] if isinstance(choice.get("finish_reason"), str) else None
    reply["text"], reply["logprobs"] = _text(message.get("content", choice.get("text"))), log_probabilities(choice.get("logprobs"))
    if not reply["text"].strip() and reply["logprobs"] is None:
        reply |= {"why": _why_silent(message, reply["finish"]), "body": body[:_KEPT]}
    return reply


def validated(reply: Any) -> Reply:
    """A reply as it stands in a journal, with everything of the type that it should have."""
    if not isinstance(reply, dict):
        return _reply(why="the journal holds no reply here")
    text = reply.get("text")
    made = _reply(**{key: reply[key] for key in ("why", "finish", "served_by", "body") if isinstance(reply.get(key), str)})
    made |= {"text": text if isinstance(text, str) else "", "logprobs": log_probabilities(reply.get("logprobs"))}
    made |= {key: _count(reply.get(key)) for key in ("input_tokens", "output_tokens")}
    if made["why"] is None and not made["text"].strip() and made["logprobs"] is None:
        made["why"] = "the reply holds no text"
    return made


def _reply(**known: Any) -> Reply:
    empty = {"text": "", "why": None, "finish": None, "logprobs": None, "input_tokens": None, "output_tokens": None, "served_by": None}
    return empty | known


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _usage(found: dict[str, Any]) -> dict[str, int | None]:
    usage = found.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    return {"input_tokens": _count(usage.get("prompt_tokens")), "output_tokens": _count(usage.get("completion_tokens"))}


def _text(content: Any) -> str:
    """Text of a message's content: a string, or a list of parts, of which those that are text count."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    return "".join(part if isinstance(part, str) else _part(part) for part in parts)


def _part(part: Any) -> str:
    if not isinstance(part, dict) or part.get("type", "text") not in ("text", "output_text"):
        return ""
    text = part.get("text")
    text = text.get("value") if isinstance(text, dict) else text
    return text if isinstance(text, str) else ""


def _why_silent(message: dict[str, Any], finish: str | None) -> str:
    """Why a message holds no text."""
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    refused = [message.get("refusal"), *(part.get("refusal") for part in parts if isinstance(part, dict))]
    if refusal := next((text for text in refused if text), None):
        return f"the judge refused: {short(refusal, 80)}"
    if finish == "content_filter":
        return "a content filter stopped the judge"
    if any(message.get(key) for key in ("reasoning_content", "reasoning", "reasoning_details", "thinking")):
        return "the judge thought (reasoning_content) and gave no answer" + (
            ": its tokens ran out; raise max_tokens with --judge-parameters" if finish == "length" else ""
        )
    if message.get("tool_calls") or message.get("function_call"):
        return "the judge called a tool in the place of an answer"
    return "the reply holds no text" + (": the tokens ran out; raise max_tokens with --judge-parameters" if finish == "length" else "")


def _message(error: Any) -> Any:
    return error.get("message") or error.get("code") or error if isinstance(error, dict) else error


def has_no_money(error: Any) -> bool:
    """Whether an error says, by its code or type and not by its text, that the account cannot pay."""
    return isinstance(error, dict) and any(error.get(key) in _NO_MONEY for key in ("code", "type") if isinstance(error.get(key), str))


def log_probabilities(given: Any) -> dict[str, Any] | None:
    """OpenAI's log-probabilities of the first token, `{"content": [{"top_logprobs": [{"token", "logprob"}]}]}`; None where there are none.

    Entries that are no log-probability of a token (of another type, NaN, above 0) are left out.
    """
    content = given.get("content") if isinstance(given, dict) else None
    first = content[0] if isinstance(content, list) and content and isinstance(content[0], dict) else {}
    listed = first.get("top_logprobs")
    top = [
        {"token": one["token"], "logprob": float(one["logprob"])}
        for one in (listed if isinstance(listed, list) else [])
        if isinstance(one, dict) and isinstance(one.get("token"), str) and _is_log_probability(one.get("logprob"))
    ]
    return {"content": [{**top[0], "top_logprobs": top}]} if top else None


def _is_log_probability(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value <= 1e-3  # rounding


def without_thoughts(text: str) -> str:
    """A reply without what a judge thought aloud: `<think>` blocks and their like, also without a beginning or an end."""
    for block in _BLOCKS:
        text = block.sub("", text)
    return _OPEN.sub("", _CLOSED.sub("", text))


def plain_ratings(text: str) -> str:
    """A reply whose bracketed numbers Python reads as numbers: digits of other scripts as 0 to 9, no leading zeros, no endless ones."""
    return _BRACKETED.sub(lambda match: _plain_number(match.group()), text)


def _plain_number(number: str) -> str:
    whole, point, rest = "".join(letter if letter == "." else str(unicodedata.digit(letter)) for letter in number).partition(".")
    return (whole.lstrip("0") or "0")[:4] + point + rest[:12]
