"""docs/structure.md and docs/structure.svg show the tree as it is, and the check can tell when they do not."""

from __future__ import annotations

import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from moesaic.cli import main
from scripts import draw_structure as draw
from scripts import readme_tables

REPO = Path(__file__).resolve().parents[1]


def test_the_drawings_are_fresh() -> None:
    names = [str(path.relative_to(REPO)) for path in draw.stale(REPO)]
    assert names == [], "run `make docs` and commit the result"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A repository of three rooms: llm imports engine twice and errors once; engine imports errors once."""
    files = {
        "llm.py": "from moesaic.engine import a\nfrom moesaic.engine.a import b\nfrom moesaic import errors\n",
        "engine/a.py": "def f():\n    from moesaic.errors import E\n",
        "engine/__init__.py": "",
        "errors.py": "class E(Exception): ...\n",
    }
    for name, text in files.items():
        path = tmp_path / "src" / "moesaic" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path


def test_it_counts_what_is_there(small: Path) -> None:
    seen = draw.survey(small / "src" / "moesaic")
    assert [(r.name, r.files, r.lines) for r in seen.rooms] == [("llm", 1, 3), ("engine", 2, 2), ("errors", 1, 1)]
    assert seen.edges == {("llm", "engine"): 2, ("llm", "errors"): 1, ("engine", "errors"): 1}
    assert "llm.py    -> engine/ (2), errors.py (1)" in draw.markdown(seen)


def test_each_arrow_and_box_is_drawn_once(small: Path) -> None:
    picture = ElementTree.fromstring(draw.svg(draw.survey(small / "src" / "moesaic")))
    titles = sorted(node.text or "" for node in picture.iter("{http://www.w3.org/2000/svg}title"))
    assert titles == ["engine/ imports errors.py (1)", "llm.py imports engine/ (2)", "llm.py imports errors.py (1)"]
    assert len(list(picture.iter("{http://www.w3.org/2000/svg}rect"))) == 1 + 3  # the ground and three rooms


def test_the_check_sees_a_change(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert draw.main(["--check"], small) == 1
    assert "Run `make docs`" in capsys.readouterr().out
    assert draw.main([], small) == 0
    assert draw.main(["--check"], small) == 0
    (small / "src" / "moesaic" / "engine" / "a.py").write_text("x = 1\n")
    assert draw.main(["--check"], small) == 1
    assert draw.main([], small) == 0
    (small / "docs" / "structure.svg").unlink()
    assert draw.stale(small) == [small / "docs" / "structure.svg"]


def test_equal_trees_give_equal_bytes(small: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    copy = tmp_path_factory.mktemp("copy") / "repo"
    shutil.copytree(small, copy)
    assert list(draw.outputs(small).values()) == list(draw.outputs(copy).values())


def test_an_unknown_room_is_not_drawn_over(small: Path) -> None:
    (small / "src" / "moesaic" / "utils.py").write_text("")
    with pytest.raises(ValueError, match="utils"):
        draw.survey(small / "src" / "moesaic")


def test_the_tables_of_the_readme_are_fresh() -> None:
    text = (REPO / "README.md").read_text(encoding="utf-8")
    assert readme_tables.filled(text) == text, "run `make docs` and commit the result"


def test_every_flag_that_the_migration_page_names_exists(capsys: pytest.CaptureFixture[str]) -> None:
    """Third column of its tables, against `--help` of generate and serve."""
    for command in ("generate", "serve"):
        main([command, "--help"])
    offered = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    page = (REPO / "docs" / "coming-from-vllm-sglang.md").read_text(encoding="utf-8")
    page = page.partition("## What has no counterpart yet")[0]
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    named = {flag for row in rows if len(row) > 3 for flag in re.findall(r"--[a-z][a-z-]*", row[2])}
    assert len(named) > 20
    assert named <= offered, named - offered
