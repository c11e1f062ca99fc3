"""Talk to a model, or let it complete a text: what `llamba chat` and `llamba generate` do."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TextIO

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from llamba.base.devices import meant
from llamba.base.folders import resolve_draft
from llamba.base.foreign import reading
from llamba.models.loading import load_model, load_tokenizer
from llamba.speculative import Auto, generate
from llamba.speculative.lookahead import schedule
from llamba.speculative.packed import to_int8

HELP = "/reset forgets the conversation, /system TEXT sets the system message (and forgets), /exit or end of file leaves"


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. `temperature` 0 is greedy; the other values then do not apply."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max-new-tokens must be at least 1; got {self.max_new_tokens}")
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or more; got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top-p must be above 0 and at most 1; got {self.top_p}")

    def arguments(self) -> dict[str, float | int | bool]:
        """As arguments of transformers' `generate`."""
        if self.temperature == 0:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        return {"max_new_tokens": self.max_new_tokens, "do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


class Printer(TextStreamer):
    """Writes text as it is made, and remembers it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, out: TextIO):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.out, self.text = out, ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers with each finished piece."""
        self.text += text
        self.out.write(text)
        self.out.flush()


@dataclass(frozen=True)
class Speculation:
    """Where drafts come from (a loaded model, or "lookup": the text itself) and how many tokens are drafted at a time.

    Raises ValueError for a lookahead that is neither a number in range nor an `Auto`, which learns from answer to answer.
    """

    draft: Any
    lookahead: int | Auto = field(default_factory=Auto)

    def __post_init__(self) -> None:
        schedule(self.lookahead)


def load_draft(name: str, model: Any, bits: int | None = None) -> Any:
    """The draft that `name` means for a loaded model: "lookup", or a run folder (the draft it has made), model folder or hub name.

    `bits` as in `load`.
    """
    if name == "lookup":
        return name
    draft = load_model(resolve_draft(name), model.dtype).to(model.device)
    return draft if bits is None else to_int8(draft)


def load(name: str, dtype: str = "auto", device: str = "auto", bits: int | None = None) -> tuple[Any, Any]:
    """A model and its tokenizer from a run folder, a model folder or a hub name; `device` "auto": the accelerator if there is one.

    `bits` 8 puts its matrices into 8 bits. Raises ValueError for these elsewhere than on a CPU, in another dtype than bf16, and for a
    model without matrices that fit.
    """
    device, tokenizer = meant(device), load_tokenizer(name)
    if bits is not None:
        _require_int8(dtype, device)
        return to_int8(load_model(name, torch.bfloat16)), tokenizer
    model = load_model(name, dtype if dtype == "auto" else getattr(torch, dtype))
    if device == "cpu" and dtype == "auto":
        model = model.float()
    return model.to(device), tokenizer


def _require_int8(dtype: str, device: str) -> None:
    if torch.device(device).type != "cpu":
        raise ValueError(f"--bits 8 decodes on a CPU, and there is no such product for {device}; give --device cpu, or leave --bits out")
    if dtype not in ("auto", "bfloat16"):
        raise ValueError(f"--bits 8 computes in bfloat16, got --dtype {dtype}; leave one of them out")


def stream(model: Any, tokenizer: Any, text: str, sampling: Sampling, out: TextIO, speculation: Speculation | None = None) -> str:
    """Continue `text` (special tokens written out), printing as it comes; returns the new text. With `speculation`, how fast it was and
    how many drafts stood is written to standard error.

    Raises ValueError where the text and the new tokens do not fit the model's context.
    """
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).to(model.device)
    length, context = inputs["input_ids"].shape[1], model.config.max_position_embeddings
    if length >= context:
        raise ValueError(f"the text must be shorter than the model's context of {context} tokens; it has {length}; in a chat, /reset helps")
    most, printer, made = min(sampling.max_new_tokens, context - length), Printer(tokenizer, out), None
    try:
        if speculation is None:
            _generate_plain(model, tokenizer, inputs, sampling, most, printer)
        else:
            made = generate(
                model, inputs["input_ids"], draft=speculation.draft, lookahead=speculation.lookahead, max_new_tokens=most,
                temperature=sampling.temperature, top_p=sampling.top_p, streamer=printer,
            )  # fmt: skip
    except KeyboardInterrupt:
        out.write(" [stopped]")
    out.write("\n")
    out.flush()
    if made is not None:
        print(f"[{made}]", file=sys.stderr)
    return printer.text


def _generate_plain(model: Any, tokenizer: Any, inputs: Any, sampling: Sampling, most: int, printer: Printer) -> None:
    """Transformers' own generation, whatever the model."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    arguments = sampling.arguments() | {"max_new_tokens": most}
    with torch.inference_mode():
        model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], streamer=printer, pad_token_id=pad, **arguments
        )


@dataclass
class Chat:
    """A conversation with a model: `answer` adds a turn, `command` handles a line that starts with a slash."""

    model: Any
    tokenizer: Any
    sampling: Sampling
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    speculation: Speculation | None = None

    def __post_init__(self) -> None:
        if self.tokenizer.chat_template is None:
            raise ValueError("chat needs a tokenizer with a chat template; this model has none; `llamba generate` completes plain text")

    def answer(self, text: str, out: TextIO) -> str:
        """One turn: the user's text, the model's answer (streamed to `out` and kept in the conversation)."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        asked = [*self.messages, {"role": "user", "content": text}]
        with reading("the model's chat template refuses this conversation"):
            prompt = self.tokenizer.apply_chat_template(system + asked, tokenize=False, add_generation_prompt=True)
        reply = stream(self.model, self.tokenizer, prompt, self.sampling, out, self.speculation)
        self.messages = [*asked, {"role": "assistant", "content": reply}]
        return reply

    def command(self, line: str) -> str:
        """Do what a slash command says; returns what to tell the user."""
        name, _, rest = line.partition(" ")
        if name == "/system":
            self.system, self.messages = rest.strip() or None, []
            return "system message set" if self.system else "system message removed"
        if name == "/reset":
            self.messages = []
            return "forgotten"
        return HELP


def _lines(interactive: bool) -> Iterable[str]:
    while True:
        try:
            yield input("> " if interactive else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            print("\n(/exit leaves)")


def talk(chat: Chat, out: TextIO = sys.stdout) -> None:
    """Read lines from standard input until its end or /exit; works on a terminal and over a pipe.

    Ctrl-C stops the answer, not the program. An answer that cannot be given is reported and the conversation goes on; over a pipe
    the error ends the program.
    """
    interactive = sys.stdin.isatty()
    if interactive:
        print(HELP, file=sys.stderr)
    torch.manual_seed(chat.sampling.seed)
    for line in _lines(interactive):
        text = line.strip()
        if text == "/exit":
            return
        if text.startswith("/"):
            print(chat.command(text), file=sys.stderr)
        elif text:
            try:
                chat.answer(text, out)
            except ValueError as error:
                if not interactive:
                    raise
                print(f"error: {error}", file=sys.stderr)
