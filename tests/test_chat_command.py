"""`moesaic chat`: over a pipe, on a terminal, interrupted, and at the end of its context."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from moesaic import LLM, SamplingParams
from moesaic.commands import chat
from tests.cli_support import LENGTH, call, command, environment, write_model

QUICK = ("--max-tokens", "5", "--no-progress")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def llm(model: Path) -> LLM:
    return LLM(str(model), progress=False)


def replies(llm: LLM, *messages: str, system: str | None = None, tokens: int = 5) -> list[str]:
    """What the model says to each message in turn, by the Python API."""
    turns = [] if system is None else [{"role": "system", "content": system}]
    said = []
    for message in messages:
        turns.append({"role": "user", "content": message})
        said.append(llm.chat(turns, SamplingParams(temperature=0, max_tokens=tokens))[0].text)
        turns.append({"role": "assistant", "content": said[-1]})
    return said


def printed(texts: list[str]) -> str:
    return "".join(f"{text}\n" for text in texts)


def test_a_pipe_holds_one_message_per_line_of_one_conversation(model: Path, llm: LLM) -> None:
    done = call("chat", model, *QUICK, stdin=b"the dog\n\n  \r\nand more\nthe dog")
    said = replies(llm, "the dog", "and more", "the dog")
    assert said[0] != said[2], "the history must matter, or this test could not see that it was lost"
    assert done.out == printed(said)
    assert done.code == 0


def test_system_reset_help_exit(model: Path, llm: LLM) -> None:
    script = b"/help\nhi\n/reset\n/system be brief\nhi\n/system\n/reset\nhi\n/nonsense\n/exit\nnever seen\n"
    done = call("chat", model, "--system", "go on", *QUICK, stdin=script)
    first, second, third = (replies(llm, "hi", system=s)[0] for s in ("go on", "be brief", None))
    assert len({first, second, third}) == 3
    assert done.out == printed([first, second, third])
    assert done.code == 0
    assert "/reset" in done.err
    assert "no command /nonsense" in done.err


def test_a_line_that_begins_with_a_space_is_no_command(model: Path, llm: LLM) -> None:
    assert call("chat", model, *QUICK, stdin=b" /exit\n").out == printed(replies(llm, " /exit"))


def test_failures_end_a_piped_chat(model: Path, tmp_path: Path) -> None:
    done = call("chat", model, *QUICK, stdin=b"hi\n\xff\xfe\nhi\n")
    assert done.code == 5
    assert "standard input:2: is not UTF-8: byte 0 is 0xff" in done.err.splitlines()[-1]
    plain = write_model(tmp_path / "plain", chat=False)
    done = call("chat", plain, stdin=b"hi\n")
    assert done.code == 4
    assert "chat template" in done.error


def test_the_end_of_the_context_drops_nothing(model: Path, llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    talk = chat.Chat(llm, SamplingParams(temperature=0, max_tokens=30, ignore_eos=True), None)
    cut, refusal = False, None
    for _ in range(50):
        before = [dict(turn) for turn in talk.turns]
        try:
            talk.take("more words and more words")
        except chat.RequestError as error:
            refusal = error
            break
        assert talk.turns[: len(before)] == before
        assert [turn["role"] for turn in talk.turns[len(before) :]] == ["user", "assistant"]
        cut = cut or "cut off" in capsys.readouterr().err
    assert refusal is not None, "the context never ended"
    assert talk.turns == before
    assert f"too long for {LENGTH} tokens" in refusal.what
    assert "/reset" in str(refusal.remedy)
    assert cut, "an answer that ends for want of room says so"
    assert talk.take("/reset")
    assert talk.take("hi")
    done = call("chat", model, *QUICK, stdin=b"word " * 2000)
    assert done.code == 5
    assert "conversation is too long" in done.err.splitlines()[-1]
    assert "Traceback" not in done.err


class Interrupting:
    """A stdout that gets a real SIGINT while the n-th piece of text is written."""

    def __init__(self, at: int) -> None:
        self.at, self.pieces = at, list[str]()

    def write(self, text: str) -> None:
        self.pieces.append(text)
        if len(self.pieces) == self.at:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return False


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = replies(llm, "the dog", tokens=100)[0]
    talk = chat.Chat(llm, SamplingParams(temperature=0, max_tokens=100), None)
    out = Interrupting(at=4)
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "stdout", out)
    assert talk.take("the dog")
    monkeypatch.undo()
    said = talk.turns[1]["content"]
    assert 0 < len(said) < len(whole)
    assert whole.startswith(said)
    assert "".join(out.pieces) == said + "\n"
    assert signal.getsignal(signal.SIGINT) is handler
    assert "stopped; what was said is kept" in capsys.readouterr().err
    assert not llm.engine.has_work
    llm.engine.check()
    talk.take("and more")
    turns = [{"role": "user", "content": "the dog"}, {"role": "assistant", "content": said}]
    next_one = llm.chat([*turns, {"role": "user", "content": "and more"}], talk.params)[0].text
    assert talk.turns[3]["content"] == next_one


def test_ctrl_c_before_the_first_word_takes_the_message_back(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    talk = chat.Chat(llm, SamplingParams(temperature=0, max_tokens=100), None)
    stream = llm.stream

    def slow(prompt: list[int], params: SamplingParams) -> Iterator[object]:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # somebody who will not wait
        yield from stream(prompt, params)

    llm.stream = slow  # type: ignore[method-assign, assignment]
    try:
        assert talk.take("the dog")
    finally:
        llm.stream = stream  # type: ignore[method-assign]
    assert talk.turns == []
    assert "taken back" in capsys.readouterr().err


def test_a_terminal_is_sent_no_control_characters(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert chat.visible("a\x1b[2Jb\tc\n\x07é") == "a\\x1b[2Jb\tc\n\\x07é"


# --- a real terminal -------------------------------------------------------------------------------------------------


# Makes its standard input the controlling terminal, so that Ctrl-C typed there is a signal, which a process in the
# background would have inherited as ignored; then becomes the command.
TAKE_TERMINAL = """import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])"""


class Terminal:
    """A process on a pseudo-terminal, and what it has shown."""

    def __init__(self, argv: list[str]) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", TAKE_TERMINAL, *argv],
            stdin=slave, stdout=slave, stderr=slave, env=environment(TERM="dumb"), start_new_session=True,
        )  # fmt: skip
        os.close(slave)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait_for(self, pattern: str, timeout: float = 90) -> None:
        """Reads until the pattern appears behind what was waited for before."""
        end = time.monotonic() + timeout
        while not (found := re.search(pattern, self.shown, re.DOTALL)):
            ready, _, _ = select.select([self.master], [], [], max(0, end - time.monotonic()))
            assert ready, f"{pattern!r} did not come; this did: {self.shown!r}"
            try:
                self.shown += os.read(self.master, 65536).decode("utf-8", "replace")
            except OSError:  # the other side is gone
                pytest.fail(f"{pattern!r} did not come before the end; this did: {self.shown!r}")
        self.shown = self.shown[found.end() :]

    def interrupt_prompt(self, pattern: str) -> None:
        """Types Ctrl-C at a prompt until it is heard.

        CPython's input() with readline does not hear one that comes between its prompt and its first wait for a key.
        """
        for _ in range(20):
            time.sleep(0.3)
            self.type("\x03")
            with suppress(AssertionError):
                return self.wait_for(pattern, timeout=4)
        pytest.fail("Ctrl-C was never heard")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


def test_on_a_terminal(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", max_position_embeddings=40000)
    terminal = Terminal(command("chat", model, "--ignore-eos", "--no-progress"))
    try:
        terminal.wait_for("/help lists the commands.*> ")
        terminal.interrupt_prompt("Ctrl-D or /exit leaves.*> ")  # no reason to leave
        terminal.type("the dog\n")
        terminal.wait_for("the dog\r\n.{40}")  # the answer streams ...
        terminal.type("\x03")  # ... and would go on for 40,000 tokens
        terminal.wait_for("stopped; what was said is kept\r\n> ")
        terminal.type("/nonsense\n")
        terminal.wait_for("no command /nonsense.*> ")
        terminal.type("\x04")
        assert terminal.process.wait(30) == 0
    finally:
        terminal.close()
