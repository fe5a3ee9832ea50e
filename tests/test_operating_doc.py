"""What docs/operating.md says to type, and the files that it shows, hold."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.cli_support import call
from tests.serve_support import shared

PAGE = Path(__file__).resolve().parents[1] / "docs" / "operating.md"


def block(title: str) -> str:
    """The first indented block under a heading."""
    section = PAGE.read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    lines = re.search(r"(?:^    .*\n|^\n)+", section.lstrip("\n")[section.lstrip("\n").index("    ") :], re.MULTILINE)
    assert lines is not None
    return "".join(line[4:] for line in lines[0].splitlines(keepends=True)).strip() + "\n"


def test_the_options_file_resolves(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    text = block("Options")
    file.write_text(text)
    done = call("serve", "--config", file, "--print-config")
    assert done.code == 0, done
    shown = yaml.safe_load(done.out)
    assert {name: shown[name] for name in yaml.safe_load(text)} == yaml.safe_load(text)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_the_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    def verified(text: str) -> tuple[int, str]:
        unit = tmp_path / "moesaic.service"
        unit.write_text(text)
        argv = ["systemd-analyze", "verify", "--man=no", str(unit)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stderr

    # Only what is not on this machine is replaced: the program and the user.
    text = block("systemd").replace("/opt/moesaic/bin/moesaic", sys.executable).replace("User=moesaic", "User=root")
    assert verified(text) == (0, "")
    assert "kill mode" in verified(text.replace("KillMode=mixed", "KillMode=maybe"))[1]  # it does look


def test_the_unit_stops_later_than_the_server_and_restarts_only_what_a_restart_can_help() -> None:
    unit = dict(line.split("=", 1) for line in block("systemd").splitlines() if "=" in line)
    assert int(unit["TimeoutStopSec"]) > 30  # --drain-timeout
    assert set(unit["RestartPreventExitStatus"].split()) == {"2", "3", "4", "6"}


def test_the_container_file_is_well_formed() -> None:
    words = [line.partition(" ") for line in block("Container").replace("\\\n", "").splitlines()]
    assert [each[0] for each in words] == ["FROM", "RUN", "RUN", "USER", "EXPOSE", "ENTRYPOINT"]
    argv = json.loads(words[-1][2])
    assert argv[:2] == ["moesaic", "serve"]
    done = call(*argv[1:], "--print-config")
    assert done.code == 0, done
    assert yaml.safe_load(done.out)["host"] == "0.0.0.0"
    for word, _, rest in words:
        if word == "RUN":
            done_run = subprocess.run(["bash", "-n", "-c", rest], capture_output=True, text=True)
            assert done_run.returncode == 0, done_run.stderr


def test_every_metric_of_the_page_exists_and_every_metric_is_on_the_page() -> None:
    shown = set(re.findall(r"^# TYPE (moesaic_\w+)", shared().http.get("/metrics").text, re.MULTILINE))
    said = {name.partition("{")[0] for name in re.findall(r"`(moesaic_[\w{},]+)`", PAGE.read_text())}
    assert said <= shown
    assert {name.removesuffix("_total") for name in shown} - {name.removesuffix("_total") for name in said} <= {
        "moesaic_kv_blocks", "moesaic_kv_blocks_used", "moesaic_prefix_cache_queried_tokens",
        "moesaic_prefix_cache_hit_tokens",
    }  # what the ratios of the page are made of


def test_every_command_of_the_page_is_understood() -> None:
    """Up to what needs another machine: its options exist."""
    for line in re.findall(r"^    (moesaic (?:serve|bench|plan|doctor).*)$", PAGE.read_text(), re.MULTILINE):
        words = shlex.split(line.partition(" #")[0])[1:]
        help_text = call(words[0], "--help").out
        for word in words:
            if word.startswith("--"):
                assert word in help_text, line
