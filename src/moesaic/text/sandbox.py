"""A Jinja environment for chat templates, which come with checkpoints and are not trusted.

Jinja's immutable sandbox keeps a template away from Python's internals and from the caller's data. This one also
meters it: loops, calls, time, and the size of every string that it can make. The metering is a fence against
templates that would hang or flood a server, not a proof: what one filter call does inside is bounded by its input.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from types import CodeType
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_STEPS = 2_000_000  # loop turns and calls in one rendering; a conversation of 1,000 messages takes about 20,000
MAX_SECONDS = 10.0
MAX_CHARS = 32 * 1024 * 1024  # of any string, and of the whole output
_BIG_NUMBER = re.compile(r"\d{7}")


class GenerationTag(Extension):
    """`{% generation %}` marks the assistant's text for training; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class GuardedNamespace(Namespace):
    """`namespace()` whose attributes cannot start with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` stays usable as a keyword, as in Jinja's own
        for name in dict(*args[1:], **kwargs):
            GuardedNamespace._check(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        GuardedNamespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}")


class Sandbox(ImmutableSandboxedEnvironment):
    """One rendering's environment. Make a new one for each: it carries the meter. `compiled` may be shared."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        extensions = [GenerationTag, loopcontrols]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, optimized=False)
        self._steps = 0
        self._deadline = time.monotonic() + MAX_SECONDS
        self.filters = {name: self._guarded(function) for name, function in self.filters.items()}
        self.filters |= {"tojson": to_json, "metered": self.metered, "sized": self.sized}
        self.globals = {
            "range": self.globals["range"],
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
            "cycler": self.globals["cycler"],
            "joiner": self.globals["joiner"],
            "namespace": GuardedNamespace,
            "raise_exception": raise_exception,
            "strftime_now": lambda pattern: datetime.now().strftime(pattern),
        }

    @staticmethod
    def compiled(source: str) -> CodeType:
        """Compile a template, putting a meter on each loop and a size check on each `~`. Raises TemplateSyntaxError."""
        environment = Sandbox()
        tree = environment.parse(source)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, "metered", [], [], None, None)
        for macro in list(tree.find_all((nodes.Macro, nodes.CallBlock))):
            _size_concatenations(macro)
        _size_concatenations(tree)
        return environment.compile(tree)

    def render_bounded(self, code: CodeType, variables: dict[str, Any]) -> str:
        """Run a compiled template. Raises TemplateError and whatever else the template provokes."""
        template = self.template_class.from_code(self, code, self.make_globals(None))
        pieces, size = [], 0
        for piece in template.generate(variables):
            self.tick()
            size += len(piece)
            if size > MAX_CHARS:
                raise SecurityError(f"the text grows beyond {MAX_CHARS} characters")
            pieces.append(piece)
        return "".join(pieces)

    def tick(self) -> None:
        """Count one loop turn or call. Raises SecurityError when the rendering has had its share."""
        self._steps += 1
        if self._steps > MAX_STEPS or (self._steps % 64 == 0 and time.monotonic() > self._deadline):
            raise SecurityError("the template runs for too long")

    def metered(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items, each counted."""
        for item in items:
            self.tick()
            yield item

    def sized(self, value: Any) -> Any:
        """The value, if it is not an oversized string."""
        if isinstance(value, str | list | tuple) and len(value) > MAX_CHARS:
            raise SecurityError(f"a value grows beyond {MAX_CHARS} characters")
        return value

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self.tick()
        if getattr(__obj, "__name__", "") in ("format", "format_map"):
            # Jinja has put a guard of its own around the method; the pattern is what the method is bound to.
            _check_widths(getattr(getattr(__obj, "__wrapped__", __obj), "__self__", ""))
        _check_numbers((*args, *kwargs.values()))
        return __self.sized(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            _check_product(left, right)
        elif operator == "**":
            _check_numbers((left, right), limit=1000)
        elif operator == "%":
            _check_widths(left)
        return self.sized(super().call_binop(context, operator, left, right))

    def _guarded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that counts as a call, takes no huge number (a width) and returns no huge string."""

        @functools.wraps(function)  # keeps the marks by which Jinja passes the context or the environment
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            options = args[2:] if hasattr(function, "jinja_pass_arg") else args[1:]
            _check_numbers((*options, *kwargs.values()))
            if function.__name__ == "do_format":
                _check_widths(args[0])
            return self.sized(function(*args, **kwargs))

        return guarded


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The `tojson` filter as chat templates expect it: nothing escaped for HTML, keys in their own order."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> None:
    """How a template refuses a conversation."""
    raise TemplateError(message)


def _size_concatenations(root: nodes.Node) -> None:
    """Wrap each `a ~ b` below `root` in the size check (once)."""
    for parent in [root, *root.find_all(nodes.Node)]:
        for field, value in list(parent.iter_fields()):
            if isinstance(value, list):
                setattr(parent, field, [_sized_node(item, parent) for item in value])
            else:
                setattr(parent, field, _sized_node(value, parent))


def _sized_node(value: Any, parent: nodes.Node) -> Any:
    wrapped = isinstance(parent, nodes.Filter) and parent.name == "sized"
    if not isinstance(value, nodes.Concat) or wrapped:
        return value
    return nodes.Filter(value, "sized", [], [], None, None)


def _check_numbers(values: Iterable[Any], limit: int = 10_000_000) -> None:
    if any(isinstance(value, int) and abs(value) > limit for value in values):
        raise SecurityError(f"a number above {limit} is not allowed here")


def _check_widths(pattern: Any) -> None:
    if isinstance(pattern, str) and _BIG_NUMBER.search(pattern):
        raise SecurityError("a format with a huge width is not allowed")


def _check_product(left: Any, right: Any) -> None:
    for sequence, count in ((left, right), (right, left)):
        if isinstance(sequence, str | list | tuple) and isinstance(count, int) and len(sequence) * count > MAX_CHARS:
            raise SecurityError(f"a value grows beyond {MAX_CHARS} characters")
