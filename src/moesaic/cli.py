"""The `moesaic` command: argument parsing, and how errors become one line and an exit code.

A command is one file of `moesaic/commands/` that defines `add_parser(subparsers)`; it is found by its name. The parser
that it adds sets the default `run`, a function from the parsed arguments to an exit code. Files whose names begin with
an underscore are shared by commands. Nothing here, nor at the top of a command's file, imports torch: `--help` is fast.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from moesaic import __version__, commands
from moesaic.errors import MoesaicError, OptionError

INTERRUPTED, CLOSED_PIPE = 130, 141  # 128 + SIGINT, 128 + SIGPIPE: what a shell reports for them

EPILOG = """\
examples:
  moesaic generate --prompt "What is 487 + 4338?"     answer with the embedded model
  moesaic generate ./model --file prompts.txt --json  one JSON object per prompt of a file
  moesaic chat ./model                                talk to a model

`moesaic COMMAND --help` explains a command. Exit codes: 0 done, 1 failed, 2 wrong option, 3 bad checkpoint,
4 unsupported, 5 bad request, 6 too little memory, 130 interrupted.
"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ours. Options are never abbreviated: a new one cannot change a script."""

    def __init__(self, **settings: Any) -> None:
        settings |= {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(**settings)

    def error(self, message: str) -> NoReturn:
        raise OptionError(message, remedy=f"See `{self.prog} --help`.")


def command_names() -> list[str]:
    """The commands there are, by the files of `moesaic/commands/`."""
    files = (path.stem for folder in commands.__path__ for path in Path(folder).glob("*.py"))
    return sorted(name for name in files if not name.startswith("_"))


def build_parser(command: str | None = None) -> Parser:
    """Of all commands, or of one alone, which spares what only the others import."""
    parser = Parser(
        prog="moesaic",
        description="Run Mixture-of-Experts language models, exactly and fast, on what hardware there is.",
        epilog=EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"moesaic {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    names = command_names()
    for name in [command] if command in names else names:
        import_module(f"moesaic.commands.{name}").add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command of `argv` (without the program's name; None: of this process) and returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a character is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    try:
        code = dispatch(argv)
        sys.stdout.flush()
        return code
    except MoesaicError as error:
        return fail(error.one_line(), error.exit_code)
    except BrokenPipeError:
        abandon_stdout()
        return CLOSED_PIPE
    except KeyboardInterrupt:
        print("moesaic: interrupted", file=sys.stderr)
        return INTERRUPTED


def dispatch(argv: Sequence[str] | None) -> int:
    given = sys.argv[1:] if argv is None else argv
    parser = build_parser(given[0] if given else None)
    try:
        args = parser.parse_args(given)
    except SystemExit as done:  # argparse has printed its help or the version
        return done.code if isinstance(done.code, int) else 0
    if args.command is None:
        parser.print_help(sys.stderr)
        return OptionError.exit_code
    code: int = args.run(args)
    return code


def fail(line: str, code: int) -> int:
    """What was written so far comes before the error, where both go to one place."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        abandon_stdout()
    print(f"moesaic: error: {line}", file=sys.stderr)
    return code


def abandon_stdout() -> None:
    """The reader is gone: what is still buffered has nowhere to go, and flushing it at exit must not complain."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
