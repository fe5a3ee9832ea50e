"""How the native library is built, what happens where it cannot be, and the tapes that are made of its calls."""

from __future__ import annotations

import stat
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moesaic import LLM, SamplingParams
from moesaic.assets import embedded_model
from moesaic.engine import tapes
from moesaic.errors import UnsupportedError
from moesaic.hardware import local_cpu
from moesaic.kernels import _native, cpu, cpu_native
from moesaic.kernels.ops import FUSED
from moesaic.kernels.registry import local_catalogue
from moesaic.kernels.tape import record
from moesaic.models.build import plan_here, spec_of
from moesaic.models.checkpoint import Checkpoint
from tests.native_support import needs_compiler


def compiler(folder: Path, body: str) -> str:
    """An executable shell script that passes for a C++ compiler; $OUT is the file that it should write."""
    path = folder / "c++"
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo fake && exit\nfor OUT; do :; done\n{body}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def use(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr(_native, "COMPILERS", (path,))


def test_without_a_compiler_there_is_a_reason_and_a_hint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(monkeypatch, "no-such-compiler")
    with pytest.raises(UnsupportedError, match=r"no C\+\+ compiler.*apt install g\+\+"):
        _native.build(tmp_path)


def test_a_failed_compilation_says_what_the_compiler_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(monkeypatch, compiler(tmp_path, "echo moesaic.cpp:1: error: too old >&2; exit 1"))
    with pytest.raises(UnsupportedError, match="error: too old"):
        _native.build(tmp_path / "cache")
    assert not any((tmp_path / "cache").iterdir()), "nothing half-made stays behind"


def test_a_cache_that_cannot_be_written_names_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(monkeypatch, compiler(tmp_path, ":"))
    (tmp_path / "file").touch()
    with pytest.raises(UnsupportedError, match="MOESAIC_CACHE"):
        _native.build(tmp_path / "file" / "cache")


def test_builders_at_the_same_time_end_with_one_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    work = f'echo part > "$OUT"; sleep 0.2; echo whole > "$OUT"; echo >> {tmp_path}/runs'
    use(monkeypatch, compiler(tmp_path, work))
    paths: list[Path] = []
    together = [threading.Thread(target=lambda: paths.append(_native.build(tmp_path / "cache"))) for _ in range(4)]
    for thread in together:
        thread.start()
    for thread in together:
        thread.join()
    assert len(set(paths)) == 1
    assert paths[0].read_text() == "whole\n"
    assert list((tmp_path / "cache").iterdir()) == [paths[0]]
    runs = len((tmp_path / "runs").read_text())
    _native.build(tmp_path / "cache")
    assert len((tmp_path / "runs").read_text()) == runs, "what is there is not built again"


def test_the_name_says_what_the_library_was_made_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = compiler(tmp_path, ":")
    names = {_native.fingerprint(path)}
    monkeypatch.setattr(_native, "FLAGS", (*_native.FLAGS, "-DX"))
    names.add(_native.fingerprint(path))
    monkeypatch.setattr(_native, "local_cpu", lambda: replace(local_cpu(), features=frozenset()))
    names.add(_native.fingerprint(path))
    monkeypatch.setattr(_native, "sources", lambda: [])
    names.add(_native.fingerprint(path))
    assert len(names) == 4


def test_a_broken_backend_is_rejected_and_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise UnsupportedError("there is no C++ compiler", remedy="Install one.")

    with monkeypatch.context() as here:  # the catalogue below is kept for all that comes after
        here.setattr(cpu_native, "library", broken)
        reason = cpu_native.probe.__wrapped__()
    assert reason == "there is no C++ compiler. Install one."
    spec = spec_of(Checkpoint.open(embedded_model()).config)
    catalogue = [replace(c, broken=reason) if c.backend == "cpu_native" else c for c in local_catalogue()]
    plan = plan_here(spec, local_cpu(), "bfloat16", catalogue=catalogue)
    chosen = {choice.op: choice for choice in plan.ops[plan.base]}
    assert not set(chosen) & set(FUSED), "what nobody fuses is composed"
    assert {choice.chosen for choice in chosen.values()} == {"cpu"}
    assert any(each.candidate == "cpu_native" and each.reason == reason for each in chosen["linear"].rejected)


# --- tapes -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(progress=False, max_num_seqs=8)


def answers(llm: LLM) -> list[list[int]]:
    """Requests of different lengths, so that batches shrink: from five rows to one."""
    llm.engine.scheduler.blocks.reset()
    prompts = [llm.chat_tokens([{"role": "user", "content": "What is 17 + 25? " * (1 + n)}]) for n in range(5)]
    params = [SamplingParams(temperature=0, max_tokens=6 + 5 * n, ignore_eos=True) for n in range(5)]
    return [list(result.tokens) for result in llm.generate(prompts, params)]


@needs_compiler
def test_a_tape_gives_the_same_tokens(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = llm.engine.runner.graphs
    assert isinstance(graphs, tapes.DecodeTapes)
    taped = answers(llm)
    assert {rows for (rows, _, _), frame in graphs.frames.items() if frame.tape.count} == {1, 2, 3, 4, 5}
    again = answers(llm)  # all from tapes of the first time
    monkeypatch.setattr(llm.engine.runner, "graphs", None)
    assert answers(llm) == taped == again


@needs_compiler
def test_frames_are_bounded_and_room_grows(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tapes, "FRAMES", 2)
    runner = llm.engine.runner
    made = tapes.DecodeTapes(runner.model, runner.pool, runner.feed, 8, 2048)
    for rows in (1, 2, 3):
        made.frame(rows, 256)
    assert [key[0] for key in made.frames] == [2, 3]
    assert [tapes.room_for(length) for length in (1, 256, 257, 513, 1024, 1025)] == [256, 256, 512, 1024, 1024, 2048]
    monkeypatch.setattr(tapes, "MEMORY", 8 * 2048 * 3)
    assert tapes.DecodeTapes(runner.model, runner.pool, runner.feed, 8, 2048).most == 3


@needs_compiler
def test_a_stretch_with_other_kernels_has_no_tape() -> None:
    x, w = torch.randn(3, 16), torch.randn(8, 16)

    def native() -> Tensor:
        return cpu_native.linear(x.view(3, 4, 4).flatten(1), w)

    def mixed() -> Tensor:
        return cpu_native.linear(x, w) * 2

    y, tape = record(native)
    assert tape is not None
    assert tape.count == 1
    torch.testing.assert_close(y, cpu.linear(x, w))
    x.copy_(torch.randn(3, 16))
    tape.play()
    torch.testing.assert_close(y, cpu.linear(x, w), msg="the tape reads what is there now")
    assert record(mixed)[1] is None
    assert not cpu_native.LINEAR, "recording leaves nothing behind"
    assert cpu_native.Entry.note is None


@needs_compiler
@pytest.mark.parametrize("copies", [True, False])
def test_what_may_copy_and_may_not_is_looked_at(copies: bool) -> None:
    """`to` is a view where there is nothing to convert, and a kernel where there is: under inference mode it comes as
    one operator that says it is a view."""
    x, w = torch.randn(2, 32), torch.randn(8, 32)

    between = torch.bfloat16 if copies else torch.float32

    def stretch() -> Tensor:
        return cpu_native.linear(cpu_native.linear(x, w).to(between).float(), w[:, :8])

    with torch.inference_mode():
        y, tape = record(stretch)
    assert torch.equal(y, stretch())
    assert (tape is None) == copies
