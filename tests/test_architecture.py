"""The law of the house (scripts/law.py) holds on the real tree, and every rule is able to fail."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts import house, law

REPO = Path(__file__).resolve().parents[1]
ROOT = REPO / "src" / house.PACKAGE

TREE_RULES: tuple[Callable[[Path], list[str]], ...] = (
    law.import_order,
    law.torch_free_statically,
    law.torch_free_at_run_time,
    law.vendors_in_one_lazy_place,
    law.sizes,
    law.line_budgets,
    law.environment_only_in_config,
    law.no_swallowed_errors,
    law.ops_have_twins,
    law.no_model_names_in_generic_code,
)


@pytest.mark.parametrize("rule", TREE_RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_the_law(rule: Callable[[Path], list[str]]) -> None:
    assert rule(ROOT) == []


@pytest.mark.parametrize("folder", ["tests", "scripts", "benchmarks", "training"])
def test_code_outside_the_package_keeps_the_sizes(folder: str) -> None:
    assert law.sizes(REPO / folder) == []


def test_every_model_has_a_parity_test() -> None:
    assert law.models_have_parity_tests(ROOT, REPO / "tests") == []


def test_every_benchmark_is_listed() -> None:
    assert law.benchmarks_are_listed(REPO) == []


def test_the_scanner_sees_the_real_package() -> None:
    """Guards against rules that pass because they look at nothing."""
    assert len(house.python_files(ROOT)) > 10
    assert ("engine", "errors") in house.room_edges(ROOT)
    assert {"request.py", "blocks.py", "scheduler.py", "params.py"} <= {p.name for p in (ROOT / "engine").glob("*.py")}


# --- each rule can fail ----------------------------------------------------------------------------------------------


def tree(tmp_path: Path, files: dict[str, str]) -> Path:
    """A package `moesaic` with these files (path -> source), and an `__init__.py` in each folder."""
    root = tmp_path / house.PACKAGE
    for name, source in {"__init__.py": "", "errors.py": "", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source), encoding="utf-8")
        if path.parent != root and not (path.parent / "__init__.py").exists():
            (path.parent / "__init__.py").touch()
    return root


LONG = "x = 1\n" * 501
LONG_FUNCTION = "def f():\n" + "    x = 1\n" * 60
NINE = "def f(a, b, c, d, e, *, f, g, h, i): ...\n"
DESCRIBE = "def describe(config): ...\n"

BROKEN: list[tuple[Callable[[Path], list[str]], dict[str, str], str]] = [
    (law.import_order, {"errors.py": "import moesaic.config", "config.py": ""}, "errors may not import config"),
    (law.import_order, {"layers/norm.py": "from moesaic.moe.layer import x", "moe/layer.py": ""}, "layers may not"),
    (law.import_order, {"layers/norm.py": "from ..engine import x", "engine/e.py": ""}, "may not import engine"),
    (law.import_order, {"layers/norm.py": "from .. import engine", "engine/e.py": ""}, "may not import engine"),
    (law.import_order, {"formats/f.py": "def g():\n    from moesaic import llm", "llm.py": ""}, "may not import llm"),
    (law.import_order, {"text/t.py": "import moesaic.hardware", "hardware.py": ""}, "text may not import hardware"),
    (law.import_order, {"layers/n.py": "import importlib\nimportlib.import_module('moesaic.cli')"}, "import cli"),
    (law.import_order, {"layers/n.py": "import importlib as i\ni.import_module(f'moesaic.models.{n}')"}, "models"),
    (law.import_order, {"llm.py": "from moesaic import __version__"}, "llm may not import __init__"),
    (law.import_order, {"utils/x.py": ""}, "room 'utils' is not in the law"),
    (law.import_order, {"cli.py": "import moesaic.utils.x", "utils/x.py": ""}, "unknown room 'utils'"),
    (law.torch_free_statically, {"engine/blocks.py": "import torch"}, "torch-free"),
    (law.torch_free_statically, {"contracts/x.py": "def f():\n    from torch import nn"}, "torch-free"),
    (law.vendors_in_one_lazy_place, {"kernels/a.py": "import deep_gemm"}, "at import time"),
    (law.vendors_in_one_lazy_place, {"kernels/a.py": "class A:\n    import ray"}, "at import time"),
    (law.vendors_in_one_lazy_place, {"llm.py": "def f():\n    import transformers"}, "transformers is never"),
    (law.vendors_in_one_lazy_place, {"llm.py": "def f():\n    import pickle"}, "pickle is never"),
    (
        law.vendors_in_one_lazy_place,
        {"kernels/a.py": "def f():\n    import humming", "kernels/b.py": "def f():\n    import humming.core"},
        "humming is imported in 2 files",
    ),
    (law.sizes, {"llm.py": LONG}, "501 lines"),
    (law.sizes, {"llm.py": LONG_FUNCTION}, "61 lines long"),
    (law.sizes, {"llm.py": NINE}, "takes 9 parameters"),
    (law.line_budgets, {f"moe/m{i}.py": "x = 1\n" * 401 for i in range(3)}, "moe: 1203 lines"),
    (law.line_budgets, {f"{room}/a{i}.py": "x = 1\n" * 630 for room in ("planning", "contracts") for i in (1, 2)},
     "planning + contracts"),
    (law.environment_only_in_config, {"llm.py": "import os\nx = os.environ['A']"}, "llm.py:2"),
    (law.environment_only_in_config, {"llm.py": "import os\ndef f(): return os.getenv('A')"}, "llm.py:2"),
    (law.environment_only_in_config, {"llm.py": "from os import environ"}, "llm.py:1"),
    (law.environment_only_in_config, {"text/config.py": "from os import environ"}, "text/config.py:1"),
    (law.no_swallowed_errors, {"llm.py": "try: x = 1\nexcept: x = 2"}, "bare"),
    (law.no_swallowed_errors, {"llm.py": "try: x = 1\nexcept ValueError: pass"}, "does nothing"),
    (law.no_swallowed_errors, {"llm.py": "try: x = 1\nexcept ValueError: ..."}, "does nothing"),
    (law.no_swallowed_errors, {"llm.py": "with contextlib.suppress(Exception): x = 1"}, "hides every error"),
    (law.no_swallowed_errors, {"llm.py": "import torch\ntorch.load('x')"}, "unpickles"),
    (law.ops_have_twins, {"kernels/ops.py": "def norm(x): ...", "kernels/reference.py": ""}, "norm has no twin"),
    (law.ops_have_twins, {"kernels/ops.py": "def norm(x): ..."}, "norm has no twin"),
    (law.ops_have_twins, {"kernels/ops.py": "x = 1"}, "declares no op"),
    (
        law.ops_have_twins,
        {"kernels/ops.py": "class Ops:\n    def route(self, x): ...", "kernels/reference.py": "def norm(x): ..."},
        "route has no twin",
    ),
    (
        law.ops_have_twins,
        {"kernels/ops.py": "def norm(x, *, eps): ...", "kernels/reference.py": "def norm(x): ..."},
        "but its twin takes ['x']",
    ),
    (
        law.ops_have_twins,
        {"kernels/ops.py": "def mm(a, b): ...", "kernels/reference.py": "def mm(b, a): ..."},
        "but its twin takes ['b', 'a']",
    ),
    (
        law.ops_have_twins,
        {"kernels/ops.py": "def mm(a): ...", "kernels/reference.py": "def mm(a, b): ..."},
        "needs ['b'] besides",
    ),
    (
        law.no_model_names_in_generic_code,
        {"models/deepseek_v3.py": DESCRIBE, "moe/route.py": "if kind == 'deepseek_v3': ..."},
        "names the model deepseek_v3",
    ),
    (
        law.no_model_names_in_generic_code,
        {"models/qwen3_moe.py": "from moesaic.models.a import describe", "layers/n.py": "class Qwen3MoeNorm: ..."},
        "names the model qwen3_moe",
    ),
    (
        law.no_model_names_in_generic_code,
        {"models/mixtral.py": "describe = 1", "engine/e.py": "f(mixtral=1)"},
        "names the model mixtral",
    ),
]


@pytest.mark.parametrize(("rule", "files", "message"), BROKEN, ids=lambda v: getattr(v, "__name__", None))
def test_each_rule_can_fail(
    tmp_path: Path, rule: Callable[[Path], list[str]], files: dict[str, str], message: str
) -> None:
    violations = rule(tree(tmp_path, files))
    assert any(message in violation for violation in violations), violations


GOOD = {
    "__init__.py": "",
    "config.py": "import os\nfrom moesaic.errors import E\nx = os.environ.get('A')",
    "commands/plan.py": "from moesaic import __version__, llm",
    "llm.py": "from .engine import scheduler",
    "engine/scheduler.py": "import moesaic.engine.blocks",
    "engine/blocks.py": "import collections",
    "engine/runner.py": "import torch",
    "contracts/base.py": "'''Data only.'''",
    "models/mixtral.py": DESCRIBE,
    "models/loading.py": "def stream(): ...",
    "moe/layer.py": "'''As in mixtral.'''\nclass Loading:\n    def f(self, a, b, c, d, e, f, g, h): ...",
    "kernels/a.py": "def f():\n    import humming\n    try: x = 1\n    except ValueError: return None",
    "kernels/ops.py": "class Ops:\n    def norm(self, x, *, eps): ...\n    def _f(self): ...\ndef _private(): ...",
    "kernels/reference.py": "def norm(x, *, eps, dtype=None): ...\ndef _helper(): ...",
    "kernels/_triton/k.py": "import triton\n@triton.jit\ndef k(a, b, c, d, e, f, g, h, i, j): ...",
}


@pytest.mark.parametrize("rule", TREE_RULES, ids=lambda rule: rule.__name__)
def test_each_rule_can_pass(tmp_path: Path, rule: Callable[[Path], list[str]]) -> None:
    assert rule(tree(tmp_path, GOOD)) == []


@pytest.mark.parametrize(
    "files",
    [
        {"contracts/base.py": "import moesaic.formats.f", "formats/f.py": "import torch"},
        {"planning/p.py": "", "planning/__init__.py": "from moesaic.formats import f", "formats/f.py": "import torch"},
        {"engine/request.py": "", "__init__.py": "import torch"},
    ],
    ids=["through another room", "through its own folder", "through the package"],
)
def test_a_torch_import_is_seen_through_other_modules(tmp_path: Path, files: dict[str, str]) -> None:
    root = tree(tmp_path, files)
    stand_in = root.parent / "torch.py"  # found before the real one: this test is about the rule, not about torch
    stand_in.write_text("")
    assert law.torch_free_statically(root) == []
    assert "also imports torch" in law.torch_free_at_run_time(root)[0]


def test_a_torch_free_module_that_cannot_be_imported_is_a_violation(tmp_path: Path) -> None:
    root = tree(tmp_path, {"contracts/base.py": "import nothing_of_this_name"})
    assert "nothing_of_this_name" in law.torch_free_at_run_time(root)[0]


def test_a_model_without_parity_is_seen(tmp_path: Path) -> None:
    root, tests = tree(tmp_path, {"models/mixtral.py": DESCRIBE, "models/loading.py": ""}), tmp_path / "tests"
    tests.mkdir()
    assert "no parity test at all" in law.models_have_parity_tests(root, tests)[0]
    (tests / "test_parity.py").write_text("'''mixtral'''\n# mixtral\ndef test_it(): ...\n")
    assert law.models_have_parity_tests(root, tests) == ["models/mixtral.py has no parity test"]
    (tests / "parity_cases.py").write_text("CASES = {'mixtral': 1}\n")
    assert law.models_have_parity_tests(root, tests) == []


def test_an_unlisted_benchmark_is_seen(tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "gemm.py").touch()
    (tmp_path / "benchmarks" / "_common.py").touch()
    makefile = tmp_path / "Makefile"
    makefile.write_text("BENCH_CPU :=\n")
    assert "gemm.py is in none" in law.benchmarks_are_listed(tmp_path)[0]
    makefile.write_text("BENCH_CPU := gemm.py \\\n  lost.py\nBENCH_GPU := gemm.py\n")
    assert law.benchmarks_are_listed(tmp_path) == [
        "the Makefile lists benchmarks/lost.py, which does not exist",
        "the Makefile lists gemm.py twice",
    ]
    makefile.write_text("BENCH_CPU := \\\n  gemm.py\nBENCH_GPU :=\n")
    assert law.benchmarks_are_listed(tmp_path) == []


def test_the_law_names_each_room_once() -> None:
    rooms = [room for row in house.LAW for room in row]
    assert sorted(rooms) == sorted(set(rooms))
