"""The rooms of `src/moesaic`, in law order, and a scanner of who imports whom.

The list `LAW` is the only place where rooms are named; the architecture test (scripts/law.py) and the drawing
(scripts/draw_structure.py) both read it. To add a room, add it to its row here and say why in the commit.
No file of the package is executed: imports are read from the syntax tree.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "moesaic"

# Top to bottom: a row imports only from rows below it; rooms of one row do not import one another.
# `__init__` is the public face (`from moesaic import LLM`), `__main__` the one of `python -m moesaic`.
# Amended from the design's list: config and errors are two rows, because reading the configuration raises our errors;
# formats stand above contracts, because reading a `quantization_config` yields schemes, which are contract vocabulary.
LAW: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli",),
    ("commands",),
    ("serving",),
    ("__init__",),
    ("llm",),
    ("engine",),
    ("models",),
    ("moe",),
    ("layers",),
    ("planning",),
    ("kernels",),
    ("formats",),
    ("contracts",),
    ("parallel",),
    ("hardware", "text", "assets", "tasks"),
    ("config",),
    ("errors",),
)
ROW = {room: row for row, rooms in enumerate(LAW) for room in rooms}
ROOMS = tuple(ROW)


@dataclass(frozen=True, order=True)
class Import:
    """One import statement: its file and line, the dotted module it names, whether it runs at import time."""

    path: Path
    line: int
    module: str
    at_import_time: bool


def python_files(root: Path) -> list[Path]:
    """All Python files under the package root (a folder named like the package), sorted."""
    return sorted(path for path in root.rglob("*.py") if "__pycache__" not in path.parts)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def room_of(path: Path, root: Path) -> str:
    """The room that a file belongs to: the first folder under the package, or the file's stem at the top."""
    first = path.relative_to(root).parts[0]
    return first.removesuffix(".py")


def module_name(path: Path, root: Path) -> str:
    parts = (PACKAGE, *path.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of_module(module: str, root: Path) -> str | None:
    """The room that a dotted module name points into, or None if it is not one of ours.

    `moesaic` itself, and names in it that are no room (`moesaic.__version__`), are the room `__init__`.
    """
    parts = module.split(".")
    if parts[0] != PACKAGE:
        return None
    if len(parts) == 1:
        return "__init__"
    exists = (root / parts[1]).is_dir() or (root / f"{parts[1]}.py").is_file()
    return parts[1] if exists or parts[1] in ROW else "__init__"


def imports_of(path: Path, root: Path) -> list[Import]:
    """Every import in a file, at any depth, relative ones resolved, literal `import_module("...")` included."""
    found: list[Import] = []
    for node, deferred in _walk(parse(path), deferred=False):
        for module in _modules_named(node, path, root):
            found.append(Import(path, getattr(node, "lineno", 0), module, not deferred))
    return found


def room_edges(root: Path) -> dict[tuple[str, str], int]:
    """(importing room, imported room) -> how many imports; a room's imports of itself are left out."""
    edges: dict[tuple[str, str], int] = {}
    for path in python_files(root):
        source = room_of(path, root)
        for item in imports_of(path, root):
            target = room_of_module(item.module, root)
            if target is not None and target != source:
                edges[source, target] = edges.get((source, target), 0) + 1
    return dict(sorted(edges.items()))


def _walk(node: ast.AST, *, deferred: bool) -> Iterator[tuple[ast.AST, bool]]:
    """All nodes, each with whether it runs later than the import of its file (in a function, or for types only)."""
    for child in ast.iter_child_nodes(node):
        yield child, deferred
        if isinstance(child, ast.If) and _is_type_checking(child.test):
            for part in child.body:
                yield part, True
                yield from _walk(part, deferred=True)
            for part in child.orelse:
                yield part, deferred
                yield from _walk(part, deferred=deferred)
        else:
            inside = deferred or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _walk(child, deferred=inside)


def _is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def _modules_named(node: ast.AST, path: Path, root: Path) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = _absolute(node, path, root)
        # `from moesaic import llm` names a room; `from moesaic.engine import blocks` is in the room either way.
        return [f"{base}.{alias.name}" for alias in node.names] if base == PACKAGE else [base]
    if isinstance(node, ast.Call) and node.args and _called(node) in {"import_module", "__import__"}:
        return [name] if (name := _leading_text(node.args[0]).rstrip(".")) else []
    return []


def _absolute(node: ast.ImportFrom, path: Path, root: Path) -> str:
    if not node.level:
        return node.module or ""
    package = module_name(path, root).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    package = package[: len(package) - (node.level - 1)]
    return ".".join([*package, *(node.module.split(".") if node.module else [])])


def _called(node: ast.Call) -> str:
    return ast.unparse(node.func).rsplit(".", 1)[-1]


def _leading_text(node: ast.expr) -> str:
    """The literal a string expression begins with: all of "a.b", and "a." of f"a.{name}"."""
    if isinstance(node, ast.JoinedStr):
        node = node.values[0] if node.values else ast.Constant("")
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
