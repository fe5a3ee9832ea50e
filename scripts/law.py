"""The law of the house, as functions: each takes a tree and returns the violations it found, one line of text each.

`root` is the package folder (`src/moesaic`, or a synthetic tree of a test); `repo` is the repository folder.
tests/test_architecture.py runs every rule on the real tree, and proves on small bad trees that each rule can fail.
Rules read syntax trees; only `torch_free_at_run_time` imports anything, in a subprocess.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from scripts.house import ROW, imports_of, module_name, parse, python_files, room_of, room_of_module

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 8
# Amended from the design's 1,200 for planning and contracts, which the search, its values and the contracts keep.
# Beside them live what a model is (`contracts/spec.py`, 260 lines), the verifier, which may share no code with the
# search (310), the cost of a plan (120), measured times (190), and what a plan says of a whole model beyond each path:
# its cache, the one layout of a layer's weights, demands per phase, legal cuts.
LINE_BUDGETS = {("moe",): 1200, ("planning", "contracts"): 2500}

TORCH_FREE_ROOMS = ("contracts", "planning")
TORCH_FREE_FILES = ("engine/request.py", "engine/blocks.py", "engine/scheduler.py", "engine/params.py")
TORCH_LIKE = ("torch", "triton", "transformers")

# Each of these is imported by one file at most, and never when that file is imported.
VENDORS = (
    "aiter", "bitsandbytes", "deep_ep", "deep_gemm", "flash_attn", "flash_mla", "flashinfer", "gguf", "humming",
    "llguidance", "msgpack", "nixl", "nvshmem", "outlines_core", "ray", "reasoning_gym", "tvm_ffi", "xgrammar",
)  # fmt: skip
# The oracle may not be part of what it judges, and nothing that others can write is ever unpickled.
NEVER_IMPORTED = ("transformers", "pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "vllm", "sglang")

GENERIC_ROOMS = ("moe", "layers", "kernels", "engine", "planning", "contracts")

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


# --- who may import whom ---------------------------------------------------------------------------------------------


def import_order(root: Path) -> list[str]:
    """A row imports only rows below it, or its own room; an unknown room is a violation."""
    bad = []
    for path in python_files(root):
        source = room_of(path, root)
        if source not in ROW:
            bad.append(f"{_at(path, root)}: room {source!r} is not in the law (scripts/house.py)")
            continue
        for item in imports_of(path, root):
            target = room_of_module(item.module, root)
            if target is None or target == source:
                continue
            if target not in ROW:
                bad.append(f"{_at(path, root)}:{item.line}: imports the unknown room {target!r}")
            elif ROW[target] <= ROW[source]:
                bad.append(f"{_at(path, root)}:{item.line}: {source} may not import {target} ({item.module})")
    return bad


def torch_free_statically(root: Path) -> list[str]:
    """The torch-free files name no torch (nor Triton) in any import, at any depth."""
    return [
        f"{_at(path, root)}:{item.line}: imports {item.module}, but this file is torch-free"
        for path in _torch_free(root)
        for item in imports_of(path, root)
        if item.module.split(".")[0] in TORCH_LIKE
    ]


def torch_free_at_run_time(root: Path) -> list[str]:
    """Importing the torch-free modules, with all they import in turn, leaves torch out of sys.modules."""
    names = [module_name(path, root) for path in _torch_free(root)]
    program = (
        "import importlib, sys\n"
        "for name in sys.argv[2:]:\n"
        "    importlib.import_module(name)\n"
        "    bad = sorted(set(sys.argv[1].split(',')) & set(sys.modules))\n"
        "    if bad: sys.exit(f'importing {name} also imports {bad[0]}')\n"
    )
    command = [sys.executable, "-c", program, ",".join(TORCH_LIKE), *names]
    # With -c the working directory comes first in sys.path, so it is this tree's package that is imported.
    done = subprocess.run(command, cwd=root.parent, capture_output=True, text=True, timeout=120, check=False)
    return [done.stderr.strip().splitlines()[-1]] if done.returncode else []


def vendors_in_one_lazy_place(root: Path) -> list[str]:
    """A vendor library is imported by one file at most, inside a function; some libraries by none."""
    bad, places = [], {vendor: set[str]() for vendor in VENDORS}
    for path in python_files(root):
        for item in imports_of(path, root):
            top = item.module.split(".")[0]
            where = f"{_at(path, root)}:{item.line}"
            if top in NEVER_IMPORTED:
                bad.append(f"{where}: {top} is never imported here")
            if top in places:
                places[top].add(_at(path, root))
                if item.at_import_time:
                    bad.append(f"{where}: {top} is imported at import time; move it into the function that needs it")
    bad += [f"{vendor} is imported in {len(at)} files: {sorted(at)}" for vendor, at in places.items() if len(at) > 1]
    return bad


# --- size ------------------------------------------------------------------------------------------------------------


def sizes(root: Path) -> list[str]:
    """Files, functions and parameter lists within their limits. Works on any folder of Python files."""
    bad = []
    for path in python_files(root):
        lines = _line_count(path)
        if lines > MAX_FILE_LINES:
            bad.append(f"{_at(path, root)}: {lines} lines (at most {MAX_FILE_LINES})")
        for node in _functions(parse(path)):
            bad += [f"{_at(path, root)}:{node.lineno}: {node.name} {problem}" for problem in _function_sizes(node)]
    return bad


def line_budgets(root: Path) -> list[str]:
    bad = []
    for rooms, budget in LINE_BUDGETS.items():
        total = sum(_line_count(path) for path in python_files(root) if room_of(path, root) in rooms)
        if total > budget:
            bad.append(f"{' + '.join(rooms)}: {total} lines (at most {budget})")
    return bad


def _function_sizes(node: FunctionNode) -> Iterator[str]:
    length = (node.end_lineno or node.lineno) - node.lineno + 1
    if length > MAX_FUNCTION_LINES:
        yield f"is {length} lines long (at most {MAX_FUNCTION_LINES})"
    names = [name for name in _parameters(node) if name not in {"self", "cls"}]
    if len(names) > MAX_PARAMETERS and not _is_device_code(node):
        yield f"takes {len(names)} parameters (at most {MAX_PARAMETERS})"


def _is_device_code(node: FunctionNode) -> bool:
    """Decorated by `triton.jit` (or `@jit`, `@triton.jit(...)`): it takes pointers and compile-time constants."""
    names = {ast.unparse(d.func if isinstance(d, ast.Call) else d) for d in node.decorator_list}
    return bool(names & {"triton.jit", "jit"})


# --- behaviour -------------------------------------------------------------------------------------------------------


def environment_only_in_config(root: Path) -> list[str]:
    """`os.environ`, `os.getenv` and their kin stand in config.py only."""
    names = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
    bad = []
    for path in python_files(root):
        if _at(path, root) == "config.py":
            continue
        for node in ast.walk(parse(path)):
            attribute = isinstance(node, ast.Attribute) and node.attr in names and ast.unparse(node.value) == "os"
            imported = isinstance(node, ast.ImportFrom) and node.module == "os" and names & {a.name for a in node.names}
            if attribute or imported:
                bad.append(f"{_at(path, root)}:{getattr(node, 'lineno', 0)}: the environment is read only in config.py")
    return bad


def no_swallowed_errors(root: Path) -> list[str]:
    """No bare `except:`, no handler that does nothing, no suppress(Exception); no unpickling through torch.load."""
    bad = []
    for path in python_files(root):
        for node in ast.walk(parse(path)):
            if problem := _swallows(node):
                bad.append(f"{_at(path, root)}:{getattr(node, 'lineno', 0)}: {problem}")
    return bad


def _swallows(node: ast.AST) -> str | None:
    if isinstance(node, ast.ExceptHandler):
        if node.type is None:
            return "bare `except:`"
        idle = all(isinstance(s, ast.Pass) or (isinstance(s, ast.Expr) and _is_ellipsis(s.value)) for s in node.body)
        return "a handler that does nothing" if idle else None
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        broad = {ast.unparse(arg) for arg in node.args} & {"Exception", "BaseException"}
        if name.endswith("suppress") and broad:
            return f"suppress({broad.pop()}) hides every error"
        return "torch.load unpickles" if name == "torch.load" else None
    return None


def _is_ellipsis(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is ...


# --- twins, parity, names --------------------------------------------------------------------------------------------


def ops_have_twins(root: Path) -> list[str]:
    """Each op has a function of its name in the reference, which takes its parameters.

    The ops are the public methods of the Protocol `Ops` in kernels/ops.py, and that file's public functions.
    The reference is kernels/reference.py, reference_*.py or reference/*.py. It takes the op's parameters by the same
    names in the same order; parameters of its own need a default. Vacuous only while there is no ops.py.
    """
    ops = root / "kernels" / "ops.py"
    if not ops.exists():
        return []
    twins = {f.name: f for path in _reference_files(root) for f in _public_functions(path)}
    declared = _declared_ops(ops)
    if not declared:
        return ["kernels/ops.py declares no op: where have they gone?"]
    return [f"kernels/ops.py: {op.name} {why}" for op in declared if (why := _mismatch(op, twins.get(op.name)))]


def _mismatch(op: FunctionNode, twin: FunctionNode | None) -> str | None:
    if twin is None:
        return "has no twin in the reference"
    wanted, taken = [name for name in _parameters(op) if name != "self"], _parameters(twin)
    if [name for name in taken if name in wanted] != wanted:
        return f"takes {wanted}, but its twin takes {taken}"
    own = [name for name in taken if name not in wanted and name not in _defaulted(twin)]
    return f"has a twin that needs {own} besides" if own else None


def models_have_parity_tests(root: Path, tests: Path) -> list[str]:
    """The name of each model (a file of models/ that binds `describe`) is a string in a parity test.

    Parity tests are tests/test_parity*.py with tests/parity_cases.py and tests/parity/*.py; a comment or a docstring
    is not enough.
    """
    models = model_names(root)
    files = [*sorted(tests.glob("test_parity*.py")), tests / "parity_cases.py", *sorted(tests.glob("parity/*.py"))]
    files = [path for path in files if path.exists()]
    runs = any(f.name.startswith("test") for path in files for f in _functions(parse(path)))
    if models and not runs:
        return ["there is no parity test at all (tests/test_parity*.py)"]
    strings = {text for path in files for text in _strings(parse(path))}
    return [f"models/{name}.py has no parity test" for name in models if name not in strings]


def no_model_names_in_generic_code(root: Path) -> list[str]:
    """No identifier or string of the generic rooms contains a model's name; a docstring may, as a formula's source."""
    names = {name: _plain(name) for name in model_names(root)}
    bad = []
    for path in python_files(root):
        if room_of(path, root) not in GENERIC_ROOMS:
            continue
        for line, text in _words(parse(path)):
            hits = [name for name, plain in names.items() if plain in _plain(text)]
            bad += [f"{_at(path, root)}:{line}: names the model {name} ({text!r:.60})" for name in hits]
    return bad


def model_names(root: Path) -> list[str]:
    """Stems of the files of models/ that bind `describe` at the top level: by definition, assignment or import."""
    return [path.stem for path in sorted((root / "models").glob("*.py")) if "describe" in _top_level_names(parse(path))]


def benchmarks_are_listed(repo: Path) -> list[str]:
    """Each benchmarks/*.py stands in exactly one of the Makefile's lists, so `make bench` forgets none."""
    files = {p.name for p in (repo / "benchmarks").glob("*.py") if not p.name.startswith("_")}
    text = (repo / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    listed = [
        word
        for line in text.splitlines()
        if (match := re.match(r"BENCH_(CPU|LONG|GPU|LIBRARY)\s*:?=(.*)", line))
        for word in match[2].split()
    ]
    bad = [f"benchmarks/{name} is in none of the Makefile's BENCH_ lists" for name in sorted(files - set(listed))]
    bad += [f"the Makefile lists benchmarks/{name}, which does not exist" for name in sorted(set(listed) - files)]
    return bad + [f"the Makefile lists {name} twice" for name in sorted({n for n in listed if listed.count(n) > 1})]


# --- syntax helpers --------------------------------------------------------------------------------------------------


def _at(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _line_count(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def _torch_free(root: Path) -> list[Path]:
    files = [path for path in python_files(root) if room_of(path, root) in TORCH_FREE_ROOMS]
    return files + [path for name in TORCH_FREE_FILES if (path := root / name).exists()]


def _reference_files(root: Path) -> list[Path]:
    kernels = root / "kernels"
    return sorted([*kernels.glob("reference.py"), *kernels.glob("reference_*.py"), *kernels.glob("reference/*.py")])


def _functions(tree: ast.AST) -> list[FunctionNode]:
    return [node for node in ast.walk(tree) if isinstance(node, FunctionNode)]


def _public_functions(path: Path) -> list[FunctionNode]:
    return [n for n in parse(path).body if isinstance(n, FunctionNode) and not n.name.startswith("_")]


def _declared_ops(path: Path) -> list[FunctionNode]:
    protocols = [n for n in parse(path).body if isinstance(n, ast.ClassDef) and n.name == "Ops"]
    methods = [n for p in protocols for n in p.body if isinstance(n, FunctionNode) and not n.name.startswith("_")]
    return methods + _public_functions(path)


def _parameters(node: FunctionNode) -> list[str]:
    a = node.args
    rest = [extra.arg for extra in (a.vararg, a.kwarg) if extra]
    return [arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs)] + rest


def _defaulted(node: FunctionNode) -> set[str]:
    positional = [*node.args.posonlyargs, *node.args.args]
    names = {arg.arg for arg in positional[len(positional) - len(node.args.defaults) :]}
    return names | {a.arg for a, d in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True) if d is not None}


def _top_level_names(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, FunctionNode | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def _docstrings(tree: ast.Module) -> set[int]:
    """Ids of the constants that are documentation: strings that stand alone as a statement."""
    return {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }


def _strings(tree: ast.Module) -> list[str]:
    docs = _docstrings(tree)
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in docs]
    return [n.value for n in nodes if isinstance(n.value, str)]


def _words(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, text) of every identifier, keyword, attribute, import and string that is not documentation."""
    docs = _docstrings(tree)
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield line, node.value
        for field in ("id", "attr", "arg", "name", "asname", "module"):
            if isinstance(value := getattr(node, field, None), str):
                yield line, value


def _plain(text: str) -> str:
    """Lower case without underscores and dashes, so that Qwen3MoeBlock is seen to hold qwen3_moe."""
    return re.sub(r"[_\-]", "", text.lower())
