"""A kernel backend of somebody else's, as docs/planner.md gives it: installed, planned, run, and held to be right."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from moesaic.contracts.contract import Contract
from moesaic.errors import UnsupportedError
from moesaic.kernels import reference, registry
from tests.cli_support import SRC, Done, call
from tests.compare import assert_rows_close
from tests.operands import expert_weights, plain_rows

DOC = Path(__file__).resolve().parents[1] / "docs" / "planner.md"
PROMPT = ("--prompt", "What is 12 + 30?", "--max-tokens", "64", "--temperature", "0", "--dtype", "float32")


def block(language: str) -> str:
    """The one code block of a language in the page."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", DOC.read_text(encoding="utf-8"), re.M | re.S)
    return str(found)


def project(folder: Path, code: str) -> Path:
    folder.mkdir()
    (folder / "pyproject.toml").write_text(block("toml"), encoding="utf-8")
    (folder / "moesaic_by_expert.py").write_text(code, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pip put it: a folder to be on sys.path."""
    at = tmp_path_factory.mktemp("backend")
    argv = ["install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    source = project(at / "moesaic-by-expert", block("python"))
    subprocess.run([sys.executable, "-m", "pip", *argv, "--target", at / "site", source], check=True, timeout=120)
    return at / "site"


def announced(folder: Path, code: str, name: str = "by_expert") -> Path:
    """A package with the same entry point, without pip: what lies on the path is installed."""
    folder.mkdir(parents=True)
    (folder / "moesaic_by_expert.py").write_text(code, encoding="utf-8")
    info = folder / "moesaic_by_expert-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: moesaic-by-expert\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[moesaic.kernels]\n{name} = moesaic_by_expert\n")
    return folder


def python(site: Path, *argv: str) -> Done:
    path = os.pathsep.join(str(each) for each in (site, SRC, SRC.parent))
    done = subprocess.run(
        [sys.executable, *argv], capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr)


def moesaic(site: Path, *commands: tuple[str, ...]) -> list[Done]:
    """Commands of one process that has the package on its path."""
    program = (
        "import json, sys\n"
        "from tests.cli_support import call\n"
        "done = [call(*argv) for argv in json.loads(sys.argv[1])]\n"
        "print(json.dumps([[each.code, each.out, each.err] for each in done]))\n"
    )
    ran = python(site, "-c", program, json.dumps(commands))
    assert ran.code == 0, ran
    return [Done(*each) for each in json.loads(ran.out)]


def kernels(found: Any) -> set[str]:
    return {stage["kernel"] for layer in found["layers"] for cell in layer["cells"]
            for stage in cell["path"]["stages"] if stage["role"] == "experts"}  # fmt: skip


def test_the_plan_takes_it_where_its_contract_fits_and_only_there(installed: Path) -> None:
    taken, invariant, why, mxfp8, gpu = moesaic(
        installed, ("plan", "--json"), ("plan", "--json", "--deterministic"),
        ("plan", "--deterministic", "--why", "by_expert"), ("plan", "--scheme", "mxfp8", "--why", "by_expert"),
        ("plan", "--gpu", "h100", "--experts", "by_expert"),
    )  # fmt: skip
    assert kernels(json.loads(taken.out)) == {"by_expert"}
    assert "by_expert" not in kernels(json.loads(invariant.out))
    assert "its result for a row depends on the other rows, which --deterministic forbids" in why.out
    assert "takes weights in bf16, not in mxfp8" in mxfp8.out
    assert gpu.code == 4
    assert re.search(r"^by_expert +runs on cpu, not on cuda$", gpu.out, re.M)


def test_generation_runs_with_it_and_gives_the_same_answer(installed: Path) -> None:
    """Its function is called for every mixture of every step, by the plan's binding and by nothing else."""
    program = (
        "import moesaic_by_expert as backend\n"
        "from moesaic import LLM, SamplingParams\n"
        "calls, real = [], backend.experts\n"
        "backend.experts = lambda *args: calls.append(len(args[0].data)) or real(*args)\n"
        "llm = LLM(progress=False, dtype='float32', experts='by_expert')\n"
        "llm.generate(['What is 1 + 1?'], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))\n"
        "print(len(calls), calls[0] > 1, calls[-1], 'by_expert' in llm.launched.built.plan.explain())\n"
        "from tests.cli_support import call\n"
        f"print(call('generate', *{PROMPT!r}).out)"
    )
    seen, _, answer = python(installed, "-c", program).out.partition("\n")
    assert seen.split() == ["12", "True", "1", "True"], "4 mixtures, 1 + 2 steps"
    assert answer.strip() == call("generate", *PROMPT).out.strip()
    assert "Answer: 42" in answer


FAULTS = (
    ('raise RuntimeError("no such instruction")', "fails on this machine: no such instruction"),
    ("return x_TD * 0", "computes wrong results on this machine"),
    ('raise KeyError("x")', "fails its probe on this machine (KeyError('x'))"),
)
"""(first line of `expert`, the reason that it leads to)."""


def spoilt(line: str) -> str:
    code, head = block("python"), "def expert(x_TD, w13_ID, w2_DI):\n"
    assert code.count(head) == 1
    return code.replace(head, f"{head}    {line}\n")


def test_a_failing_probe_is_a_reason_and_the_next_candidate_runs(tmp_path: Path) -> None:
    line, reason = FAULTS[0]
    why, answered, demanded = moesaic(
        announced(tmp_path / "site", spoilt(line)), ("plan", "--why", "by_expert"), ("generate", *PROMPT),
        ("generate", *PROMPT, "--experts", "by_expert"),
    )  # fmt: skip
    assert (why.code, why.err) == (0, "")
    assert {each.split(": ", 1)[1] for each in why.out.splitlines()} == {reason}
    assert "Answer: 42" in answered.out
    assert demanded.code == 2
    assert reason in demanded.err
    assert "Works here: --experts" in demanded.err


@pytest.mark.parametrize(("line", "reason"), FAULTS)
def test_whatever_a_probe_does_becomes_a_reason(line: str, reason: str) -> None:
    module = ModuleType("by_expert")
    exec(compile(spoilt(line), "by_expert", "exec"), module.__dict__)
    assert registry.probed(module) == reason


@pytest.mark.parametrize(
    ("before", "after", "name", "says"),
    [
        ("import torch\n", "import torch_of_another_name\n", "by_expert", "cannot be imported (ModuleNotFoundError("),
        ("CONTRACTS = (", "OTHER = (", "by_expert", "has no tuple CONTRACTS of contracts"),
        ("def experts(", "def others(", "by_expert", "declares experts and has no function of that name"),
        ('path=path_of("experts")', 'path=path_of("experts"), packing="mine"', "by_expert",
         "packs experts as 'mine' and has no pack"),
        ("", "", "by_expart", "declares a contract for 'by_expert'"),
        ("", "", "cpu", "bears the name of another backend"),
    ],
)
def test_a_package_that_is_no_backend_is_named(
    before: str, after: str, name: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = announced(tmp_path / "site", block("python").replace(before, after, 1), name)
    monkeypatch.syspath_prepend(site)
    monkeypatch.delitem(sys.modules, "moesaic_by_expert", raising=False)
    with pytest.raises(UnsupportedError) as caught:
        registry.backends.__wrapped__()
    monkeypatch.delitem(sys.modules, "moesaic_by_expert", raising=False)
    assert str(caught.value).startswith(f"entry point {name} of moesaic-by-expert: the kernel backend {says}")


def test_the_command_line_says_so_in_one_line(tmp_path: Path) -> None:
    site = announced(tmp_path / "site", "import torch_of_another_name\n")
    (done,) = moesaic(site, ("generate", *PROMPT))
    assert done.code == 4
    assert "Correct or uninstall the package." in done.error


# --- is it right? ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    path = tmp_path_factory.mktemp("code") / "moesaic_by_expert.py"
    path.write_text(block("python"), encoding="utf-8")
    spec = spec_from_file_location("moesaic_by_expert", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("tokens", [0, 1, 7, 33])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-5), (torch.bfloat16, 2**-7)])
def test_its_results_are_those_of_the_reference(
    backend: ModuleType, tokens: int, dtype: torch.dtype, limit: float
) -> None:
    """Ragged: an expert without tokens, one with half of them, ids of -1."""
    x_TD, w13, w2 = (torch.randn(*s).to(dtype) for s in ((tokens, 16), (5, 24, 16), (5, 16, 12)))
    ids_TA = torch.randint(0, 4, (tokens, 2), dtype=torch.int32)
    ids_TA[::3, 1], ids_TA[1::2, 0] = -1, 2
    weights_TA = torch.rand(tokens, 2)
    assert backend.probe() is None
    assert all(isinstance(each, Contract) for each in backend.CONTRACTS)
    y_TD = backend.experts(plain_rows(x_TD), expert_weights(w13, w2), ids_TA, weights_TA)
    wide = reference.experts(
        plain_rows(x_TD.double()), expert_weights(w13.double(), w2.double()), ids_TA, weights_TA.double()
    )
    assert (y_TD.dtype, y_TD.shape) == (dtype, x_TD.shape)
    if tokens:
        assert_rows_close(y_TD, wide, limit)


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_plan_that_the_page_quotes_is_one_of_the_reviewed() -> None:
    golden = (DOC.parents[1] / "tests" / "plan_fixtures" / "golden" / "deepseek-r1-w4afp8.txt").read_text("utf-8")
    assert block("text") in golden


def test_the_drawing_is_fresh() -> None:
    from scripts import draw_planner

    assert draw_planner.main(["--check"]) == 0, "run `python -m scripts.draw_planner` and commit the result"
