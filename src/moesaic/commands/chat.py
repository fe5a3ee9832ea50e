"""`moesaic chat`: a conversation on the terminal, or over a pipe, one message per line."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING, Any

from moesaic.commands._options import (
    add_model_options,
    add_sampling_options,
    announce,
    load,
    sampling,
    sampling_fields,
)
from moesaic.commands._prompts import decoded
from moesaic.commands._terminal import visible
from moesaic.engine.params import SamplingParams
from moesaic.errors import MoesaicError, RequestError, UnsupportedError

if TYPE_CHECKING:
    from moesaic.llm import LLM, Delta

HELP = """\
/reset         forget the conversation (the system message stays)
/system TEXT   set the system message from now on; without TEXT there is none
/help          this
/exit          leave, as Ctrl-D does
Ctrl-C stops an answer; what was said of it stays in the conversation."""

EPILOG = f"""\
commands in the chat:
{HELP}

Where standard input is not a terminal, each of its lines is a message, and the first failure ends the chat.

examples:
  moesaic chat
  moesaic chat ./mixtral --system "Answer in one sentence." --temperature 0.7
  printf 'Hello\\nWhat is 2 + 2?\\n' | moesaic chat
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "chat", help="talk to a model", epilog=EPILOG, usage="moesaic chat [MODEL] [options]",
        description="Talk to a model: answers appear as they are made, and the conversation is kept.",
    )  # fmt: skip
    parser.add_argument("--system", metavar="TEXT", help="system message (default: none)")
    add_model_options(parser)
    room = "the checkpoint's, else what is left of the context"
    add_sampling_options(parser, without=("n", "logprobs", "prompt_logprobs"), limit=room)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    chosen = sampling_fields(args)
    llm = load(args)
    if not llm.template.names:
        raise UnsupportedError(
            "this checkpoint has no chat template", where=args.model,
            remedy="Use a chat (instruct) checkpoint, or `moesaic generate --raw`.",
        )  # fmt: skip
    announce(args, llm)
    chat = Chat(llm, sampling(chosen, llm.defaults), args.system)
    interactive = sys.stdin.isatty()
    if interactive:
        say("/help lists the commands; Ctrl-D leaves")
    for line in typed() if interactive else piped():
        try:
            if not chat.take(line):
                return 0
        except MoesaicError as error:
            if not interactive:
                raise
            say(f"error: {error.one_line()}")
    return 0


class Chat:
    """A conversation with a model. A message that gets no answer is taken back, so roles always alternate."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None) -> None:
        self.llm, self.params, self.system = llm, params, system
        self.turns: list[dict[str, str]] = []

    def take(self, line: str) -> bool:
        """Does what a line says; False if it says to leave. A line that begins with a space is never a command."""
        word, _, rest = line.partition(" ")
        if not line.startswith("/"):
            if line.strip():
                self.answer(line)
        elif word == "/exit":
            return False
        elif word == "/reset":
            self.turns.clear()
            say("the conversation is forgotten")
        elif word == "/system":
            self.system = rest.strip() or None
            say("the system message is set" if self.system else "there is no system message now")
        elif word == "/help":
            say(HELP)
        else:
            say(f"there is no command {visible(word)}; /help lists them (begin with a space to say it to the model)")
        return True

    def answer(self, text: str) -> None:
        """Streams the answer to standard output and adds both to the conversation."""
        self.turns.append({"role": "user", "content": text})
        said: list[str] = []
        last: Delta | None = None
        try:
            prompt = self.prompt()
            with stoppable() as stopped:
                for delta in self.stream(prompt, stopped):
                    last = delta
                    said.append(delta.text)
                    sys.stdout.write(visible(delta.text))
                    sys.stdout.flush()
            print(flush=True)
        finally:
            if "".join(said):
                self.turns.append({"role": "assistant", "content": "".join(said)})
            else:
                self.turns.pop()
        self.explain(len(prompt), said, last)

    def prompt(self) -> list[int]:
        """The conversation's token ids. Raises RequestError where it has outgrown the context."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        try:
            tokens = self.llm.chat_tokens([*first, *self.turns])
        except RequestError as error:
            if error.where != "prompt":
                raise
            raise self.overflow(error.what) from None
        if len(tokens) >= self.llm.max_model_len:
            raise self.overflow(f"its {len(tokens)} tokens leave no room for an answer")
        return tokens

    def overflow(self, what: str) -> RequestError:
        return RequestError(
            f"the conversation is too long for {self.llm.max_model_len} tokens of context ({what}); "
            "your last message was taken back, the rest is as it was",
            where="context", remedy="Shorten the message, start over with /reset, or raise --max-model-len.",
        )  # fmt: skip

    def stream(self, prompt: list[int], stopped: list[bool]) -> Iterator[Delta]:
        """The answer's deltas until it ends or is stopped."""
        room = self.llm.max_model_len - len(prompt)
        params = capped(self.params, room)
        stream = self.llm.stream(prompt, params)
        try:
            for delta in stream:
                yield delta
                if stopped:
                    return
        finally:
            stream.close()  # type: ignore[attr-defined]  # a generator: closing it aborts the request

    def explain(self, size: int, said: list[str], last: Delta | None) -> None:
        """Says on stderr how an answer ended, where that is not by itself."""
        reason = None if last is None else last.finish_reason
        if last is not None and last.error:
            raise RequestError(last.error, where="answer", remedy="Try again, or /reset.")
        if reason is None:
            kept = "what was said is kept" if "".join(said) else "nothing was said yet; your message was taken back"
            say(f"stopped; {kept}")
        elif reason == "length":
            say(f"cut off by --max-tokens or the context of {self.llm.max_model_len} tokens ({size} were the prompt)")
        elif not "".join(said):
            say("the model said nothing; your message was taken back")


def capped(params: SamplingParams, room: int) -> SamplingParams:
    """An answer may be as long as asked, but near the end of the context only as long as fits."""
    if params.max_tokens is None or params.max_tokens <= room:
        return params
    return replace(params, max_tokens=room, min_tokens=min(params.min_tokens, room))


@contextmanager
def stoppable() -> Iterator[list[bool]]:
    """While inside, the first Ctrl-C fills the list, to be looked at between two steps of the engine, where stopping
    is clean; a second one, of somebody who will not wait, ends the wait at once. Neither leaves the block as an error.
    """
    stopped: list[bool] = []

    def note(number: int, frame: FrameType | None) -> None:
        if stopped:
            raise KeyboardInterrupt
        stopped.append(True)

    before = signal.signal(signal.SIGINT, note)
    try:
        with suppress(KeyboardInterrupt):
            yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


def typed() -> Iterator[str]:
    """Lines of the terminal, with editing and history where there is readline. Ctrl-C empties the line."""
    with suppress(ImportError):
        import readline  # noqa: F401  # importing it is what gives input() its editing
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            say("\nCtrl-D or /exit leaves")
        except EOFError:
            print()
            return
        except UnicodeDecodeError:
            say("that was not UTF-8; nothing was sent")


def piped() -> Iterator[str]:
    """Lines of standard input. Raises RequestError for one that is not UTF-8."""
    for number, line in enumerate(sys.stdin.buffer, 1):
        yield decoded(line, f"standard input:{number}").rstrip("\r\n")


def say(text: str) -> None:
    """A word of the program's own, apart from the conversation."""
    print(text, file=sys.stderr, flush=True)
